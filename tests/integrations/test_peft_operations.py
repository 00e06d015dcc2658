"""What PEFT does to a model, done to a stock and a fused one: they stay equal, gradients included."""

import copy
import importlib.util
import io
import json
import sys
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
backend = sides.backend
Case = sides.Case

pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter .* was active:UserWarning", "ignore:fan_in_fan_out is set:UserWarning"
)
FUSED = 2  # calls of one forward


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, backend.StockLinear)]


def add_third(model: Any) -> None:
    config = peft.LoraConfig(target_modules=["up", "down"], r=3, lora_alpha=4, init_lora_weights=False)
    torch.manual_seed(5)
    model.add_adapter("third", config)
    model.set_adapter("third")


def add_in_one_layer(model: Any) -> None:
    config = peft.LoraConfig(target_modules=["up"], r=3, lora_alpha=4, init_lora_weights=False)
    torch.manual_seed(5)
    model.add_adapter("third", config)
    model.base_model.set_adapter(["default", "third"])


def weighted(model: Any) -> None:
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type="linear")
    model.set_adapter("sum")


def merge_and_back(model: Any) -> None:
    model.merge_adapter()
    model(torch.zeros(1, sides.K, device=next(model.parameters()).device))
    model.unmerge_adapter()


def freeze(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up.lora_B" in name)


def new_parameters(model: Any) -> None:
    state = {k: v * 1.5 for k, v in peft.get_peft_model_state_dict(model).items()}
    peft.set_peft_model_state_dict(model, state)


def replaced_weight(model: Any) -> None:
    for layer in layers(model):
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 0.5)
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.flip(0)


def each(method: str, *args: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in layers(model):
            getattr(layer, method)(*args)

    return change


# name: (what is done to the model, how many of the two layers are fused afterwards)
CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "set_adapter": (lambda m: m.set_adapter("other"), 2),
    "add_adapter": (add_third, 2),
    "delete_adapter": (lambda m: m.delete_adapter("default"), 2),
    "delete the last adapter": (lambda m: [each("delete_adapter", name)(m) for name in ("other", "default")], 0),
    "weighted adapter": (weighted, 2),
    "several adapters": (lambda m: m.base_model.set_adapter(["default", "other"]), 0),
    "several adapters in one layer": (add_in_one_layer, 1),
    "no adapter": (lambda m: m.base_model.set_adapter([]), 0),
    "merge": (lambda m: m.merge_adapter(), 0),
    "merge both": (lambda m: m.merge_adapter(["default", "other"]), 0),
    "safe merge": (lambda m: m.merge_adapter(safe_merge=True), 0),
    "merge and unmerge": (merge_and_back, 2),
    "merge, then disable": (lambda m: (m.merge_adapter(), m.base_model.disable_adapter_layers()), 0),
    "disable": (lambda m: m.base_model.disable_adapter_layers(), 0),
    "disable and enable": (lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers()), 2),
    "set_scale": (each("set_scale", "default", 3.0), 2),
    "scale_layer": (each("scale_layer", 0.3), 2),
    "scale and unscale": (lambda m: (each("scale_layer", 0.3)(m), each("unscale_layer")(m)), 2),
    "requires_grad": (freeze, 2),
    "load_state_dict": (new_parameters, 2),
    "replaced weights": (replaced_weight, 2),
    "eval": (lambda m: m.eval(), 2),
    "to float64": (lambda m: m.double(), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change(name: str, device: torch.device) -> None:
    change, fused_layers = CHANGES[name]
    stock = sides.build(Case(), device, ("default", "other"))
    fused = backend.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        change(model)
    x, dy = sides.inputs(Case(), device)
    x = x.to(layers(stock)[0].base_layer.weight.dtype)
    before = backend.calls["fused"]
    ours = sides.run(fused, x, dy)
    assert backend.calls["fused"] - before == fused_layers
    sides.assert_close(ours, sides.run(stock, x, dy))
    for (key, value), other in zip(stock.state_dict().items(), fused.state_dict().values()):
        assert torch.equal(value, other), key


def test_contexts(device: torch.device) -> None:
    from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale

    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    x, dy = sides.inputs(Case(), device)

    def both(fused_layers: int) -> None:
        before = backend.calls["fused"]
        sides.assert_close(sides.run(fused, x, dy), sides.run(stock, x, dy))
        assert backend.calls["fused"] - before == fused_layers

    with stock.disable_adapter(), fused.disable_adapter():
        both(0)
    both(2)
    with rescale_adapter_scale(stock, 0.5), rescale_adapter_scale(fused, 0.5):
        both(2)
    with disable_input_dtype_casting(stock), disable_input_dtype_casting(fused):
        both(2)
    both(2)


def test_mixed_batch(device: torch.device) -> None:
    stock = sides.build(Case(training=False), device, ("default", "other"))
    fused = backend.fuse(copy.deepcopy(stock))
    x, _ = sides.inputs(Case(), device)
    names = ["default", "__base__", "other", "default"]
    # PEFT puts adapter_names into the call by a hook on each layer
    before = backend.calls["the call has extra arguments"]
    y = fused(x, adapter_names=names)
    assert torch.equal(y, stock(x, adapter_names=names))
    assert backend.calls["the call has extra arguments"] - before == FUSED


def test_tensor_scaling_and_hotswap(device: torch.device, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    torch.manual_seed(0)
    other = sides.build(Case(options=(("r", 6), ("lora_alpha", 3))), device)
    other.save_pretrained(tmp_path)
    torch.manual_seed(0)  # the same base
    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    x, dy = sides.inputs(Case(), device)
    for model in (stock, fused):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(layers(fused)[0].scaling["default"], torch.Tensor)
    for _ in range(2):
        before = backend.calls["fused"]
        ours = sides.run(fused, x, dy)
        # peft 0.18 swaps in tensors that are no Parameters, which the rule leaves to PEFT
        plain = sum(type(layer.lora_A["default"].weight) is nn.Parameter for layer in layers(fused))
        assert backend.calls["fused"] - before == plain == (FUSED if peft.__version__ >= "0.21" else plain)
        sides.assert_close(ours, sides.run(stock, x, dy))
        for model in (stock, fused):
            hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device=str(device))
    torch.testing.assert_close(fused(x), other(x), rtol=1e-4, atol=1e-4)


def content(name: str, data: bytes) -> Any:
    """A file's bytes; of JSON its values, where the order of target_modules, a set, is chance."""
    if not name.endswith(".json"):
        return data
    values = json.loads(data)
    return values | {"target_modules": sorted(values["target_modules"])}


def test_checkpoint_is_plain_peft(device: torch.device, tmp_path: Path) -> None:
    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    stock.save_pretrained(tmp_path / "stock")
    fused.save_pretrained(tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir())
    for name in names:
        data = (tmp_path / "fused" / name).read_bytes()
        assert b"fusedlora" not in data.lower()
        assert content(name, data) == content(name, (tmp_path / "stock" / name).read_bytes()), name
    torch.manual_seed(3)
    base = stock.unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "fused", is_trainable=True)
    assert {type(layer) for layer in layers(loaded)} == {backend.StockLinear}
    x, _ = sides.inputs(Case(), device)
    torch.testing.assert_close(loaded(x), fused(x), rtol=1e-4, atol=1e-4)
    y, calls = sides.fused_calls(lambda: backend.fuse(loaded)(x))
    assert calls == FUSED
    torch.testing.assert_close(y, fused(x), rtol=0, atol=0)


def test_merge_and_unload_gives_plain_linears(device: torch.device) -> None:
    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    x, _ = sides.inputs(Case(), device)
    y = fused(x)
    plain = fused.merge_and_unload()
    assert {type(module) for module in plain.modules()} == {sides.Net, nn.Linear}
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain(x), stock.merge_and_unload()(x))


def test_deepcopy_and_pickle(device: torch.device) -> None:
    fused = backend.fuse(sides.build(Case(), device))
    x, dy = sides.inputs(Case(), device)
    expected = sides.run(fused, x, dy)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        ours, calls = sides.fused_calls(lambda again=again: sides.run(again, x, dy))
        assert calls == FUSED
        for key, value in expected.items():
            assert torch.equal(ours[key], value), key
        weights = {id(p) for p in fused.parameters()}
        assert not weights & {id(p) for p in again.parameters()}


def test_status_is_as_of_stock(device: torch.device) -> None:
    """What PEFT says of its layers: names, types and states."""
    stock = sides.build(Case(), device, ("default", "other"))
    fused = backend.fuse(copy.deepcopy(stock))
    assert fused.get_layer_status() == stock.get_layer_status()
    assert fused.get_model_status() == stock.get_model_status()
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in stock.named_modules()]
    assert fused.peft_config["default"].to_dict() == stock.peft_config["default"].to_dict()


class Zoo(nn.Module):
    """A layer of every type that PEFT's LoRA takes."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.conv1 = nn.Conv1d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 1, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv1d = Conv1D(16, 16)
        self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
        self.linear = nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = self.conv1(x.transpose(1, 2)).transpose(1, 2)
        x = self.conv2(x.unsqueeze(1)).squeeze(1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.linear(self.special(self.conv1d(x.contiguous())))


def test_other_layer_types_stay_stock(device: torch.device) -> None:
    names = ["embedding", "conv1", "conv2", "attention", "conv1d", "special", "linear"]
    config = peft.LoraConfig(target_modules=names, r=4, init_lora_weights=False)
    stock = peft.get_peft_model(Zoo().to(device), config)
    fused = backend.fuse(copy.deepcopy(stock))
    tokens = torch.randint(0, 10, (2, 5), device=device)
    before = backend.calls["fused"]
    results = []
    for model in (stock, fused):
        y = model(tokens)
        y.backward(torch.ones_like(y))
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"y": y.detach()})
    assert backend.calls["fused"] - before == 1
    assert len(results[0]) > 12
    sides.assert_close(results[1], results[0])
    found = {layer.name.rsplit(".")[-1]: layer.why_not for layer in backend.report(fused).layers}
    assert set(names) <= set(found)
    assert found.pop("linear") is None
    assert all(found.values()), found
    assert "Conv1D" in found["conv1d"] and "NonDynamicallyQuantizableLinear" in found["special"]
