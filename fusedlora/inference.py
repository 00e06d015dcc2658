"""The short way through a layer's forward where nothing needs a gradient: a generated token passes hundreds of layers.

A call that the kernels took is kept, one a layer. The next one with the same parameters and the same kind of x makes
its launch again, past the checks and choices, whose outcome is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends

if TYPE_CHECKING:
    from .linear import FusedLoRALinear

# Above this many rows the host's time is hidden behind the GPU's.
MOST_ROWS = 256

_kept: WeakKeyDictionary[FusedLoRALinear, _Kept] = WeakKeyDictionary()
_latest: WeakKeyDictionary[FusedLoRALinear, torch.Size] = WeakKeyDictionary()


class _Kept:
    """A call that can be repeated, and what must be the same for it. Merging must free a weight: none is held here."""

    def __init__(self, layer: FusedLoRALinear, x: Tensor, repeat: Any) -> None:
        self.parameters = [None if p is None else (ref(p), p.data_ptr()) for p in layer._parameters.values()]
        self.settings = _settings(layer)
        self.shape, self.dtype, self.index = x.shape, x.dtype, x.device.index
        self.y_shape = None if x.dim() == 2 else (*x.shape[:-1], layer.out_features)
        self.repeat = repeat

    def holds(self, layer: FusedLoRALinear, x: Tensor) -> bool:
        if x.shape != self.shape or x.dtype is not self.dtype or not _readable(x) or x.device.index != self.index:
            return False
        for now, then in zip(layer._parameters.values(), self.parameters):
            if now is None or then is None:
                if now is not then:
                    return False
            elif now is not then[0]() or now.data_ptr() != then[1]:
                return False
        if isinstance(layer.scaling, Tensor):  # comparing it would wait for the GPU
            return False
        stream: int = torch._C._cuda_getCurrentRawStream(self.index)
        return stream == self.repeat.stream and _settings(layer) == self.settings


def _settings(layer: FusedLoRALinear) -> tuple[Any, ...]:
    return layer.scaling, layer.backend, layer.training and layer.lora_dropout


def _readable(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_contiguous() and x.data_ptr() % 16 == 0 and not x.is_neg()


def _plain_call() -> bool:
    """Whether nothing watches or changes what is called: no gradients, modes, transforms, autocast or capture."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._cuda_isCurrentStreamCapturing()
    )


def repeat(layer: FusedLoRALinear, x: Tensor) -> Tensor | None:
    """y [..., out_features] of a call like the layer's last one, None where the long way has to be taken."""
    kept = _kept.get(layer)
    if kept is None or not _plain_call() or not kept.holds(layer, x):
        return None
    backends.last_used = "triton"
    y: Tensor = kept.repeat(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias)
    return y if kept.y_shape is None else y.view(kept.y_shape)


def keep(layer: FusedLoRALinear, x: Tensor) -> None:
    """To be called after a call that took the long way: the second of a kind makes the launch that can be repeated."""
    if backends.last_used != "triton" or not x.is_cuda or x.dim() == 0:
        return
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= MOST_ROWS or _latest.get(layer) != x.shape:
        _latest[layer] = x.shape
        return
    others = {name for name, p in layer._parameters.items() if p is not None} - {"weight", "bias", "lora_A", "lora_B"}
    if (
        others
        or (layer.training and layer.lora_dropout)
        or isinstance(layer.scaling, Tensor)
        or any(type(p) is not torch.nn.Parameter for p in layer._parameters.values() if p is not None)
        or not (layer.lora_A.is_contiguous() and layer.lora_B.is_contiguous())
        or not _readable(x)
        or not _plain_call()
    ):
        return
    from fusedlora.kernels.forward import lora_forward

    bound: list[Any] = []
    lora_forward(
        x.view(rows, -1),
        layer.weight,
        layer.lora_A,
        layer.lora_B,
        layer.bias,
        scaling=layer.scaling,
        adapter_dtype=torch.promote_types(x.dtype, layer.lora_A.dtype),
        save_s=False,
        one_launch=backends._one_launch(x.device),
        bind=bound,
    )
    _kept[layer] = _Kept(layer, x, bound[0])
