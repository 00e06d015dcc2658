"""What only a GPU can show: launch counts, repeatability, graphs, streams, races across programs, memory."""

import contextlib
import dataclasses
import functools
import random
import threading
from collections.abc import Callable
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
import triton

import fusedlora
from fusedlora import backends, dropout, plans, why_not
from fusedlora.config import Problem, backward_config, forward_config
from fusedlora.kernels import backward, forward, launch
from fusedlora.memory import SLAB_WORDS, device_memory
from fusedlora.testing import (
    Inputs,
    eager_peft,
    error_ratios,
    exact,
    make_inputs,
    poisoned_memory,
    relative_error,
    run,
)

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32


def forward_backward(i: Inputs, backend: str = "triton", **settings) -> list[torch.Tensor]:
    return list(run(fusedlora.lora_linear, i, backend=backend, **settings).values())


def gpu_work(call: Callable[[], object]) -> list[str]:
    """Names of all kernels, copies and fills that run on the GPU during `call`."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("adapter_dtype", [BF16, FP32], ids=["bf16", "fp32-adapters"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "M, r, dropout_p", [(500, 16, 0.0), (8192, 16, 0.0), (2048, 64, 0.0), (2048, 128, 0.0), (500, 16, 0.1)]
)
def test_one_kernel_forward_and_one_backward(
    M: int, r: int, dropout_p: float, adapter_dtype: torch.dtype, autocast: bool, backend: str
) -> None:
    if backend == "cuda" and adapter_dtype is FP32 and not autocast:
        pytest.skip("not taken")
    i = make_inputs(M, 1024, 2048, r, BF16, adapter_dtype, "cuda", bias=True).leaves()

    def linear() -> torch.Tensor:
        with torch.autocast("cuda", dtype=BF16, enabled=autocast):
            tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
            return fusedlora.lora_linear(*tensors, scaling=2.0, dropout_p=dropout_p, backend=backend)

    names = ("lora_kernel", "lora_kernel") if backend == "cuda" else ("forward_kernel", "backward_kernel")
    (forward_name,) = gpu_work(linear)
    y = linear()
    wanted = (i.x, i.lora_A, i.lora_B)
    (backward_name,) = gpu_work(lambda: torch.autograd.grad(y, wanted, i.dy, retain_graph=True))
    assert names[0] in forward_name and names[1] in backward_name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="fitted to Hopper"
)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("M, r, forward_too", [(16, 16, False), (128, 128, True)], ids=str)
def test_auto_takes_pytorchs_products_where_they_are_faster(M: int, r: int, forward_too: bool, autocast: bool) -> None:
    """One direction or both, as `explain` says, again and again, with errors no larger than eager PEFT's."""
    i = make_inputs(M, 4096, 11008, r, BF16, FP32 if autocast else BF16, "cuda", bias=True)
    with torch.autocast("cuda", dtype=BF16, enabled=autocast):
        told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, i.bias)
        assert (told.backend == "reference") is forward_too
        assert (told.backward or told.backend) == "reference" and why_not.SLOWER in told.why_not["triton"]
        for _ in range(3):
            ours = run(fusedlora.lora_linear, i)
            assert backends.last_used == "reference", "by its backward"
        ratios = error_ratios(ours, run(eager_peft, i), exact(i))
    assert max(ratios.values()) <= 1.02, ratios


# dtype, dtype of lora_A and lora_B, r, bias: what a kernel is compiled for; the shapes vary within each.
KINDS = [
    (BF16, BF16, 16, False),
    (BF16, BF16, 1, True),
    (BF16, BF16, 8, False),
    (BF16, BF16, 24, True),
    (BF16, BF16, 64, False),
    (BF16, BF16, 128, False),
    (torch.float16, torch.float16, 16, True),
    (torch.float16, torch.float16, 4, False),
    (BF16, FP32, 16, False),
    (BF16, FP32, 64, True),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_shapes_are_no_worse_than_eager(kind, backend: str) -> None:
    """Thirty shapes of each kind; the launch is the table's."""
    dtype, adapter_dtype, r, bias = kind
    if backend == "cuda" and adapter_dtype is not dtype:
        pytest.skip("not taken")
    draw = random.Random(r)
    for n in range(30):
        M = draw.choice([1, 2, 17, 63, 128, draw.randint(1, 3000)])
        K, N = (8 * draw.randint(1, 160) for _ in range(2))
        i = make_inputs(M, K, N, r, dtype, adapter_dtype, "cuda", bias=bias, seed=n)
        ours, answers = run(fusedlora.lora_linear, i, backend=backend), exact(i)
        ratios = error_ratios(ours, run(eager_peft, i), answers)
        for name, ratio in ratios.items():
            # Where a few roundings make up an error, the luck of both sides shows; it is bounded in the output's own.
            few = M * r < 1024 or min(M, K, N) < 64
            lucky = few and relative_error(ours[name], answers[name]) <= 4 * torch.finfo(ours[name].dtype).eps
            assert ratio <= 1.02 or lucky, (M, K, N, r, dtype, adapter_dtype, ratios)


def test_repeats_to_the_bit_on_any_grid() -> None:
    """Who computes what changes with the number of programs; the bits do not."""
    i = make_inputs(1000, 1024, 1536, 16, BF16, device="cuda")
    capability, num_sms = launch.device_facts(i.x.device)
    config = backward_config(Problem(1000, 1024, 1536, 16, 2, False, capability, num_sms))
    whole = forward_backward(i)
    s = torch.randn(1000, 16, device="cuda", dtype=BF16)

    def gradients() -> list[torch.Tensor]:
        needs = {"need_dx": True, "need_dA": True, "need_dB": True}
        out = backward.lora_backward(
            i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, scaling=1.0, adapter_dtype=BF16, config=config, **needs
        )
        return [t for t in out if t is not None]

    expected = gradients()
    assert all(torch.equal(a, b) for a, b in zip(forward_backward(i), whole))
    for grid in (1, 2, 7, num_sms - 1):
        with mock.patch.object(backward, "device_facts", lambda device, grid=grid: (capability, grid)):
            assert all(torch.equal(a, b) for a, b in zip(gradients(), expected)), grid


def test_graph_replays_and_streams_give_the_eager_answer(backend: str) -> None:
    # of rank 16 Triton's tiles compute S, of rank 32 they wait for it
    problems = [make_inputs(512, 512, 1024, r, BF16, device="cuda", seed=n) for n, r in enumerate((16, 32))]
    expected = [forward_backward(i, backend) for i in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    graphs, outputs, kept = [], [], []
    for i, stream in zip(problems, streams):
        leaves = i.leaves()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(fusedlora.lora_linear, i, backend=backend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            tensors = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.bias)
            y = fusedlora.lora_linear(*tensors, scaling=i.scaling, backend=backend)
            grads = torch.autograd.grad(y, (leaves.x, leaves.lora_A, leaves.lora_B), i.dy)
        graphs.append(graph)
        kept.append(leaves)
        outputs.append([y.detach(), *grads])
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for n in range(1000):
        # Both graphs at once, an eager call beside them on a third stream.
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = forward_backward(problems[n % 2], backend) if n % 10 == 0 else None
        if n % 10 == 0:
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)
            for got, want in zip([*outputs, eager], [*expected, expected[n % 2]]):
                for a, b in zip(got, want):
                    wrong += (a != b).sum()
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert wrong.item() == 0


@pytest.mark.parametrize("rows, r", [(8, 16), (200, 16), (1000, 16), (1000, 32)])
def test_launches_in_a_row_wait_for_each_other(rows: int, r: int, backend: str) -> None:
    """A launch may begin before the one before it has ended; it still reads what that one writes, in a graph too."""
    i = make_inputs(rows, 1024, 1024, r, BF16, device="cuda", bias=False).leaves()

    def chain(between: Callable[[], None]) -> list[torch.Tensor]:
        y = i.x
        for _ in range(20):
            y = fusedlora.lora_linear(y, i.weight, i.lora_A, i.lora_B, scaling=0.1, backend=backend)
            y.register_hook(lambda gradient: between())
            between()
        return [y.detach(), *torch.autograd.grad(y, (i.x, i.lora_A, i.lora_B), i.dy)]

    expected = chain(torch.cuda.synchronize)
    assert all(bool(torch.isfinite(t).all()) and bool(t.any()) for t in expected)
    for _ in range(5):
        assert all(map(torch.equal, chain(lambda: None), expected))
    stream = torch.cuda.Stream()  # where gradients are captured, all that they read is made
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        i = i.leaves()
        chain(lambda: None)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = chain(lambda: None)
        for _ in range(5):
            for t in captured:
                t.zero_()
            graph.replay()
            assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("grid", [1, 2, 131, 132])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-a-kernel"])
@pytest.mark.parametrize("kind", ["plain", "fp32-adapters", "dropout", "autocast-in-tiles"])
def test_no_race_and_no_hang_with_delays(kind: str, grid: int, beside: bool) -> None:
    """Buffers poisoned with NaN, pauses before every publish, wait and clear; 10,000 launches of the plain kind."""
    adapter_dtype = FP32 if kind in ("fp32-adapters", "autocast-in-tiles") else BF16
    i = make_inputs(520, 512, 512, 32 if kind == "plain" else 16, BF16, adapter_dtype, "cuda")
    settings = {"dropout_p": 0.3} if kind == "dropout" else {}
    seed = torch.tensor([2**62 + 3])
    capability, _ = launch.device_facts(i.x.device)
    other = torch.cuda.Stream()
    big = torch.randn(8192, 8192, device="cuda", dtype=BF16)

    class Delayed(launch.Launcher):
        def __init__(self, kernel, num_programs, device, constants):
            super().__init__(kernel, num_programs, device, constants | {"DELAY": 50})
            if "TILES" in constants:
                assert constants["SHRINK"] == (kind != "autocast-in-tiles")

    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dropout, "draw", lambda *args: seed))
        stack.enter_context(torch.autocast("cuda", dtype=BF16, enabled=kind == "autocast-in-tiles"))
        for module in (forward, backward):
            stack.enter_context(mock.patch.object(module, "device_facts", lambda device: (capability, grid)))
        stack.enter_context(mock.patch.object(plans, "_plans", {}))
        expected = forward_backward(i, **settings)
        stack.enter_context(mock.patch.object(plans, "_plans", {}))
        for module in (forward, backward):
            stack.enter_context(mock.patch.object(module, "Launcher", Delayed))
            fresh = functools.lru_cache(module._plan.__wrapped__)  # no plan with an undelayed launcher
            stack.enter_context(mock.patch.object(module, "_plan", fresh))
        for n in range(625 if kind == "plain" else 200):
            if beside and n % 25 == 0:
                with torch.cuda.stream(other):
                    big @ big
            with poisoned_memory():
                got = forward_backward(i, **settings)
            for a, b in zip(got, expected):
                wrong += (a != b).sum()
    assert wrong.item() == 0
    assert all(not t.isnan().any() for t in expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_not_the_current_one(backend: str) -> None:
    first = make_inputs(300, 512, 512, 16, BF16, device="cuda:0")
    second = first.map(lambda t: t.to("cuda:1"))
    with torch.cuda.device(0):
        expected, got = forward_backward(first, backend), forward_backward(second, backend)
    assert all(t.device.index == 1 for t in got)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected))


def test_a_capture_that_finds_no_words_captures_their_zeroing(backend: str) -> None:
    i = make_inputs(300, 512, 512, 32, BF16, device="cuda")  # of rank 16 Triton's forward takes no words
    expected = forward_backward(i, backend)
    slab = device_memory(i.x.device)
    graph = torch.cuda.CUDAGraph()
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
    with mock.patch.object(slab, "used", SLAB_WORDS), torch.cuda.graph(graph), torch.no_grad():
        told = fusedlora.explain(*tensors[:4], backend=backend)
        y = fusedlora.lora_linear(*tensors, scaling=i.scaling, backend=backend)
    assert [copy for copy in told.copies if "memset" in copy]
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected[0])


def test_backward_in_another_thread_beside_a_foreign_allocator() -> None:
    i = make_inputs(300, 512, 512, 16, BF16, device="cuda")
    expected = forward_backward(i)
    used: list[int] = []

    def foreign(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        used.append(size)
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(foreign)
    results: list[list[torch.Tensor]] = []
    thread = threading.Thread(target=lambda: results.append(forward_backward(i)))
    thread.start()
    thread.join(60)
    results.append(forward_backward(i))
    assert all(torch.equal(a, b) for got in results for a, b in zip(got, expected)) and len(results) == 2
    from triton.runtime import _allocation

    assert _allocation._allocator.get() is foreign and not used


@pytest.mark.parametrize("moved", ["lora_A", "lora_B", "bias", "lora_A lora_B bias"])
def test_parameters_at_any_address(moved: str) -> None:
    """Each address has its own kernel; one compiled for multiples of 16 bytes would fault on another."""
    i = make_inputs(300, 512, 512, 16, BF16, device="cuda")
    expected = forward_backward(i)
    copies = {}
    for name in moved.split():
        tensor = getattr(i, name)
        copies[name] = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        assert copies[name].data_ptr() % 16
    j = dataclasses.replace(i, **copies)
    y = fusedlora.lora_linear(j.x, j.weight, j.lora_A, j.lora_B, j.bias, scaling=j.scaling, backend="triton")
    assert torch.equal(y, expected[0])
    settings = {"scaling": j.scaling, "adapter_dtype": BF16, "need_dx": True, "need_dA": True, "need_dB": True}
    _, s = forward.lora_forward(
        j.x, j.weight, j.lora_A, j.lora_B, None, scaling=j.scaling, adapter_dtype=BF16, save_s=True
    )
    got = backward.lora_backward(j.dy, j.x, j.weight, j.lora_A, j.lora_B, s, **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, expected[1:]))


def test_sizes_and_scaling_do_not_recompile() -> None:
    device = torch.cuda.current_device()
    tensors = make_inputs(1, 512, 512, 16, BF16, device="cuda", bias=False)
    config = forward_config(Problem(8192, 512, 512, 16, 2, False, 90, 132))

    def call(M: int, scaling: float) -> None:
        x = torch.randn(M, 512, device="cuda", dtype=BF16)
        forward.lora_forward(
            x, tensors.weight, tensors.lora_A, tensors.lora_B, None,
            scaling=scaling, adapter_dtype=BF16, save_s=True, config=config,
        )  # fmt: skip

    call(8192, 1.0)
    compiled = len(forward.forward_kernel.device_caches[device][0])
    for M in (1, 63, 500, 512):
        for scaling in (1.0, 2.5):
            call(M, scaling)
    assert len(forward.forward_kernel.device_caches[device][0]) == compiled


@pytest.mark.parametrize("M, K, N, r", [(8192, 4096, 4096, 16), (8192, 4096, 4096, 64)])
def test_peak_memory(M: int, K: int, N: int, r: int) -> None:
    """Within 2 % of what has to be there: y, dX, S, T, dA, dB and the stated partial sums."""
    i = make_inputs(M, K, N, r, BF16, device="cuda", bias=False).leaves()

    def step() -> None:
        y = fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0, backend="triton")
        torch.autograd.grad(y, (i.x, i.lora_A, i.lora_B), i.dy)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    capability, num_sms = launch.device_facts(i.x.device)
    config = backward_config(Problem(M, K, N, r, 2, False, capability, num_sms))
    parts = backward.cdiv(M, config.stripe_rows)
    partial_rows = K * parts + N * (backward.cdiv(M, config.SHRINK_M) if config.FUSE_DB else parts)
    bound = 2 * (M * N + M * K + 2 * M * r + (K + N) * r) + 4 * r * partial_rows
    assert peak <= 1.02 * bound, (peak, bound)
