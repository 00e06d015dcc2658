"""DoRA's two ops as torch.library sees them, and what they do in plain PyTorch.

    dora_gain    norm [N] = ‖W + scaling · scale · B A‖ per row, rounded to the magnitude's dtype, and
                 gain [N] = magnitude / norm; both in float32, or float64 for a float64 weight
    dora_scale   scaled [M, N] = gain ∘ dy in dy's dtype and dm [N] = Σ_m dy ∘ u / norm in the magnitude's, empty where
                 not needed; u = x Wᵀ + S Bᵀ. y, norm, bias, x, weight and s are read for dm alone

Both choose their backend as the main ops do, by name and tensors. The kernels take u from y; here it is computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autocast import without_autocast
from .backends import TRITON, select
from .calls import Call, describe_call
from .ops import LIB, TAGS

LIB.define(
    "dora_gain(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? scale, float scaling, "
    "ScalarType adapter_dtype, str backend) -> (Tensor gain, Tensor norm)",
    tags=TAGS,
)
LIB.define(
    "dora_scale(Tensor dy, Tensor? y, Tensor gain, Tensor? norm, Tensor? bias, Tensor? x, Tensor? weight, Tensor? s, "
    "Tensor lora_A, Tensor lora_B, ScalarType adapter_dtype, ScalarType magnitude_dtype, bool need_dy, bool need_dm, "
    "str backend) -> (Tensor scaled, Tensor dm)",
    tags=TAGS,
)


def scaled_by_kernels(taker: str, call: Call) -> bool:
    """Whether kernels run these two ops beside the taker of lora_linear's: with those in CUDA they are Triton's too."""
    return taker == "triton" or (taker == "cuda" and TRITON.why_not(call) is None)


def _gain(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scale: Tensor | None,
    scaling: float,
    adapter_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = describe_call(backend, weight, weight, lora_A, lora_B, None, scale, adapter_dtype)
    settings: dict[str, Any] = {"scaling": scaling, "scale": scale, "adapter_dtype": adapter_dtype}
    if scaled_by_kernels(select(backend, call).name, call):
        from fusedlora.kernels import dora_gain

        return dora_gain.dora_gain(weight, lora_A, lora_B, magnitude, **settings)
    with without_autocast(weight):
        return gain_of(weight, lora_A, lora_B, magnitude, **settings)


def _gain_fake(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N, wide = weight.shape[0], torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(N, dtype=wide), weight.new_empty(N, dtype=wide)


_CHUNK = 1 << 22  # elements of W + s · B A, or of dy and u in float32, that exist at a time


def gain_of(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    scale: Tensor | None = None,
    adapter_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """gain and norm in plain PyTorch, in float32 or wider, some rows of W + scaling · scale · B A at a time.

    A and B are rounded to adapter_dtype first: the norm of what is multiplied makes up for part of that rounding.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(adapter_dtype).to(wide), lora_B.to(adapter_dtype).to(wide)
    if scale is not None:
        B = B * scale.to(wide)
    rows = max(1, _CHUNK // weight.shape[1])
    norms = [
        torch.linalg.vector_norm(torch.addmm(w.to(wide), b, A, alpha=scaling), dim=1)
        for w, b in zip(weight.split(rows), B.split(rows))
    ]
    norm = torch.cat(norms).to(magnitude.dtype).to(wide)
    return magnitude.to(wide) / norm, norm


def _scale(
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
    adapter_dtype: torch.dtype,
    magnitude_dtype: torch.dtype,
    need_dy: bool,
    need_dm: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = describe_call(backend, dy, weight, lora_A, lora_B, None, None, adapter_dtype, "backward")
    scaled = dm = None
    if scaled_by_kernels(select(backend, call).name, call):
        from fusedlora.kernels import dora

        scaled, dm = dora.dora_scale(
            dy,
            y,
            gain,
            norm,
            bias,
            x,
            weight,
            s,
            lora_B,
            adapter_dtype=adapter_dtype,
            magnitude_dtype=magnitude_dtype,
            need_dy=need_dy,
            need_dm=need_dm,
        )
    else:
        with without_autocast(dy):
            if need_dy:
                scaled = torch.mul(dy, gain, out=dy.new_empty(dy.shape))
            if need_dm:
                assert x is not None and weight is not None and s is not None and norm is not None
                dm = _magnitude_gradient(dy, x, weight, s, lora_B, norm).to(magnitude_dtype)
    return (
        dy.new_empty(0) if scaled is None else scaled,
        dy.new_empty(0, dtype=magnitude_dtype) if dm is None else dm,
    )


def _magnitude_gradient(dy: Tensor, x: Tensor, weight: Tensor, s: Tensor, lora_B: Tensor, norm: Tensor) -> Tensor:
    """dm [N] with u computed again, a part of its rows at a time: no worse than PEFT's, and right for a gain of 0."""
    wide = norm.dtype
    total = torch.zeros_like(norm)
    B = lora_B.to(wide).t()
    rows = max(1, _CHUNK // dy.shape[1])
    for part, x_part, s_part in zip(dy.split(rows), x.split(rows), s.split(rows)):
        u = F.linear(x_part, weight).to(wide).addmm_(s_part.to(wide), B)
        total += u.mul_(part).sum(0)
    return total / norm


def _scale_fake(
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
    adapter_dtype: torch.dtype,
    magnitude_dtype: torch.dtype,
    need_dy: bool,
    need_dm: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    M, N = dy.shape
    return (
        dy.new_empty((M, N) if need_dy else (0,)),
        dy.new_empty((N,) if need_dm else (0,), dtype=magnitude_dtype),
    )


LIB.impl("dora_gain", _gain, "CompositeExplicitAutograd")
LIB.impl("dora_scale", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("fusedlora::dora_gain", _gain_fake, lib=LIB)
torch.library.register_fake("fusedlora::dora_scale", _scale_fake, lib=LIB)

dora_gain = torch.ops.fusedlora.dora_gain.default
dora_scale = torch.ops.fusedlora.dora_scale.default
