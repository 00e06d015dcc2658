"""quantised_lora_linear against lora_linear with the decoded weight, and the buffers that weights are decoded into."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedlora import dense_buffers, lora_linear
from fusedlora.dense_buffers import borrowed, release_buffers
from fusedlora.quantised import QuantisedWeight, quantised_lora_linear
from fusedlora.testing import make_inputs


@pytest.fixture(autouse=True)
def _no_buffers() -> Iterator[None]:
    release_buffers()
    yield
    release_buffers()


def int8(weight: Tensor, fills: bool = True) -> QuantisedWeight:
    """Rows times one scale each."""
    scale = weight.abs().amax(1, keepdim=True).float() / 127
    packed = (weight / scale).round().to(torch.int8)

    def decode(packed: Tensor, out: Tensor | None) -> Tensor:
        assert (out is not None) is fills
        return torch.mul(packed, scale, out=out) if fills else (packed * scale).to(weight.dtype)

    return QuantisedWeight(packed, tuple(weight.shape), weight.dtype, decode, fills)


def problem(
    device: torch.device, K: int = 64, N: int = 96, M: int = 20, dtype: Any = torch.float32, **more: Any
) -> Any:
    return make_inputs(M, K, N, 4, dtype, device=device, **more)


def gradients(call: Any, inputs: Any, weight: Any, **options: Any) -> list[Tensor]:
    p = inputs.leaves()
    y = call(p.x, weight, p.lora_A, p.lora_B, p.bias, scaling=p.scaling, **options)
    return [y.detach(), *torch.autograd.grad(y, (p.x, p.lora_A, p.lora_B), p.dy)]


@pytest.mark.parametrize("fills", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_as_with_the_decoded_weight(fills: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs = problem(device, dtype=dtype)
    weight = int8(inputs.weight, fills)
    with weight.dense(weight.packed) as dense:
        decoded = dense.clone()
    for options in ({}, {"dropout_p": 0.4}, {"dropout_p": 0.4, "training": False}):
        results = []
        for call, given in ((quantised_lora_linear, weight), (lora_linear, decoded)):
            torch.manual_seed(3)
            results.append(gradients(call, inputs, given, **options))
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with torch.no_grad():
        y = quantised_lora_linear(inputs.x, weight, inputs.lora_A, inputs.lora_B, scaling=0.5)
        torch.testing.assert_close(
            y, lora_linear(inputs.x, decoded, inputs.lora_A, inputs.lora_B, scaling=0.5), rtol=0, atol=0
        )


def test_refusals(device: torch.device) -> None:
    inputs = problem(device)
    weight = int8(inputs.weight)
    given = (inputs.lora_A, inputs.lora_B)
    with pytest.raises(TypeError, match="weight has dtype torch.float32, x has torch.bfloat16"):
        quantised_lora_linear(inputs.x.bfloat16(), weight, *given, scaling=1.0)
    with pytest.raises(ValueError, match="dropout_p is 1.0"):
        quantised_lora_linear(inputs.x, weight, *given, scaling=1.0, dropout_p=1.0)
    with pytest.raises(RuntimeError, match="backend 'triton'"):
        quantised_lora_linear(inputs.x[:, :3], int8(inputs.weight[:, :3]), given[0][:, :3], given[1], scaling=1.0,
                              backend="triton")  # fmt: skip
    x = inputs.x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(quantised_lora_linear(x, weight, *given, scaling=1.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        dx.sum().backward()


def test_not_under_compile(device: torch.device) -> None:
    inputs = problem(device)
    weight = int8(inputs.weight)

    @torch.compile(backend="eager", fullgraph=True)
    def call(x: Tensor) -> Tensor:
        return quantised_lora_linear(x, weight, inputs.lora_A, inputs.lora_B, scaling=1.0)

    with pytest.raises(Exception, match="does not take part in torch.compile"):
        call(inputs.x)


def pools() -> list[int]:
    """The numbers of elements of the buffers that are not in use."""
    return sorted(buffer.numel() for pool in dense_buffers._free.values() for buffer in pool)


class TestBuffers:
    def take(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> int:
        with borrowed(shape, dtype, device) as buffer:
            assert buffer.shape == shape and buffer.dtype is dtype and buffer.is_contiguous()
            buffer.fill_(1)
            return buffer.data_ptr()

    def test_one_is_used_again_and_grows(self, device: torch.device) -> None:
        first = self.take((8, 16), device)
        assert self.take((4, 16), device) == self.take((16, 8), device) == first
        assert pools() == [128]
        self.take((16, 16), device)
        assert pools() == [256], "the smaller one is gone"
        self.take((2, 2), device, torch.bfloat16)
        assert pools() == [4, 256], "each dtype has its own"

    def test_taken_twice_at_a_time(self, device: torch.device) -> None:
        with borrowed((4, 4), torch.float32, device) as one, borrowed((4, 4), torch.float32, device) as other:
            assert one.data_ptr() != other.data_ptr()
        assert pools() == [16, 16]

    def test_given_back_after_an_error(self, device: torch.device) -> None:
        with pytest.raises(KeyError), borrowed((4, 4), torch.float32, device):
            raise KeyError
        assert pools() == [16]

    def test_released(self, device: torch.device) -> None:
        self.take((8, 16), device)
        assert release_buffers() == 8 * 16 * 4 and pools() == []
        with borrowed((8, 16), torch.float32, device):
            assert release_buffers() == 0
        assert pools() == [], "one that was in use is not kept either"
        inputs = problem(device)
        weight, p = int8(inputs.weight), inputs.leaves()
        y = quantised_lora_linear(p.x, weight, p.lora_A, p.lora_B, scaling=1.0)
        release_buffers()
        y.sum().backward()
        assert p.x.grad is not None

    def test_after_inference_mode(self, device: torch.device) -> None:
        with torch.inference_mode():
            self.take((8, 16), device)
        self.take((8, 16), device)

    def test_layers_in_a_row(self, device: torch.device) -> None:
        """Of several sizes, through one buffer, forward all before backward all."""
        inputs = [problem(device, 64, 96), problem(device, 96, 32), problem(device, 32, 128)]
        weights = [int8(p.weight) for p in inputs]
        results = []
        for decoded in (False, True):
            leaves = [p.leaves() for p in inputs]
            y = x = leaves[0].x
            for p, weight in zip(leaves, weights):
                given = (p.lora_A, p.lora_B, p.bias)
                if decoded:
                    with weight.dense(weight.packed) as dense:
                        y = lora_linear(y, dense.clone(), *given, scaling=0.5)
                else:
                    y = quantised_lora_linear(y, weight, *given, scaling=0.5)
            wanted = [x, *(leaf for p in leaves for leaf in (p.lora_A, p.lora_B))]
            results.append(torch.autograd.grad(y, wanted, inputs[-1].dy))
            assert pools() == [96 * 64]
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    def test_threads(self, device: torch.device) -> None:
        """Forward in threads of their own, backward in others."""
        problems = [problem(device, seed=i) for i in range(4)]
        weights = [int8(p.weight) for p in problems]
        expected = [gradients(quantised_lora_linear, p, w) for p, w in zip(problems, weights)]
        wrong: list[Any] = []
        start = threading.Barrier(4)

        def work(i: int) -> None:
            start.wait()
            for _ in range(20):
                p, found = problems[i].leaves(), []
                y = quantised_lora_linear(p.x, weights[i], p.lora_A, p.lora_B, p.bias, scaling=p.scaling)
                leaves = (p.x, p.lora_A, p.lora_B)
                thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y, leaves, p.dy)))  # noqa: B023
                thread.start(), thread.join()
                if not all(torch.equal(a, b) for a, b in zip([y, *found], expected[i], strict=True)):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert 1 <= len(pools()) <= 4

    def test_a_mode_that_sees_operations_gets_its_own(self, device: torch.device) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), borrowed((4, 4), torch.float32, device) as buffer:
            assert type(buffer) is not Tensor
        assert pools() == []

    @pytest.mark.gpu
    def test_streams_get_their_own(self) -> None:
        device = torch.device("cuda", 0)
        problems = [problem(device, 1024, 1024, 512, torch.bfloat16, seed=i) for i in range(2)]
        weights = [int8(p.weight) for p in problems]
        expected = [gradients(quantised_lora_linear, p, w) for p, w in zip(problems, weights)]
        release_buffers()
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in problems]
        for _ in range(20):
            results = []
            for p, w, stream in zip(problems, weights, streams):
                with torch.cuda.stream(stream):
                    results.append(gradients(quantised_lora_linear, p, w))
            torch.cuda.synchronize()
            for ours, theirs in zip(results, expected):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        assert len(dense_buffers._free) == 2 and pools() == [1024 * 1024] * 2

    @pytest.mark.gpu
    def test_a_captured_graph_has_its_own(self) -> None:
        device = torch.device("cuda", 0)
        inputs = problem(device, 256, 256, 128, torch.bfloat16)
        weight = int8(inputs.weight)
        p = inputs.leaves()

        def step() -> tuple[Tensor, ...]:
            y = quantised_lora_linear(p.x, weight, p.lora_A, p.lora_B, p.bias, scaling=p.scaling)
            return (y.detach(), *torch.autograd.grad(y, (p.x, p.lora_A, p.lora_B), p.dy))

        torch.cuda.synchronize()  # what was made on the default stream
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = [t.clone() for t in step()]
            step()
        torch.cuda.synchronize()
        release_buffers()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        assert pools() == [], "none of the buffers is the graph's"
        other = int8(problem(device, 256, 256, 128, torch.bfloat16, seed=5).weight)
        with torch.cuda.stream(stream):
            quantised_lora_linear(p.x, other, p.lora_A, p.lora_B, scaling=1.0)
        for tensor in captured:
            tensor.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected))
