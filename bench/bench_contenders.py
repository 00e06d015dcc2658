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
from fusedlora.calls import Call, backward_of, counted_rows, float32_precision

T = TypeVar("T")

TRAINING = ("forward", "backward", "training", "module")
EVERY = (*TRAINING, "features", "decode")


@dataclass(frozen=True)
class Contender:
    """A row of the tables. rival: the eager row with the same adapter dtype, autocast and feature, for ours.

    A row of ours has a twin of backend "cuda" where that takes it, without_twin says why it does not; and one of "auto"
    where that takes one of the two for forward and the other for backward.
    """

    name: str
    label: str
    build: Build
    adapter: str | None  # "same", "fp32", None: no adapter
    autocast: bool = False
    rival: str | None = None
    compiled: bool = False
    feature: str = ""  # "bias", "dropout", "dora"
    backend: str | None = None  # the one that must take ours, where it is not the session's
    backward: str | None = None  # the one that must take its backward, where that is another
    groups: tuple[str, ...] = TRAINING
    without_twin: str | None = None

    @property
    def ours(self) -> bool:
        return self.rival is not None

    @property
    def setting(self) -> tuple[str | None, bool, str]:
        """What two rows share that may be compared."""
        return self.adapter, self.autocast, self.feature

    def taker(self, direction: str, session: str) -> str:
        """The backend that must take ours forward or backward, the session's where the row has none of its own."""
        return (self.backward if direction == "backward" else None) or self.backend or session

    def adapter_itemsize(self, case: Case) -> int | None:
        if self.adapter is None:
            return None
        return 4 if self.adapter == "fp32" else case.torch_dtype.itemsize

    def context(self, device: torch.device, case: Case) -> contextlib.AbstractContextManager:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=case.torch_dtype)


def call_of(row: Contender, case: Case, device: torch.device, direction: str, *, named: bool) -> Call:
    """How a backend sees the row's calls, packed as they are; with dropout on a GPU as captured ones, with its seed."""
    wide = row.adapter == "fp32" and case.dtype != "fp32"
    dtype, parameter = case.torch_dtype, torch.float32 if wide else case.torch_dtype
    call = Call(
        named,
        device,
        dtype,
        dtype if row.autocast else parameter,
        parameter,
        case.N,
        case.K,
        case.r,
        dropout="" if row.feature != "dropout" else "device seed" if device.type == "cuda" else "mask",
        weight_layout=(case.K, 1, 0),
        precision=float32_precision() if case.dtype == "fp32" else "",
        rows=counted_rows(case.M),
        plain=row.feature != "dora",
    )
    return call if direction == "forward" else backward_of(call)


def auto_takers(row: Contender, case: Case, device: torch.device) -> list[str]:
    """The backends that "auto" takes for the row's calls, forward and backward."""
    return [
        next(b.name for b in backends.BACKENDS if b.why_not(call_of(row, case, device, way, named=False)) is None)
        for way in ("forward", "backward")
    ]


def auto_takes(row: Contender, case: Case, device: torch.device, group: str) -> str:
    """The same in words, as far as a group's calls go."""
    takers = auto_takers(row, case, device)
    if group in ("forward", "decode"):
        return takers[0]
    return takers[1] if group == "backward" else backends.told(*takers)


def with_twins(row: Contender, case: Case, device: torch.device, cuda: Build, auto: Build) -> list[Contender]:
    """A row of ours, its twin by `cuda`, and one by `auto` where that mixes; alone where "cuda" does not take it."""
    ways = [call_of(row, case, device, way, named=True) for way in ("forward", "backward")]
    for reason in map(backends.CUDA.why_not, ways):
        if reason is not None:
            return [replace(row, without_twin=reason)]

    def twin(asked: str, build: Build, **takers: str) -> Contender:
        name = row.name.replace("fusedlora", f"fusedlora_{asked}")
        label = row.label.replace(f"fusedlora {row.backend}", f"fusedlora {asked}")
        return replace(row, name=name, label=label, build=build, **takers)

    rows = [row, twin("cuda", cuda, backend="cuda")]
    forward, backward = auto_takers(row, case, device)
    if forward != backward:
        both = tuple(group for group in row.groups if group not in ("forward", "backward", "decode"))
        rows.append(replace(twin("auto", auto, backend=forward, backward=backward), groups=both))
    return rows


def _pairs(case: Case, backend: str, twins_on: torch.device | None) -> list[Contender]:
    """For every setting our row, its twin and the eager row."""
    kind = f"{case.dtype} adapters"
    adapters = [("", kind, "same", False)]
    if case.dtype != "fp32":
        adapters += [
            ("_amp", "fp32 adapters, autocast", "fp32", True),
            ("_fp32", "fp32 adapters, no autocast", "fp32", False),
        ]
    rows = []

    def add(suffix: str, label: str, adapter: str, eager: Build, options: dict[str, Any], **setting: Any) -> None:
        ours, cuda, auto = (layers.fusedlora(adapter, backend=name, **options) for name in (backend, "cuda", "auto"))
        rival, setting = f"eager{suffix}", setting | {"adapter": adapter}
        row = Contender(f"fusedlora{suffix}", f"fusedlora, {label}", ours, rival=rival, **setting)
        if twins_on is None:
            rows.append(row)
        else:
            row = replace(row, label=f"fusedlora {backend}, {label}", backend=backend)
            rows.extend(with_twins(row, case, twins_on, cuda, auto))
        rows.append(Contender(rival, f"PEFT arithmetic, {label}", eager, **setting))

    for suffix, label, adapter, autocast in adapters:
        groups = (*TRAINING, "features") if suffix else EVERY
        add(suffix, label, adapter, layers.eager(adapter), {}, autocast=autocast, groups=groups)
        feature = {"autocast": autocast, "feature": "dropout", "groups": ("features",)}
        eager = layers.eager_with_dropout(adapter)
        add(f"{suffix}_dropout", f"{label}, dropout {DROPOUT}", adapter, eager, {"lora_dropout": DROPOUT}, **feature)
    eager = layers.eager_with_bias("same")
    add("_bias", f"{kind}, bias", "same", eager, {"bias": True}, feature="bias", groups=("features",))
    eager = layers.eager_with_dora("same")
    add("_dora", f"{kind}, DoRA", "same", eager, {"use_dora": True}, feature="dora", groups=("features",))
    return rows


def contenders(
    case: Case, *, compile: bool, autotune: bool, backend: str = "auto", twins_on: torch.device | None = None
) -> list[Contender]:
    """Every row of a case, the frozen linear first, then ours.

    backend: the one that ours ask for. twins_on: the device on which each of ours gets a twin of backend "cuda".
    """
    kind = case.dtype
    mixed = case.dtype != "fp32"
    pairs = _pairs(case, backend, twins_on)
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


def sweep_contenders(case: Case, backend: str, backward: str | None, *, compile: bool) -> list[Contender]:
    """Frozen, ours by `auto`, which takes `backend` (and `backward`), Triton's where auto does not take them, eager."""
    known = {c.name: c for c in contenders(case, compile=compile, autotune=False)}
    ours = replace(known["fusedlora"], label="fusedlora, auto", backend=backend, backward=backward)
    rows = [known["frozen"], ours]
    if (backend, backward) != ("triton", None):
        build = layers.fusedlora("same", backend="triton")
        triton = {"label": "fusedlora, kernels by name", "build": build, "backend": "triton", "backward": None}
        rows.append(replace(ours, name="fusedlora_triton", **triton))
    return [*rows, known["eager"], *([known["compile"]] if compile else [])]


class BackendMismatch(AssertionError):
    """Another backend ran than the row claims."""


def assert_backend(expected: str | tuple[str, ...], run: Callable[[], T]) -> T:
    """What run returns; it must go through lora_linear, and the backend that took its last call is checked.

    expected: its name, or the names that are all right.

    Raises:
        BackendMismatch: none or another one did.
    """
    backends.last_used = None
    result = run()
    if backends.last_used not in ((expected,) if isinstance(expected, str) else expected):
        raise BackendMismatch(f"the row is for backend {expected!r}, the call took {backends.last_used!r}")
    return result
