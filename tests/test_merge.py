"""Merging the adapter into the weight and taking it out again."""

import copy
import gc
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusedlora import FusedLoRALinear, merge_lora
from fusedlora.testing import relative_error

K, N, R = 48, 32, 4
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KEPT = ["cpu", "device"]


def trained(device, dtype=FP32, **options) -> FusedLoRALinear:
    layer = FusedLoRALinear(K, N, device=device, dtype=dtype, **({"r": R, "lora_alpha": 6} | options))
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


def rows(device, dtype=FP32, M: int = 7) -> torch.Tensor:
    return torch.randn(M, K, device=device, dtype=dtype)


def exact_weight(layer: FusedLoRALinear) -> torch.Tensor:
    return (layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).detach()


def snapshot(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


# the merged weight


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapter_dtype", ["wide", "weight's"])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=str)
def test_merged_weight_is_exact_but_for_one_rounding(dtype, adapter_dtype: str, autocast: bool, device) -> None:
    layer = trained(device, dtype, adapter_dtype=None if adapter_dtype == "wide" else dtype)
    expected = exact_weight(layer)
    with torch.autocast(device.type, BF16, enabled=autocast):
        layer.merge()
    assert layer.weight.dtype is dtype and layer.weight.device.type == device.type
    rounding = relative_error(expected.to(dtype), expected)
    assert relative_error(layer.weight, expected) <= max(
        1.01 * rounding, 2 * torch.finfo(dtype).eps * (dtype.itemsize > 2)
    )


def test_accumulates_in_float32(device) -> None:
    """1 + 2⁻⁸ lies halfway between two bfloat16; what tips it over is lost where the product is rounded first."""
    layer = FusedLoRALinear(1, 1, False, device, BF16, r=2, lora_alpha=2, adapter_dtype=BF16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.lora_A.copy_(torch.tensor([[2.0**-8], [2.0**-17]]))
        layer.lora_B.fill_(1.0)
    assert layer.merge().weight.item() == 1.0 + 2.0**-7


@pytest.mark.parametrize("keep_base", ["cpu", "device", False])
def test_forward_is_one_linear(keep_base, device) -> None:
    layer = trained(device, FP64, lora_dropout=0.5).eval()
    x = rows(device, FP64).requires_grad_()
    expected = layer(x)
    assert layer.merge(keep_base) is layer and layer.merged and not layer.adapter_in_use
    y = layer.train()(x)
    assert relative_error(y, expected) < 1e-13
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert relative_error(x.grad, layer.weight.sum(0).expand_as(x)) < 1e-13
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_training_step_then_merge(dtype, device) -> None:
    layer = trained(device, dtype)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    before = snapshot(layer)
    layer(rows(device, dtype)).float().square().mean().backward()
    optimizer.step()
    after = snapshot(layer)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"lora_A", "lora_B"}
    x = rows(device, dtype, 63)
    with torch.no_grad():
        expected = layer(x)
        assert relative_error(layer.merge()(x), expected) < 4 * torch.finfo(dtype).eps
        assert torch.equal(layer.unmerge()(x), expected)
    assert same(snapshot(layer), after)


# what is not written to


@pytest.mark.parametrize("keep_base", ["cpu", "device", False])
def test_a_shared_weight_is_never_written_to(keep_base, device) -> None:
    linear = nn.Linear(K, N, device=device)
    base, bits = linear.weight, linear.weight.detach().clone()
    first, second = (FusedLoRALinear.from_linear(linear, r=R) for _ in range(2))
    nn.init.ones_(first.lora_B)
    version = base._version
    first.merge(keep_base)
    assert first.weight is not base and first.weight.data_ptr() != base.data_ptr()
    assert linear.weight is base and second.weight is base
    assert torch.equal(base, bits) and base._version == version
    if keep_base:
        assert first.unmerge().weight is base, "shared again"


@pytest.mark.parametrize("spoilt", ["nan in lora_A", "inf in lora_B", "nan in weight", "overflow"])
@pytest.mark.parametrize("keep_base", ["cpu", "device", False])
def test_refuses_what_is_not_finite(spoilt: str, keep_base, device) -> None:
    layer = trained(device, FP16)
    with torch.no_grad():
        if spoilt == "overflow":  # finite in float32
            layer.lora_A[0, 0], layer.lora_B[0, 0] = 1e4, 1e4
        else:
            value, name = spoilt.split(" in ")
            getattr(layer, name)[1, 2] = float(value)
    weight, before, state = layer.weight, {n: p.clone() for n, p in layer.named_parameters()}, set(layer.__dict__)
    with pytest.raises(ValueError, match="not finite in torch.float16: not merged"):
        layer.merge(keep_base)
    assert layer.weight is weight and not layer.merged and layer.adapter_in_use and layer.can_unmerge
    assert set(layer.__dict__) == state and layer._base is None
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.view(-1).nan_to_num(7.0), before[name].view(-1).nan_to_num(7.0))


@pytest.mark.parametrize("keep_base", [True, None, 0, "gpu"])
def test_bad_keep_base(keep_base, device) -> None:
    layer = trained(device)
    with pytest.raises(ValueError, match="keep_base is"):
        layer.merge(keep_base)
    assert not layer.merged


def test_nothing_to_merge_on_meta() -> None:
    with pytest.raises(RuntimeError, match="meta device"):
        trained("meta").merge()


def test_disabled_and_merged_is_an_error(device) -> None:
    layer = trained(device).merge()
    layer.adapters_enabled = False
    with pytest.raises(RuntimeError, match=r"adapters_enabled is False.*unmerge\(\) first"):
        layer(rows(device))


# unmerging


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("held", [True, False], ids=["held", "dropped"])
@pytest.mark.parametrize("keep_base", KEPT)
def test_unmerge_gives_the_exact_bits(keep_base: str, held: bool, dtype, device) -> None:
    layer = trained(device, dtype)
    before = snapshot(layer)
    original = layer.weight if held else None
    layer.merge(keep_base)
    assert not torch.equal(layer.weight.cpu(), before["weight"].cpu())
    assert layer.unmerge() is layer and not layer.merged and layer.adapter_in_use
    assert same(snapshot(layer), before)
    assert layer.weight.device.type == device.type and not layer.weight.requires_grad
    assert not held or layer.weight is original
    assert layer.merge(keep_base).unmerge().merged is False, "as often as one likes"


def test_unmerge_needs_the_base(device) -> None:
    layer = trained(device).merge(keep_base=False)
    merged = layer.weight
    assert not layer.can_unmerge
    with pytest.raises(RuntimeError, match="not kept"):
        layer.unmerge()
    assert layer.merged and layer.weight is merged


def test_twice_is_once(device) -> None:
    layer = trained(device)
    base = layer.weight
    assert layer.unmerge().weight is base
    merged = layer.merge().weight
    assert layer.merge().weight is merged
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merged_weight()
    assert layer.unmerge().unmerge().weight is base


def test_a_trainable_weight_stays_trainable(device) -> None:
    layer = trained(device)
    layer.weight.requires_grad_()
    assert layer.merge().weight.requires_grad and layer.weight.is_leaf
    assert layer.unmerge().weight.requires_grad


def test_merged_in_inference_mode_trained_afterwards(device) -> None:
    layer = trained(device)
    x = rows(device)
    with torch.inference_mode():
        layer.merge("device")
    x.requires_grad_()
    layer(x).sum().backward()
    with torch.inference_mode():
        layer.unmerge()
    layer(x).sum().backward()
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()


@pytest.mark.parametrize("keep_base", [*KEPT, False])
@pytest.mark.parametrize("computed", ["weight", "bias"])
def test_a_computed_weight_or_bias_is_refused_and_nothing_half_merged(computed: str, keep_base, device) -> None:
    layer = trained(device, lora_bias=True)
    nn.utils.parametrize.register_parametrization(layer, computed, nn.Tanh())
    x = rows(device)
    expected = layer(x)
    for merge, text in (
        (layer.merge, f"^{computed} is no Parameter: something computes it"),
        (partial(merge_lora, nn.ModuleDict({"up": layer})), f"^up: {computed} is no Parameter.*nothing was merged"),
    ):
        with pytest.raises(RuntimeError, match=text):
            merge(keep_base=keep_base)
        assert not layer.merged and layer._base is layer._base_bias is None and torch.equal(layer(x), expected)


# merged layers copied, moved, stored


@pytest.mark.parametrize("keep_base", KEPT)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_unmerge_by_themselves(copied, keep_base: str, device) -> None:
    layer = trained(device)
    base, before = layer.weight, snapshot(layer)
    other = copied(layer.merge(keep_base))
    assert other.merged and torch.equal(other.weight, layer.weight)
    assert other.unmerge().weight is not base and same(snapshot(other), before)
    assert layer.merged and layer.unmerge().weight is base


@pytest.mark.parametrize("keep_base", KEPT)
def test_casts_while_merged(keep_base: str, device) -> None:
    layer = trained(device)
    weight = layer.weight.detach().clone()
    layer.merge(keep_base).bfloat16()
    assert layer.state_dict()["weight"].dtype is layer.weight.dtype is BF16
    layer.unmerge()
    assert layer.weight.dtype is BF16 and torch.equal(layer.weight, weight.bfloat16())
    layer(rows(device, BF16)).sum().backward()


def test_a_base_on_the_device_follows_one_on_the_host_waits(device) -> None:
    for keep_base in KEPT:
        layer = trained(device)
        weight = layer.weight.detach().clone()
        layer.merge(keep_base).bfloat16().float().unmerge()
        assert torch.equal(layer.weight, weight if keep_base == "cpu" else weight.bfloat16().float())


@pytest.mark.parametrize("keep_base", KEPT)
def test_moves_while_merged(keep_base: str, device) -> None:
    layer = trained(device)
    before = snapshot(layer)
    layer.merge(keep_base).cpu().unmerge()
    assert layer.weight.device.type == "cpu" and same(snapshot(layer), before)
    layer.merge(keep_base).to(device).unmerge()
    assert layer.weight.device.type == device.type and same(snapshot(layer), before)


@pytest.mark.parametrize("keep_base", KEPT)
def test_state_dict_is_that_of_the_unmerged_layer(keep_base: str, device) -> None:
    layer = trained(device)
    before = snapshot(layer)
    assert same(layer.merge(keep_base).state_dict(), before)
    assert [v.requires_grad for v in layer.state_dict(keep_vars=True).values()] == [False, False, True, True]
    with pytest.raises(RuntimeError, match=r"the layer is merged: unmerge\(\) first"):
        layer.load_state_dict(before)
    with pytest.raises(RuntimeError, match=r"0 is merged: unmerge\(\) first"):
        nn.Sequential(layer).load_state_dict({"0.weight": before["weight"], "0.bias": before["bias"]})
    assert same(layer.unmerge().state_dict(), before)


def test_state_dict_without_the_base_is_a_plain_linears(device) -> None:
    layer = trained(device, FP64)
    x = rows(device, FP64)
    expected = layer(x)
    state = layer.merge(keep_base=False).state_dict()
    linear = nn.Linear(K, N, device=device, dtype=FP64)
    fresh = FusedLoRALinear(K, N, device=device, dtype=FP64, r=R)
    for module in (linear, fresh):
        module.load_state_dict(state)
        assert relative_error(module(x), expected) < 1e-13
    with pytest.raises(RuntimeError, match="only a plain linear's loads"):
        layer.load_state_dict(trained(device, FP64).state_dict())
    plain = nn.Linear(K, N, device=device, dtype=FP64)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer(x), plain(x))


@pytest.mark.gpu
@pytest.mark.parametrize("keep_base, weights", [("cpu", 1), ("device", 2), (False, 1)])
def test_memory_of_a_merged_layer(keep_base, weights: int) -> None:
    side = 1024
    FusedLoRALinear(side, side, False, "cuda", FP32, r=1).merge()  # cuBLAS takes its workspace
    gc.collect()  # what other tests left
    before = torch.cuda.memory_allocated()
    layer = FusedLoRALinear(side, side, False, "cuda", FP32, r=1).merge(keep_base)
    taken = torch.cuda.memory_allocated() - before - 2 * side * 4
    assert layer.can_unmerge == bool(keep_base)
    assert abs(taken - weights * side * side * 4) < 64 * 1024


def test_no_tf32_in_merging(device) -> None:
    """float32 accumulation holds at the matmul precision that lets GPUs round operands to tf32."""
    layer = trained(device, FP32)
    expected = exact_weight(layer)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        layer.merge()
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(layer.weight, expected) <= 2 * torch.finfo(FP32).eps
