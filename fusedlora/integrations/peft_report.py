"""What `fusedlora.integrations.peft.report` prints: the LoRA layers of a model, fused or stock."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..linear import FusedLoRALinear


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer. `why_not` is None where it is fused; `backend` is what its last fused call took."""

    name: str
    kind: str
    in_features: int
    out_features: int
    r: int  # of its active adapters together
    why_not: str | None
    backend: str | None

    @property
    def flops(self) -> int:
        """Of one row of x: the base layer's product and the adapters', as of a linear of these sizes."""
        base = 0 if self.kind == "lora.Embedding" else self.in_features * self.out_features
        return 2 * (base + self.r * (self.in_features + self.out_features))


@dataclass(frozen=True)
class Report:
    """`report(model)`; str() gives it layer by layer."""

    layers: tuple[LayerReport, ...]
    note: str | None = None  # where adapters are that are not PEFT's

    def share(self, backend: str | None = None) -> float:
        """The fused share of the layers' FLOPs, in [0, 1]; of one backend, that of layers whose last call it took."""
        total = sum(layer.flops for layer in self.layers)
        fused = (layer for layer in self.layers if layer.why_not is None and backend in (None, layer.backend))
        return sum(layer.flops for layer in fused) / total if total else 0.0

    def __str__(self) -> str:
        fused = sum(layer.why_not is None for layer in self.layers)
        backends = sorted({layer.backend for layer in self.layers if layer.backend and layer.why_not is None})
        took = ", ".join(f"{name} {100 * self.share(name):.1f} %" for name in backends)
        lines = [
            f"{len(self.layers)} LoRA layers: {fused} fused, {len(self.layers) - fused} stock; "
            f"{100 * self.share():.1f} % of their FLOPs are fused" + (f" ({took})" if took else "")
        ]
        width = max([len(layer.name) for layer in self.layers], default=0)
        for layer in self.layers:
            state = (
                f"fused, {layer.backend or 'no eager call yet'}" if layer.why_not is None else f"stock: {layer.why_not}"
            )
            sizes = f"{layer.in_features}→{layer.out_features}"
            lines.append(f"  {layer.name:{width}}  {layer.kind}  {sizes}  r={layer.r}  {state}")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def make_report(model: nn.Module, why_not: Callable[[Any], str | None], last: str) -> Report:
    """The report by `why_not` and by what the layers keep of their last call under the key `last`."""
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        reason, latest = why_not(module), module.__dict__.get(last)
        if isinstance(latest, str) and hasattr(getattr(module.get_base_layer(), "weight", None), "full_tensor"):
            reason = None  # FSDP2 keeps a layer's parameters whole only while it is called
        if reason is None and isinstance(latest, tuple):
            reason = f"at its last call {latest[0]}"
        layers.append(
            LayerReport(
                name=name or "(the model itself)",
                kind=repr(module).partition("(")[0],
                in_features=module.in_features or 0,
                out_features=module.out_features or 0,
                r=sum(module.r.get(adapter, 0) for adapter in module.active_adapters),
                why_not=reason,
                backend=latest if isinstance(latest, str) else None,
            )
        )
    ours = any(isinstance(module, FusedLoRALinear) for module in model.modules())
    note = "it has layers of apply_lora: fusedlora.report(model) lists them" if ours else None
    return Report(tuple(layers), note)
