"""The tables, the JSON and the picture from made-up rows."""

import json
import subprocess
import sys
from pathlib import Path

import bench_report
import pytest
from bench_cases import HEADLINE, Case, gpu_cases, work
from bench_contenders import Contender, contenders
from bench_rows import Row

from fusedlora.timing import ratios, spread

ONE = Case(8192, 4096, 4096, 16, headline=True)
TWO = Case(512, 4096, 4096, 16, headline=True)
MACHINE = {"gpu": "Some GPU", "sms": "132", "torch": "2.11.0"}


def contender(name: str, case: Case = ONE) -> Contender:
    return {c.name: c for c in contenders(case, compile=True, autotune=True)}[name]


def row(group: str, case: Case, name: str, seconds: float, base: float) -> Row:
    times = [seconds, seconds * 1.1, seconds * 0.9]
    made = Row(
        group, case, contender(name, case), times=times, seconds=spread(times), errors={"y": 2.2e-3, "dX": 2.3e-3}
    )
    made.tax = ratios(times, [base, base * 1.1, base * 0.9])
    made.peak_bytes = 128 << 20
    made.backend = "triton" if made.contender.ours else None
    return made


@pytest.fixture
def rows() -> list[Row]:
    failed = Row("training", TWO, contender("autotune", TWO), failed="OutOfMemoryError: too large")
    return [
        row("training", ONE, "frozen", 1e-3, 1e-3),
        row("training", ONE, "fusedlora", 1.1e-3, 1e-3),
        row("training", ONE, "eager", 1.5e-3, 1e-3),
        row("training", ONE, "autotune", 1.4e-3, 1e-3),
        row("training", TWO, "frozen", 1e-4, 1e-4),
        row("training", TWO, "fusedlora", 1.6e-4, 1e-4),
        row("training", TWO, "eager", 1.5e-4, 1e-4),
        failed,
    ]


def test_tables_show_figures_failures_and_losses(rows):
    text = bench_report.render(rows, MACHINE, {"power_w": "650"}, "triton")
    joined = "\n".join(text)
    line = next(t for t in text if t.startswith("  fusedlora, bf16 adapters"))
    flops = work(ONE, "training", 2).flops
    assert [f"{1.1e-3 * 1e6:.1f}", f"{flops / 1.1e-3 / 1e12:.2f}"] == line.split()[3:5]
    assert "1.100 [1.100–1.100]" in line and "128.0" in line and "2.3e-03" in line and line.endswith("triton")
    assert "failed: OutOfMemoryError: too large" in joined
    assert "gpu Some GPU, sms 132, torch 2.11.0" in joined and "power_w 650" in joined
    matrix = text[text.index(next(t for t in text if t.startswith("LoRA tax"))) :]
    assert matrix[1].split() == ["fusedlora", "eager", "autotune"]
    assert matrix[2].split()[-3:] == ["1.100", "1.500", "1.400"]
    assert matrix[3].split()[-3:] == ["1.600", "1.500", "failed"]
    assert matrix[4].split() == ["geomean", f"{(1.1 * 1.6) ** 0.5:.3f}", "1.500", "1.400"]
    assert "autotune over 1 of 2" in matrix[5]
    assert matrix[6].strip() == f"slower: {TWO.title}, fusedlora takes 1.067 of eager"
    assert len([t for t in text if "slower:" in t]) == 1


def test_cpu_table_says_that_it_is_one(rows):
    rows[1].versus_rival, rows[1].rival_peak_ratio = ratios([1.02], [1.0]), 0.9
    text = "\n".join(bench_report.render(rows, {"cpu": "Some CPU"}, {}, "reference"))
    assert "no CUDA device" in text and "wall time" in text and "GPU time" not in text
    assert "time 1.020 [1.020–1.020], memory 0.900" in text


def test_json_and_picture(rows, tmp_path):
    content = bench_report.report(rows, MACHINE, {}, "triton")
    bench_report.write_json(tmp_path / "bench.json", content)
    read = json.loads((tmp_path / "bench.json").read_text())
    assert read["rows"][1]["tax"]["median"] == pytest.approx(1.1)
    assert read["rows"][-1]["failed"].startswith("OutOfMemoryError")
    assert read["geomean_tax"]["training"]["fusedlora"] == pytest.approx((1.1 * 1.6) ** 0.5)
    pytest.importorskip("matplotlib")
    assert bench_report.write_picture(tmp_path / "tax.png", rows, "made up")
    assert (tmp_path / "tax.png").read_bytes().startswith(b"\x89PNG")
    assert not bench_report.write_picture(tmp_path / "none.png", rows, "made up", group="forward")


def test_headline_is_seven_shapes_of_the_whole_grid():
    cases = gpu_cases()
    assert len(cases) == len({case.id for case in cases}) == 48
    assert [(c.M, c.K, c.N, c.r) for c in cases if c.headline] == list(HEADLINE)
    assert [c.id for c in cases if "headline" in c.id][0] == "headline-M8192-4096to4096-r16-bf16"


def test_flop_floor():
    """Six of 2·M·N·K are the base's products forward and backward; the adapter adds what the tax can't go below."""
    case = Case(8192, 4096, 4096, 64)
    assert work(case, "training", 2).flops / work(case, "training", None).flops == pytest.approx(1.047, abs=5e-4)


@pytest.mark.parametrize("order", [("BENCH", "--benchmark"), ("--benchmark", "BENCH")], ids=["after", "before"])
def test_option_is_not_taken_for_an_abbreviation(order, tmp_path):
    """--benchmark turns measuring on beside the many --benchmark-... options of pytest-benchmark."""
    here = Path(__file__).parent
    words = [str(here / "test_speed.py") if word == "BENCH" else word for word in order]
    words += ["-k", "training and fp32 and 384to384 and frozen", "--benchmark-json", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "pytest", *words, "--bench-out", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=here.parent, capture_output=True, text=True, timeout=300, env=_by_itself(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training: frozen 1.000" in done.stdout, "progress is printed past the capture"
    assert "M=512 384→384 r=8 fp32" in done.stdout and "no CUDA device" in done.stdout
    (record,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert record["extra_info"]["tax"]["median"] == 1.0
    assert record["stats"]["median"] == pytest.approx(record["extra_info"]["seconds"]["median"], rel=1e-6)
    assert record["stats"]["rounds"] == record["extra_info"]["rounds"] > 1
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["contender"] == "frozen"


def _by_itself() -> dict[str, str]:
    """No GPU, and no worker of pytest-xdist, in which pytest-benchmark switches itself off."""
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}
