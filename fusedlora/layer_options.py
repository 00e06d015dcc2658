"""FusedLoRALinear's options: which values are taken, and the dtype of its adapter."""

import math
from numbers import Real

import torch
from torch import Tensor


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
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"r is {r!r}, must be an integer")
    if r < 1:
        raise ValueError(f"r is {r}, must be at least 1")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, must be a number")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha is {lora_alpha}, must be finite")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout is {lora_dropout}, must be in [0, 1)")
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
        raise TypeError(f"adapter_dtype is {adapter_dtype}, must be the weight's {weight.dtype} or torch.float32")
    return adapter_dtype


def with_lora_bias(bias: Tensor | None, lora_bias: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """bias + scaling · lora_bias [out_features] in float32, or in `dtype`, the weight's, where that is wider."""
    added = lora_bias.to(torch.promote_types(dtype, torch.float32)) * scaling
    return added if bias is None else bias + added
