"""Inputs, exact answers and error measures that tests and benchmarks share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

# ratios between two errors are meant only where neither is luck: rounding errors of few or exact sums may vanish
_FLOOR = 0.05


@dataclass(frozen=True)
class Inputs:
    """One problem: tensors as lora_linear takes them, dy for its backward, and the dropout mask where there is one."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    bias: Tensor | None  # [N]
    dy: Tensor  # [M, N]
    mask: Tensor | None  # [M, K], bool
    scaling: float
    dropout_p: float

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same problem with `fn` applied to each tensor."""
        changed: dict[str, Any] = {
            f.name: fn(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)

    def double(self) -> "Inputs":
        """The same problem in float64."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def leaves(self) -> "Inputs":
        """The same problem with x, lora_A and lora_B as fresh leaves that require a gradient."""
        x, lora_A, lora_B = (t.detach().clone().requires_grad_() for t in (self.x, self.lora_A, self.lora_B))
        return replace(self, x=x, lora_A=lora_A, lora_B=lora_B)


def make_inputs(
    M: int,
    K: int,
    N: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    bias: bool = True,
    dropout_p: float = 0.0,
    scaling: float = 0.75,
    seed: int = 0,
    drawn_on: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs whose products are of order one, the adapter's beside the weight's too.

    Drawn in float32, on the CPU unless that takes too long, so that the numbers are the same on every device;
    adapter_dtype None is dtype.
    """
    generator = torch.Generator(drawn_on).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=drawn_on) * std).to(device=device, dtype=dtype)

    adapter_dtype = dtype if adapter_dtype is None else adapter_dtype
    mask = None
    if dropout_p > 0.0:
        mask = (torch.rand(M, K, generator=generator, device=drawn_on) >= dropout_p).to(device)
    return Inputs(
        x=normal(M, K),
        weight=normal(N, K, std=K**-0.5),
        lora_A=normal(r, K, std=K**-0.5, dtype=adapter_dtype),
        lora_B=normal(N, r, std=r**-0.5, dtype=adapter_dtype),
        bias=normal(N) if bias else None,
        dy=normal(M, N),
        mask=mask,
        scaling=scaling,
        dropout_p=dropout_p,
    )


def eager_peft(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """What PEFT's LoRA linear computes, call by call; shapes and dtypes as for lora_linear.

    Under autocast it runs as PEFT does there. With a mask, that mask is applied in place of a drawn one.
    """
    result = F.linear(x, weight, bias)
    dropped = x.to(lora_A.dtype)
    if mask is not None:
        dropped = dropped * mask * (1.0 / (1.0 - dropout_p))
    elif training and dropout_p > 0.0:
        dropped = F.dropout(dropped, dropout_p)
    return (result + F.linear(F.linear(dropped, lora_A), lora_B) * scaling).to(result.dtype)


def exact(inputs: Inputs) -> dict[str, Tensor]:
    """y, dx, dA, dB in float64, by the formulas themselves, whatever dtype the inputs have."""
    i = inputs.double()
    masked = i.x if i.mask is None else i.x * i.mask / (1.0 - i.dropout_p)
    y = i.x @ i.weight.t() + i.scaling * (masked @ i.lora_A.t()) @ i.lora_B.t()
    dx = i.scaling * (i.dy @ i.lora_B) @ i.lora_A
    if i.mask is not None:
        dx = dx * i.mask / (1.0 - i.dropout_p)
    return {
        "y": y if i.bias is None else y + i.bias,
        "dx": dx + i.dy @ i.weight,
        "dA": i.scaling * (i.dy @ i.lora_B).t() @ masked,
        "dB": i.scaling * i.dy.t() @ (masked @ i.lora_A.t()),
    }


def run(linear: Callable[..., Tensor], inputs: Inputs, **settings: object) -> dict[str, Tensor]:
    """y, dx, dA, dB of one forward and backward of `linear`, which is called as lora_linear is.

    The mask of the inputs is not passed on: give it in `settings` to a function that takes one.
    """
    i = inputs.leaves()
    y = linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=i.scaling, **settings)
    dx, dA, dB = torch.autograd.grad(y, (i.x, i.lora_A, i.lora_B), i.dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, whatever torch.empty and Tensor.new_empty give starts as NaN, and launches share no memory."""
    from .memory import Reused

    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(out: Tensor) -> Tensor:
        if out.dtype is torch.uint8:  # to become some of a floating dtype
            return out.fill_(255)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    def fresh(self: Reused, size: int, shared: bool = True) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    with (
        mock.patch.object(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs))),
        mock.patch.object(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs))),
        mock.patch.object(Reused, "take", fresh),
    ):
        yield


def relative_error(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; NaN where `out` has one, 0 where both are zero."""
    ref = ref.double()
    difference = torch.linalg.vector_norm(out.double() - ref).item()
    return difference / torch.linalg.vector_norm(ref).item() if difference else 0.0


def relative_errors(outputs: Mapping[str, Tensor], ref: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each output by name."""
    return {name: relative_error(out, ref[name]) for name, out in outputs.items()}


def error_ratios(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ref: Mapping[str, Tensor]
) -> dict[str, float]:
    """Each output's error against `ref` over that of `theirs`; at most one where ours is no worse.

    Where theirs is exact by luck, as for sums of few terms, the rounding of the output's dtype is taken in its place.
    """
    ratios = {}
    for name, out in ours.items():
        floor = _FLOOR * torch.finfo(out.dtype).eps
        ratios[name] = relative_error(out, ref[name]) / max(relative_error(theirs[name], ref[name]), floor)
    return ratios
