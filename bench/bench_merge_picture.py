"""A picture of several runs put together: our kernels beside other libraries, and what features add to them."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench_cases import HEADLINE, Case
from bench_merge import Merged, shape
from bench_peers import MEASURED_ON, NAMES, TAX

GROUPS = ("training", "features")
# contender, label, colour: the kernels that the left half shows, and the calls that the right half does
KERNELS = (("fusedlora_cuda", "fusedlora, CUDA C++", "#d62728"), ("fusedlora", "fusedlora, Triton", "#ff7f0e"))
FEATURES = (
    ("fusedlora_cuda", "bf16 adapters", "#d62728"),
    ("fusedlora_cuda_amp", "fp32 adapters, autocast", "#1f77b4"),
    ("fusedlora_cuda_fp32", "fp32 adapters, no autocast", "#2ca02c"),
    ("fusedlora_cuda_dropout", "dropout 0.1", "#9467bd"),
    ("fusedlora_cuda_dora", "DoRA", "#8c564b"),
)


def draw(path: Path, merged: Merged) -> bool:
    """A PNG; False where matplotlib is missing or no run has a headline shape.

    Ours are medians over the runs, with a line from the least to the most; other libraries' figures are bench_peers'.
    """
    cases = [case for dims in HEADLINE for case in merged.cases(GROUPS) if case == Case(*dims, headline=case.headline)]
    if not cases:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    gpu = merged.runs[0]["machine"].get("gpu", "?").removeprefix("NVIDIA ")
    figure = Figure(figsize=(12, 1.8 + 0.65 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(NAMES):
        found = [(TAX[dims][number], at) for at, case in enumerate(cases) if (dims := _dims(case)) in TAX]
        marks = {"linestyle": "none", "marker": "s^Dv"[number], "fillstyle": "none", "color": "#7f7f7f"}
        left.plot(*zip(*found), **marks, label=f"{name}, {MEASURED_ON}")
    for axes, contenders, shift in ((left, KERNELS, 0.24), (right, FEATURES, 0.17)):
        for number, (contender, label, colour) in enumerate(contenders):
            offset = shift * (number - (len(contenders) - 1) / 2)
            found = [
                (at + offset, values)
                for at, case in enumerate(cases)
                if (values := merged.taxes(GROUPS, case, contender))
            ]
            _marks(axes, found, f"{label}, {gpu}" if axes is left else label, colour)
        axes.margins(x=0.08)  # room for the last value
        axes.axvline(1.0, color="black", linewidth=1)
        axes.grid(axis="x", alpha=0.25)
        axes.legend(fontsize=8, loc="upper right")
        axes.set_xlabel("LoRA tax: forward + backward over the frozen linear's, lower is better", fontsize=9)
    left.set_yticks(range(len(cases)), [shape(case) for case in cases])
    left.set_ylim(len(cases) - 0.5, -0.5)
    left.set_title("Beside other libraries: M, in → out, r", fontsize=10)
    right.set_title(f"What a layer does besides: CUDA C++, {gpu}", fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def _dims(case: Case) -> tuple[int, int, int, int]:
    return case.M, case.K, case.N, case.r


def _marks(axes, found: Sequence[tuple[float, list[float]]], label: str, colour: str) -> None:
    """A mark at each median, its value beside it."""
    for at, values in found:
        middle = statistics.median(values)
        axes.plot([min(values), max(values)], [at, at], color=colour, linewidth=3, alpha=0.4)
        axes.annotate(
            f"{middle:.2f}", (middle, at), xytext=(6, -3), textcoords="offset points", fontsize=7, color=colour
        )
    axes.plot(
        [statistics.median(values) for _, values in found], [at for at, _ in found], "o", color=colour, label=label
    )
