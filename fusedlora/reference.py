"""The LoRA linear written out in plain PyTorch: the path for CPUs and for whatever no kernel takes.

    S  = s/(1-p) * (m o x) A^T                 [M, r]
    y  = g o (x W^T + S B^T) + bias            [M, N]
    T  = s * dy B                              [M, r]
    dx = dy W + m o (T A)/(1-p)                [M, K]
    dA = T^T (m o x)/(1-p)                     [r, K]
    dB = dy^T S                                [N, r]

x is [M, K], W [N, K], A [r, K], B [N, r], m a bool mask [M, K], s the scaling, p the dropout rate, g [N] a factor on
each column or absent. The formulas are those of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021),
with the scale folded into S and T. Nothing here uses autograd. Any floating dtype works, float64 included.
"""

import torch
from torch import Tensor

from . import dropout


def _scaled_mm(a: Tensor, b: Tensor, scaling: float, scale: Tensor | None = None) -> Tensor:
    """scaling * a b, scaling applied to the accumulator, before the rounding; times `scale`, which rounds again."""
    out = torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
    return out if scale is None else out.mul_(scale)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask.view(torch.uint8)  # on a CPU several times as fast as by bool


def forward(
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
    """y [M, N] in x's dtype and, when save_s, S [M, r] in adapter_dtype; mask is what `dropout.draw` gave."""
    late = None if bias is None or bias.dtype == x.dtype else bias  # where fp32 products are added, else rounded now
    if late is not None and gain is None and adapter_dtype == x.dtype:
        bias, late = late.to(x.dtype), None
    y = torch.nn.functional.linear(x, weight, bias if gain is None and late is None else None)
    if mask is not None:
        x = _masked(x, dropout.as_mask(mask, x.shape[0], x.shape[1], dropout_p, x.device))
        scaling = scaling / (1.0 - dropout_p)
    s = _scaled_mm(x.to(adapter_dtype), lora_A.to(adapter_dtype).t(), scaling, scale)
    if gain is None:
        _add_product(y, s, lora_B.to(adapter_dtype).t(), late)
    else:
        for part, rows in zip(y.chunk(4), s.chunk(4)):  # in gain's precision, rounded once
            total = (part + (rows @ lora_B.to(adapter_dtype).t()).to(gain.dtype)).mul_(gain)
            part.copy_(total if bias is None else total.add_(bias))
    return y, s if save_s else None


def _add_product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """out += a b + bias, rounding by itself only a product whose dtype is not out's; then a quarter of it at a time.

    A bias is in a's dtype, and comes only where that is not out's.
    """
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        for part, rows in zip(out.chunk(4), a.chunk(4)):
            part.add_(rows @ b if bias is None else torch.addmm(bias, rows, b))


def backward(
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
    """dx [M, K] in dy's dtype, dA [r, K] and dB [N, r] in lora_A's; None for what is not needed.

    weight is read for dx, x for dA, s for dB; each may be None where it is not.
    """
    dx = dA = dB = None
    keep = 1.0
    if mask is not None and (need_dx or need_dA):
        mask = dropout.as_mask(mask, dy.shape[0], lora_A.shape[1], dropout_p, dy.device)
        keep = 1.0 / (1.0 - dropout_p)
    dy_a = dy.to(adapter_dtype)
    if need_dx or need_dA:
        t = _scaled_mm(dy_a, lora_B.to(adapter_dtype), scaling, scale)
    if need_dB:
        assert s is not None
        dB = (dy_a.t() @ s).to(lora_A.dtype)
    del dy_a  # may be a copy, as may x in dA's product: never both at once
    if need_dA:
        assert x is not None
        masked = x if mask is None else _masked(x, mask)
        dA = _scaled_mm(t.t(), masked.to(adapter_dtype), keep).to(lora_A.dtype)
        del masked
    if need_dx:
        assert weight is not None
        dx = dy @ weight
        a = lora_A.to(adapter_dtype)
        if mask is None:
            _add_product(dx, t, a)
        else:
            dx.add_((t @ a).mul_(mask.view(torch.uint8)), alpha=keep)
    return dx, dA, dB
