"""What is decided once for each kind of call, so that a layer called again only looks it up.

A kind is all that the checks, the choice of a backend and a launch depend on, apart from the numbers in the tensors:
shapes, dtypes, devices, settings, and whether the tensors are packed and aligned. Neither tensors nor addresses are
kept, and nothing that a check or a backend refuses.
"""

from typing import Any

import torch
from torch import Tensor

from . import node, ops
from .arguments import check
from .backends import select
from .calls import backward_of, describe_call
from .dropout import MAX_P

# what matmul itself uses: the result is no view, so that callers may write into it
unsafe_view = torch.ops.aten._unsafe_view.default

# x, weight, lora_A, lora_B, bias, mask, scale; and of them what backward reads, S in place of the bias
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Saved = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

# Kinds kept: with rows of any number there may be many, and each is a few hundred bytes and quickly made again.
MOST = 4096
_plans: dict[tuple[Any, ...], "Plan"] = {}


class Plan:
    """How calls of one kind run: here through the two ops, which take any tensors and look at them each time."""

    def __init__(self, dropout_p: float, adapter_dtype: torch.dtype, backend: str) -> None:
        self.dropout_p, self.adapter_dtype, self.backend = dropout_p, adapter_dtype, backend

    def can_fill(self, given: Given) -> bool:
        """Whether there are `PackedPlan.fill` and `fill_s` for the call."""
        return False

    def forward(self, given: Given, scaling: float, save_s: bool) -> tuple[Tensor, Tensor | None]:
        """y [..., N] for x [..., K], and S [M, r]."""
        x, weight, *_ = given
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        settings = (scaling, self.dropout_p, self.adapter_dtype, save_s, self.backend)
        y, s = ops.forward(flat, *given[1:], None, *settings)
        return y if len(shape) == 2 else unsafe_view(y, (*shape[:-1], weight.shape[0])), s

    def backward(
        self, dy: Tensor, saved: Saved, scaling: float, shape: torch.Size, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx of x's shape, dA and dB, None where not needed."""
        x = saved[0]
        if len(shape) != 2:
            dy = dy.reshape(-1, dy.shape[-1])
            x = None if x is None else x.reshape(-1, shape[-1])
        settings = (scaling, self.dropout_p, self.adapter_dtype, *needs, self.backend)
        dx, dA, dB = (grad if need else None for grad, need in zip(ops.backward(dy, x, *saved[1:], *settings), needs))
        return dx if dx is None or len(shape) == 2 else dx.view(shape), dA, dB


def packed(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether all lie in memory without gaps, from a multiple of 16 bytes on."""
    return not (x.data_ptr() | weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr()) & 15 and (
        x.is_contiguous() and weight.is_contiguous() and lora_A.is_contiguous() and lora_B.is_contiguous()
    )


def aligned(tensor: Tensor) -> bool:
    """The same of one tensor."""
    return not tensor.data_ptr() & 15 and tensor.is_contiguous()


def refuse_tracing(name: str) -> None:
    """Raises RuntimeError under torch.jit.trace, which would write down the choices made for these sizes."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            f"{name} cannot be traced by torch.jit.trace: use torch.compile or torch.export, or trace merged layers"
        )


def find(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    drops: bool,
    autocast: torch.dtype | None,
    backend: str,
) -> Plan:
    """The plan of this kind of call. Raises what `check`, `select` and `refuse_tracing` raise."""
    if ops.dispatched(x, weight, lora_A, lora_B, bias):  # whose sizes need not be numbers
        return Plan(dropout_p, check(x, weight, lora_A, lora_B, bias, autocast, dropout_p, backend), backend)
    for_kernels = (
        (x.is_cuda or backend == "triton")
        and packed(x, weight, lora_A, lora_B)
        and (bias is None or aligned(bias))
        and (scale is None or aligned(scale))
    )
    # fmt: off
    key = (
        x.shape, x.dtype, x.device, weight.shape, weight.dtype, weight.device,
        lora_A.shape, lora_A.dtype, lora_A.device, lora_B.shape, lora_B.dtype, lora_B.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device), None if scale is None else scale.dtype,
        dropout_p, drops, autocast, backend, for_kernels,
        torch.are_deterministic_algorithms_enabled(),  # which turn tuned tables off
    )
    # fmt: on
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST:
            _plans.clear()
            node.forget()
        plan = _plans[key] = _make(
            x, weight, lora_A, lora_B, bias, scale, dropout_p, drops, autocast, backend, for_kernels
        )
    return plan


def _make(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    drops: bool,
    autocast: torch.dtype | None,
    backend: str,
    for_kernels: bool,
) -> Plan:
    refuse_tracing("lora_linear")  # which finds no plan, as sizes are tensors then
    adapter_dtype = check(x, weight, lora_A, lora_B, bias, autocast, dropout_p, backend)
    # which kernels take float32 depends on a setting that may change at any time
    if for_kernels and x.numel() > 0 and x.dtype is not torch.float32:
        kind = torch.int64 if dropout_p <= MAX_P else torch.bool  # as `draw` has it where kernels may take the call
        drawn = torch.empty(0, dtype=kind) if drops else None
        call = describe_call(backend, x, weight, lora_A, lora_B, drawn, scale, adapter_dtype, plain=True)
        takers = select(backend, call), select(backend, backward_of(call))
        if any(taker.launchers is not None for taker in takers):
            from .packed import PackedPlan

            plan = PackedPlan(takers, x, weight, lora_A, lora_B, dropout_p, adapter_dtype, backend)
            if scale is None and plan.forward_plan is not None:
                rate = dropout_p if drops else 0.0
                plan.call = node.add(x, weight, lora_A, lora_B, bias, rate, backend, adapter_dtype, plan)
            return plan
    return Plan(dropout_p, adapter_dtype, backend)
