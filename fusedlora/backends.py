"""The backends in order of preference, and the one place that picks between them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference


class Call(NamedTuple):
    """What decides who takes a call. A tuple, without M: cheap to build and the key of the choices made."""

    named: bool  # asked for by name, not by "auto"
    device: torch.device
    dtype: torch.dtype  # of x, weight and y
    adapter_dtype: torch.dtype  # of S, T and the adapter's products
    param_dtype: torch.dtype  # of lora_A and lora_B
    N: int
    K: int
    r: int
    masked: bool
    weight_layout: tuple[int, int, int]  # row stride, last stride, address % 16
    precision: str  # float32_matmul_precision, "" unless dtype is float32


@dataclass(frozen=True)
class Backend:
    """A way to run the two ops. why_not gives the reason against a call, or None."""

    name: str
    why_not: Callable[[Call], str | None]
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


_ALIGNED = (0, 1, 0)


def describe_call(
    backend: str,
    like: Tensor,
    weight: Tensor | None,
    param_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    N: int,
    K: int,
    r: int,
    masked: bool,
) -> Call:
    dtype = like.dtype
    layout = _ALIGNED
    if weight is not None:
        row, last = weight.stride()
        layout = (row, last, weight.data_ptr() % 16 if like.is_cuda else 0)
    precision = torch.get_float32_matmul_precision() if dtype is torch.float32 else ""
    return Call(
        backend != "auto", like.device, dtype, adapter_dtype, param_dtype, N, K, r, masked, layout, precision
    )


@lru_cache(None)
def _triton_import_error() -> str | None:
    """Why the kernels cannot be imported, None when they can."""
    try:
        import triton  # noqa: F401

        from fusedlora.kernels import backward, forward  # noqa: F401
    except Exception as error:  # a broken install raises anything; the reason is kept and shown
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


@lru_cache(None)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _interpreted() -> bool:
    if _triton_import_error() is not None:
        return False
    from fusedlora.kernels.common import INTERPRET

    return bool(INTERPRET)


_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _triton_why_not(call: Call) -> str | None:
    kind = call.device.type
    if kind != "cuda" and not (kind == "cpu" and call.named and _interpreted()):
        return f"x is on {kind}, the kernels run on cuda"
    if kind == "cuda":
        if torch.version.hip is not None:
            return "ROCm is not supported yet"
        capability = _capability(call.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    error = _triton_import_error()
    if error is not None:
        return error
    if call.dtype not in _TRITON_DTYPES:
        return f"dtype {call.dtype} is none of bfloat16, float16, float32"
    if call.masked:
        return "dropout is on"
    if call.r > 256:
        return f"r is {call.r}, above 256"
    size = call.dtype.itemsize
    for name, columns in (("in_features", call.K), ("out_features", call.N)):
        if columns * size % 16:
            return f"{name} {columns} of {size} bytes is not a multiple of 16 bytes"
    row, last, offset = call.weight_layout
    if last != 1 or row * size % 16 or offset:
        return f"weight has strides ({row}, {last}) and address % 16 = {offset}: rows must be contiguous and aligned"
    if not call.named and call.precision == "highest":
        return 'x is float32 and float32_matmul_precision is "highest"'
    return None


def _triton_forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, mask: Tensor | None,
    *, scaling: float, dropout_p: float, adapter_dtype: torch.dtype, save_s: bool,
) -> tuple[Tensor, Tensor | None]:
    from fusedlora.kernels.forward import lora_forward

    return lora_forward(
        x, weight, lora_A, lora_B, bias, scaling=scaling, adapter_dtype=adapter_dtype, save_s=save_s
    )


def _triton_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    s: Tensor | None, mask: Tensor | None,
    *, scaling: float, dropout_p: float, adapter_dtype: torch.dtype, param_dtype: torch.dtype,
    need_dx: bool, need_dA: bool, need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from fusedlora.kernels.backward import lora_backward

    return lora_backward(
        dy, x, weight, lora_A, lora_B, s,
        scaling=scaling, adapter_dtype=adapter_dtype, need_dx=need_dx, need_dA=need_dA, need_dB=need_dB,
    )


TRITON = Backend("triton", _triton_why_not, _triton_forward, _triton_backward)
REFERENCE = Backend("reference", lambda call: None, reference.forward, reference.backward)
BACKENDS = (TRITON, REFERENCE)
NAMES = ("auto", *(backend.name for backend in BACKENDS))

last_used: str | None = None  # name of the backend the latest call took
_chosen: dict[tuple[str, Call], Backend] = {}
_warned: set[str] = set()


def select(name: str, call: Call) -> Backend:
    """The backend that takes the call.

    "auto" gives the first that has nothing against it; the first fallback for a reason on a CUDA device warns.

    Raises:
        ValueError: name is no backend.
        RuntimeError: the named backend does not take the call; the message says why.
    """
    global last_used
    backend = _chosen.get((name, call))
    if backend is None:
        backend = _choose(name, call)
        _chosen[(name, call)] = backend
    last_used = backend.name
    return backend


def _choose(name: str, call: Call) -> Backend:
    if name != "auto":
        backend = next((b for b in BACKENDS if b.name == name), None)
        if backend is None:
            raise ValueError(f"backend is {name!r}, must be one of {', '.join(NAMES)}")
        reason = backend.why_not(call)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} does not take this call: {reason}")
        return backend
    for backend in BACKENDS:
        reason = backend.why_not(call)
        if reason is None:
            return backend
        if call.device.type == "cuda" and reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"fusedlora does not use its {backend.name} kernels: {reason}", stacklevel=2)
    raise RuntimeError("no backend takes this call")


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes and why the others do not."""

    backend: str
    why_not: dict[str, str]
    config: str | None = None
    copies: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        if self.config is not None:
            lines.append(f"config: {self.config}")
        lines += [f"not {name}: {reason}" for name, reason in self.why_not.items()]
        lines += [f"copy: {copy}" for copy in self.copies]
        return "\n".join(lines)


def explain(x: Tensor, weight: Any, lora_A: Tensor | None = None, lora_B: Tensor | None = None) -> Explanation:
    raise NotImplementedError
