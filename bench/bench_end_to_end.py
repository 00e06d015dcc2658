"""Training steps of the decoder, timed in interleaved rounds, and their tables."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from bench_contenders import assert_backend
from bench_model import ModelRow, Run, Size, decoder, with_adapters
from bench_model_check import Reference
from bench_rows import Effort, Failure
from torch import nn
from torch._dynamo.utils import counters

from fusedlora.timing import Spread, WallTimer, interleave, peak_memory, ratios, spread

STEPS = {"step": "forward + backward", "optimizer": "forward + backward + clipping + AdamW (the frozen model: none)"}
# Each row is a model of its own to torch.compile: with its default limit the ninth would silently run eagerly.
RECOMPILE_LIMIT = 512


def require_fused(model: nn.Module, backend: str) -> None:
    """Every layer, and none by the reference unless that is the backend."""
    from fusedlora.integrations.peft import report

    told = report(model)
    if told.share() != 1.0 or (backend != "reference" and told.share("reference") > 0.0):
        raise AssertionError(f"not every layer is fused:\n{told}")


@dataclass
class Result:
    """A row's step in one setting; `failed` holds the reason where nothing could be timed."""

    row: ModelRow
    checkpointing: bool
    step: str
    tokens: int
    times: list[float] = field(default_factory=list)
    seconds: Spread | None = None
    tax: Spread | None = None  # over the frozen model
    compiled_tax: Spread | None = None  # of a compiled row over the compiled frozen model
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None  # above what is allocated before the step
    graphs: int | None = None  # that torch.compile made
    failed: str | None = None
    trace: str | None = None

    def as_dict(self) -> dict[str, Any]:
        known = asdict(self) | {"name": self.row.name, "label": self.row.label}
        known |= {"tokens_per_second": None if self.seconds is None else self.tokens / self.seconds.median}
        return {key: value for key, value in known.items() if key not in ("times", "trace")}


class EndToEnd:
    """Measures rows in one setting at a time; the frozen weights are made once."""

    def __init__(
        self, device: torch.device, size: Size, effort: Effort, backend: str, say: Callable[[str], None], compiler: str
    ) -> None:
        self.device, self.size, self.effort, self.backend, self.say = device, size, effort, backend, say
        self.compiler = compiler
        self.base = decoder(size, device)
        shape = (size.batch, size.length, size.width)
        self.x = torch.randn(shape, device=device).bfloat16().requires_grad_()
        self.dy = torch.randn(shape, device=device).bfloat16()
        self.reference: Reference | None = None

    def measure(self, rows: Sequence[ModelRow], *, checkpointing: bool) -> dict[tuple[str, str], Result]:
        """Results by (step, row's name)."""
        if self.reference is None:
            self.reference = Reference(self.base, self.x, self.dy)
        found = {(step, row.name): Result(row, checkpointing, step, self.size.tokens) for row in rows for step in STEPS}
        runs: dict[str, Run] = {}
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            for row in rows:
                results = [found[step, row.name] for step in STEPS]
                try:
                    runs[row.name] = self._checked(row, checkpointing, results)
                except Exception as error:  # one row's failure must not hide the others
                    failure = Failure.of(error)
                    for result in results:
                        result.failed, result.trace = failure.reason, failure.trace
                    self.say(f"  {row.name} failed: {failure.reason}")
            for step in STEPS:
                self._time(step, runs, found)
        return found

    def _checked(self, row: ModelRow, checkpointing: bool, results: list[Result]) -> Run:
        """The row's run, its outputs checked, ours as calls of the backend; memory and errors noted in the results."""
        assert self.reference is not None
        reference = self.reference
        graphs = counters["stats"]["unique_graphs"]
        model = with_adapters(self.base, row, checkpointing=checkpointing)
        run = Run(row, model, self.x, self.dy, self.compiler)
        if row.library == "fusedlora":
            # `fuse` takes "auto", which may take either kind of kernels, or one forward and the other backward.
            kernels = self.backend if self.backend == "reference" else ("triton", "cuda")
            errors = assert_backend(kernels, lambda: reference.check(run))
            require_fused(run.model, self.backend)
        else:
            errors = reference.check(run)
        graphs = counters["stats"]["unique_graphs"] - graphs
        if row.compiled and not graphs:
            raise AssertionError("torch.compile made no graph: the row would be an eager one")
        for result, call in zip(results, (run.step, run.optimizer_step)):
            call()  # the first one allocates what stays, as the optimizer's state
            result.errors, result.peak_bytes = errors, peak_memory(call, self.device)
            result.graphs = graphs if row.compiled else None
        self.say(f"  {row.name}: checked")
        return run

    def _time(self, step: str, runs: dict[str, Run], found: dict[tuple[str, str], Result]) -> None:
        def timer(run: Run) -> WallTimer:
            call = run.step if step == "step" else run.optimizer_step
            return WallTimer([call], device=self.device, block_seconds=self.effort.wall_block_seconds)

        timers = {name: timer(run) for name, run in runs.items()}
        if not timers:
            return
        times = interleave(timers, self.effort.rounds)
        for name, taken in times.items():
            result = found[step, name]
            result.times, result.seconds = taken, spread(taken)
            if "frozen" in times:
                result.tax = ratios(taken, times["frozen"])
            if result.row.compiled and "frozen_compiled" in times:
                result.compiled_tax = ratios(taken, times["frozen_compiled"])
        taxes = {name: found[step, name].tax for name in timers}
        told = ", ".join(f"{name} {tax.median:.3f}" for name, tax in taxes.items() if tax is not None)
        self.say(f"  {step}: {told}")


def tables(results: Sequence[Result], size: Size) -> list[str]:
    """A line a row: ms, tokens/s, tax, memory above what a step finds, and that over the frozen model's."""
    lines = [f"decoder without embedding and head: {size.title}", "wall time with host overhead"]
    for checkpointing in (False, True):
        for step, words in STEPS.items():
            mine = [r for r in results if r.checkpointing is checkpointing and r.step == step]
            if not mine:
                continue
            lines += ["", f"activation checkpointing {'on' if checkpointing else 'off'}: {words}"]
            lines.append(
                f"  {'':<62} {'ms':>8} {'tokens/s':>10} {'tax [p10–p90]':>22} {'compiled tax':>12} {'MiB':>8} "
                f"{'of frozen':>9} {'error':>8}"
            )
            frozen = next((r.peak_bytes for r in mine if r.row.name == "frozen"), None)
            lines += [_line(result, frozen) for result in mine]
    return lines


def _line(result: Result, frozen: int | None) -> str:
    label = f"  {result.row.label:<62}"
    if result.failed is not None or result.seconds is None:
        return f"{label} failed: {result.failed}"
    tax = "" if result.tax is None else f"{result.tax.median:.3f} [{result.tax.p10:.3f}–{result.tax.p90:.3f}]"
    compiled = "" if result.compiled_tax is None else f"{result.compiled_tax.median:.3f}"
    memory = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f}"
    share = "" if not frozen or result.peak_bytes is None else f"{result.peak_bytes / frozen:.3f}"
    error = f"{max(result.errors.values()):.1e}" if result.errors else ""
    ms, rate = result.seconds.median * 1e3, result.tokens / result.seconds.median
    return f"{label} {ms:8.2f} {rate:10.0f} {tax:>22} {compiled:>12} {memory:>8} {share:>9} {error:>8}".rstrip()
