"""What the rules of the libraries share: which modules, tensors and x a fused call takes the place of."""

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, float32, nn, strided
from torch.autograd import forward_ad
from torch.nn import Dropout, Identity, Parameter

from ..autocast import autocast_dtype
from ..quantised import QuantisedWeight

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# By the class of a base linear or of its weight: (base, x or None) -> its quantised weight, or why it is not taken.
FORMATS: dict[type, Callable[[Any, Tensor | None], QuantisedWeight | str]] = {}


_WEIGHTS = (Parameter, QuantisedWeight)


def dropout_rate(dropout: nn.Module) -> float | str:
    """The rate of a dropout module of the adapter here and now, or why it is none that a fused call knows."""
    if type(dropout) is Dropout:
        if not dropout.training:
            return 0.0
        return f"lora_dropout is {dropout}" if dropout.inplace or not 0.0 <= dropout.p < 1.0 else dropout.p
    return 0.0 if type(dropout) is Identity else f"lora_dropout is a {name_of(type(dropout))}"


def hooked(modules: Iterable[nn.Module]) -> nn.Module | None:
    """The first one whose call does more than its class says; a fused call goes past that."""
    for module in modules:
        if (
            module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_pre_hooks
            or module._backward_hooks
            or "forward" in module.__dict__
        ):
            return module
    return None


def tensors_reason(
    weight: Any, lora_A: Any, lora_B: Any, scaling: Any, vectors: Iterable[Tensor | None] = ()
) -> str | None:
    """Why these are not a layer's tensors as lora_linear takes them. `vectors` lie along out_features."""
    if type(weight) not in _WEIGHTS or type(lora_A) is not Parameter or type(lora_B) is not Parameter:
        given = zip(("base_layer", "lora_A", "lora_B"), (weight, lora_A, lora_B))
        name, tensor = next(pair for pair in given if type(pair[1]) not in _WEIGHTS)
        return f"{name}'s weight is no plain Parameter but a {name_of(type(tensor))}"
    if len(weight.shape) != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        return "a weight is not 2-d, as a partitioned one (ZeRO-3) is not"
    (N, K), r = weight.shape, lora_A.shape[0]
    if lora_A.shape[1] != K or lora_B.shape != (N, r) or not (r and N and K):
        return f"the shapes of weight {(N, K)}, lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)} do not fit"
    if type(weight) is Parameter and weight.layout is not strided:
        return f"weight has layout {weight.layout}"
    device, dtype, param_dtype = weight.device, weight.dtype, lora_A.dtype
    if device.type == "meta":
        return "the weight is on the meta device"
    if dtype not in FLOATS or param_dtype not in FLOATS:
        return f"weight has dtype {dtype}, lora_A {param_dtype}"
    if lora_A.device != device or lora_B.device != device:
        return f"the weight is on {device}, lora_A on {lora_A.device}, lora_B on {lora_B.device}"
    for vector in vectors:
        if vector is not None and (vector.device != device or vector.shape != (N,)):
            return f"a bias or the magnitude is on {vector.device}, of shape {tuple(vector.shape)}"
    if lora_B.dtype is not param_dtype:
        return f"lora_A has dtype {param_dtype}, lora_B another one"
    if not isinstance(scaling, (float, int)) and not (
        type(scaling) is Tensor
        and scaling.dim() == 0
        and scaling.is_floating_point()
        and scaling.device == device
        and not scaling.requires_grad
    ):
        return f"scaling is a {name_of(type(scaling))}, not a number or a floating 0-d tensor beside the weight"
    return None


def x_reason(x: Any, weight: Tensor | QuantisedWeight, param_dtype: torch.dtype, bias: Tensor | None) -> str | None:
    """Why a call on this x, here and now, is none of lora_linear's; adapters in fp32 may have a narrower x."""
    K, weight_dtype, device = weight.shape[1], weight.dtype, weight.device
    if type(x) is not Tensor and type(x) is not Parameter:
        return f"x is a {name_of(type(x))}"
    if x.layout is not strided or x.dim() == 0 or x.shape[-1] != K:
        if x.layout is not strided:
            return f"x has layout {x.layout}"
        return f"x has shape {tuple(x.shape)}, which does not end in in_features {K}"
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
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return "a torch.func transform or forward-mode AD is active"
        if torch._C._get_tracing_state() is not None:
            return "torch.jit is tracing"
    # not is_exporting(), which is true in all that torch 2.11 compiles
    elif getattr(torch.compiler, "_is_exporting_flag", False):
        return "the model is being exported"
    return None


def is_one_of(kind: type, classes: Container[type]) -> bool:
    """Whether `kind` is one of the classes, or what fully_shard made of one: its hooks lie on the layer itself."""
    if kind in classes:
        return True
    bases = kind.__bases__
    return len(bases) == 2 and bases[1] in classes and bases[0].__name__ == "FSDPModule"


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
