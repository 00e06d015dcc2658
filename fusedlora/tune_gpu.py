"""What the tuner asks of a GPU: which configurations are right, in child processes, and how long they take."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import backends, reference
from .cuda_config import AnyConfig
from .doctor import run_limited
from .testing import Inputs, relative_error
from .timing import GraphTimer, Spread, interleave, ratios, set_count
from .tune import call_of
from .tune_check import Shape, draw, launch, saved_s

CHILD = [sys.executable, "-m", "fusedlora.tune_check"]
START_S, EACH_S = 90.0, 30.0  # what a child may take to start, and more for each configuration
# Timers that are alive at once: each holds a captured graph.
TOGETHER = 6
# Outputs of two right configurations differ by rounding alone.
CLOSE = 0.02


class OnGpu:
    """Checks and times configurations on one device."""

    def __init__(self, device: torch.device, jobs: int, progress: Callable[[int], None]) -> None:
        self.device, self.jobs, self.progress = device, jobs, progress

    def takes_cuda(self, direction: str, shape: Shape) -> bool:
        """Whether the kernels of csrc are built and take such a call."""
        return backends.CUDA.why_not(call_of(shape, self.device, direction)) is None

    def reasons(self, kernel: str, shape: Shape, configs: Sequence[AnyConfig]) -> list[str | None]:
        """What is wrong with each configuration, None where nothing is. They are compiled side by side."""
        found: dict[int, str | None] = {}
        free = torch.cuda.mem_get_info(self.device)[0]
        wide = shape.M * (shape.in_features + shape.out_features) + shape.in_features * shape.out_features
        jobs = max(1, min(self.jobs, free // (2 * 8 * 3 * wide + 2**30), len(configs)))

        def work(first: int) -> None:
            left = list(range(first, len(configs), jobs))
            while left:
                reasons, stage = self._child(kernel, shape, [(index, configs[index]) for index in left])
                found.update(reasons)
                left = [index for index in left if index not in reasons]
                if left:  # the child ended with the first of these, or before it
                    found[left.pop(0)] = stage
                self.progress(len(found))

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, range(jobs)))
        return [found[index] for index in range(len(configs))]

    def _child(
        self, kernel: str, shape: Shape, configs: list[tuple[int, AnyConfig]]
    ) -> tuple[dict[int, str | None], str]:
        job: dict[str, Any] = {"device": str(self.device), "kernel": kernel, "shape": dataclasses.asdict(shape)}
        job["configs"] = [(index, dataclasses.asdict(config)) for index, config in configs]
        handle, path = tempfile.mkstemp(suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(job, file)
            outcome = run_limited([*CHILD, path], START_S + EACH_S * len(configs))
        finally:
            Path(path).unlink()
        reasons = {int(name): reason for name, reason in outcome.facts.items() if name.isdigit()}
        return reasons, outcome.failure or "the child process said nothing of it"

    def times(
        self, direction: str, shape: Shape, ways: Sequence[AnyConfig | None], rounds: int
    ) -> list[tuple[float, Spread] | None]:
        """Microseconds of each, and its time over that of the first in the same rounds; None where outputs differ.

        A way is a configuration of either kernels; None stands for PyTorch's own products.
        """
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            each = 2 * (shape.M * (shape.in_features + shape.out_features) + shape.in_features * shape.out_features)
            from fusedlora.kernels.launch import device_facts

            problem = shape.problem(direction, *device_facts(self.device))
            sets = [draw(shape, self.device, seed) for seed in range(set_count(each, self.device))]
            small = [saved_s(i, problem) if direction == "backward" else None for i in sets]
            found: dict[int, tuple[float, Spread] | None] = {}
            for start in range(1, max(2, len(ways)), TOGETHER - 1):
                batch = [0, *range(start, min(start + TOGETHER - 1, len(ways)))]
                timers = {}
                for index in batch:
                    calls = [_call(direction, i, ways[index], s) for i, s in zip(sets, small)]
                    timers[str(index)] = GraphTimer(calls, stream=stream, block_seconds=0.005)
                taken = interleave(timers, rounds)
                first = timers["0"].outputs
                for name, seconds in taken.items():
                    same = all(relative_error(a, b) <= CLOSE for a, b in zip(timers[name].outputs, first))
                    spread = ratios(seconds, taken["0"])
                    microseconds = 1e6 * sorted(seconds)[len(seconds) // 2]
                    found[int(name)] = (microseconds, spread) if same else None
                del first
                for timer in timers.values():
                    timer.close()
                self.progress(len(found))
        return [found[index] for index in range(len(ways))]


def _call(direction: str, i: Inputs, way: AnyConfig | None, s: torch.Tensor | None) -> Callable[[], object]:
    if way is not None:
        return lambda: launch(direction, i, way, s)
    settings: dict[str, Any] = {"scaling": i.scaling, "dropout_p": 0.0, "adapter_dtype": i.lora_A.dtype}
    if direction == "forward":
        return lambda: reference.forward(
            i.x, i.weight, i.lora_A, i.lora_B, None, None, None, None, save_s=True, **settings
        )
    settings |= {"need_dx": True, "need_dA": True, "need_dB": True}
    return lambda: reference.backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, None, None, **settings)
