"""lora_bias and apply_lora's bias, against peft: numbers, gradients, merging, which parameters train, files."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusedlora import (
    FusedLoRALinear,
    apply_lora,
    load_adapter,
    lora_parameters,
    merge_and_unload,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from fusedlora.testing import error_ratios, relative_error

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no bias. This means that merging:UserWarning")

K, N, R = 48, 32, 4
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
KEYS = ["weight", "bias", "lora_A", "lora_B", "lora_bias"]


def trained(device="cpu", dtype=FP64, bias: bool = True, **options) -> FusedLoRALinear:
    """A layer whose lora_B and lora_bias are not zero."""
    options = {"r": R, "lora_alpha": 6, "lora_bias": True} | options
    layer = FusedLoRALinear(K, N, bias, device, dtype, **options)
    nn.init.normal_(layer.lora_B, std=0.5)
    nn.init.normal_(layer.lora_bias)
    return layer


def twin_of(layer: FusedLoRALinear, dtype: torch.dtype | None = None) -> nn.Module:
    """peft's layer with the same numbers, in `dtype` or in each parameter's own."""
    options = {"r": layer.r, "lora_alpha": layer.lora_alpha, "lora_dropout": layer.lora_dropout}
    base = nn.Linear(K, N, layer.bias is not None)
    config = peft.LoraConfig(target_modules=["0"], lora_bias=True, use_rslora=layer.use_rslora, **options)
    twin = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    for owner, name, value in (
        (twin.base_layer, "weight", layer.weight),
        (twin.base_layer, "bias", layer.bias),
        (twin.lora_A["default"], "weight", layer.lora_A),
        (twin.lora_B["default"], "weight", layer.lora_B),
        (twin.lora_B["default"], "bias", layer.lora_bias),
    ):
        if value is not None:
            setattr(owner, name, nn.Parameter(value.detach().to(dtype or value.dtype).clone(), value.requires_grad))
    return twin


def answers(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    ours = isinstance(layer, FusedLoRALinear)
    leaves = {
        "x": x,
        "lora_A": layer.lora_A if ours else layer.lora_A["default"].weight,
        "lora_B": layer.lora_B if ours else layer.lora_B["default"].weight,
        "lora_bias": layer.lora_bias if ours else layer.lora_B["default"].bias,
        "bias": layer.bias if ours else layer.base_layer.bias,
    }
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads))


# the layer


def test_parameters(device) -> None:
    layer = FusedLoRALinear(K, N, device=device, dtype=BF16, r=R, lora_bias=True)
    assert [name for name, _ in layer.named_parameters()] == KEYS and list(layer.adapter_parameters) == KEYS[2:]
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(KEYS[2:])
    assert layer.lora_bias.shape == (N,) and layer.lora_bias.dtype is FP32 and not layer.lora_bias.any()
    assert repr(layer).endswith("lora_alpha=8, lora_bias=True, adapter_dtype=torch.float32)")
    nn.init.ones_(layer.lora_bias)
    layer.reset_lora_parameters()
    assert not layer.lora_bias.any()
    plain = FusedLoRALinear(K, N, r=R)
    assert plain.lora_bias is None and list(plain.state_dict()) == KEYS[:4]


def test_refused_with_dora() -> None:
    for make in (
        lambda: FusedLoRALinear(K, N, lora_bias=True, use_dora=True),
        lambda: FusedLoRALinear.from_linear(nn.Linear(K, N), lora_bias=True, use_dora=True),
        lambda: apply_lora(nn.Sequential(nn.Linear(K, N)), ["0"], lora_bias=True, use_dora=True),
    ):
        with pytest.raises(ValueError, match="lora_bias is True, must be False with use_dora"):
            make()
    with pytest.raises(TypeError, match="lora_bias is 1, must be True or False"):
        FusedLoRALinear(K, N, lora_bias=1)


@pytest.mark.parametrize("scaling", [None, 0.3, "tensor"])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_outputs_and_gradients_are_pefts(bias: str, scaling, device) -> None:
    layer = trained(device, bias=bias != "none")
    if bias == "trained":
        layer.bias.requires_grad_()
    twin = twin_of(layer).to(device)
    if scaling is not None:
        twin.scaling["default"] = 0.3
        layer.scaling = torch.tensor(0.3, dtype=FP64, device=device) if scaling == "tensor" else 0.3
    x, dy = torch.randn(2, 5, K, dtype=FP64, device=device), torch.randn(2, 5, N, dtype=FP64, device=device)
    got, want = answers(layer, x, dy), answers(twin, x, dy)
    assert got.keys() == want.keys() and "lora_bias" in got and ("bias" in got) == (bias == "trained")
    for name, out in got.items():
        assert relative_error(out, want[name]) < 1e-13, name


@pytest.mark.parametrize(
    "dtype, adapter_dtype, autocast",
    [
        (FP32, None, False),
        (BF16, BF16, False),
        (BF16, FP32, False),
        (FP32, None, True),
        (BF16, BF16, True),
        (BF16, FP32, True),
    ],
    ids=str,
)
def test_errors_are_not_above_pefts(dtype, adapter_dtype, autocast: bool, device) -> None:
    layer = trained(device, dtype, adapter_dtype=adapter_dtype)
    x, dy = torch.randn(200, K, device=device, dtype=dtype), torch.randn(200, N, device=device, dtype=dtype)
    exact = answers(twin_of(layer, FP64).to(device), x.double(), dy.double())
    with torch.autocast(device.type, BF16, enabled=autocast):
        got, theirs = answers(layer, x, dy), answers(twin_of(layer).to(device), x, dy)
    assert {name: out.dtype for name, out in got.items()} == {name: out.dtype for name, out in theirs.items()}
    for name, ratio in error_ratios(got, theirs, exact).items():
        assert ratio <= (2.0 if name == "lora_bias" and dtype is FP32 else 1.05), name  # sums in another order


def test_it_is_outside_the_dropout(device) -> None:
    layer = trained(device, lora_dropout=0.5)
    nn.init.zeros_(layer.lora_B)
    x = torch.randn(40, K, dtype=FP64, device=device)
    want = F.linear(x, layer.weight, layer.bias) + layer.scaling * layer.lora_bias
    assert layer.training and relative_error(layer(x), want) < 1e-14


def test_no_pass_over_y(device) -> None:
    """What is added lies in the bias: y is made once, by the op."""
    layer = trained(device, FP32)
    x = torch.randn(64, K, device=device)
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    counts = []
    for bias in (layer.lora_bias, None):
        layer.lora_bias = bias
        made.clear()
        with torch.no_grad(), Sizes():
            layer(x)
        counts.append(sum(size == 64 * N for size in made))
    assert counts[0] == counts[1]


def test_adapter_off_is_the_linear(device) -> None:
    layer = trained(device, FP32)
    layer.adapters_enabled = False
    x = torch.randn(9, K, device=device)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


# merging a layer


@pytest.mark.parametrize("scaling", [None, "tensor"])
@pytest.mark.parametrize("keep_base", ["cpu", "device", False])
@pytest.mark.parametrize("bias", [True, False])
def test_merged(bias: bool, keep_base, scaling, device) -> None:
    layer = trained(device, bias=bias)
    if scaling:
        layer.scaling = torch.tensor(-0.75, device=device)
    x = torch.randn(7, K, dtype=FP64, device=device)
    before, want = layer.bias, layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge(keep_base)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert relative_error(layer(x), want) < 1e-13
    if scaling:
        layer.scaling.fill_(9.0)  # no longer read
        assert relative_error(layer(x), want) < 1e-13
        layer.scaling.fill_(-0.75)
    if keep_base is False:
        assert list(layer.state_dict()) == ["weight", "bias"]
        with pytest.raises(RuntimeError, match="base bias was not kept"):
            _ = layer.base_bias
        plain = nn.Linear(K, N, dtype=FP64, device=device)
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(plain(x), layer(x))
        return
    assert list(layer.state_dict()) == list(state)
    # a kept base stays where it was kept
    assert all(torch.equal(value.to(device), state[name]) for name, value in layer.state_dict().items())
    assert (layer.base_bias is None) == (not bias)
    copied = pickle.loads(pickle.dumps(layer)).unmerge()
    layer.unmerge()
    assert layer.bias is before and torch.equal(layer(x), want) and torch.equal(copied(x), want)


def test_merged_then_cast(device) -> None:
    for keep_base in ("cpu", "device"):
        layer = trained(device)
        bias = layer.bias.detach().clone()
        layer.merge(keep_base).float()
        assert layer.state_dict()["bias"].dtype is FP32
        layer.unmerge()
        assert layer.bias.dtype is FP32 and torch.equal(layer.bias, bias.float())


def test_a_bias_that_is_not_finite_is_not_merged(device) -> None:
    layer = trained(device, torch.float16)
    with torch.no_grad():
        layer.lora_bias[0] = 1e5
    weight, bias = layer.weight, layer.bias
    with pytest.raises(ValueError, match="the merged bias is not finite in torch.float16"):
        layer.merge()
    assert layer.weight is weight and layer.bias is bias and not layer.merged and layer.can_unmerge
    model = nn.ModuleList([FusedLoRALinear(K, N, dtype=torch.float16, device=device), layer])
    with pytest.raises(ValueError, match="^1: the merged bias is not finite.*nothing was merged"):
        merge_lora(model, keep_base=False)
    assert not model[0].merged


# models


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.down = nn.Linear(20, 12, bias=False)
        self.head = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(F.gelu(self.norm(self.up(x)))))


X = torch.randn(6, 12, dtype=FP64, generator=torch.Generator().manual_seed(3))
CASES = [(bias, lora_bias) for bias in ("none", "all", "lora_only") for lora_bias in (False, True)]


def fields(bias: str, lora_bias: bool, saved: bool = True) -> dict[str, object]:
    given = {"target_modules": ["up", "down"], "r": 3, "lora_alpha": 7, "bias": bias, "lora_bias": lora_bias}
    return given | ({"modules_to_save": ["head"]} if saved else {})


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def plain_name(name: str) -> str:
    for old, new in (
        ("base_model.model.", ""),
        (".base_layer", ""),
        (".default", ""),
        (".modules_to_save", ""),
        ("lora_A.weight", "lora_A"),
        ("lora_B.weight", "lora_B"),
        ("lora_B.bias", "lora_bias"),
    ):
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("bias, lora_bias", CASES)
def test_what_trains_and_how_is_pefts(bias: str, lora_bias: bool) -> None:
    stock = MLP().double()
    ours = apply_lora(copy.deepcopy(stock), **fields(bias, lora_bias))
    theirs = peft.get_peft_model(copy.deepcopy(stock), peft.LoraConfig(**fields(bias, lora_bias)))
    named = {plain_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    trains = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trains.keys() == named.keys()
    with torch.no_grad():
        for name, p in trains.items():
            named[name].copy_(p)
    for model in (ours, theirs):
        train(model)
    for name, p in trains.items():
        assert relative_error(p, named[name]) < 1e-12, name
    moved = {name for name, p in stock.named_parameters() if not torch.equal(p, ours.get_parameter(name))}
    assert moved == {name for name in trains if "lora_" not in name}
    assert len(lora_parameters(ours)) == (6 if lora_bias else 4)


def test_a_wrong_choice_changes_nothing() -> None:
    model = MLP()
    with pytest.raises(ValueError, match="bias is 'some', must be one of none, all, lora_only"):
        apply_lora(model, ["up"], bias="some")
    assert type(model.up) is nn.Linear and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias, lora_bias", CASES)
@pytest.mark.parametrize("saved", [False, True], ids=["", "modules_to_save"])
def test_files_of_ours_in_peft_and_here(bias: str, lora_bias: bool, saved: bool, tmp_path) -> None:
    stock = MLP().double()
    options = fields(bias, lora_bias, saved)
    model = train(apply_lora(copy.deepcopy(stock), **options)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["bias"] == bias and written.get("lora_bias", False) == lora_bias
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|Unexpected|mismatch).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path).eval()
    assert relative_error(theirs(X), model(X)) < 1e-13
    again = load_adapter(copy.deepcopy(stock), tmp_path)
    assert torch.equal(again(X), model(X))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    into = load_adapter(apply_lora(copy.deepcopy(stock), **options), tmp_path)
    assert torch.equal(into(X), model(X))
    before = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(merge_lora(model), tmp_path)
    after = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("bias, lora_bias", CASES)
@pytest.mark.parametrize("saved", [False, True], ids=["", "modules_to_save"])
def test_files_of_peft_here_and_back(bias: str, lora_bias: bool, saved: bool, tmp_path) -> None:
    stock = MLP().double()
    options = fields(bias, lora_bias, saved)
    theirs = train(peft.get_peft_model(copy.deepcopy(stock), peft.LoraConfig(**options))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(copy.deepcopy(stock), tmp_path / "theirs").eval()
    assert relative_error(model(X), theirs(X)) < 1e-13
    assert isinstance(model.up, FusedLoRALinear) and (model.up.lora_bias is not None) == lora_bias
    into = load_adapter(apply_lora(copy.deepcopy(stock), **options), tmp_path / "theirs")
    assert torch.equal(into(X), model(X))
    save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "ours").eval()
    assert relative_error(back(X), theirs(X)) < 1e-13


def test_files_that_do_not_fit(tmp_path) -> None:
    stock = MLP().double()
    for bias, lora_bias in CASES:
        save_adapter(apply_lora(copy.deepcopy(stock), **fields(bias, lora_bias)), tmp_path / f"{bias}{lora_bias}")
    with pytest.raises(ValueError, match="bias is 'all' in adapter_config.json, 'none' in the model"):
        load_adapter(apply_lora(copy.deepcopy(stock), **fields("none", False)), tmp_path / "allFalse")
    with pytest.raises(ValueError, match="lora_bias of up is True in adapter_config.json, False in the model"):
        load_adapter(apply_lora(copy.deepcopy(stock), **fields("none", False)), tmp_path / "noneTrue")
    config = tmp_path / "noneFalse" / "adapter_config.json"
    plain = json.loads(config.read_text())
    for change, lacks in (
        ({"bias": "lora_only"}, r"lacks base_model\.model\.up\.base_layer\.bias"),
        ({"bias": "all"}, r"lacks base_model\.model\.norm\.bias, base_model\.model\.up\.base_layer\.bias"),
        ({"lora_bias": True}, r"lacks base_model\.model\.down\.lora_B\.bias, base_model\.model\.up\.lora_B\.bias"),
    ):
        config.write_text(json.dumps(plain | change))
        with pytest.raises(ValueError, match=lacks):
            load_adapter(copy.deepcopy(stock), tmp_path / "noneFalse")
    config = tmp_path / "allFalse" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "lora_only"}))
    with pytest.raises(ValueError, match=r"has, and the model .* doesn't, base_model\.model\.norm\.bias"):
        load_adapter(copy.deepcopy(stock), tmp_path / "allFalse")


def test_a_mixture_has_no_file(tmp_path) -> None:
    model = apply_lora(MLP(), ["up", "down"], lora_bias=True)
    model.down = FusedLoRALinear(20, 12, False)
    with pytest.raises(ValueError, match="lora_bias is True on up and False on down"):
        save_adapter(model, tmp_path)
    pair = nn.ModuleDict({"a": apply_lora(MLP(), ["up"], bias="all"), "b": apply_lora(MLP(), ["up"])})
    with pytest.raises(ValueError, match="bias is 'all' on a, 'none' on b"):
        save_adapter(pair, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scaling_in_a_tensor_is_saved_as_its_number(tmp_path) -> None:
    stock = MLP().double()
    model = train(apply_lora(copy.deepcopy(stock), ["up", "down"], r=3)).eval()
    for layer in (model.up, model.down):
        layer.scaling = torch.tensor(0.3, dtype=FP64)
    assert list(model.up.state_dict()) == KEYS[:4] and "scaling=0.3" in repr(model.up).replace("tensor(0.3000", "0.3")
    save_adapter(model, tmp_path)
    assert relative_error(load_adapter(copy.deepcopy(stock), tmp_path)(X), model(X)) < 1e-13
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path).eval()
    assert relative_error(theirs(X), model(X)) < 1e-13
    load_adapter(model, tmp_path)


@pytest.mark.parametrize("bias, lora_bias", CASES)
def test_merging_a_model(bias: str, lora_bias: bool) -> None:
    stock = MLP().double()
    model = train(apply_lora(stock, **fields(bias, lora_bias))).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    y = model(X)
    assert relative_error(merge_lora(model)(X), y) < 1e-13
    assert torch.equal(unmerge_lora(model)(X), y)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if lora_bias:
        with pytest.warns(UserWarning, match=r"lora_bias gives down \(1 in all\) a bias"):
            plain = merge_and_unload(model)
    else:
        plain = merge_and_unload(model)
    assert type(plain.down) is nn.Linear and (plain.down.bias is not None) == lora_bias
    assert relative_error(plain(X), y) < 1e-13
    loaded = MLP().double()
    if lora_bias:
        loaded.down = nn.Linear(20, 12, dtype=FP64)
    loaded.load_state_dict(plain.state_dict())
    assert torch.equal(loaded(X), plain(X))
