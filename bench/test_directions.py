"""Forward and backward apart, by each backend, at the sweep's shapes: what fusedlora/costs.py is fitted to.

    pytest bench/ --benchmark -k test_directions

A shape's microseconds go into bench/results/directions-<gpu>.json at once, in the place of earlier ones, with the
versions and the code that they hold for.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import Case
from bench_record import hand_over, recorded
from bench_sweep import code_id, file_name
from torch import Tensor
from torch.nn import functional as F

from fusedlora import backends
from fusedlora.testing import relative_error
from fusedlora.timing import GraphTimer, WallTimer, interleave, machine, set_count, spread

RESULTS = Path(__file__).parent / "results"
WAYS = ("forward", "backward")
MOST_SETS = 6
SCALING = 2.0
Operands = dict[str, Tensor]


def operands(case: Case, device: torch.device) -> Operands:
    M, K, N, r = case.M, case.K, case.N, case.r
    sizes = {"x": (M, K), "weight": (N, K), "lora_A": (r, K), "lora_B": (N, r), "dy": (M, N), "s": (M, r)}
    return {
        name: torch.randn(size, device=device, dtype=case.torch_dtype).mul_(size[1] ** -0.5)
        for name, size in sizes.items()
    }


def calls(case: Case, one: Operands) -> dict[tuple[str, str], Callable[[Operands], Any]]:
    """By backend, or "linear" for the frozen one, and direction; the backends that take such a call by name."""
    found: dict[tuple[str, str], Callable[[Operands], Any]] = {
        ("linear", "forward"): lambda t: F.linear(t["x"], t["weight"]),
        ("linear", "backward"): lambda t: t["dy"] @ t["weight"],
    }
    settings: dict[str, Any] = {"scaling": SCALING, "dropout_p": 0.0, "adapter_dtype": case.torch_dtype}
    needs = {f"need_{name}": True for name in ("dx", "dA", "dB")}
    for backend in backends.BACKENDS:
        tensors = (one["x"], one["weight"], one["lora_A"], one["lora_B"], None, None)
        if backend.why_not(backends.describe_call(backend.name, *tensors, case.torch_dtype)) is not None:
            continue
        found[backend.name, "forward"] = lambda t, up=backend.forward: up(
            t["x"], t["weight"], t["lora_A"], t["lora_B"], *[None] * 4, save_s=True, **settings
        )
        found[backend.name, "backward"] = lambda t, down=backend.backward: down(
            t["dy"], t["x"], t["weight"], t["lora_A"], t["lora_B"], t["s"], None, None, **needs, **settings
        )
    return found


class Directions:
    """Measures shapes and keeps what it has in a file."""

    def __init__(self, device: torch.device, path: Path | None) -> None:
        self.device, self.path = device, path
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.facts = machine(device)
        self.versions = {name: self.facts[name] for name in ("torch", "cuda", "triton")} | {"code": code_id()}
        self.shapes: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.shapes = {shape["id"]: shape for shape in json.loads(path.read_text())["shapes"]}

    def measure(self, case: Case, rounds: int, block_seconds: float) -> dict[tuple[str, str], list[float]]:
        """Seconds a round by backend and direction, all outputs checked against the reference's before."""
        rotated = (case.M * case.K + case.K * case.N) * case.torch_dtype.itemsize
        sets = [operands(case, self.device) for _ in range(min(MOST_SETS, set_count(rotated, self.device)))]
        known = calls(case, sets[0])
        right = {way: known["reference", way](sets[0]) for way in WAYS}
        for (name, way), call in known.items():
            if name in ("linear", "reference"):
                continue
            for got, want in zip(call(sets[0]), right[way]):
                assert relative_error(got, want) < 0.02, f"{case.title}: {way} of {name}"
        timers: dict[tuple[str, str], Any] = {}
        for key, call in known.items():
            of_sets = [lambda call=call, one=one: call(one) for one in sets]
            if self.stream is None:
                timers[key] = WallTimer(of_sets, device=self.device, block_seconds=block_seconds)
            else:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                timers[key] = GraphTimer(of_sets, stream=self.stream, block_seconds=block_seconds, warmup=1)
        times = interleave(timers, rounds)
        for timer in timers.values():
            if isinstance(timer, GraphTimer):
                timer.close()
        return times

    def keep(self, case: Case, times: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
        us = {name: [round(spread(times[name, way]).median * 1e6, 2) for way in WAYS] for name, _ in times}
        shape = {"M": case.M, "K": case.K, "N": case.N, "r": case.r, "dtype": case.dtype, "us": us}
        self.shapes[case.id] = {"id": case.id} | shape | {"versions": self.versions}
        if self.path is not None:
            head = json.dumps({"machine": self.facts}).removesuffix("}")
            beside = self.path.with_suffix(".part")
            lines = ",\n".join(map(json.dumps, self.shapes.values()))
            beside.write_text(f'{head},\n"shapes": [\n{lines}\n]}}\n')
            os.replace(beside, self.path)
        return shape


@pytest.fixture(scope="module")
def directions(plan):
    folder = Path(plan.config.option.sweep_folder or (RESULTS if plan.on_gpu else plan.config.option.bench_out))
    name = file_name(machine(plan.device)).replace("sweep", "directions")
    if plan.measure:
        folder.mkdir(parents=True, exist_ok=True)
    return Directions(plan.device, folder / f"{name}.json" if plan.measure else None)


@recorded
def test_directions(benchmark, plan, directions, sweep_case):
    times = directions.measure(sweep_case, *((5, 0.0015) if plan.measure else (1, 0.0)))
    shape = directions.keep(sweep_case, times)
    if plan.measure:
        plan.say(
            f"{sweep_case.title}: " + ", ".join(f"{name} {up} + {down} µs" for name, (up, down) in shape["us"].items())
        )
    both = [sum(pair) for pair in zip(times["reference", "forward"], times["reference", "backward"])]
    hand_over(benchmark, f"directions {sweep_case.title}", both, shape)
