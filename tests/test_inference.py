"""The short way of calls without gradients: what it repeats, and what sends a call the long way."""

import copy
import pickle
import weakref
from unittest import mock

import pytest
import torch

import fusedlora
from fusedlora import backends, inference

BF16 = torch.bfloat16


def layer_and_x(rows: int = 3) -> tuple[fusedlora.FusedLoRALinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = fusedlora.FusedLoRALinear(256, 384, r=16, dtype=BF16, adapter_dtype=BF16, device="cuda")
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer, torch.randn(rows, 256, device="cuda", dtype=BF16)


def test_nothing_is_kept_on_a_cpu() -> None:
    layer = fusedlora.FusedLoRALinear(16, 24)
    with torch.no_grad():
        for _ in range(3):
            layer(torch.zeros(2, 16))
    assert layer not in inference._kept and layer.last_backend == "reference"


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize("shape", [(3, 256), (1, 1, 256), (256,)])
    def test_a_repeated_call_gives_the_same(self, shape) -> None:
        layer, _ = layer_and_x()
        x = torch.randn(shape, device="cuda", dtype=BF16)
        with torch.no_grad():
            first = layer(x)
            layer(x)
            assert layer in inference._kept
            with mock.patch.object(backends, "select", side_effect=AssertionError("the long way")):
                other = torch.randn(shape, device="cuda", dtype=BF16)
                assert torch.equal(layer(x), first) and layer.last_backend == "triton"
                short = layer(other)
            inference._kept.clear()
            assert torch.equal(layer(other), short) and short.shape == (*shape[:-1], 384)

    def test_changes_are_seen(self) -> None:
        layer, x = layer_and_x()

        def fresh() -> torch.Tensor:
            inference._kept.clear()
            return layer(x)

        def warm() -> None:
            for _ in range(3):
                layer(x)
            assert layer in inference._kept

        with torch.no_grad():
            for change in (
                lambda: setattr(layer, "scaling", 3.0),
                lambda: layer.lora_B.mul_(2.0),
                lambda: setattr(layer.lora_B, "data", torch.randn_like(layer.lora_B)),
                lambda: setattr(layer, "lora_A", torch.nn.Parameter(torch.randn_like(layer.lora_A))),
                lambda: layer.merge(),
                lambda: layer.unmerge(),
                lambda: setattr(layer, "adapters_enabled", False),
            ):
                if layer.adapter_in_use:
                    warm()
                before = layer(x)
                change()
                after = layer(x)
                assert torch.equal(after, fresh()) and not torch.equal(after, before)

    def test_what_takes_the_long_way(self) -> None:
        layer, x = layer_and_x()
        with torch.no_grad():
            for _ in range(3):
                layer(x)
            assert inference.repeat(layer, x) is not None
            assert inference.repeat(layer, x[:2]) is None
            assert inference.repeat(layer, x.float()) is None
            assert inference.repeat(layer, torch.cat([x, x], 1)[:, :256]) is None
            with torch.autocast("cuda", BF16):
                assert inference.repeat(layer, x) is None
            with torch.cuda.stream(torch.cuda.Stream()):
                assert inference.repeat(layer, x) is None
            with torch.enable_grad():
                assert inference.repeat(layer, x) is None
            layer.backend = "reference"
            assert inference.repeat(layer, x) is None
        assert layer(x).requires_grad

    def test_a_merged_weight_is_freed(self) -> None:
        layer, x = layer_and_x()
        with torch.no_grad():
            for _ in range(3):
                layer(x)
        assert layer in inference._kept
        weight = weakref.ref(layer.weight)
        layer.merge(keep_base=False)
        assert weight() is None

    def test_what_is_copied_for_the_kernels_is_not_kept(self) -> None:
        layer, x = layer_and_x()
        layer.lora_A = torch.nn.Parameter(torch.randn(256, 16, device="cuda", dtype=BF16).t())
        with torch.no_grad():
            for _ in range(3):
                layer(x)
        assert layer.last_backend == "triton" and layer not in inference._kept

    def test_capture_and_copies(self) -> None:
        layer, x = layer_and_x()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                expected = layer(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                assert inference.repeat(layer, x) is None
                y = layer(x)
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected)
            for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert copied not in inference._kept and torch.equal(copied(x), expected)
