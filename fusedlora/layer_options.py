"""FusedLoRALinear's options: which values are taken, and the dtype of its adapter. The rules for single numbers."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

SCALING = "a number or a floating point tensor of 0-d"


def check_number(name: str, value: Any, rule: str = "a number") -> None:
    """Raises TypeError unless `value` is a real number, as True and False are; `rule` says what it must be."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, must be {rule}")


def _check_option(name: str, value: Any) -> None:
    check_number(name, value)
    if isinstance(value, bool):  # a flag in the wrong place
        raise TypeError(f"{name} is {value!r}, must be a number")


def or_float32(owner: str, dtype: torch.dtype) -> str:
    """The dtypes that a parameter of the adapter may have, in words: `owner`'s and float32, each once."""
    return f"{owner}'s {dtype}" + ("" if dtype is torch.float32 else " or torch.float32")


def check_size(name: str, value: Any) -> None:
    """Raises TypeError and ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, must be an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}, must be at least 1")


def check_finite(name: str, value: Any) -> None:
    """Raises TypeError and ValueError unless `value` is a finite number."""
    _check_option(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, must be finite")


def check_rate(name: str, value: Any) -> None:
    """Raises TypeError and ValueError unless `value` is a number in [0, 1)."""
    _check_option(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value}, must be in [0, 1)")


def check_options(
    weight: Tensor,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool,
    use_dora: bool,
    lora_bias: bool,
    adapter_dtype: torch.dtype | None,
) -> torch.dtype:
    """The adapter's dtype over `weight`. Raises TypeError and ValueError with the option's name, value and rule."""
    check_size("r", r)
    check_finite("lora_alpha", lora_alpha)
    check_rate("lora_dropout", lora_dropout)
    for name, flag in (("use_rslora", use_rslora), ("use_dora", use_dora), ("lora_bias", lora_bias)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r}, must be True or False")
    if lora_bias and use_dora:
        raise ValueError("lora_bias is True, must be False with use_dora: DoRA's direction has no bias")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}, must be floating point")
    if adapter_dtype is None:
        return torch.promote_types(weight.dtype, torch.float32)
    if adapter_dtype not in (weight.dtype, torch.float32):
        raise TypeError(f"adapter_dtype is {adapter_dtype}, must be {or_float32('the weight', weight.dtype)}")
    return adapter_dtype


def with_lora_bias(bias: Tensor | None, lora_bias: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """bias + scaling · lora_bias [out_features] in float32, or in `dtype`, the weight's, where that is wider."""
    try:
        added = lora_bias.to(torch.promote_types(dtype, torch.float32)) * scaling
    except TypeError:
        check_number("scaling", scaling, SCALING)
        raise
    return added if bias is None else bias + added
