"""The door of lora_linear and dora_linear: which tensors and settings go together."""

from typing import Any

import torch
from torch import Tensor

from .autocast import cast
from .backends import NAMES
from .layer_options import SCALING, check_number, or_float32


def admit(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    *,
    scaling: float | Tensor,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype]:
    """The tensors as the ops take them, autocast applied and checked, and the dtype of the adapter's products."""
    try:
        x, weight, lora_A, lora_B, bias, autocast = cast(x, weight, lora_A, lora_B, bias)
        adapter_dtype = check(x, weight, lora_A, lora_B, bias, autocast, dropout_p, backend)
    except Exception:
        check_types({"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}, bias, scaling, dropout_p, backend)
        raise
    if isinstance(scaling, Tensor):
        check_scaling(scaling, x)
    else:
        check_number("scaling", scaling, SCALING)
    return x, weight, lora_A, lora_B, bias, adapter_dtype


def check_types(tensors: dict[str, Any], bias: Any, scaling: Any, dropout_p: Any, backend: Any) -> None:
    """Raises TypeError where one of `tensors`, by name, is no tensor, or another argument is not of its type.

    Asked only after a call has failed, as with a wrong type it does: a call that has been planned has no time for it.
    """
    for name, value in (*tensors.items(), ("bias", bias)):
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            raise TypeError(f"{name} is {_shown(value)}, must be a tensor{' or None' if name == 'bias' else ''}")
    _check_layout(tensors["x"])
    if not isinstance(scaling, Tensor):
        check_number("scaling", scaling, SCALING)
    check_number("dropout_p", dropout_p)
    _check_backend(backend)


def _check_backend(backend: Any) -> None:
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(NAMES)}")


def _shown(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, bool) else f"a {type(value).__name__}"


def _check_layout(x: Tensor) -> None:
    if x.is_nested or x.layout is not torch.strided:
        found = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise TypeError(f"x {found}, must be one dense tensor (torch.strided)")


def check(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    autocast: torch.dtype | None,
    dropout_p: float,
    backend: str,
) -> torch.dtype:
    """The dtype of the adapter's products. Raises TypeError and ValueError that name the argument and the rule."""
    dtype, param_dtype = x.dtype, lora_A.dtype
    _check_layout(x)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"x has dtype {dtype}, must be floating point of 16 bits or more")
    if x.dim() == 0:
        raise ValueError("x has 0 dimensions, must be [..., in_features]")
    shape_W, shape_A, shape_B = weight.shape, lora_A.shape, lora_B.shape
    if not len(shape_W) == len(shape_A) == len(shape_B) == 2:
        name, shape = next(
            (n, s) for n, s in (("weight", shape_W), ("lora_A", shape_A), ("lora_B", shape_B)) if len(s) != 2
        )
        hint = ": a partitioned parameter (ZeRO-3) is gathered by calling its module" if shape == (0,) else ""
        raise ValueError(f"{name} has shape {tuple(shape)}, must have 2 dimensions{hint}")
    N, K = shape_W
    r = shape_A[0]
    if r < 1 or N < 1 or K < 1:
        name, value = min(("r", r), ("out_features", N), ("in_features", K), key=lambda pair: pair[1])
        raise ValueError(f"{name} is {value}, must be at least 1")
    if x.shape[-1] != K:
        raise ValueError(f"weight has in_features {K}, x has {x.shape[-1]}")
    if shape_A[1] != K:
        raise ValueError(f"lora_A has in_features {shape_A[1]}, x has {K}")
    if shape_B[1] != r:
        raise ValueError(f"lora_B has rank {shape_B[1]}, lora_A has {r}")
    if shape_B[0] != N:
        raise ValueError(f"lora_B has out_features {shape_B[0]}, weight has {N}")
    if weight.dtype is not dtype:
        wide = torch.float64 in (dtype, weight.dtype)
        rule = "equal under autocast too, which leaves float64 as it is" if wide else "equal outside autocast"
        raise TypeError(f"weight has dtype {weight.dtype}, x has {dtype}: they must be {rule}")
    if param_dtype is not dtype and param_dtype is not torch.float32:
        raise TypeError(f"lora_A has dtype {param_dtype}, must be {or_float32('x', dtype)}")
    if lora_B.dtype is not param_dtype:
        raise TypeError(f"lora_B has dtype {lora_B.dtype}, lora_A has {param_dtype}: they must be equal")
    device = x.device
    if weight.device != device or lora_A.device != device or lora_B.device != device:
        found = f"weight is on {weight.device}, lora_A on {lora_A.device}, lora_B on {lora_B.device}"
        raise ValueError(f"x is on {device}, {found}: they must be on one device")
    if bias is not None:
        if bias.shape != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, must be ({N},)")
        if bias.dtype is not dtype and not (bias.dtype is torch.float32 and dtype.itemsize == 2):
            or_fp32 = " or torch.float32" if dtype.itemsize == 2 else ""
            raise TypeError(f"bias has dtype {bias.dtype}, must be x's {dtype}{or_fp32}")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device}, x is on {device}: they must be on one device")
    check_number("dropout_p", dropout_p)  # a tensor would make a plan for each call
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, must be in [0, 1) (in a layer it is lora_dropout)")
    _check_backend(backend)
    if autocast is not None:
        return autocast
    return dtype if param_dtype is dtype else torch.promote_types(dtype, param_dtype)


def check_magnitude(magnitude: Any, weight: Tensor, param_dtype: torch.dtype) -> None:
    """As `check`, for DoRA's magnitude [out_features] beside a weight that has passed; param_dtype: lora_A's own."""
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"magnitude is {_shown(magnitude)}, must be a tensor")
    if magnitude.shape != (weight.shape[0],):
        raise ValueError(f"magnitude has shape {tuple(magnitude.shape)}, must be ({weight.shape[0]},)")
    if magnitude.dtype is not param_dtype and magnitude.dtype is not torch.float32:
        raise TypeError(f"magnitude has dtype {magnitude.dtype}, must be {or_float32('lora_A', param_dtype)}")
    if magnitude.device != weight.device:
        raise ValueError(f"magnitude is on {magnitude.device}, x is on {weight.device}: they must be on one device")


def check_scaling(scaling: Tensor, x: Tensor) -> None:
    """As `check`, for the factor that is read on the device."""
    if scaling.requires_grad:
        raise TypeError("scaling requires a gradient, must not: none would reach it")
    if scaling.dim() != 0 or not scaling.is_floating_point():
        found = f"shape {tuple(scaling.shape)} and dtype {scaling.dtype}"
        raise TypeError(f"scaling is a tensor with {found}, must be {SCALING}")
    if scaling.device != x.device:
        raise ValueError(f"scaling is on {scaling.device}, x is on {x.device}: they must be on one device")
