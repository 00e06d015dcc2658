"""The weight with the adapter in it, and where a merged layer's base weight waits for unmerge()."""

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .calls import float32_precision


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """W + scaling · lora_B lora_A in W's dtype, accumulated in float32 or wider; with a magnitude [N] DoRA's.

    That is g ∘ (W + scaling · lora_B lora_A), g = magnitude / norm of each row, the norm rounded as in forward.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    if float32_precision() == "highest":
        merged = torch.addmm(weight.to(wide), lora_B, lora_A, alpha=scaling)
    else:  # a matmul might round its operands to tf32
        merged = weight.to(wide, copy=True)
        for column, row in zip(lora_B.t(), lora_A):
            merged.addr_(column, row, alpha=scaling)
    if magnitude is not None:
        norm = torch.linalg.vector_norm(merged, dim=1).to(magnitude.dtype)
        merged.mul_((magnitude.to(wide) / norm.to(wide)).unsqueeze(1))
    return merged.to(weight.dtype)


class KeptWeight:
    """The base weight of a merged layer. A class of its own, so that no module registers it as a parameter."""

    def __init__(self, parameter: nn.Parameter, keep: Literal["cpu", "device"]) -> None:
        self.keep = keep
        self.requires_grad = parameter.requires_grad
        self.original: weakref.ref[nn.Parameter] | None = None
        if keep == "cpu" and parameter.device.type != "cpu":
            self.weight = parameter.detach().to("cpu")
            # so that a weight shared with another module is shared again afterwards
            self.original = weakref.ref(parameter)
        else:
            self.weight = parameter

    def restore(self, like: Tensor) -> nn.Parameter:
        """The parameter to put back, on the device and in the dtype of `like`."""
        shared = None if self.original is None else self.original()
        base = self.weight if shared is None else shared
        if base.device != like.device or base.dtype != like.dtype:
            base = self.weight.detach().to(like.device, like.dtype)
        return base if isinstance(base, nn.Parameter) else nn.Parameter(base, self.requires_grad)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the layer in .to(), .half() and their like."""
        moved = fn(self.weight)
        if moved is not self.weight:
            self.weight = nn.Parameter(moved, self.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "original": None}  # a copy shares nothing with the original's owners
