"""Who is measured: this package, the frozen linear, PEFT's arithmetic in its settings, torch.compile of it, peft."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import bench_layers as layers
import torch
from bench_cases import Case
from bench_layers import DROPOUT, Build

from fusedlora import backends

T = TypeVar("T")

TRAINING = ("forward", "backward", "training", "module")
EVERY = (*TRAINING, "features", "decode")


@dataclass(frozen=True)
class Contender:
    """A row of the tables. rival: the eager row with the same adapter dtype, autocast and feature, for ours."""

    name: str
    label: str
    build: Build
    adapter: str | None  # "same", "fp32", None: no adapter
    autocast: bool = False
    rival: str | None = None
    compiled: bool = False
    feature: str = ""  # "dropout", "dora"
    backend: str | None = None  # the one that must take ours, where it is not the session's
    groups: tuple[str, ...] = TRAINING

    @property
    def ours(self) -> bool:
        return self.rival is not None

    @property
    def setting(self) -> tuple[str | None, bool, str]:
        """What two rows share that may be compared."""
        return self.adapter, self.autocast, self.feature

    def adapter_itemsize(self, case: Case) -> int | None:
        if self.adapter is None:
            return None
        return 4 if self.adapter == "fp32" else case.torch_dtype.itemsize

    def context(self, device: torch.device, case: Case) -> contextlib.AbstractContextManager:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=case.torch_dtype)


def _pairs(case: Case) -> list[Contender]:
    """For every setting our row and the eager row."""
    kind = f"{case.dtype} adapters"
    adapters = [("", kind, "same", False)]
    if case.dtype != "fp32":
        adapters += [
            ("_amp", "fp32 adapters, autocast", "fp32", True),
            ("_fp32", "fp32 adapters, no autocast", "fp32", False),
        ]
    rows = []

    def add(suffix: str, label: str, ours: Build, eager: Build, **setting: Any) -> None:
        rows.append(Contender(f"fusedlora{suffix}", f"fusedlora, {label}", ours, rival=f"eager{suffix}", **setting))
        rows.append(Contender(f"eager{suffix}", f"PEFT arithmetic, {label}", eager, **setting))

    for suffix, label, adapter, autocast in adapters:
        shared = {"adapter": adapter, "autocast": autocast}
        groups = (*TRAINING, "features") if suffix else EVERY
        add(suffix, label, layers.fusedlora(adapter), layers.eager(adapter), **shared, groups=groups)
        ours, eager = layers.fusedlora(adapter, lora_dropout=DROPOUT), layers.eager_with_dropout(adapter)
        shared |= {"feature": "dropout", "groups": ("features",)}
        add(f"{suffix}_dropout", f"{label}, dropout {DROPOUT}", ours, eager, **shared)
    ours, eager = layers.fusedlora("same", use_dora=True), layers.eager_with_dora("same")
    add("_dora", f"{kind}, DoRA", ours, eager, adapter="same", feature="dora", groups=("features",))
    return rows


def contenders(case: Case, *, compile: bool, autotune: bool) -> list[Contender]:
    """Every row of a case, the frozen linear first, then ours."""
    kind = case.dtype
    mixed = case.dtype != "fp32"
    pairs = _pairs(case)
    frozen = Contender("frozen", "frozen nn.Linear", layers.frozen, None, groups=EVERY)
    rows = [frozen, *(row for row in pairs if row.ours), *(row for row in pairs if not row.ours)]
    if find_spec("peft") is not None:
        rows.append(Contender("peft", f"peft, {kind} adapters", layers.peft("same"), "same"))
        if mixed:
            rows.append(Contender("peft_amp", "peft, fp32 adapters, autocast", layers.peft("fp32"), "fp32", True))
    if compile:
        build = layers.compiled("same", "default")
        rows.append(Contender("compile", f"torch.compile, {kind} adapters", build, "same", compiled=True))
        if mixed:
            build = layers.compiled("fp32", "default")
            label = "torch.compile, fp32 adapters, autocast"
            rows.append(Contender("compile_amp", label, build, "fp32", True, compiled=True))
    if autotune:
        build = layers.compiled("same", "max-autotune-no-cudagraphs")
        label = f"torch.compile max-autotune, {kind} adapters"
        rows.append(Contender("autotune", label, build, "same", compiled=True))
    return rows


def sweep_contenders(case: Case, backend: str, *, compile: bool) -> list[Contender]:
    """Frozen, ours by `auto`, which takes `backend`, the kernels by name where auto does not take them, eager."""
    known = {c.name: c for c in contenders(case, compile=compile, autotune=False)}
    rows = [known["frozen"], replace(known["fusedlora"], label="fusedlora, auto", backend=backend)]
    if backend != "triton":
        build = layers.fusedlora("same", backend="triton")
        label = "fusedlora, kernels by name"
        rows.append(replace(rows[1], name="fusedlora_triton", label=label, build=build, backend="triton"))
    return [*rows, known["eager"], *([known["compile"]] if compile else [])]


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
