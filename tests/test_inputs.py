"""lora_linear over whatever shape, layout, dtype and mode it meets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedlora import lora_linear
from fusedlora.testing import Inputs, eager_peft, exact, make_inputs, relative_error, relative_errors, run


def call(i: Inputs, **settings) -> torch.Tensor:
    tensors = {"x": i.x, "weight": i.weight, "lora_A": i.lora_A, "lora_B": i.lora_B, "bias": i.bias}
    return lora_linear(**{**tensors, "scaling": i.scaling, **settings})


@given(
    M=st.integers(0, 40), K=st.integers(1, 40), N=st.integers(1, 40), r=st.integers(1, 12),
    bias=st.booleans(), dropout_p=st.sampled_from([0.0, 0.4]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape_is_the_formula(M, K, N, r, bias, dropout_p, seed):
    i = make_inputs(M, K, N, r, torch.float64, bias=bias, seed=seed)
    if dropout_p:
        torch.manual_seed(seed)
        i = with_drawn_mask(i, dropout_p, seed)
    torch.manual_seed(seed)
    for name, error in relative_errors(run(lora_linear, i, dropout_p=dropout_p), exact(i)).items():
        assert error < 1e-12, name


def with_drawn_mask(i: Inputs, dropout_p: float, seed: int) -> Inputs:
    """The inputs with the mask that lora_linear draws after this seed, read off a call of rank K."""
    M, K = i.x.shape
    eye = torch.eye(K, dtype=i.x.dtype, device=i.x.device)
    torch.manual_seed(seed)
    dropped = lora_linear(torch.ones_like(i.x), torch.zeros_like(eye), eye, eye, scaling=1.0, dropout_p=dropout_p)
    values = {"mask": dropped != 0, "dropout_p": dropout_p}
    return Inputs(**{**vars(i), **values})


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_rate_and_scale(dropout_p, device):
    K = 64
    i = with_drawn_mask(make_inputs(4096, K, K, 1, device=device), dropout_p, seed=1)
    assert abs(1.0 - i.mask.double().mean().item() - dropout_p) < 0.01  # 16 standard deviations
    torch.manual_seed(1)
    eye = torch.eye(K, device=device)
    y = lora_linear(torch.ones_like(i.x), eye * 0, eye, eye, scaling=1.0, dropout_p=dropout_p)
    torch.testing.assert_close(y, i.mask / (1.0 - dropout_p))


def test_autocast_leaves_float64_alone(device):
    i = make_inputs(5, 16, 24, 3, torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = run(lora_linear, i)
    assert max(relative_errors(out, exact(i)).values()) < 1e-14


def test_autocast_casts_a_16_bit_adapter_of_another_dtype(device):
    i = make_inputs(64, 64, 64, 4, torch.float32, torch.float16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = run(lora_linear, i)
    assert out["y"].dtype == torch.bfloat16 and out["dA"].dtype == out["dB"].dtype == torch.float16
    assert max(relative_errors(out, exact(i)).values()) < 1e-2


def test_backward_inside_autocast_keeps_the_dtypes_of_forward(device):
    i = make_inputs(63, 64, 48, 4, device=device).leaves()
    inputs = (i.x, i.lora_A, i.lora_B)
    weight = i.weight.clone().requires_grad_()
    y = call(i, weight=weight)
    want = torch.autograd.grad(y, (*inputs, weight), i.dy, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = torch.autograd.grad(y, (*inputs, weight), i.dy)
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_autocast_does_not_hide_an_integer_weight(device):
    i = make_inputs(8, 16, 24, 3, device=device)
    with (
        torch.autocast(device.type, dtype=torch.bfloat16),
        pytest.raises(TypeError, match="weight has dtype torch.int8"),
    ):
        call(i, weight=i.weight.to(torch.int8))


def test_noncontiguous_tensors(device):
    i = make_inputs(10, 16, 24, 3, torch.float64, device=device)
    wide = torch.randn(10, 40, dtype=torch.float64, device=device)
    strided = Inputs(
        **{
            **vars(i),
            "x": wide[:, 5:37:2],
            "weight": i.weight.t().contiguous().t(),
            "lora_A": i.lora_A.t().contiguous().t(),
            "lora_B": i.lora_B.t().contiguous().t(),
        }
    )
    x = strided.x.requires_grad_()
    y = call(strided)
    (dx,) = torch.autograd.grad(y.sum(), x)  # dy of stride 0
    ones = Inputs(**{**vars(strided), "dy": torch.ones_like(i.dy)})
    assert relative_error(y, exact(strided)["y"]) < 1e-14
    assert relative_error(dx, exact(ones)["dx"]) < 1e-14


@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
def test_the_result_may_be_written_to(lead, device):
    i = make_inputs(6, 16, 24, 3, torch.float64, device=device).leaves()
    y = call(i, x=i.x.reshape(*lead, 16))
    y.mul_(2.0)
    y.relu_()
    want = (2.0 * eager_peft(i.x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=i.scaling)).relu()
    (dA,), (want_dA,) = (torch.autograd.grad(out.sum(), i.lora_A) for out in (y, want))
    torch.testing.assert_close(dA, want_dA)


def test_inference_mode(device):
    i = make_inputs(8, 16, 24, 3, device=device).leaves()
    with torch.inference_mode():
        y = call(i)
    assert y.is_inference() and torch.equal(y, call(i).detach())


def test_meta():
    i = make_inputs(8, 16, 24, 3).map(lambda t: t.to("meta"))
    x = i.x.requires_grad_()
    y = call(i, x=x)
    assert y.device.type == "meta" and y.shape == (8, 24)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (8, 16)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias"])
def test_mixed_devices(name, device):
    i = make_inputs(8, 16, 24, 3, device=device)
    with pytest.raises(ValueError, match=rf"(x is on meta|{name} (is )?on meta).*they must be on one device"):
        call(i, **{name: getattr(i, name).to("meta")})
