"""The operators as torch.library sees them."""

import pytest
import torch

import fusedlora.functional  # noqa: F401  registers the third op
from fusedlora import ops
from fusedlora.testing import make_inputs

FP32, BF16 = torch.float32, torch.bfloat16
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("save_s", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_op(save_s: bool, dropout_p: float, bias: bool) -> None:
    i = make_inputs(9, 16, 24, 4, dropout_p=dropout_p, bias=bias)
    args = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.mask, 1.5, dropout_p, FP32, save_s, "auto")
    torch.library.opcheck(ops.forward, args, test_utils=CHECKS)
    y, s = ops.forward(*args)
    assert y.shape == (9, 24) and y.is_contiguous() and s.shape == ((9, 4) if save_s else (0,))


@pytest.mark.parametrize("needed", range(8))
def test_backward_op(needed: int) -> None:
    i = make_inputs(9, 16, 24, 4)
    _, s = ops.forward(i.x, i.weight, i.lora_A, i.lora_B, None, None, 1.5, 0.0, FP32, True, "auto")
    flags = [bool(needed >> n & 1) for n in range(3)]
    args = (i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, None, 1.5, 0.0, FP32, *flags, "auto")
    torch.library.opcheck(ops.backward, args, test_utils=CHECKS)
    for out, need, shape in zip(ops.backward(*args), flags, ((9, 16), (4, 16), (24, 4))):
        assert out.shape == (shape if need else (0,))


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_fakes_have_the_real_strides_and_dtypes(layout: str) -> None:
    i = make_inputs(16, 16, 16, 4, BF16, FP32)
    make = {"plain": lambda t: t, "transposed": lambda t: t.t(), "sliced": lambda t: t[:, ::2].repeat(1, 2)}[layout]
    x, dy = make(i.x), make(i.dy)
    args = (x, i.weight, i.lora_A, i.lora_B, None, None, 1.5, 0.0, FP32, True, "auto")
    y, s = ops.forward(*args)
    back = (dy, x, i.weight, i.lora_A, i.lora_B, s, None, 1.5, 0.0, FP32, True, True, True, "auto")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args]
        fakes = [*ops.forward(*fake)]
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in back]
        fakes += ops.backward(*fake)
    for real, said in zip([y, s, *ops.backward(*back)], fakes):
        assert (real.shape, real.stride(), real.dtype) == (said.shape, said.stride(), said.dtype)


def test_inputs_are_not_written_to() -> None:
    i = make_inputs(9, 16, 24, 4)
    before = [t.clone() for t in (i.x, i.weight, i.lora_A, i.lora_B, i.dy)]
    _, s = ops.forward(i.x, i.weight, i.lora_A, i.lora_B, None, None, 1.5, 0.0, FP32, True, "auto")
    ops.backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, None, 1.5, 0.0, FP32, True, True, True, "auto")
    assert all(torch.equal(a, b) for a, b in zip(before, (i.x, i.weight, i.lora_A, i.lora_B, i.dy)))


@pytest.mark.parametrize("grads", [True, False], ids=["grads", "no grads"])
@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"dropout_p": 0.5}, {"dtype": BF16, "adapter_dtype": FP32}, {"M": 0}], ids=str
)
def test_what_the_compiler_sees(settings, grads: bool, device) -> None:
    """Through every check of opcheck: AOTAutograd's gradients are eager ones, static and dynamic."""
    i = make_inputs(device=device, **({"M": 6, "K": 16, "N": 24, "r": 4} | settings))
    i = i.leaves() if grads else i
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.mask)
    arguments = (*tensors, i.scaling, i.dropout_p, i.lora_A.dtype, "auto", "version")
    torch.library.opcheck(torch.ops.fusedlora.linear.default, arguments)
