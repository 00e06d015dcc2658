"""Which calls of a peft.tuners.lora.Linear are fused: one rule, read afresh at each call."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, float32, nn, strided
from torch.autograd import forward_ad
from torch.nn import Dropout, Identity, Linear, Parameter
from torch.nn.modules.module import _has_any_global_hook

from ..backends import autocast_dtype
from ..dora import WITH_DROPOUT

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# weight, bias, lora_A, lora_B, lora_bias, magnitude, scaling, dropout_p
Parts = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor, float]


def parts_or_reason(layer: Any, x: Any, classes: tuple[type, ...]) -> Parts | str:
    """What the fused call of `layer` on x takes, or why the call stays PEFT's.

    x None leaves out what depends on it. `classes` are the layer's classes whose forward is known to be PEFT's.
    """
    kind = type(layer)
    if kind not in classes and not _fsdp_unit(kind, classes):
        return f"it is a {_name(kind)}, not exactly a peft.tuners.lora.Linear"
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged into the weight"
    modules = layer._modules
    adapters = modules["lora_A"]._modules
    active = layer._active_adapter
    if type(active) is not str:
        present = [name for name in active if name in adapters]
        if len(present) != 1:
            return _how_many(present)
        active = present[0]
    elif active not in adapters:
        return _how_many([])
    base = modules["base_layer"]
    A = adapters[active]
    B = modules["lora_B"]._modules[active]
    dropout = modules["lora_dropout"]._modules[active]
    scaling = layer.scaling[active]

    if type(base) is not Linear or type(A) is not Linear or type(B) is not Linear:
        name, module = next(pair for pair in _named(base, A, B) if type(pair[1]) is not Linear)
        return f"{name} is a {_name(type(module))}, not exactly an nn.Linear"
    dropout_p = 0.0
    if type(dropout) is Dropout:
        if dropout.training:
            dropout_p = dropout.p
            if dropout.inplace or not 0.0 <= dropout_p < 1.0:
                return f"lora_dropout is {dropout}"
    elif type(dropout) is not Identity:
        return f"lora_dropout is a {_name(type(dropout))}"
    called: tuple[nn.Module, ...] = (base, A, B, dropout)

    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    lora_A, lora_B = A._parameters.get("weight"), B._parameters.get("weight")
    lora_bias = B._parameters.get("bias")
    magnitude = None
    if active in layer.lora_variant:
        if type(layer.lora_variant[active]) is not DoraLinearVariant:
            return f"lora_variant is {_name(type(layer.lora_variant[active]))}"
        direction = modules["lora_magnitude_vector"]._modules[active]
        if type(direction) is not DoraLinearLayer:
            return f"lora_magnitude_vector is a {_name(type(direction))}"
        if layer.fan_in_fan_out or lora_bias is not None or (_caches_norms() and not layer.training):
            return "DoRA with fan_in_fan_out, lora_bias or its cache of norms"
        if dropout_p and layer.training:
            return WITH_DROPOUT
        dropout_p = 0.0
        called = (*called, direction)
        magnitude = direction._parameters.get("weight")
        if type(magnitude) is not Parameter:
            return "lora_magnitude_vector's weight is no plain Parameter"

    for module in called:  # a fused call goes past whatever happens when one of these is called
        if (
            module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_pre_hooks
            or module._backward_hooks
            or "forward" in module.__dict__
        ):
            name = next((name for name, m in _named(base, A, B, dropout) if m is module), "lora_magnitude_vector")
            return f"{name} has hooks or a forward of its own, as FSDP, offloading and ZeRO give it"
    if _has_any_global_hook():
        return "hooks for all modules are registered"

    if type(weight) is not Parameter or type(lora_A) is not Parameter or type(lora_B) is not Parameter:
        name, tensor = next(pair for pair in _named(weight, lora_A, lora_B) if type(pair[1]) is not Parameter)
        return f"{name}'s weight is no plain Parameter but a {_name(type(tensor))}"
    if (bias is not None and type(bias) is not Parameter) or A._parameters.get("bias") is not None:
        return "base_layer's bias is no plain Parameter, or lora_A has one"
    if lora_bias is not None and type(lora_bias) is not Parameter:
        return "lora_B's bias is no plain Parameter"
    if weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        return "a weight is not 2-d, as a partitioned one (ZeRO-3) is not"
    (N, K), r = weight.shape, lora_A.shape[0]
    if lora_A.shape[1] != K or lora_B.shape != (N, r) or not (r and N and K):
        return f"the shapes of weight {(N, K)}, lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)} do not fit"
    if weight.layout is not strided:
        return f"weight has layout {weight.layout}"
    device, dtype, param_dtype = weight.device, weight.dtype, lora_A.dtype
    if device.type == "meta":
        return "the weight is on the meta device"
    if dtype not in FLOATS or param_dtype not in FLOATS:
        return f"weight has dtype {dtype}, lora_A {param_dtype}"
    if lora_A.device != device or lora_B.device != device:
        return f"the weight is on {device}, lora_A on {lora_A.device}, lora_B on {lora_B.device}"
    for vector in (bias, lora_bias, magnitude):
        if vector is not None and (vector.device != device or vector.shape != (N,)):
            return f"a bias or the magnitude is on {vector.device}, of shape {tuple(vector.shape)}"
    if lora_B.dtype is not param_dtype or (lora_bias is not None and lora_bias.dtype is not param_dtype):
        return f"lora_A has dtype {param_dtype}, lora_B another one"
    if magnitude is not None and magnitude.dtype is not param_dtype and magnitude.dtype is not float32:
        return f"lora_A has dtype {param_dtype}, lora_magnitude_vector {magnitude.dtype}"
    if not isinstance(scaling, (float, int)) and not (
        type(scaling) is Tensor
        and scaling.dim() == 0
        and scaling.is_floating_point()
        and scaling.device == device
        and not scaling.requires_grad
    ):
        return f"scaling is a {_name(type(scaling))}, not a number or a floating 0-d tensor beside the weight"

    if x is not None and (reason := _x_reason(layer, x, K, dtype, device, param_dtype, bias)) is not None:
        return reason
    return weight, bias, lora_A, lora_B, lora_bias, magnitude, scaling, dropout_p


def _x_reason(
    layer: Any,
    x: Any,
    K: int,
    weight_dtype: torch.dtype,
    device: torch.device,
    param_dtype: torch.dtype,
    bias: Tensor | None,
) -> str | None:
    if type(x) is not Tensor and type(x) is not Parameter:
        return f"x is a {_name(type(x))}"
    if x.layout is not strided or x.dim() == 0 or x.shape[-1] != K:
        return f"x has layout {x.layout} or does not end in in_features {K}"
    if x.device != device:
        return f"x is on {x.device}, the weight on {device}"
    dtype = x.dtype
    autocast = autocast_dtype(x)
    if autocast is None:
        if dtype is not weight_dtype:
            return f"x has dtype {dtype}, the weight {weight_dtype}, and autocast is off"
        if param_dtype is not dtype and param_dtype is not float32:
            return f"lora_A has dtype {param_dtype}, x {dtype}"
        if bias is not None and bias.dtype is not dtype:
            return f"x has dtype {dtype}, base_layer's bias {bias.dtype}, and autocast is off"
    else:
        if dtype not in FLOATS or torch.float64 in (dtype, weight_dtype, param_dtype):
            return f"x has dtype {dtype}, the weight {weight_dtype}, lora_A {param_dtype}, under autocast"
        if param_dtype is not dtype and param_dtype is not float32 and param_dtype is not autocast:
            return f"lora_A has dtype {param_dtype}, x {dtype}, under autocast to {autocast}"
    if param_dtype is not dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return f"casting of inputs is disabled, and lora_A has dtype {param_dtype}, x {dtype}"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return "a torch.func transform or forward-mode AD is active"
        if torch._C._get_tracing_state() is not None:
            return "torch.jit is tracing"
    elif torch.compiler.is_exporting():
        return "the model is being exported"
    return None


def _fsdp_unit(kind: type, classes: tuple[type, ...]) -> bool:
    """Whether fully_shard made this class of one of `classes`: its hooks lie on the layer itself."""
    bases = kind.__bases__
    return len(bases) == 2 and bases[1] in classes and bases[0].__name__ == "FSDPModule"


def _how_many(present: list[str]) -> str:
    return f"{len(present)} active adapters" if present else "no active adapter in this layer"


def _named(*given: Any) -> Iterator[tuple[str, Any]]:
    return zip(("base_layer", "lora_A", "lora_B", "lora_dropout"), given)


def _caches_norms() -> bool:
    return getattr(peft_dora, "ENABLE_DORA_CACHING", False)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
