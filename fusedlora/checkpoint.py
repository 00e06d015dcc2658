"""Adapters on disk in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

`save_adapter` writes what `peft.PeftModel.from_pretrained` reads; `load_adapter` reads what its `save_pretrained`
writes. Nothing is unpickled. What each field of the configuration means here is in `fusedlora/adapter_config.py`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedlora.adapter_config import AdapterConfig, read_config
from fusedlora.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    build_config,
    read_weights,
    require_safetensors,
    write_files,
)
from fusedlora.adapter_state import (
    PREFIX,
    adapter_state,
    bias_option,
    configured_names,
    lora_layers,
    planned_state,
    saved_names,
    selecting,
)
from fusedlora.layer_options import check_finite, check_rate
from fusedlora.linear import FusedLoRALinear
from fusedlora.model import apply_lora
from fusedlora.wrappers import named_modules, unwrapped

# The scalings live in the other file; a copy beside the weights shows when the two files don't belong together.
SCALING_KEY = "fusedlora_scaling"


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write the adapters of `model`, and its modules_to_save, to the folder `path` in PEFT's format.

    lora_A [r, in_features], lora_B [out_features, r], lora_bias and lora_magnitude_vector [out_features] are written in
    their own dtypes, whether merged or not, and the biases that apply_lora's `bias` trains; the base weights are not. A
    scaling held in a tensor is written as the number that it has now. Each file is complete on disk before it takes its
    name (os.replace), so a crash leaves the old file. Files of other names in the folder are kept.

    Args:
        model: a model that went through `apply_lora` or `load_adapter`.
        path: a folder, made where it's missing.
        task_type: written for PEFT's task classes ("CAUSAL_LM", "SEQ_CLS", …); not needed to load the adapter.
        base_model_name_or_path: written for PEFT's AutoPeftModel; None takes the model's own `name_or_path`.

    Raises:
        ValueError: `model` has no FusedLoRALinear below it, only some of its layers have use_dora or lora_bias, parts
            of it have different `bias`, a tensor to write is sharded or has no values (meta), a layer's scaling is not
            finite or its lora_dropout not in [0, 1); or `path` is empty.
        TypeError: `model` is no nn.Module, `path` no path, or a layer's scaling or lora_dropout no number.
        RuntimeError: a bias to write was dropped by merge(keep_base=False).
        NotADirectoryError: `path` is a file.
        ImportError: safetensors is missing.

    On an error the files of an earlier save are as they were.
    """
    require_safetensors("save_adapter")
    folder = _folder(path)
    if task_type is not None and not isinstance(task_type, str):
        raise TypeError(f"task_type is {task_type!r}, must be a string or None")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path {folder} is a file; an adapter is a folder")
    model = unwrapped(model)
    modules = named_modules(model)
    layers = lora_layers(modules)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no FusedLoRALinear below it: call apply_lora first")
    for name, layer in layers.items():
        _check_numbers(name, layer)

    state = adapter_state(model)
    saved = saved_names(modules)
    _warn_of_unsaved(modules, state)
    _warn_of_endings(modules, saved)
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}

    use_rslora = _uniform(layers, "use_rslora")
    config = build_config(
        {name: (layer.r, _alpha(layer, use_rslora)) for name, layer in layers.items()},
        modules,
        use_rslora=use_rslora,
        use_dora=_one_kind("use_dora", {name: layer.use_dora for name, layer in layers.items()}),
        lora_bias=_one_kind("lora_bias", {name: layer.lora_bias is not None for name, layer in layers.items()}),
        bias=bias_option(modules),
        lora_dropout=_uniform(layers, "lora_dropout"),
        modules_to_save=saved,
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path or getattr(model, "name_or_path", None) or None,
    )
    scalings = {name: float(layer.scaling) for name, layer in layers.items()}
    metadata = {"format": "pt", SCALING_KEY: json.dumps(scalings, sort_keys=True)}
    write_files(folder, tensors, metadata, config)


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, adapter_dtype: torch.dtype | None = None
) -> nn.Module:
    """Load an adapter in PEFT's format from the folder `path` into `model`, in place, and return the model.

    A model without adapters first goes through `apply_lora` with the file's values. One that has adapters must have
    been given the same modules, ranks, scalings, dropout and biases. Everything is checked before anything changes: on
    an error the model is as it was. The adapter is trainable afterwards.

    Args:
        model: the base model, or one that went through `apply_lora`.
        path: a folder with adapter_config.json and adapter_model.safetensors.
        adapter_dtype: dtype of lora_A and lora_B on a model without adapters; None means fp32 over a 16-bit weight.

    Raises:
        FileNotFoundError: `path` or one of its two files is missing.
        ValueError: a field of the configuration can't be honoured; the weights are a pickle, damaged, or have a
            missing, unexpected or misshapen tensor; the model is merged, on the meta device, or has other adapters.
            The message names the file, and the field or tensor with its value.
        TypeError: as `apply_lora`, for a module that can't be swapped; `model` is no nn.Module or `path` no path.
        ImportError: safetensors is missing.
    """
    require_safetensors("load_adapter")
    target, folder = unwrapped(model), _folder(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path {folder} is not a folder; adapters are read from disk only, never downloaded")
    config = read_config(folder / CONFIG_NAME)
    stored, metadata = read_weights(folder)
    plain = not lora_layers(named_modules(target))
    stored = _without_copies(stored, config, named_modules(target))
    try:
        _check_ranks(stored, config)
        if plain:
            expected = planned_state(target, config)
        else:
            _check_layers(target, config)
            expected = adapter_state(target)
        _check_tensors(stored, expected)
        _check_scalings(stored, metadata, config)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{folder}: {error}") from error
    if plain:
        apply_lora(
            target,
            **selecting(target, config),
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
            bias=config.bias,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
            adapter_dtype=adapter_dtype,
        )
    with torch.no_grad():
        for key, tensor in adapter_state(target).items():
            tensor.copy_(stored[key])
    return model


def _folder(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {path!r}, must be the path of a folder")
    if not os.fspath(path):  # to pathlib that is the working directory
        raise ValueError(f"path is {path!r}, must be the path of a folder")
    return Path(path)


def _check_numbers(name: str, layer: FusedLoRALinear) -> None:
    """What a user may have set on the layer is what a file can hold and `read_config` takes."""
    scaling = layer.scaling
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0 or scaling.is_meta:
            raise ValueError(f"scaling of {name} is {scaling}, must be a number or a 0-d tensor with a value")
        scaling = scaling.item()
    check_finite(f"scaling of {name}", scaling)
    check_finite(f"scaling · r of {name}, its lora_alpha in the file,", scaling * layer.r)
    check_rate(f"lora_dropout of {name}", layer.lora_dropout)


def _check_layers(model: nn.Module, config: AdapterConfig) -> None:
    """The adapters that the model has are those of the configuration."""
    modules = named_modules(model)
    layers = lora_layers(modules)
    if not config.all_linear:
        wanted = {name for name in modules if config.targets(name)}
        for names, where in ((wanted - set(layers), "has no adapter on"), (set(layers) - wanted, "has one on")):
            if names:
                raise ValueError(f"target_modules is {config.target_modules!r}, but the model {where} {sorted(names)}")
    ours, theirs = saved_names(modules), configured_names(modules, config)
    if sorted(ours) != sorted(theirs):
        raise ValueError(
            f"modules_to_save is {config.modules_to_save!r}, {theirs} of this model, but it was given {ours}"
        )
    if (given := bias_option(modules)) != config.bias:
        raise ValueError(f"bias is {config.bias!r} in {CONFIG_NAME}, {given!r} in the model")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: call unmerge_lora before loading")
        for option, ours_is, file_has in (
            ("use_dora", layer.use_dora, config.use_dora),
            ("lora_bias", layer.lora_bias is not None, config.lora_bias),
        ):
            if ours_is != file_has:
                raise ValueError(f"{option} of {name} is {file_has} in {CONFIG_NAME}, {ours_is} in the model")
        pairs = {
            "r": (config.rank(name), layer.r),
            "scaling (lora_alpha, use_rslora)": (config.scaling(name), float(layer.scaling)),
            "lora_dropout": (config.lora_dropout, layer.lora_dropout),
        }
        for what, (stored, actual) in pairs.items():
            if not math.isclose(stored, actual, rel_tol=1e-6):
                raise ValueError(f"{what} of {name} is {stored} in {CONFIG_NAME}, {actual} in the model")


def _without_copies(
    stored: dict[str, torch.Tensor], config: AdapterConfig, modules: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Without the second and third copy of a saved module's biases, which peft writes with bias="all"."""
    if config.bias != "all":
        return stored
    copies = tuple(
        f"{PREFIX}{name}.{wrapped}."
        for name in configured_names(modules, config)
        for wrapped in ("modules_to_save", "original_module")
    )
    return {key: tensor for key, tensor in stored.items() if not (key.startswith(copies) and key.endswith("bias"))}


def _check_ranks(stored: Mapping[str, torch.Tensor], config: AdapterConfig) -> None:
    """First of all: nothing of the size r in the configuration is made before."""
    for key, values in stored.items():
        for ending, dim in ((".lora_A.weight", 0), (".lora_B.weight", 1)):
            r = config.rank(key.removeprefix(PREFIX).removesuffix(ending))
            if key.endswith(ending) and (values.ndim != 2 or values.shape[dim] != r):
                raise ValueError(f"{key} has shape {list(values.shape)} in {WEIGHTS_NAME}, r is {r} in {CONFIG_NAME}")


def _check_tensors(stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    for keys, what in ((missing, "lacks"), (unexpected, "has, and the model with this configuration doesn't,")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{WEIGHTS_NAME} {what} {', '.join(keys[:3])}{more}")
    for key, tensor in expected.items():
        values = stored[key]
        if values.shape != tensor.shape:
            shapes = f"{list(values.shape)} in {WEIGHTS_NAME}, {list(tensor.shape)} in the model"
            raise ValueError(f"{key} has shape {shapes}")
        if not (values.is_floating_point() if tensor.is_floating_point() else values.dtype == tensor.dtype):
            raise ValueError(f"{key} has dtype {values.dtype} in {WEIGHTS_NAME}, {tensor.dtype} in the model")


def _check_scalings(stored: Mapping[str, torch.Tensor], metadata: Mapping[str, str], config: AdapterConfig) -> None:
    """The weights were saved with the scalings of the configuration, where they tell."""
    text = metadata.get(SCALING_KEY, "{}")
    try:
        written = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{WEIGHTS_NAME} has {SCALING_KEY} {text!r}, which is not JSON: {error}") from error
    if not isinstance(written, dict) or not all(isinstance(scaling, (int, float)) for scaling in written.values()):
        raise ValueError(f"{WEIGHTS_NAME} has {SCALING_KEY} {text!r}, must map names to numbers")
    for name, saved_with in written.items():
        scaling = config.scaling(name)
        if f"{PREFIX}{name}.lora_A.weight" in stored and not math.isclose(saved_with, scaling, rel_tol=1e-6):
            raise ValueError(
                f"{CONFIG_NAME} gives {name} the scaling {scaling}, {WEIGHTS_NAME} was saved with {saved_with}: "
                "they are not of one save, or lora_alpha was edited (set the layer's scaling after loading instead)"
            )


def _warn_of_unsaved(modules: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor]) -> None:
    written = {id(tensor) for tensor in state.values()}
    # of a merged layer the bias is written that it had before
    written |= {id(m.bias) for m in modules.values() if isinstance(m, FusedLoRALinear) and id(m.base_bias) in written}
    lost = [
        f"{name}.{key}" if name else key
        for name, module in modules.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in written
    ]
    if lost:
        warnings.warn(
            f"trainable, but not part of the adapter and so not saved: {', '.join(lost[:3])} ({len(lost)} in all); "
            "name their modules in modules_to_save",
            stacklevel=3,
        )


def _warn_of_endings(modules: Mapping[str, nn.Module], saved: list[str]) -> None:
    # Unlike for target_modules, PEFT takes any ending here: "head" is also the end of "lm_head".
    extra = [n for n in modules if n.endswith(tuple(saved)) and not any(n == s or n.startswith(f"{s}.") for s in saved)]
    if saved and extra:
        warnings.warn(
            f"peft will take {extra} for modules_to_save too, as they end like {saved}, and miss them in the file; "
            "fusedlora loads it",
            stacklevel=3,
        )


def _alpha(layer: FusedLoRALinear, use_rslora: bool) -> float:
    """The lora_alpha that gives the layer's scaling in a file with this use_rslora."""
    root, scaling = math.sqrt(layer.r) if use_rslora else layer.r, float(layer.scaling)
    return layer.lora_alpha if layer.lora_alpha / root == scaling else scaling * root


def _one_kind(option: str, flags: Mapping[str, bool]) -> bool:
    """The flag of all layers, of which the file has one."""
    kinds = {kind: [name for name, flag in flags.items() if flag is kind] for kind in (True, False)}
    if kinds[True] and kinds[False]:
        raise ValueError(
            f"{option} is True on {kinds[True][0]} and False on {kinds[False][0]}: PEFT's format holds one for all"
        )
    return bool(kinds[True])


def _uniform(layers: Mapping[str, FusedLoRALinear], attribute: str) -> Any:
    """The commonest value over the layers; the file has room for one."""
    counts = Counter(getattr(layer, attribute) for layer in layers.values()).most_common()
    if len(counts) > 1 and attribute == "lora_dropout":
        warnings.warn(
            f"PEFT's format holds one lora_dropout; {counts[0][0]} is written, not {counts[1:]}", stacklevel=4
        )
    return counts[0][0]
