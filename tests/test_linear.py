"""FusedLoRALinear: construction, what moves and copies it, merging, its state_dict."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fusedlora import FusedLoRALinear
from fusedlora.testing import eager_peft

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def trained(device="cpu", dtype=FP32, *, bias=True, **settings) -> FusedLoRALinear:
    """A layer whose adapter is not zero."""
    layer = FusedLoRALinear(16, 24, bias, device, dtype, r=4, **settings)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def bits(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_starts_as_its_linear(device) -> None:
    layer = FusedLoRALinear(16, 24, device=device)
    x = torch.randn(5, 16, device=device)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    bound = 1 / math.sqrt(16)  # Kaiming uniform with a = sqrt(5) over in_features
    assert 0.8 * bound < layer.lora_A.abs().max().item() <= bound
    assert not layer.lora_B.any()


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_forward_is_the_eager_arithmetic(lead, rslora: bool, device) -> None:
    layer = trained(device, FP64, lora_alpha=6, use_rslora=rslora)
    scaling = 6 / (2 if rslora else 4)
    x = torch.randn(*lead, 16, dtype=FP64, device=device)
    want = eager_peft(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=scaling)
    assert layer.scaling == scaling
    torch.testing.assert_close(layer(x), want)


def test_only_the_adapter_is_trained(device) -> None:
    layer = trained(device)
    layer(torch.randn(5, 16, device=device)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    layer(torch.randn(5, 16, device=device)).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_dropout_while_training_only(device) -> None:
    layer = trained(device, lora_dropout=0.5)
    x = torch.randn(5, 16, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "dtype, adapter_dtype, gives",
    [
        (FP32, None, FP32), (BF16, None, FP32), (FP16, None, FP32), (FP64, None, FP64),
        (BF16, BF16, BF16), (BF16, FP32, FP32), (FP64, FP32, FP32),
    ],
    ids=str,
)  # fmt: skip
def test_adapter_dtype(dtype, adapter_dtype, gives) -> None:
    layer = FusedLoRALinear(16, 24, dtype=dtype, adapter_dtype=adapter_dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == gives
    assert layer(torch.randn(2, 16, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"bias": "none"}, TypeError, "bias is 'none', must be True or False"),
        ({"r": 0}, ValueError, "r is 0, must be at least 1"),
        ({"r": -4}, ValueError, "r is -4, must be at least 1"),
        ({"r": 2.0}, TypeError, "r is 2.0, must be an integer"),
        ({"r": True}, TypeError, "r is True, must be an integer"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha is nan, must be finite"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout is 1.0, must be in \[0, 1\)"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout is -0.1, must be in \[0, 1\)"),
        ({"adapter_dtype": FP16}, TypeError, "adapter_dtype is torch.float16, must be the weight's torch.float32 or"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype is torch.int8"),
    ],
    ids=str,
)
def test_bad_arguments(settings, error, message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLoRALinear(16, 24, **settings)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_from_linear_shares_everything(bias: bool, device) -> None:
    linear = nn.Linear(16, 24, bias, device=device, dtype=BF16).eval()
    layer = FusedLoRALinear.from_linear(linear, r=2, lora_alpha=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not any(p.requires_grad for p in linear.parameters())
    assert not layer.training and layer.lora_A.shape == (2, 16) and layer.lora_B.shape == (24, 2)
    assert layer.lora_A.device == linear.weight.device and layer.lora_A.dtype == FP32
    assert layer.scaling == 1.5
    x = torch.randn(5, 16, device=device, dtype=BF16)
    torch.testing.assert_close(layer(x), linear(x))


def test_from_linear_takes_no_subclass() -> None:
    other = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 24)
    with pytest.raises(TypeError, match="linear is a NonDynamicallyQuantizableLinear, must be exactly an nn.Linear"):
        FusedLoRALinear.from_linear(other)
    with pytest.raises(TypeError, match="linear is a FusedLoRALinear"):
        FusedLoRALinear.from_linear(FusedLoRALinear(16, 24))
    computed = nn.Linear(16, 24)
    weight = computed.weight
    del computed.weight
    computed.weight = weight * 2
    with pytest.raises(TypeError, match="linear.weight is no Parameter"):
        FusedLoRALinear.from_linear(computed)


def test_meta_device_and_back(device) -> None:
    layer = FusedLoRALinear(16, 24, device="meta", dtype=BF16)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, 16, device="meta", dtype=BF16)).shape == (3, 24)
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    assert not layer.lora_B.any() and layer.lora_A.any() and torch.isfinite(layer.weight).all()
    assert layer(torch.ones(3, 16, device=device, dtype=BF16)).shape == (3, 24)


@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str, merged: bool, device) -> None:
    layer = trained(device)
    x = torch.randn(5, 16, device=device)
    before = bits(layer)
    if merged:
        layer.merge()
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin.merged == merged and torch.equal(twin(x), layer(x))
    twin.unmerge()
    assert same(bits(twin), before)
    with torch.no_grad():
        twin.weight.zero_()
        twin.lora_A.zero_()
    layer.unmerge()
    assert same(bits(layer), before)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts(cast: str, device) -> None:
    layer = getattr(trained(device), cast)()
    dtype = {"half": FP16, "bfloat16": BF16, "double": FP64}[cast]
    assert all(p.dtype == dtype for p in layer.parameters())
    y = layer(torch.randn(5, 16, device=device, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.lora_A.grad.dtype == dtype


def test_repr_says_what_it_is() -> None:
    assert repr(FusedLoRALinear(16, 24)) == (
        "FusedLoRALinear(in_features=16, out_features=24, bias=True, r=8, lora_alpha=8)"
    )
    layer = FusedLoRALinear(16, 24, False, dtype=BF16, r=2, lora_alpha=1, lora_dropout=0.1, use_rslora=True).merge()
    layer.backend = "reference"
    assert repr(layer) == (
        "FusedLoRALinear(in_features=16, out_features=24, bias=False, r=2, lora_alpha=1, lora_dropout=0.1, "
        "use_rslora=True, adapter_dtype=torch.float32, backend='reference', merged)"
    )


def test_last_backend_and_naming_one(device) -> None:
    layer = trained(device)
    assert layer.last_backend is None
    layer.backend = "reference"
    layer(torch.randn(5, 16, device=device))
    assert layer.last_backend == "reference"
    layer.backend = "best"
    with pytest.raises(ValueError, match="backend is 'best'"):
        layer(torch.randn(5, 16, device=device))


def test_adapter_off(device) -> None:
    layer = trained(device)
    x = torch.randn(5, 16, device=device)
    assert layer.adapter_in_use
    layer.adapters_enabled = False
    assert not layer.adapter_in_use and "adapter off" in repr(layer)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("use", ["forward", "step"])
def test_compiled_layer_gives_eager_numbers(use: str, device) -> None:
    torch._dynamo.reset()
    layer = trained(device)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16, device=device)
    y, want = compiled(x), layer(x)
    assert torch.equal(y, want)
    if use == "step":
        y.pow(2).sum().backward()
        want.pow(2).sum().backward()
        assert torch.equal(twin.lora_A.grad, layer.lora_A.grad) and torch.equal(twin.lora_B.grad, layer.lora_B.grad)
