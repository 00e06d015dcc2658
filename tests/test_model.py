"""Whole models against the same models in eager LoRA arithmetic: outputs, gradients, tokens, checkpoints."""

import copy
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedlora import (
    FusedLoRALinear,
    lora_parameters,
    merge_and_unload,
    merge_lora,
    report,
    save_adapter,
    unmerge_lora,
)

pytest.importorskip("transformers")
# Tests run in importlib mode, where a neighbour is no module to import by name.
_spec = importlib.util.spec_from_file_location("fusedlora_model_zoo", Path(__file__).with_name("model_zoo.py"))
assert _spec is not None and _spec.loader is not None
zoo = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(zoo)

# transformers renames these; the old names are in every version from 5.0 on.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

KINDS = list(zoo.BUILD)
CAUSAL = ["gpt2", "llama"]
SWAPPED = {"gpt2": 8, "llama": 14, "vit": 12, "encoder": 4, "mlp": 2}


def options(kind: str) -> dict[str, object]:
    return {"vit": {"modules_to_save": ["classifier"]}, "mlp": {"modules_to_save": ["head"]}}.get(kind, {})


def pair(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """(fused, eager): one model with the same adapters in both arithmetics."""
    stock = zoo.BUILD[kind]().to(dtype)
    fused = zoo.adapted(copy.deepcopy(stock), **options(kind))
    return fused, zoo.eager_twin(stock, fused)


def same(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-11) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= rtol * b.norm()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_eager_ones(kind: str, mode: str) -> None:
    fused, eager = pair(kind)
    for model in (fused, eager):
        model.train(mode == "train")
        y = zoo.call(kind, model)
        y.sin().sum().backward()
    same(zoo.call(kind, fused), zoo.call(kind, eager))
    trained = {n: p for n, p in fused.named_parameters() if p.requires_grad}
    expected = {n: p for n, p in eager.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert len(report(fused).layers) == SWAPPED[kind]
    for name, parameter in trained.items():
        assert parameter.grad.norm() > 0, name
        same(parameter.grad, expected[name].grad)
    assert all(p.grad is None for n, p in fused.named_parameters() if n not in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_eval_and_merge_give_the_same_output(kind: str) -> None:
    fused, eager = pair(kind)
    fused.eval(), eager.eval()
    base = {n: m.weight for n, m in fused.named_modules() if isinstance(m, FusedLoRALinear)}
    bits = {n: w.detach().clone() for n, w in base.items()}
    with torch.inference_mode():
        expected = zoo.call(kind, eager)
        same(zoo.call(kind, fused), expected)
        merge_lora(fused)
        same(zoo.call(kind, fused), expected)
    unmerge_lora(fused)
    for name, weight in base.items():
        assert fused.get_submodule(name).weight is weight
        assert torch.equal(weight, bits[name])
    same(zoo.call(kind, merge_and_unload(fused)), expected)
    assert all(type(fused.get_submodule(name)) is nn.Linear for name in base)
    assert not any(isinstance(m, FusedLoRALinear) for m in fused.modules())


def test_as_peft_itself() -> None:
    peft = pytest.importorskip("peft")
    stock = zoo.llama().double()
    fused = zoo.adapted(copy.deepcopy(stock), use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"mlp.*": 3})
    config = peft.LoraConfig(
        target_modules="all-linear",
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"mlp.*": 3},
    )
    theirs = peft.get_peft_model(stock, config, autocast_adapter_dtype=False)
    inner = theirs.get_base_model()
    names = {n for n, m in inner.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    layers = {n: m for n, m in fused.named_modules() if isinstance(m, FusedLoRALinear)}
    assert layers.keys() == names
    for name, layer in layers.items():
        other = inner.get_submodule(name)
        assert (layer.r, layer.scaling) == (other.r["default"], other.scaling["default"])
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
    for model in (fused, theirs):
        zoo.call("llama", model).sin().sum().backward()
    same(zoo.call("llama", fused), zoo.call("llama", theirs))
    for name, layer in layers.items():
        other = inner.get_submodule(name)
        same(layer.lora_A.grad, other.lora_A["default"].weight.grad)
        same(layer.lora_B.grad, other.lora_B["default"].weight.grad)


@pytest.mark.parametrize("kind", CAUSAL)
def test_generate_gives_the_eager_tokens(kind: str) -> None:
    fused, eager = (model.eval() for model in pair(kind, torch.float32))
    ids = torch.randint(zoo.VOCAB, (2, 5))

    def tokens(model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=True)

    expected = tokens(eager)
    assert expected.shape == (2, 17)
    assert torch.equal(tokens(fused), expected)
    merge_lora(fused)
    assert torch.equal(tokens(fused), expected)
    assert torch.equal(tokens(merge_and_unload(fused)), expected)


def test_unloaded_model_saves_a_stock_checkpoint(tmp_path: Path) -> None:
    stock = zoo.llama()
    keys = set(stock.state_dict())
    fused = zoo.adapted(stock).eval()
    expected = zoo.call("llama", fused)
    plain = merge_and_unload(fused)
    assert plain is fused and set(plain.state_dict()) == keys
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert torch.equal(zoo.call("llama", loaded), zoo.call("llama", plain))
    same(zoo.call("llama", loaded), expected, 1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_activation_checkpointing_keeps_the_gradients(kind: str, when: str, reentrant: bool) -> None:
    stock = zoo.BUILD[kind]().double()
    enable = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = copy.deepcopy(stock)
        if checkpointed and when == "before":
            model.gradient_checkpointing_enable(**enable)
        zoo.adapted(model)
        if checkpointed and when == "after":
            model.gradient_checkpointing_enable(**enable)
        model.train()
        zoo.call(kind, model).sin().sum().backward()
        gradients.append([p.grad for p in lora_parameters(model)])
    for plain, recomputed in zip(*gradients):
        assert recomputed is not None
        same(recomputed, plain)


def test_input_gradients_only_while_checkpointing() -> None:
    model = zoo.adapted(zoo.vit()).train()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, y: seen.append(y.requires_grad))
    zoo.call("vit", model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    zoo.call("vit", model)
    twin = pickle.loads(pickle.dumps(zoo.adapted(zoo.vit()).train()))
    twin.gradient_checkpointing_enable({"use_reentrant": True})
    zoo.call("vit", twin).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(twin))
    model.eval()
    zoo.call("vit", model)
    assert seen == [False, True, False]
    merge_and_unload(model)
    model.train()
    zoo.call("vit", model)
    assert seen[-1] is False


def test_tied_output_embedding_trains_with_a_warning_and_merges_only_untied(tmp_path: Path) -> None:
    stock = zoo.gpt2(plain=False)
    with pytest.warns(UserWarning, match="'lm_head' is tied to transformer.wte.weight"):
        fused = zoo.adapted(copy.deepcopy(stock), ["lm_head"]).eval()
    eager = zoo.eager_twin(stock, fused).eval()
    for model in (fused, eager):
        zoo.call("gpt2", model).sin().sum().backward()
    assert fused.lm_head.weight is fused.transformer.wte.weight
    same(fused.lm_head.lora_A.grad, eager.lm_head.lora_A.grad, 1e-4)
    expected = zoo.call("gpt2", eager)
    for merge in (merge_lora, merge_and_unload):
        with pytest.raises(ValueError, match="tied to transformer.wte.weight.*\nuntie"):
            merge(fused)
    assert not fused.lm_head.merged
    fused.lm_head.weight = nn.Parameter(fused.lm_head.weight.clone(), requires_grad=False)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        merge_and_unload(fused)
    fused.config.tie_word_embeddings = False
    merge_and_unload(fused).save_pretrained(tmp_path)
    same(zoo.call("gpt2", type(stock).from_pretrained(tmp_path).eval()), expected, 1e-5)


def test_merge_is_all_or_nothing() -> None:
    for keep_base in ("cpu", "device", False):
        model = zoo.adapted(zoo.MLP(), ["fc1", "fc2", "head"])
        before = dict(model.named_parameters())
        with torch.no_grad():
            model.head.lora_A[0, 0] = float("nan")
        with pytest.raises(ValueError, match="^head: .*finite.*nothing was merged"):
            merge_lora(model, keep_base=keep_base)
        assert all(before[n] is p for n, p in model.named_parameters())
        assert not any(layer.merged for layer in report(model).layers)


def test_unmerge_without_a_base_changes_nothing() -> None:
    model = zoo.adapted(zoo.MLP(), ["fc1", "fc2"])
    model.fc2.merge(keep_base=False)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="fc2: the base weight was not kept"):
        unmerge_lora(model)
    assert model.fc1.merged and model.fc2.merged
    with pytest.raises(ValueError, match="no FusedLoRALinear"):
        merge_lora(zoo.MLP())
    with pytest.raises(ValueError, match="no merged"):
        unmerge_lora(zoo.adapted(zoo.MLP()))


def test_report_counts_each_parameter_once() -> None:
    stock = zoo.gpt2(plain=False)
    total = sum(p.numel() for p in stock.parameters())
    with pytest.warns(UserWarning, match="tied"):
        model = zoo.adapted(stock, ["lm_head"], r=3)
    found = report(model)
    adapter = 3 * (32 + zoo.VOCAB)
    assert (found.trainable_params, found.total_params) == (adapter, total + adapter)
    assert (found.trainable_bytes, found.total_bytes) == (4 * adapter, 4 * (total + adapter))
    part = nn.Linear(20, 33, bias=False)
    part.weight = nn.Parameter(model.lm_head.weight.detach().view(-1)[: 20 * 33].view(33, 20))
    for order in ([part, model], [model, part]):
        assert report(nn.ModuleList(order)).total_params == total + adapter
    assert [p.shape for p in lora_parameters(model)] == [(3, 32), (zoo.VOCAB, 3)]


def test_report_names_layers_skipped_and_backends() -> None:
    model = zoo.adapted(zoo.vit(), modules_to_save=["classifier"], exclude_modules=["k_proj", "key"])
    assert {layer.backend for layer in report(model).layers} == {None}
    zoo.call("vit", model).sum().backward()
    found = report(model)
    assert {layer.backend for layer in found.layers} == {"reference"}
    assert len(found.layers) == SWAPPED["vit"] - 2
    assert found.saved == ("classifier",) and "modules_to_save" in found.skipped["classifier"]
    assert sum("exclude_modules" in why for why in found.skipped.values()) == 2
    text = str(found)
    assert "10 layers" in text and "backend reference" in text and "skipped 2: excluded" in text
    assert f"{found.trainable_params:,} of {found.total_params:,}" in text


def test_wrappers_and_parts_are_seen_through(tmp_path: Path) -> None:
    whole = nn.Sequential(zoo.adapted(zoo.vit(), modules_to_save=["classifier"]), nn.Linear(3, 3))
    found = report(whole)
    assert found.saved == ("0.classifier",) and "0.classifier" in found.skipped
    assert str(report(torch.compile(whole))) == str(found)
    compiled = torch.compile(zoo.vit())
    assert zoo.adapted(compiled, modules_to_save=["classifier"]) is compiled
    assert report(compiled).saved == ("classifier",) and len(lora_parameters(compiled)) == 24
    inside = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))))
    zoo.adapted(inside, "all-linear", modules_to_save=["1"])
    assert report(inside).saved == ("0.1",)
    save_adapter(inside, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["0.1"]


def test_report_tells_the_state_of_each_layer() -> None:
    model = zoo.adapted(zoo.MLP(), ["fc1"])
    assert str(report(model)).endswith("no eager call yet")
    model.fc1.adapters_enabled = False
    assert str(report(model)).endswith("adapter off")
    model.fc1.merge()
    assert "merged, adapter off: its forward raises" in str(report(model))
    model.fc1.scaling = torch.tensor([1.0, 2.0])
    assert "scaling=tensor([1., 2.])" in str(report(model))


@pytest.mark.parametrize("wrap", [nn.Sequential, torch.compile], ids=["parent", "compiled"])
def test_nothing_is_left_by_unloading_a_parent(wrap, tmp_path: Path) -> None:
    """The next adapter of the model would inherit the options of one that is gone."""
    inner = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    outer = wrap(zoo.adapted(inner, ["0"], bias="all", modules_to_save=["1"]))
    merge_and_unload(outer)
    assert not any("_fusedlora" in module.__dict__ for module in outer.modules())
    save_adapter(zoo.adapted(outer, "all-linear"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["bias"] == "none" and config["modules_to_save"] is None
