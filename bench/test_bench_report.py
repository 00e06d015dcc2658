"""The tables, the JSON and the picture from made-up rows; the laboratory against a stand-in for graph replay."""

import contextlib
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import bench_measure
import bench_report
import pytest
import torch
from bench_cases import HEADLINE, Case, gpu_cases, work
from bench_check import WrongResult, compare
from bench_contenders import BackendMismatch, Built, Contender, assert_backend, contenders
from bench_measure import SMOKE, Effort, Lab, Row

from fusedlora import lora_linear
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


def test_headline_is_six_shapes_of_the_whole_grid():
    cases = gpu_cases()
    assert len(cases) == len({case.id for case in cases}) == 48
    assert [(c.M, c.K, c.N, c.r) for c in cases if c.headline] == list(HEADLINE)
    assert [c.id for c in cases if "headline" in c.id][0] == "headline-M8192-4096to4096-r16-bf16"


def test_flop_floor():
    """Six of 2·M·N·K are the base's products forward and backward; the adapter adds what the tax can't go below."""
    case = Case(8192, 4096, 4096, 64)
    assert work(case, "training", 2).flops / work(case, "training", None).flops == pytest.approx(1.047, abs=5e-4)


def test_a_wrong_output_is_not_timed():
    good = torch.ones(4, dtype=torch.float64)
    assert compare((good.float(),), (good,), 1e-6) == {"y": 0.0}
    with pytest.raises(WrongResult, match="y is off by"):
        compare((good * 1.1,), (good,), 1e-2)
    with pytest.raises(WrongResult, match="dX is off by nan"):
        compare((good, good * float("nan")), (good, good), 1e-2)


def test_a_fallback_does_not_pass_for_the_backend():
    x, w, a, b = torch.ones(2, 4), torch.ones(8, 4), torch.ones(1, 4), torch.ones(8, 1)
    y = assert_backend("reference", lambda: lora_linear(x, w, a, b, scaling=1.0))
    assert y.shape == (2, 8)
    with pytest.raises(BackendMismatch, match="'triton', the call took 'reference'"):
        assert_backend("triton", lambda: lora_linear(x, w, a, b, scaling=1.0))
    with pytest.raises(BackendMismatch, match="the call took None"):
        assert_backend("reference", lambda: x @ w.t())


class ReplayedByCalling:
    """GraphTimer's face on a CPU: outputs are memory of its own, rewritten when replayed."""

    stale = False

    def __init__(self, calls, *, stream, prepare=None, block_seconds=0.0):
        self.calls, self.prepare, self.count, self.stream = calls, prepare, len(calls), stream
        self.replays = 0
        self.outputs = self.last()

    def last(self):
        return self.calls[-1](*(() if self.prepare is None else (self.prepare[-1](),)))

    def replay(self):
        self.replays += 1
        if self.stale or self.replays > 3:  # the many replays that keep a GPU busy need no work here
            return
        fresh, outputs = self.last(), self.outputs
        fresh, outputs = (t if isinstance(t, tuple) else (t,) for t in (fresh, outputs))
        with torch.no_grad():
            for out, new in zip(outputs, fresh):
                out.copy_(new)

    def __call__(self):
        self.replay()
        return 2e-3

    def close(self):
        pass


@pytest.fixture
def graph_lab(monkeypatch):
    """A Lab that believes it has a GPU stream."""
    monkeypatch.setattr(bench_measure, "GraphTimer", ReplayedByCalling)
    monkeypatch.setattr(bench_measure, "_on", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(bench_measure, "gpu_state", lambda device: {"power_w": "700"})
    lab = Lab(torch.device("cpu"), Effort(1, 0.0, 0.0), "reference")
    lab.stream = SimpleNamespace(synchronize=lambda: None)
    return lab


def test_lab_measures_every_group_by_replay(graph_lab):
    case = Case(16, 32, 48, 4)
    chosen = [c for c in contenders(case, compile=False, autotune=False) if "peft" not in c.name]
    found = graph_lab.measure(case, dict.fromkeys(("forward", "backward", "training", "module"), chosen))
    assert {r.failed for r in found.values()} == {None}
    assert found[("training", "fusedlora")].tax.median == pytest.approx(1.0)
    assert found[("training", "fusedlora")].versus_rival.median == pytest.approx(1.0)
    assert found[("backward", "fusedlora")].backend == "reference"
    assert set(found[("training", "fusedlora_amp")].errors) == {"y", "dX", "dA", "dB"}
    assert found[("module", "frozen")].seconds.median != 2e-3, "the module group is wall time, not replay"
    assert graph_lab.state == {"power_w": "700"}


def test_lab_keeps_a_failure_to_its_row(graph_lab):
    case = Case(16, 32, 48, 4, "fp32")

    def broken(layer, case):
        raise RuntimeError("no such kernel\nsecond line")

    def wrong(layer, case):
        return Built(lambda x: x @ layer.weight.t() * 1.01, ())

    known = {c.name: c for c in contenders(case, compile=False, autotune=False)}
    rows = [known["frozen"], Contender("broken", "broken", broken, "same"), Contender("wrong", "wrong", wrong, None)]
    found = graph_lab.measure(case, {"training": [*rows, known["fusedlora"]]})
    assert found[("training", "broken")].failed == "RuntimeError: no such kernel"
    assert found[("training", "wrong")].failed.startswith("WrongResult: y is off by 1.0e-02")
    assert found[("training", "wrong")].times == []
    assert found[("training", "fusedlora")].failed is None and found[("training", "frozen")].tax.median == 1.0


def test_lab_checks_what_the_graph_wrote(graph_lab, monkeypatch):
    """A graph whose replay leaves its outputs unwritten is caught by the poison."""
    case = Case(16, 32, 48, 4, "fp32")
    monkeypatch.setattr(ReplayedByCalling, "stale", True)
    frozen = contenders(case, compile=False, autotune=False)[0]
    found = graph_lab.measure(case, {"training": [frozen], "forward": [frozen], "backward": [frozen]})
    assert {r.failed for r in found.values()} == {
        "WrongResult: y is off by nan, the limit is 1e-05",
        "WrongResult: dX is off by nan, the limit is 1e-05",
    }


def test_lab_holds_no_tensor_of_a_failed_shape(graph_lab):
    """A stored exception would keep the frames, and with them the layers, of every failed row."""
    case = Case(16, 32, 48, 4, "fp32")
    held = []

    def broken(layer, case):
        held.append(weakref.ref(layer.x))
        raise RuntimeError("no such kernel")

    frozen = contenders(case, compile=False, autotune=False)[0]
    found = graph_lab.measure(case, {"training": [frozen, Contender("broken", "broken", broken, "same")]})
    gc.collect()
    assert found[("training", "broken")].trace.endswith("RuntimeError: no such kernel\n")
    assert held and held[0]() is None


def test_lab_fails_our_row_when_another_backend_ran():
    case = Case(16, 32, 48, 4, "fp32")
    ours = contenders(case, compile=False, autotune=False)[1]
    found = Lab(torch.device("cpu"), SMOKE, "triton").measure(case, {"training": [ours]})
    assert found[("training", "fusedlora")].failed.startswith("BackendMismatch: the row is for backend 'triton'")


@pytest.mark.parametrize("order", [("BENCH", "--benchmark"), ("--benchmark", "BENCH")], ids=["after", "before"])
def test_option_is_not_taken_for_an_abbreviation(order, tmp_path):
    """--benchmark turns measuring on beside the many --benchmark-... options of pytest-benchmark."""
    here = Path(__file__).parent
    words = [str(here / "test_speed.py") if word == "BENCH" else word for word in order]
    words += ["-k", "training and fp32 and 384to384 and frozen", "--benchmark-json", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "pytest", *words, "--bench-out", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=here.parent, capture_output=True, text=True, timeout=300, env=_without_gpu(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training: frozen 1.000" in done.stdout, "progress is printed past the capture"
    assert "M=512 384→384 r=8 fp32" in done.stdout and "no CUDA device" in done.stdout
    (record,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert record["extra_info"]["tax"]["median"] == 1.0
    assert record["stats"]["median"] == pytest.approx(record["extra_info"]["seconds"]["median"], rel=1e-6)
    assert record["stats"]["rounds"] == record["extra_info"]["rounds"] > 1
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["contender"] == "frozen"


def _without_gpu() -> dict[str, str]:
    import os

    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
