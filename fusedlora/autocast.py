"""What autocast casts lora_linear's tensors to, and how it is kept from casting what has been cast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts a floating tensor on this one's device to, None where it is off."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from casting what lora_linear has already put in the right dtype."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def cast(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype | None]:
    """The tensors as autocast gives them, and the dtype that it casts to; None where it is off or x is float64.

    What is float32 in the adapter or the bias stays: the backends round it themselves.
    """
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype is torch.float64:
        return x, weight, lora_A, lora_B, bias, None
    if bias is not None and bias.dtype is not torch.float32:
        bias = _cast(bias, dtype)
    if lora_A.dtype is not torch.float32:
        lora_A, lora_B = _cast(lora_A, dtype), _cast(lora_B, dtype)
    return _cast(x, dtype), _cast(weight, dtype), lora_A, lora_B, bias, dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: floating tensors, but not float64 ones."""
    own = tensor.dtype
    if own is dtype or own is torch.float64 or not own.is_floating_point:
        return tensor
    return tensor.to(dtype)
