"""lora_linear: from its arguments to a plan, and the autograd.Function around what the plan runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import __version__, dropout, node, ops
from .arguments import check, check_scaling, check_types
from .autocast import cast, without_autocast
from .plans import Given, Plan, find
from .recomputation import is_under_way


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
        TypeError: arguments of other types than these, dtypes that do not go together, an x that is nested or sparse,
            or a scaling that requires a gradient.
        ValueError: shapes or devices that do not go together, dropout_p or backend out of range.
        RuntimeError: a backend asked for by name that does not take the call; torch.func transforms, forward-mode
            AD or torch.jit.trace; and, out of backward, a second differentiation.

    The formula is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
    """
    compiling = torch.compiler.is_compiling()
    try:
        if not compiling:  # the compiler would guard on the node that it reads
            refuse_transforms()
            if node.run is not None:
                # what is out of range Python refuses
                rate = dropout_p if training or not 0.0 <= dropout_p < 1.0 else 0.0
                taken = node.run(x, weight, lora_A, lora_B, bias, rate, backend, scaling)
                if taken is not None:
                    return taken
        autocast = None
        if torch._C._is_any_autocast_enabled():
            x, weight, lora_A, lora_B, bias, autocast = cast(x, weight, lora_A, lora_B, bias)
        scale = mask = None
        if isinstance(scaling, Tensor):
            check_scaling(scaling, x)
            scale, scaling = scaling, 1.0
        drops = training and dropout_p > 0.0
        if compiling:
            adapter_dtype = check(x, weight, lora_A, lora_B, bias, autocast, dropout_p, backend)
            if drops:
                mask = dropout.draw(x, dropout_p, backend)
            return torch.ops.fusedlora.linear.default(
                x, weight, lora_A, lora_B, bias, mask, scale, scaling, dropout_p, adapter_dtype, backend, __version__
            )
        plan = find(x, weight, lora_A, lora_B, bias, scale, dropout_p, drops, autocast, backend)
        if drops:
            mask = dropout.draw(x, dropout_p, backend)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or lora_A.requires_grad
            or lora_B.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            return differentiable((x, weight, lora_A, lora_B, bias, mask, scale), scaling, plan)
        return plan.forward((x, weight, lora_A, lora_B, bias, mask, scale), scaling, False)[0]
    except Exception:
        check_types({"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}, bias, scaling, dropout_p, backend)
        raise


def differentiable(given: Given, scaling: float, plan: Any) -> Tensor:
    """y with its graph.

    Where activation checkpointing computes it again, after what backward reads has been saved; where that ends it, S
    alone.
    """
    x, _, lora_A, lora_B, *_ = given
    y: Tensor
    if not (is_under_way() and plan.can_fill(given)):
        y = _apply(*given, scaling, plan, None)
        return y
    saves_s = lora_B.requires_grad
    s = plan.empty_s(x, lora_A)
    try:
        y = _apply(*given, scaling, plan, s)
    except Exception:
        if saves_s:
            with torch.no_grad():
                plan.fill_s(given, scaling, s)
        raise
    with torch.no_grad():
        plan.fill(given, scaling, y, s if saves_s else None)
    return y


def refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError("lora_linear supports neither torch.func transforms (vmap, grad, jvp) nor forward-mode AD")


class _LoRALinear(torch.autograd.Function):
    """lora_linear's gradients, any of them; saves what the needed ones read, and x as it came.

    With a place for S neither S nor y is computed; whoever calls does that afterwards.
    """

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
        plan: Plan,
        s: Tensor | None,
    ) -> Tensor:
        needs = need_x, need_W, need_A, need_B, _ = ctx.needs_input_grad[:5]
        if s is not None:
            y = x.new_empty(*x.shape[:-1], lora_B.shape[0])
        else:
            y, s = plan.forward((x, weight, lora_A, lora_B, bias, mask, scale), scaling, need_B)
        ctx.save_for_backward(
            x if need_A or need_W else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            s if need_B else None,
            mask if need_x or need_A else None,
            scale,
        )
        ctx.call = (plan, scaling, x.shape, needs, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            return differentiable_once(ctx, dy, _gradients, "lora_linear")
        return _gradients(ctx, dy)


# Function.apply is a layer of Python for functorch, whose transforms lora_linear has ruled out
_apply: Any = super(torch.autograd.Function, _LoRALinear).apply
# and so is its node's, which looks up `backward` each time
if (_node := getattr(_LoRALinear, "_backward_cls", None)) is not None:
    _node.apply = _LoRALinear.backward


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    plan, scaling, shape, (need_x, need_W, need_A, need_B, need_b), bias_dtype = ctx.call
    saved = ctx.saved_tensors
    dx = dW = dA = dB = db = None
    if need_x or need_A or need_B:
        dx, dA, dB = plan.backward(dy, saved, scaling, shape, (need_x, need_A, need_B))
    if need_W or need_b:
        flat = dy.reshape(-1, dy.shape[-1])
        if need_W:
            with without_autocast(dy):
                dW = flat.t() @ saved[0].reshape(-1, shape[-1])
        if need_b:
            db = flat.sum(0, dtype=bias_dtype)
    return dx, dW, dA, dB, db, None, None, None, None, None


def differentiable_once(ctx: Any, dy: Tensor, gradients: Callable[..., Any], name: str) -> Any:
    """gradients(ctx, dy) under create_graph=True: they raise where they are differentiated again.

    x, W, A and B were saved first. name: of the function that is differentiated, for the error.
    """
    with torch.no_grad():
        grads = gradients(ctx, dy)
    read = (dy.new_empty(0).requires_grad_(), dy, *ctx.saved_tensors[:4])
    return _Once.apply(name, len(read), *read, *grads)


class _Once(torch.autograd.Function):
    """Hands gradients on and raises where they are differentiated again.

    The first `read` tensors are what the gradients were made of: a way from a gradient to one of those leads through
    here, where autograd would otherwise take the dependence for zero. An anchor among them catches plain backward().
    """

    @staticmethod
    def forward(ctx: Any, name: str, read: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(grad if grad is None else grad.view_as(grad) for grad in tensors[read:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} can be differentiated only once: it has no double backward")


def define_linear(
    schema: str, without_grad: Callable[..., Tensor], with_grad: Callable[..., Tensor], *, differentiable: int
) -> None:
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
        refuse_transforms()
        tensors = arguments[:differentiable]
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return with_grad(*arguments[:-1])
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    ops.LIB.impl(name, linear, "CompositeExplicitAutograd")
    ops.LIB.impl(name, linear_autograd, "Autograd")
    torch.library.register_fake(f"fusedlora::{name}", linear_fake, lib=ops.LIB)


def _planned(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    scaling: float,
    *settings: Any,
) -> tuple[Any, ...]:
    """_LoRALinear's arguments of the op's, but for a place for S."""
    return x, weight, lora_A, lora_B, bias, mask, scale, scaling, Plan(*settings)


def _op_without_grad(*arguments: Any) -> Tensor:
    *given, scaling, plan = _planned(*arguments)
    y: Tensor = plan.forward(tuple(given), scaling, False)[0]
    return y


define_linear(
    "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? mask, Tensor? scale, "
    "float scaling, float dropout_p, ScalarType adapter_dtype, str backend, str version) -> Tensor",
    _op_without_grad,
    lambda *arguments: _LoRALinear.apply(*_planned(*arguments), None),
    differentiable=5,
)
