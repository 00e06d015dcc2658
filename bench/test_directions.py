"""Forward and backward apart, by each backend, at the sweep's shapes: what fusedlora/costs.py is fitted to.

    pytest bench/ --benchmark -k test_directions

Each finished shape goes into bench/results/directions-<gpu>.json at once; shapes that are there for this code and these
versions are skipped.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import Case
from bench_check import make_layers
from bench_layers import SCALING, Layer
from bench_record import hand_over, recorded
from bench_sweep import Store, file_name
from torch import Tensor
from torch.nn import functional as F

from fusedlora import backends
from fusedlora.calls import describe_call
from fusedlora.testing import relative_error
from fusedlora.timing import GraphTimer, WallTimer, interleave, machine, set_count, spread

RESULTS = Path(__file__).parent / "results"
WAYS = ("forward", "backward")
MOST_SETS = 6
Call = Callable[[Layer, Tensor], Any]  # of a set and its S


def calls(case: Case, one: Layer) -> dict[tuple[str, str], Call]:
    """By backend, or "linear" for the frozen one, and direction; the backends that take such a call by name."""
    found: dict[tuple[str, str], Call] = {
        ("linear", "forward"): lambda t, s: F.linear(t.x, t.weight),
        ("linear", "backward"): lambda t, s: t.dy @ t.weight,
    }
    settings: dict[str, Any] = {"scaling": SCALING, "dropout_p": 0.0, "adapter_dtype": case.torch_dtype}
    needs = {f"need_{name}": True for name in ("dx", "dA", "dB")}
    for backend in backends.BACKENDS:
        tensors = (one.x, one.weight, *one.adapters["same"], None, None)
        if backend.why_not(describe_call(backend.name, *tensors, case.torch_dtype)) is not None:
            continue
        found[backend.name, "forward"] = lambda t, s, up=backend.forward: up(
            t.x, t.weight, *t.adapters["same"], *[None] * 4, save_s=True, **settings
        )
        found[backend.name, "backward"] = lambda t, s, down=backend.backward: down(
            t.dy, t.x, t.weight, *t.adapters["same"], s, None, None, **needs, **settings
        )
    return found


@torch.no_grad()
def measure(case: Case, device: torch.device, rounds: int, block_seconds: float) -> dict[tuple[str, str], list[float]]:
    """Seconds a round by backend and direction, all outputs checked against the reference's before."""
    rotated = (case.M * case.K + case.K * case.N) * case.torch_dtype.itemsize
    sets = make_layers(case, device, min(MOST_SETS, set_count(rotated, device)))
    known = calls(case, sets[0])
    small = [known["reference", "forward"](one, None)[1] for one in sets]
    right = {way: known["reference", way](sets[0], small[0]) for way in WAYS}
    for (name, way), call in known.items():
        if name not in ("linear", "reference"):
            for got, want in zip(call(sets[0], small[0]), right[way]):
                assert relative_error(got, want) < 0.02, f"{case.title}: {way} of {name}"
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    timers: dict[tuple[str, str], Any] = {}
    for key, call in known.items():
        of_sets = [lambda call=call, one=one, s=s: call(one, s) for one, s in zip(sets, small)]
        if stream is None:
            timers[key] = WallTimer(of_sets, device=device, block_seconds=block_seconds)
        else:
            stream.wait_stream(torch.cuda.current_stream(device))
            timers[key] = GraphTimer(of_sets, stream=stream, block_seconds=block_seconds, warmup=1)
    times = interleave(timers, rounds)
    for timer in timers.values():
        if isinstance(timer, GraphTimer):
            timer.close()
    return times


@pytest.fixture(scope="module")
def store(plan):
    facts = machine(plan.device)
    if not plan.measure:
        return Store(None, facts)
    folder = Path(plan.config.option.sweep_folder or (RESULTS if plan.on_gpu else plan.config.option.bench_out))
    return Store(folder / f"{file_name(facts).replace('sweep', 'directions')}.json", facts)


@recorded
def test_directions(benchmark, plan, store, sweep_case):
    if sweep_case.id in store.current():
        pytest.skip("measured before, with this code and these versions")
    times = measure(sweep_case, plan.device, *((5, 0.0015) if plan.measure else (1, 0.0)))
    us = {name: [round(spread(times[name, way]).median * 1e6, 2) for way in WAYS] for name, _ in times}
    store.add({"id": sweep_case.id, "case": asdict(sweep_case), "us": us})
    if plan.measure:
        plan.say(f"{sweep_case.title}: " + ", ".join(f"{name} {up} + {down} µs" for name, (up, down) in us.items()))
    both = [sum(pair) for pair in zip(times["reference", "forward"], times["reference", "backward"])]
    hand_over(benchmark, f"directions {sweep_case.title}", both, {"us": us})
