"""fusedlora as the backend of litgpt (https://github.com/Lightning-AI/litgpt): `litgpt.lora.LoRALinear`, not its QKV.

    fuse(model)          every LoRALinear of a model, in place; unfuse(model) takes it back
    why_not(layer, x)    why a call stays litgpt's own

Only the forward changes, at each call by one rule. LoRAQKVLinear, whose adapter covers parts of one weight, stays
litgpt's; a GPT has one in each block, beside its projection and its MLP. Parameters, names and checkpoints stay
litgpt's. What differs is what differs under PEFT: one differentiation only, other dropout masks from the same seed.
"""

from typing import TypeVar

from litgpt.lora import LoRALinear as StockLinear
from torch import Tensor, nn

from .adapted_linear import Swap

_Model = TypeVar("_Model", bound=nn.Module)


class LoRALinear(StockLinear):  # type: ignore[misc]
    """litgpt's LoRALinear with the fused forward."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return _swap.forward(self, x)


_swap = Swap(StockLinear, LoRALinear, base="linear")
calls = _swap.calls  # by "fused" or by the reason against it


def fuse(model: _Model) -> _Model:
    """Gives the fused forward to every layer that is exactly a litgpt.lora.LoRALinear; in place, returns `model`.

    To be called after Fabric has set the model up, where its plugins replace linears. Raises ValueError where there
    is no such layer.
    """
    return _swap.fuse(model)


def unfuse(model: _Model) -> _Model:
    """Undoes `fuse`; returns `model`. Raises RuntimeError for layers that fully_shard has given another class."""
    return _swap.unfuse(model)


def why_not(layer: nn.Module, x: Tensor | None = None) -> str | None:
    """Why `layer(x)`, here and now, would run litgpt's forward; None if it is fused.

    Without x what depends on it is left out.
    """
    return _swap.why_not(layer, x)
