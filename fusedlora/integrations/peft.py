"""fusedlora as the backend of PEFT: three doors to one forward for `peft.tuners.lora.Linear`.

    fuse(model)        the LoRA layers of a model that exists; unfuse(model) takes it back
    register(config)   those that PEFT makes from this LoraConfig
    enable()           all of this process, now and later, until disable(); also `with enable():`

The forward decides at each call, by the one rule of `why_not`, between lora_linear or dora_linear and PEFT's own
forward, which then runs untouched. Parameters, names, checkpoints and every other method stay PEFT's. `report(model)`
tells what is fused. Differences that are left: a fused layer can be differentiated only once (no double backward);
dropout draws another mask from the same seed; the x of a layer must not be changed in place before backward, also
where PEFT would have kept a copy in the adapter's dtype.
"""

import threading
from collections import Counter
from types import TracebackType
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as StockLinear
from peft.tuners.lora.layer import LoraLayer, dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import backends
from ..dora import dora_linear
from ..functional import lora_linear
from ..layer_options import with_lora_bias
from .peft_report import Report, make_report
from .peft_rule import parts_or_reason

_Model = TypeVar("_Model", bound=nn.Module)
_Class: Any = StockLinear  # whose forward is assigned to

_stock_forward: Any = StockLinear.forward
_LAST = "_fusedlora_last"  # in a layer's __dict__: the backend of its last fused call, or (reason,) after a stock one

# Calls so far in this process, by "fused" or by the reason against it. Compiled calls are not counted; calls in
# several threads at once may be lost.
calls: Counter[str] = Counter()


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in_features] -> [..., out_features]: the fused call where the rule allows it, else PEFT's forward."""
    found = "the call has extra arguments" if args or kwargs else parts_or_reason(self, x, CLASSES)
    eager = not torch.compiler.is_compiling()
    if isinstance(found, str):
        if eager:
            self.__dict__[_LAST] = (found,)
            calls[found] += 1
        stock: Tensor = _stock_forward(self, x, *args, **kwargs)
        return stock
    weight, bias, lora_A, lora_B, lora_bias, magnitude, scaling, dropout_p = found
    if lora_bias is not None:
        bias = with_lora_bias(bias, lora_bias, scaling, weight.dtype)
    if magnitude is None:
        y = lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p)
    else:
        y = dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling)
    if eager:
        self.__dict__[_LAST] = backends.last_used
        calls["fused"] += 1
    return y


class Linear(StockLinear):
    """PEFT's LoRA layer with the fused forward; of the same name, so that PEFT shows it as lora.Linear."""

    forward = forward

    def extra_repr(self) -> str:
        return "fusedlora"


CLASSES = (StockLinear, Linear)


def fuse(model: _Model) -> _Model:
    """Gives the fused forward to every LoRA layer of `model` that is exactly a peft.tuners.lora.Linear; in place.

    Only their class changes. Other LoRA layers stay as they are, and `report` names them. To be called before
    fully_shard and before hooks that replace a layer's forward, as accelerate's do.

    Returns `model`. Raises ValueError where it has no such layer, RuntimeError where another library has replaced
    PEFT's forward.
    """
    _require_peft_forward()
    layers = [module for module in model.modules() if type(module) in CLASSES]
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without a peft.tuners.lora.Linear: nothing to fuse")
    for layer in layers:
        layer.__class__ = Linear  # type: ignore[assignment]
    return model


def unfuse(model: _Model) -> _Model:
    """Undoes `fuse` and `register` on `model`: its layers are PEFT's own again. Returns `model`.

    Raises RuntimeError for layers that fully_shard has given another class.
    """
    for name, module in model.named_modules():
        if type(module) is Linear:
            module.__class__ = StockLinear  # type: ignore[assignment]
        elif isinstance(module, Linear):
            raise RuntimeError(f"{name} is a {type(module).__name__}: unfuse before fully_shard")
        if isinstance(module, LoraLayer):
            module.__dict__.pop(_LAST, None)
    return model


def register(config: LoraConfig) -> LoraConfig:
    """Has PEFT make fused layers from `config`, for base layers that are exactly nn.Linear with plain weights.

    All others (quantised, Conv1D, subclasses) go to PEFT's own dispatchers or to other custom modules of the config.
    Nothing of this is saved with the config. Returns `config`. Raises ValueError where it has a custom module for
    nn.Linear already, RuntimeError where another library has replaced PEFT's forward.
    """
    _require_peft_forward()
    modules: dict[Any, Any] = {} if config._custom_modules is None else config._custom_modules
    other = modules.get(nn.Linear)
    if other is not None and not isinstance(other, _Factory):
        raise ValueError(f"config has a custom module for nn.Linear already: {other!r}")
    mapping: dict[Any, Any] = {nn.Linear: _Factory(config)}
    config._register_custom_module(mapping)
    return config


class _Factory:
    """What PEFT calls for a base layer that is an nn.Linear of any kind; None leaves it to the other dispatchers."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config  # before peft 0.19 a factory is not given it

    def __call__(self, target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        config = kwargs.get("config", self.config)
        if type(target) is nn.Linear and type(target.weight) is nn.Parameter and not kwargs.get("parameter_name"):
            kwargs.pop("config", None)
            return fuse(dispatch_default(target, adapter_name, config, **kwargs))  # type: ignore[type-var]
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        for kind, make in config._custom_modules.items():
            if make is not self and isinstance(base, kind):  # whose turn it were, had nn.Linear not matched first
                made: nn.Module | None = make(target, adapter_name, **kwargs)
                return made
        return None


class _Hold:
    """What enable() returns: `with` it, to end at the block's end what this call began."""

    def __enter__(self) -> "_Hold":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            if self in _holds:
                _end({self})


_lock = threading.RLock()
_holds: set[_Hold] = set()  # the calls of enable() that are not ended yet


def enable() -> _Hold:
    """Fuses every peft.tuners.lora.Linear of this process, also in models made later, until disable().

    `with enable():` ends it at the block's end, unless another enable() is still on. To be called before
    torch.compile: what is compiled already stays as it is. Raises RuntimeError where another library has replaced
    PEFT's forward.
    """
    hold = _Hold()
    with _lock:
        _require_peft_forward()
        _Class.forward = forward
        _holds.add(hold)
    return hold


def disable() -> None:
    """Ends every enable(). Layers of `fuse` and `register` stay fused.

    Raises RuntimeError where another library has replaced the forward since.
    """
    with _lock:
        _end(set(_holds))


def _end(holds: set[_Hold]) -> None:
    if holds and holds == _holds:
        _require_peft_forward()
        _Class.forward = _stock_forward
    _holds.difference_update(holds)


def _require_peft_forward() -> None:
    """Raises where peft.tuners.lora.Linear.forward is neither PEFT's own nor ours."""
    found = StockLinear.forward
    if _stock_forward.__code__.co_filename != LoraLayer.update_layer.__code__.co_filename:
        found = _stock_forward  # it was replaced before this module was imported
    elif found is _stock_forward or found is forward:
        return
    raise RuntimeError(
        f"peft.tuners.lora.Linear.forward has been replaced by {_where(found)}: "
        "fusedlora does not go over another library's patch; turn it off first"
    )


def _where(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


def why_not(layer: nn.Module, x: Tensor | None = None, *args: Any, **kwargs: Any) -> str | None:
    """Why `layer(x, *args, **kwargs)`, here and now, autocast included, would run PEFT's forward; None if it is fused.

    Without x what depends on it is left out.
    """
    if not isinstance(layer, LoraLayer):
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}, no LoRA layer of PEFT"
    if type(layer).forward is not forward and type(layer) is StockLinear:
        return "neither fuse(model), register(config) nor enable() has been called"
    replaced = layer.__dict__.get("forward")
    if replaced is not None and getattr(layer.__dict__.get("_old_forward"), "__func__", None) is not forward:
        return "the layer has a forward of its own, as accelerate's hooks give it: fuse before adding them"
    if args or kwargs:
        return "the call has extra arguments"
    found = parts_or_reason(layer, x, CLASSES)
    return found if isinstance(found, str) else None


def report(model: nn.Module) -> Report:
    """Every LoRA layer of `model`, fused or stock and why, and the share of their FLOPs that is fused; print it.

    A layer that has been called tells of its last call, as dtypes and autocast were then.
    """
    return make_report(model, why_not, _LAST)
