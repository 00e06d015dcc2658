"""Which modules of a model get an adapter, which are passed over, and why. Nothing here changes the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from fusedlora.adapter_config import matches, pattern_key
from fusedlora.linear import FusedLoRALinear
from fusedlora.summary import is_peft_layer
from fusedlora.ties import hugging_face_models
from fusedlora.weight_reads import reader_of_weight
from fusedlora.wrappers import require_module

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

V = TypeVar("V", int, float)


@dataclass
class Selection:
    """What `select` found: `linears` to swap and `skipped` reasons by first name, `saved` are all names to train."""

    modules: dict[str, nn.Module]
    linears: dict[str, nn.Linear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)


def select(
    model: nn.Module,
    target_modules: str | Iterable[str],
    exclude_modules: str | Iterable[str] | None,
    modules_to_save: Iterable[str],
) -> Selection:
    """Sort the modules of `model`. Raises as `apply_lora` does; a module under several names counts once."""
    require_module(model)
    if isinstance(model, nn.Linear):
        raise TypeError(
            f"model is itself a {type(model).__name__}, nothing to swap in; use FusedLoRALinear.from_linear"
        )
    targets = _names("target_modules", target_modules)
    exclude = None if exclude_modules is None else _names("exclude_modules", exclude_modules)
    every_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    found = Selection(dict(model.named_modules(remove_duplicate=False)))
    _refuse_adapted(found.modules)
    found.saved = _to_save(found.modules, modules_to_save)
    heads = _heads(found.modules) if every_linear else {}

    names: dict[nn.Module, list[str]] = {}
    for name, module in found.modules.items():
        names.setdefault(module, []).append(name)
    hit: set[str] = set()
    refused: dict[str, list[str]] = {}
    for module, (name, *more) in names.items():
        called = [name, *more]
        if every_linear:
            wanted = _looks_linear(module)
        else:
            wanted = any(matches(targets, n) for n in called if n)
            if not isinstance(targets, str):
                hit.update(t for t in targets if any(matches([t], n) for n in called if n))
        if not wanted:
            continue
        if any(_below(n, found.saved) for n in called):
            found.skipped[name] = "trained in full: in modules_to_save"
        elif exclude is not None and any(matches(exclude, n) for n in called):
            found.skipped[name] = "excluded: in exclude_modules"
        elif (head := next((n for n in called if _below(n, heads)), None)) is not None:
            found.skipped[name] = next(why for n, why in heads.items() if _below(head, [n]))
        else:
            why = next(filter(None, (why_not(n, found.modules) for n in called)), None)
            if why is None:
                assert isinstance(module, nn.Linear)
                found.linears[name] = module
            elif every_linear:
                found.skipped[name] = why
            else:
                refused.setdefault(why, []).append(name)
    if refused:
        raise TypeError("\n".join(f"target_modules names {_few(names)}: {why}" for why, names in refused.items()))
    if not found.linears:
        raise ValueError(_nothing(targets, exclude_modules, found, model))
    if unused := [t for t in targets if t not in hit] if not isinstance(targets, str) else []:
        warnings.warn(f"target_modules has {unused}, which match no module of the model", stacklevel=3)
    if unused := _unmatched([exclude] if isinstance(exclude, str) else [[e] for e in exclude or ()], found.modules):
        warnings.warn(f"exclude_modules has {unused}, which match no module of the model", stacklevel=3)
    return found


def why_not(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the module called `name` can't be swapped, with its type and the remedy; None if it can."""
    module = modules[name]
    kind = type(module)
    if kind is not nn.Linear:
        return f"it is a {kind.__module__}.{kind.__qualname__}, not exactly torch.nn.Linear; {_remedy(module)}"
    extra = [k for k in module._parameters if k not in ("weight", "bias")] + [*module._buffers, *module._modules]
    if extra or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"its weight is made from {extra or 'something else'} by a hook; remove the reparametrisation first"
    weight = module.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor or weight.dtype not in _DTYPES:
        return (
            f"its weight is a {type(weight.data).__name__} of {weight.dtype}, not a plain floating tensor; load the "
            "model without quantisation or sharding, and shard it after apply_lora"
        )
    if weight.shape != (module.out_features, module.in_features):
        return f"its weight has shape {tuple(weight.shape)}: it is sharded or packed; shard the model after apply_lora"
    if "forward" in module.__dict__:
        hook = module.__dict__.get("_hf_hook")
        if hook is None:
            return "its forward was replaced on the instance, and a swap would lose that; restore it first"
        if any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,))):
            return "its weight is offloaded by accelerate; load it on a device (device_map without 'cpu' or 'disk')"
    return reader_of_weight(name, dict(modules))


def per_module(
    what: str,
    patterns: Mapping[str, V] | None,
    names: Iterable[str],
    default: V,
    check_value: Callable[[str, Any], None],
) -> dict[str, V]:
    """The value of each name by PEFT's rule: the first pattern that matches the end of the name, or the default.

    A pattern without a match warns; one that isn't a regular expression raises ValueError, and a value whatever
    check_value(name, value) does.
    """
    if patterns is not None and not isinstance(patterns, Mapping):
        raise TypeError(f"{what} is {patterns!r}, must be a dict {{pattern: value}}")
    patterns = dict(patterns or {})
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise TypeError(f"{what} has {pattern!r}, must have regular expressions for keys")
        _compile(what, pattern)
        check_value(f"{what}[{pattern!r}]", value)
    keys = {name: pattern_key(patterns, name) for name in names}
    if unused := [p for p in patterns if p not in keys.values()]:
        warnings.warn(f"{what} has {unused}, which match no swapped module", stacklevel=3)
    return {name: patterns.get(key, default) for name, key in keys.items()}


def _names(what: str, value: str | Iterable[str]) -> str | list[str]:
    if isinstance(value, str):
        if value.lower() != ALL_LINEAR or what != "target_modules":
            _compile(what, value)
        return value
    names = names_in(value)
    if names is None:
        raise TypeError(f"{what} is {value!r}, must be a regex or a list of module names")
    return names


def names_in(value: Any) -> list[str] | None:
    """The names of a list of modules; None where `value` is none."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return None
    names = list(value)
    return names if all(isinstance(name, str) and name for name in names) else None


def _compile(what: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} has {pattern!r}, which is not a regular expression: {error}") from None


def _refuse_adapted(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, FusedLoRALinear):
            raise ValueError(
                f"model already has an adapter in {name!r}; name every target in one call (rank_pattern and "
                "alpha_pattern give each its own), or call merge_and_unload first"
            )
        if is_peft_layer(module):
            raise ValueError(f"model already has a peft adapter in {name!r}; unload it first (peft's model.unload())")
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(f"model has a {type(module).__name__} at {name!r}; wrap it after apply_lora")


def _to_save(modules: Mapping[str, nn.Module], modules_to_save: Iterable[str]) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for wanted in modules_to_save:
        hits = {name: module for name, module in modules.items() if name and matches([wanted], name)}
        if not hits:
            raise ValueError(f"modules_to_save names {wanted!r}, which matches no module of the model")
        if not any(p.is_floating_point() for module in hits.values() for p in module.parameters()):
            raise ValueError(f"modules_to_save names {wanted!r}, which has no floating-point parameter to train")
        saved.update(hits)
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    for spelled in owners.values():
        inside = [n for n in spelled if _below(n, saved)]
        if inside and len(inside) < len(spelled):
            outside = next(n for n in spelled if n not in inside)
            # A file with one of them alone would load into an untied model and compute something else.
            raise ValueError(
                f"modules_to_save trains {inside[0]}, tied to {outside}; name both modules, or untie them first"
            )
    return saved


def _heads(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Output embeddings and classification heads of Hugging Face models, as PEFT leaves them out."""
    found: dict[str, str] = {}
    for _, model in hugging_face_models(modules):
        output = model.get_output_embeddings()
        heads = [getattr(model, head, None) for head in _HEADS] if output is None else [output]
        for name, module in modules.items():
            if any(module is head for head in heads if head is not None):
                found[name] = (
                    "classification head: train it with modules_to_save, or name it in target_modules"
                    if output is None
                    else "output embedding: name it in target_modules to adapt it"
                )
    return found


def _looks_linear(module: nn.Module) -> bool:
    kind = type(module).__name__
    leaf = not module._modules and any(True for _ in module.parameters())
    return isinstance(module, nn.Linear) or (leaf and (kind == "Conv1D" or "Linear" in kind))


def _remedy(module: nn.Module) -> str:
    kind = type(module)
    if kind.__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight without calling it; use an attention that calls its projections"
    if kind.__name__ == "Conv1D":
        return "its weight is transposed; replace it by an nn.Linear holding weight.t(), or leave it out"
    if any(word in f"{kind.__module__}.{kind.__name__}".lower() for word in ("bit", "quant", "gptq", "awq", "hqq")):
        return "its weight is quantised; load the model in bf16, or leave it out"
    if isinstance(module, nn.Linear):
        return "a subclass may compute something else; replace it by a plain nn.Linear, or leave it out"
    if any(isinstance(child, nn.Linear) for child in module.modules()):
        return "name the nn.Linear modules below it instead"
    return "leave it out (exclude_modules, or a narrower target_modules)"


def _below(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _unmatched(wanted: Iterable[str | list[str]], modules: Iterable[str]) -> list[str]:
    """Those of `wanted`, each a regex or a list of one name, that match no module."""
    unmatched = [one for one in wanted if not any(name and matches(one, name) for name in modules)]
    return [one if isinstance(one, str) else one[0] for one in unmatched]


def _few(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _nothing(targets: str | list[str], exclude: str | Iterable[str] | None, found: Selection, model: nn.Module) -> str:
    text = f"target_modules={targets!r} matches nothing to swap in {type(model).__name__}"
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        text += " (a string is a regular expression for the whole name; give a list for endings of names)"
    reasons: dict[str, list[str]] = {}
    for name, why in found.skipped.items():
        reasons.setdefault(why, []).append(name)
    if reasons:
        return text + "".join(f"\n  {_few(names)}: {why}" for why, names in reasons.items())
    linears = sorted({n.rpartition(".")[2] for n, m in found.modules.items() if type(m) is nn.Linear and n})
    return f"{text}; its nn.Linear modules end in {linears}" if linears else f"{text}; it has no nn.Linear"
