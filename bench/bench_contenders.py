"""Who is measured: this package, the frozen linear, PEFT's arithmetic in its settings, torch.compile of it, peft."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import torch
from bench_cases import Case
from torch import Tensor, nn
from torch.nn import functional as F

from fusedlora import FusedLoRALinear, backends

SCALING = 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """One set in the rotation: x [M, K], dy [M, N], W [N, K] and an adapter, in fp32 and rounded to W's dtype."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    adapters: dict[str, tuple[Tensor, Tensor]]  # "same" (as W) and "fp32": A [r, K], B [N, r]


@dataclass(frozen=True)
class Built:
    """A contender over one layer: the call, and the adapter's parameters it trains."""

    call: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """A row of the tables. rival: the eager row with the same adapter dtype and autocast, for ours."""

    name: str
    label: str
    build: Callable[[Layer, Case], Built]
    adapter: str | None  # "same", "fp32", None: no adapter
    autocast: bool = False
    rival: str | None = None
    compiled: bool = False

    @property
    def ours(self) -> bool:
        return self.rival is not None

    def adapter_itemsize(self, case: Case) -> int | None:
        if self.adapter is None:
            return None
        return 4 if self.adapter == "fp32" else case.torch_dtype.itemsize

    def context(self, device: torch.device, case: Case) -> contextlib.AbstractContextManager:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=case.torch_dtype)


def _frozen(layer: Layer, case: Case) -> Built:
    linear = _linear(layer, case)
    return Built(linear, ())


def _linear(layer: Layer, case: Case) -> nn.Linear:
    linear = nn.Linear(case.K, case.N, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    return linear


def eager_lora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The arithmetic of PEFT's lora.Linear without dropout: x is cast to the adapter's dtype, the sum to the base's."""
    base = F.linear(x, weight)
    update = F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B) * scaling
    return (base + update).to(base.dtype)


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


def _eager(adapter: str) -> Callable[[Layer, Case], Built]:
    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        return Built(EagerLoRA(layer.weight, a, b), (a, b))

    return build


def _compiled(adapter: str, mode: str) -> Callable[[Layer, Case], Built]:
    # The function, not a module for each set: one compilation then serves every set of the rotation.
    # fullgraph: a graph break, or more recompilations than allowed, is an error and not a silent eager run.
    compiled = torch.compile(eager_lora, mode=mode, fullgraph=True, dynamic=False)

    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        return Built(lambda x: compiled(x, layer.weight, a, b, SCALING), (a, b))

    return build


def _peft(adapter: str) -> Callable[[Layer, Case], Built]:
    def build(layer: Layer, case: Case) -> Built:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=case.r, lora_alpha=int(SCALING * case.r), target_modules=["0"], lora_dropout=0.0)
        model = get_peft_model(nn.Sequential(_linear(layer, case)), config, autocast_adapter_dtype=adapter == "fp32")
        module = model.base_model.model[0]
        a, b = _parameters(layer, adapter)
        module.lora_A["default"].weight = a
        module.lora_B["default"].weight = b
        return Built(module, (a, b))

    return build


def _fusedlora(adapter: str) -> Callable[[Layer, Case], Built]:
    def build(layer: Layer, case: Case) -> Built:
        a, b = _parameters(layer, adapter)
        module = FusedLoRALinear.from_linear(
            _linear(layer, case), r=case.r, lora_alpha=int(SCALING * case.r), adapter_dtype=a.dtype
        )
        module.lora_A, module.lora_B = a, b
        return Built(module, (a, b))

    return build


def contenders(case: Case, *, compile: bool, autotune: bool) -> list[Contender]:
    """Every row of a case, the frozen linear first."""
    kind = case.dtype
    rows = [
        Contender("frozen", "frozen nn.Linear", _frozen, None),
        Contender("fusedlora", f"fusedlora, {kind} adapters", _fusedlora("same"), "same", rival="eager"),
    ]
    mixed = case.dtype != "fp32"
    if mixed:
        rows += [
            Contender(
                "fusedlora_amp", "fusedlora, fp32 adapters, autocast", _fusedlora("fp32"), "fp32", True, "eager_amp"
            ),
            Contender(
                "fusedlora_fp32",
                "fusedlora, fp32 adapters, no autocast",
                _fusedlora("fp32"),
                "fp32",
                False,
                "eager_fp32",
            ),
        ]
    rows.append(Contender("eager", f"PEFT arithmetic, {kind} adapters", _eager("same"), "same"))
    if mixed:
        rows += [
            Contender("eager_amp", "PEFT arithmetic, fp32 adapters, autocast", _eager("fp32"), "fp32", True),
            Contender("eager_fp32", "PEFT arithmetic, fp32 adapters, no autocast", _eager("fp32"), "fp32"),
        ]
    if find_spec("peft") is not None:
        rows.append(Contender("peft", f"peft, {kind} adapters", _peft("same"), "same"))
        if mixed:
            rows.append(Contender("peft_amp", "peft, fp32 adapters, autocast", _peft("fp32"), "fp32", True))
    if compile:
        build = _compiled("same", "default")
        rows.append(Contender("compile", f"torch.compile, {kind} adapters", build, "same", compiled=True))
        if mixed:
            build = _compiled("fp32", "default")
            label = "torch.compile, fp32 adapters, autocast"
            rows.append(Contender("compile_amp", label, build, "fp32", True, compiled=True))
    if autotune:
        build = _compiled("same", "max-autotune-no-cudagraphs")
        label = f"torch.compile max-autotune, {kind} adapters"
        rows.append(Contender("autotune", label, build, "same", compiled=True))
    return rows


class BackendMismatch(AssertionError):
    """Another backend ran than the row claims."""


def assert_backend(expected: str, run: Callable[[], T]) -> T:
    """What run returns; it must go through lora_linear, and the backend that took its last call is checked.

    Raises:
        BackendMismatch: none or another one did.
    """
    backends.last_used = None
    result = run()
    if backends.last_used != expected:
        raise BackendMismatch(f"the row is for backend {expected!r}, the call took {backends.last_used!r}")
    return result
