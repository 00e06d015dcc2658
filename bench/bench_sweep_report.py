"""What a sweep found: a summary in words, and a page of pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_peers
from bench_cases import Case, work
from bench_report import geomean
from bench_sweep import Record, Store
from bench_sweep_cases import LINE, LINE_M, LINE_R

WORST = 8
BANDS = ((1, 64), (65, 600), (601, 4096), (4097, 1 << 30))
SERIES = (
    # row, label, colour, marker
    ("fusedlora", "fusedlora", "#d62728", "o"),
    ("eager", "eager PEFT arithmetic", "#1f77b4", "s"),
    ("compile", "torch.compile", "#2ca02c", "D"),
)


def case_of(record: Record) -> Case:
    return Case(**record["case"])


def _median(record: Record, row: str, what: str) -> float | None:
    value = record["rows"].get(row, {}).get(what)
    return value if value is None or isinstance(value, float) else value["median"]


def _over(record: Record, row: str) -> float | None:
    """The time of ours over that of another row."""
    return _median(record, row, "ours_over_this")


def summary(records: Sequence[Record], total: int) -> list[str]:
    """How many shapes, how many of them not slower, the worst ones, where auto took the reference, torch.compile."""
    timed = [record for record in records if "rows" in record]
    unfit = [record for record in records if "does_not_fit" in record]
    lines = [f"sweep: {len(timed)} of {total} shapes measured with this code, {len(unfit)} do not fit the memory"]
    lines += [f"  {record['does_not_fit']}" for record in unfit]
    if not timed:
        return lines
    ratios = [_over(record, "eager") for record in timed]
    fine = sum(ratio <= 1 for ratio in ratios)
    near = sum(1 < ratio <= 1.02 for ratio in ratios)
    lines.append(
        f"not slower than eager PEFT arithmetic: {fine} of {len(timed)} ({fine / len(timed):.1%}), "
        f"up to 2 % slower: {near}; geometric mean of the times' ratio {geomean(ratios):.3f}"
    )
    lines.append(f"  {'rows':<14} {'shapes':>6} {'not slower':>10} {'ours / eager':>13} {'tax':>7} {'eager tax':>10}")
    for low, high in BANDS:
        band = [record for record in timed if low <= record["case"]["M"] <= high]
        if band:
            name = f"M {low}–{high}" if high < 1 << 30 else f"M ≥ {low}"
            over = [_over(record, "eager") for record in band]
            tax, theirs = ([_median(record, row, "tax") for record in band] for row in ("fusedlora", "eager"))
            lines.append(
                f"  {name:<14} {len(band):>6} {sum(r <= 1 for r in over):>10} {geomean(over):>13.3f} "
                f"{geomean(tax):>7.3f} {geomean(theirs):>10.3f}"
            )
    worst = sorted(timed, key=lambda record: -_over(record, "eager"))[:WORST]
    lines.append("largest ratios: ours / eager, tax")
    lines += [
        f"  {case_of(record).title:<34} {_over(record, 'eager'):.3f} {_median(record, 'fusedlora', 'tax'):.3f} "
        f"{record['auto']}"
        for record in worst
    ]
    return lines + _by_reference(timed) + _compiled(timed)


def _by_reference(timed: Sequence[Record]) -> list[str]:
    """The shapes that auto does not give to kernels, or only one direction of them, with the time of Triton's."""
    found = [record for record in timed if not _by_kernels(record)]
    both = sum(record["auto"] == "reference" for record in found)
    lines = [f"auto took the reference at {both} of {len(timed)} shapes, for one direction at {len(found) - both} more"]
    lines[0] += ":" if found else ""
    for record in found:
        own = _median(record, "fusedlora_triton", "versus_rival")
        failed = record["rows"].get("fusedlora_triton", {}).get("failed")
        kernels = f"failed: {failed}" if own is None else f"{own:.3f}"
        over = f"ours / eager {_over(record, 'eager'):.3f}, kernels by name / eager {kernels}"
        lines.append(f"  {case_of(record).title:<34} {over} ({record['auto']}; {record['why_not']})")
    return lines


def _by_kernels(record: Record) -> bool:
    return "reference" not in record["auto"]


def _compiled(timed: Sequence[Record]) -> list[str]:
    tried = [record for record in timed if "compile" in record["rows"]]
    over = {record["id"]: ratio for record in tried if (ratio := _over(record, "compile")) is not None}
    if not over:
        return [f"torch.compile: measured at none of {len(tried)} shapes"]
    fine = sum(ratio <= 1 for ratio in over.values())
    name, most = max(over.items(), key=lambda item: item[1])
    failed = len(tried) - len(over)
    return [
        f"not slower than torch.compile of the eager arithmetic: {fine} of {len(over)}, geometric mean "
        f"{geomean(list(over.values())):.3f}, largest {most:.3f} at {name}; it failed at {failed} shapes"
    ]


def ceilings(records: Sequence[Record], copy_gbps: float) -> tuple[float, float]:
    """FLOP/s of the frozen linear's best shape and bytes/s of a copy: the roofs that were seen, not a data sheet's."""
    return max(_median(record, "frozen", "tflops") for record in records) * 1e12, copy_gbps * 1e9


def floor(case: Case, flops: float, bandwidth: float) -> float:
    """The least tax: forward and backward each take their arithmetic's or their traffic's time, whichever is longer."""
    times = []
    for itemsize in (case.torch_dtype.itemsize, None):
        parts = [work(case, group, itemsize) for group in ("forward", "backward")]
        times.append(sum(max(part.flops / flops, part.bytes / bandwidth) for part in parts))
    return times[0] / times[1]


def write_pictures(path: Path, store: Store) -> bool:
    """The page as a PNG; False where matplotlib is missing or there is nothing to draw."""
    records = [record for record in store.current().values() if "rows" in record]
    if not records or store.copy_gbps is None:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(15, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    roofs = ceilings(records, store.copy_gbps)
    peers = bench_peers.MEASURED_ON in store.facts.get("gpu", "")
    on_line = [record for record in records if (record["case"]["K"], record["case"]["N"]) == LINE]
    on_line = [record for record in on_line if record["case"]["dtype"] == "bf16"]
    over_m = [record for record in on_line if record["case"]["r"] == LINE_R]
    over_r = [record for record in on_line if record["case"]["M"] == LINE_M]
    K, N = LINE
    _line(axes[0][0], over_m, "M", roofs, peers, f"over the rows M: {K} → {N}, r = {LINE_R}, bf16")
    _line(axes[0][1], over_r, "r", roofs, peers, f"over the rank r: {K} → {N}, M = {LINE_M}, bf16")
    _ratios(axes[1][0], records)
    _roofline(axes[1][1], records, roofs)
    card = store.facts.get("gpu", store.facts.get("cpu", ""))
    figure.suptitle(
        f"LoRA linear, forward + backward, {len(records)} shapes of Llama, Qwen, Mistral, Gemma and ViT\n"
        f"{card}, torch {store.facts['torch']}, triton {store.facts['triton']}",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)
    return True


def _line(axes: Any, records: list[Record], key: str, roofs: tuple[float, float], peers: bool, title: str) -> None:
    """Tax over M or r: ours, the other rows, other libraries, and the floor."""
    if not records:
        axes.set_axis_off()
        return
    records = sorted(records, key=lambda record: record["case"][key])
    for name, label, colour, marker in SERIES:
        points = [(r["case"][key], r["rows"][name]["tax"]) for r in records if "tax" in r["rows"].get(name, {})]
        if points:
            at, taxes = zip(*points)
            low, middle, high = ([tax[part] for tax in taxes] for part in ("p10", "median", "p90"))
            axes.plot(
                at, middle, color=colour, marker=marker, label=label, linewidth=2.2 if name == "fusedlora" else 1.2
            )
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    at = [record["case"][key] for record in records]
    axes.plot(at, [floor(case_of(record), *roofs) for record in records], "k--", linewidth=1, label="floor")
    if peers:
        _peers(axes, key)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(value) for value in at], rotation=45 if key == "M" else 0, fontsize=8)
    axes.set_ylim(0.95, None)
    axes.set_ylabel("LoRA tax: time / frozen nn.Linear's")
    axes.set_title(f"Tax {title}", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _peers(axes: Any, key: str) -> None:
    """Thin grey lines of other libraries, as measured once before."""
    for number, (name, dashes) in enumerate(zip(bench_peers.NAMES, ("-", "--", "-.", ":"))):
        points = [
            ((M if key == "M" else r), taxes[number])
            for (M, K, N, r), taxes in bench_peers.TAX.items()
            if (K, N) == LINE and (r == LINE_R if key == "M" else M == LINE_M)
        ]
        at, taxes = zip(*sorted(points))
        axes.plot(at, taxes, dashes, color="0.5", marker="x", linewidth=1, label=f"{name} (an earlier run)")


def _ratios(axes: Any, records: list[Record]) -> None:
    """Ours over eager at every shape, by its arithmetic; rings where auto took the reference, if for one direction."""
    for dtype, colour in (("bf16", "#d62728"), ("fp16", "#9467bd"), ("fp32", "#8c564b")):
        for by_kernels in (True, False):
            mine = [r for r in records if r["case"]["dtype"] == dtype and _by_kernels(r) is by_kernels]
            if mine:
                axes.plot(
                    [work(case_of(r), "training", None).flops for r in mine],
                    [_over(r, "eager") for r in mine],
                    "o",
                    color=colour,
                    fillstyle="full" if by_kernels else "none",
                    alpha=0.75,
                    label=f"{dtype}, {'kernels' if by_kernels else 'auto took the reference'}",
                )
    over = [_over(record, "eager") for record in records]
    share = sum(ratio <= 1 for ratio in over) / len(over)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.axhline(statistics.median(over), color="black", linewidth=0.8, linestyle=":", label="median")
    axes.set_xscale("log")
    axes.set_xlabel("FLOP of the frozen linear, forward + backward")
    axes.set_ylabel("time of ours / time of eager PEFT arithmetic")
    axes.set_title(f"Every shape against eager: {share:.1%} not slower", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _roofline(axes: Any, records: list[Record], roofs: tuple[float, float]) -> None:
    """TFLOP/s over FLOP a byte of the least traffic, under the two ceilings that were measured."""
    flops, bandwidth = roofs
    intensities = []
    for name, label, colour, marker in (("frozen", "frozen nn.Linear (cuBLAS)", "0.4", "x"), SERIES[0], SERIES[1]):
        points = []
        for record in records:
            case = case_of(record)
            least = work(case, "training", None if name == "frozen" else case.torch_dtype.itemsize)
            points.append((least.flops / least.bytes, record["rows"][name]["tflops"]))
        at, reached = zip(*points)
        intensities += at
        axes.plot(at, reached, marker, color=colour, fillstyle="none", alpha=0.7, markersize=5, label=label)
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    ridge = flops / bandwidth
    at = sorted([low, high, *([ridge] if low < ridge < high else [])])
    axes.plot(at, [min(flops, bandwidth * x) / 1e12 for x in at], "k-", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP / byte, each input read and each output written once")
    axes.set_ylabel("TFLOP/s of the least arithmetic")
    axes.set_title(
        f"Roofline: {flops / 1e12:.3g} TFLOP/s (the frozen linear's best), {bandwidth / 1e9:.0f} GB/s (a copy)",
        fontsize=11,
    )
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
