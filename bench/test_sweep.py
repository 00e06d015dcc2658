"""Ours against eager arithmetic at 200 shapes of real models, forward + backward.

    pytest bench/ --benchmark -k test_sweep --sweep-seconds 500

Each finished shape goes into bench/results/sweep-<gpu>.json at once; shapes that are there for this code and these
versions are skipped, so that several runs make one sweep. The summary and the pictures are written beside it.
"""

from pathlib import Path

import pytest
from bench_measure import Lab
from bench_record import hand_over, recorded
from bench_rows import SMOKE, SWEEP
from bench_sweep import OutOfTime, Store, Sweep, file_name
from bench_sweep_cases import compiled
from bench_sweep_report import summary, write_pictures

from fusedlora.timing import machine

RESULTS = Path(__file__).parent / "results"


@pytest.fixture(scope="module")
def sweep(plan):
    """One sweep a session; what it found is written at its end, whatever stopped it."""
    option, facts = plan.config.option, machine(plan.device)
    lab = Lab(plan.device, SWEEP if plan.measure else SMOKE, plan.backend, plan.say if plan.measure else print)
    path = None
    if plan.measure:
        folder = option.sweep_folder or (RESULTS if plan.on_gpu else option.bench_out)
        path = Path(folder) / f"{file_name(facts)}.json"
    found = Sweep(lab, Store(path, facts), option.sweep_seconds)
    yield found
    if path is not None:
        cases = [case.id for case in plan.sweep_cases]
        lines = summary([record for record in found.store.current().values() if record["id"] in cases], len(cases))
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        drawn = write_pictures(path.with_suffix(".png"), found.store)
        picture = ", .png" if drawn else "; no picture: needs matplotlib and a shape"
        plan.say("\n".join([*lines, f"written to {path}, .txt{picture}"]))


@recorded
def test_sweep(benchmark, plan, sweep, sweep_case):
    compile = plan.measure and sweep_case in compiled(plan.sweep_cases)
    try:
        measured = sweep.measure(sweep_case, compile=compile)
    except OutOfTime as reason:
        pytest.skip(str(reason))
    if measured is None:
        pytest.skip("measured before, with this code and these versions")
    record, times = measured
    if not times:
        pytest.skip(record["does_not_fit"])
    hand_over(benchmark, f"sweep {sweep_case.title}", times, record)
