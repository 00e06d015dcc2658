"""What of a model belongs in an adapter's files, under PEFT's keys. Nothing here changes the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fusedlora.adapter_config import HEADS, AdapterConfig, matches
from fusedlora.linear import FusedLoRALinear
from fusedlora.summary import below, records
from fusedlora.targets import select
from fusedlora.wrappers import clean, named_modules

PREFIX = "base_model.model."


def selecting(model: nn.Module, config: AdapterConfig) -> dict[str, Any]:
    """What says which modules take part, as arguments of apply_lora."""
    names = list(named_modules(model))
    targets = config.target_modules
    if config.layers_to_transform is not None:
        targets = "|".join(re.escape(name) for name in names if config.targets(name))
    return {
        "target_modules": targets,
        "exclude_modules": config.exclude_modules,
        "modules_to_save": _present(config, names),
    }


def _present(config: AdapterConfig, names: Iterable[str]) -> list[str]:
    """modules_to_save without the heads that PEFT adds on suspicion and the model lacks."""
    heads = HEADS.get(config.task_type or "", ())
    every = list(names)
    return [s for s in config.modules_to_save if s not in heads or any(matches([s], name) for name in every)]


def planned_state(model: nn.Module, config: AdapterConfig) -> dict[str, torch.Tensor]:
    """`adapter_state` as it will be after apply_lora; tensors that are still to be made are on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # apply_lora says the same again
        selection = select(model, **selecting(model, config))
    state: dict[str, torch.Tensor] = {}
    for name, linear in selection.linears.items():
        name = clean(name)
        _require_plain(f"{name}.weight", linear.weight)
        r = config.rank(name)
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.empty(r, linear.in_features, device="meta")
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.empty(linear.out_features, r, device="meta")
        if config.lora_bias:
            state[f"{PREFIX}{name}.lora_B.bias"] = torch.empty(linear.out_features, device="meta")
        if config.use_dora:
            state[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.empty(linear.out_features, device="meta")
    saved = set(selection.saved.values())
    state |= _saved_state({name: module for name, module in named_modules(model).items() if module in saved})
    state |= _bias_state(model, config.bias, set(selection.linears.values()), saved)
    return state


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the adapter of `model` under PEFT's keys; they are the model's own, not copies."""
    modules = named_modules(model)
    state: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(modules).items():
        state[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        state[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.lora_bias is not None:
            state[f"{PREFIX}{name}.lora_B.bias"] = layer.lora_bias
        if layer.lora_magnitude_vector is not None:
            state[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    saved = {name: modules[name] for name in saved_names(modules)}
    state |= _saved_state(saved)
    state |= _bias_state(model, bias_option(modules), set(lora_layers(modules).values()), set(saved.values()))
    for key, tensor in state.items():
        _require_plain(key, tensor)
    return state


def bias_option(modules: Mapping[str, nn.Module]) -> str:
    """The `bias` of apply_lora on the model or on parts of it; ValueError where they differ, as a file has one."""
    options = {name: record.bias for name, record in records(modules).items()}
    if len(set(options.values())) > 1:
        given = ", ".join(f"{bias!r} on {name or 'the model'}" for name, bias in options.items())
        raise ValueError(f"bias is {given}: PEFT's format holds one for all")
    return next(iter(options.values()), "none")


def _bias_state(model: nn.Module, bias: str, linears: set[nn.Linear], saved: set[nn.Module]) -> dict[str, torch.Tensor]:
    """The biases that `bias` trains, but those that come with a module saved whole."""
    if bias == "none":
        return {}
    inside = {module for owner in saved for module in owner.modules()}
    state: dict[str, torch.Tensor] = {}
    for name, module in named_modules(model).items():
        if module in inside or (bias == "lora_only" and module not in linears):
            continue
        tensor = module.base_bias if isinstance(module, FusedLoRALinear) else _stored(module, "bias")
        if tensor is not None:
            base = "base_layer.bias" if module in linears else "bias"  # PEFT wraps a linear that it adapts
            key = f"{PREFIX}{name}.{base}" if name else f"{PREFIX}{base}"
            _require_plain(key, tensor)
            state[key] = tensor
    return state


def _stored(module: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer that a state dict has under this name."""
    if name in module._buffers and name not in module._non_persistent_buffers_set:
        return module._buffers[name]
    return module._parameters.get(name)


def _saved_state(saved: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for name, module in saved.items():
        state |= {f"{PREFIX}{name}.{clean(key)}": t for key, t in module.state_dict(keep_vars=True).items()}
    for key, tensor in state.items():
        _require_plain(key, tensor)
    return state


def saved_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Full names of the modules trained in full; apply_lora may have been given a part of the model."""
    return _outermost(
        [below(name, saved) for name, record in records(modules).items() for saved in record.saved], modules
    )


def configured_names(modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    """The same as the configuration has it, for `modules` of a model."""
    return _outermost([n for n in modules if n and matches(_present(config, modules), n)], modules)


def _outermost(names: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    # A module inside another of them comes with it, and a second name of one is not another.
    outermost = [n for n in names if n in modules and not any(n.startswith(f"{other}.") for other in names)]
    return [leaf for name in outermost for leaf in _callables(name, modules[name])]


def _callables(name: str, module: nn.Module) -> list[str]:
    # PEFT wraps what it saves and can't wrap a list or dict of modules.
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [name]
    return [leaf for key, child in module.named_children() for leaf in _callables(f"{name}.{key}", child)]


def _require_plain(key: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{key} is on the meta device and has no values: give the model storage first")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{key} is sharded ({type(tensor).__name__}): gather it first")


def lora_layers(modules: Mapping[str, nn.Module]) -> dict[str, FusedLoRALinear]:
    # A model that is itself one layer has no name to save it under.
    return {name: m for name, m in modules.items() if name and isinstance(m, FusedLoRALinear)}
