"""What moves with a module when another takes its place, and the hooks that apply_lora leaves on a model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fusedlora.linear import FusedLoRALinear

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_CARRIED = "_carried"


def carry(old: nn.Module, new: nn.Module, attributes: Iterable[str]) -> None:
    """Give `new` the hooks of `old` and the named attributes of its instance.

    The hook tables themselves are shared, so that a handle from before still removes its hook.
    """
    for table in _HOOKS:
        theirs, own = old.__dict__[table], new.__dict__[table]
        new.__dict__[table] = theirs if not own else type(own)({**own, **theirs})
    new.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]
    for name in attributes:
        new.__dict__[name] = old.__dict__[name]
    if "_hf_hook" in old.__dict__:
        # accelerate's wrapper takes the module as its first argument and finds the rest through its attributes.
        new.__dict__["_hf_hook"] = old.__dict__["_hf_hook"]
        new.__dict__["_old_forward"] = inner = new.forward
        wrapped = functools.partial(old.__dict__["forward"].func, new)
        new.__dict__["forward"] = functools.update_wrapper(wrapped, inner)


def carry_in(old: nn.Linear, new: FusedLoRALinear) -> None:
    """`carry` from a plain linear, with every attribute that was set on it."""
    names = [n for n in old.__dict__ if n not in new.__dict__ and n not in ("forward", "_hf_hook", "_old_forward")]
    carry(old, new, names)
    new.__dict__[_CARRIED] = tuple(names)


def carry_out(old: FusedLoRALinear, new: nn.Linear) -> None:
    """`carry` back to a plain linear, with the attributes that `carry_in` brought."""
    carry(old, new, old.__dict__.get(_CARRIED, ()))


def rebind(module: nn.Module) -> None:
    """Point hooks that hold their module (a weak reference to the one replaced) at `module`."""
    for table in _HOOKS:
        for hook in module.__dict__[table].values():
            if getattr(hook, "with_module", False):
                hook.module = weakref.ref(module)


class InputGradients:
    """Forward hook of an input embedding: its output requires a gradient while activation checkpointing is on.

    A frozen embedding's output has none, and a reentrant checkpoint then cuts the graph. Looks at the model's
    `gradient_checkpointing` flags at every call, so it follows when checkpointing is turned on or off later. A class,
    not a closure: a deep copy of the model then looks at its own flags.
    """

    def __init__(self, flagged: list[nn.Module]) -> None:
        self.flagged = flagged

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return  # only the other kind of checkpoint compiles, and requires_grad_ would break the graph
        if not torch.is_grad_enabled() or not any(m.gradient_checkpointing and m.training for m in self.flagged):
            return
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.requires_grad_(True)


class FastPathGuard:
    """Forward pre-hook of a TransformerEncoderLayer that was let in because the fused inference path was off.

    Raises where it is on again: that path reads the weights past the adapters.
    """

    def __init__(self, layers: list[FusedLoRALinear]) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training or not torch.backends.mha.get_fastpath_enabled():
            return
        if not all(layer.merged for layer in self.layers):
            raise RuntimeError(
                "torch.backends.mha's fast path was turned on after apply_lora: TransformerEncoderLayer would ignore "
                "the adapters of its linears; call torch.backends.mha.set_fastpath_enabled(False) or merge_lora(model)"
            )


def drop_hooks(model: nn.Module) -> None:
    """Remove what apply_lora registered on `model`."""
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in table.items() if isinstance(hook, (InputGradients, FastPathGuard))]:
                del table[key]
