"""What a row calls: the frozen linear, PEFT's arithmetic written out, peft's module, torch.compile of it, and ours."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from bench_cases import Case
from torch import Tensor, nn
from torch.nn import functional as F

from fusedlora import FusedLoRALinear, dropout

SCALING = 2.0
DROPOUT = 0.1


@dataclass(frozen=True)
class Layer:
    """One set in the rotation: x [M, K], dy [M, N], W [N, K] and an adapter, in fp32 and rounded to W's dtype."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    adapters: dict[str, tuple[Tensor, Tensor]]  # "same" (as W) and "fp32": A [r, K], B [N, r]
    magnitude: Tensor  # DoRA's, [N] in fp32
    bias: Tensor  # [N] in W's dtype, for rows that have one


@dataclass
class Kept:
    """Which elements of x the latest call's dropout kept; noted only while wanted, since it stays in memory."""

    wanted: bool = False
    read: Callable[[], Tensor] | None = None  # the bool mask [M, K]; of a captured call, that of the latest replay


@dataclass(frozen=True)
class Built:
    """A contender over one layer: the call, the parameters that it trains, and what its dropout keeps."""

    call: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    kept: Kept = field(default_factory=Kept)


Build = Callable[[Layer, Case], Built]


def frozen(layer: Layer, case: Case) -> Built:
    return Built(linear(layer, case), ())


def linear(layer: Layer, case: Case, bias: bool = False) -> nn.Linear:
    made = nn.Linear(case.K, case.N, bias=bias, device="meta")
    made.weight = nn.Parameter(layer.weight, requires_grad=False)
    if bias:
        made.bias = nn.Parameter(layer.bias, requires_grad=False)
    return made


def eager_lora(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    drop: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The arithmetic of PEFT's lora.Linear: x cast to the adapter's dtype and dropped, the sum cast to the base's."""
    base = F.linear(x, weight, bias)
    x = x.to(lora_A.dtype)
    update = F.linear(F.linear(x if drop is None else drop(x), lora_A), lora_B) * scaling
    return (base + update).to(base.dtype)


def eager_dora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """The arithmetic of PEFT's DoRA: B A from the unit matrix, its norm with W a constant, the gain less one added."""
    base = F.linear(x, weight)
    x = x.to(lora_A.dtype)
    unit = torch.eye(lora_A.shape[1], device=x.device, dtype=lora_A.dtype)
    update = F.linear(F.linear(unit, lora_A), lora_B).t().to(x.dtype).detach()
    norm = torch.linalg.vector_norm(weight.to(x.dtype) + scaling * update, dim=1)
    gain = magnitude / norm
    added = (gain - 1) * base + gain * F.linear(F.linear(x, lora_A), lora_B) * scaling
    return (base + added).to(base.dtype)


class EagerLoRA(nn.Module):
    """`eager_lora` as a module, for the group that includes a module's host time."""

    def __init__(self, weight: Tensor, lora_A: nn.Parameter, lora_B: nn.Parameter) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A = lora_A
        self.lora_B = lora_B

    def forward(self, x: Tensor) -> Tensor:
        return eager_lora(x, self.weight, self.lora_A, self.lora_B, SCALING)


def _parameters(layer: Layer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    a, b = layer.adapters[adapter]
    return nn.Parameter(a), nn.Parameter(b)


def eager(adapter: str) -> Build:
    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        return Built(EagerLoRA(layer.weight, a, b), (a, b))

    return build


def eager_with_bias(adapter: str) -> Build:
    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        return Built(lambda x: eager_lora(x, layer.weight, a, b, SCALING, bias=layer.bias), (a, b))

    return build


def eager_with_dropout(adapter: str) -> Build:
    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        kept = Kept()

        def drop(x: Tensor) -> Tensor:
            dropped = F.dropout(x, DROPOUT)
            if kept.wanted:
                # An element of x that is itself zero reads as dropped; it only ever counts in dX, where x is random.
                noted = dropped.detach()
                kept.read = lambda: noted != 0
            return dropped

        return Built(lambda x: eager_lora(x, layer.weight, a, b, SCALING, drop), (a, b), kept)

    return build


def eager_with_dora(adapter: str) -> Build:
    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        m = nn.Parameter(layer.magnitude.to(a.dtype))
        return Built(lambda x: eager_dora(x, layer.weight, a, b, m, SCALING), (a, b, m))

    return build


def compiled(adapter: str, mode: str) -> Build:
    # The function, not a module for each set: one compilation then serves every set of the rotation.
    # fullgraph: a graph break, or more recompilations than allowed, is an error and not a silent eager run.
    @functools.cache  # torch.compile imports the compiler: only for rows that are measured
    def function() -> Callable[..., Tensor]:
        return torch.compile(eager_lora, mode=mode, fullgraph=True, dynamic=False)

    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        call = function()
        return Built(lambda x: call(x, layer.weight, a, b, SCALING), (a, b))

    return build


def peft(adapter: str) -> Build:
    def build(layer: Layer, case: Case) -> Built:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=case.r, lora_alpha=int(SCALING * case.r), target_modules=["0"], lora_dropout=0.0)
        model = get_peft_model(nn.Sequential(linear(layer, case)), config, autocast_adapter_dtype=adapter == "fp32")
        module = model.base_model.model[0]
        a, b = _parameters(layer, adapter)
        module.lora_A["default"].weight = a
        module.lora_B["default"].weight = b
        return Built(module, (a, b))

    return build


def fusedlora(
    adapter: str, *, bias: bool = False, lora_dropout: float = 0.0, use_dora: bool = False, backend: str = "auto"
) -> Build:
    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        module = FusedLoRALinear.from_linear(
            linear(layer, case, bias),
            r=case.r,
            lora_alpha=int(SCALING * case.r),
            lora_dropout=lora_dropout,
            use_dora=use_dora,
            adapter_dtype=a.dtype,
        )
        module.lora_A, module.lora_B = a, b
        module.backend = backend
        parameters: tuple[Tensor, ...] = (a, b)
        if use_dora:
            module.lora_magnitude_vector = nn.Parameter(layer.magnitude.to(a.dtype))
            parameters = (a, b, module.lora_magnitude_vector)
        kept = Kept()
        if lora_dropout:
            _note(module, kept, case)
        return Built(module, parameters, kept)

    return build


def _note(module: FusedLoRALinear, kept: Kept, case: Case) -> None:
    """While wanted, keep what a call's backward will read of its dropout, the seed, or on a CPU the mask: the only one
    of int64 or bool that is saved for it."""
    saved: list[Tensor] = []
    hooks = contextlib.ExitStack()

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def before(module: nn.Module, args: tuple[Tensor]) -> None:
        saved.clear()
        if kept.wanted:
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))

    def after(module: nn.Module, args: tuple[Tensor], y: Tensor | None) -> None:
        hooks.close()
        if kept.wanted and y is not None:
            (drawn,) = (t for t in saved if not t.is_floating_point())
            kept.read = lambda: dropout.as_mask(drawn, case.M, case.K, DROPOUT, y.device)
            saved.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)  # y is None where the call failed
