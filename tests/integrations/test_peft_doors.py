"""fuse, register and enable; what why_not and report say, and the modules that a fused call must not go past."""

import copy
import dataclasses
import importlib.util
import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
_spec = importlib.util.spec_from_file_location("peft_sides", Path(__file__).with_name("peft_sides.py"))
assert _spec is not None and _spec.loader is not None
sides = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(sides)
import fusedlora  # noqa: E402
from fusedlora.integrations import peft_kinds  # noqa: E402

backend = sides.backend
Case = sides.Case
Stock, Fused = backend.StockLinear, backend.Linear


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    own = Stock.forward
    yield
    backend.disable()
    assert Stock.forward is own


@pytest.fixture
def model(device: torch.device) -> Any:
    return sides.build(Case(), device)


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(3, sides.K, device=device)


def up(model: Any) -> Any:
    return model.base_model.model.up


def fused_in(call: Callable[[], Any]) -> int:
    before = backend.calls["fused"]
    call()
    return backend.calls["fused"] - before


class TestFuse:
    def test_swaps_and_swaps_back(self, model: Any, x: torch.Tensor) -> None:
        expected = model(x)
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        parameters = [id(p) for p in model.parameters()]
        for _ in range(2):
            assert backend.fuse(model) is model
            assert type(up(model)) is Fused and isinstance(up(model), Stock)
            assert fused_in(lambda: model(x)) == 2
        for _ in range(2):
            assert backend.unfuse(model) is model
            assert type(up(model)) is Stock
            assert fused_in(lambda: model(x)) == 0
        assert torch.equal(model(x), expected)
        assert [id(p) for p in model.parameters()] == parameters
        for name, module in model.named_modules():
            assert module.__dict__.keys() == before[name].keys(), name

    def test_a_layer_by_itself(self, model: Any, x: torch.Tensor) -> None:
        assert backend.fuse(up(model)) is up(model)
        assert fused_in(lambda: model(x)) == 1

    def test_injected_without_a_peft_model(self, device: torch.device, x: torch.Tensor) -> None:
        net = sides.Net().to(device)
        net = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"], init_lora_weights=False), net)
        expected = net(x)
        backend.fuse(net)
        assert fused_in(lambda: torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)) == 1

    def test_nothing_to_fuse(self) -> None:
        with pytest.raises(ValueError, match="Net without a peft.tuners.lora.Linear"):
            backend.fuse(sides.Net())

    def test_it_is_shown(self, model: Any) -> None:
        assert "fusedlora" not in repr(model)
        assert repr(up(backend.fuse(model))).startswith("lora.Linear(\n  fusedlora")


class MyLinear(nn.Linear):
    pass


class MyLoRA(Stock):
    pass


class TestRegister:
    def config(self, **options: Any) -> Any:
        return peft.LoraConfig(target_modules=["up", "down"], init_lora_weights=False, **options)

    def test_layers_are_made_fused(self, device: torch.device, x: torch.Tensor) -> None:
        config = self.config()
        assert backend.register(config) is config
        backend.register(config)
        model = peft.get_peft_model(sides.Net().to(device), config)
        assert {type(up(model)), type(model.base_model.model.down)} == {Fused}
        assert fused_in(lambda: model(x)) == 2
        plain = backend.unfuse(copy.deepcopy(model))
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)
        assert type(up(plain)) is Stock

    def test_the_same_layer_as_peft_makes(self, device: torch.device) -> None:
        models = []
        for register in (False, True):
            torch.manual_seed(4)
            config = self.config(use_dora=True, lora_dropout=0.1, rank_pattern={"up": 3})
            model = peft.get_peft_model(sides.Net().to(device), backend.register(config) if register else config)
            models.append(backend.unfuse(model))
        assert str(models[0]) == str(models[1])
        for (name, value), other in zip(models[0].state_dict().items(), models[1].state_dict().values()):
            assert torch.equal(value, other), name

    def test_what_it_does_not_take(self, device: torch.device) -> None:
        net = sides.Net().to(device)
        net.up = nn.modules.linear.NonDynamicallyQuantizableLinear(sides.K, sides.N)
        model = peft.get_peft_model(net, backend.register(self.config()))
        assert type(up(model)) is Stock and type(model.base_model.model.down) is Fused

    @pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
    def test_other_custom_modules_keep_theirs(self, first: bool, device: torch.device) -> None:
        net = sides.Net().to(device)
        net.up = MyLinear(sides.K, sides.N)
        config = self.config()
        if first:
            config._register_custom_module({MyLinear: MyLoRA})
        backend.register(config)
        if not first:
            config._register_custom_module({MyLinear: MyLoRA})
        model = peft.get_peft_model(net, config)
        assert type(up(model)) is MyLoRA and type(model.base_model.model.down) is Fused

    def test_a_custom_module_for_linears_is_kept(self) -> None:
        config = self.config()
        config._register_custom_module({nn.Linear: MyLoRA})
        with pytest.raises(ValueError, match="custom module for nn.Linear"):
            backend.register(config)

    def test_configs_are_saved_and_copied_without_it(self, tmp_path: Path) -> None:
        config = backend.register(self.config())
        assert "fusedlora" not in str(config.to_dict())
        config.save_pretrained(tmp_path)
        assert not peft.LoraConfig.from_pretrained(tmp_path)._custom_modules
        for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            model = peft.get_peft_model(sides.Net(), again)
            assert type(up(model)) is Fused


class TestEnable:
    def test_models_made_before_and_after(self, model: Any, x: torch.Tensor, device: torch.device) -> None:
        assert fused_in(lambda: model(x)) == 0
        backend.enable()
        assert type(up(model)) is Stock
        assert fused_in(lambda: model(x)) == 2
        later = sides.build(Case(), device)
        assert fused_in(lambda: later(x)) == 2
        backend.disable()
        assert fused_in(lambda: (model(x), later(x))) == 0

    def test_idempotent(self, model: Any, x: torch.Tensor) -> None:
        backend.enable(), backend.enable()
        assert fused_in(lambda: model(x)) == 2
        backend.disable()
        assert Stock.forward is backend.stock_forward
        backend.disable()
        assert Stock.forward is backend.stock_forward

    def test_context(self, model: Any, x: torch.Tensor) -> None:
        with backend.enable():
            with backend.enable():
                assert fused_in(lambda: model(x)) == 2
            assert fused_in(lambda: model(x)) == 2
        assert fused_in(lambda: model(x)) == 0
        backend.enable()
        with pytest.raises(KeyError), backend.enable():
            raise KeyError
        assert fused_in(lambda: model(x)) == 2
        with backend.enable():
            backend.disable()
            assert fused_in(lambda: model(x)) == 0
        assert fused_in(lambda: model(x)) == 0

    def test_fused_layers_stay_fused(self, model: Any, x: torch.Tensor) -> None:
        backend.fuse(model)
        with backend.enable():
            assert fused_in(lambda: model(x)) == 2
        assert fused_in(lambda: model(x)) == 2
        up(model).merge()
        with backend.enable():
            torch.testing.assert_close(model(x), model(x))

    def test_threads(self, model: Any, x: torch.Tensor) -> None:
        """Whoever still holds it has it on, whatever the others do."""
        failed: list[Any] = []
        begin = threading.Barrier(8)

        def work() -> None:
            begin.wait()
            for _ in range(200):
                with backend.enable():
                    if Stock.forward is not backend.forward:
                        failed.append("off inside the block")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert Stock.forward is backend.stock_forward

    def test_subclasses_stay_stock(self, model: Any, x: torch.Tensor) -> None:
        up(model).__class__ = MyLoRA
        with backend.enable():
            assert fused_in(lambda: model(x)) == 1
            assert "MyLoRA" in backend.why_not(up(model), x)


def test_another_librarys_patch_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: Any, x: Any) -> Any:
        return x

    theirs.__module__ = "quicklora"
    with monkeypatch.context() as patch:
        patch.setattr(Stock, "forward", theirs)
        for door in (
            lambda: backend.fuse(model),
            lambda: backend.register(peft.LoraConfig()),
            backend.enable,
        ):
            with pytest.raises(RuntimeError, match="replaced by quicklora.*theirs"):
                door()
        assert Stock.forward is theirs
    backend.enable()
    with monkeypatch.context() as patch:
        patch.setattr(Stock, "forward", theirs)
        with pytest.raises(RuntimeError, match="replaced by quicklora.*theirs"):
            backend.disable()
        assert Stock.forward is theirs
    backend.disable()


def test_a_patch_from_before_the_import_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: Any, x: Any) -> Any:
        return x

    kind = backend.KINDS[0]
    assert kind.stock is Stock
    patched = dataclasses.replace(kind, stock_forward=theirs)
    monkeypatch.setattr(peft_kinds, "KINDS", [patched, *backend.KINDS[1:]])
    with pytest.raises(RuntimeError, match="replaced by .*theirs"):
        backend.fuse(model)


class Sub(torch.Tensor):
    pass


def plain_tensor(layer: Any) -> None:
    weight = layer.base_layer.weight
    del layer.base_layer._parameters["weight"]
    layer.base_layer.weight = weight.detach()


def replace_B(layer: Any, B: nn.Module) -> None:
    layer.lora_B["default"] = B


def partitioned(layer: Any) -> None:
    layer.base_layer.weight = nn.Parameter(torch.empty(0))


def own_forward(module: nn.Module) -> None:
    module.forward = module.forward


def hook(module: nn.Module, kind: str) -> None:
    getattr(module, f"register_{kind}")(lambda *given: None)


def tensor_parameter(layer: Any) -> None:
    layer.base_layer.weight = nn.Parameter(torch.randn(sides.N, sides.K).as_subclass(Sub))


# name: (what is done to the layer, words of the reason)
REASONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "disabled": (lambda l: l.enable_adapters(False), "disabled"),
    "merged": (lambda l: l.merge(), "merged"),
    "several": (lambda l: l.set_adapter(["default", "other"]), "2 active adapters"),
    "twice the same": (lambda l: l.set_adapter(["default", "default"]), "2 active adapters"),
    "none": (lambda l: l.set_adapter([]), "no active adapter"),
    "base class": (lambda l: setattr(l, "base_layer", MyLinear(sides.K, sides.N)), "base_layer is a .*MyLinear"),
    "A class": (lambda l: l.lora_A.update({"default": MyLinear(sides.K, 4, bias=False)}), "lora_A is a .*MyLinear"),
    "B class": (lambda l: replace_B(l, MyLinear(4, sides.N)), "lora_B is a .*MyLinear"),
    "base hook": (lambda l: hook(l.base_layer, "forward_hook"), "base_layer has hooks"),
    "A pre-hook": (lambda l: hook(l.lora_A["default"], "forward_pre_hook"), "lora_A has hooks"),
    "B backward hook": (lambda l: hook(l.lora_B["default"], "full_backward_hook"), "lora_B has hooks"),
    "B backward pre-hook": (lambda l: hook(l.lora_B["default"], "full_backward_pre_hook"), "lora_B has hooks"),
    "dropout hook": (lambda l: hook(l.lora_dropout["default"], "forward_hook"), "lora_dropout has hooks"),
    "base forward": (lambda l: own_forward(l.base_layer), "base_layer has hooks or a forward"),
    "dropout class": (lambda l: l.lora_dropout.update({"default": nn.AlphaDropout()}), "AlphaDropout"),
    "dropout of 1": (lambda l: l.lora_dropout.update({"default": nn.Dropout(1.0)}), "p=1.0"),
    "inplace dropout": (lambda l: l.lora_dropout.update({"default": nn.Dropout(0.5, inplace=True)}), "inplace=True"),
    "weight is a tensor": (plain_tensor, "no plain Parameter"),
    "weight of a subclass": (tensor_parameter, "no plain Parameter"),
    "partitioned": (partitioned, "ZeRO-3"),
    "meta": (lambda l: l.to("meta"), "meta"),
    "shapes": (lambda l: replace_B(l, nn.Linear(5, sides.N, bias=False)), "do not fit"),
    "dtypes of A and B": (lambda l: l.lora_B["default"].double(), "lora_B another"),
    "integer scaling tensor": (lambda l: l.scaling.update(default=torch.tensor(2)), "scaling is a torch.Tensor"),
    "scaling of a vector": (lambda l: l.scaling.update(default=torch.ones(1)), "scaling is a torch.Tensor"),
    "trained scaling": (lambda l: l.scaling.update(default=torch.tensor(1.0, requires_grad=True)), "scaling"),
    "bias of another shape": (lambda l: setattr(l.base_layer, "bias", nn.Parameter(torch.ones(1))), "of shape"),
    "unknown variant": (lambda l: l.lora_variant.update(default=object()), "lora_variant"),
    "A has a bias": (lambda l: l.lora_A.update({"default": nn.Linear(sides.K, 4)}), "lora_A has one"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason(name: str, x: torch.Tensor, device: torch.device) -> None:
    """The layer tells why, with and without x; called, it does what the stock one does."""
    change, words = REASONS[name]
    stock = sides.build(Case(), device, ("default", "other"))
    fused = backend.fuse(copy.deepcopy(stock))
    assert backend.why_not(up(fused), x) is None and backend.why_not(up(fused)) is None
    for model in (stock, fused):
        torch.manual_seed(2)
        change(up(model))
        if name != "meta":
            up(model).to(device)
    for given in ((), (x,)):
        reason = backend.why_not(up(fused), *given)
        assert reason is not None and re.search(words, reason), reason
    (layer,) = (layer for layer in backend.report(fused).layers if layer.name.endswith("up"))
    assert layer.why_not == backend.why_not(up(fused)) and layer.why_not in str(backend.report(fused))

    def outcome(layer: Any) -> Any:
        torch.manual_seed(3)
        try:
            return layer(x.clone())
        except Exception as error:
            return type(error), str(error)

    ours, theirs = outcome(up(fused)), outcome(up(stock))
    if isinstance(theirs, tuple) or theirs.is_meta:
        assert type(ours) is type(theirs) and (name == "meta" or ours == theirs)
    else:
        assert torch.equal(ours, theirs)


X_REASONS: dict[str, tuple[Callable[[Any], Any], torch.dtype | None, str]] = {
    "dtype": (lambda x: x.double(), None, "autocast is off"),
    "integers": (lambda x: x.long(), None, "autocast is off"),
    "no tensor": (lambda x: x.tolist(), None, "builtins.list"),
    "subclass": (lambda x: x.as_subclass(Sub), None, "x is a .*Sub"),
    "width": (lambda x: x[:, 1:], None, "in_features"),
    "0-d": (lambda x: x[0, 0], None, "in_features"),
    "sparse": (lambda x: x.to_sparse(), None, "torch.sparse_coo"),
    "meta": (lambda x: x.to("meta"), None, "x is on meta"),
    "float64 under autocast": (lambda x: x.double(), torch.bfloat16, "under autocast"),
}


@pytest.mark.parametrize("name", X_REASONS)
def test_reason_of_x(name: str, model: Any, x: torch.Tensor) -> None:
    change, autocast, words = X_REASONS[name]
    backend.fuse(model)
    given = change(x)
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        reason = backend.why_not(up(model), given)
        assert reason is not None and re.search(words, reason), reason
        before = backend.calls["fused"]
        try:
            up(model)(given)
        except (RuntimeError, TypeError, AttributeError):
            pass
        assert backend.calls["fused"] == before
    assert backend.why_not(up(model)) is None, "without x nothing is known of it"
    assert "at its last call" in str(backend.report(model))


def test_reason_of_dtypes(device: torch.device) -> None:
    bf16 = backend.fuse(sides.build(Case(torch.float32, torch.bfloat16), device))
    x = torch.randn(2, sides.K, device=device)
    assert "lora_A has dtype torch.bfloat16, x torch.float32" in backend.why_not(up(bf16), x)
    wide = backend.fuse(sides.build(Case(torch.bfloat16, torch.float32), device))
    up(wide).cast_input_dtype_enabled = False
    assert "casting of inputs is disabled" in backend.why_not(up(wide), x.bfloat16())


def test_reason_of_extra_arguments(model: Any, x: torch.Tensor) -> None:
    assert "extra arguments" in backend.why_not(up(backend.fuse(model)), x, alora_offsets=[None])
    assert fused_in(lambda: up(model)(x, alora_offsets=None)) == 0


def test_reason_of_dora(device: torch.device, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backend.fuse(sides.build(Case(dropout=0.2, options=(("use_dora", True),)), device))
    layer = up(model)
    assert "with dropout in training" in backend.why_not(layer, x)
    layer.eval()
    assert backend.why_not(layer, x) is None
    monkeypatch.setattr("peft.tuners.lora.dora.ENABLE_DORA_CACHING", True, raising=False)
    assert "cache" in backend.why_not(layer, x)
    monkeypatch.undo()
    handle = layer.lora_magnitude_vector["default"].register_forward_hook(lambda *given: None)
    assert "lora_magnitude_vector" in backend.why_not(layer, x)
    handle.remove()
    assert backend.why_not(layer, x) is None


def test_dora_with_dropout_is_stock_to_the_bit(device: torch.device, x: torch.Tensor) -> None:
    stock = sides.build(Case(dropout=0.2, options=(("use_dora", True),)), device)
    fused = backend.fuse(copy.deepcopy(stock))
    results = []
    for model in (stock, fused):
        torch.manual_seed(8)
        results.append(model(x))
    assert torch.equal(*results)


def test_other_variants_stay_stock(device: torch.device, x: torch.Tensor) -> None:
    config = peft.LoraConfig(target_modules=["up"], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    net = peft.inject_adapter_in_model(config, sides.Net().to(device))
    backend.fuse(net)
    assert "ALoraLinearVariant" in backend.why_not(net.up, x)


def test_hooks_for_all_modules(model: Any, x: torch.Tensor) -> None:
    """They run for base_layer, lora_A and lora_B too."""
    backend.fuse(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(module))
    try:
        assert "hooks for all modules" in backend.why_not(up(model), x)
        assert fused_in(lambda: model(x)) == 0
        assert up(model).base_layer in seen
    finally:
        handle.remove()
    assert fused_in(lambda: model(x)) == 2


def test_transforms_take_the_stock_forward(model: Any, x: torch.Tensor) -> None:
    expected = model(x)
    backend.fuse(model)
    assert fused_in(lambda: torch.testing.assert_close(torch.func.vmap(model)(x), expected, rtol=1e-4, atol=1e-4)) == 0
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_tracing_and_export_give_pytorchs_operators(model: Any, x: torch.Tensor) -> None:
    expected = model(x)
    backend.fuse(model)
    assert "fusedlora::" not in str(torch.jit.trace(up(model), x).inlined_graph)
    program = torch.export.export(up(model), (x,))
    assert "fusedlora" not in str(program.graph)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_accelerate_hooks(model: Any, x: torch.Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    add = accelerate.hooks.add_hook_to_module
    stock = copy.deepcopy(model)
    add(up(backend.fuse(model)), accelerate.hooks.ModelHook())
    assert backend.why_not(up(model), x) is None
    assert fused_in(lambda: model(x)) == 2, "a hook on the layer itself, put on later, calls the fused forward"
    add(up(model).base_layer, accelerate.hooks.ModelHook())
    assert "forward of its own" in backend.why_not(up(model), x)
    assert fused_in(lambda: model(x)) == 1
    add(up(stock), accelerate.hooks.ModelHook())
    backend.fuse(stock)
    assert "fuse before" in backend.why_not(up(stock), x), "it keeps the forward that it found"
    assert fused_in(lambda: stock(x)) == 1


def test_what_the_doors_do_not_take() -> None:
    for door in (backend.fuse, backend.report):
        with pytest.raises(TypeError, match=r"model is None, must be a torch\.nn\.Module"):
            door(None)
    with pytest.raises(TypeError, match=r"config is a IA3Config, must be a peft\.LoraConfig"):
        backend.register(peft.IA3Config())


def test_each_fault_of_x_has_its_reason(model: Any, x: torch.Tensor) -> None:
    backend.fuse(model)
    assert backend.why_not(up(model), x[..., :3]).endswith(f"which does not end in in_features {x.shape[-1]}")
    assert backend.why_not(up(model), x.to_sparse()) == "x has layout torch.sparse_coo"


def test_not_a_lora_layer(model: Any) -> None:
    assert "no LoRA layer" in backend.why_not(up(model).base_layer)
    assert "neither fuse(model), register(config) nor enable()" in backend.why_not(up(model))


class TestReport:
    def test_fields_and_text(self, model: Any, x: torch.Tensor) -> None:
        report = backend.report(model)
        assert (len(report.layers), report.share()) == (2, 0.0)
        backend.fuse(model)
        assert str(backend.report(model)).count("fused, no eager call yet") == 2
        down = model.base_model.model.down
        down.lora_A["default"].register_forward_hook(lambda *given: None)
        model(x)
        report = backend.report(model)
        fused = "triton" if x.is_cuda and report.share("triton") else "reference"
        assert report.share() == report.share(fused) == pytest.approx(0.5)
        text = str(report)
        assert text.startswith("2 LoRA layers: 1 fused, 1 stock; 50.0 % of their FLOPs are fused")
        assert f"fused, {fused}" in text and "stock: lora_A has hooks" in text
        assert [layer.name.rsplit(".")[-1] for layer in report.layers] == ["up", "down"]

    def test_flops_count_the_active_adapters(self, device: torch.device) -> None:
        model = sides.build(Case(), device, ("default", "other"))
        model.base_model.set_adapter(["default", "other"])
        layer = backend.report(model).layers[0]
        assert (layer.r, layer.flops) == (8, 2 * (sides.K * sides.N + 8 * (sides.K + sides.N)))
        model.base_model.set_adapter([])
        assert backend.report(model).layers[0].r == 0

    def test_each_report_names_the_other(self, model: Any) -> None:
        assert "fusedlora.integrations.peft.report(model)" in str(fusedlora.report(model))
        ours = fusedlora.apply_lora(sides.Net(), ["up"])
        assert str(backend.report(ours)).endswith("it has layers of apply_lora: fusedlora.report(model) lists them")
        assert fusedlora.report(ours).note is backend.report(model).note is None

    def test_a_model_without_layers(self) -> None:
        report = backend.report(sides.Net())
        assert report.layers == () and report.share() == 0.0 and str(report).startswith("0 LoRA layers")
