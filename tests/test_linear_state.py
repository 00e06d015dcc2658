"""FusedLoRALinear made from a linear, copied, moved, stored, loaded and printed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlora import FusedLoRALinear
from fusedlora.testing import eager_peft, relative_error

K, N, R = 48, 32, 4
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def trained(device, dtype=FP32, bias: bool = True, **options) -> FusedLoRALinear:
    layer = FusedLoRALinear(K, N, bias, device, dtype, **({"r": R} | options))
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


def rows(device, dtype=FP32, M: int = 7) -> torch.Tensor:
    return torch.randn(M, K, device=device, dtype=dtype)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# from a linear


class _Sizes(TorchDispatchMode):
    """The sizes of all that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.made.add(out.numel())
        return out


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_and_freezes(bias: bool, device) -> None:
    linear = nn.Linear(K, N, bias, device, BF16).eval()
    bits = linear.weight.detach().clone()
    with _Sizes() as sizes:
        layer = FusedLoRALinear.from_linear(linear, r=R, lora_alpha=6, lora_dropout=0.25)
    assert N * K not in sizes.made and N not in sizes.made, "weight and bias are not copied"
    assert layer.weight is linear.weight and layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.bias is linear.bias
    assert torch.equal(layer.weight, bits)
    assert not any(p.requires_grad for p in linear.parameters())
    assert (layer.in_features, layer.out_features, layer.r, layer.training) == (K, N, R, False)
    assert (layer.scaling, layer.lora_dropout) == (1.5, 0.25)
    assert layer.lora_A.device == linear.weight.device and layer.lora_A.dtype is FP32
    made = FusedLoRALinear(K, N, bias, r=R)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in made.named_parameters()]
    assert layer.__dict__.keys() == made.__dict__.keys()
    x = rows(device, BF16)
    layer.backend = "reference"
    assert torch.equal(layer(x), linear(x)), "the layer starts as the linear"


def test_from_linear_takes_only_linears() -> None:
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (Doubled(K, N), FusedLoRALinear(K, N), nn.utils.parametrizations.weight_norm(nn.Linear(K, N))):
        with pytest.raises(TypeError, match="must be exactly an nn.Linear"):
            FusedLoRALinear.from_linear(module)
    with pytest.warns(FutureWarning):
        hooked = nn.utils.weight_norm(nn.Linear(K, N))
    with pytest.raises(TypeError, match="no Parameter"):
        FusedLoRALinear.from_linear(hooked)


# state_dict


def test_loads_a_plain_linears_state_dict(device) -> None:
    """Strictly: what is missing is the adapter, which stays as it is."""
    model = nn.Sequential(trained(device), nn.ReLU())
    lora_A, lora_B = model[0].lora_A.clone(), model[0].lora_B.clone()
    plain = nn.Sequential(nn.Linear(K, N), nn.ReLU())
    result = model.load_state_dict(plain.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model[0].weight.cpu(), plain[0].weight) and torch.equal(model[0].bias.cpu(), plain[0].bias)
    assert torch.equal(model[0].lora_A, lora_A) and torch.equal(model[0].lora_B, lora_B)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("dropped", ["lora_A", "lora_B", "weight", "bias"])
def test_an_incomplete_state_dict_is_not_a_plain_one(dropped: str, device) -> None:
    state = trained(device).state_dict()
    del state[dropped]
    layer = trained(device)
    with pytest.raises(RuntimeError, match=f"Missing key.*{dropped}"):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == [dropped]


def test_wrong_keys_and_shapes_are_reported(device) -> None:
    layer = trained(device)
    with pytest.raises(RuntimeError, match="Unexpected key.*lora_C"):
        layer.load_state_dict(layer.state_dict() | {"lora_C": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(FusedLoRALinear(K, N, r=R + 1).state_dict())


def test_state_dict_round_trip(device) -> None:
    layer, other = trained(device, BF16), trained(device, BF16)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert not same_state(layer, other)
    other.load_state_dict(layer.state_dict())
    assert same_state(layer, other)
    meta = FusedLoRALinear(K, N, device="meta", dtype=BF16, r=R)
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert meta.weight.data_ptr() == layer.weight.data_ptr()
    assert [p.requires_grad for p in meta.parameters()] == [False, False, True, True]
    assert same_state(layer, meta)


# copies


def through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies(copied, device) -> None:
    layer = trained(device, BF16, lora_alpha=6, lora_dropout=0.1, use_rslora=True)
    layer.backend, layer.scaling = "reference", 0.5
    layer(rows(device, BF16))
    other = copied(layer)
    assert type(other) is FusedLoRALinear and same_state(layer, other)
    tensors = {"_parameters"}
    assert {k: v for k, v in other.__dict__.items() if k not in tensors} == {
        k: v for k, v in layer.__dict__.items() if k not in tensors
    }
    assert [p.requires_grad for p in other.parameters()] == [False, False, True, True]
    x = rows(device, BF16)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(p.any() for p in layer.parameters()), "the copy shares nothing"


def test_a_deep_copy_keeps_what_is_shared_inside_it(device) -> None:
    linear = nn.Linear(K, N, device=device)
    model = copy.deepcopy(nn.ModuleList([linear, FusedLoRALinear.from_linear(linear)]))
    assert model[0].weight is model[1].weight and model[0].weight is not linear.weight


# moves


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casts(cast: str, device) -> None:
    layer = trained(device, lora_alpha=6)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    dtype = {"half": FP16, "bfloat16": BF16, "double": FP64, "to": BF16}[cast]
    assert (layer.to(BF16) if cast == "to" else getattr(layer, cast)()) is layer
    for name, parameter in layer.named_parameters():
        assert parameter.dtype is dtype
        assert torch.equal(parameter, expected[name].to(dtype))
        assert parameter.requires_grad == name.startswith("lora_")
    x = rows(device, dtype)
    y = layer(x)
    y.sum().backward()
    tensors = (t.detach().double() for t in (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias))
    assert relative_error(y, eager_peft(*tensors, scaling=1.5)) < 2 * torch.finfo(dtype).eps
    assert layer.lora_A.grad.dtype is dtype


def test_moves_between_devices(device) -> None:
    layer = FusedLoRALinear(K, N, r=R)
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to(device)
    assert {p.device.type for p in layer.parameters()} == {device.type}
    assert layer(rows(device)).device.type == device.type
    layer.cpu()
    assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("built", ["there", "moved"])
def test_meta(built: str, device) -> None:
    options = {"r": R, "lora_alpha": 6}
    layer = (
        FusedLoRALinear(K, N, device="meta", **options)
        if built == "there"
        else FusedLoRALinear(K, N, device=device, **options).to("meta")
    )
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)
    layer.to_empty(device=device)
    assert {p.device.type for p in layer.parameters()} == {device.type}
    assert [p.requires_grad for p in layer.parameters()] == [False, False, True, True]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    layer.reset_parameters()
    layer.backend = "reference"
    x = rows(device)
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.scaling == 1.5


def test_from_linear_on_meta(device) -> None:
    layer = FusedLoRALinear.from_linear(nn.Linear(K, N, device="meta"), r=R)
    assert layer.lora_A.is_meta and layer.lora_B.is_meta
    source = trained(device)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = rows(device)
    assert torch.equal(layer(x), source(x))


# print


@pytest.mark.parametrize(
    "options, after, text",
    [
        ({}, {}, "bias=True, r=4, lora_alpha=8"),
        ({"bias": False, "lora_alpha": 6.5}, {}, "bias=False, r=4, lora_alpha=6.5"),
        (
            {"lora_dropout": 0.1, "use_rslora": True},
            {},
            "bias=True, r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True",
        ),
        ({"dtype": BF16}, {}, "bias=True, r=4, lora_alpha=8, adapter_dtype=torch.float32"),
        ({"dtype": BF16, "adapter_dtype": BF16}, {}, "bias=True, r=4, lora_alpha=8"),
        ({}, {"backend": "reference"}, "bias=True, r=4, lora_alpha=8, backend='reference'"),
        ({}, {"adapters_enabled": False}, "bias=True, r=4, lora_alpha=8, adapter off"),
    ],
)
def test_repr(options, after, text: str) -> None:
    layer = FusedLoRALinear(K, N, **({"r": R} | options))
    for name, value in after.items():
        setattr(layer, name, value)
    assert repr(layer) == f"FusedLoRALinear(in_features=48, out_features=32, {text})"


def test_repr_of_a_merged_layer() -> None:
    assert repr(trained("cpu").merge()).endswith("lora_alpha=8, merged)")
