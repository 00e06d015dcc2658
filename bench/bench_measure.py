"""One case: build the contenders, check each of them against float64, then time them in interleaved rounds."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from bench_ahead import compile_ahead
from bench_cases import Case
from bench_check import Expected, make_layers, memory_of
from bench_contenders import Contender, assert_backend, auto_takes
from bench_rows import SMOKE, Effort, Failure, Row, above_cpu_bound
from bench_runner import Runner

from fusedlora.timing import GraphTimer, WallTimer, gpu_state, interleave, ratios, set_count, spread


@contextlib.contextmanager
def _on(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    if stream is None:
        yield
    else:
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


class DoesNotFit(RuntimeError):
    """The device's memory is too small for a shape and its check."""


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
        count = self._sets(case, len(wanted))
        layers = make_layers(case, self.device, count)
        self.say(f"{case.title}: {count} sets of W, x, dy")
        runners: dict[str, Runner] = {}
        failures: dict[str, Failure] = {}
        only_decode = set(rows) == {"decode"}
        expected = Expected(layers[-1])

        def attempt(step: Callable[[str], None], name: str) -> None:
            try:
                step(name)
            except Exception as error:  # one contender's failure must not hide the others' rows
                failures[name] = Failure.of(error)
                runners.pop(name, None)
                self.say(f"  {name} failed: {failures[name].reason}")

        def build(name: str) -> None:
            runners[name] = Runner(wanted[name], case, layers, self.device)

        def check(name: str) -> None:
            runners[name].check(self.backend, expected, only_decode=only_decode)

        for name in wanted:
            attempt(build, name)
        if self.device.type == "cuda":
            compile_ahead([runner for runner in runners.values() if runner.contender.ours], self.stream, only_decode)
            self.say("  kernels are compiled")
        for name in list(runners):
            attempt(check, name)
        self.say("  outputs are checked")
        found: dict[tuple[str, str], Row] = {}
        for group, group_rows in rows.items():
            found |= self._time(case, group, group_rows, runners, failures, expected)
        return found

    def _sets(self, case: Case, rows: int) -> int:
        """How many sets to rotate through: past the L2, as far as they fit beside all else that a check needs.

        Raises:
            DoesNotFit: not even one does.
        """
        if self.effort is SMOKE:
            return 2
        rotated = (case.M * case.K + case.K * case.N) * case.torch_dtype.itemsize  # forward alone does not touch dy
        count = set_count(rotated, self.device)
        if self.device.type != "cuda":
            return count
        unused, _ = torch.cuda.mem_get_info(self.device)
        free = unused + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        one, rest = memory_of(case, rows)
        fitting = (free - rest) // one
        if fitting < 1:
            raise DoesNotFit(f"{case.title} needs about {(one + rest) >> 30} GiB, {free >> 30} GiB are free")
        count = min(count, fitting)
        if rest + count * one > unused:
            torch.cuda.empty_cache()  # what an earlier shape left in pieces
        return count

    def _timer(self, runner: Runner, group: str, expected: Expected) -> GraphTimer | WallTimer:
        if runner.contender.ours:
            last = "forward" if group in ("forward", "decode") else "backward"
            backend = runner.contender.taker(last, self.backend)
            return assert_backend(backend, lambda: runner.timer(group, self.stream, self.effort, expected))
        return runner.timer(group, self.stream, self.effort, expected)

    def _time(
        self,
        case: Case,
        group: str,
        rows: list[Contender],
        runners: dict[str, Runner],
        failures: dict[str, Failure],
        expected: Expected,
    ) -> dict[tuple[str, str], Row]:
        found = {c.name: Row(group, case, c) for c in rows}
        for row in (row for row in found.values() if row.contender.ours):
            row.backend = row.contender.backend or self.backend
            row.auto = auto_takes(row.contender, case, self.device, group)
        timers: dict[str, GraphTimer | WallTimer] = {}
        for name, row in found.items():
            failure = failures.get(name)
            if failure is None:
                runner = runners[name]
                row.errors, row.peak_bytes, row.config = runner.errors, runner.peak_bytes, runner.config
                try:
                    timers[name] = self._timer(runner, group, expected)
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
