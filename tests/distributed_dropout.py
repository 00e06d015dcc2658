"""Cases of dropout in sharded layers: which ranks share a mask, and that it comes again where it must."""

import copy

import pytest
import torch
from distributed_worker import (
    DEVICE,
    DTYPE,
    MLP,
    SIZE,
    adapted,
    assert_close,
    assert_same_training,
    batches,
    case,
    every_rank,
    mesh,
    one_layer,
    sharded_pair,
    whole,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from fusedlora import FusedLoRALinear
from fusedlora.parallel import ColwiseLoRA, RowwiseLoRA


@case
def columns_share_a_mask_and_it_is_the_single_process_one() -> None:
    single = one_layer(lora_dropout=0.4)
    sharded = parallelize_module(copy.deepcopy(single), mesh(), ColwiseLoRA(output_layouts=Replicate()))
    results = []
    for model in (sharded, single):
        torch.manual_seed(3)
        x = torch.ones(SIZE, 32, device=DEVICE, dtype=DTYPE, requires_grad=True)
        y = [model(x), model(x)]
        assert not torch.equal(*y), "two calls took one mask"
        sum(y).square().sum().backward()
        results.append([*y, x.grad, *(whole(model.get_parameter(f"lora_{name}").grad) for name in "AB")])
    for name, found, expected in zip(("y", "second y", "dx", "dA", "dB"), *results):
        assert_close(name, found.detach(), expected.detach())


def rows_mask(sharded: FusedLoRALinear, x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """y, and the mask [M, K] over all ranks that a call of a RowwiseLoRA layer took, read off its dx."""
    with torch.no_grad():
        kept = [t.clone() for t in (sharded.weight, sharded.lora_A, sharded.lora_B)]
        state = generator_state()
        for tensor, value in zip((sharded.weight, sharded.lora_A, sharded.lora_B), (0.0, 1.0, 1.0)):
            tensor.fill_(value)
    probe = x.clone().requires_grad_()
    sharded(probe).sum().backward()
    sharded.zero_grad()
    with torch.no_grad():
        for tensor, value in zip((sharded.weight, sharded.lora_A, sharded.lora_B), kept):
            tensor.copy_(value)
    set_generator_state(state)
    mask = torch.cat(every_rank((probe.grad != 0).to(torch.uint8)), dim=-1).bool()
    return sharded(x), mask


def generator_state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


def set_generator_state(state: Tensor) -> None:
    (torch.cuda.set_rng_state if DEVICE == "cuda" else torch.set_rng_state)(state)


@case
def rows_have_masks_of_their_own() -> None:
    p, M, K = 0.4, 256, 64
    sharded = parallelize_module(one_layer(K, 32, lora_dropout=p, bias=False), mesh(), RowwiseLoRA())
    x = torch.randn(M, K // dist.get_world_size(), device=DEVICE, dtype=DTYPE)
    torch.manual_seed(3)
    y, mask = rows_mask(sharded, x, p)
    _, second = rows_mask(sharded, x, p)
    torch.manual_seed(3)
    _, again = rows_mask(sharded, x, p)
    assert torch.equal(mask, again)
    # any two parts, also one shifted along a row or by some rows, agree where independent ones do: p² + (1-p)²
    parts = [*mask.chunk(dist.get_world_size(), -1), *second.chunk(dist.get_world_size(), -1)]
    for i, one in enumerate(parts):
        assert abs(one.double().mean() - (1 - p)) < 0.02
        for other in parts[:i]:
            for shift in range(-4, 5):
                for dim in (0, 1):
                    agreement = (one == other.roll(shift, dim)).double().mean()
                    assert abs(agreement - (p * p + (1 - p) ** 2)) < 0.03, (shift, dim)
    full = torch.cat(every_rank(x), -1)
    W, A, B = (whole(t.detach()) for t in (sharded.weight, sharded.lora_A, sharded.lora_B))
    expected = full @ W.T + sharded.scaling * (full * mask / (1 - p)) @ A.T @ B.T
    assert_close("y", y.detach(), expected)
    first, *others = every_rank(generator_state().to(DEVICE))
    assert all(torch.equal(first, other) for other in others), "the ranks' generators went apart"


@case
def checkpointed_blocks_drop_the_same_again() -> None:
    for reentrant in (False, True):
        sharded, _ = sharded_pair(lora_dropout=0.4)
        reference = copy.deepcopy(sharded)
        for model, run in ((sharded, checkpoint), (reference, lambda block, x, **_: block(x))):
            torch.manual_seed(3)
            x = next(batches())[0].requires_grad_()
            for block in model:
                x = run(block, x, use_reentrant=reentrant)
            x.square().sum().backward()
        assert_same_training(sharded, gathered(reference))


def gathered(model: nn.Module) -> nn.Module:
    """A plain copy of a sharded model, with its gradients."""
    plain = adapted(MLP())
    for name, parameter in model.named_parameters():
        target = plain.get_parameter(name)
        target.data.copy_(whole(parameter.detach()))
        target.grad = None if parameter.grad is None else whole(parameter.grad)
    return plain


@case
def generators_apart_are_refused() -> None:
    sharded = parallelize_module(one_layer(lora_dropout=0.4), mesh(), ColwiseLoRA())
    x = torch.ones(SIZE, 32, device=DEVICE, dtype=DTYPE)
    torch.manual_seed(dist.get_rank())
    with pytest.raises(RuntimeError, match="generators differ between the ranks"):
        sharded(x)
    sharded.eval()
    sharded(x)
    sharded.train()
    torch.manual_seed(0)
    sharded(x)
