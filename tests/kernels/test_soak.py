"""Many calls of many kinds at once on a GPU: every one gives the bits of the first of its kind, and nothing grows.

`--slow` adds a run of twenty times as many calls. `python tests/kernels/test_soak.py CALLS` is one process's share.
"""

import contextlib
import dataclasses
import gc
import hashlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import fusedlora
from fusedlora import cuda, dropout
from fusedlora.config import Problem, backward_config
from fusedlora.cuda_config import cuda_config
from fusedlora.kernels.launch import device_facts
from fusedlora.memory import device_memory
from fusedlora.schedule import backward_schedule
from fusedlora.testing import Inputs, make_inputs, run

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([2**62 + 5])

# M, K, N, r, dtype, dtype of lora_A and lora_B, dropout
KINDS = [
    (1, 512, 512, 16, BF16, BF16, 0.0),
    (17, 1024, 512, 4, BF16, BF16, 0.0),
    (300, 512, 1032, 5, FP16, FP16, 0.0),
    (512, 1024, 1024, 16, BF16, BF16, 0.0),
    (520, 1024, 1024, 32, BF16, BF16, 0.0),
    (1000, 1024, 512, 64, BF16, BF16, 0.0),
    (2048, 512, 2048, 16, BF16, BF16, 0.0),
    (2500, 768, 768, 128, BF16, BF16, 0.0),
    (700, 512, 512, 16, BF16, FP32, 0.0),
    (600, 512, 768, 64, BF16, FP32, 0.0),
    (512, 512, 512, 8, BF16, BF16, 0.3),
    (900, 768, 512, 32, BF16, FP32, 0.1),
]
STREAMS = 4


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    outputs: list[torch.Tensor]  # which a replay writes
    leaves: Inputs  # which it reads, and which must stay alive for it


@dataclasses.dataclass
class Work:
    """One kind of call, what its first call gave, and a graph of it for each stream where its bits repeat."""

    inputs: Inputs
    dropout_p: float
    backend: str
    expected: list[torch.Tensor]
    graphs: list[Captured]

    def call(self) -> list[torch.Tensor]:
        return list(run(fusedlora.lora_linear, self.inputs, dropout_p=self.dropout_p, backend=self.backend).values())


def captured(i: Inputs, backend: str, stream: torch.cuda.Stream) -> Captured:
    """A graph of one forward and backward."""
    with torch.cuda.stream(stream):
        run(fusedlora.lora_linear, i, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    leaves = i.leaves()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        tensors = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.bias)
        y = fusedlora.lora_linear(*tensors, scaling=i.scaling, backend=backend)
        grads = torch.autograd.grad(y, (leaves.x, leaves.lora_A, leaves.lora_B), i.dy)
    return Captured(graph, [y.detach(), *grads], leaves)


def make_works(streams: list[torch.cuda.Stream], backend: str = "triton") -> list[Work]:
    works = []
    for n, (M, K, N, r, dtype, adapter_dtype, dropout_p) in enumerate(KINDS):
        if backend == "cuda" and adapter_dtype is not dtype:  # not taken
            continue
        i = make_inputs(M, K, N, r, dtype, adapter_dtype, "cuda", seed=n)
        work = Work(i, dropout_p, backend, [], [])
        work.expected = work.call()
        if dropout_p == 0.0 and n % 2:  # a graph draws a fresh mask at each replay
            work.graphs = [captured(i, backend, stream) for stream in streams]
        works.append(work)
    torch.cuda.synchronize()
    return works


def share(works: list[Work], stream: torch.cuda.Stream, place: int, calls: int, wrong: list[int]) -> None:
    """One thread's calls on its stream; appends how many elements were wrong."""
    order = random.Random(place)
    with torch.cuda.stream(stream):
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(calls):
            work = order.choice(works)
            if work.graphs and order.random() < 0.5:
                graph = work.graphs[place]
                graph.graph.replay()
                got = graph.outputs
            else:
                got = work.call()
            for a, b in zip(got, work.expected, strict=True):
                count += (a != b).sum()
        wrong.append(int(count))


def mixed_calls(works: list[Work], streams: list[torch.cuda.Stream], calls: int) -> int:
    """Elements that were wrong in so many calls, spread over a thread for each stream."""
    wrong: list[int] = []
    threads = [
        threading.Thread(target=share, args=(works, stream, place, calls // len(streams), wrong))
        for place, stream in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(wrong) == len(streams), "a thread failed"
    return sum(wrong)


def held_memory() -> tuple[int, int]:
    """Bytes that are allocated, and slabs of synchronisation words."""
    gc.collect()
    return torch.cuda.memory_allocated(), len(device_memory(torch.device("cuda", torch.cuda.current_device())).slabs)


@pytest.mark.parametrize("calls", [10_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_mixed_calls_on_streams_in_graphs_and_threads(calls: int, backend: str) -> None:
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    with mock.patch.object(dropout, "draw", lambda *args: SEED):
        works = make_works(streams, backend)
        assert not any(t.isnan().any() for work in works for t in work.expected)
        assert mixed_calls(works, streams, calls // 10) == 0
        before = held_memory()
        assert mixed_calls(works, streams, calls - calls // 10) == 0
        assert held_memory() == before


# Numbers that a program of 32 warps holds in registers: 32 a thread, and with all else so many that no second such
# program, nor one of ours with large tiles, finds room on its SM.
HELD = 32 * 1024


@triton.jit
def occupy_kernel(flags_ptr, data_ptr, most_polls, HELD: tl.constexpr):
    """Holds an SM until flags[0] is set; counts itself in flags[1]."""
    offs = tl.program_id(0) * HELD + tl.arange(0, HELD)
    held = tl.load(data_ptr + offs)
    tl.atomic_add(flags_ptr + 1, 1)
    polls = 0
    while (tl.atomic_add(flags_ptr, 0) == 0) & (polls < most_polls):
        polls += 1
    tl.store(data_ptr + offs, held + 1.0)


@contextlib.contextmanager
def occupied(free: int) -> Iterator[Callable[[], bool]]:
    """Inside, all but `free` SMs are held; gives a function that tells whether they still are."""
    programs = torch.cuda.get_device_properties("cuda").multi_processor_count - free
    flags = torch.zeros(2, dtype=torch.int32, device="cuda")
    data = torch.zeros(programs * HELD, device="cuda")
    one = torch.ones(1, dtype=torch.int32).pin_memory()
    seen = torch.zeros(2, dtype=torch.int32).pin_memory()
    holder, copier = torch.cuda.Stream(), torch.cuda.Stream()
    ended = torch.cuda.Event()
    occupy_kernel[(1,)](flags, data, 1, HELD=HELD, num_warps=32)  # compiles it
    flags.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(holder):
        occupy_kernel[(programs,)](flags, data, 100_000_000, HELD=HELD, num_warps=32)
        ended.record()
    try:
        deadline = time.monotonic() + 20.0
        while seen[1] < programs:  # copies need no SM
            assert time.monotonic() < deadline, f"{int(seen[1])} of {programs} SMs were taken"
            with torch.cuda.stream(copier):
                seen.copy_(flags, non_blocking=True)
            copier.synchronize()
        yield lambda: not ended.query()
    finally:
        with torch.cuda.stream(copier):
            flags[:1].copy_(one, non_blocking=True)
        torch.cuda.synchronize()


# CUDA's blocks come in clusters of two, for which an SM alone is no place.
@pytest.mark.parametrize(
    "backend, free, N, r, dropout_p",
    [
        *(("triton", 1, 4096, 64, 0.0), ("triton", 3, 4096, 64, 0.0)),
        *(("cuda", 20, 4096, 64, 0.0), ("cuda", 20, 4096, 16, 0.0), ("cuda", 20, 1024, 32, 0.0)),
        *(("cuda", 20, 4096, 64, 0.1), ("cuda", 20, 1024, 16, 0.1)),
    ],
)
def test_two_launches_finish_on_the_few_sms_that_another_kernel_leaves(
    backend: str, free: int, N: int, r: int, dropout_p: float
) -> None:
    """Their programs come a few at a time, and none may wait for one that has not begun."""
    problems = [make_inputs(8192, 4096, N, r, BF16, device="cuda", seed=n) for n in range(2)]
    capability, num_sms = device_facts(problems[0].x.device)
    p = Problem(8192, N, 4096, r, 2, False, capability, num_sms, dropout_p > 0)
    if backend == "cuda":
        if reason := cuda.missing():
            pytest.skip(reason)
        config = cuda_config(p, True)
        assert config.in_tiles == (N == 1024)
        down = dataclasses.replace(p, out=4096, depth=N)
        assert cuda_config(down, False).db_with_t == (r == 16 and N == 4096)
        assert (config.programs if config.in_tiles else 2 * config.shrink_clusters) > free
    else:
        schedule = backward_schedule(p, backward_config(p), True, True, True)
        assert schedule.num_programs == num_sms and schedule.num_tasks + schedule.side_programs > free
    streams = [torch.cuda.Stream() for _ in problems]
    expected, events, got = [], [torch.cuda.Event() for _ in problems], []

    def call(n: int) -> list[torch.Tensor]:
        torch.manual_seed(n)  # which the mask comes from
        return list(run(fusedlora.lora_linear, problems[n], backend=backend, dropout_p=dropout_p).values())

    for n, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for _ in range(2):  # the second leaves memory for the next
                first = call(n)
            expected.append(first)
    torch.cuda.synchronize()
    with occupied(free) as still:
        for n, (stream, event) in enumerate(zip(streams, events)):
            with torch.cuda.stream(stream):
                got.append(call(n))
                event.record()
        deadline = time.monotonic() + 20.0
        while not all(event.query() for event in events):
            assert time.monotonic() < deadline, "the launches wait for programs that cannot begin"
            time.sleep(0.01)
        assert still(), "the SMs were given back too early to show anything"
    for ours, want in zip(got, expected):
        assert all(torch.equal(a, b) for a, b in zip(ours, want))


def own_share(calls: int) -> str:
    """One process's calls; a digest of the first of each kind, which all others repeated."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    with mock.patch.object(dropout, "draw", lambda *args: SEED):
        works = make_works(streams)
        assert mixed_calls(works, streams, calls) == 0
    digest = hashlib.sha256()
    for work in works:
        for tensor in work.expected:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_two_processes_on_one_gpu() -> None:
    command = [sys.executable, __file__, "1500"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], said
    digests = [out.splitlines()[-1] for out, _ in said]
    assert len(digests[0]) == 64 and digests[0] == digests[1]


if __name__ == "__main__":
    print(own_share(int(sys.argv[1])))
