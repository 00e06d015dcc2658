"""Which modules apply_lora takes, skips and refuses; what a refusal leaves; what moves along with a swap."""

import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusedlora import FusedLoRALinear, apply_lora, merge_and_unload, merge_lora, report
from fusedlora.weight_reads import weight_reads

pytest.importorskip("transformers")
# Tests run in importlib mode, where a neighbour is no module to import by name.
_spec = importlib.util.spec_from_file_location("fusedlora_model_zoo", Path(__file__).with_name("model_zoo.py"))
assert _spec is not None and _spec.loader is not None
zoo = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(zoo)


def swapped(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


@pytest.mark.parametrize(
    "target, more, expected",
    [
        (["q_proj"], {}, {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["0.mlp.up_proj", "lm_head"], {}, {"model.layers.0.mlp.up_proj", "lm_head"}),
        (iter(["model.layers.1.mlp.up_proj"]), {}, {"model.layers.1.mlp.up_proj"}),
        (r".*\.0\..*[qk]_proj", {}, {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}),
        (["q_proj"], {"exclude_modules": ["0.self_attn.q_proj"]}, {"model.layers.1.self_attn.q_proj"}),
        (["q_proj"], {"exclude_modules": r".*\.1\..*"}, {"model.layers.0.self_attn.q_proj"}),
        (["q_proj", "lm_head"], {"modules_to_save": ["layers.0", "lm_head"]}, {"model.layers.1.self_attn.q_proj"}),
    ],
    ids=["ending", "longer ending", "full name", "regex", "exclude list", "exclude regex", "modules_to_save"],
)
def test_names(target: object, more: dict[str, object], expected: set[str]) -> None:
    assert swapped(apply_lora(zoo.llama(), target, **more)) == expected


@pytest.mark.parametrize("spelling", ["all-linear", "All-Linear"])
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_all_linear_takes_what_peft_takes(kind: str, spelling: str) -> None:
    peft = pytest.importorskip("peft")
    task = {"task_type": "SEQ_CLS", "modules_to_save": []} if kind == "vit" else {}
    config = peft.LoraConfig(target_modules="all-linear", **task)
    theirs = peft.inject_adapter_in_model(config, zoo.BUILD[kind]())
    names = {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    model = apply_lora(zoo.BUILD[kind](), spelling)
    assert swapped(model) == names
    (skipped,) = report(model).skipped
    assert skipped == {"llama": "lm_head", "vit": "classifier"}[kind]


def test_patterns_give_each_layer_its_rank_and_alpha() -> None:
    model = apply_lora(
        zoo.llama().bfloat16(),
        ["q_proj", "up_proj"],
        r=8,
        lora_alpha=16,
        rank_pattern={r"layers\.0\..*": 2, "up_proj": 3},
        alpha_pattern={"up_proj": 6},
        lora_dropout=0.25,
        adapter_dtype=torch.bfloat16,
    )
    found = {n: (m.r, m.lora_alpha) for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    assert found == {
        "model.layers.0.self_attn.q_proj": (2, 16),
        "model.layers.0.mlp.up_proj": (2, 6),
        "model.layers.1.self_attn.q_proj": (8, 16),
        "model.layers.1.mlp.up_proj": (3, 6),
    }
    layer = model.model.layers[0].mlp.up_proj
    assert layer.lora_A.shape == (2, 32) and layer.scaling == 3.0
    assert layer.lora_dropout == 0.25 and layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="rank_pattern has .'gate'.*no swapped module"):
        apply_lora(zoo.llama(), ["q_proj"], rank_pattern={"gate": 4})
    with pytest.warns(UserWarning, match="target_modules has .'c_attn'.*no module"):
        apply_lora(zoo.llama(), ["q_proj", "c_attn"])
    for nothing in (["nope", "k_proj"], "nope"):
        with pytest.warns(UserWarning, match=r"exclude_modules has \['nope'\], which match no module"):
            apply_lora(zoo.llama(), ["q_proj"], exclude_modules=nothing)


class Reader(nn.Module):
    """Computes with the weight of `read` and of `deep.inner`, calls `called`, and only looks at its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        self.deep = nn.ModuleDict({"inner": nn.Linear(8, 8)})
        nn.init.zeros_(self.called.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.called.weight, torch.Tensor) and x.dtype != self.called.weight.dtype:
            x = x.to(self.called.weight.dtype)
        return self.called(self.mix(x)) + x @ self.deep.inner.weight

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.read.weight)


class Child(Reader):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x)


def test_owners_that_read_a_weight() -> None:
    assert weight_reads(Reader) == {("read",), ("deep", "inner")}
    assert weight_reads(Child) == {("deep", "inner")}
    model = nn.Sequential(Reader(), Child())
    apply_lora(model, "all-linear")
    assert swapped(model) == {"0.called", "1.called", "1.read"}
    skipped = report(model).skipped
    assert skipped.keys() == {"0.read", "0.deep.inner", "1.deep.inner"}
    assert "its owner, Reader 0, reads its weight" in skipped["0.read"]


def test_encoder_layer_is_refused_where_its_fast_path_can_be_taken() -> None:
    with pytest.raises(TypeError, match=r"(?s)TransformerEncoderLayer layers\.0, .*set_fastpath_enabled\(False\)"):
        apply_lora(zoo.encoder(batch_first=True), ["linear1"])
    with pytest.raises(ValueError, match="(?s)matches nothing.*NonDynamicallyQuantizableLinear"):
        apply_lora(zoo.encoder(batch_first=True), "all-linear")
    model = nn.Sequential(zoo.encoder(batch_first=True), nn.Linear(32, 32))
    apply_lora(model, "all-linear")
    assert swapped(model) == {"1"}
    assert len(report(model).skipped) == 6


def test_encoder_layer_let_in_with_the_fast_path_off_never_takes_it() -> None:
    stock = zoo.encoder(batch_first=True).eval()
    x = torch.randn(3, 6, 32)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, 4:] = True
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model = zoo.adapted(copy.deepcopy(stock))
        eager = zoo.eager_twin(stock, model)
        with torch.inference_mode():
            expected = eager(x, src_key_padding_mask=mask)
            assert (model(x, src_key_padding_mask=mask) - expected).norm() < 1e-5 * expected.norm()
            torch.backends.mha.set_fastpath_enabled(True)
            for twin in (model, copy.deepcopy(model)):
                with pytest.raises(RuntimeError, match="would ignore the adapters"):
                    twin(x)
                merge_lora(twin)
                plain = twin(x, src_key_padding_mask=mask)
                assert (plain - expected)[:, :4].norm() < 1e-5 * expected.norm()
        merge_and_unload(model)
        assert not any(m._forward_pre_hooks for m in model.modules())
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class MyLinear(nn.Linear):
    pass


def with_fc1(change: Callable[[nn.Module], object]) -> nn.Module:
    model = zoo.MLP()
    change(model)
    return model


def replaced_forward(model: nn.Module) -> None:
    model.fc1.forward = lambda x: x


def float8(model: nn.Module) -> None:
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def two_names(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(torch.zeros(5, 20))
    model.tied = nn.Linear(20, 5)
    model.tied.weight = model.head.weight


REFUSED = {
    "subclass": (lambda: with_fc1(lambda m: setattr(m, "fc1", MyLinear(20, 33))), ["fc1"], {}, TypeError, "MyLinear"),
    "Conv1D": (lambda: zoo.gpt2(plain=False), ["c_attn"], {}, TypeError, r"Conv1D.*weight\.t\(\)"),
    "out_proj": (lambda: zoo.encoder(), ["out_proj"], {}, TypeError, "NonDynamically.*MultiheadAttention reads"),
    "container": (lambda: zoo.llama(), ["mlp"], {}, TypeError, "LlamaMLP.*modules below"),
    "embedding": (lambda: zoo.llama(), ["embed_tokens"], {}, TypeError, "Embedding.*leave it out"),
    "one of two": (lambda: zoo.llama(), ["q_proj", "norm"], {}, TypeError, "LlamaRMSNorm"),
    "parametrised": (
        lambda: with_fc1(lambda m: nn.utils.parametrizations.weight_norm(m.fc1)),
        ["fc1"],
        {},
        TypeError,
        "ParametrizedLinear",
    ),
    "weight by hook": (
        lambda: with_fc1(lambda m: nn.utils.spectral_norm(m.fc1)),
        ["fc1"],
        {},
        TypeError,
        "weight_orig",
    ),
    "float8": (lambda: with_fc1(float8), ["fc1"], {}, TypeError, "float8_e4m3fn"),
    "own forward": (lambda: with_fc1(replaced_forward), ["fc1"], {}, TypeError, "forward was replaced"),
    "root": (lambda: nn.Linear(4, 4), ".*", {}, TypeError, "from_linear"),
    "no match": (lambda: zoo.llama(), ["c_attn"], {}, ValueError, "matches nothing.*'q_proj'"),
    "string is a regex": (lambda: zoo.llama(), "q_proj", {}, ValueError, "regular expression for the whole name"),
    "bad regex": (lambda: zoo.llama(), "(", {}, ValueError, "target_modules has '\\('"),
    "bad pattern": (lambda: zoo.llama(), ["q_proj"], {"rank_pattern": {"(": 2}}, ValueError, "rank_pattern has '\\('"),
    "empty": (lambda: zoo.llama(), [], {}, ValueError, "matches nothing"),
    "only Conv1D": (lambda: zoo.gpt2(plain=False), "all-linear", {}, ValueError, "(?s)matches nothing.*Conv1D"),
    "all excluded": (lambda: zoo.MLP(), ["fc1"], {"exclude_modules": ["fc1"]}, ValueError, "(?s)nothing.*excluded"),
    "not names": (lambda: zoo.MLP(), [1], {}, TypeError, "target_modules is .1."),
    "target none": (lambda: zoo.MLP(), None, {}, TypeError, "target_modules is None, must be a regex or a list"),
    "target int": (lambda: zoo.MLP(), 3, {}, TypeError, "target_modules is 3, must be a regex or a list"),
    "exclude int": (lambda: zoo.MLP(), ["fc1"], {"exclude_modules": 3}, TypeError, "exclude_modules is 3, must be"),
    "save int": (lambda: zoo.MLP(), ["fc1"], {"modules_to_save": 3}, TypeError, "modules_to_save is 3, must be a list"),
    "ranks a list": (lambda: zoo.MLP(), ["fc1"], {"rank_pattern": [4]}, TypeError, r"rank_pattern is \[4\], must be"),
    "ranks a name": (lambda: zoo.MLP(), ["fc1"], {"rank_pattern": "fc1"}, TypeError, "rank_pattern is 'fc1', must be"),
    "pattern int": (lambda: zoo.MLP(), ["fc1"], {"rank_pattern": {3: 4}}, TypeError, "rank_pattern has 3, must have"),
    "alpha by pattern": (
        lambda: zoo.MLP(),
        ["fc1"],
        {"alpha_pattern": {"fc1": float("nan")}},
        ValueError,
        r"alpha_pattern\['fc1'\] is nan, must be finite",
    ),
    "r": (lambda: zoo.llama(), "all-linear", {"r": 0}, ValueError, "r is 0"),
    "r by pattern": (lambda: zoo.llama(), "all-linear", {"rank_pattern": {"1.mlp.up_proj": 0}}, ValueError, "'] is 0"),
    "dropout": (lambda: zoo.llama(), "all-linear", {"lora_dropout": 1.0}, ValueError, "dropout"),
    "save str": (lambda: zoo.MLP(), ["fc1"], {"modules_to_save": "head"}, TypeError, "modules_to_save is 'head'"),
    "save none": (lambda: zoo.MLP(), ["fc1"], {"modules_to_save": ["hat"]}, ValueError, "modules_to_save names 'hat'"),
    "save tied": (lambda: with_fc1(two_names), ["fc1"], {"modules_to_save": ["head"]}, ValueError, "tied to tied"),
    "twice": (lambda: apply_lora(zoo.MLP(), ["fc1"]), ["fc2"], {}, ValueError, "adapter in 'fc1'.*one call"),
}


def state(model: nn.Module) -> tuple[object, ...]:
    modules = [(name, module, type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return modules, parameters, hooks, set(model.__dict__)


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_its_reason_and_leaves_the_model(case: str) -> None:
    build, target, more, error, text = REFUSED[case]
    model = build()
    before = state(model)
    with pytest.raises(error, match=text):
        apply_lora(model, target, **more)
    assert state(model) == before


@pytest.mark.parametrize("call", [lambda m: apply_lora(m, ["0"]), report, merge_lora, merge_and_unload])
def test_what_is_no_module_is_named(call: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"model is None, must be a torch\.nn\.Module"):
        call(None)


def test_a_late_failure_or_warning_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.vit()
    before = state(model)
    monkeypatch.setattr("fusedlora.model._guard_fast_paths", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_lora(model, "all-linear")
    assert state(model) == before
    model = zoo.gpt2(plain=False)
    before = state(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="tied"):
        warnings.simplefilter("error")
        apply_lora(model, ["lm_head"])
    assert state(model) == before


def test_only_adapters_and_modules_to_save_train_and_modes_stay() -> None:
    model = zoo.llama()
    model.model.layers[0].eval()
    apply_lora(model, "all-linear", modules_to_save=["norm", "lm_head"])
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{name}.{key}" for name in swapped(model) for key in ("lora_A", "lora_B")}
    assert trains == adapters | {"model.norm.weight", "lm_head.weight"}
    assert not model.model.layers[0].mlp.up_proj.training and model.model.layers[1].mlp.up_proj.training
