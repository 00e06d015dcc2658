"""Merging a FusedLoRALinear, taking it back, and the state_dict of either."""

import pytest
import torch
from torch import nn

from fusedlora import FusedLoRALinear
from fusedlora.testing import relative_error

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KEEP = ["cpu", "device", False]


def trained(device="cpu", dtype=FP32, *, bias=True, **settings) -> FusedLoRALinear:
    """A layer whose adapter is not zero."""
    layer = FusedLoRALinear(16, 24, bias, device, dtype, r=4, **settings)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


@pytest.mark.parametrize("keep_base", KEEP, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_merged_weight_is_the_exact_one_rounded_once(dtype, keep_base, device) -> None:
    layer = trained(device, dtype, lora_alpha=3)
    exact = layer.weight.double() + 0.75 * layer.lora_B.double() @ layer.lora_A.double()
    assert layer.merge(keep_base) is layer and layer.merged
    assert layer.weight.dtype == dtype and not layer.weight.requires_grad
    # half an ulp rounds to a 16-bit dtype; where the sum is no wider than the dtype it rounds on the way too
    allowed = (0.5 if dtype.itemsize == 2 else 2.0) * torch.finfo(dtype).eps
    assert relative_error(layer.weight, exact) < allowed
    x = torch.randn(5, 16, device=device, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("keep_base", ["cpu", "device"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_unmerge_gives_back_every_bit(dtype, keep_base, device) -> None:
    layer = trained(device, dtype)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[0, 1] = -0.0, torch.finfo(dtype).tiny
    weight, before = layer.weight, layer.weight.detach().clone()
    x = torch.randn(5, 16, device=device, dtype=dtype)
    y = layer(x)
    for _ in range(3):
        layer.merge(keep_base)
        assert layer.unmerge() is layer and not layer.merged
    assert layer.weight is weight  # held here, so it is the same Parameter
    assert torch.equal(layer.weight, before) and torch.equal(layer.weight.signbit(), before.signbit())
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("keep_base", ["cpu", "device"])
def test_unmerge_where_nobody_else_holds_the_weight(keep_base, device) -> None:
    layer = trained(device)
    before = layer.weight.detach().clone()
    layer.merge(keep_base).unmerge()
    assert torch.equal(layer.weight, before) and layer.weight.device == before.device
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad


def test_unmerge_raises_where_the_base_is_gone() -> None:
    layer = trained().merge(keep_base=False)
    assert not layer.can_unmerge
    with pytest.raises(RuntimeError, match=r"the base weight was not kept: it was merged with keep_base=False"):
        layer.unmerge()
    assert layer.merged


@pytest.mark.parametrize("keep_base", KEEP, ids=str)
def test_a_shared_weight_is_not_written_to(keep_base, device) -> None:
    linear = nn.Linear(16, 24, device=device)
    before = linear.weight.detach().clone()
    layer = FusedLoRALinear.from_linear(linear, r=4)
    with torch.no_grad():
        layer.lora_B.normal_()
    layer.merge(keep_base)
    assert torch.equal(linear.weight, before) and layer.weight is not linear.weight
    assert layer.weight.untyped_storage().data_ptr() != linear.weight.untyped_storage().data_ptr()
    if keep_base:
        layer.unmerge()
        assert layer.weight is linear.weight  # tied again


def test_twice_is_once() -> None:
    layer = trained()
    before = layer.weight.detach().clone()
    merged = layer.merge().weight
    assert layer.merge(keep_base=False).weight is merged and layer.can_unmerge
    layer.unmerge().unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("keep_base", [True, None, "disk"], ids=str)
def test_keep_base_is_one_of_three(keep_base) -> None:
    with pytest.raises(ValueError, match='keep_base is .*, must be "cpu", "device" or False'):
        trained().merge(keep_base)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_refuses_what_is_not_finite(name: str, value: float) -> None:
    layer = trained()
    with torch.no_grad():
        getattr(layer, name)[1, 1] = value
    weight = layer.weight
    with pytest.raises(ValueError, match="the merged weight is not finite in torch.float32: not merged"):
        layer.merge()
    assert not layer.merged and layer.weight is weight


def test_refuses_what_overflows_in_the_weights_dtype() -> None:
    layer = trained(dtype=FP16)  # its adapter is float32
    with torch.no_grad():
        layer.lora_B.fill_(1e5)
        layer.lora_A.fill_(1.0)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        layer.merge()


def test_merged_weight_alone_changes_nothing() -> None:
    layer = trained()
    before = layer.weight.detach().clone()
    merged = layer.merged_weight()
    assert not layer.merged and torch.equal(layer.weight, before)
    assert torch.equal(layer.merge().weight, merged)
    with pytest.raises(RuntimeError, match="the adapter is merged already"):
        layer.merged_weight()


def test_merging_under_autocast_and_in_inference_mode() -> None:
    layer = trained()
    want = layer.merged_weight()
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        layer.merge()
    assert torch.equal(layer.weight, want) and not layer.weight.is_inference()


@pytest.mark.parametrize("keep_base", ["cpu", "device"])
def test_a_merged_layer_cast_and_taken_back(keep_base) -> None:
    layer = trained()
    before = layer.weight.detach().clone()
    layer.merge(keep_base).double().unmerge()
    assert layer.weight.dtype == FP64 and torch.equal(layer.weight, before.double())
    assert isinstance(layer.weight, nn.Parameter)


def test_a_trainable_weight_stays_trainable() -> None:
    layer = trained()
    layer.weight.requires_grad_()
    assert layer.merge().weight.requires_grad and layer.unmerge().weight.requires_grad


def test_no_kept_weight_is_registered() -> None:
    layer = trained().merge()
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "lora_A", "lora_B"}
    assert not list(layer.buffers()) and not list(layer.children())


@pytest.mark.parametrize("keep_base", ["cpu", "device"])
def test_state_dict_is_the_same_merged_or_not(keep_base) -> None:
    layer = trained()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert list(before) == ["weight", "bias", "lora_A", "lora_B"]
    after = layer.merge(keep_base).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    other = FusedLoRALinear(16, 24, r=4)
    other.load_state_dict(after)
    x = torch.randn(5, 16)
    torch.testing.assert_close(other(x), layer(x))


def test_state_dict_without_the_base_is_a_plain_linears() -> None:
    layer = trained().merge(keep_base=False)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    x = torch.randn(5, 16)
    plain, fresh = nn.Linear(16, 24), FusedLoRALinear(16, 24, r=4)
    plain.load_state_dict(state)
    fresh.load_state_dict(state)
    layer.load_state_dict(state)
    assert torch.equal(plain(x), layer(x)) and torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_loads_a_plain_linears_state_dict(bias: bool) -> None:
    linear, layer = nn.Linear(16, 24, bias), trained(bias=bias)
    adapter = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.lora_A, adapter[0]) and torch.equal(layer.lora_B, adapter[1])
    model = nn.Sequential(layer)
    model.load_state_dict(nn.Sequential(linear).state_dict())


@pytest.mark.parametrize("missing", ["lora_A", "lora_B", "weight", "bias"])
def test_half_a_state_dict_is_refused(missing: str) -> None:
    state = trained().state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        trained().load_state_dict(state)


@pytest.mark.parametrize("keep_base, remedy", [("cpu", r"unmerge\(\) first"), (False, "only a plain linear's loads")])
def test_a_merged_layer_takes_no_adapter(keep_base, remedy: str) -> None:
    state = trained().state_dict()
    layer = trained().merge(keep_base)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"the layer is merged: .*{remedy}"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="0 is merged"):
        nn.Sequential(layer).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(layer.weight, before)
