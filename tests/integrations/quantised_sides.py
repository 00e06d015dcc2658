"""PEFT models over quantised base weights, and the same in float64: what the tests of those weights share."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

_spec = importlib.util.spec_from_file_location("peft_sides", Path(__file__).with_name("peft_sides.py"))
assert _spec is not None and _spec.loader is not None
sides = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(sides)
backend = sides.backend
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

FOUR_BIT = ("nf4", "nf4-nested", "fp4")
EIGHT_BIT = ("int8", "int8-threshold")
TORCHAO = ("torchao-int8", "torchao-float8")


@dataclass(frozen=True)
class Case:
    """A quantised model and how it is called."""

    kind: str
    dtype: torch.dtype = BF16  # that the weight decodes to
    adapter_dtype: torch.dtype = FP32
    x_dtype: torch.dtype | None = None  # None: the weight's
    autocast: torch.dtype | None = None
    bias: bool = True
    dropout: float = 0.0
    training: bool = True
    options: tuple[tuple[str, Any], ...] = ()  # of LoraConfig


def quantised(linear: nn.Linear, case: Case, device: torch.device) -> nn.Linear:
    """The linear in the format of `case`."""
    K, N, bias = linear.in_features, linear.out_features, linear.bias is not None
    if case.kind in TORCHAO:
        ao = pytest.importorskip("torchao.quantization")
        linear = linear.to(device, case.dtype).requires_grad_(False)
        config = ao.Int8WeightOnlyConfig() if case.kind == "torchao-int8" else ao.Float8WeightOnlyConfig()
        ao.quantize_(linear, config)
        return linear
    bnb = pytest.importorskip("bitsandbytes")
    if case.kind in FOUR_BIT:
        nested = case.kind == "nf4-nested"
        made = bnb.nn.Linear4bit(
            K, N, bias, compute_dtype=case.dtype, compress_statistics=nested, quant_type=case.kind[:3]
        )
    else:
        threshold = 2.5 if case.kind == "int8-threshold" else 0.0
        made = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False, threshold=threshold)
    made.load_state_dict(linear.state_dict())
    made = made.to(device)  # which quantises
    if bias:
        made.bias.data = made.bias.data.to(case.dtype)
    return made.requires_grad_(False)


def peft_model(net: nn.Module, case: Case, targets: list[str]) -> Any:
    """PEFT over the net, every adapter parameter random."""
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = case.kind in FOUR_BIT, case.kind in EIGHT_BIT  # type: ignore
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "lora_dropout": case.dropout} | dict(case.options)
    model = get_peft_model(net, LoraConfig(target_modules=targets, **options), autocast_adapter_dtype=False)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.empty_like(parameter).normal_(0.0, 0.3).to(case.adapter_dtype)
            parameter.requires_grad_(True)
    return model.train(case.training)


def build(case: Case, device: torch.device) -> Any:
    """sides.Net under PEFT with both linears quantised."""
    net = sides.Net(case.bias).to(device)
    net.up, net.down = quantised(net.up, case, device), quantised(net.down, case, device)
    return peft_model(net, case, ["up", "down"])


def dense_weight(base: Any) -> Tensor:
    """The weight that a quantised linear stands for, in float64."""
    weight = base.weight
    if hasattr(weight, "dequantize") and hasattr(weight, "qdata"):
        zero = getattr(weight, "zero_point", None)
        return (weight.qdata.double() - (0.0 if zero is None else zero.double())) * weight.scale.double()
    if weight.dtype is torch.int8:
        absmax = weight.SCB if weight.SCB is not None else base.state.SCB
        return weight.data.double() * absmax.double().unsqueeze(1) / 127
    import bitsandbytes as bnb

    state = copy.copy(weight.quant_state)
    state.dtype = FP32
    return bnb.functional.dequantize_4bit(weight.data, state).double()


def in_float64(model: Any, case: Case, device: torch.device) -> Any:
    """The same model with plain linears in float64."""
    plain = dataclasses.replace(case, kind="plain")
    exact = peft_model(sides.Net(case.bias).to(device), plain, ["up", "down"]).double()
    for name in ("up", "down"):
        ours, theirs = getattr(exact.base_model.model, name), getattr(model.base_model.model, name)
        ours.base_layer.weight = nn.Parameter(dense_weight(theirs.base_layer), requires_grad=False)
        if case.bias:
            ours.base_layer.bias = nn.Parameter(theirs.base_layer.bias.double(), requires_grad=False)
        for part in ("lora_A", "lora_B"):
            for key, value in getattr(theirs, part)["default"].named_parameters():
                setattr(getattr(ours, part)["default"], key, nn.Parameter(value.detach().double()))
    return exact


def compare(case: Case, device: torch.device) -> None:
    """Stock and fused side by side: dtypes, shapes, which gradients there are, and no error above stock's."""
    stock = build(case, device)
    fused = backend.fuse(copy.deepcopy(stock))
    exact = in_float64(stock, case, device)
    x = torch.randn(*sides.SHAPE, sides.K, device=device).to(case.x_dtype or case.dtype)
    dy = torch.randn(*sides.SHAPE, sides.K, device=device)
    with sides.recorded_masks() as masks:
        ours, calls = sides.fused_calls(lambda: sides.run(fused, x, dy, case.autocast))
    assert calls == 2, "both layers are fused"
    assert len(masks) == (2 if case.dropout and case.training else 0)
    if masks:
        stock, exact = sides.with_masks(stock, masks, case.dropout), sides.with_masks(exact, masks, case.dropout)
    theirs = sides.run(stock, x, dy, case.autocast)
    assert len(ours) == 2 + 2 * (3 if dict(case.options).get("lora_bias") else 2)
    sides.judge(ours, theirs, sides.run(exact, x.double(), dy.to(theirs["y"].dtype)))
