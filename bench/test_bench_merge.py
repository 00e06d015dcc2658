"""Several runs' JSON put together, made up by the rows themselves."""

import json
import subprocess
import sys
from pathlib import Path

import bench_merge
import bench_merge_picture
import bench_report
import pytest
from bench_cases import HEADLINE, Case
from bench_contenders import contenders
from bench_rows import Row

from fusedlora.timing import ratios, spread

ONE, TWO = (Case(*dims, headline=True) for dims in HEADLINE[:2])
MACHINE = {"gpu": "Some GPU", "torch": "2.11.0", "power_limit_w": "700"}


def row(group: str, case: Case, name: str, tax: float | None, **facts) -> dict:
    base = name.replace("fusedlora_cuda", "fusedlora")
    contender = {c.name: c for c in contenders(case, compile=True, autotune=False)}[base]
    made = Row(group, case, contender, failed="OutOfMemoryError: too large" if tax is None else None)
    if tax is not None:
        made.times = [tax] * 3
        made.seconds, made.tax = spread(made.times), ratios(made.times, [1.0] * 3)
    return made.as_dict() | {"contender": name} | facts


def run(tmp_path: Path, number: int, rows: list[dict], **facts) -> str:
    made = bench_report.report([], MACHINE, {"sm_clock_mhz": "1365", "power_w": "698"}, "triton")
    made |= {"rows": rows, "code": "c0ffee00", "date": f"2026-01-0{number}"} | facts
    path = tmp_path / f"{number}.json"
    bench_report.write_json(path, made)
    return str(path)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    paths = []
    for number, tax in enumerate((1.3, 1.1, 1.15), 1):
        rows = [
            row("training", ONE, "frozen", 1.0),
            row("training", ONE, "fusedlora", tax, backend="triton", auto="triton", without_twin=None),
            row("training", ONE, "fusedlora_cuda", tax - 0.05, backend="cuda", auto="triton"),
            row("training", ONE, "eager", 1.6),
            row("features", ONE, "fusedlora_dropout", tax + 0.1, backend="triton", without_twin="the seed"),
            row("features", TWO, "fusedlora", 2.0 * tax, backend="triton", auto="triton"),
            row("decode", Case(1, 4096, 4096, 16), "frozen", 1.0),
        ]
        if number == 3:
            rows += [row("training", TWO, "fusedlora", 1.2), row("training", TWO, "eager", None)]
        paths.append(run(tmp_path, number, rows))
    return paths


def cells(lines: list[str], title: str, first: str) -> dict[str, str]:
    """A line of a table by its headings."""
    begin = lines.index(f"**{title}**") + 2
    heads = [part.strip() for part in lines[begin].strip("|").split("|")]
    line = next(line for line in lines[begin + 2 :] if line.startswith(f"| {first} |"))
    return dict(zip(heads, (part.strip() for part in line.strip("|").split("|")), strict=True))


def test_medians_with_the_least_and_the_most(runs):
    lines = bench_merge.render(bench_merge.read(runs))
    found = cells(lines, "LoRA tax, forward + backward", "8192, 4096 → 4096, 16")
    assert found == {
        "M, in → out, r": "8192, 4096 → 4096, 16",
        "cuBLAS, frozen": "1.000",
        "Triton": "1.150 (1.100–1.300)",
        "CUDA C++": "1.100 (1.050–1.250)",
        "eager PEFT arithmetic": "1.600 (1.600–1.600)",
    }
    found = cells(lines, "LoRA tax, forward + backward", "8192, 4096 → 4096, 64")
    assert found["Triton"] == "1.200 in 1 of 3 runs" and found["eager PEFT arithmetic"] == "failed"
    assert found["CUDA C++"] == "–"
    features = "LoRA tax with features, forward + backward, fusedlora"
    found = cells(lines, features, "8192, 4096 → 4096, 64")
    assert found["Triton"] == "2.300 (2.200–2.600)", "the features' own row, not the training's"
    found = cells(lines, features, "8192, 4096 → 4096, 16")
    assert found["dropout 0.1"] == "1.250 (1.200–1.400)" and found["Triton"] == "1.150 (1.100–1.300)"
    assert "DoRA" not in found and not [line for line in lines if "decode" in line]


def test_what_stands_around_the_tables(runs):
    lines = bench_merge.render(bench_merge.read(runs))
    text = "\n".join(lines)
    assert lines[0].startswith("gpu Some GPU, power_limit_w 700, torch 2.11.0; 2026-01-01 and 2026-01-02")
    assert lines[1].startswith("Medians over 3 runs, each of 3 interleaved rounds")
    assert bench_merge.render(bench_merge.read(runs[:1]))[1] == "One run of 3 interleaved rounds."
    assert "1365 MHz, 698 W; 1365 MHz, 698 W" in text
    other = next(line for line in lines if line.startswith("**other libraries, H100"))
    assert cells(lines, other.strip("*"), "8192, 4096 → 4096, 64")["LoRAFusion"] == "1.696"
    assert "8192, 4096 → 14336, 16" not in text, "a shape that was not run"
    assert lines[-2:] == [
        '* `backend="auto"` takes triton: everywhere',
        "* not by backend `cuda`: fusedlora_dropout: the seed",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"code": "0ther"}, "has code 0ther, .* has c0ffee00"),
        ({"machine": MACHINE | {"gpu": "Another"}}, "has gpu Another, .* has Some GPU"),
    ],
    ids=["code", "gpu"],
)
def test_runs_that_do_not_go_together(runs, tmp_path, changed, message):
    with pytest.raises(bench_merge.DifferentRuns, match=message):
        bench_merge.read([*runs, run(tmp_path, 4, [], **changed)])


def test_a_run_counts_once(runs):
    with pytest.raises(bench_merge.DifferentRuns, match="3.json is the same run as .*3.json"):
        bench_merge.read([*runs, runs[2]])


def test_the_command(runs, tmp_path):
    script = str(Path(bench_merge.__file__))
    done = subprocess.run([sys.executable, script, *runs], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == bench_merge.render(bench_merge.read(runs))
    content = json.loads(Path(runs[0]).read_text())
    other = run(tmp_path, 4, content["rows"], code="0ther")
    done = subprocess.run([sys.executable, script, *runs, other], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "has code 0ther" in done.stderr and not done.stdout


def test_the_picture(runs, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    script, picture = str(Path(bench_merge.__file__)), tmp_path / "tax.png"
    done = subprocess.run(
        [sys.executable, script, *runs, "--picture", str(picture)], capture_output=True, text=True, check=True
    )
    assert picture.read_bytes().startswith(b"\x89PNG") and "fusedlora" in done.stdout
    other = run(tmp_path, 4, [row("decode", Case(1, 4096, 4096, 16), "frozen", 1.0)])
    done = subprocess.run(
        [sys.executable, script, other, "--picture", str(tmp_path / "none.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "no run has a headline shape" in done.stderr
    assert not (tmp_path / "none.png").exists()


def test_a_picture_shows_the_tables_figures(runs, tmp_path, monkeypatch):
    merged = bench_merge.Merged(bench_merge.read(runs))
    groups = bench_merge_picture.GROUPS
    assert merged.taxes(groups, ONE, "fusedlora_cuda") == pytest.approx([1.25, 1.05, 1.1])
    assert merged.taxes(groups, TWO, "fusedlora") == [1.2], "the group of the table's cell"
    assert merged.taxes(groups, TWO, "eager") == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not bench_merge_picture.draw(tmp_path / "tax.png", merged)
