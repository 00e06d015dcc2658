"""The package's two ops as torch.library sees them: schemas, fakes, implementations.

Registered on a low-level Library: a custom_op costs several times its host time. Both ops take x and dy flattened to
two dimensions, choose their backend by name and tensors, and write into none of their inputs.

    forward   y [M, N] in x's dtype and S [M, r] in adapter_dtype, S empty unless save_s
    backward  dx [M, K] in dy's dtype, dA [r, K] and dB [N, r] in lora_A's; empty where not needed. x is read for dA,
              weight for dx, s for dB; each may be None where it is not.

mask is what `dropout.draw` gave: a bool mask [M, K], or a seed int64 [1]. scale, 0-d, multiplies `scaling` where it is
only known on the device. gain [N], float32, multiplies y before the bias.
"""

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .calls import describe_call

LIB = torch.library.Library("fusedlora", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)

LIB.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? mask, "
    "Tensor? scale, Tensor? gain, float scaling, float dropout_p, ScalarType adapter_dtype, bool save_s, "
    "str backend) -> (Tensor y, Tensor s)",
    tags=TAGS,
)
LIB.define(
    "backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? s, Tensor? mask, "
    "Tensor? scale, float scaling, float dropout_p, ScalarType adapter_dtype, bool need_dx, bool need_dA, "
    "bool need_dB, str backend) -> (Tensor dx, Tensor dA, Tensor dB)",
    tags=TAGS,
)


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    save_s: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    call = describe_call(backend, x, weight, lora_A, lora_B, mask, scale, adapter_dtype, plain=gain is None)
    return select(backend, call).forward(
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        mask,
        scale,
        gain,
        scaling=scaling,
        dropout_p=dropout_p,
        adapter_dtype=adapter_dtype,
        save_s=save_s,
    )


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    save_s: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    M, r = x.shape[0], lora_A.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty((M, r) if save_s else (0,), dtype=adapter_dtype)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    plain = need_dx and need_dA and need_dB  # fewer gradients are fewer products
    call = describe_call(backend, dy, weight, lora_A, lora_B, mask, scale, adapter_dtype, "backward", plain=plain)
    return select(backend, call).backward(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        s,
        mask,
        scale,
        scaling=scaling,
        dropout_p=dropout_p,
        adapter_dtype=adapter_dtype,
        need_dx=need_dx,
        need_dA=need_dA,
        need_dB=need_dB,
    )


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = dy.shape
    r, K = lora_A.shape
    return (
        dy.new_empty((M, K) if need_dx else (0,)),
        lora_A.new_empty((r, K) if need_dA else (0,)),
        lora_B.new_empty((N, r) if need_dB else (0,)),
    )


# An op's outputs have to be tensors: empty ones stand for those that nobody asked for.


def _forward_tensors(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, s = _forward(*arguments)
    adapter_dtype = arguments[10]
    return y, y.new_empty(0, dtype=adapter_dtype) if s is None else s


def _backward_tensors(*arguments: Any) -> tuple[Tensor, ...]:
    dy, lora_A = arguments[0], arguments[3]
    grads = _backward(*arguments)
    return tuple(like.new_empty(0) if out is None else out for like, out in zip((dy, lora_A, lora_A), grads))


LIB.impl("forward", _forward_tensors, "CompositeExplicitAutograd")
LIB.impl("backward", _backward_tensors, "CompositeExplicitAutograd")
torch.library.register_fake("fusedlora::forward", _forward_fake, lib=LIB)
torch.library.register_fake("fusedlora::backward", _backward_fake, lib=LIB)

# the overloads themselves: calling through the packet would look them up each time
forward_op = torch.ops.fusedlora.forward.default
backward_op = torch.ops.fusedlora.backward.default

_PLAIN = frozenset((Tensor, torch.nn.Parameter, NoneType))


def dispatched(
    x: Tensor, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None = None
) -> bool:
    """Whether anyone but the backends has a say in what an op does to these tensors; x may be dy.

    That are modes (compilers, FakeTensor, tests), subclasses of Tensor, and lazy negation.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or x.is_neg()
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or type(lora_A) not in _PLAIN
        or type(lora_B) not in _PLAIN
        or type(bias) not in _PLAIN
    )


def forward(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """forward_op, past the dispatcher where it would do nothing: its host time is that of half a launch."""
    call = forward_op if dispatched(x, weight, lora_A, lora_B) else _forward
    return call(x, weight, lora_A, lora_B, *rest)


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """backward_op, as `forward`."""
    call = backward_op if dispatched(dy, x, weight, lora_A, lora_B) else _backward
    return call(dy, x, weight, lora_A, lora_B, *rest)
