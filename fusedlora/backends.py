"""The backends in order of preference, and the one place that picks between them."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import costs, cuda, reference, tuning
from .config import MAX_RANK, MAX_RANK_FLOAT32, Problem
from .cuda_config import FEW_CONVERTED, MAX_RANK_PRECISE, prefers_cuda
from .cuda_config import MAX_RANK as MAX_RANK_CUDA
from .doctor import doctor_passed
from .dropout import MAX_P


class Call(NamedTuple):
    """What decides who takes a call. A tuple: cheap to build, and the key of the choices made."""

    named: bool  # asked for by name, not by "auto"
    device: torch.device
    dtype: torch.dtype  # of x, weight and y
    adapter_dtype: torch.dtype  # of S, T and the adapter's products
    param_dtype: torch.dtype  # of lora_A and lora_B
    N: int
    K: int
    r: int
    dropout: str  # "", "seed", "device seed" or "mask": what `dropout.draw` gave
    weight_layout: tuple[int, int, int]  # row stride, last stride, address % 16
    precision: str  # float32_matmul_precision, "" unless dtype is float32
    rows: int = 1  # counted_rows(M)
    scale: bool = False  # whether scaling is read on the device
    direction: str = "forward"  # or "backward": "auto" may take one backend for the one and another for the other
    plain: bool = False  # the products of lora_linear and no more: "auto" may leave them to PyTorch where it is faster

    def problem(self, M: int, direction: str, capability: int, num_sms: int) -> Problem:
        """What such a call of M rows is to the configurations of a direction's kernels."""
        sides = (self.N, self.K) if direction == "forward" else (self.K, self.N)
        precise = self.adapter_dtype is not self.dtype
        return Problem(M, *sides, self.r, self.dtype.itemsize, precise, capability, num_sms, self.dropout != "")


@dataclass(frozen=True)
class Backend:
    """A way to run the two ops. why_not gives the reason against a call, or None.

    launchers, where there are any, gives for a device the functions that make forward's and backward's launches of
    calls whose tensors are packed: see packed.py. Nobody is told of calls that an optional one does not take, unless
    they ask.
    """

    name: str
    why_not: Callable[[Call], str | None]
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    launchers: Callable[[torch.device], tuple[Callable[..., Any], Callable[..., Any]]] | None = None
    optional: bool = False


def describe_call(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    adapter_dtype: torch.dtype,
    direction: str = "forward",
    *,
    plain: bool = False,
) -> Call:
    """The call of lora_linear's tensors; x may be dy, and weight None where no asked gradient reads it."""
    r, K = lora_A.shape
    N = lora_B.shape[0]
    dtype = x.dtype
    if weight is None:
        layout = (K, 1, 0)
    else:
        row, last = weight.stride()
        layout = (row, last, weight.data_ptr() % 16)
    precision = float32_precision() if dtype is torch.float32 else ""
    named = backend != "auto"
    if mask is None:
        noise = ""
    elif mask.dtype is torch.bool:
        noise = "mask"
    else:
        noise = "device seed" if mask.is_cuda else "seed"
    rows = counted_rows(x.numel() // x.shape[-1])
    dtypes = dtype, adapter_dtype, lora_A.dtype
    return Call(named, x.device, *dtypes, N, K, r, noise, layout, precision, rows, scale is not None, direction, plain)


def counted_rows(M: int) -> int:
    """M rounded up, by less than a sixteenth, so that choices are few."""
    step = 1 << max(0, (M - 1).bit_length() - 5)
    return max(1, -(-M // step) * step)


def backward_of(call: Call) -> Call:
    """The call of a forward's backward. DoRA's is plain though its forward is not, unless the gain goes to W's rows."""
    from .dora_gradients import by_weight

    about = call.rows, call.K, call.r, call.dtype, call.adapter_dtype
    return call._replace(direction="backward", plain=call.plain or not by_weight(*about))


def float32_precision() -> str:
    """torch.get_float32_matmul_precision(), also where torch.backends' newer settings make that one raise."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


@cache
def _triton_missing() -> str | None:
    """Why the kernels cannot be imported, None when they can."""
    try:
        from fusedlora.kernels import backward, forward  # noqa: F401
    except Exception as error:  # a broken install raises anything; the reason is kept and shown
        return f"triton cannot be used ({type(error).__name__}: {error})"
    return None


@cache
def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# Where kernels whose programs wait for one another have been run; elsewhere each call takes two launches until
# `python -m fusedlora doctor` has passed there.
_WAITING_HAS_RUN = ((9, 0),)


@cache
def takes_one_launch(device: torch.device) -> bool:
    """Whether a call's phases go into one launch there, whose programs wait for one another."""
    if device.type != "cuda":
        return True
    capability = _capability(device)
    return capability in _WAITING_HAS_RUN or doctor_passed(capability)


def _interpreted() -> bool:
    """Whether this process runs the kernels in triton's interpreter, and so on CPU tensors."""
    if _triton_missing() is not None:
        return False
    from fusedlora.kernels.common import INTERPRET

    return bool(INTERPRET)


def _triton_why_not(call: Call) -> str | None:
    kind = call.device.type
    if kind == "cuda":
        if torch.version.hip is not None:
            return "this is a ROCm build of torch, where the kernels have not been run"
        capability = _capability(call.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        if (missing := _triton_missing()) is not None:
            return missing
        if capability[0] == 10 and _triton_version() < (3, 9):
            return (
                f"triton before 3.9 compiles some of the kernels to empty ones for compute capability "
                f"{capability[0]}.{capability[1]}"
            )
        if capability[0] == 10 and call.dropout:
            return (
                f"triton compiles some of the kernels with dropout to empty ones for compute capability "
                f"{capability[0]}.{capability[1]}"
            )
    elif call.named and (missing := _triton_missing()) is not None:
        return missing
    elif not (kind == "cpu" and call.named and _interpreted()):
        return f"x is on {kind}, the kernels run on cuda"
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype is {call.dtype}, the kernels take bfloat16, float16 and float32"
    if call.dtype is torch.float16 and call.adapter_dtype is torch.float32:
        return (
            "lora_A is float32 beside a float16 x outside autocast: the kernels keep such adapters' precision over bf16"
        )
    if (reason := _shapes_why_not(call, MAX_RANK_FLOAT32 if call.dtype is torch.float32 else MAX_RANK)) is not None:
        return reason
    if call.precision == "highest":
        return (
            'x is float32 and torch.get_float32_matmul_precision() is "highest": '
            'the kernels form float32 products from tf32 ones, which "high" allows'
        )
    if call.dtype is torch.float32 and not call.named:
        return "x is float32, where the kernels have not been measured faster"
    return _why_slower("triton", call)


# How a reason begins that nobody is warned of.
SLOWER = "PyTorch's own products are expected to take less time"


def _why_slower(kernels: str, call: Call) -> str | None:
    """Why "auto" leaves the call to PyTorch's products. Beside those the reference would make a mask or copies of x."""
    if call.named or not call.plain or call.dropout or call.scale or call.adapter_dtype is not call.dtype:
        return None
    if call.device.type != "cuda":
        return None
    if (found := _compared(call)) is not None:
        us = found.us if kernels == "triton" else _cuda_us(call, found)
        if us is not None and found.products_us is not None:
            told = f"{SLOWER}: measured {found.products_us:.0f} µs, the kernels {us:.0f}"
            return told if found.products_us < us else None
    # Where nobody has compared them the kernels' wide ranks are no others.
    if _capability(call.device) != (9, 0) and call.r <= costs.MAX_RANK_FASTER:
        return None
    about = call.direction == "forward", call.rows, call.N, call.K, call.r, call.param_dtype is not call.dtype
    why = costs.why_slower(kernels, *about, cuda.num_sms(call.device))
    return why and f"{SLOWER}: {why}"


def _compared(call: Call) -> tuning.Compared | None:
    """What was measured for about such a call on its GPU."""
    major, minor = _capability(call.device)
    problem = call.problem(call.rows, call.direction, 10 * major + minor, cuda.num_sms(call.device))
    return tuning.compared(call.direction, problem, call.device)


def _cuda_us(call: Call, found: tuning.Compared) -> float | None:
    """What csrc's kernels took. With few rows other ones take fp32 parameters, which autocast rounds: unknown."""
    return None if call.param_dtype is not call.adapter_dtype and call.rows <= FEW_CONVERTED else found.cuda_us


def _why_triton(call: Call) -> str | None:
    """Why "auto" prefers Triton's kernels to those of csrc."""
    found = _compared(call)
    if found is not None and (us := _cuda_us(call, found)) is not None:
        told = f"Triton's kernels take less time: measured {found.us:.0f} µs, these {us:.0f}"
        return told if found.us < us else None
    precise, converts = call.adapter_dtype is not call.dtype, call.param_dtype is not call.dtype
    about = (call.direction, call.rows, call.N, call.K, call.r, call.dropout != "", converts, precise)
    return None if prefers_cuda(*about) else "these kernels have not been measured faster here"


def _shapes_why_not(call: Call, max_rank: int) -> str | None:
    """What any kernels that read through tensor maps have against the tensors."""
    if call.dropout == "mask":
        return f"dropout comes as a mask, as it does above a rate of {MAX_P}: the kernels make theirs from a seed"
    size = call.dtype.itemsize
    for name, columns in (("in_features", call.K), ("out_features", call.N)):
        if columns * size % 16:
            return f"{name} {columns} of {call.dtype} is not a multiple of 16 bytes"
    if call.r > max_rank:
        return f"r is {call.r}, the kernels take up to {max_rank} in {call.dtype}"
    row, last, offset = call.weight_layout
    if last != 1 or row < call.K or row * size % 16 or offset:
        return (
            f"weight has strides ({row}, {last}) and starts {offset} bytes past a multiple of 16: "
            "its rows must be contiguous and start at multiples of 16 bytes"
        )
    return None


def _cuda_why_not(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"x is on {call.device.type}, the kernels run on cuda"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch, the kernels are for NVIDIA's Hopper GPUs"
    capability = _capability(call.device)
    if capability != (9, 0):
        return f"compute capability is {capability[0]}.{capability[1]}, the kernels are compiled for 9.0"
    if not call.named and (reason := _why_triton(call)) is not None:
        return reason
    if (missing := cuda.missing()) is not None:
        return missing
    precise = call.adapter_dtype is not call.dtype
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {call.dtype}, the kernels take bfloat16 and float16"
    if precise and (call.dtype is not torch.bfloat16 or call.r > MAX_RANK_PRECISE):
        return (
            f"lora_A is {call.param_dtype} outside autocast and r is {call.r}: the kernels keep that precision "
            f"over bfloat16 up to r = {MAX_RANK_PRECISE}, x is {call.dtype}"
        )
    if call.scale:
        return "scaling is a tensor, which is read on the device: the kernels take a number"
    reason = _shapes_why_not(call, MAX_RANK_CUDA)
    return reason or _why_slower("cuda", call)


def _cuda_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    gain: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    return cuda.lora_forward(x, weight, lora_A, lora_B, bias, gain=gain, seed=mask, **settings)


def _cuda_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    **settings: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return cuda.lora_backward(dy, x, _or_shape(weight, dy, lora_A), lora_A, lora_B, s, seed=mask, **settings)


def _or_shape(weight: Tensor | None, dy: Tensor, lora_A: Tensor) -> Tensor:
    """weight, or where no asked gradient reads it a shape without memory."""
    return dy.new_empty(1).expand(dy.shape[1], lora_A.shape[1]) if weight is None else weight


def _cuda_launchers(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return cuda.forward_plan, cuda.backward_plan


def _triton_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    gain: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    save_s: bool,
) -> tuple[Tensor, Tensor | None]:
    from fusedlora.kernels.forward import lora_forward

    return lora_forward(
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        scale=scale,
        gain=gain,
        seed=mask,
        scaling=scaling,
        dropout_p=dropout_p,
        adapter_dtype=adapter_dtype,
        save_s=save_s,
        one_launch=takes_one_launch(x.device),
    )


def _triton_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from fusedlora.kernels.backward import lora_backward

    return lora_backward(
        dy,
        x,
        _or_shape(weight, dy, lora_A),
        lora_A,
        lora_B,
        s,
        scale=scale,
        seed=mask,
        scaling=scaling,
        dropout_p=dropout_p,
        adapter_dtype=adapter_dtype,
        need_dx=need_dx,
        need_dA=need_dA,
        need_dB=need_dB,
        one_launch=takes_one_launch(dy.device),
    )


def _triton_launchers(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from fusedlora.kernels.backward import backward_plan
    from fusedlora.kernels.forward import forward_plan

    settings = {"one_launch": takes_one_launch(device)}
    return partial(forward_plan, **settings), partial(backward_plan, **settings)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts a floating tensor on this one's device to, None where it is off."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from casting what lora_linear has already put in the right dtype."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def _reference_forward(x: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    with without_autocast(x):
        return reference.forward(x, *args, **settings)


def _reference_backward(dy: Tensor, *args: Any, **settings: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with without_autocast(dy):
        return reference.backward(dy, *args, **settings)


TRITON = Backend("triton", _triton_why_not, _triton_forward, _triton_backward, _triton_launchers)
REFERENCE = Backend("reference", lambda call: None, _reference_forward, _reference_backward)
CUDA = Backend("cuda", _cuda_why_not, _cuda_forward, _cuda_backward, _cuda_launchers, optional=True)
BACKENDS = (CUDA, TRITON, REFERENCE)
NAMES = ("auto", *(backend.name for backend in BACKENDS))

last_used: str | None = None  # name of the backend that the latest forward or backward took
last_backward: str | None = None  # that of the latest one's backward; its own, if it was a backward
# by the backend asked for, the call, and whether algorithms must be deterministic, which turns tuned tables off
_chosen: dict[tuple[str, Call, bool], tuple[Backend, str]] = {}
_warned: set[str] = set()


def select(name: str, call: Call) -> Backend:
    """The backend that takes the call.

    "auto" gives the first that has nothing against it; the first fallback for a reason on a CUDA device warns.

    Raises:
        ValueError: name is no backend.
        RuntimeError: the named backend does not take the call; the message says why.
    """
    global last_used, last_backward
    key = name, call, torch.are_deterministic_algorithms_enabled()
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(name, call), _choose(name, backward_of(call)).name
    backend, last_backward = found
    last_used = backend.name
    return backend


def taken() -> str | None:
    """What the latest call took, in words: a backend's name, or those of forward and backward where they differ."""
    return None if last_used is None else told(last_used, last_backward)


def told(forward: str, backward: str | None) -> str:
    return forward if backward in (None, forward) else f"{forward} forward + {backward} backward"


def _choose(name: str, call: Call) -> Backend:
    if name == "auto":
        refusals = {}
        for backend in BACKENDS:
            reason = backend.why_not(call)
            if reason is None:
                break
            if not (backend.optional or reason.startswith(SLOWER)):
                refusals[backend.name] = reason
        if call.device.type == "cuda":
            for refusing, reason in refusals.items():
                warn_once(backend.name, refusing, reason)
        return backend
    backend = _by_name(name)
    reason = backend.why_not(call)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} does not take this call: {reason}")
    return backend


def warn_once(taken: str, refusing: str, reason: str) -> None:
    """Says that a call falls back, the first time for a reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"fusedlora takes its {taken} path, not {refusing}: {reason}. "
            "fusedlora.explain() says so for any call; this reason is not repeated.",
            stacklevel=3,
        )


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend is {name!r}, must be one of {', '.join(NAMES)}")
