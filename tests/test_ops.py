"""The operators as torch.library sees them."""

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fusedlora.functional  # noqa: F401  registers the third op
from fusedlora import ops
from fusedlora.testing import Inputs, exact, make_inputs, relative_error

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = [(9, 16, 24, 4), (1, 8, 16, 1), (0, 16, 24, 4)]


def forward_arguments(i: Inputs, save_s: bool = True) -> tuple:
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.mask, None, None)
    return *tensors, i.scaling, i.dropout_p, i.lora_A.dtype, save_s, "auto"


def backward_arguments(i: Inputs, needs: tuple[bool, bool, bool] = (True, True, True)) -> tuple:
    """As autograd gives them: what no needed gradient reads is None."""
    need_dx, need_dA, need_dB = needs
    _, s = ops.forward_op(*forward_arguments(i))
    tensors = (
        i.dy,
        i.x if need_dA else None,
        i.weight if need_dx else None,
        i.lora_A,
        i.lora_B,
        s if need_dB else None,
        i.mask if need_dx or need_dA else None,
        None,
    )
    return *tensors, i.scaling, i.dropout_p, i.lora_A.dtype, *needs, "auto"


@pytest.mark.parametrize(
    "op, implementation",
    [(ops.forward_op, ops._forward), (ops.backward_op, ops._backward)],
    ids=["forward", "backward"],
)
def test_schema(op, implementation) -> None:
    """Arguments in the implementation's order, none with a default, none written to, no output an input's view."""
    schema = op._schema
    parameters = inspect.signature(implementation).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)
    assert [argument.name for argument in schema.arguments if "OptionalType" in str(argument.type.kind())] == [
        name for name, parameter in parameters.items() if "None" in str(parameter.annotation)
    ]
    assert not any(argument.has_default_value() for argument in schema.arguments)
    assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
    assert torch.Tag.pt2_compliant_tag in op.tags


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("save_s", [True, False], ids=["S", "no-S"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_forward_op(shape, save_s: bool, dropout_p: float, bias: bool, device) -> None:
    i = make_inputs(*shape, dropout_p=dropout_p, bias=bias, device=device)
    args = forward_arguments(i, save_s)
    torch.library.opcheck(ops.forward_op, args)
    M, _, N, r = shape
    y, s = ops.forward_op(*args)
    assert y.shape == (M, N) and y.is_contiguous() and s.shape == ((M, r) if save_s else (0,))


@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, None), (BF16, None), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("needed", range(8), ids=lambda n: "needs-" + f"{n:03b}")
def test_backward_op(needed: int, dropout_p: float, dtype, adapter_dtype, device) -> None:
    i = make_inputs(9, 16, 24, 4, dtype, adapter_dtype, device, dropout_p=dropout_p)
    needs = bool(needed & 4), bool(needed & 2), bool(needed & 1)
    args = backward_arguments(i, needs)
    torch.library.opcheck(ops.backward_op, args)
    dtypes = (dtype, i.lora_A.dtype, i.lora_A.dtype)
    for out, need, shape, dtype in zip(ops.backward_op(*args), needs, ((9, 16), (4, 16), (24, 4)), dtypes):
        assert out.shape == (shape if need else (0,)) and out.dtype == dtype


def test_ops_are_the_formula(device) -> None:
    i = make_inputs(9, 16, 24, 4, FP64, device=device, dropout_p=0.3)
    y, s = ops.forward_op(*forward_arguments(i))
    outputs = {"y": y, **dict(zip(("dx", "dA", "dB"), ops.backward_op(*backward_arguments(i))))}
    want = exact(i)
    for name, out in outputs.items():
        assert relative_error(out, want[name]) < 1e-14, name
    assert relative_error(s, i.scaling / 0.7 * (i.x * i.mask) @ i.lora_A.t()) < 1e-14


LAYOUTS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: t.repeat(1, 2)[:, ::2],
    "one-row": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_real_strides_and_dtypes(layout: str, device) -> None:
    i = make_inputs(16, 16, 16, 4, BF16, FP32, device)
    i = Inputs(**{**vars(i), "x": LAYOUTS[layout](i.x), "dy": LAYOUTS[layout](i.dy)})
    given = forward_arguments(i), backward_arguments(i)
    reals = *ops.forward_op(*given[0]), *ops.backward_op(*given[1])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args] for args in given]
        fakes = *ops.forward_op(*fake[0]), *ops.backward_op(*fake[1])
    for real, said in zip(reals, fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype, real.device) == (
            said.shape,
            said.stride(),
            said.dtype,
            said.device,
        )


def test_fakes_carry_a_dynamic_number_of_rows() -> None:
    """One symbol goes through, and nothing is assumed of it."""
    i = make_inputs(9, 16, 24, 4)
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    rows = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(i.x, symbolic_context=rows)
    M = x.shape[0]
    weight, lora_A, lora_B = (mode.from_tensor(t, static_shapes=True) for t in (i.weight, i.lora_A, i.lora_B))
    with mode:
        y, s = ops.forward_op(x, weight, lora_A, lora_B, None, None, None, None, 1.5, 0.0, FP32, True, "auto")
        needs = (True, True, True)
        dx, dA, dB = ops.backward_op(y, x, weight, lora_A, lora_B, s, None, None, 1.5, 0.0, FP32, *needs, "auto")
    linear = torch.ops.fusedlora.linear.default
    with mode:
        z = linear(x, weight, lora_A, lora_B, None, None, None, 1.5, 0.0, FP32, "auto", "version")
    assert isinstance(M, torch.SymInt)
    for out, columns in ((y, 24), (s, 4), (dx, 16), (z, 24)):
        assert isinstance(out.shape[0], torch.SymInt) and str(out.shape[0]) == str(M)
        assert out.shape[1] == columns and out.is_contiguous()
    assert dA.shape == (4, 16) and dB.shape == (24, 4)
    assert not shapes.guards or all("s" not in str(guard.expr) for guard in shapes.guards)


def test_inputs_are_not_written_to(device) -> None:
    i = make_inputs(9, 16, 24, 4, device=device, dropout_p=0.5)
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.mask, i.dy)
    before = [t.clone() for t in tensors]
    ops.forward_op(*forward_arguments(i))
    ops.backward_op(*backward_arguments(i))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))
