"""fusedlora as the backend of loralib (https://github.com/microsoft/LoRA): `loralib.Linear` and nothing else.

    fuse(model)          every loralib.Linear of a model, in place; unfuse(model) takes it back
    why_not(layer, x)    why a call stays loralib's own

Only the forward changes, at each call by one rule. loralib merges the adapter into the weight at eval() and takes it
out at train(): a merged layer is its plain linear. Parameters, names and checkpoints stay loralib's. What differs is
what differs under PEFT: one differentiation only, other dropout masks from the same seed.
"""

from typing import TypeVar

from loralib import Linear as StockLinear
from torch import Tensor, nn

from .adapted_linear import Swap

_Model = TypeVar("_Model", bound=nn.Module)


class Linear(StockLinear):  # type: ignore[misc]
    """loralib's Linear with the fused forward."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return _swap.forward(self, x)


_swap = Swap(StockLinear, Linear, base="")
calls = _swap.calls  # by "fused" or by the reason against it


def fuse(model: _Model) -> _Model:
    """Gives the fused forward to every layer that is exactly a loralib.Linear; in place, returns `model`.

    MergedLinear, Embedding and the convolutions stay as they are. Raises ValueError where there is no such layer.
    """
    return _swap.fuse(model)


def unfuse(model: _Model) -> _Model:
    """Undoes `fuse`; returns `model`. Raises RuntimeError for layers that fully_shard has given another class."""
    return _swap.unfuse(model)


def why_not(layer: nn.Module, x: Tensor | None = None) -> str | None:
    """Why `layer(x)`, here and now, would run loralib's forward; None if it is fused.

    Without x what depends on it is left out.
    """
    return _swap.why_not(layer, x)
