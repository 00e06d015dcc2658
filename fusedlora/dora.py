"""dora_linear: DoRA's linear layer over lora_linear's two ops and three of its own.

    norm = ‖W + s · B A‖ per row, a constant in backward      g = magnitude / norm
    y    = g ∘ u + bias,  u = x Wᵀ + s · (x Aᵀ) Bᵀ            dy' = g ∘ dy,  dm = Σ_m dy ∘ u / norm

All other gradients are lora_linear's of dy'. The formulas are those of Liu et al., "DoRA: Weight-Decomposed Low-Rank
Adaptation" (2024), in PEFT's reading: the norm is rounded to the magnitude's dtype.

With dropout in training the product with W is taken of the dropped x too. No kernel does that: there the arithmetic
runs as PEFT has it, operation by operation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import __version__, backends, functional, ops
from .arguments import admit, check_magnitude
from .autocast import without_autocast
from .dora_gradients import dora_backward, gradients
from .dora_ops import dora_gain
from .plans import refuse_tracing, unsafe_view

WITH_DROPOUT = "with dropout in training DoRA takes the product with the weight of the dropped x too"


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """y = g ∘ (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias with g = magnitude / ‖W + scaling · B A‖, differentiable once.

    For the gradient of the magnitude y itself is saved, beside what lora_linear saves: a y that is written to in place
    before backward makes it raise. A magnitude that requires no gradient saves neither y nor, for its sake, x.

    Args:
        x, weight, lora_A, lora_B, bias, scaling, backend: as for lora_linear.
        magnitude: [out_features], in lora_A's dtype or float32. A row of zeros in W + scaling · B A has no direction,
            and gives NaN, as in PEFT.
        dropout_p: rate of the dropout on x, in [0, 1). While `training` it lies on the product with the weight too,
            except for that part of y that a g of one would give, as in PEFT; no kernel takes such a call.

    Returns:
        y [..., out_features] in x's dtype; under autocast as lora_linear.

    Raises:
        TypeError, ValueError: as lora_linear, and for a magnitude outside these rules.
        RuntimeError: as lora_linear.
    """
    given = x, weight, lora_A, lora_B, bias
    x, weight, lora_A, lora_B, bias, adapter_dtype = admit(
        *given, scaling=scaling, dropout_p=dropout_p, backend=backend
    )
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    check_magnitude(magnitude, weight, given[2].dtype)
    if training and dropout_p > 0.0:
        return _stock(*given, magnitude, scaling=scaling, dropout_p=dropout_p, backend=backend)
    scale = None
    if isinstance(scaling, Tensor):
        scale, scaling = scaling, 1.0
    arguments = x, weight, lora_A, lora_B, magnitude, bias, scale, scaling, adapter_dtype, backend
    if torch.compiler.is_compiling():
        return torch.ops.fusedlora.dora_linear.default(*arguments, __version__)
    functional.refuse_transforms()
    refuse_tracing("dora_linear")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments[:6]):
        return _apply(*arguments)
    return _without_grad(*arguments)


def _stock(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """PEFT's operations in PEFT's order and dtypes, differentiated by autograd."""
    if backend not in ("auto", "reference"):
        raise RuntimeError(f"backend {backend!r} does not take this call: {WITH_DROPOUT}")
    if not torch.compiler.is_compiling():
        backends.last_used = backends.last_backward = "reference"
        if x.device.type == "cuda" and backend == "auto":
            backends.warn_once("reference", "triton", WITH_DROPOUT)
    plain = F.linear(x, weight, bias)
    dropped = F.dropout(x.to(lora_A.dtype), dropout_p)
    weight = weight.to(dropped.dtype)
    with torch.no_grad():
        adapted = weight + scaling * F.linear(lora_A.t(), lora_B).t().to(dropped.dtype)
        norm = torch.linalg.vector_norm(adapted, dim=1)
        del adapted
    gain = magnitude / norm
    adapter = F.linear(F.linear(dropped, lora_A), lora_B)
    return (plain + ((gain - 1) * F.linear(dropped, weight) + gain * adapter * scaling)).to(plain.dtype)


def _without_grad(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scaling: float,
    adapter_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    gain, _ = dora_gain(weight, lora_A, lora_B, magnitude, scale, scaling, adapter_dtype, backend)
    given = (flat, weight, lora_A, lora_B, bias, None, scale, gain)
    y, _ = ops.forward(*given, scaling, 0.0, adapter_dtype, False, backend)
    return y if len(shape) == 2 else unsafe_view(y, (*shape[:-1], weight.shape[0]))


class _DoRALinear(torch.autograd.Function):
    """dora_linear's gradients, any of them; saves what the needed ones read."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        scaling: float,
        adapter_dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        need_x, need_W, need_A, need_B, need_m, *_ = ctx.needs_input_grad
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        gain, norm = dora_gain(weight, lora_A, lora_B, magnitude, scale, scaling, adapter_dtype, backend)
        given = (flat, weight, lora_A, lora_B, bias, None, scale, gain)
        y, s = ops.forward(*given, scaling, 0.0, adapter_dtype, need_B or need_m, backend)
        if len(shape) != 2:
            y = unsafe_view(y, (*shape[:-1], weight.shape[0]))
        ctx.save_for_backward(
            x if need_A or need_W or need_m else None,
            weight if need_x or need_m else None,
            lora_A,
            lora_B,
            s if need_B or need_m else None,
            gain,
            scale,
            # of these the gradient of the magnitude is made
            *((y, norm, bias) if need_m else (None, None, None)),
        )
        ctx.call = (shape, scaling, adapter_dtype, magnitude.dtype, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            return functional.differentiable_once(ctx, dy, _gradients, "dora_linear")
        return _gradients(ctx, dy)


_apply: Any = super(torch.autograd.Function, _DoRALinear).apply  # as functional's


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, s, gain, scale, y, norm, bias = ctx.saved_tensors
    shape, scaling, adapter_dtype, magnitude_dtype, backend = ctx.call
    need_x, need_W, need_A, need_B, need_m, need_b, *_ = ctx.needs_input_grad
    flat = len(shape) == 2
    if not flat:
        dy = dy.reshape(-1, dy.shape[-1])
        x = None if x is None else x.reshape(-1, shape[-1])
        y = None if y is None else y.reshape(-1, y.shape[-1])
    db = dy.sum(0) if need_b else None
    given = (dy, y, gain, norm, bias, x, weight, s, lora_A, lora_B, scale, scaling, adapter_dtype, magnitude_dtype)
    scaled = None
    if need_x and need_A and need_B and need_m and not need_W:
        dx, dA, dB, dm = dora_backward(*given, backend)
    else:
        dx, dA, dB, dm, scaled = gradients(
            *given, backend, need_dx=need_x, need_dA=need_A, need_dB=need_B, need_dm=need_m, need_dy=need_W
        )
    dW = None
    if need_x:
        assert dx is not None
        dx = dx if flat else dx.view(shape)
    if need_W:
        assert scaled is not None
        with without_autocast(dy):
            dW = scaled.t() @ x
    return dx, dW, dA, dB, dm, db, None, None, None, None


functional.define_linear(
    "dora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias, Tensor? scale, "
    "float scaling, ScalarType adapter_dtype, str backend, str version) -> Tensor",
    _without_grad,
    lambda *arguments: _DoRALinear.apply(*arguments),
    differentiable=6,
)
