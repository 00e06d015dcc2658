"""The backends in order of preference, and the one place that picks between them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cuda, reference
from .autocast import without_autocast
from .calls import Call, backward_of
from .why_not import SLOWER, cuda_why_not, takes_one_launch, triton_why_not


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


def _reference_forward(x: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    with without_autocast(x):
        return reference.forward(x, *args, **settings)


def _reference_backward(dy: Tensor, *args: Any, **settings: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with without_autocast(dy):
        return reference.backward(dy, *args, **settings)


TRITON = Backend("triton", triton_why_not, _triton_forward, _triton_backward, _triton_launchers)
REFERENCE = Backend("reference", lambda call: None, _reference_forward, _reference_backward)
CUDA = Backend("cuda", cuda_why_not, _cuda_forward, _cuda_backward, _cuda_launchers, optional=True)
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
