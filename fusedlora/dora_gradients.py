"""DoRA's gradients: the usual ones in one op, any of them by lora_linear's backward of gain ∘ dy.

    dora_backward    dx [M, K] in dy's dtype, dA [r, K], dB [N, r] in lora_A's and dm [N] in the magnitude's

What it is given is what dora_linear's forward saves. Where W has fewer elements than dy the kernels put the gain on the
rows of W and B, and form dm beside dB from one read of dy.
"""

from typing import Any

import torch
from torch import Tensor

from . import backends, cuda, ops
from .backends import select
from .calls import Call, by_weight, describe_call
from .dora_ops import dora_scale, scaled_by_kernels
from .ops import LIB, TAGS
from .why_not import takes_one_launch

LIB.define(
    "dora_backward(Tensor dy, Tensor y, Tensor gain, Tensor norm, Tensor? bias, Tensor x, Tensor weight, Tensor s, "
    "Tensor lora_A, Tensor lora_B, Tensor? scale, float scaling, ScalarType adapter_dtype, "
    "ScalarType magnitude_dtype, str backend) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dm)",
    tags=TAGS,
)


def gradients(
    dy: Tensor,
    y: Tensor | None,
    gain: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    s: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor | None,
    scaling: float,
    adapter_dtype: torch.dtype,
    magnitude_dtype: torch.dtype,
    backend: str,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    need_dm: bool,
    need_dy: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB, dm and gain ∘ dy, None where not needed."""
    # A gain ∘ dy of 16 bits is good enough for dx and dW, which are 16-bit themselves. fp32 adapters' gradients are
    # not, so there the gain goes to the sides of the products: T = s · dy (g∘B), dB = g ∘ (dyᵀ S).
    split = adapter_dtype != dy.dtype
    need_AB = need_dA or need_dB
    need_dy = need_dy or need_dx or (need_AB and not split)
    dm = scaled = dx = dA = dB = None
    if need_dy or need_dm:
        given = (dy, y, gain, norm, bias, x, weight, s, lora_A, lora_B)
        scaled, dm = dora_scale(*given, adapter_dtype, magnitude_dtype, need_dy, need_dm, backend)

    def backward(dy: Tensor, B: Tensor, need_dx: bool, need_dA: bool, need_dB: bool) -> tuple[Tensor | None, ...]:
        given = (dy, x if need_dA else None, weight if need_dx else None, lora_A, B, s if need_dB else None, None)
        return ops.backward(*given, scale, scaling, 0.0, adapter_dtype, need_dx, need_dA, need_dB, backend)

    if split and need_AB:
        rows = gain.unsqueeze(1)
        _, dA, dB = backward(dy, lora_B * rows, False, need_dA, need_dB)
        if need_dB:
            assert dB is not None
            dB = dB * rows
        if need_dx:
            assert scaled is not None
            dx = backward(scaled, lora_B, True, False, False)[0]
    elif need_dx or need_AB:
        assert scaled is not None
        dx, dA, dB = backward(scaled, lora_B, need_dx, need_dA, need_dB)
    return (
        dx if need_dx else None,
        dA if need_dA else None,
        dB if need_dB else None,
        dm if need_dm else None,
        scaled,
    )


def _takes_by_weight(backend: str, call: Call) -> str | None:
    """Whose kernels take the backward by weight, None where none do.

    Not the CUDA ones beside fp32 adapters outside autocast: there "auto" takes Triton's wherever it can, since nobody
    has measured what the others need, two launches and passes over dy and y.
    """
    precise = call.adapter_dtype is not call.dtype
    if backend == "auto" and precise:
        return "triton" if backends.TRITON.why_not(call) is None else None
    taker = select(backend, call).name
    return taker if scaled_by_kernels(taker, call) and not (taker == "cuda" and precise) else None


def _backward(
    dy: Tensor,
    y: Tensor,
    gain: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor | None,
    scaling: float,
    adapter_dtype: torch.dtype,
    magnitude_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    given = (dy, y, gain, norm, bias, x, weight, s, lora_A, lora_B)
    call = describe_call(backend, dy, weight, lora_A, lora_B, None, scale, adapter_dtype, "backward")
    (r, K), M = lora_A.shape, dy.shape[0]
    taker = _takes_by_weight(backend, call) if by_weight(M, K, r, dy.dtype, adapter_dtype) else None
    if taker is not None:
        from fusedlora.kernels import backward, dora

        backends.last_used = backends.last_backward = taker
        shared: dict[str, Any] = {"scaling": scaling, "adapter_dtype": adapter_dtype}
        if taker == "cuda":
            # csrc knows dy's dtype and fp32; autocast to another one than the magnitude's brings a third
            written = magnitude_dtype if magnitude_dtype is dy.dtype else torch.float32
            *grads, dm = dora.dora_backward(*given, cuda.lora_backward, magnitude_dtype=written, **shared)
            return *grads, dm.to(magnitude_dtype)
        shared |= {"scale": scale, "one_launch": takes_one_launch(dy.device)}
        return dora.dora_backward(*given, backward.lora_backward, magnitude_dtype=magnitude_dtype, **shared)
    settings = (scale, scaling, adapter_dtype, magnitude_dtype, backend)
    *grads, _ = gradients(*given, *settings, need_dx=True, need_dA=True, need_dB=True, need_dm=True, need_dy=False)
    assert all(grad is not None for grad in grads)
    return tuple(grads)  # type: ignore[arg-type]


def _backward_fake(
    dy: Tensor,
    y: Tensor,
    gain: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor | None,
    scaling: float,
    adapter_dtype: torch.dtype,
    magnitude_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, N = dy.shape
    r, K = lora_A.shape
    return (
        dy.new_empty(M, K),
        lora_A.new_empty(r, K),
        lora_B.new_empty(N, r),
        dy.new_empty(N, dtype=magnitude_dtype),
    )


LIB.impl("dora_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fusedlora::dora_backward", _backward_fake, lib=LIB)

dora_backward = torch.ops.fusedlora.dora_backward.default
