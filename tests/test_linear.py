"""FusedLoRALinear: its arguments, its adapter's start, its outputs and gradients."""

import copy
import inspect
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlora import FusedLoRALinear, backends
from fusedlora.testing import eager_peft, relative_error

K, N, R = 48, 32, 4
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ADAPTER = {"lora_A", "lora_B"}


def trained(device, dtype=FP32, backend: str = "reference", **options) -> FusedLoRALinear:
    """A layer whose adapter is not zero; on the reference path, whose sums are the plain linear's own."""
    layer = FusedLoRALinear(K, N, device=device, dtype=dtype, **({"r": R} | options))
    layer.backend = backend
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


def eager(layer: FusedLoRALinear, x: torch.Tensor, **settings) -> torch.Tensor:
    return eager_peft(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=layer.scaling, training=False, **settings
    )


def rows(device, dtype=FP32, M: int = 7) -> torch.Tensor:
    return torch.randn(M, K, device=device, dtype=dtype)


# arguments


def test_arguments_are_those_of_linear_then_those_of_peft() -> None:
    ours = inspect.signature(FusedLoRALinear).parameters
    theirs = inspect.signature(nn.Linear).parameters
    assert list(ours)[:5] == list(theirs)
    assert [ours[name].default for name in theirs] == [p.default for p in theirs.values()]
    extra = {name: ours[name] for name in list(ours)[5:]}
    assert {p.kind for p in extra.values()} == {inspect.Parameter.KEYWORD_ONLY}
    config = pytest.importorskip("peft").LoraConfig()
    assert all(getattr(config, name) == p.default for name, p in extra.items() if name != "adapter_dtype")


@pytest.mark.parametrize("bias", [True, False])
def test_parameters(bias: bool, device) -> None:
    layer = FusedLoRALinear(K, N, bias, device, BF16, r=R)
    assert isinstance(layer, nn.Linear)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    expected = {"weight": (N, K), "bias": (N,), "lora_A": (R, K), "lora_B": (N, R)}
    if not bias:
        del expected["bias"]
    assert list(shapes.items()) == list(expected.items())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == ADAPTER
    assert all(p.device.type == device.type for p in layer.parameters())
    assert (layer.bias is None) == (not bias)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"bias": "none"}, TypeError, "bias is 'none'"),
        ({"r": 0}, ValueError, "r is 0, must be at least 1"),
        ({"r": -3}, ValueError, "r is -3"),
        ({"r": 2.0}, TypeError, "r is 2.0, must be an integer"),
        ({"r": True}, TypeError, "r is True"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha is '16'"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha is inf"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan"),
        ({"lora_dropout": None}, TypeError, "lora_dropout is None"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout is -0.1"),
        ({"lora_dropout": float("nan")}, ValueError, "lora_dropout is nan"),
        ({"use_rslora": "no"}, TypeError, "use_rslora is 'no'"),
        ({"use_dora": 1}, TypeError, "use_dora is 1, must be True or False"),
        ({"adapter_dtype": FP64}, TypeError, "adapter_dtype is torch.float64"),
        ({"adapter_dtype": BF16}, TypeError, "adapter_dtype is torch.bfloat16"),
        ({"adapter_dtype": FP16, "dtype": BF16}, TypeError, "adapter_dtype is torch.float16"),
    ],
    ids=lambda v: ",".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_bad_arguments(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLoRALinear(K, N, **arguments)
    options = {name: value for name, value in arguments.items() if name not in ("bias", "dtype")}
    if options:
        linear = nn.Linear(K, N, dtype=arguments.get("dtype"))
        with pytest.raises(error, match=message):
            FusedLoRALinear.from_linear(linear, **options)
        assert linear.weight.requires_grad, "a refused linear is left as it was"


@pytest.mark.parametrize(
    "sizes, dtype, error, message",
    [
        ((0, 6), None, ValueError, "in_features is 0, must be at least 1"),
        ((-1, 6), None, ValueError, "in_features is -1, must be at least 1"),
        ((6, 0), None, ValueError, "out_features is 0, must be at least 1"),
        ((6.0, 6), None, TypeError, "in_features is 6.0, must be an integer"),
        ((6, 6), torch.int32, TypeError, "dtype is torch.int32, must be floating point"),
    ],
)
def test_bad_sizes_and_dtypes(sizes, dtype, error, message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLoRALinear(*sizes, dtype=dtype)


@pytest.mark.parametrize(
    "dtype, asked, expected",
    [
        (BF16, None, FP32),
        (FP16, None, FP32),
        (FP32, None, FP32),
        (FP64, None, FP64),
        (BF16, BF16, BF16),
        (FP64, FP32, FP32),
    ],
)
def test_adapter_dtype(dtype, asked, expected, device) -> None:
    layer = trained(device, dtype, adapter_dtype=asked)
    assert layer.weight.dtype is layer.bias.dtype is dtype
    assert layer.lora_A.dtype is layer.lora_B.dtype is expected
    y = layer(rows(device, dtype))
    assert y.dtype is dtype
    y.sum().backward()
    assert layer.lora_A.grad.dtype is layer.lora_B.grad.dtype is expected


@pytest.mark.parametrize("r, alpha, rslora, scaling", [(8, 8, False, 1.0), (4, 6, False, 1.5), (16, 6, True, 1.5)])
def test_scaling(r: int, alpha: float, rslora: bool, scaling: float, device) -> None:
    layer = trained(device, FP64, r=r, lora_alpha=alpha, use_rslora=rslora)
    assert layer.scaling == scaling
    x = rows(device, FP64)
    expected = x @ (layer.weight + scaling * layer.lora_B @ layer.lora_A).t() + layer.bias
    assert relative_error(layer(x), expected) < 1e-13


# the adapter's start


def test_starts_as_its_linear(device) -> None:
    layer = FusedLoRALinear(K, N, device=device)
    layer.backend = "reference"
    x = rows(device)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not layer.lora_B.any()
    spread = layer.lora_A.abs().max().item() * K**0.5  # kaiming_uniform's bound is 1 / √K for a = √5
    assert 0.9 < spread <= 1.0


def peft_twin(linear: nn.Linear, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], **options)
    return peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]


def test_the_adapter_is_drawn_as_peft_draws_it(device) -> None:
    linear = nn.Linear(K, N, device=device)
    theirs = peft_twin(copy.deepcopy(linear), r=R)
    torch.manual_seed(3)
    theirs.reset_lora_parameters("default", True)
    torch.manual_seed(3)
    layer = FusedLoRALinear.from_linear(linear, r=R)
    assert torch.equal(layer.lora_A, theirs.lora_A["default"].weight)
    assert torch.equal(layer.lora_B, theirs.lora_B["default"].weight)


def test_reset(device) -> None:
    layer = trained(device)
    weight, lora_A = layer.weight.clone(), layer.lora_A.clone()
    layer.reset_lora_parameters()
    assert torch.equal(layer.weight, weight) and not torch.equal(layer.lora_A, lora_A) and not layer.lora_B.any()
    nn.init.ones_(layer.lora_B)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, weight) and not layer.lora_B.any()


# forward and gradients


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)], ids=str)
def test_leading_dimensions(lead, device) -> None:
    layer = trained(device, FP64)
    x = torch.randn(*lead, K, device=device, dtype=FP64)
    y = layer(x)
    assert y.shape == (*lead, N)
    assert relative_error(y, eager(layer, x)) < 1e-13


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype, limit", [(FP32, 1e-5), (BF16, 1e-2)], ids=["fp32", "bf16"])
def test_outputs_and_gradients_are_those_of_peft(dtype, limit, autocast: bool, device) -> None:
    linear = nn.Linear(K, N, device=device, dtype=dtype)
    theirs = peft_twin(copy.deepcopy(linear), r=R, lora_alpha=6)
    layer = FusedLoRALinear.from_linear(linear, r=R, lora_alpha=6)
    adapter = {name: getattr(theirs, name)["default"].weight for name in ("lora_A", "lora_B")}
    nn.init.normal_(adapter["lora_B"], std=0.5)
    layer.load_state_dict({name: p.detach() for name, p in adapter.items()}, strict=False)
    assert layer.lora_A.dtype is adapter["lora_A"].dtype
    x, dy = rows(device, dtype, 63), torch.randn(63, N, device=device, dtype=dtype)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast(device.type, BF16, enabled=autocast):
        y, expected = layer(x_ours), theirs(x_theirs)
    assert y.dtype is expected.dtype
    limit = 1e-2 if autocast else limit
    assert relative_error(y, expected) < limit
    y.backward(dy.to(y.dtype))
    expected.backward(dy.to(expected.dtype))
    assert relative_error(x_ours.grad, x_theirs.grad) < limit
    for name, parameter in adapter.items():
        assert relative_error(getattr(layer, name).grad, parameter.grad) < limit, name
    assert layer.weight.grad is None and layer.bias.grad is None


def test_a_weight_made_trainable_gets_its_gradient(device) -> None:
    layer = trained(device, FP64).requires_grad_()
    x = rows(device, FP64)
    layer(x).sin().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    eager(layer, x).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert relative_error(grads[name], parameter.grad) < 1e-12, name


def test_dropout_acts_in_training_on_the_adapter_alone(device) -> None:
    layer = trained(device, FP64, lora_dropout=0.5)
    x = rows(device, FP64)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    layer.eval()
    assert relative_error(layer(x), eager(layer, x)) < 1e-13
    layer.train().adapters_enabled = False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_disabled_adapter_is_the_linear_bit_for_bit(dtype, device) -> None:
    layer = trained(device, dtype, backend="auto")
    x = rows(device, dtype).requires_grad_()
    linear = F.linear(x, layer.weight, layer.bias)
    (expected,) = torch.autograd.grad(linear.sum(), x)
    layer.adapters_enabled = False
    assert not layer.adapter_in_use
    y = layer(x)
    assert torch.equal(y, linear)
    y.sum().backward()
    assert torch.equal(x.grad, expected)
    assert layer.lora_A.grad is None and layer.lora_B.grad is None
    layer.adapters_enabled = True
    assert not torch.equal(layer(x), linear)


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"bias": False}], ids=str
)
def test_a_disabled_adapter_costs_the_linear(options, device) -> None:
    """One call of F.linear, the operators of nn.Linear forward and backward, nothing more saved, no choice made."""
    layer = trained(device, BF16, backend="auto", **options)
    layer.adapters_enabled = False
    plain = nn.Linear(K, N, layer.bias is not None, device=device, dtype=BF16).requires_grad_(False)
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if name in ("weight", "bias")})
    found = []
    for module in (layer, plain):
        x = rows(device, BF16).requires_grad_()
        linears, saved = [], []
        with (
            mock.patch.object(F, "linear", lambda *a, f=F.linear, seen=linears: seen.append(a) or f(*a)),
            mock.patch.object(backends, "select", side_effect=AssertionError("a backend was chosen")),
            torch.autograd.graph.saved_tensors_hooks(lambda t, seen=saved: seen.append(t.shape) or t, lambda t: t),
            Calls() as calls,
        ):
            y = module(x)
            y.sum().backward()
        assert len(linears) == 1
        found.append((calls.names, saved))
    assert found[0] == found[1] and found[0][0]
    assert layer.last_backend is None


def test_a_scaling_in_a_tensor(device) -> None:
    """Read at each call; no part of the state, not moved with the layer, printed."""
    layer = trained(device, FP64)
    layer.scaling = torch.tensor(0.5, dtype=FP64, device=device)
    x = rows(device, FP64)
    for value in (0.5, -3.0):
        layer.scaling.fill_(value)
        want = eager_peft(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=value)
        assert relative_error(layer(x), want) < 1e-13
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert f"scaling={layer.scaling}" in repr(layer)
    twin = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert twin[0].scaling is twin[1].scaling is not layer.scaling
    layer.merge()
    layer.scaling.zero_()
    assert relative_error(layer(x), want) < 1e-13
    layer.unmerge()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.scaling = torch.tensor(1.0, device="meta")
    with pytest.raises(ValueError, match="scaling is on meta, x is on"):
        layer(x)
    layer.scaling = torch.ones(1, device=device)
    with pytest.raises(TypeError, match=r"scaling is a tensor with shape \(1,\)"):
        layer(x)


def test_a_scaling_changed_is_printed(device) -> None:
    layer = trained(device, lora_alpha=6)
    assert "scaling" not in repr(layer)
    layer.scaling = 0.25
    assert "lora_alpha=6, scaling=0.25" in repr(layer)


def test_backend_of_the_layer(device) -> None:
    layer = trained(device)
    assert layer.last_backend is None
    layer(rows(device))
    assert layer.last_backend == "reference"
    layer.backend = "abacus"
    with pytest.raises(ValueError, match="backend is 'abacus'"):
        layer(rows(device))
