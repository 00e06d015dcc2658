"""lora_linear: the checks at the door, autocast, the dropout mask and the autograd.Function over the two ops."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """y = x W^T + scaling * dropout(x) A^T B^T + bias, differentiable once in every tensor.

    Args:
        x: [..., in_features]; any number of leading dimensions, none and empty ones included.
        weight: [out_features, in_features], in x's dtype.
        lora_A: [r, in_features], in x's dtype or float32.
        lora_B: [out_features, r], in lora_A's dtype.
        bias: [out_features] in x's dtype, or None.
        scaling: the factor on the adapter's product, lora_alpha / r as a rule.
        dropout_p: rate of the dropout on the adapter's x, in [0, 1); only while training.
        training: whether dropout is on.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        y [..., out_features] in x's dtype. S, T and the adapter's products are formed in the wider of x's and
        lora_A's dtypes. Under autocast x, weight and bias are cast to its dtype and the adapter's products run in it.

    Raises:
        TypeError: an argument that is no tensor, or dtypes that do not go together.
        ValueError: shapes or devices that do not go together, dropout_p or backend out of range.
        RuntimeError: a named backend that does not take the call, torch.func transforms, forward-mode AD, and, out of
            backward, a second differentiation.

    The formula is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
    """
    dtype = x.dtype
    device = x.device
    kind = device.type
    autocast = kind != "meta" and dtype is not torch.float64 and torch.is_autocast_enabled(kind)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        if x.dtype is not dtype and x.dtype.is_floating_point:
            x = x.to(dtype)
        if weight.dtype is not dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        adapter = lora_A.dtype
        if adapter is not dtype and adapter is not torch.float32:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    param_dtype = lora_A.dtype
    _check(x, weight, lora_A, lora_B, bias, dropout_p, backend)
    adapter_dtype = dtype if autocast or param_dtype is dtype else torch.promote_types(dtype, param_dtype)

    mask = None
    if training and dropout_p > 0.0:
        mask = torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=torch.bool, device=device)
        mask.bernoulli_(1.0 - dropout_p)

    if torch.compiler.is_compiling():
        return torch.ops.fusedlora.linear.default(
            x, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, backend
        )
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError("lora_linear supports neither torch.func transforms (vmap, grad, jvp) nor forward-mode AD")
    if torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, backend)
    return _no_grad(x, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, backend)


def _check(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    backend: str,
) -> None:
    """Raise for what does not go together, naming the argument, its value and the rule."""
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"x has dtype {dtype}, must be floating point")
    if x.dim() == 0:
        raise ValueError("x has 0 dimensions, must be [..., in_features]")
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, must have 2")
    N, K = weight.shape
    r = lora_A.shape[0]
    if r < 1:
        raise ValueError(f"lora_A has rank {r}, must be at least 1")
    if x.shape[-1] != K:
        raise ValueError(f"weight has in_features {K}, x has {x.shape[-1]}")
    if lora_A.shape[1] != K:
        raise ValueError(f"lora_A has in_features {lora_A.shape[1]}, x has {K}")
    if lora_B.shape[1] != r:
        raise ValueError(f"lora_B has rank {lora_B.shape[1]}, lora_A has {r}")
    if lora_B.shape[0] != N:
        raise ValueError(f"lora_B has out_features {lora_B.shape[0]}, weight has {N}")
    if weight.dtype is not dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, x has {dtype}: they must be equal outside autocast")
    param = lora_A.dtype
    if param is not dtype and param is not torch.float32:
        raise TypeError(f"lora_A has dtype {param}, must be x's {dtype} or torch.float32")
    if lora_B.dtype is not param:
        raise TypeError(f"lora_B has dtype {lora_B.dtype}, lora_A has {param}: they must be equal")
    device = x.device
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {device}")
    if bias is not None:
        if bias.shape != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, must be ({N},)")
        if bias.dtype is not dtype:
            raise TypeError(f"bias has dtype {bias.dtype}, x has {dtype}: they must be equal outside autocast")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device}, x is on {device}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, must be in [0, 1)")
    if backend not in backends.NAMES:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(backends.NAMES)}")


def _no_grad(x, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, backend) -> Tensor:
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y, _ = ops.forward(flat, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, False, backend)
    return y if len(shape) == 2 else torch._unsafe_view(y, (*shape[:-1], weight.shape[0]))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, backend):
        need_x, need_w, need_A, need_B, _ = ctx.needs_input_grad[:5]
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        y, s = ops.forward(
            flat, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, need_B, backend
        )
        ctx.save_for_backward(
            x if need_A or need_w else None,
            weight if need_x else None,
            lora_A if need_x else None,
            lora_B if need_x or need_A else None,
            s if need_B else None,
            mask if need_x or need_A else None,
        )
        ctx.call = (shape, lora_A.shape[0], lora_A.dtype, scaling, dropout_p, adapter_dtype, backend)
        # not a view, so that the caller may write into it
        return y if len(shape) == 2 else torch._unsafe_view(y, (*shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, dy):
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy)
        with torch.no_grad():
            grads = _gradients(ctx, dy)
        return _Once.apply(dy.new_empty(0).requires_grad_(), *grads)


# Function.apply is a Python layer for functorch, which lora_linear has ruled out
_apply = super(torch.autograd.Function, _LoRALinear).apply


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, s, mask = ctx.saved_tensors
    shape, r, param_dtype, scaling, dropout_p, adapter_dtype, backend = ctx.call
    need_x, need_w, need_A, need_B, need_b = ctx.needs_input_grad[:5]
    K = shape[-1]
    if len(shape) != 2:
        dy = dy.reshape(-1, dy.shape[-1])
        if x is not None:
            x = x.reshape(-1, K)
    dx = dw = dA = dB = db = None
    if need_x or need_A or need_B:
        dx, dA, dB = ops.backward(
            dy,
            x,
            weight,
            lora_A,
            lora_B,
            s,
            mask,
            scaling,
            dropout_p,
            adapter_dtype,
            param_dtype,
            K,
            r,
            need_x,
            need_A,
            need_B,
            backend,
        )
        dx = (dx if len(shape) == 2 else dx.view(shape)) if need_x else None
    if need_w:
        dw = dy.t() @ x
    if need_b:
        db = dy.sum(0)
    return dx, dw, dA if need_A else None, dB if need_B else None, db, None, None, None, None, None


class _Once(torch.autograd.Function):
    """Hands gradients on and raises when they are differentiated again."""

    @staticmethod
    def forward(ctx: Any, anchor, *grads):
        return tuple(grad if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_):
        raise RuntimeError("lora_linear can be differentiated only once: it has no double backward")


# What torch.compile sees in place of the Function: opaque to Dynamo, differentiated by AOTAutograd through the
# Function, so that no other implementation of autograd.Function stands between.
ops.LIB.define(
    "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? mask, float scaling, "
    "float dropout_p, ScalarType adapter_dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear_autograd(x, weight, lora_A, lora_B, bias, *rest):
    tensors = (x, weight, lora_A, lora_B, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _LoRALinear.apply(*tensors, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fusedlora.linear.default(*tensors, *rest)


def _linear_fake(x, weight, *_):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


ops.LIB.impl("linear", _no_grad, "CompositeExplicitAutograd")
ops.LIB.impl("linear", _linear_autograd, "Autograd")
torch.library.register_fake("fusedlora::linear", _linear_fake, lib=ops.LIB)
