"""Weights that several modules share, in memory or by a Hugging Face config."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import nn

from fusedlora.summary import storage_key


def hugging_face_models(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Those of `modules` with a config and an output embedding to ask for, as (name, model)."""
    for name, module in modules.items():
        if callable(getattr(module, "get_output_embeddings", None)) and hasattr(module, "config"):
            yield name, module


def tied_weights(modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Linear]) -> list[str]:
    """A sentence for each target whose weight is also another module's."""
    owners: dict[Hashable, dict[nn.Module, str]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(storage_key(parameter), {}).setdefault(module, f"{name}.{key}".lstrip("."))
    found = []
    for name, target in targets.items():
        others = [other for module, other in owners.get(storage_key(target.weight), {}).items() if module is not target]
        if others:
            found.append(f"the weight of {name!r} is tied to {', '.join(others)}")
    return found


def tied_by_config(modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Linear]) -> list[str]:
    """The same for a weight that is free now but that a Hugging Face config ties again on loading."""
    found = []
    for _, model in hugging_face_models(modules):
        if getattr(model.config, "tie_word_embeddings", False):
            output = model.get_output_embeddings()
            found += [
                f"the weight of {name!r} is tied to the input embedding by config.tie_word_embeddings"
                for name, target in targets.items()
                if target is output
            ]
    return found
