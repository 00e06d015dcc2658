"""One case: build the contenders, check each of them against float64, then time them in interleaved rounds."""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from bench_cases import Case, work
from bench_check import OUTPUTS, compare, error_limit, make_layers, reference
from bench_contenders import Built, Contender, Layer, assert_backend
from torch import Tensor

from fusedlora import explain
from fusedlora.timing import (
    GraphTimer,
    Spread,
    WallTimer,
    gpu_state,
    interleave,
    peak_memory,
    ratios,
    set_count,
    spread,
    synchronize,
)

CPU_BOUND = 1.05


@dataclass
class Row:
    """One contender in one group of one case; `failed` holds the reason where nothing could be timed."""

    group: str
    case: Case
    contender: Contender
    times: list[float] = field(default_factory=list)
    seconds: Spread | None = None
    tax: Spread | None = None
    versus_rival: Spread | None = None
    rival_peak_ratio: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    backend: str | None = None
    config: str | None = None
    failed: str | None = None
    trace: str | None = None

    def as_dict(self) -> dict:
        """JSON-ready: what goes into extra_info and the report."""
        amount = work(self.case, self.group, self.contender.adapter_itemsize(self.case))
        out = {
            "group": self.group,
            "case": asdict(self.case),
            "contender": self.contender.name,
            "label": self.contender.label,
            "ours": self.contender.ours,
            "errors": self.errors,
            "peak_bytes": self.peak_bytes,
            "peak_over_rival": self.rival_peak_ratio,
            "backend": self.backend,
            "config": self.config,
            "failed": self.failed,
            "rounds": len(self.times),
        }
        for name in ("seconds", "tax", "versus_rival"):
            value = getattr(self, name)
            out[name] = None if value is None else asdict(value)
        if self.seconds is not None:
            out["tflops"] = amount.flops / self.seconds.median / 1e12
            out["gbps"] = amount.bytes / self.seconds.median / 1e9
        return out


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    block_seconds: float
    wall_block_seconds: float


FULL = Effort(rounds=15, block_seconds=0.006, wall_block_seconds=0.012)
FULL_CPU = Effort(rounds=15, block_seconds=0.02, wall_block_seconds=0.02)
SMOKE = Effort(rounds=1, block_seconds=0.0, wall_block_seconds=0.0)


class Runner:
    """One contender over every layer of a case: its steps, its check, its timers."""

    def __init__(self, contender: Contender, case: Case, layers: list[Layer], device: torch.device) -> None:
        self.contender, self.case, self.layers, self.device = contender, case, layers, device
        self.built: list[Built] = [contender.build(layer, case) for layer in layers]
        self.errors: dict[str, float] = {}
        self.peak_bytes: int | None = None
        self.config: str | None = None

    def forward(self, i: int) -> Tensor:
        with self.contender.context(self.device, self.case):
            return self.built[i].call(self.layers[i].x)

    def backward(self, i: int, y: Tensor, *, retain: bool = False) -> tuple[Tensor, ...]:
        wrt = (self.layers[i].x, *self.built[i].parameters)
        return torch.autograd.grad(y, wrt, self.layers[i].dy, retain_graph=retain)

    def training(self, i: int) -> tuple[Tensor, ...]:
        y = self.forward(i)
        return (y.detach(), *self.backward(i, y))

    def calls(self, group: str) -> tuple[list[Callable], list[Callable] | None]:
        """The calls to time and, for backward alone, what must run before each of them."""
        n = range(len(self.layers))
        if group == "forward":
            return [lambda i=i: self.forward(i) for i in n], None
        if group == "backward":
            # Retained, a replay finds what forward saved untouched. A compiled backward may refuse that, since it
            # uses saved memory again; its replays then read overwritten numbers, at the same speed.
            retain = not self.contender.compiled
            backward = [lambda y, i=i: self.backward(i, y, retain=retain) for i in n]
            return backward, [lambda i=i: self.forward(i) for i in n]
        return [lambda i=i: self.training(i) for i in n], None

    def timer(self, group: str, stream: "torch.cuda.Stream | None", effort: Effort) -> GraphTimer | WallTimer:
        calls, prepare = self.calls(group)
        if stream is None or group == "module":
            return WallTimer(calls, device=self.device, prepare=prepare, block_seconds=effort.wall_block_seconds)
        return GraphTimer(calls, stream=stream, prepare=prepare, block_seconds=effort.block_seconds)


def check_timer(group: str, timer: GraphTimer | WallTimer, expected: tuple[Tensor, ...], limit: float) -> None:
    """The captured graph must give the right numbers too: its outputs are poisoned, replayed and compared."""
    if not isinstance(timer, GraphTimer):
        return
    outputs = timer.outputs if isinstance(timer.outputs, tuple) else (timer.outputs,)
    with torch.no_grad():
        for out in outputs:
            out.fill_(math.nan)
    timer.replay()
    synchronize(outputs[0].device)
    part = {"forward": slice(0, 1), "backward": slice(1, None)}.get(group, slice(None))
    compare(outputs, expected[part], limit, OUTPUTS[part])


@dataclass(frozen=True)
class Failure:
    """An exception as text: its traceback would keep a shape's tensors alive while the next ones are measured."""

    reason: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        text = str(error).strip().splitlines()
        trace = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {text[0][:160] if text else ''}", trace)


@contextlib.contextmanager
def _on(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    if stream is None:
        yield
    else:
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


class Lab:
    """Measures cases on one device, all of it on one stream that is not the default one."""

    def __init__(
        self, device: torch.device, effort: Effort, backend: str, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.device, self.effort, self.backend, self.say = device, effort, backend, say
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.state: dict[str, str] = {}

    def measure(self, case: Case, rows: dict[str, list[Contender]]) -> dict[tuple[str, str], Row]:
        """Rows by (group, contender's name), for the contenders asked for in each group."""
        with _on(self.stream):
            return self._measure(case, rows)

    def _measure(self, case: Case, rows: dict[str, list[Contender]]) -> dict[tuple[str, str], Row]:
        wanted = {c.name: c for group in rows.values() for c in group}
        if any(c.compiled for c in wanted.values()):
            torch.compiler.reset()  # otherwise the shapes of a session add up to the recompilation limit
        size = case.torch_dtype.itemsize
        rotated = (case.M * case.K + case.K * case.N) * size  # forward alone does not touch dy
        count = 2 if self.effort is SMOKE else set_count(rotated, self.device)
        layers = make_layers(case, self.device, count)
        self.say(f"{case.title}: {count} sets of W, x, dy")
        runners: dict[str, Runner] = {}
        failures: dict[str, Failure] = {}
        expected = {}
        for kind in {c.adapter for c in wanted.values()}:
            expected[kind] = reference(layers[-1], kind)
        for name, contender in wanted.items():
            try:
                runner = runners[name] = Runner(contender, case, layers, self.device)
                self._check(runner, expected[contender.adapter])
            except Exception as error:  # one contender's failure must not hide the others' rows
                failures[name] = Failure.of(error)
                runners.pop(name, None)
                self.say(f"  {name} failed: {failures[name].reason}")
        found: dict[tuple[str, str], Row] = {}
        for group, group_rows in rows.items():
            found |= self._time(case, group, group_rows, runners, failures, expected)
        return found

    def _check(self, runner: Runner, expected: tuple[Tensor, ...]) -> None:
        last = len(runner.layers) - 1
        if runner.contender.ours:
            y = assert_backend(self.backend, lambda: runner.forward(last))
            assert_backend(self.backend, lambda: runner.backward(last, y))
            del y
            with runner.contender.context(self.device, runner.case):
                runner.config = explain(runner.layers[last].x, runner.built[last].call).config
        outputs = runner.training(last)
        runner.errors = compare(outputs, expected, error_limit(runner.case))
        del outputs
        runner.training(last)  # the first calls allocate workspaces that stay
        runner.peak_bytes = peak_memory(lambda: runner.training(last), self.device)

    def _timer(self, runner: Runner, group: str) -> GraphTimer | WallTimer:
        if runner.contender.ours:
            return assert_backend(self.backend, lambda: runner.timer(group, self.stream, self.effort))
        return runner.timer(group, self.stream, self.effort)

    def _time(
        self,
        case: Case,
        group: str,
        rows: list[Contender],
        runners: dict[str, Runner],
        failures: dict[str, Failure],
        expected: dict[str | None, tuple[Tensor, ...]],
    ) -> dict[tuple[str, str], Row]:
        found = {c.name: Row(group, case, c, backend=self.backend if c.ours else None) for c in rows}
        timers: dict[str, GraphTimer | WallTimer] = {}
        for name, row in found.items():
            failure = failures.get(name)
            if failure is None:
                runner = runners[name]
                row.errors, row.peak_bytes, row.config = runner.errors, runner.peak_bytes, runner.config
                try:
                    timer = self._timer(runner, group)
                    check_timer(group, timer, expected[row.contender.adapter], error_limit(case))
                    timers[name] = timer
                except Exception as error:  # as above: the row says so
                    failure = Failure.of(error)
                    self.say(f"  {group} {name} failed: {failure.reason}")
            if failure is not None:
                row.failed, row.trace = failure.reason, failure.trace
        if not timers:
            return {(group, name): row for name, row in found.items()}
        rounds = self.effort.rounds
        self._fill(found, interleave(timers, rounds))
        if self.device.type == "cpu" and self.effort is not SMOKE and any(map(above_cpu_bound, found.values())):
            self._fill(found, interleave(timers, 3 * rounds))  # a busy neighbour, or the truth: look longer
        if self.effort is not SMOKE and not self.state and isinstance(timers.get("frozen"), GraphTimer):
            self._read_state(timers["frozen"])
        for timer in timers.values():
            timer.close()
        taken = ", ".join(f"{n} {r.tax.median:.3f}" for n, r in found.items() if r.tax is not None)
        self.say(f"  {group}: {taken}")
        return {(group, name): row for name, row in found.items()}

    def _fill(self, rows: dict[str, Row], times: dict[str, list[float]]) -> None:
        for name, taken in times.items():
            row = rows[name]
            row.times = taken
            row.seconds = spread(taken)
            if "frozen" in times:
                row.tax = ratios(taken, times["frozen"])
            rival = row.contender.rival
            if rival in times:
                row.versus_rival = ratios(taken, times[rival])
                if row.peak_bytes is not None and rows[rival].peak_bytes:
                    row.rival_peak_ratio = row.peak_bytes / rows[rival].peak_bytes

    def _read_state(self, timer: GraphTimer) -> None:
        """Clocks and power while the frozen linear's graph is running; read once."""
        for _ in range(max(1, int(1.5 / max(timer() * timer.count, 1e-6)))):
            timer.replay()
        self.state = gpu_state(self.device)
        timer.stream.synchronize()


def above_cpu_bound(row: Row) -> bool:
    """A training step on a CPU may take at most 1.05 of the eager arithmetic's time."""
    return row.group == "training" and row.versus_rival is not None and row.versus_rival.median > CPU_BOUND
