"""The two ops of the package as torch.library sees them: schemas, fakes, implementations.

Low-level Library registration, since a custom_op costs several times its host time.
"""

import torch
from torch import Tensor

from .backends import describe_call, select

LIB = torch.library.Library("fusedlora", "DEF")

LIB.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? mask, float scaling, "
    "float dropout_p, ScalarType adapter_dtype, bool save_s, str backend) -> (Tensor y, Tensor s)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIB.define(
    "backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? s, Tensor? mask, "
    "float scaling, float dropout_p, ScalarType adapter_dtype, ScalarType param_dtype, SymInt K, SymInt r, "
    "bool need_dx, bool need_dA, bool need_dB, str backend) -> (Tensor dx, Tensor dA, Tensor dB)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(x, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, save_s, backend):
    N, K = weight.shape
    call = describe_call(
        backend, x, weight, lora_A.dtype, adapter_dtype, N, K, lora_A.shape[0], mask is not None
    )
    y, s = select(backend, call).forward(
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        mask,
        scaling=scaling,
        dropout_p=dropout_p,
        adapter_dtype=adapter_dtype,
        save_s=save_s,
    )
    return y, x.new_empty(0, dtype=adapter_dtype) if s is None else s


def _forward_fake(x, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, adapter_dtype, save_s, backend):
    y = x.new_empty(x.shape[0], weight.shape[0])
    s = x.new_empty((x.shape[0], lora_A.shape[0]) if save_s else (0,), dtype=adapter_dtype)
    return y, s


def _backward(
    dy, x, weight, lora_A, lora_B, s, mask, scaling, dropout_p, adapter_dtype, param_dtype, K, r,
    need_dx, need_dA, need_dB, backend,
):  # fmt: skip
    call = describe_call(
        backend, dy, weight, param_dtype, adapter_dtype, dy.shape[1], K, r, mask is not None
    )
    dx, dA, dB = select(backend, call).backward(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        s,
        mask,
        scaling=scaling,
        dropout_p=dropout_p,
        adapter_dtype=adapter_dtype,
        param_dtype=param_dtype,
        need_dx=need_dx,
        need_dA=need_dA,
        need_dB=need_dB,
    )
    return (
        dy.new_empty(0) if dx is None else dx,
        dy.new_empty(0, dtype=param_dtype) if dA is None else dA,
        dy.new_empty(0, dtype=param_dtype) if dB is None else dB,
    )


def _backward_fake(
    dy, x, weight, lora_A, lora_B, s, mask, scaling, dropout_p, adapter_dtype, param_dtype, K, r,
    need_dx, need_dA, need_dB, backend,
):  # fmt: skip
    M, N = dy.shape
    return (
        dy.new_empty((M, K) if need_dx else (0,)),
        dy.new_empty((r, K) if need_dA else (0,), dtype=param_dtype),
        dy.new_empty((N, r) if need_dB else (0,), dtype=param_dtype),
    )


LIB.impl("forward", _forward, "CompositeExplicitAutograd")
LIB.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fusedlora::forward", _forward_fake, lib=LIB)
torch.library.register_fake("fusedlora::backward", _backward_fake, lib=LIB)

forward = torch.ops.fusedlora.forward.default
backward = torch.ops.fusedlora.backward.default
