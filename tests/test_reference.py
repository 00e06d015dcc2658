"""The formulas in plain PyTorch: right to float64, and no worse than the eager path in every dtype."""

import contextlib

import pytest
import torch

import fusedlora
from fusedlora.testing import eager_peft, error_ratios, exact, make_inputs, relative_errors, run

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def reference(*args, **kwargs):
    return fusedlora.lora_linear(*args, backend="reference", **kwargs)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (63, 24, 40, 5), (500, 64, 32, 16)], ids=str)
def test_float64_is_the_formula(shape, bias: bool, device) -> None:
    i = make_inputs(*shape, FP64, device=device, bias=bias)
    assert max(relative_errors(run(reference, i), exact(i)).values()) < 1e-14


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "dtype, adapter_dtype", [(FP32, None), (BF16, None), (FP16, None), (BF16, FP32), (FP16, FP32)], ids=str
)
def test_errors_are_not_above_the_eager_path(dtype, adapter_dtype, autocast: bool, device) -> None:
    i = make_inputs(200, 128, 96, 16, dtype, adapter_dtype, device)

    def within(linear):
        def call(*args, **kwargs):
            with (
                torch.autocast(device.type, dtype=dtype if dtype.itemsize == 2 else BF16)
                if autocast
                else contextlib.nullcontext()
            ):
                return linear(*args, **kwargs)

        return call

    ratios = error_ratios(run(within(reference), i), run(within(eager_peft), i), exact(i))
    assert max(ratios.values()) <= 1.02, ratios


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("M", [1, 7])
def test_gradcheck(M: int, dropout_p: float) -> None:
    i = make_inputs(M, 6, 5, 3, FP64).leaves()
    weight, bias = i.weight.requires_grad_(), i.bias.requires_grad_()

    def call(x, w, a, b, c):
        torch.manual_seed(3)  # the same mask at each evaluation
        return reference(x, w, a, b, c, scaling=1.7, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(call, (i.x, weight, i.lora_A, i.lora_B, bias))
