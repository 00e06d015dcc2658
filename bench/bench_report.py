"""Tables, JSON and the picture, from rows."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from bench_cases import GROUPS, Case
from bench_rows import CPU_BOUND, Row

from fusedlora.timing import ratios

LABEL_WIDTH = 56


def heading(machine: Mapping[str, str], state: Mapping[str, str], backend: str) -> list[str]:
    """What the tables are headed by: machine, versions, clocks and power, the backend of our rows."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    if state:
        lines.append("while the frozen linear ran: " + ", ".join(f"{name} {value}" for name, value in state.items()))
    lines.append(f"fusedlora's rows: backend {backend!r} where none is named, asserted for every one of them")
    if "gpu" not in machine:
        lines.append("no CUDA device: small shapes on the CPU, wall time; this says nothing about the kernels")
    return lines


def how(group: str, on_gpu: bool) -> str:
    if not on_gpu:
        return f"{GROUPS[group]} (wall time)"
    return f"{GROUPS[group]}{'' if group == 'module' else ' (replayed from a CUDA graph: GPU time alone)'}"


def _cases(rows: Iterable[Row]) -> list[Case]:
    return list(dict.fromkeys(row.case for row in rows))


def _line(row: Row) -> str:
    label = f"  {row.contender.label:<{LABEL_WIDTH}}"
    if row.failed is not None or row.seconds is None:
        return f"{label} failed: {row.failed}"
    facts = row.as_dict()
    tax = "" if row.tax is None else f"{row.tax.median:7.3f} [{row.tax.p10:.3f}–{row.tax.p90:.3f}]"
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:9.1f}"
    error = f"{max(row.errors.values()):.1e}" if row.errors else ""
    return (
        f"{label} {row.seconds.median * 1e6:10.1f} {facts['tflops']:8.2f} {facts['gbps']:8.1f} {tax:>22} {peak:>9} "
        f"{error:>8} {row.backend or ''}"
    ).rstrip()


def group_table(group: str, rows: Sequence[Row], on_gpu: bool) -> list[str]:
    """A line a row: µs, TFLOP/s and GB/s of the least work needed, tax, peak memory, largest error."""
    mine = [row for row in rows if row.group == group]
    lines = [f"{group}: {how(group, on_gpu)}"]
    lines.append(
        f"  {'':<{LABEL_WIDTH}} {'µs':>10} {'TFLOP/s':>8} {'GB/s':>8} {'tax [p10–p90]':>22} {'peak MiB':>9} "
        f"{'error':>8} backend"
    )
    for case in _cases(mine):
        lines.append(case.title)
        lines += [_line(row) for row in mine if row.case == case]
    return lines


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def geomeans(rows: Sequence[Row], group: str) -> dict[str, tuple[float, int]]:
    """Geometric mean of the tax over shapes, and over how many, by contender."""
    taxes: dict[str, list[float]] = {}
    for row in rows:
        if row.group == group and row.tax is not None:
            taxes.setdefault(row.contender.name, []).append(row.tax.median)
    return {name: (geomean(values), len(values)) for name, values in taxes.items()}


def tax_matrix(group: str, rows: Sequence[Row], on_gpu: bool) -> list[str]:
    """LoRA tax, a line a shape and a column a contender, with the geometric means below."""
    mine = [row for row in rows if row.group == group]
    names = list(dict.fromkeys(row.contender.name for row in mine if row.contender.adapter is not None))
    cases = _cases(mine)
    if not names:
        return []
    widths = [max(len(name), 6) for name in names]
    left = max(len(case.title) for case in cases)
    lines = [f"LoRA tax (time / frozen linear's), {how(group, on_gpu)}"]
    lines.append(f"  {'':<{left}} " + " ".join(f"{name:>{w}}" for name, w in zip(names, widths)))
    found = {(row.case, row.contender.name): row for row in mine}
    for case in cases:
        cells = [_cell(found.get((case, name))) for name in names]
        lines.append(f"  {case.title:<{left}} " + " ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)))
    means = geomeans(mine, group)
    cells = [f"{means[name][0]:.3f}" if name in means else "-" for name in names]
    lines.append(f"  {'geomean':<{left}} " + " ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)))
    partial = [
        f"{name} over {means[name][1]} of {len(cases)}"
        for name in names
        if name in means and means[name][1] < len(cases)
    ]
    if partial:
        lines.append("  geomeans over fewer shapes: " + ", ".join(partial))
    return lines + _losses(mine)


def configs(rows: Sequence[Row]) -> list[str]:
    """How our kernels were launched, a line a shape and row."""
    found = dict.fromkeys((row.case.title, row.contender.name, row.config) for row in rows if row.config is not None)
    return [f"  {title}, {name}: {config}" for title, name, config in found]


def choice(rows: Sequence[Row]) -> list[str]:
    """Where there are rows of two backends: which of them "auto" takes, and which rows are left out and why."""
    ours = [row for row in rows if row.contender.ours]
    lines = []
    if len({row.backend for row in ours}) > 1:
        taken: dict[str, dict[str, None]] = {}
        for row in ours:
            if row.backend != "cuda" and row.auto is not None:
                taken.setdefault(row.auto, {})[f"{row.group} {row.case.title} {row.contender.name}"] = None
        for told, calls in taken.items():
            lines.append(f'backend="auto" takes {told}: ' + ("everywhere" if len(taken) == 1 else ", ".join(calls)))
    reasons: dict[str, list[Row]] = {}
    for row in ours:
        if row.contender.without_twin is not None:
            reasons.setdefault(row.contender.without_twin, []).append(row)
    for reason, without in reasons.items():
        names = ", ".join(dict.fromkeys(row.contender.name for row in without))
        cases = _cases(without)
        where = "" if cases == _cases(ours) else f" at {', '.join(case.title for case in cases)}"
        lines.append(f"no row of backend cuda beside {names}{where}: {reason}")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return "failed" if row.tax is None else f"{row.tax.median:.3f}"


def _losses(rows: Sequence[Row]) -> list[str]:
    """Every place where a baseline with the same adapters, autocast and feature is faster than ours."""
    lines = []
    for ours in rows:
        if not ours.contender.ours or ours.seconds is None:
            continue
        for row in rows:
            same = row.contender.setting == ours.contender.setting
            if row.case != ours.case or row.contender.ours or not same or row.seconds is None:
                continue
            times = ratios(ours.times, row.times).median
            if times > 1:
                lines.append(
                    f"  slower: {ours.case.title}, {ours.contender.name} takes {times:.3f} of {row.contender.name}"
                )
    return lines


def cpu_rule(rows: Sequence[Row]) -> list[str]:
    """On a CPU: a training step's time and memory against the eager arithmetic's."""
    lines = []
    for row in rows:
        if row.group == "training" and row.versus_rival is not None:
            time = f"time {row.versus_rival.median:.3f} [{row.versus_rival.p10:.3f}–{row.versus_rival.p90:.3f}]"
            memory = "" if row.rival_peak_ratio is None else f", memory {row.rival_peak_ratio:.3f}"
            lines.append(f"  {row.case.title:<34} {row.contender.name:<15} {time}{memory}")
    if lines:
        lines.insert(0, f"training step on the CPU / eager PEFT arithmetic's (at most {CPU_BOUND})")
    return lines


def render(rows: Sequence[Row], machine: Mapping[str, str], state: Mapping[str, str], backend: str) -> list[str]:
    """Everything that is printed, the short tables last."""
    on_gpu = "gpu" in machine
    groups = [group for group in GROUPS if any(row.group == group for row in rows)]
    lines: list[str] = []
    for group in groups:
        lines += [*group_table(group, rows, on_gpu), ""]
    lines += [*configs(rows), "", *heading(machine, state, backend), *choice(rows), ""]
    for group in groups:
        lines += [*tax_matrix(group, rows, on_gpu), ""]
    return lines + ([] if on_gpu else cpu_rule(rows))


def report(rows: Sequence[Row], machine: Mapping[str, str], state: Mapping[str, str], backend: str) -> dict[str, Any]:
    """JSON-ready."""
    means = {group: {n: m for n, (m, _) in geomeans(rows, group).items()} for group in GROUPS}
    return {
        "machine": dict(machine),
        "state": dict(state),
        "backend": backend,
        "geomean_tax": means,
        "rows": [row.as_dict() for row in rows],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_picture(path: Path, rows: Sequence[Row], title: str, group: str = "training") -> bool:
    """A PNG of the tax per shape, a mark a contender; False where matplotlib is missing or there is nothing to draw."""
    mine = [row for row in rows if row.group == group and row.tax is not None and row.contender.adapter is not None]
    if not mine:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cases = _cases(mine)
    names = list(dict.fromkeys(row.contender.name for row in mine))
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(1.0, color="black", linewidth=1)
    marks = iter("osD^v<>PX*dph" * len(names))
    reds = cycle(("#d62728", "#ff7f0e", "#8c564b", "#e377c2", "#9467bd", "#bcbd22", "#67000d"))
    for name in names:
        drawn = [row for row in mine if row.contender.name == name]
        ours = drawn[0].contender.ours
        labels = {row.contender.label for row in drawn}
        axes.plot(
            [row.tax.median for row in drawn],
            [cases.index(row.case) for row in drawn],
            next(marks),
            color=next(reds) if ours else None,
            markersize=9 if ours else 6,
            fillstyle="full" if ours else "none",
            label=labels.pop() if len(labels) == 1 else name,
        )
    axes.set_yticks(range(len(cases)), [case.title for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(axis="both", alpha=0.25)
    axes.set_xlabel("LoRA tax: time / frozen linear's time, lower is better")
    axes.set_title(f"{GROUPS[group]}\n{title}", fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)
    return True
