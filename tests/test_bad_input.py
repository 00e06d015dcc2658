"""Bad input gets an error that names the argument, its value and the rule."""

import dataclasses

import pytest
import torch

import fusedlora
from fusedlora.testing import make_inputs

GOOD = make_inputs(4, 16, 24, 4)


def call(settings=None, **changed):
    i = dataclasses.replace(GOOD, **changed)
    return fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias, **({"scaling": 1.0} | (settings or {})))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x has 0 dimensions, must be \[\.\.\., in_features\]"),
        ({"weight": torch.ones(16)}, ValueError, r"weight has shape \(16,\), must have 2 dimensions"),
        ({"lora_A": torch.ones(4, 16, 1)}, ValueError, r"lora_A has shape \(4, 16, 1\), must have 2 dimensions"),
        ({"x": torch.ones(4, 15)}, ValueError, "weight has in_features 16, x has 15"),
        ({"lora_A": torch.ones(4, 17)}, ValueError, "lora_A has in_features 17, x has 16"),
        ({"lora_B": torch.ones(24, 5)}, ValueError, "lora_B has rank 5, lora_A has 4"),
        ({"lora_B": torch.ones(23, 4)}, ValueError, "lora_B has out_features 23, weight has 24"),
        ({"lora_A": torch.ones(0, 16), "lora_B": torch.ones(24, 0)}, ValueError, "r is 0, must be at least 1"),
        ({"bias": torch.ones(23)}, ValueError, r"bias has shape \(23,\), must be \(24,\)"),
        ({"x": torch.ones(4, 16, dtype=torch.int64)}, TypeError, "x has dtype torch.int64, must be floating point"),
        ({"weight": torch.ones(24, 16).bfloat16()}, TypeError, "weight has dtype torch.bfloat16, x has torch.float32"),
        ({"lora_A": torch.ones(4, 16).half()}, TypeError, "lora_A has dtype torch.float16, must be x's torch.float32"),
        ({"lora_B": torch.ones(24, 4).half()}, TypeError, "lora_B has dtype torch.float16, lora_A has torch.float32"),
        ({"bias": torch.ones(24).half()}, TypeError, "bias has dtype torch.float16, x has torch.float32"),
        ({"weight": torch.ones(24, 16, device="meta")}, ValueError, "x is on cpu, weight is on meta"),
        ({"bias": torch.ones(24, device="meta")}, ValueError, "bias is on meta, x is on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors(changed, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changed)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0, must be in \[0, 1\)"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0.1, must be in \[0, 1\)"),
        ({"backend": "cutlass"}, ValueError, "backend is 'cutlass', must be one of auto, triton, reference"),
        ({"scaling": torch.tensor(2.0)}, TypeError, "scaling is a tensor, must be a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(settings, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(settings)


def test_nothing_is_refused_by_accident() -> None:
    assert call().shape == (4, 24)


def test_double_backward() -> None:
    i = GOOD.leaves()
    y = fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0)
    (dx,) = torch.autograd.grad(y.sum(), i.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        dx.sum().backward()


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_functional_transforms(transform: str) -> None:
    def f(x):
        return fusedlora.lora_linear(x, GOOD.weight, GOOD.lora_A, GOOD.lora_B, scaling=1.0)

    run = {
        "vmap": lambda: torch.func.vmap(f)(GOOD.x),
        "grad": lambda: torch.func.grad(lambda x: f(x).sum())(GOOD.x),
        "jvp": lambda: torch.func.jvp(f, (GOOD.x,), (GOOD.x,)),
    }[transform]
    with pytest.raises(RuntimeError, match="neither torch.func transforms"):
        run()
