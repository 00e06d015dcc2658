"""Which calls of PEFT's LoRA layers are fused: one rule, read afresh at each call."""

from collections.abc import Container, Iterator
from typing import Any

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, float32, nn
from torch.nn import Identity, Linear, Parameter
from torch.nn.modules.module import _has_any_global_hook

from ..dora import WITH_DROPOUT
from ..quantised import QuantisedWeight
from .rule import FORMATS, dropout_rate, hooked, is_one_of, name_of, tensors_reason, x_reason

# weight, bias, lora_A, lora_B, lora_bias, magnitude, scaling, dropout_p
Parts = tuple[
    Tensor | QuantisedWeight, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor, float
]


def parts_or_reason(layer: Any, x: Any, classes: Container[type]) -> Parts | str:
    """What the fused call of `layer` on x takes, or why the call stays PEFT's.

    x None leaves out what depends on it. `classes` are the layer's classes whose forward is known to be PEFT's.
    """
    kind = type(layer)
    if kind not in classes and not is_one_of(kind, classes):
        return f"it is a {name_of(kind)}, not exactly a peft.tuners.lora.Linear"
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

    if type(A) is not Linear or type(B) is not Linear:
        name, module = ("lora_B", B) if type(A) is Linear else ("lora_A", A)
        return f"{name} is a {name_of(type(module))}, not exactly an nn.Linear"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(base) is not Linear or type(weight) is not Parameter:
        weight = _quantised(layer, active, base, x)
        if isinstance(weight, str):
            return weight
    dropout_p = 0.0 if type(dropout) is Identity else dropout_rate(dropout)
    if isinstance(dropout_p, str):
        return dropout_p
    called: tuple[nn.Module, ...] = (base, A, B, dropout)

    lora_A, lora_B = A._parameters.get("weight"), B._parameters.get("weight")
    lora_bias = B._parameters.get("bias")
    magnitude = None
    if active in layer.lora_variant:
        if type(layer.lora_variant[active]) is not DoraLinearVariant:
            return f"lora_variant is {name_of(type(layer.lora_variant[active]))}"
        direction = modules["lora_magnitude_vector"]._modules[active]
        if type(direction) is not DoraLinearLayer:
            return f"lora_magnitude_vector is a {name_of(type(direction))}"
        if layer.fan_in_fan_out or lora_bias is not None or (_caches_norms() and not layer.training):
            return "DoRA with fan_in_fan_out, lora_bias or its cache of norms"
        if dropout_p and layer.training:
            return WITH_DROPOUT
        dropout_p = 0.0
        called = (*called, direction)
        magnitude = direction._parameters.get("weight")
        if type(magnitude) is not Parameter:
            return "lora_magnitude_vector's weight is no plain Parameter"

    module = hooked(called)  # a fused call goes past whatever happens when one of these is called
    if module is not None:
        name = next((name for name, m in _named(base, A, B, dropout) if m is module), "lora_magnitude_vector")
        return f"{name} has hooks or a forward of its own, as FSDP, offloading and ZeRO give it"
    if _has_any_global_hook():
        return "hooks for all modules are registered"

    if (bias is not None and type(bias) is not Parameter) or A._parameters.get("bias") is not None:
        return "base_layer's bias is no plain Parameter, or lora_A has one"
    if lora_bias is not None and type(lora_bias) is not Parameter:
        return "lora_B's bias is no plain Parameter"
    reason = tensors_reason(weight, lora_A, lora_B, scaling, (bias, lora_bias, magnitude))
    if reason is not None:
        return reason
    assert weight is not None and lora_A is not None and lora_B is not None
    param_dtype = lora_A.dtype
    if lora_bias is not None and lora_bias.dtype is not param_dtype:
        return f"lora_A has dtype {param_dtype}, lora_B another one"
    if magnitude is not None and magnitude.dtype is not param_dtype and magnitude.dtype is not float32:
        return f"lora_A has dtype {param_dtype}, lora_magnitude_vector {magnitude.dtype}"

    if x is not None:
        reason = x_reason(x, weight, param_dtype, bias)
        if reason is not None:
            return reason
        if param_dtype is not x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
            return f"casting of inputs is disabled, and lora_A has dtype {param_dtype}, x {x.dtype}"
    return weight, bias, lora_A, lora_B, lora_bias, magnitude, scaling, dropout_p


def _quantised(layer: Any, active: str, base: Any, x: Any) -> QuantisedWeight | str:
    """The quantised weight of the base layer, or why it is none that is known."""
    weight = base._parameters.get("weight")
    read = FORMATS.get(type(base)) or FORMATS.get(type(weight))
    if read is None:
        if type(base) is Linear:
            return f"base_layer's weight is no plain Parameter but a {name_of(type(weight))}"
        return f"base_layer is a {name_of(type(base))}, not exactly an nn.Linear"
    if torch.compiler.is_compiling():
        return "base_layer is quantised, under torch.compile"
    if active in layer.lora_variant:
        return "base_layer is quantised, and the adapter is a variant of LoRA"
    return read(base, x)


def _how_many(present: list[str]) -> str:
    return f"{len(present)} active adapters" if present else "no active adapter in this layer"


def _named(*given: Any) -> Iterator[tuple[str, Any]]:
    return zip(("base_layer", "lora_A", "lora_B", "lora_dropout"), given)


def _caches_norms() -> bool:
    return getattr(peft_dora, "ENABLE_DORA_CACHING", False)
