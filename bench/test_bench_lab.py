"""The laboratory against a stand-in for graph replay: what it checks, what it times, what it keeps."""

import contextlib
import gc
import re
import weakref
from types import SimpleNamespace

import bench_layers as layers
import bench_measure
import bench_runner
import pytest
import torch
from bench_cases import Case
from bench_check import WrongResult, compare, make_layers, memory_of
from bench_contenders import BackendMismatch, Contender, assert_backend, contenders
from bench_layers import Built
from bench_measure import Lab
from bench_rows import FULL, SMOKE, Effort
from bench_runner import Runner

from fusedlora import lora_linear


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

    def __init__(self, calls, *, stream, prepare=None, warmup=2, block_seconds=0.0):
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
    for module in (bench_measure, bench_runner):
        monkeypatch.setattr(module, "GraphTimer", ReplayedByCalling)
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


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_lab_measures_what_else_a_layer_does(graph_lab, dtype):
    case = Case(64, 128, 96, 4, dtype)
    chosen = [c for c in contenders(case, compile=False, autotune=False) if "features" in c.groups]
    found = graph_lab.measure(case, {"features": chosen})
    assert {r.failed for r in found.values()} == {None}
    assert {c.feature for c in chosen} == {"", "bias", "dropout", "dora"}
    for suffix in ("_bias", "_dropout", "_dora") + (("_amp_dropout", "_fp32_dropout") if dtype == "bf16" else ()):
        assert found[("features", f"fusedlora{suffix}")].versus_rival.median == pytest.approx(1.0)
    assert set(found[("features", "fusedlora_dora")].errors) == {"y", "dX", "dA", "dB", "dm"}
    assert set(found[("features", "eager_dora")].errors) == {"y", "dX", "dA", "dB", "dm"}


def test_lab_measures_decode_without_gradients(graph_lab):
    case = Case(2, 32, 48, 4)
    chosen = [c for c in contenders(case, compile=False, autotune=False) if "decode" in c.groups]
    found = graph_lab.measure(case, {"decode": chosen})
    assert {name for _, name in found} == {"frozen", "fusedlora", "eager"}
    assert {r.failed for r in found.values()} == {None}
    assert set(found[("decode", "fusedlora")].errors) == {"y"}
    runner = Runner(chosen[1], case, make_layers(case, torch.device("cpu"), 1), torch.device("cpu"))
    assert not runner.calls("decode")[0][0]().requires_grad


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (layers.eager("same"), "the call dropped nothing"),
        (lambda layer, case: dropping(layer, case, 0.5), r"dropout took 0\.[45]\d+ of x, not 0.1"),
        (lambda layer, case: dropping(layer, case, layers.DROPOUT, stale=True), "y is off by"),
    ],
    ids=["none", "rate", "another mask"],
)
def test_lab_checks_dropout_by_its_mask(build, message):
    """A row that drops nothing, too much, or by a mask other than the one it shows, is not timed."""
    case = Case(64, 128, 96, 4, "fp32")
    row = Contender("wrong", "wrong", build, "same", feature="dropout", groups=("features",))
    found = Lab(torch.device("cpu"), SMOKE, "reference").measure(case, {"features": [row]})
    assert re.search(message, found[("features", "wrong")].failed)


def dropping(layer, case, p, stale=False):
    """Eager arithmetic under a mask of rate p; stale: it shows the mask that the next call would take."""
    a, b = (t.clone().requires_grad_() for t in layer.adapters["same"])
    kept = layers.Kept()

    def call(x):
        mask = torch.rand(x.shape) >= p
        shown = torch.rand(x.shape) >= p if stale else mask
        kept.read = lambda: shown
        return layers.eager_lora(x, layer.weight, a, b, layers.SCALING, lambda x: x * mask / (1 - p))

    return Built(call, (a, b), kept)


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


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("feature", ["", "bias", "dropout", "dora"])
def test_the_eager_arithmetic_is_that_of_peft(feature, adapter, autocast):
    """Bit by bit, so that a row of the arithmetic may stand for the library."""
    peft = pytest.importorskip("peft")
    case = Case(16, 64, 48, 4)
    (layer,) = make_layers(case, torch.device("cpu"), 1)
    build = getattr(layers, f"eager_with_{feature}") if feature else layers.eager
    built = build(adapter)(layer, case)
    config = peft.LoraConfig(
        r=case.r,
        lora_alpha=int(layers.SCALING * case.r),
        target_modules=["0"],
        lora_dropout=layers.DROPOUT if feature == "dropout" else 0.0,
        use_dora=feature == "dora",
    )
    base = torch.nn.Sequential(layers.linear(layer, case, feature == "bias"))
    module = peft.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
    a, b, *magnitude = (torch.nn.Parameter(p.detach().clone()) for p in built.parameters)
    module.lora_A["default"].weight, module.lora_B["default"].weight = a, b
    for m in magnitude:
        module.lora_magnitude_vector["default"].weight = m
    found = []
    for call, parameters in ((built.call, built.parameters), (module, (a, b, *magnitude))):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(layer.x)
        found.append((y, *torch.autograd.grad(y, (layer.x, *parameters), layer.dy)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_sets_that_fit_the_memory(monkeypatch):
    """Fewer sets where the memory is small, an error where not one fits, the cache emptied where it is in the way."""
    case, emptied = Case(8192, 4096, 4096, 16), []
    one, rest = memory_of(case, 3)
    lab = Lab(torch.device("cpu"), FULL, "triton")
    lab.device = torch.device("cuda")
    monkeypatch.setattr(bench_measure, "set_count", lambda size, device: 4)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * one)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: one)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for unused, count in ((rest + 8 * one, 4), (rest + one, 4), (rest - 2 * one, 2)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, unused=unused: (unused, 0))
        assert lab._sets(case, 3) == count
    assert len(emptied) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    with pytest.raises(bench_measure.DoesNotFit, match=r"M=8192 .* needs about \d GiB, 0 GiB are free"):
        lab._sets(case, 3)


def test_a_call_that_fails_leaves_no_hooks():
    case = Case(8, 64, 32, 4, "fp32")
    (layer,) = make_layers(case, torch.device("cpu"), 1)
    built = layers.fusedlora("same", lora_dropout=0.1)(layer, case)
    built.kept.wanted = True
    with pytest.raises(ValueError, match="in_features"):
        built.call(layer.x[:, :-1])
    # refused while hooks are there
    with torch.autograd.graph.disable_saved_tensors_hooks("none are left"):
        pass
    built.call(layer.x)
    assert built.kept.read().shape == (8, 64)
