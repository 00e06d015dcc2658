"""fusedlora as the backend of PEFT: three doors to one forward for `peft.tuners.lora.Linear` and its quantised kin.

    fuse(model)        the LoRA layers of a model that exists; unfuse(model) takes it back
    register(config)   those that PEFT makes from this LoraConfig
    enable()           all of this process, now and later, until disable(); also `with enable():`

The forward decides at each call, by the one rule of `why_not`, between lora_linear or dora_linear and PEFT's own
forward, which then runs untouched. Parameters, names, checkpoints and every other method stay PEFT's. `report(model)`
tells what is fused. Differences that are left: a fused layer can be differentiated only once (no double backward);
dropout draws another mask from the same seed; the x of a layer must not be changed in place before backward, also
where PEFT would have kept a copy in the adapter's dtype.
"""

from collections import Counter
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as StockLinear
from peft.tuners.lora.layer import LoraLayer, dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import backends
from ..dense_buffers import release_buffers as release_buffers
from ..dora import dora_linear
from ..functional import lora_linear
from ..layer_options import with_lora_bias
from ..quantised import QuantisedWeight, quantised_lora_linear
from ..wrappers import require_module
from .peft_kinds import CLASSES, DISPATCHERS, KINDS, Kind, add_kind, load_kinds, require_stock_forwards
from .peft_kinds import disable as disable
from .peft_kinds import enable as enable
from .peft_report import Report, make_report
from .peft_rule import parts_or_reason
from .rule import FORMATS

_Model = TypeVar("_Model", bound=nn.Module)
stock_forward: Any = StockLinear.forward
_LAST = "_fusedlora_last"  # in a layer's __dict__: the backend of its last fused call, or (reason,) after a stock one

# Calls so far in this process, by "fused" or by the reason against it. Compiled calls are not counted; calls in
# several threads at once may be lost.
calls: Counter[str] = Counter()


def forward_over(stock_forward: Any) -> Any:
    """The forward that stands in for `stock_forward`, that of one of PEFT's classes."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]: the fused call where the rule allows it, else PEFT's forward."""
        found = "the call has extra arguments" if args or kwargs else parts_or_reason(self, x, CLASSES)
        eager = not torch.compiler.is_compiling()
        if isinstance(found, str):
            if eager:
                self.__dict__[_LAST] = (found,)
                calls[found] += 1
            stock_y: Tensor = stock_forward(self, x, *args, **kwargs)
            return stock_y
        weight, bias, lora_A, lora_B, lora_bias, magnitude, scaling, dropout_p = found
        if lora_bias is not None:
            bias = with_lora_bias(bias, lora_bias, scaling, weight.dtype)
        if isinstance(weight, QuantisedWeight):
            y = quantised_lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p)
            y = y if y.dtype is x.dtype else y.to(x.dtype)  # under autocast too a quantised base has x's dtype
        elif magnitude is None:
            y = lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p)
        else:
            y = dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling)
        if eager:
            self.__dict__[_LAST] = backends.taken()
            calls["fused"] += 1
        return y

    return forward


forward = forward_over(stock_forward)


class Linear(StockLinear):
    """PEFT's LoRA layer with the fused forward; of the same name, so that PEFT shows it as lora.Linear."""

    forward = forward

    def extra_repr(self) -> str:
        return "fusedlora"


add_kind(Kind(StockLinear, Linear, stock_forward))


def fuse(model: _Model) -> _Model:
    """Gives the fused forward to every LoRA layer of `model` that is exactly a peft.tuners.lora.Linear; in place.

    Or exactly a Linear4bit, Linear8bitLt or TorchaoLoraLinear, PEFT's layers over quantised weights.

    Only their class changes. Other LoRA layers stay as they are, and `report` names them. To be called before
    fully_shard and before hooks that replace a layer's forward, as accelerate's do.

    Returns `model`. Raises TypeError where it is no nn.Module, ValueError where it has no such layer, RuntimeError
    where another library has replaced PEFT's forward.
    """
    require_module(model)
    load_kinds()
    require_stock_forwards()
    layers = [module for module in model.modules() if type(module) in CLASSES]
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without a peft.tuners.lora.Linear: nothing to fuse")
    for layer in layers:
        layer.__class__ = CLASSES[type(layer)].fused
    return model


def unfuse(model: _Model) -> _Model:
    """Undoes `fuse` and `register` on `model`: its layers are PEFT's own again. Returns `model`.

    Raises RuntimeError for layers that fully_shard has given another class.
    """
    ours = tuple(kind.fused for kind in KINDS)
    for name, module in model.named_modules():
        if type(module) in ours:
            module.__class__ = CLASSES[type(module)].stock
        elif isinstance(module, ours):
            raise RuntimeError(f"{name} is a {type(module).__name__}: unfuse before fully_shard")
        if isinstance(module, LoraLayer):
            module.__dict__.pop(_LAST, None)
    return model


def register(config: LoraConfig) -> LoraConfig:
    """Has PEFT make fused layers from `config`, over plain nn.Linear and over the quantised bases that `fuse` knows.

    All others (Conv1D, subclasses) go to PEFT's own dispatchers or to other custom modules of the config.
    Nothing of this is saved with the config. Returns `config`. Raises TypeError where it is no LoraConfig, ValueError
    where it has a custom module for nn.Linear already, RuntimeError where another library has replaced PEFT's forward.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config is a {type(config).__name__}, must be a peft.LoraConfig")
    load_kinds()
    require_stock_forwards()
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
        return self._quantised(base, target, adapter_name, config, kwargs)

    def _quantised(
        self, base: nn.Module, target: nn.Module, adapter_name: str, config: Any, kwargs: dict[str, Any]
    ) -> nn.Module | None:
        """What PEFT's dispatchers make of a base that is quantised in a known way, fused."""
        load_kinds()
        if type(base) in FORMATS or type(getattr(base, "weight", None)) in FORMATS:
            options = {key: value for key, value in kwargs.items() if key != "config"}
            for dispatch in DISPATCHERS:
                made = dispatch(target, adapter_name, config, **options)
                if made is not None:
                    return fuse(made)
        return None


def why_not(layer: nn.Module, x: Tensor | None = None, *args: Any, **kwargs: Any) -> str | None:
    """Why `layer(x, *args, **kwargs)`, here and now, autocast included, would run PEFT's forward; None if it is fused.

    Without x what depends on it is left out.
    """
    if not isinstance(layer, LoraLayer):
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}, no LoRA layer of PEFT"
    load_kinds()
    kind = CLASSES.get(type(layer))
    if kind is not None and kind.stock is type(layer) and type(layer).forward is not kind.fused.forward:
        return "neither fuse(model), register(config) nor enable() has been called"
    inner = getattr(layer.__dict__.get("_old_forward"), "__func__", None)
    if "forward" in layer.__dict__ and inner is not type(layer).forward:
        return "the layer has a forward of its own, as accelerate's hooks give it: fuse before adding them"
    if args or kwargs:
        return "the call has extra arguments"
    found = parts_or_reason(layer, x, CLASSES)
    return found if isinstance(found, str) else None


def report(model: nn.Module) -> Report:
    """Every LoRA layer of `model`, fused or stock and why, and the share of their FLOPs that is fused; print it.

    A layer that has been called tells of its last call, as dtypes and autocast were then; compiled calls leave no
    trace. Raises TypeError where `model` is no nn.Module.
    """
    require_module(model)
    return make_report(model, why_not, _LAST)
