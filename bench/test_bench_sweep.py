"""The sweep's shapes, its file, its summary and its page."""

import pytest
import torch
from bench_cases import Case
from bench_check import make_layers, memory_of
from bench_measure import DoesNotFit, Lab
from bench_rows import SMOKE
from bench_sweep import DECISIVE, OutOfTime, Store, Sweep, code_id, file_name
from bench_sweep_cases import DTYPES, LAYERS, LINE, RANKS, ROWS, compiled, small_sweep_cases, sweep_cases
from bench_sweep_report import floor, summary, write_pictures

FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0"}


def test_shapes_cover_the_models():
    cases = sweep_cases()
    assert len(cases) == len({case.id for case in cases}) == 200
    assert {case.M for case in cases} == set(ROWS)
    assert {case.r for case in cases} == set(RANKS)
    assert {case.dtype for case in cases} == set(DTYPES)
    assert {(case.K, case.N) for case in cases} == {layer for layers in LAYERS.values() for layer in layers}
    assert cases == sweep_cases()
    assert all((case.K, case.N) == LINE for case in cases[:20])
    assert len(compiled(cases)) == 20 and len(set(compiled(cases)) & set(cases[:20])) == 10


def sweep_in(folder, seconds=None):
    lab = Lab(torch.device("cpu"), SMOKE, "reference")
    return Sweep(lab, Store(folder / "sweep.json", FACTS), seconds)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    first, second, *_ = small_sweep_cases()
    with pytest.raises(OutOfTime, match="0 s have passed"):
        sweep_in(tmp_path, 0.0).measure(first, compile=False)
    record, times = sweep_in(tmp_path).measure(first, compile=False)
    assert times and record["auto"] == "reference" and "cpu" in record["why_not"]
    assert set(record["rows"]) == {"frozen", "fusedlora", "fusedlora_triton", "eager"}
    assert record["rows"]["eager"]["ours_over_this"]["median"] > 0
    assert record["rows"]["fusedlora"]["errors"].keys() == {"y", "dX", "dA", "dB"}
    assert record["rows"]["fusedlora_triton"]["failed"].startswith("RuntimeError: backend 'triton' does not take")
    again = sweep_in(tmp_path)
    assert again.measure(first, compile=False) is None
    assert again.measure(second, compile=False) is not None
    assert set(sweep_in(tmp_path).store.current()) == {first.id, second.id}
    monkeypatch.setattr("bench_sweep.code_id", lambda: "another")
    other = sweep_in(tmp_path)
    assert other.store.current() == {} and len(other.store.records) == 2
    other.measure(first, compile=False)
    assert [r["versions"]["code"] for r in other.store.records] == [code_id(), "another"], "one record a shape"
    assert len((tmp_path / "sweep.json").read_text().splitlines()) < 30, "a line a shape"
    assert not list(tmp_path.glob("*.part"))


def test_a_failure_is_not_stored(tmp_path):
    sweep = sweep_in(tmp_path)
    sweep.lab.effort = None  # whatever breaks a row
    with pytest.raises(AssertionError, match="frozen: AttributeError"):
        sweep.measure(small_sweep_cases()[0], compile=False)
    assert not (tmp_path / "sweep.json").exists()


def test_a_shape_too_large_is_noted(tmp_path, monkeypatch):
    def measure(case, rows):
        raise DoesNotFit("needs 200 GiB")

    sweep = sweep_in(tmp_path)
    monkeypatch.setattr(sweep.lab, "measure", measure)
    case = small_sweep_cases()[0]
    record, times = sweep.measure(case, compile=False)
    assert times == [] and sweep_in(tmp_path).measure(case, compile=False) is None
    text = summary([record], 1)
    assert "0 of 1 shapes measured with this code, 1 do not fit" in text[0] and "needs 200 GiB" in text[1]


def test_all_shapes_fit_an_h100():
    for case in sweep_cases():
        one, rest = memory_of(case, 4)
        assert one + rest < 78 << 30, case


def test_gradients_stay_within_fp16():
    """Of dA, the largest gradient: 2 · √(M · N / r) · dy; six standard deviations of it."""
    (layer,) = make_layers(Case(64, 16, 4096, 1, "fp16"), torch.device("cpu"), 1)
    assert layer.dy.float().std().item() == pytest.approx(1 / 64, rel=0.02)
    for case in sweep_cases():
        if case.dtype == "fp16":
            assert 6 * 2 * (case.M * case.N / case.r) ** 0.5 * case.N**-0.5 < torch.finfo(torch.float16).max, case


def test_comments_do_not_change_the_code_id(tmp_path, monkeypatch):
    import fusedlora
    import fusedlora.kernels

    def made(kernel):
        for folder, names in ((tmp_path / "kernels", ("forward",)), (tmp_path, DECISIVE)):
            folder.mkdir(exist_ok=True)
            for name in (*names, "__init__"):
                (folder / f"{name}.py").write_text(kernel if name == "forward" else '"""Nothing."""\n')
        return code_id()

    monkeypatch.setattr(fusedlora, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(fusedlora.kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
    plain = made('"""Docstring."""\nBLOCK = 64\n')
    assert made('"""Another."""\nBLOCK = 64  # columns\n') == plain
    assert made('"""Docstring."""\nBLOCK = 128\n') != plain


def test_file_is_named_after_the_gpu():
    assert file_name(FACTS) == "sweep-h100-80gb-hbm3"
    assert file_name({"cpu": "Some CPU"}) == "sweep-cpu"


def test_floor():
    """Where arithmetic decides it is the FLOP's share; where memory does, the bytes'; never below one."""
    case = Case(8192, 4096, 4096, 64)
    assert floor(case, 1e12, 1e15) == pytest.approx(1.047, abs=5e-4)
    assert floor(case, 1e30, 3e12) > 1.1
    assert 1 < floor(Case(1, 4096, 4096, 16), 7e14, 3e12) < 1.02


def made_up(case, ours, eager, auto="triton", compiled=None):
    def spread(value):
        return {"median": value, "p10": value, "p90": value}

    def row(seconds):
        out = {"seconds": spread(seconds), "tax": spread(seconds), "tflops": 500.0}
        return out | {"ours_over_this": spread(ours / seconds)}

    rows = {"frozen": row(1.0), "fusedlora": row(ours), "eager": row(eager)}
    if auto != "triton":
        rows["fusedlora_triton"] = row(eager * 1.25) | {"versus_rival": spread(1.25)}
    if compiled is not None:
        rows["compile"] = row(compiled)
    facts = {"id": case.id, "case": {"M": case.M, "K": case.K, "N": case.N, "r": case.r, "dtype": case.dtype}}
    return facts | {"auto": auto, "why_not": None if auto == "triton" else "r is 300", "rows": rows}


@pytest.fixture
def records():
    cases = sweep_cases()
    found = [made_up(case, 1.1, 1.5, compiled=1.4) for case in cases[:20]]
    found.append(made_up(cases[20], 1.53, 1.5))
    found.append(made_up(cases[21], 1.52, 1.5, auto="reference"))
    found.append(made_up(cases[22], 1.3, 1.5, auto="cuda forward + reference backward"))
    return found


def test_summary(records):
    text = summary(records, 200)
    joined = "\n".join(text)
    assert text[0] == "sweep: 23 of 200 shapes measured with this code, 0 do not fit the memory"
    assert "21 of 23 (91.3%), up to 2 % slower: 2" in text[1]
    worst = text[text.index("largest ratios: ours / eager, tax") + 1]
    assert worst.split()[-3:] == ["1.020", "1.530", "triton"]
    assert "auto took the reference at 1 of 23 shapes, for one direction at 1 more:" in joined
    assert "ours / eager 1.013, kernels by name / eager 1.250 (reference; r is 300)" in joined
    assert "not slower than torch.compile of the eager arithmetic: 20 of 20" in joined


def test_pictures_without_a_line(records, tmp_path):
    """As of a sweep on a CPU, or of one that has just begun."""
    pytest.importorskip("matplotlib")
    store = Store(None, {"cpu": "Some CPU"} | FACTS)
    store.copy_gbps = 10.0
    store.add(records[-1])
    assert write_pictures(tmp_path / "page.png", store)


def test_pictures(records, tmp_path):
    pytest.importorskip("matplotlib")
    store = Store(None, FACTS)
    assert not write_pictures(tmp_path / "page.png", store)
    store.copy_gbps = 3000.0
    for record in records:
        store.add(record)
    assert write_pictures(tmp_path / "page.png", store)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
