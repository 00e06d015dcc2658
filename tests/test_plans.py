"""Plans: what is decided once for each kind of call, what is never kept, and that no change goes unseen."""

import copy
import gc
import pickle
import weakref
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fusedlora
from fusedlora import arguments, backends, ops, plans
from fusedlora.testing import make_inputs

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """The plans, none at first."""
    fresh: dict = {}
    monkeypatch.setattr(plans, "_plans", fresh)
    return fresh


def call(i, **changed) -> torch.Tensor:
    given = {name: getattr(i, name) for name in ("x", "weight", "lora_A", "lora_B", "bias")} | {"scaling": 1.0}
    return fusedlora.lora_linear(**given | changed)


def test_checks_run_once_for_a_kind_of_call(kept, device) -> None:
    i, j = (make_inputs(6, 16, 24, 4, device=device, seed=seed) for seed in range(2))
    first = call(i)
    with mock.patch.object(plans, "check", side_effect=AssertionError("checked again")):
        again = call(j)
        assert torch.equal(call(i), first)
        assert not torch.equal(call(i, scaling=2.0), first)
    assert len(kept) == 1 and not torch.equal(first, again)


OTHERS = {
    "rows": lambda i: {"x": i.x[:5]},
    "leading dimensions": lambda i: {"x": i.x.view(2, 3, 16)},
    "rank": lambda i: {"lora_A": i.lora_A[:2], "lora_B": i.lora_B[:, :2]},
    "no bias": lambda i: {"bias": None},
    "dropout": lambda i: {"dropout_p": 0.5},
    "dropout off": lambda i: {"dropout_p": 0.5, "training": False},
    "scale": lambda i: {"scaling": torch.ones((), device=i.x.device)},
    "named": lambda i: {"backend": "reference"},
    "dtypes": lambda i: {n: getattr(i, n).double() for n in ("x", "weight", "lora_A", "lora_B", "bias")},
    "fp32 adapters": lambda i: {n: getattr(i, n).to(BF16) for n in ("x", "weight", "bias")},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_kind_is_decided_for_itself(other, kept, device) -> None:
    i = make_inputs(6, 16, 24, 4, device=device)
    call(i)
    with mock.patch.object(plans, "check", side_effect=arguments.check) as checked:
        call(i, **other(i))
    assert checked.call_count == 1 and len(kept) == 2


def test_autocast_is_another_kind(kept, device) -> None:
    i = make_inputs(6, 16, 24, 4, device=device)
    assert call(i).dtype == FP32
    with torch.autocast(device.type, BF16):
        assert call(i).dtype == BF16
    assert call(i).dtype == FP32 and len(kept) == 2


def test_the_same_parameters_with_other_data_are_another_kind(device) -> None:
    """.data may change the shape and the dtype of a tensor, and leave its address."""
    layer = fusedlora.FusedLoRALinear(16, 24, r=4, bias=False, device=device)
    x = torch.randn(3, 16, device=device)
    layer(x)
    layer.lora_A.data = layer.lora_A.data[:2]
    with pytest.raises(ValueError, match="lora_B has rank 4, lora_A has 2"):
        layer(x)
    layer.lora_A.data = layer.lora_A.data.view(BF16).view(4, 16)
    with pytest.raises(TypeError, match="lora_A has dtype torch.bfloat16"):
        layer(x)


def test_what_is_refused_leaves_no_plan(kept) -> None:
    i = make_inputs(6, 16, 24, 4)
    for bad, error in (
        ({"x": i.x[:, :8]}, ValueError),
        ({"backend": "none"}, ValueError),
        ({"dropout_p": 1.0}, ValueError),
    ):
        for _ in range(2):
            with pytest.raises(error):
                call(i, **bad)
    with pytest.raises(RuntimeError, match="backend 'triton' does not take this call"):
        call(i, backend="triton", weight=i.weight.to(BF16), x=i.x.to(BF16), bias=None)
    assert not kept


def test_subclasses_and_modes_leave_no_plan(kept) -> None:
    """Their sizes may be symbols, and what they do is not the backends' to decide."""
    i = make_inputs(6, 16, 24, 4)
    with FakeTensorMode() as mode:
        fake = i.map(mode.from_tensor)
        assert call(fake).shape == (6, 24)
    assert call(fake).shape == (6, 24) and not kept


def test_plans_keep_no_tensor(kept) -> None:
    i = make_inputs(6, 16, 24, 4).leaves()
    call(i).sum().backward()
    watched = [weakref.ref(t) for t in (i.x, i.weight, i.lora_A, i.lora_B, i.bias)]
    assert kept
    del i
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_plans_do_not_pile_up(kept, monkeypatch) -> None:
    monkeypatch.setattr(plans, "MOST", 3)
    i = make_inputs(8, 16, 24, 4)
    for M in range(1, 9):
        call(i, x=i.x[:M])
        assert 1 <= len(kept) <= 3


def layer_and_x(shape=(3, 256)) -> tuple[fusedlora.FusedLoRALinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = fusedlora.FusedLoRALinear(256, 384, r=16, dtype=BF16, adapter_dtype=BF16, device="cuda")
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer, torch.randn(shape, device="cuda", dtype=BF16)


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize("shape", [(3, 256), (2, 3, 256), (256,)], ids=str)
    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
    def test_a_repeated_call_is_a_launch_and_no_more(self, shape, grad: bool, kept) -> None:
        layer, x = layer_and_x(shape)
        layer.backend = "triton"
        other = torch.randn_like(x)

        def results(x: torch.Tensor) -> list[torch.Tensor]:
            with torch.set_grad_enabled(grad):
                x = x.clone().requires_grad_(grad)
                y = layer(x)
                wrt = (x, layer.lora_A, layer.lora_B)
                return [y, *(torch.autograd.grad(y, wrt, torch.ones_like(y)) if grad else ())]

        want = [results(t) for t in (x, other)]
        long_way = AssertionError("the long way")
        with mock.patch.multiple(
            ops, forward=mock.Mock(side_effect=long_way), backward=mock.Mock(side_effect=long_way)
        ):
            got = [results(t) for t in (x, other)]
        assert layer.last_backend == "triton" and got[0][0].shape == (*shape[:-1], 384)
        for a, b in zip(got, want):
            assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
        # as the ops give them
        with mock.patch.object(plans, "packed", lambda *tensors: False):
            for a, t in zip(got, (x, other)):
                assert all(torch.equal(*pair) for pair in zip(a, results(t), strict=True))

    def test_changes_are_seen(self, kept) -> None:
        layer, x = layer_and_x()

        def fresh() -> torch.Tensor:
            with mock.patch.object(plans, "_plans", {}):
                return layer(x)

        with torch.no_grad():
            for change in (
                lambda: setattr(layer, "scaling", 3.0),
                lambda: setattr(layer, "scaling", 3),
                lambda: setattr(layer, "scaling", torch.tensor(1.5, device="cuda")),
                lambda: layer.lora_B.mul_(2.0),
                lambda: setattr(layer.lora_B, "data", torch.randn_like(layer.lora_B)),
                lambda: setattr(layer, "lora_A", torch.nn.Parameter(torch.randn_like(layer.lora_A))),
                lambda: layer.merge(),
                lambda: layer.unmerge(),
                lambda: setattr(layer, "adapters_enabled", False),
            ):
                for _ in range(2):
                    layer(x)
                change()
                assert torch.equal(layer(x), fresh())

    def test_what_takes_the_ops(self, kept) -> None:
        layer, x = layer_and_x()
        want = layer(x)
        with mock.patch.object(ops, "forward", side_effect=ops.forward) as forward:
            for n, same in enumerate(
                (torch.cat([x, x], 1)[:, :256], torch.cat([x.new_zeros(1), x.flatten()])[1:].view(3, 256)), 1
            ):
                assert torch.equal(layer(same), want) and forward.call_count == n
        with mock.patch.object(ops, "backward", side_effect=ops.backward) as backward:
            layer(x).sum().backward()  # dy is one number
            assert backward.call_count == 1

    def test_a_merged_weight_is_freed(self) -> None:
        layer, x = layer_and_x()
        with torch.no_grad():
            for _ in range(3):
                layer(x)
        weight = weakref.ref(layer.weight)
        layer.merge(keep_base=False)
        assert weight() is None

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
                y = layer(x)
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected)
            for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert torch.equal(copied(x), expected)

    def test_a_refusal_stays_one(self, kept) -> None:
        layer, x = layer_and_x()
        layer.backend = "triton"
        layer(x)
        layer.weight.data = layer.weight.data.t().contiguous().t()
        with pytest.raises(RuntimeError, match="backend 'triton' does not take this call: weight has strides"):
            layer(x)
        layer.backend = "auto"
        layer(x)
        assert backends.last_used == "reference"
