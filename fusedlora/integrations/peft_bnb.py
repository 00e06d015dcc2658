"""PEFT's LoRA layers over bitsandbytes' 4-bit and 8-bit linears: how their weights are decoded, and when.

4 bits: bitsandbytes decodes into the compute dtype and multiplies; so does the fused call, decoding into a buffer.

8 bits (LLM.int8): on a GPU, and in eval anywhere, bitsandbytes rounds x to int8 too, apart from outlier columns above
`threshold`, and in backward decodes the weight; on a CPU it decodes in both. The fused call decodes in both, whatever
the threshold: against float64 with the same int8 weight its error is the smaller one by far.
"""

from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn.modules import Int8Params, LinearFP4, LinearNF4, Params4bit
from bitsandbytes.nn.modules import Linear4bit as Base4bit
from bitsandbytes.nn.modules import Linear8bitLt as Base8bitLt
from peft.tuners.lora.bnb import Linear4bit as StockLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as StockLinear8bitLt
from peft.tuners.lora.bnb import dispatch_bnb_4bit, dispatch_bnb_8bit
from torch import Tensor, float32

from ..autocast import autocast_dtype
from ..quantised import QuantisedWeight
from .peft import forward_over
from .peft_kinds import Kind, add_kind
from .rule import FLOATS, FORMATS, name_of

_forward4, _forward8 = StockLinear4bit.forward, StockLinear8bitLt.forward
_CHUNK = 1 << 20  # elements that a CPU decodes at a time: it forms them in float32 first


class Linear4bit(StockLinear4bit):  # type: ignore[misc]
    """PEFT's layer over a 4-bit linear with the fused forward."""

    forward = forward_over(_forward4)

    def extra_repr(self) -> str:
        return "fusedlora"


class Linear8bitLt(StockLinear8bitLt):  # type: ignore[misc]
    """PEFT's layer over an 8-bit linear with the fused forward."""

    forward = forward_over(_forward8)

    def extra_repr(self) -> str:
        return "fusedlora"


def four_bit(base: Any, x: Tensor | None) -> QuantisedWeight | str:
    """The weight of a bnb.nn.Linear4bit, or why a call on x stays stock; x None leaves out what depends on it."""
    weight = base._parameters.get("weight")
    if type(weight) is not Params4bit:
        return f"base_layer's weight is a {name_of(type(weight))}, no Params4bit"
    state = weight.quant_state
    if state is None:
        return "base_layer's quant_state is missing: it comes with the first move to a device, or at the first call"
    if getattr(state, "packing_format_for_cpu", False):
        return "base_layer's weight has been packed for inference on this CPU"
    if weight.requires_grad or tuple(state.shape) != (base.out_features, base.in_features):
        return f"base_layer's weight requires a gradient or was quantised from shape {tuple(state.shape)}"
    dtype = base.compute_dtype
    if not base.compute_type_is_set or dtype is None:
        return "base_layer's compute_dtype is not set: the first call sets it"
    bias = base._parameters.get("bias")
    if bias is not None and bias.dtype is not dtype:
        return f"base_layer's bias has dtype {bias.dtype}, its compute_dtype is {dtype}: a stock call converts it"
    autocast = None if x is None else autocast_dtype(x)
    if autocast is not None and x is not None and (autocast is not dtype or x.dtype not in (dtype, float32)):
        return f"x has dtype {x.dtype} under autocast to {autocast}, base_layer's compute_dtype is {dtype}"
    device = weight.device.type
    return QuantisedWeight(
        weight, tuple(state.shape), dtype, partial(_decode_four_bit, state, dtype), fills=device == "cuda"
    )


def _decode_four_bit(state: Any, dtype: torch.dtype, packed: Tensor, out: Tensor | None) -> Tensor:
    """By blocks: a level of the 4-bit code times the block's absmax, itself an 8-bit code under double quantisation."""
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).add_(state.offset)
    decode = torch.ops.bitsandbytes.dequantize_4bit
    given = packed, absmax.to(float32), state.blocksize, state.quant_type, state.shape, dtype
    if out is None:
        fresh: Tensor = decode.default(*given)
        return fresh
    decode.out(*given, out=out)
    return out


def eight_bit(base: Any, x: Tensor | None) -> QuantisedWeight | str:
    """The same of a bnb.nn.Linear8bitLt."""
    weight, state = base._parameters.get("weight"), base.state
    if state.has_fp16_weights:
        return "base_layer has fp16 weights, which it quantises at each call"
    if type(weight) is not Int8Params or weight.dtype is not torch.int8:
        return "base_layer is not quantised: that comes with the first move to a device"
    absmax = weight.SCB if weight.SCB is not None else state.SCB
    if absmax is None or absmax.device != weight.device:
        return "base_layer's SCB, the scales of its rows, is missing or on another device"
    dtype = float32
    if x is not None:
        dtype = x.dtype
        autocast = autocast_dtype(x)
        if autocast is not None and autocast is not dtype:
            return f"x has dtype {dtype} under autocast to {autocast}, over an 8-bit base"
        if dtype not in FLOATS or dtype is torch.float64:
            return f"x has dtype {dtype} over an 8-bit base"
        bias = base._parameters.get("bias")
        if bias is not None and bias.dtype is not dtype:
            return f"base_layer's bias has dtype {bias.dtype}, x {dtype}: a stock call converts it"
    N, K = weight.shape
    return QuantisedWeight(weight, (N, K), dtype, partial(_decode_eight_bit, absmax), fills=True)


def _decode_eight_bit(absmax: Tensor, packed: Tensor, out: Tensor | None) -> Tensor:
    """Each row times its absmax / 127."""
    assert out is not None
    scale = absmax.unsqueeze(1) * (1.0 / 127.0)
    rows = len(packed) if packed.device.type == "cuda" else max(1, _CHUNK // packed.shape[1])
    for first in range(0, len(packed), rows):
        part = slice(first, first + rows)
        torch.mul(packed[part], scale[part], out=out[part])
    return out


def _dispatch(target: Any, adapter_name: str, config: Any, **options: Any) -> Any:
    """PEFT's two; before peft 0.19 they want no config."""
    made = dispatch_bnb_8bit(target, adapter_name, config=config, **options)
    return dispatch_bnb_4bit(target, adapter_name, config=config, **options) if made is None else made


if hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):  # from bitsandbytes 0.46 on
    FORMATS.update(dict.fromkeys((Base4bit, LinearNF4, LinearFP4), four_bit))
FORMATS[Base8bitLt] = eight_bit
add_kind(Kind(StockLinear4bit, Linear4bit, _forward4), _dispatch)
add_kind(Kind(StockLinear8bitLt, Linear8bitLt, _forward8))
