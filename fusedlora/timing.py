"""Timers and what must be printed beside a time: shared by the benchmarks, the tuner and the doctor.

A speed is a ratio here: clocks of a hot GPU fall within seconds, so two things are compared only within interleaved
rounds (A B C, B C A, ...), as the median of the per-round ratios. `GraphTimer` gives the GPU's time alone,
`WallTimer` what a caller waits. Importing this module touches no GPU.
"""

import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a sample."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Spread of values, percentiles interpolated between neighbours.

    Raises:
        ValueError: values is empty.
    """
    if not values:
        raise ValueError("values is empty, a spread needs at least one")
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Spread(statistics.median(ordered), at(0.1), at(0.9))


def ratios(times: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of times[i] / base[i], both taken in round i.

    Raises:
        ValueError: the two have different lengths.
    """
    if len(times) != len(base):
        raise ValueError(f"times has {len(times)} rounds, base has {len(base)}: ratios are taken round by round")
    return spread([t / b for t, b in zip(times, base)])


def interleave(timers: Mapping[str, Callable[[], float]], rounds: int, *, warmup: int = 1) -> dict[str, list[float]]:
    """Call every timer once a round and keep what it returns; warm-up rounds are dropped.

    Each round has an order of its own, the same in every run: at its power limit a GPU's clock depends on what ran just
    before, which in one order moved ratios by up to 0.01 (an H200, blocks of 6 ms), in changing ones by 0.001.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, must be at least 1")
    taken: dict[str, list[float]] = {name: [] for name in timers}
    order, shuffle = list(timers), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            shuffle(order)
            for name in order:
                seconds = timers[name]()
                if number >= warmup:
                    taken[name].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return taken


class GraphTimer:
    """GPU time of one call out of `calls`, captured one after another in a single CUDA graph.

    The calls may run autograd: take gradients by `torch.autograd.grad`, and do everything that touches these tensors
    (making them included) on `stream`, which may not be the default one, since an autograd node born on another
    stream breaks the capture. With `prepare`, each call is given what its `prepare` returned in a graph of its own,
    which is replayed once and not timed. `outputs` is what the last of the calls returned; every replay rewrites it.

    Calling the timer replays the graph for about `block_seconds` and returns seconds per call.
    """

    def __init__(
        self,
        calls: Sequence[Callable[..., Any]],
        *,
        stream: torch.cuda.Stream,
        prepare: Sequence[Callable[[], Any]] | None = None,
        warmup: int = 2,
        block_seconds: float = 0.01,
    ) -> None:
        if stream == torch.cuda.default_stream(stream.device):
            raise ValueError("stream is the default stream, a capture needs another one")
        if prepare is not None and len(prepare) != len(calls):
            raise ValueError(f"prepare has {len(prepare)} entries, calls has {len(calls)}")
        self.stream = stream
        self.count = len(calls)
        self.outputs: Any = None
        self.preparing = None if prepare is None else torch.cuda.CUDAGraph()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                for i, call in enumerate(calls):
                    call() if prepare is None else call(prepare[i]())
            stream.synchronize()
            arguments: list[tuple[Any, ...]] = [()] * self.count
            pool = None
            if prepare is not None and self.preparing is not None:
                with torch.cuda.graph(self.preparing, stream=stream):
                    arguments = [(make(),) for make in prepare]
                pool = self.preparing.pool()
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                for call, argument in zip(calls, arguments):
                    # Drop the last result first: the next call may then use its memory, as in training.
                    self.outputs = None
                    self.outputs = call(*argument)
            self.prepared = arguments
            self.start = torch.cuda.Event(enable_timing=True)
            self.end = torch.cuda.Event(enable_timing=True)
            if self.preparing is not None:
                self.preparing.replay()
            self.repeats = 1
            self()
            self.repeats = max(1, min(1000, math.ceil(block_seconds / max(self() * self.count, 1e-9))))

    def replay(self) -> None:
        """Enqueue one replay, after one of `prepare` where there is one."""
        with torch.cuda.stream(self.stream):
            if self.preparing is not None:
                self.preparing.replay()
            self.graph.replay()

    def __call__(self) -> float:
        with torch.cuda.stream(self.stream):
            self.start.record(self.stream)
            for _ in range(self.repeats):
                self.graph.replay()
            self.end.record(self.stream)
            self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / (self.repeats * self.count)

    def close(self) -> None:
        """Give the graph's memory back."""
        self.stream.synchronize()
        self.outputs = None
        self.prepared = []
        self.graph.reset()
        if self.preparing is not None:
            self.preparing.reset()


class WallTimer:
    """Wall time of one call out of `calls`, host overhead included; on a GPU up to the end of the last one's work.

    Calling the timer runs them for about `block_seconds` and returns seconds per call. With `prepare`, each call is
    timed by itself after an untimed `prepare()`, whose result it is given.
    """

    def __init__(
        self,
        calls: Sequence[Callable[..., Any]],
        *,
        device: torch.device,
        prepare: Sequence[Callable[[], Any]] | None = None,
        warmup: int = 1,
        block_seconds: float = 0.03,
    ) -> None:
        if prepare is not None and len(prepare) != len(calls):
            raise ValueError(f"prepare has {len(prepare)} entries, calls has {len(calls)}")
        self.calls = list(calls)
        self.prepare = None if prepare is None else list(prepare)
        self.device = device
        self.repeats = 1
        for _ in range(warmup):
            self()
        self.repeats = max(1, min(1000, math.ceil(block_seconds / max(self() * len(self.calls), 1e-9))))

    def __call__(self) -> float:
        if self.prepare is not None:
            return self._prepared(self.prepare)
        synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(self.repeats):
            for call in self.calls:
                call()
        synchronize(self.device)
        return (time.perf_counter() - begin) / (self.repeats * len(self.calls))

    def _prepared(self, prepare: list[Callable[[], Any]]) -> float:
        total = 0.0
        for _ in range(self.repeats):
            for make, call in zip(prepare, self.calls):
                made = make()
                synchronize(self.device)
                begin = time.perf_counter()
                call(made)
                synchronize(self.device)
                total += time.perf_counter() - begin
                del made
        return total / (self.repeats * len(self.calls))

    def close(self) -> None:
        """Let go of the calls and of what they hold."""
        self.calls = []
        self.prepare = None


def synchronize(device: torch.device) -> None:
    """Wait for the device's work; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which one call raises the allocated memory at its highest point, its results included."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    # The profiler sees every allocation of the CPU allocator; its trace file is the documented way to read them.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        kept = call()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    steps = sorted((e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e.get("name") == "[memory]")
    level = peak = 0
    for _, _, size in steps:
        level += size
        peak = max(peak, level)
    return peak


def cache_bytes(device: torch.device) -> int:
    """Size of the L2: a GPU's, or that of a CPU's core (1 MiB where the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (folder / "size").read_text().strip()
        if (folder / "level").read_text().strip() == "2" and size.endswith("K"):
            return int(size[:-1]) << 10
    return 1 << 20


def set_count(bytes_per_set: int, device: torch.device, *, at_least: int = 4, at_most: int = 64) -> int:
    """How many sets of inputs to rotate through, so that together they exceed twice the L2."""
    if bytes_per_set < 1:
        raise ValueError(f"bytes_per_set is {bytes_per_set}, must be positive")
    return min(at_most, max(at_least, 2 * cache_bytes(device) // bytes_per_set + 1))


_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi gives them now; empty where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    command += ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_SMI_FIELDS, (value.strip() for value in done.stdout.strip().splitlines()[0].split(","))))


def machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions, as strings: what a table of times is headed by."""
    facts = {}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts["gpu"] = card.name
        facts["sms"] = str(card.multi_processor_count)
        facts["l2_mib"] = f"{card.L2_cache_size / 2**20:.0f}"
        facts["memory_gib"] = f"{card.total_memory / 2**30:.0f}"
        state = gpu_state(device)
        facts |= {name: state[name] for name in ("driver", "power_limit_w", "sm_clock_max_mhz") if name in state}
    facts["cpu"] = _cpu_name()
    facts["cores"] = str(os.cpu_count())
    facts["threads"] = str(torch.get_num_threads())
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["python"] = platform.python_version()
    facts["torch"] = torch.__version__
    facts["cuda"] = str(torch.version.cuda)
    for package in ("triton", "peft"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
