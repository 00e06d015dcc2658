"""Bad input gets an error that names the argument, its value and the rule."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, functional

import fusedlora
from fusedlora import plans
from fusedlora.dora import dora_linear
from fusedlora.testing import make_inputs

GOOD = make_inputs(4, 16, 24, 4)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([torch.ones(2, 16), torch.ones(3, 16)], layout=layout)


def call(device, settings=None, **changed):
    i = dataclasses.replace(GOOD, **changed).map(lambda t: t if t.is_meta else t.to(device))
    return fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias, **({"scaling": 1.0} | (settings or {})))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x has 0 dimensions, must be \[\.\.\., in_features\]"),
        ({"weight": torch.ones(16)}, ValueError, r"weight has shape \(16,\), must have 2 dimensions"),
        ({"weight": torch.ones(0)}, ValueError, r"weight has shape \(0,\).*gathered by calling its module"),
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
        ({"bias": torch.ones(24).half()}, TypeError, "bias has dtype torch.float16, must be x.s torch.float32"),
        (
            {"x": torch.ones(4, 16).to(torch.complex64)},
            TypeError,
            "x has dtype torch.complex64, must be floating point",
        ),
        ({"weight": torch.ones(24, 16).char()}, TypeError, "weight has dtype torch.int8, x has torch.float32"),
        (
            {"weight": torch.ones(24, 16, device="meta")},
            ValueError,
            r"x is on c\w+(:0)?, weight is on meta.* one device",
        ),
        ({"lora_A": torch.ones(4, 16, device="meta")}, ValueError, "lora_A on meta.* they must be on one device"),
        ({"lora_B": torch.ones(24, 4, device="meta")}, ValueError, "lora_B on meta.* they must be on one device"),
        ({"bias": torch.ones(24, device="meta")}, ValueError, r"bias is on meta, x is on c\w+.* one device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors(changed, error, message: str, device) -> None:
    with pytest.raises(error, match=message):
        call(device, **changed)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0, must be in \[0, 1\)"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0.1, must be in \[0, 1\)"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p is nan, must be in \[0, 1\)"),
        ({"dropout_p": 1.0, "training": False}, ValueError, r"dropout_p is 1.0, must be in \[0, 1\)"),
        ({"backend": None}, ValueError, "backend is None, must be one of auto, cuda, triton, reference"),
        ({"backend": "cutlass"}, ValueError, "backend is 'cutlass', must be one of auto, cuda, triton, reference"),
        ({"scaling": torch.tensor(2.0, requires_grad=True)}, TypeError, "scaling requires a gradient"),
        ({"scaling": torch.tensor([2.0])}, TypeError, r"scaling is a tensor with shape \(1,\) and dtype torch.float32"),
        ({"scaling": torch.tensor(2)}, TypeError, r"scaling is a tensor with shape \(\) and dtype torch.int64"),
        ({"scaling": torch.tensor(2.0, device="meta")}, ValueError, r"scaling is on meta, x is on c\w+"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(settings, error, message: str, device) -> None:
    with pytest.raises(error, match=message):
        call(device, settings)


NUMBER = "must be a number"


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": None}, TypeError, "x is None, must be a tensor"),
        ({"x": [1.0]}, TypeError, "x is a list, must be a tensor"),
        ({"x": np.ones((4, 16))}, TypeError, "x is a ndarray, must be a tensor"),
        ({"weight": None}, TypeError, "weight is None, must be a tensor"),
        ({"lora_A": None}, TypeError, "lora_A is None, must be a tensor"),
        ({"lora_B": 3}, TypeError, "lora_B is a int, must be a tensor"),
        ({"bias": True}, TypeError, "bias is True, must be a tensor or None"),
        ({"scaling": "2"}, TypeError, f"scaling is '2', {NUMBER} or a floating point tensor of 0-d"),
        ({"scaling": None}, TypeError, f"scaling is None, {NUMBER}"),
        ({"scaling": [2.0]}, TypeError, rf"scaling is \[2.0\], {NUMBER}"),
        ({"scaling": 1 + 2j}, TypeError, rf"scaling is \(1\+2j\), {NUMBER}"),
        ({"dropout_p": None}, TypeError, f"dropout_p is None, {NUMBER}"),
        ({"dropout_p": "0.1", "training": False}, TypeError, f"dropout_p is '0.1', {NUMBER}"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, rf"dropout_p is tensor\(0.1000\), {NUMBER}"),
        ({"backend": ["auto"]}, ValueError, r"backend is \['auto'\], must be one of auto"),
        ({"x": torch.ones(4, 16).to_sparse()}, TypeError, "x has layout torch.sparse_coo, must be one dense tensor"),
        ({"x": nested(torch.jagged)}, TypeError, "x is nested, must be one dense tensor"),
        ({"x": nested(torch.strided)}, TypeError, "x is nested, must be one dense tensor"),
        ({"x": torch.ones(4, 16).to(torch.float8_e4m3fn)}, TypeError, "x has dtype torch.float8_e4m3fn, must be float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_of_another_type(changed, error, message: str, monkeypatch) -> None:
    """And no plan is kept for it; a scaling is in none."""
    monkeypatch.setattr(plans, "_plans", {})
    i = GOOD
    given = {"x": i.x, "weight": i.weight, "lora_A": i.lora_A, "lora_B": i.lora_B, "bias": i.bias, "scaling": 1.0}
    with pytest.raises(error, match=message):
        fusedlora.lora_linear(**given | changed)
    magnitude = torch.ones(24)
    with pytest.raises(error, match=message):
        dora_linear(**given | {"magnitude": magnitude} | changed)
    assert len(plans._plans) == ("scaling" in changed)


def test_what_else_fails_is_told_as_it_is(monkeypatch) -> None:
    """Also beside arguments of odd types that calls take: True is 1."""
    given = {"scaling": True, "dropout_p": False}
    y = fusedlora.lora_linear(GOOD.x, GOOD.weight, GOOD.lora_A, GOOD.lora_B, **given)
    assert torch.equal(y, fusedlora.lora_linear(GOOD.x, GOOD.weight, GOOD.lora_A, GOOD.lora_B, scaling=1.0))

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("fusedlora.functional.find", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        fusedlora.lora_linear(GOOD.x, GOOD.weight, GOOD.lora_A, GOOD.lora_B, **given)


@pytest.mark.parametrize("option", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize(
    "attribute, value, error, message",
    [
        ("scaling", "2", TypeError, f"scaling is '2', {NUMBER}"),
        ("scaling", None, TypeError, f"scaling is None, {NUMBER}"),
        ("lora_dropout", "a", TypeError, f"dropout_p is 'a', {NUMBER}"),
        ("lora_dropout", 1.0, ValueError, r"dropout_p is 1.0, must be in \[0, 1\) \(in a layer it is lora_dropout\)"),
    ],
)
def test_what_is_set_on_a_layer(option, attribute: str, value, error, message: str) -> None:
    """By its call, and by explain, which answers for the call."""
    layer = fusedlora.FusedLoRALinear(16, 24, **option)
    setattr(layer, attribute, value)
    with pytest.raises(error, match=message):
        layer(GOOD.x)
    with pytest.raises(error, match=message):
        fusedlora.explain(GOOD.x, layer)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.ones(4, 16).double()}, "x has torch.float64: they must be equal under autocast too, which leaves"),
        ({"weight": torch.ones(24, 16).double()}, "has dtype torch.float64.* equal under autocast too, which leaves"),
    ],
)
def test_float64_under_autocast(changed, message: str, device) -> None:
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match=message):
        call(device, **changed)


def test_a_dtype_is_named_once(device) -> None:
    with pytest.raises(TypeError, match=r"must be x's torch\.float32$"):
        call(device, lora_A=torch.ones(4, 16).half())


def test_nothing_is_refused_by_accident(device) -> None:
    assert call(device).shape == (4, 24)


def linear(x, lora_A=None):
    """In x, and in lora_A where it is given; the rest is GOOD's."""
    weight, own_A, lora_B = (t.to(x.device) for t in (GOOD.weight, GOOD.lora_A, GOOD.lora_B))
    return fusedlora.lora_linear(x, weight, own_A if lora_A is None else lora_A, lora_B, scaling=1.0)


ONCE = "lora_linear can be differentiated only once: it has no double backward"


@pytest.mark.parametrize(
    "again",
    [
        lambda dx, x, lora_A: dx.sum().backward(),
        lambda dx, x, lora_A: torch.autograd.grad(dx.pow(2).sum(), lora_A),
        lambda dx, x, lora_A: torch.autograd.grad(dx.pow(2).sum(), lora_A, allow_unused=True),
        lambda dx, x, lora_A: torch.autograd.grad(dx.pow(2).sum(), x, allow_unused=True),
    ],
    ids=["backward", "grad-of-A", "unused-allowed", "grad-of-x"],
)
def test_double_backward(again, device) -> None:
    """Raises, where autograd alone would take the dependence for zero."""
    i = GOOD.leaves()
    x, lora_A = (t.detach().to(device).requires_grad_() for t in (i.x, i.lora_A))
    (dx,) = torch.autograd.grad(linear(x, lora_A).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        again(dx, x, lora_A)


@pytest.mark.parametrize("order", ["hvp", "vhp", "hessian"])
def test_second_derivatives(order: str, device) -> None:
    x = GOOD.x.to(device)
    arguments = (lambda x: linear(x).pow(2).sum(), x, *([] if order == "hessian" else [x]))
    with pytest.raises(RuntimeError, match=ONCE):
        getattr(functional, order)(*arguments)


@pytest.mark.parametrize("needed", ["x", "weight", "lora_A", "lora_B"])
def test_a_graph_of_the_gradients_has_the_right_values(needed: str, device) -> None:
    """create_graph alone is no second differentiation."""
    i = GOOD.map(lambda t: t.to(device)).leaves()
    i = dataclasses.replace(i, weight=i.weight.clone().requires_grad_())
    grads = [
        torch.autograd.grad(
            fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0),
            getattr(i, needed),
            i.dy,
            create_graph=graph,
        )[0]
        for graph in (True, False)
    ]
    assert torch.equal(*grads) and [grad.requires_grad for grad in grads] == [True, False]


TRANSFORMS = {
    "vmap": lambda x: torch.func.vmap(linear)(x),
    "grad": lambda x: torch.func.grad(lambda z: linear(z).sum())(x),
    "jvp": lambda x: torch.func.jvp(linear, (x,), (x,)),
    "jacrev": lambda x: torch.func.jacrev(linear)(x),
    "grad-of-A": lambda x: torch.func.grad(lambda a: linear(x, a).sum())(x[:4]),
}
REFUSED = r"lora_linear supports neither torch\.func transforms \(vmap, grad, jvp\) nor forward-mode AD"


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms(transform: str, device) -> None:
    with pytest.raises(RuntimeError, match=REFUSED):
        TRANSFORMS[transform](GOOD.x.to(device))


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_compiled_functional_transforms(transform: str, device) -> None:
    """Not a tangent lost without a word."""
    torch._dynamo.reset()
    compiled = torch.compile(TRANSFORMS[transform], backend="aot_eager")
    with pytest.raises(Exception, match=REFUSED):
        compiled(GOOD.x.to(device))


def test_forward_mode(device) -> None:
    x = GOOD.x.to(device)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
        linear(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_jit_trace(use_dora: bool, grad: bool, device) -> None:
    layer = fusedlora.FusedLoRALinear(16, 24, r=4, use_dora=use_dora, device=device)
    refused = f"{'dora' if use_dora else 'lora'}_linear cannot be traced by torch.jit.trace"
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=refused):
            torch.jit.trace(layer, GOOD.x.to(device))
        x = GOOD.x.to(device)
        torch.testing.assert_close(torch.jit.trace(layer.merge(), x)(x[:2]), layer(x[:2]))


def test_compiled_bad_shape(device) -> None:
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="weight has in_features 16, x has 15"):
        torch.compile(linear, backend="aot_eager")(torch.ones(4, 15, device=device))
