"""The fused forward of layers that hold lora_A, lora_B, a scaling and a merged flag themselves.

loralib's Linear and litgpt's LoRALinear are such layers; they differ in where the base weight is.
"""

from collections import Counter
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from ..autocast import autocast_dtype
from ..functional import lora_linear
from ..wrappers import require_module
from .rule import dropout_rate, hooked, is_one_of, name_of, tensors_reason, x_reason

_Model = TypeVar("_Model", bound=nn.Module)

# weight, bias, lora_A, lora_B, scaling, dropout_p
Parts = tuple[Tensor, Tensor | None, Tensor, Tensor, float, float]


class Swap:
    """A library's layer class and its subclass here, whose forward is `forward`.

    Args:
        stock: the library's class.
        fused: a subclass of it that changes its forward alone.
        base: the name of the child that is the base linear; "" where the layer is the linear itself.

    `calls` counts calls in this process by "fused" or by the reason against it; not compiled ones.
    """

    def __init__(self, stock: type[nn.Module], fused: type[nn.Module], base: str) -> None:
        self.stock, self.fused, self.base = stock, fused, base
        self.calls: Counter[str] = Counter()

    def fuse(self, model: _Model) -> _Model:
        require_module(model)
        classes = (self.stock, self.fused)
        layers = [module for module in model.modules() if type(module) in classes]
        if not layers:
            raise ValueError(f"model is a {type(model).__name__} without a {name_of(self.stock)}: nothing to fuse")
        for layer in layers:
            layer.__class__ = self.fused
        return model

    def unfuse(self, model: _Model) -> _Model:
        for name, module in model.named_modules():
            if type(module) is self.fused:
                module.__class__ = self.stock
            elif isinstance(module, self.fused):
                raise RuntimeError(f"{name} is a {type(module).__name__}: unfuse before fully_shard")
        return model

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """The fused call where the rule allows it, else the library's own."""
        found = self._parts_or_reason(layer, x)
        eager = not torch.compiler.is_compiling()
        if isinstance(found, str):
            if eager:
                self.calls[found] += 1
            stock: Tensor = self.stock.forward(layer, x)
            return stock
        weight, bias, lora_A, lora_B, scaling, dropout_p = found
        if eager:
            self.calls["fused"] += 1
        return lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p)

    def why_not(self, layer: nn.Module, x: Tensor | None) -> str | None:
        if type(layer) is self.stock:
            return "fuse(model) has not been called"
        if "forward" in layer.__dict__:
            return "the layer has a forward of its own"
        found = self._parts_or_reason(layer, x)
        return found if isinstance(found, str) else None

    def _parts_or_reason(self, layer: Any, x: Tensor | None) -> Parts | str:
        if not is_one_of(type(layer), (self.fused,)):
            return f"it is a {name_of(type(layer))}, not exactly a {name_of(self.stock)}"
        if layer.r == 0:
            return "r is 0: it has no adapter"
        if layer.merged:
            return "the adapter is merged into the weight"
        if getattr(layer, "fan_in_fan_out", False):
            return "fan_in_fan_out: its weight is [in_features, out_features]"
        base = layer
        called: list[nn.Module] = []
        if self.base:
            base = layer._modules[self.base]
            if type(base) is not nn.Linear:
                return f"{self.base} is a {name_of(type(base))}, not exactly an nn.Linear"
            called.append(base)
        dropout, dropout_p = layer.lora_dropout, 0.0
        if isinstance(dropout, nn.Module):
            rate = dropout_rate(dropout)
            if isinstance(rate, str):
                return rate
            dropout_p = rate
            called.append(dropout)
        elif type(dropout) is not FunctionType or dropout.__module__ != self.stock.__module__:
            return f"lora_dropout is {dropout!r}, neither a module nor the library's own identity"
        module = hooked(called)
        if module is not None:
            return f"the layer's {type(module).__name__} has hooks or a forward of its own"
        if called and _has_any_global_hook():
            return "hooks for all modules are registered"

        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        lora_A, lora_B = layer._parameters.get("lora_A"), layer._parameters.get("lora_B")
        reason = tensors_reason(weight, lora_A, lora_B, layer.scaling, (bias,))
        if reason is None and bias is not None and type(bias) is not Parameter:
            reason = "the bias is no plain Parameter"
        if reason is None and x is not None:
            reason = x_reason(x, weight, lora_A.dtype, bias)
            if reason is None and lora_A.dtype is not x.dtype and autocast_dtype(x) is None:
                reason = f"lora_A has dtype {lora_A.dtype}, x {x.dtype}, and autocast is off"
        return reason or (weight, bias, lora_A, lora_B, layer.scaling, dropout_p)
