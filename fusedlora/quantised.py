"""lora_linear over a quantised base weight: decoded for forward, again for backward, and for no longer than a launch.

The graph keeps the quantised weight. The autograd.Function is lora_linear's own; its plan decodes the weight and hands
on to the plan of the dense one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dropout, functional
from .arguments import check_scaling
from .autocast import cast
from .dense_buffers import borrowed
from .plans import Given, Plan, Saved, aligned, find

_ABSENT = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A frozen base weight [N, K] in some library's format.

    Attributes:
        packed: what the graph keeps; it must not require a gradient. Shape and dtype are the format's own.
        shape: (N, K).
        dtype: of the decoded weight.
        decode: (packed, out) -> the weight [N, K] in `dtype`, written into `out`, or a fresh tensor where `out` is
            None. It is called again in backward, with the packed tensor that the graph kept.
        fills: whether decode can write into a given tensor; if not, out is always None.
    """

    packed: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    decode: Callable[[Tensor, Tensor | None], Tensor]
    fills: bool

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @contextmanager
    def dense(self, packed: Tensor) -> Iterator[Tensor]:
        """The decoded weight, to be read on the current stream within the block."""
        if not self.fills:
            yield self.decode(packed, None)
            return
        with self.undecoded() as out:
            yield self.decode(packed, out)

    @contextmanager
    def undecoded(self) -> Iterator[Tensor]:
        """Contiguous memory for the decoded weight, of any content; as `dense`."""
        if not self.fills:
            yield torch.empty(self.shape, dtype=self.dtype, device=self.device)
            return
        with borrowed(self.shape, self.dtype, self.device) as out:
            yield out


def quantised_lora_linear(
    x: Tensor,
    weight: QuantisedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """lora_linear with a weight that is decoded when it is read; differentiable once in every tensor but the weight.

    Args, returns and raises: as lora_linear, x having, after autocast's cast, the dtype that the weight decodes to;
    and RuntimeError under torch.compile.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("quantised_lora_linear does not take part in torch.compile")
    functional.refuse_transforms()
    x, _, lora_A, lora_B, bias, autocast = cast(x, _ABSENT, lora_A, lora_B, bias)
    scale = mask = None
    if isinstance(scaling, Tensor):
        check_scaling(scaling, x)
        scale, scaling = scaling, 1.0
    drops = training and dropout_p > 0.0
    plan = _DecodingPlan(weight, dropout_p, drops, autocast, backend)
    if drops:
        mask = dropout.draw(x, dropout_p, backend)
    given = (x, weight.packed, lora_A, lora_B, bias, mask, scale)
    if torch.is_grad_enabled():
        return functional.differentiable(given, scaling, plan)
    return plan.forward(given, scaling, False)[0]


class _DecodingPlan(Plan):
    """One call's: in `given` and `saved` the weight is the packed one. S alone is summed without decoding it."""

    def __init__(
        self, weight: QuantisedWeight, dropout_p: float, drops: bool, autocast: torch.dtype | None, backend: str
    ) -> None:
        self.weight = weight
        self.settings = (dropout_p, drops, autocast, backend)

    def forward(self, given: Given, scaling: float, save_s: bool) -> tuple[Tensor, Tensor | None]:
        with self.weight.dense(given[1]) as dense:
            self._find(given, dense)
            return self.plan.forward(_with_weight(given, dense), scaling, save_s)

    def _find(self, given: Given, dense: Tensor) -> None:
        x, _, lora_A, lora_B, bias, _, scale = given
        self.plan: Any = find(x, dense, lora_A, lora_B, bias, scale, *self.settings)

    def can_fill(self, given: Given) -> bool:
        with self.weight.undecoded() as place:
            self._find(given, place)
        can: bool = self.plan.can_fill(given)
        return can

    def empty_s(self, x: Tensor, lora_A: Tensor) -> Tensor:
        s: Tensor = self.plan.empty_s(x, lora_A)
        return s

    def fill(self, given: Given, scaling: float, y: Tensor, s: Tensor | None) -> None:
        with self.weight.dense(given[1]) as dense:
            if not aligned(dense):  # as `can_fill` took it to be
                dense = dense.clone(memory_format=torch.contiguous_format)
            self.plan.fill(_with_weight(given, dense), scaling, y, s)

    def fill_s(self, given: Given, scaling: float, s: Tensor) -> None:
        with self.weight.undecoded() as place:  # S does not depend on it
            self.plan.fill_s(_with_weight(given, place), scaling, s)

    def backward(
        self, dy: Tensor, saved: Saved, scaling: float, shape: torch.Size, needs: tuple[bool, bool, bool]
    ) -> Any:
        x, packed, lora_A, lora_B, s, mask, scale = saved
        if packed is None:
            return self.plan.backward(dy, saved, scaling, shape, needs)
        with self.weight.dense(packed) as dense:
            return self.plan.backward(dy, (x, dense, lora_A, lora_B, s, mask, scale), scaling, shape, needs)


def _with_weight(given: Given, weight: Tensor) -> Given:
    return (given[0], weight, *given[2:])
