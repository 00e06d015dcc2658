"""One PEFT model twice, stock and fused, on the same inputs: what the tests of fusedlora.integrations.peft share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import fusedlora.integrations.peft as backend
from fusedlora import dropout as fused_dropout
from fusedlora.testing import relative_errors

SHAPE = (4, 33)  # the leading dimensions of x
K, N = 96, 128


@dataclass(frozen=True)
class Case:
    """A LoRA layer and how it is called."""

    dtype: torch.dtype = torch.float32  # of the base
    adapter_dtype: torch.dtype | None = None  # None: the base's
    x_dtype: torch.dtype | None = None  # None: the base's
    autocast: torch.dtype | None = None
    bias: bool = True
    dropout: float = 0.0
    training: bool = True
    options: tuple[tuple[str, Any], ...] = ()  # of LoraConfig
    trained: tuple[str, ...] = ()  # parts of parameters' names that require a gradient beside the adapter's
    frozen: tuple[str, ...] = ()  # and that do not


class Net(nn.Module):
    """Two linears, so that a gradient passes a LoRA layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(K, N, bias=bias)
        self.down = nn.Linear(N, K, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def build(case: Case, device: torch.device, names: tuple[str, ...] = ("default",)) -> nn.Module:
    """A PEFT model whose every adapter parameter is random, with an adapter for each name, the first one active."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "lora_dropout": case.dropout} | dict(case.options)
    base = Net(case.bias).to(device=device, dtype=case.dtype)
    model: Any = None
    for name in names:
        config = LoraConfig(target_modules=["up", "down"], **options)
        if model is None:
            model = get_peft_model(base, config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(case.adapter_dtype or case.dtype)
            if "magnitude" in key:
                parameter.data.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            else:
                parameter.data.normal_(0.0, 0.3)
        if any(part in key for part in case.trained):
            parameter.requires_grad_(True)
        if any(part in key for part in case.frozen):
            parameter.requires_grad_(False)
    return model.train(case.training)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [..., K] and a random cotangent of the output."""
    x = torch.randn(*SHAPE, K, device=device).to(case.x_dtype or case.dtype)
    return x, torch.randn(*SHAPE, K, device=device)


def run(model: nn.Module, x: Tensor, dy: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, dx and the gradient of every parameter that has one, by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class FixedDropout(nn.Module):
    """Dropout by masks that were drawn elsewhere, one a call."""

    def __init__(self, masks: list[Tensor], p: float) -> None:
        super().__init__()
        self.masks, self.p = masks, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks.pop(0).view(x.shape) / (1.0 - self.p)


@contextmanager
def recorded_masks() -> Iterator[list[Tensor]]:
    """The masks that fused calls draw, in order."""
    masks: list[Tensor] = []
    draw = fused_dropout.draw

    def recording(x: Tensor, dropout_p: float, name: str) -> Tensor:
        drawn = draw(x, dropout_p, name)
        masks.append(fused_dropout.as_mask(drawn, x.numel() // x.shape[-1], x.shape[-1], dropout_p, x.device))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_dropout, "draw", recording)
        yield masks


def with_masks(model: nn.Module, masks: list[Tensor], p: float) -> nn.Module:
    """The stock model with its dropout replaced by these masks, for one forward: the layers are called in order."""
    rest = list(masks)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in list(module.lora_dropout):
                module.lora_dropout[name] = FixedDropout(rest, p)
    return model


def fused_calls(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and how many calls of layers were fused in it; a stock one fails."""
    before = dict(backend.calls)
    result = run()
    made = {key: count - before.get(key, 0) for key, count in backend.calls.items()}
    stock = {key: count for key, count in made.items() if count and key != "fused"}
    assert not stock, stock
    return result, made.get("fused", 0)


def compare(case: Case, device: torch.device, change: Callable[[nn.Module], Any] | None = None) -> None:
    """Stock and fused side by side: dtypes, shapes, which gradients there are, and no error above stock's.

    `change` is applied to both. The errors are those against the same model in float64.
    """
    stock = build(case, device)
    if change is not None:
        change(stock)
    fused = backend.fuse(copy.deepcopy(stock))
    exact = copy.deepcopy(stock).double()
    x, dy = inputs(case, device)
    with recorded_masks() as masks:
        ours, calls = fused_calls(lambda: run(fused, x, dy, case.autocast))
    assert calls == 2, "both layers are fused"
    assert len(masks) == (2 if case.dropout and case.training else 0)
    if masks:
        stock, exact = with_masks(stock, masks, case.dropout), with_masks(exact, masks, case.dropout)
    theirs = run(stock, x, dy, case.autocast)
    judge(ours, theirs, run(exact, x.double(), dy.to(theirs["y"].dtype)))


def judge(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}
    if ours["y"].dtype is torch.float64:  # stock is exact itself
        assert max(relative_errors(ours, exact).values()) < 1e-14
        return
    # A few per cent in 16 bits, and the last bits of fp32, are the luck of the order of summation.
    last_bits = 4 * torch.finfo(torch.float32).eps
    errors, stock = relative_errors(ours, exact), relative_errors(theirs, exact)
    over = {key: (error, stock[key]) for key, error in errors.items() if not error <= 1.25 * stock[key] + last_bits}
    assert not over, over


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same keys, and fp32 values that differ by the order of summation alone."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # A sum whose terms cancel is as exact as its neighbours, not as its own size.
        atol = 2e-5 * float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
