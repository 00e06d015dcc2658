"""The README's tables as Markdown, from the JSON of several runs: medians over the runs, with the least and the most.

    pytest bench/ --benchmark -k "(training or features or decode) and not autotune" --bench-out out/1   # and 2, and 3
    python bench/bench_merge.py out/1/bench.json out/2/bench.json out/3/bench.json [--picture tax.png]

Each run is a process of its own. Runs of another GPU, other versions or another code are refused.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_cases import HEADLINE, Case
from bench_peers import MEASURED_ON, NAMES, TAX

Run = dict[str, Any]
Row = dict[str, Any]

SAME = ("gpu", "driver", "torch", "cuda", "triton", "peft", "python")
# heading, contender; all with bf16 adapters where nothing else is said
KERNELS = (
    ("cuBLAS, frozen", "frozen"),
    ("Triton", "fusedlora"),
    ("CUDA C++", "fusedlora_cuda"),
    ("one of each", "fusedlora_auto"),
    ("eager PEFT arithmetic", "eager"),
    ("peft", "peft"),
    ("torch.compile", "compile"),
)
FEATURES = (
    ("Triton", "fusedlora"),
    ("CUDA C++", "fusedlora_cuda"),
    ("one of each", "fusedlora_auto"),
    ("fp32, autocast", "fusedlora_amp"),
    ("fp32, autocast, CUDA C++", "fusedlora_cuda_amp"),
    ("fp32, autocast, one of each", "fusedlora_auto_amp"),
    ("fp32", "fusedlora_fp32"),
    ("fp32, CUDA C++", "fusedlora_cuda_fp32"),
    ("dropout 0.1", "fusedlora_dropout"),
    ("dropout 0.1, CUDA C++", "fusedlora_cuda_dropout"),
    ("dropout 0.1, one of each", "fusedlora_auto_dropout"),
    ("bias", "fusedlora_bias"),
    ("bias, CUDA C++", "fusedlora_cuda_bias"),
    ("bias, one of each", "fusedlora_auto_bias"),
    ("DoRA", "fusedlora_dora"),
    ("DoRA, CUDA C++", "fusedlora_cuda_dora"),
    ("DoRA, one of each", "fusedlora_auto_dora"),
)
EAGER_FEATURES = (
    ("bf16", "eager"),
    ("fp32, autocast", "eager_amp"),
    ("fp32", "eager_fp32"),
    ("dropout 0.1", "eager_dropout"),
    ("bias", "eager_bias"),
    ("DoRA", "eager_dora"),
)
# title, the groups that have the figure (the first that is there), columns
TABLES = (
    ("LoRA tax, forward + backward", ("training", "features"), KERNELS),
    ("LoRA tax with features, forward + backward, fusedlora", ("features", "training"), FEATURES),
    ("LoRA tax with features, forward + backward, eager PEFT arithmetic", ("features", "training"), EAGER_FEATURES),
    ("LoRA tax, forward", ("forward",), KERNELS),
    ("LoRA tax, backward", ("backward",), KERNELS),
    ("LoRA tax, decode: forward without gradients", ("decode",), KERNELS),
    ("the module called eagerly, wall time over the frozen linear's", ("module",), KERNELS),
)


class DifferentRuns(ValueError):
    """Runs whose figures may not be put together."""


def read(paths: Sequence[str]) -> list[Run]:
    """The runs.

    Raises:
        DifferentRuns: they are of different machines, versions or codes, or one is given twice.
    """
    runs = [json.loads(Path(path).read_text()) for path in paths]
    first = _identity(runs[0])
    for path, run in zip(paths[1:], runs[1:]):
        for name, value in _identity(run).items():
            if value != first[name]:
                raise DifferentRuns(f"{path} has {name} {value}, {paths[0]} has {first[name]}")
    for i, run in enumerate(runs):
        if run in runs[:i]:
            raise DifferentRuns(f"{paths[i]} is the same run as {paths[runs.index(run)]}")
    return runs


def _identity(run: Run) -> dict[str, str | None]:
    return {name: run["machine"].get(name) for name in SAME} | {"code": run.get("code")}


class Merged:
    """The rows of several runs by group, case and contender."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.rows: dict[tuple[str, Case, str], list[Row]] = {}
        for run in runs:
            for row in run["rows"]:
                key = row["group"], Case(**row["case"]), row["contender"]
                self.rows.setdefault(key, []).append(row)

    def taxes(self, groups: Sequence[str], case: Case, contender: str) -> list[float] | None:
        """Those of the runs in which it did not fail, of the first group that was asked for it; None: no group was."""
        for group in groups:
            if (rows := self.rows.get((group, case, contender))) is not None:
                return [row["tax"]["median"] for row in rows if row["tax"] is not None]
        return None

    def cell(self, groups: Sequence[str], case: Case, contender: str) -> str | None:
        """Median of the runs' taxes, the least and the most, in how many runs if not in all; None: not asked for."""
        taxes = self.taxes(groups, case, contender)
        if not taxes:
            return None if taxes is None else "failed"
        text = f"{statistics.median(taxes):.3f}"
        if len(taxes) > 1 and contender != "frozen":
            text += f" ({min(taxes):.3f}–{max(taxes):.3f})"
        return text if len(taxes) == len(self.runs) else f"{text} in {len(taxes)} of {len(self.runs)} runs"

    def cases(self, groups: Sequence[str]) -> list[Case]:
        """The shapes that any run has, in order."""
        return list(dict.fromkeys(case for group, case, _ in self.rows if group in groups))

    def table(self, title: str, groups: Sequence[str], columns: Sequence[tuple[str, str]]) -> Iterator[str]:
        """Markdown; columns that no run has are left out, and so is a table of nothing but the frozen linear."""
        cases = self.cases(groups)
        cells = {(case, name): self.cell(groups, case, name) for case in cases for _, name in columns}
        there = [(head, name) for head, name in columns if any(cells[case, name] for case in cases)]
        if all(name == "frozen" for _, name in there):
            return
        yield f"**{title}**"
        yield ""
        yield from markdown(
            ["M, in → out, r", *(head for head, _ in there)],
            [[shape(case), *(cells[case, name] or "–" for _, name in there)] for case in cases],
        )

    def choices(self) -> list[str]:
        """What backend="auto" takes, where it has a choice, and the CUDA kernels' reasons against calls."""
        taken: dict[str, dict[str, None]] = {}
        refused: dict[str, dict[str, None]] = {}
        for (group, case, name), rows in self.rows.items():
            if rows[0].get("backend") == "triton" and (told := rows[0].get("auto")):
                taken.setdefault(told, {})[f"{group} {shape(case)} {name}"] = None
            if reason := rows[0].get("without_twin"):
                refused.setdefault(reason, {})[name] = None
        if not any(row.get("backend") == "cuda" for rows in self.rows.values() for row in rows):
            taken = {}
        lines = [
            f'* `backend="auto"` takes {told}: {"everywhere" if len(taken) == 1 else "; ".join(calls)}'
            for told, calls in taken.items()
        ]
        return lines + [f"* not by backend `cuda`: {', '.join(names)}: {reason}" for reason, names in refused.items()]


def shape(case: Case) -> str:
    return f"{case.M}, {case.K} → {case.N}, {case.r}" + ("" if case.dtype == "bf16" else f", {case.dtype}")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(line)} |"
    yield ""


def heading(runs: Sequence[Run]) -> Iterator[str]:
    machine = runs[0]["machine"]
    facts = [f"{name} {machine[name]}" for name in ("gpu", "sms", "power_limit_w", *SAME[1:]) if name in machine]
    dates = sorted({run["date"] for run in runs if "date" in run})
    yield f"{', '.join(facts)}; {' and '.join(dates) or 'no date'}."
    rounds = sorted({row["rounds"] for run in runs for row in run["rows"] if row["rounds"]})
    count = "–".join(map(str, rounds))
    if len(runs) == 1:
        yield f"One run of {count} interleaved rounds."
    else:
        yield f"Medians over {len(runs)} runs, each of {count} interleaved rounds; in brackets the least and the most."
    clocks = [f"{s['sm_clock_mhz']} MHz, {s['power_w']} W" for run in runs if (s := run["state"]).get("sm_clock_mhz")]
    if clocks:
        yield f"While the frozen linear ran: {'; '.join(clocks)}."
    yield ""


def render(runs: Sequence[Run]) -> list[str]:
    """All tables that the runs have figures for, and other libraries' lines beside the first."""
    merged = Merged(runs)
    lines = list(heading(runs))
    for title, groups, columns in TABLES:
        lines += merged.table(title, groups, columns)
    peers = [(dims, taxes) for dims, taxes in TAX.items() if dims in HEADLINE and _has(merged, dims)]
    if peers:
        lines += [
            f"**other libraries, {MEASURED_ON}, forward + backward, measured before, see bench/bench_peers.py**",
            "",
        ]
        rows = [[shape(Case(*dims)), *(f"{tax:.3f}" for tax in taxes)] for dims, taxes in peers]
        lines += markdown(["M, in → out, r", *NAMES], rows)
    return lines + merged.choices()


def _has(merged: Merged, dims: tuple[int, int, int, int]) -> bool:
    cases = merged.cases(("training", "features"))
    return any((case.M, case.K, case.N, case.r, case.dtype) == (*dims, "bf16") for case in cases)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="bench.json", help="a run's file")
    parser.add_argument("--picture", metavar="PNG", type=Path, help="also draw the headline shapes (needs matplotlib)")
    options = parser.parse_args(arguments)
    try:
        runs = read(options.runs)
    except DifferentRuns as error:
        sys.exit(str(error))
    print("\n".join(render(runs)))
    if options.picture is not None:
        from bench_merge_picture import draw  # which imports this module

        if not draw(options.picture, Merged(runs)):
            sys.exit(f"no {options.picture}: matplotlib is missing, or no run has a headline shape")


if __name__ == "__main__":
    main(sys.argv[1:])
