"""A user's model and its modules' names, past what other libraries wrap around them."""

from __future__ import annotations

from typing import Any

from torch import nn

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def require_module(model: Any) -> None:
    """Raises TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}, must be a torch.nn.Module")


def uncompiled(model: Any) -> Any:
    """What torch.compile has wrapped."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside torch.compile's and DistributedDataParallel's wrappers; TypeError for no module."""
    require_module(model)
    model = uncompiled(model)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = uncompiled(model.module)
    return model


def clean(name: str) -> str:
    """`name` without what torch.compile, checkpoint_wrapper and FSDP1 put between a block's name and its children."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of `model` once, by its clean name."""
    return {clean(name): module for name, module in model.named_modules()}
