"""A row of the tables, how long it is measured, and why it may have failed."""

import traceback
from dataclasses import asdict, dataclass, field

from bench_cases import Case, work
from bench_contenders import Contender

from fusedlora.timing import Spread

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
    auto: str | None = None  # what "auto" takes for the calls of a row of ours
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
            "auto": self.auto,
            "without_twin": self.contender.without_twin,
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


FULL = Effort(rounds=11, block_seconds=0.006, wall_block_seconds=0.012)
FULL_CPU = Effort(rounds=15, block_seconds=0.02, wall_block_seconds=0.02)
SWEEP = Effort(rounds=7, block_seconds=0.004, wall_block_seconds=0.01)
# By 7 rounds of 0.2 s medians of the same rows differed by 0.01 and more from run to run.
END_TO_END = Effort(rounds=15, block_seconds=0.0, wall_block_seconds=0.3)
SMOKE = Effort(rounds=1, block_seconds=0.0, wall_block_seconds=0.0)


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


def above_cpu_bound(row: Row) -> bool:
    """A training step on a CPU may take at most 1.05 of the eager arithmetic's time."""
    return row.group == "training" and row.versus_rival is not None and row.versus_rival.median > CPU_BOUND
