"""PEFT's LoRA layers over torchao's weight-only int8 and float8 linears: how their weights are decoded, and when.

Stock keeps a dense copy of such a weight in the graph. Weights whose linear rounds x too are not taken: there the
rounding of x is what the user asked for.
"""

from typing import Any

from peft.tuners.lora.torchao import TorchaoLoraLinear as StockLinear
from peft.tuners.lora.torchao import dispatch_torchao
from torch import Tensor
from torchao import quantization

from ..autocast import autocast_dtype
from ..quantised import QuantisedWeight
from .peft import forward, stock_forward
from .peft_kinds import Kind, add_kind
from .rule import FORMATS


class TorchaoLoraLinear(StockLinear):  # type: ignore[misc]
    """PEFT's layer over a torchao weight with the fused forward."""

    forward = forward

    def extra_repr(self) -> str:
        return "fusedlora"


def weight_only(base: Any, x: Tensor | None) -> QuantisedWeight | str:
    """The weight of an nn.Linear that torchao has quantised, or why a call on x stays stock."""
    weight: Any = base._parameters.get("weight")
    if weight.act_quant_kwargs is not None or getattr(weight, "act_pre_scale", None) is not None:
        return "base_layer quantises x too, or scales it first"
    if weight.requires_grad or weight.dim() != 2:
        return "base_layer's weight requires a gradient or is not 2-d"
    if x is not None and autocast_dtype(x) not in (None, x.dtype):
        return f"x has dtype {x.dtype} under autocast to {autocast_dtype(x)}, over a torchao weight"
    if x is not None and x.dtype is not weight.dtype:
        return f"x has dtype {x.dtype}, the weight {weight.dtype}"
    return QuantisedWeight(weight, tuple(weight.shape), weight.dtype, _decode, fills=False)


def _decode(packed: Any, out: Tensor | None) -> Tensor:
    dense: Tensor = packed.dequantize()
    return dense


for _name in ("Int8Tensor", "Float8Tensor"):  # of the torchao that is installed
    if hasattr(quantization, _name):
        FORMATS[getattr(quantization, _name)] = weight_only
add_kind(Kind(StockLinear, TorchaoLoraLinear, stock_forward), dispatch_torchao)
