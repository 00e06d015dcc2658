"""What apply_lora did to a model, and what the model holds: the record left on it and `report`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedlora.linear import FusedLoRALinear
from fusedlora.wrappers import clean, named_modules, unwrapped

RECORD = "_fusedlora"


@dataclass(frozen=True)
class Applied:
    """Left on a model by apply_lora: options, what was skipped and why, full names of the modules trained in full."""

    modules_to_save: tuple[str, ...]
    saved: tuple[str, ...]
    skipped: dict[str, str]
    bias: str = "none"


def applied(model: nn.Module) -> Applied | None:
    """The record of apply_lora on `model`; None where there is none."""
    return model.__dict__.get(RECORD)


def records(modules: Mapping[str, nn.Module]) -> dict[str, Applied]:
    """The records on a model and on parts of it that apply_lora was given, by name in `modules`."""
    return {name: record for name, module in modules.items() if (record := applied(module)) is not None}


def below(name: str, child: str) -> str:
    """The full, clean name of `child` of the module called `name`, which is empty for the model itself."""
    return clean(f"{name}.{child}" if name else child)


@dataclass(frozen=True)
class LayerReport:
    """One FusedLoRALinear of a model. `backend` is what its last eager forward took, None before the first."""

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: Any  # its number; whatever was set in its place where that is none
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    merged: bool
    backend: str | None
    adapters_enabled: bool = True

    @property
    def state(self) -> str:
        """In words: merged, switched off, or the backend."""
        backend = f"backend {self.backend}" if self.backend else "no eager call yet"
        words = ["merged" if self.merged else "adapter off" if not self.adapters_enabled else backend]
        if self.merged and not self.adapters_enabled:
            words.append("adapter off: its forward raises until unmerge()")
        return ", ".join(words)


@dataclass(frozen=True)
class Report:
    """`report(model)`. A parameter under several names, or in storage that another one shares, counts once.

    `total_bytes` are parameters and buffers; `trainable_bytes` are parameters alone, without gradients and
    optimizer state.
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    saved: tuple[str, ...]
    trainable_params: int
    total_params: int
    trainable_bytes: int
    total_bytes: int
    note: str | None = None  # where adapters are that are not counted here

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers with an adapter; "
            f"{self.trainable_params:,} of {self.total_params:,} parameters train "
            f"({_percent(self.trainable_params, self.total_params)}), "
            f"{_bytes(self.trainable_bytes)} of {_bytes(self.total_bytes)} "
            f"({_percent(self.trainable_bytes, self.total_bytes)})"
        ]
        width = max([len(layer.name) for layer in self.layers], default=0)
        for layer in self.layers:
            dtype, adapter = (str(d).removeprefix("torch.") for d in (layer.dtype, layer.adapter_dtype))
            scaling = f"{layer.scaling:g}" if isinstance(layer.scaling, float) else layer.scaling
            lines.append(
                f"  {layer.name:{width}}  {layer.in_features}→{layer.out_features}  r={layer.r}  "
                f"scaling={scaling}  {dtype}, adapter {adapter}  {layer.state}"
            )
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            lines.append(f"skipped {len(names)}: {why}")
            lines += [f"  {name}" for name in names]
        if self.saved:
            lines.append(f"trained in full: {', '.join(self.saved)}")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Layers with an adapter, what was skipped and why, parameters and memory; print it or read its fields.

    After a step each layer also tells which backend its last forward took; compiled calls leave no trace. Works on any
    model, wrapped by torch.compile or DDP too, and one of which only parts went through apply_lora; without apply_lora
    nothing is known of skipped modules. Raises TypeError where `model` is no nn.Module.
    """
    modules = named_modules(unwrapped(model))
    found = records(modules)
    layers = tuple(
        LayerReport(
            name=name or "(the model itself)",
            in_features=layer.in_features,
            out_features=layer.out_features,
            r=layer.r,
            scaling=_number(layer.scaling),
            dtype=layer.weight.dtype,
            adapter_dtype=layer.lora_A.dtype,
            merged=layer.merged,
            backend=layer.last_backend,
            adapters_enabled=layer.adapters_enabled,
        )
        for name, layer in modules.items()
        if isinstance(layer, FusedLoRALinear)
    )
    parameters = list(model.parameters())
    trainable, trainable_bytes = _size(p for p in parameters if p.requires_grad)
    total, total_bytes = _size(parameters)
    return Report(
        layers=layers,
        skipped={below(name, n): why for name, record in found.items() for n, why in record.skipped.items()},
        saved=tuple(below(name, n) for name, record in found.items() for n in record.saved),
        trainable_params=trainable,
        total_params=total,
        trainable_bytes=trainable_bytes,
        total_bytes=total_bytes + _size(model.buffers())[1],
        note=_OF_PEFT if any(is_peft_layer(module) for module in modules.values()) else None,
    )


_OF_PEFT = "it has adapters of PEFT: fusedlora.integrations.peft.report(model) lists them"


def is_peft_layer(module: nn.Module) -> bool:
    """Whether `module` is an adapter layer of peft, which need not be installed."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def _number(scaling: Any) -> Any:
    try:
        return float(scaling)
    except (TypeError, ValueError, RuntimeError):  # forward says what is wrong with it; a report shows it
        return scaling


def storage_key(tensor: Tensor) -> Hashable:
    """Equal for two tensors that start at the same place in the same storage; otherwise the tensor's own."""
    # A subclass (sharded, quantised) may have no pointer to ask for, and a meta tensor's is 0 for all.
    if type(tensor.data) is not Tensor or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def _size(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """(elements, bytes); of tensors at the same place the largest counts."""
    largest: dict[Hashable, Tensor] = {}
    for tensor in tensors:
        key = storage_key(tensor)
        if key not in largest or largest[key].numel() < tensor.numel():
            largest[key] = tensor
    return sum(t.numel() for t in largest.values()), sum(t.numel() * t.element_size() for t in largest.values())


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f} %"


def _bytes(count: int) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if count >= u), (2**10, "KiB"))
    return f"{count / unit:,.1f} {name}"
