"""lora_linear: the checks at the door, autocast, dropout, and the autograd.Function over the two ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import __version__, dropout, ops
from .backends import NAMES, autocast_dtype, without_autocast

# what matmul itself uses: the result is no view, so that callers may write into it
_unsafe_view = torch.ops.aten._unsafe_view.default


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias, differentiable once in every tensor.

    Args:
        x: [..., in_features], floating point; any leading dimensions, none or an empty one too.
        weight: [out_features, in_features] in x's dtype.
        lora_A: [r, in_features] in x's dtype or float32.
        lora_B: [out_features, r] in lora_A's dtype.
        bias: [out_features] in x's dtype or float32, or None. Its gradient is summed and kept in its own dtype.
        scaling: the factor on the adapter's product; lora_alpha / r as a rule. A number, or a 0-d tensor on x's device,
            which is read there, also at each replay of a CUDA graph. It gets no gradient.
        dropout_p: rate of the dropout on the adapter's x, in [0, 1). It is on while `training` only, and its mask, or
            on a GPU the seed of its mask, is drawn from torch's generator of x's device.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        y [..., out_features] in x's dtype. The adapter's products are formed in the wider of x's and lora_A's dtypes.
        Under autocast x and weight are cast to its dtype, as by nn.Linear, and the adapter's products run in it.

    Raises:
        TypeError: dtypes that do not go together, or a scaling that requires a gradient.
        ValueError: shapes or devices that do not go together, dropout_p or backend out of range.
        RuntimeError: a backend asked for by name that does not take the call; torch.func transforms or forward-mode AD;
            and, out of backward, a second differentiation.

    The formula is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
    """
    x, weight, lora_A, lora_B, bias, adapter_dtype = admit(
        x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p, backend=backend
    )
    mask = scale = None
    if training and dropout_p > 0.0:
        mask = dropout.draw(x, dropout_p, backend)
    if isinstance(scaling, Tensor):
        scale, scaling = scaling, 1.0
    if torch.compiler.is_compiling():
        return torch.ops.fusedlora.linear.default(
            x, weight, lora_A, lora_B, bias, mask, scale, scaling, dropout_p, adapter_dtype, backend, __version__
        )
    _refuse_transforms()
    if torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, lora_A, lora_B, bias, mask, scale, scaling, dropout_p, adapter_dtype, backend)
    return _without_grad(x, weight, lora_A, lora_B, bias, mask, scale, scaling, dropout_p, adapter_dtype, backend)


def admit(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    *,
    scaling: float | Tensor,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype]:
    """The tensors as the ops take them, autocast applied and checked, and the dtype of the adapter's products."""
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype is not torch.float64:
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        if bias is not None and bias.dtype is not torch.float32:
            bias = _cast(bias, dtype)
        adapter_dtype = dtype
        if lora_A.dtype is not torch.float32:
            lora_A, lora_B = _cast(lora_A, dtype), _cast(lora_B, dtype)
        dtype = x.dtype
        param_dtype = lora_A.dtype
    else:
        dtype = x.dtype
        param_dtype = lora_A.dtype
        adapter_dtype = dtype if param_dtype is dtype else torch.promote_types(dtype, param_dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"x has dtype {dtype}, must be floating point")
    if x.dim() == 0:
        raise ValueError("x has 0 dimensions, must be [..., in_features]")
    shape_W, shape_A, shape_B = weight.shape, lora_A.shape, lora_B.shape
    if not len(shape_W) == len(shape_A) == len(shape_B) == 2:
        name, shape = next(
            (n, s) for n, s in (("weight", shape_W), ("lora_A", shape_A), ("lora_B", shape_B)) if len(s) != 2
        )
        hint = ": a partitioned parameter (ZeRO-3) is gathered by calling its module" if shape == (0,) else ""
        raise ValueError(f"{name} has shape {tuple(shape)}, must have 2 dimensions{hint}")
    N, K = shape_W
    r = shape_A[0]
    if r < 1 or N < 1 or K < 1:
        name, value = min(("r", r), ("out_features", N), ("in_features", K), key=lambda pair: pair[1])
        raise ValueError(f"{name} is {value}, must be at least 1")
    if x.shape[-1] != K:
        raise ValueError(f"weight has in_features {K}, x has {x.shape[-1]}")
    if shape_A[1] != K:
        raise ValueError(f"lora_A has in_features {shape_A[1]}, x has {K}")
    if shape_B[1] != r:
        raise ValueError(f"lora_B has rank {shape_B[1]}, lora_A has {r}")
    if shape_B[0] != N:
        raise ValueError(f"lora_B has out_features {shape_B[0]}, weight has {N}")
    if weight.dtype is not dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, x has {dtype}: they must be equal outside autocast")
    if param_dtype is not dtype and param_dtype is not torch.float32:
        raise TypeError(f"lora_A has dtype {param_dtype}, must be x's {dtype} or torch.float32")
    if lora_B.dtype is not param_dtype:
        raise TypeError(f"lora_B has dtype {lora_B.dtype}, lora_A has {param_dtype}: they must be equal")
    device = x.device
    if weight.device != device or lora_A.device != device or lora_B.device != device:
        found = f"weight is on {weight.device}, lora_A on {lora_A.device}, lora_B on {lora_B.device}"
        raise ValueError(f"x is on {device}, {found}: they must be on one device")
    if bias is not None:
        if bias.shape != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, must be ({N},)")
        if bias.dtype is not dtype and not (bias.dtype is torch.float32 and dtype.itemsize == 2):
            raise TypeError(f"bias has dtype {bias.dtype}, must be x's {dtype} or, over 16 bits, torch.float32")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device}, x is on {device}: they must be on one device")
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            raise TypeError("scaling requires a gradient, must not: none would reach it")
        if scaling.dim() != 0 or not scaling.is_floating_point():
            found = f"shape {tuple(scaling.shape)} and dtype {scaling.dtype}"
            raise TypeError(f"scaling is a tensor with {found}, must be a number or a floating point tensor of 0-d")
        if scaling.device != device:
            raise ValueError(f"scaling is on {scaling.device}, x is on {device}: they must be on one device")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, must be in [0, 1)")
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(NAMES)}")
    return x, weight, lora_A, lora_B, bias, adapter_dtype


def _refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError("lora_linear supports neither torch.func transforms (vmap, grad, jvp) nor forward-mode AD")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: floating tensors, but not float64 ones."""
    own = tensor.dtype
    if own is dtype or own is torch.float64 or not own.is_floating_point:
        return tensor
    return tensor.to(dtype)


def _without_grad(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    given = (flat, weight, lora_A, lora_B, bias, mask, scale, None)
    y, _ = ops.forward(*given, scaling, dropout_p, adapter_dtype, False, backend)
    return y if len(shape) == 2 else _unsafe_view(y, (*shape[:-1], weight.shape[0]))


class _LoRALinear(torch.autograd.Function):
    """lora_linear's gradients, any of them; saves what the needed ones read, and x as it came."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: Tensor | None,
        scaling: float,
        dropout_p: float,
        adapter_dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        need_x, need_W, need_A, need_B, *_ = ctx.needs_input_grad
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        given = (flat, weight, lora_A, lora_B, bias, mask, scale, None)
        y, s = ops.forward(*given, scaling, dropout_p, adapter_dtype, need_B, backend)
        ctx.save_for_backward(
            x if need_A or need_W else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            s if need_B else None,
            mask if need_x or need_A else None,
            scale,
        )
        ctx.call = (shape, scaling, dropout_p, adapter_dtype, None if bias is None else bias.dtype, backend)
        return y if len(shape) == 2 else _unsafe_view(y, (*shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return differentiable_once(ctx, dy, _gradients, _Once)


# Function.apply is a layer of Python for functorch, whose transforms lora_linear has ruled out
_apply: Any = super(torch.autograd.Function, _LoRALinear).apply


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, s, mask, scale = ctx.saved_tensors
    shape, scaling, dropout_p, adapter_dtype, bias_dtype, backend = ctx.call
    need_x, need_W, need_A, need_B, need_b, *_ = ctx.needs_input_grad
    flat = len(shape) == 2
    if not flat:
        dy = dy.reshape(-1, dy.shape[-1])
        x = None if x is None else x.reshape(-1, shape[-1])
    dx = dW = dA = dB = db = None
    if need_x or need_A or need_B:
        dx, dA, dB = ops.backward(
            dy,
            x,
            weight,
            lora_A,
            lora_B,
            s,
            mask,
            scale,
            scaling,
            dropout_p,
            adapter_dtype,
            need_x,
            need_A,
            need_B,
            backend,
        )
        dx = None if not need_x else dx if flat or dx is None else dx.view(shape)
        dA = dA if need_A else None
        dB = dB if need_B else None
    if need_W:
        with without_autocast(dy):
            dW = dy.t() @ x
    if need_b:
        db = dy.sum(0, dtype=bias_dtype)
    return dx, dW, dA, dB, db, None, None, None, None, None, None


def differentiable_once(ctx: Any, dy: Tensor, gradients: Callable[..., Any], once: Any) -> Any:
    """gradients(ctx, dy), which raise where they are differentiated again; x, W, A and B were saved first."""
    if not torch.is_grad_enabled():
        return gradients(ctx, dy)
    with torch.no_grad():  # create_graph=True
        grads = gradients(ctx, dy)
    read = (dy.new_empty(0).requires_grad_(), dy, *ctx.saved_tensors[:4])
    return once.apply(len(read), *read, *grads)


class _Once(torch.autograd.Function):
    """Hands gradients on and raises where they are differentiated again.

    The first `read` tensors are what the gradients were made of: a way from a gradient to one of those leads through
    here, where autograd would otherwise take the dependence for zero. An anchor among them catches plain backward().
    """

    @staticmethod
    def forward(ctx: Any, read: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(grad if grad is None else grad.view_as(grad) for grad in tensors[read:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("lora_linear can be differentiated only once: it has no double backward")


def define_linear(schema: str, without_grad: Callable[..., Tensor], function: Any, *, differentiable: int) -> None:
    """Defines what torch.compile sees in place of an autograd.Function; its first arguments may require gradients.

    Dynamo takes it as one op and AOTAutograd differentiates it through the Function itself, so that no second
    implementation of autograd.Function stands between. Its last argument is the version, there for the compiler's cache
    on disk: what the Function traces to may change between versions.
    """
    name = schema.split("(")[0]
    ops.LIB.define(schema, tags=ops.TAGS)
    op = getattr(torch.ops.fusedlora, name).default

    def linear(*arguments: Any) -> Tensor:
        return without_grad(*arguments[:-1])

    def linear_autograd(*arguments: Any) -> Tensor:
        _refuse_transforms()
        tensors = arguments[:differentiable]
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return function.apply(*arguments[:-1])
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    ops.LIB.impl(name, linear, "CompositeExplicitAutograd")
    ops.LIB.impl(name, linear_autograd, "Autograd")
    torch.library.register_fake(f"fusedlora::{name}", linear_fake, lib=ops.LIB)


define_linear(
    "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? mask, Tensor? scale, "
    "float scaling, float dropout_p, ScalarType adapter_dtype, str backend, str version) -> Tensor",
    _without_grad,
    _LoRALinear,
    differentiable=5,
)
