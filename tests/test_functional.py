"""lora_linear: gradients of every subset, what is saved and computed for them, dropout, checkpointing, autocast."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fusedlora
from fusedlora import dropout, ops
from fusedlora.testing import eager_peft, exact, make_inputs, relative_error, run

FP32, FP64 = torch.float32, torch.float64
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


@pytest.mark.parametrize(
    "needed", list(itertools.product([False, True], repeat=5)), ids=lambda n: "".join("01"[v] for v in n)
)
def test_every_subset_of_gradients(needed, device) -> None:
    """Each is right, the others are None, and no op is asked for what nobody needs."""
    i = make_inputs(9, 16, 24, 4, FP64, device=device)
    tensors = [getattr(i, name).clone().requires_grad_(need) for name, need in zip(NAMES, needed)]
    expected = exact(i) | {"dW": i.dy.t() @ i.x, "db": i.dy.sum(0)}
    asked = []
    plain = ops.backward

    def watch(*args):
        asked.append(args[-4:-1])
        return plain(*args)

    with mock.patch.object(ops, "backward", watch):
        y = fusedlora.lora_linear(*tensors, scaling=i.scaling)
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(i.dy)
    for tensor, need, gradient in zip(tensors, needed, ("dx", "dW", "dA", "dB", "db")):
        assert (tensor.grad is not None) == need
        if need:
            assert relative_error(tensor.grad, expected[gradient]) < 1e-13, gradient
    skinny = (needed[0], needed[2], needed[3])
    assert asked == ([skinny] if any(skinny) else [])


@pytest.mark.parametrize("needed, saved", [("x", 3), ("lora_A", 3), ("lora_B", 3), ("weight", 3), ("bias", 2)])
def test_saves_only_what_its_gradients_read(needed: str, saved: int) -> None:
    """lora_A and lora_B, and of x, weight and S the one that is read."""
    i = make_inputs(9, 16, 24, 4)
    getattr(i, needed).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fusedlora.lora_linear(*(getattr(i, name) for name in NAMES), scaling=1.0)
    assert len(kept) == saved


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 5)], ids=str)
def test_leading_dimensions(lead, device) -> None:
    i = make_inputs(1, 16, 24, 4, device=device)
    x = torch.randn(*lead, 16, device=device, requires_grad=True)
    y = fusedlora.lora_linear(x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=2.0)
    assert y.shape == (*lead, 24)
    torch.testing.assert_close(
        y, eager_peft(x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=2.0), rtol=1e-4, atol=1e-4
    )
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_without_grad_saves_no_s(device) -> None:
    i = make_inputs(9, 16, 24, 4, device=device)
    plain, flags = ops.forward, []
    with mock.patch.object(ops, "forward", lambda *args: flags.append(args[-2]) or plain(*args)):
        fusedlora.lora_linear(*(getattr(i, name) for name in NAMES), scaling=1.0)
        i.lora_B.requires_grad_()
        fusedlora.lora_linear(*(getattr(i, name) for name in NAMES), scaling=1.0)
        with torch.no_grad():
            fusedlora.lora_linear(*(getattr(i, name) for name in NAMES), scaling=1.0)
    assert flags == [False, True, False]


def test_dropout_uses_one_mask_for_all(device) -> None:
    """y and the gradients are those of the very mask drawn; a seed gives it again."""
    p = 0.3
    i = make_inputs(400, 64, 24, 4, FP64, device=device)
    masks = []
    draw = dropout.draw
    with mock.patch.object(dropout, "draw", lambda *args: masks.append(draw(*args)) or masks[-1]):
        torch.manual_seed(11)
        got = run(fusedlora.lora_linear, i, dropout_p=p)
        torch.manual_seed(11)
        again = run(fusedlora.lora_linear, i, dropout_p=p)
        other = run(fusedlora.lora_linear, i, dropout_p=p)
    mask = dropout.as_mask(masks[0], 400, 64, p, i.x.device)
    want = run(eager_peft, i, dropout_p=p, mask=mask)
    assert all(relative_error(got[name], want[name]) < 1e-13 for name in want)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert not torch.equal(got["y"], other["y"])
    # 25,600 draws: four standard deviations of the rate are 0.0115
    assert abs(mask.double().mean().item() - (1 - p)) < 0.0115


def test_scaling_in_a_tensor(device) -> None:
    """As the number it holds, read when the call runs."""
    i = make_inputs(9, 16, 24, 4, FP64, device=device)
    scaling = torch.tensor(0.5, device=device)
    for value in (0.5, -3.0):
        scaling.fill_(value)
        got, want = run(fusedlora.lora_linear, replace(i, scaling=scaling)), exact(replace(i, scaling=value))
        assert all(relative_error(got[name], want[name]) < 1e-13 for name in want)


def random_state(device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


OFF = {
    "none": {},
    "p=0": {"dropout_p": 0.0, "training": True},
    "eval": {"dropout_p": 0.5, "training": False},
}


@pytest.mark.parametrize("settings", OFF.values(), ids=OFF)
def test_dropout_that_is_off_costs_nothing(settings, device) -> None:
    """No mask is drawn, none reaches the op, none is saved, and the generator stays where it was."""
    i = make_inputs(9, 16, 24, 4, device=device).leaves()
    state, plain, masks, kept = random_state(device), ops.forward, [], []
    with (
        mock.patch.object(dropout, "draw", side_effect=AssertionError("drawn")),
        mock.patch.object(ops, "forward", lambda *args: masks.append(args[5]) or plain(*args)),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t),
    ):
        y = fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0, **settings)
    assert masks == [None] and torch.bool not in kept
    assert torch.equal(state, random_state(device))
    want = eager_peft(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, dropout_p: float, device) -> None:
    i = make_inputs(20, 16, 24, 4, FP64, device=device)

    def checkpointed(*args, **kwargs):
        return checkpoint(lambda *a: fusedlora.lora_linear(*a, **kwargs), *args, use_reentrant=reentrant)

    def through_backward(linear):
        leaves = i.leaves()
        torch.manual_seed(5)
        y = linear(leaves.x, i.weight, leaves.lora_A, leaves.lora_B, i.bias, scaling=1.5, dropout_p=dropout_p)
        y.backward(i.dy)
        return y, leaves.x.grad, leaves.lora_A.grad, leaves.lora_B.grad

    for got, want in zip(through_backward(checkpointed), through_backward(fusedlora.lora_linear)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("adapter_dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_autocast_gives_the_eager_path_s_dtypes(dtype, adapter_dtype, device) -> None:
    """bf16 out, gradients in their tensors' dtypes; the weight, when it needs one, too."""
    i = make_inputs(200, 128, 96, 16, dtype, adapter_dtype, device).leaves()
    i = replace(i, weight=i.weight.clone().requires_grad_(), bias=i.bias.clone().requires_grad_())
    tensors = [getattr(i, name) for name in NAMES]

    def under_autocast(linear):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = linear(*tensors, scaling=i.scaling)
        return y, *torch.autograd.grad(y, tensors, i.dy.to(y.dtype))

    ours, theirs = under_autocast(fusedlora.lora_linear), under_autocast(eager_peft)
    want = exact(i.map(torch.detach))
    want = [want["y"], want["dx"], i.dy.double().t() @ i.x.double(), want["dA"], want["dB"], i.dy.double().sum(0)]
    assert ours[0].dtype == torch.bfloat16
    for name, got, eager, right in zip(("y", *NAMES), ours, theirs, want, strict=True):
        assert got.dtype == eager.dtype, name
        assert relative_error(got, right) < 2.0**-7, name  # two roundings to bf16
