"""Rows of backend cuda beside Triton's: where there are any, what they are called, and what the report says of them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import bench_report
import pytest
import torch
from bench_ahead import compile_ahead
from bench_cases import Case
from bench_check import make_layers
from bench_contenders import auto_takes, contenders, sweep_contenders
from bench_rows import Row
from bench_runner import Runner

import fusedlora
from fusedlora import cuda, dropout, tuning, why_not
from fusedlora.cuda_config import FASTER, Calls

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CASE = Case(512, 4096, 4096, 16)
WIDER = Case(8192, 4096, 4096, 32)  # with fp32 adapters outside autocast, too wide for backend cuda


@pytest.fixture
def hopper(monkeypatch):
    """A machine with an H100 and with the CUDA library, as far as why_not looks."""
    monkeypatch.setattr(why_not, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(why_not, "_triton_missing", lambda: None)
    monkeypatch.setattr(cuda, "num_sms", lambda device: 132)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: None)
    monkeypatch.setattr(cuda, "missing", lambda: None)


def rows_of(case: Case = CASE, **settings):
    settings = {"backend": "triton", "twins_on": GPU} | settings
    return {c.name: c for c in contenders(case, compile=False, autotune=False, **settings)}


def test_rows_of_both_kernels(hopper):
    rows = rows_of()
    twin, plain = rows["fusedlora_cuda"], rows["fusedlora"]
    assert (plain.label, twin.label) == ("fusedlora triton, bf16 adapters", "fusedlora cuda, bf16 adapters")
    assert (plain.backend, twin.backend) == ("triton", "cuda")
    assert (twin.rival, twin.groups, twin.setting) == ("eager", plain.groups, plain.setting)
    assert {"forward", "backward", "training", "module", "features", "decode"} == set(twin.groups)
    assert {"fusedlora_cuda_amp", "fusedlora_cuda_dora"} < set(rows) and rows["fusedlora_amp"].without_twin is None
    (layer,) = make_layers(Case(4, 16, 24, 2), CPU, 1)
    for row in (plain, twin):
        assert row.build(layer, Case(4, 16, 24, 2)).call.backend == row.backend
    names = list(rows)
    assert names.index("fusedlora_cuda") == names.index("fusedlora") + 1


def test_a_row_of_auto_where_it_takes_both(hopper, monkeypatch):
    for direction in FASTER:
        monkeypatch.setitem(FASTER, direction, ())
    assert not [name for name in rows_of() if "auto" in name]
    monkeypatch.setitem(FASTER, "forward", (Calls(converts=(False,)),))
    rows = rows_of()
    assert {name for name in rows if "auto" in name} == {
        "fusedlora_auto",
        "fusedlora_auto_bias",
        "fusedlora_auto_dropout",
        "fusedlora_auto_dora",
    }
    auto = rows["fusedlora_auto"]
    assert auto.label == "fusedlora auto, bf16 adapters"
    assert (auto.taker("forward", ""), auto.taker("backward", "")) == ("cuda", "triton")
    assert set(auto.groups) == {"training", "module", "features"}
    (layer,) = make_layers(Case(4, 16, 24, 2), CPU, 1)
    assert auto.build(layer, Case(4, 16, 24, 2)).call.backend == "auto"
    monkeypatch.setitem(FASTER, "backward", (Calls(converts=(False,)),))
    assert not [name for name in rows_of() if "auto" in name], "then the twin is it"


def test_rows_that_the_cuda_kernels_refuse(hopper, monkeypatch):
    assert "fusedlora_cuda_fp32" in rows_of()
    rows = rows_of(WIDER)
    assert "fusedlora_cuda_fp32" not in rows
    assert rows["fusedlora_fp32"].without_twin.startswith("lora_A is torch.float32 outside autocast")
    monkeypatch.setattr(cuda, "missing", lambda: "its kernels have not been built")
    rows = rows_of()
    assert not [name for name in rows if "cuda" in name] and rows["fusedlora"].label.startswith("fusedlora triton, ")
    assert rows["fusedlora"].without_twin == "its kernels have not been built"


def test_no_twins_without_a_gpu():
    rows = rows_of(backend="reference", twins_on=None)
    assert not [name for name in rows if "cuda" in name]
    assert rows["fusedlora"].label == "fusedlora, bf16 adapters" and rows["fusedlora"].without_twin is None


def measured(rows, *names: str, group: str = "training", case: Case = CASE) -> list[Row]:
    found = [Row(group, case, rows[name], backend=rows[name].backend) for name in names]
    for row in found:
        row.auto = auto_takes(row.contender, case, GPU, group)
    return found


def test_the_report_says_what_auto_takes(hopper, monkeypatch):
    rows, other = rows_of(), Case(64, 4096, 4096, 16)
    for direction in FASTER:
        monkeypatch.setitem(FASTER, direction, ())
    names = ("fusedlora", "fusedlora_cuda", "fusedlora_fp32")
    lines = bench_report.choice(measured(rows_of(WIDER), *names, case=WIDER))
    assert lines[0] == 'backend="auto" takes triton: everywhere'
    assert lines[1].startswith("no row of backend cuda beside fusedlora_fp32: lora_A is torch.float32 outside autocast")
    monkeypatch.setitem(FASTER, "forward", (Calls(rows=(1, 64)),))
    found = measured(rows, "fusedlora", "fusedlora_cuda") + measured(rows, "fusedlora", "fusedlora_cuda", case=other)
    assert bench_report.choice(found) == [
        f'backend="auto" takes triton: training {CASE.title} fusedlora',
        f'backend="auto" takes cuda forward + reference backward: training {other.title} fusedlora',
    ]
    taken = {group: auto_takes(rows["fusedlora"], other, GPU, group) for group in ("decode", "forward", "backward")}
    assert taken == {"decode": "cuda", "forward": "cuda", "backward": "reference"}
    assert bench_report.choice(measured(rows, "fusedlora")) == [], "one backend leaves no choice"


def test_the_sweep_expects_what_auto_takes_each_way():
    frozen, auto, triton, _ = sweep_contenders(CASE, "cuda", "triton", compile=False)
    assert [auto.taker(way, "reference") for way in ("forward", "backward")] == ["cuda", "triton"]
    assert [triton.taker(way, "reference") for way in ("forward", "backward")] == ["triton", "triton"]
    assert frozen.taker("forward", "reference") == "reference"
    assert [c.name for c in sweep_contenders(CASE, "triton", None, compile=False)] == ["frozen", "fusedlora", "eager"]


def test_kernels_are_compiled_ahead_in_threads(monkeypatch):
    """Every row runs once, those with dropout once more with a captured call's seed, each in a thread of its own."""
    case = Case(8, 16, 24, 2)
    rows = {c.name: c for c in contenders(case, compile=False, autotune=False) if c.ours}
    layers, ran = make_layers(case, CPU, 1), []
    both = threading.Barrier(len(rows) + 3, timeout=60)  # three of the rows have dropout

    class Noting(Runner):
        def step(self, *, only_decode: bool):
            both.wait()
            ran.append((self.contender.name, dropout.drawn_on_device(self.layers[0].x)))
            if self.contender.name == "fusedlora_fp32":
                raise RuntimeError("the check will tell")
            return super().step(only_decode=only_decode)

    backwards = []
    plain = fusedlora.reference.backward

    def noting(*arguments, **settings):
        backwards.append(threading.current_thread())
        return plain(*arguments, **settings)

    monkeypatch.setattr(fusedlora.reference, "backward", noting)
    known = dropout.drawn_on_device
    monkeypatch.setattr("bench_ahead.ThreadPoolExecutor", partial(ThreadPoolExecutor, len(rows) + 3))
    compile_ahead([Noting(row, case, layers, CPU) for row in rows.values()], None, False)
    dropped = {name for name in rows if "dropout" in name}
    assert sorted(ran) == sorted([(name, False) for name in rows] + [(name, True) for name in dropped])
    assert len(set(backwards)) == len(ran) - 1 and threading.main_thread() not in backwards
    assert dropout.drawn_on_device is known
