"""pytest bench/ --benchmark: options, which rows there are, one measurement a shape, the tables at the end."""

import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

# The suite runs in importlib mode, which leaves sys.path alone; the helpers beside this file are found here.
sys.path.insert(0, str(Path(__file__).parent))

from bench_cases import GROUPS, Case, cases_of
from bench_contenders import Contender, contenders
from bench_measure import Lab
from bench_model import model_rows
from bench_report import render, report, write_json, write_picture
from bench_rows import FULL, FULL_CPU, SMOKE, Failure, Row
from bench_sweep import code_id
from bench_sweep_cases import sweep_cases_of

from fusedlora.timing import machine

WANTS_FIGURES = ("only", "json", "save", "autosave", "compare")  # of pytest-benchmark's own options


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedlora benchmarks")
    # pytest-benchmark owns --benchmark-...; pytest does not abbreviate options, so this name is free and exact.
    group.addoption(
        "--benchmark",
        action="store_true",
        dest="bench_measure",
        help="measure speeds; without it the benchmarks only check, on tiny shapes, that they run",
    )
    group.addoption("--bench-autotune", action="store_true", help="add the torch.compile max-autotune rows (slow)")
    group.addoption(
        "--bench-backend",
        default=None,
        help="backend that our rows take (triton on a GPU, and beside it cuda where that takes them; else reference)",
    )
    group.addoption("--bench-out", default="bench-out", help="folder for the JSON, the text and the picture")
    group.addoption("--sweep-seconds", type=float, default=None, help="start no further shape of the sweep after this")
    group.addoption(
        "--sweep-folder", default=None, help="folder of the sweep's file (bench/results on a GPU, else --bench-out)"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its own options
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    measure = option.bench_measure or any(getattr(option, f"benchmark_{name}", None) for name in WANTS_FIGURES)
    if not measure:
        option.benchmark_disable = True
    elif getattr(option, "numprocesses", None):
        raise pytest.UsageError("--benchmark with -n: rows measured in parallel disturb each other")
    elif not getattr(option, "benchmark_compare", None):
        option.benchmark_quiet = True  # our tables say more than its own
    config.stash[PLAN] = Plan(config, measure)


@dataclass
class Plan:
    """The session's rows and measurements."""

    config: pytest.Config
    measure: bool
    recorded: list[Row] = field(default_factory=list)
    results: dict[Case, dict[tuple[str, str], Row] | Failure] = field(default_factory=dict)
    lab: Lab | None = None

    def __post_init__(self) -> None:
        option = self.config.option
        self.began = time.monotonic()
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")
        self.backend = option.bench_backend or ("triton" if self.on_gpu else "reference")
        self.groups = list(GROUPS) if self.on_gpu else [g for g in GROUPS if g != "module"]
        of_group = {group: cases_of(group, self.on_gpu, self.measure) for group in self.groups}
        self.cases = {case.id: case for cases in of_group.values() for case in cases}
        autotune = option.bench_autotune or "autotune" in option.keyword
        # beside Triton's rows those of the CUDA kernels; only where both could run
        ours = {"backend": self.backend, "twins_on": self.device if self.backend == "triton" and self.on_gpu else None}
        compile = self.measure or self.on_gpu
        self.contenders = {
            name: {c.name: c for c in contenders(case, compile=compile, autotune=autotune, **ours)}
            for name, case in self.cases.items()
        }
        # of each group the names of its shapes and rows
        self.pairs = {
            group: [(case.id, c.name) for case in cases for c in self.contenders[case.id].values() if group in c.groups]
            for group, cases in of_group.items()
        }
        self.model_rows = model_rows(compile=self.measure and self.on_gpu)
        self.sweep_cases = sweep_cases_of(self.on_gpu, self.measure)
        self.selected: dict[str, dict[str, list[str]]] = {}

    def select(self, items: list[pytest.Item]) -> None:
        """Note which rows the session runs: only those are measured."""
        for item in items:
            if (group := _group(item)) is not None:
                params = item.callspec.params
                self.selected.setdefault(params["case"], {}).setdefault(group, []).append(params["contender"])

    def row(self, group: str, case_id: str, name: str) -> Row:
        """The row, from its case's one measurement, which the first of the case's rows sets off."""
        case = self.cases[case_id]
        if case not in self.results:
            try:
                self.results[case] = self._laboratory().measure(case, self._wanted(case_id))
            except Exception as error:  # the shape as a whole: each of its rows reports it, the other shapes go on
                self.results[case] = Failure.of(error)
        found = self.results[case]
        if isinstance(found, Failure):
            raise RuntimeError(f"{case.title} could not be measured: {found.reason}\n{found.trace}")
        return found[(group, name)]

    def _wanted(self, case_id: str) -> dict[str, list[Contender]]:
        """Per group what is selected, the frozen linear it is compared with and, on a CPU, our rows' eager rivals."""
        known = self.contenders[case_id]
        wanted = {}
        for group, names in self.selected[case_id].items():
            needed = {"frozen", *names}
            if not self.on_gpu:
                needed |= {known[name].rival for name in names if known[name].rival}
            wanted[group] = [c for name, c in known.items() if name in needed]
        return wanted

    def _laboratory(self) -> Lab:
        if self.lab is None:
            effort = SMOKE if not self.measure else FULL if self.on_gpu else FULL_CPU
            self.lab = Lab(self.device, effort, self.backend, self.say if self.measure else lambda text: None)
        return self.lab

    def say(self, text: str) -> None:
        """A line of progress at once, past the capture of the running test's output."""
        manager = self.config.pluginmanager
        reporter, capture = manager.getplugin("terminalreporter"), manager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
            reporter.ensure_newline()
            reporter.write_line(f"[{time.monotonic() - self.began:4.0f} s] {text}")
            reporter.flush()


def _of_function(name: str) -> str:
    """The group that a test function is named after."""
    return name.removeprefix("test_")


def _group(item: pytest.Item) -> str | None:
    """The group whose row the item is."""
    return _of_function(item.originalname) if "bench_group" in getattr(item, "fixturenames", ()) else None


PLAN: pytest.StashKey[Plan] = pytest.StashKey()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plan = metafunc.config.stash[PLAN]
    if "sweep_case" in metafunc.fixturenames:
        metafunc.parametrize("sweep_case", plan.sweep_cases, ids=[case.id for case in plan.sweep_cases])
    if "model_row" in metafunc.fixturenames:
        pairs = [(setting, row) for setting in ("checkpointing_off", "checkpointing_on") for row in plan.model_rows]
        ids = [f"{setting}-{row.name}" for setting, row in pairs]
        metafunc.parametrize(("setting", "model_row"), pairs, ids=ids)
    if "bench_group" not in metafunc.fixturenames:
        return
    pairs = plan.pairs.get(_of_function(metafunc.definition.originalname), [])
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case_id}-{name}" for case_id, name in pairs])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A shape's rows follow each other, so that a shape is finished before the next one starts."""
    plan = config.stash[PLAN]
    dropped = [item for item in items if _group(item) not in (None, *plan.groups)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    order = {case_id: i for i, case_id in enumerate(plan.cases)}

    def place(item: pytest.Item) -> int:
        return order.get(item.callspec.params.get("case"), -1) if hasattr(item, "callspec") else -1

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[PLAN].select(session.items)


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    return request.config.stash[PLAN]


@pytest.fixture
def bench_group(request: pytest.FixtureRequest) -> str:
    return _group(request.node)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fusedlora"] = machine(config.stash[PLAN].device)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    plan = config.stash[PLAN]
    if not plan.measure or not plan.recorded:
        return
    facts = machine(plan.device)
    state = plan.lab.state if plan.lab is not None else {}
    lines = render(plan.recorded, facts, state, plan.backend)
    folder = Path(config.option.bench_out)
    folder.mkdir(parents=True, exist_ok=True)
    known = {"date": time.strftime("%Y-%m-%d"), "code": code_id()}
    write_json(folder / "bench.json", known | report(plan.recorded, facts, state, plan.backend))
    (folder / "bench.txt").write_text("\n".join(lines) + "\n")
    title = ", ".join(f"{name} {facts[name]}" for name in ("gpu", "cpu", "torch", "triton") if name in facts)
    groups = [row.group for row in plan.recorded]
    group = "training" if "training" in groups else groups[0]
    drawn = write_picture(folder / "tax.png", plan.recorded, title, group)
    terminalreporter.section("fusedlora benchmarks")
    for line in lines:
        terminalreporter.write_line(line)
    picture = ", tax.png" if drawn else "; no picture: needs matplotlib and a row beside the frozen linear's"
    terminalreporter.write_line(f"written to {folder}: bench.json, bench.txt{picture}")
