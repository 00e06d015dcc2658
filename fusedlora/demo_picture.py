"""The demo's picture: loss and accuracy of every rank, and with several ranks what each bought."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#1f6feb", "#d9730d", "#2a9d6f", "#a13fb5", "#c9302c", "#7a6a00", "#0097a7", "#5d4037")
INK, PALE = "#24292f", "#8b949e"


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    out, mean = [], 0.0
    for i, value in enumerate(values):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep ** (i + 1)))
    return out


def _clean(ax: Any, title: str, xlabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    ax.set_xlabel(xlabel, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.tick_params(colors=INK, length=3)
    ax.grid(axis="y", color="#d0d7de", linewidth=0.7)
    ax.set_axisbelow(True)


def _frozen_line(ax: Any, frozen: float, label: str) -> None:
    ax.axhline(frozen, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
    ax.annotate(
        label, (0.99, frozen), xycoords=("axes fraction", "data"), xytext=(0, -5), textcoords="offset points",
        ha="right", va="top", fontsize=9, color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip


def _over_rank(accuracy: Any, share: Any, results: Sequence[Any], frozen: float, n: int) -> None:
    places = range(len(results))
    for i, t in enumerate(results):
        colour = COLOURS[i % len(COLOURS)]
        error = (t.accuracy * (1 - t.accuracy) / n) ** 0.5
        accuracy.errorbar(i, t.accuracy, error, fmt="o", color=colour, markersize=8, capsize=4, linewidth=1.4)
        accuracy.annotate(
            f"{t.accuracy:.1%}", (i, t.accuracy), xytext=(9, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK,
        )  # fmt: skip
        share.bar(i, t.share, width=0.55, color=colour)
        share.annotate(
            f"{t.share:.2%}", (i, t.share), xytext=(0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=9, color=INK,
        )  # fmt: skip
    accuracy.plot(places, [t.accuracy for t in results], color=PALE, linewidth=1, zorder=0)
    for ax in (accuracy, share):
        ax.set_xticks(list(places), [str(t.r) for t in results])
        ax.set_xlim(-0.6, len(results) - 0.2)
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    _clean(accuracy, "Accuracy over rank (bars: standard error)", "")
    _clean(share, "Trainable parameters, of all", "rank r")
    share.set_ylim(0, max(t.share for t in results) * 1.25)
    _frozen_line(accuracy, frozen, "frozen encoder")


def draw(results: Sequence[Any], untrained: float, frozen: float, n: int, path: Path, subtitle: str) -> None:
    """Writes the PNG. `results` are demo.Trained, `n` the number of validation texts."""
    from matplotlib.figure import Figure  # no pyplot: no window system is asked for

    several = len(results) > 1
    figure = Figure(figsize=(14.5 if several else 10.5, 5.4), dpi=150, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(2, 3 if several else 2, height_ratios=(3, 2), hspace=0.08, wspace=0.06)
    loss, accuracy = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])

    for i, t in enumerate(results):
        colour = COLOURS[i % len(COLOURS)]
        steps = range(1, len(t.history.loss) + 1)
        if not several:
            loss.plot(steps, t.history.loss, color=colour, alpha=0.22, linewidth=0.8, label="training, each step")
        smooth = "training, smoothed" if not several else f"r = {t.r}"
        loss.plot(steps, _smooth(t.history.loss), color=colour, linewidth=1.8, label=smooth)
        at, val_loss, val_accuracy = zip(*t.history.val)
        val_label = "validation" if not several else None
        loss.plot(at, val_loss, "o", color=colour, markerfacecolor="white", markeredgewidth=1.5, label=val_label)
        accuracy.plot(at, val_accuracy, "o-", color=colour, linewidth=1.8, markersize=5, label=f"LoRA, r = {t.r}")

    _clean(loss, "Cross entropy" + (" (lines: training, circles: validation)" if several else ""), "step")
    loss.set_ylim(0, loss.get_ylim()[1] * (1.2 if several else 1.0))  # room for the legend
    loss.legend(frameon=False, fontsize=9)
    _clean(accuracy, "Accuracy on held-out docstrings", "step")
    _frozen_line(accuracy, frozen, f"frozen encoder, head alone: {frozen:.1%}")
    seen = [a for t in results for _, _, a in t.history.val]
    margin = max(0.02, 0.35 * (max(*seen, frozen) - min(*seen, frozen)))
    accuracy.set_ylim(min(*seen, frozen) - margin, min(1.0, max(*seen, frozen) + margin))
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    if several:
        accuracy.legend(frameon=False, fontsize=9, loc="lower right")
        _over_rank(figure.add_subplot(grid[0, 2]), figure.add_subplot(grid[1, 2]), results, frozen, n)
    else:
        last = results[0]
        accuracy.annotate(
            f"LoRA, r = {last.r}: {last.accuracy:.1%}", (last.history.val[-1][0], last.accuracy), xytext=(0, 9),
            textcoords="offset points", ha="right", fontsize=10, fontweight="bold", color=COLOURS[0],
        )  # fmt: skip

    title = "LoRA on every Linear of all-MiniLM-L6-v2: which package is a docstring from?"
    figure.suptitle(f"{title}\n{subtitle}\n", x=0.012, ha="left", fontsize=12, linespacing=1.5, color=INK)
    figure.savefig(path)
