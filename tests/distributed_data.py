"""Cases of data parallelism: DDP and FSDP2 (fully_shard) against one process with the whole batch."""

import copy

import pytest
import torch
from distributed_worker import (
    CLOSE,
    DEVICE,
    DTYPE,
    MLP,
    ON_GPU,
    adapted,
    assert_close,
    assert_same_training,
    assert_trains_alike,
    batches,
    case,
    layers,
    mean_over_ranks,
    optimizer_of,
    part,
    tiny_llama,
    whole,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fusedlora import FusedLoRALinear, merge_lora

FULL = StateDictOptions(full_state_dict=True)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, device_ids=[dist.get_rank()] if ON_GPU else None)


def fsdp(model: nn.Module, blocks: list[nn.Module] | None = None, **options: object) -> nn.Module:
    for block in [*(model if blocks is None else blocks), model]:
        fully_shard(block, reshard_after_forward=True, **options)
    return model


@case
def ddp_trains_as_on_one_process() -> None:
    single = adapted(MLP())
    assert_trains_alike(ddp(copy.deepcopy(single)), single)


@case
def ddp_accumulates_without_sync() -> None:
    single = adapted(MLP())
    parallel = ddp(copy.deepcopy(single))
    (x, target), (x2, target2) = batches(2)
    with parallel.no_sync():
        F.mse_loss(parallel(part(x)), part(target)).backward()
    F.mse_loss(parallel(part(x2)), part(target2)).backward()
    for given, goal in ((x, target), (x2, target2)):
        F.mse_loss(single(given), goal).backward()
    assert_same_training(parallel, single)


@case
def fsdp_trains_as_on_one_process() -> None:
    single = adapted(MLP())
    parallel = fsdp(copy.deepcopy(single))
    for name, parameter in parallel.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.requires_grad == (".lora_" in name), name
    assert_trains_alike(parallel, single)


class MasterCopy:
    """What mixed precision computes, in one process: forward and backward in a bf16 copy, a rank's rows at a time."""

    def __init__(self, single: nn.Module, dtype: torch.dtype | None) -> None:
        self.single, self.dtype = single, dtype

    def backward(self, x: Tensor, target: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        losses = []
        for rows, goal in zip(x.chunk(ranks), target.chunk(ranks)):
            low = copy.deepcopy(self.single)
            low.zero_grad()
            if self.dtype is not None:
                low, rows = low.to(self.dtype), rows.to(self.dtype)
            loss = F.mse_loss(low(rows).float(), goal.float())
            loss.backward()
            losses.append(loss.detach())
            for master, parameter in zip(self.single.parameters(), low.parameters()):
                if parameter.grad is not None:
                    grad = parameter.grad.to(master.dtype) / ranks
                    master.grad = grad if master.grad is None else master.grad + grad
        return torch.stack(losses).mean()


def assert_trains_like_copy(parallel: nn.Module, single: nn.Module, dtype: torch.dtype | None) -> None:
    steps = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (parallel, single)]
    for x, target in batches(dtype=single[0].up.weight.dtype):
        for optimizer in steps:
            optimizer.zero_grad()
        loss = F.mse_loss(parallel(part(x)).float(), part(target).float())
        loss.backward()
        expected = MasterCopy(single, dtype).backward(x, target)
        for optimizer in steps:
            optimizer.step()
        assert_close("loss", mean_over_ranks(loss), expected, 1e-5)
        assert_same_training(parallel, single, 1e-5)


@case
def fsdp_in_mixed_precision() -> None:
    """fp32 parameters that are gathered as bf16, with gradients reduced in fp32."""
    single = adapted(MLP(), torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert_trains_like_copy(fsdp(copy.deepcopy(single), mp_policy=policy), single, torch.bfloat16)


@case
def fsdp_over_parameters_of_two_dtypes() -> None:
    """The default: a bf16 weight and fp32 adapters, gathered as they are."""
    single = adapted(MLP(), torch.bfloat16, adapter_dtype=torch.float32)
    assert_trains_like_copy(fsdp(copy.deepcopy(single)), single, None)


@case
def fsdp_keeps_no_weight_for_backward() -> None:
    """Of what forward saves, the weights have no memory once their block is resharded, and backward refills them."""
    for dtype in (torch.float32, torch.bfloat16):
        keeps_no_weight(dtype)


def keeps_no_weight(dtype: torch.dtype, width: int = 128, hidden: int = 256) -> None:
    model = fsdp(adapted(MLP(width, hidden), torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    during: list[int] = []
    for layer in layers(model).values():
        layer.register_forward_hook(lambda layer, *_: during.append(nbytes(layer.weight)))
        layer.register_full_backward_pre_hook(lambda layer, _: during.append(nbytes(layer.weight)))
    x = torch.randn(2, width, device=DEVICE, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        y = model(x)
    one = width * hidden * dtype.itemsize
    weights = [t for t in saved if t.shape in ((hidden, width), (width, hidden))]
    assert len(weights) == 4 and not any(nbytes(t) for t in weights)
    alive = sum({t.untyped_storage().data_ptr(): nbytes(t) for t in saved}.values())
    assert 0 < alive < one, f"{alive} bytes are saved, a weight has {one}"
    y.sum().backward()
    assert during == [one] * 8
    assert not any(nbytes(t) for t in weights)
    assert x.grad is not None and bool(x.grad.any())


def nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@case
def fsdp_blocks_checkpointed_with_dropout() -> None:
    for reentrant in (False, True):
        single = adapted(MLP(), lora_dropout=0.4)
        torch.manual_seed(3)
        # dropout as each rank draws it: on this rank's rows, from this rank's generator
        x = part(next(batches())[0]).requires_grad_()
        single(x).square().mean().backward()
        for layer in layers(single).values():
            layer.lora_A.grad = mean_over_ranks(layer.lora_A.grad)
            layer.lora_B.grad = mean_over_ranks(layer.lora_B.grad)
        parallel = fsdp(copy.deepcopy(single))
        parallel.zero_grad()
        torch.manual_seed(3)
        y = x.detach().clone().requires_grad_()
        for block in parallel:
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.square().mean().backward()
        for name, parameter in single.named_parameters():
            if parameter.grad is not None:
                assert_close(name, whole(parallel.get_parameter(name).grad), parameter.grad)


@case
def fsdp_whole_state_dict_there_and_back() -> None:
    single = adapted(MLP())
    parallel = fsdp(copy.deepcopy(single))
    state = get_model_state_dict(parallel, options=FULL)
    assert state.keys() == single.state_dict().keys()
    for name, tensor in single.state_dict().items():
        assert torch.equal(state[name], tensor), name
    x = next(batches())[0]
    plain = adapted(MLP())
    plain.load_state_dict(state)
    assert_close("y", plain(x).detach(), single(x).detach(), 0)
    doubled = {name: tensor * 2 for name, tensor in state.items()}
    set_model_state_dict(parallel, dict(doubled), options=FULL)  # which writes into the dict
    for name, tensor in get_model_state_dict(parallel, options=FULL).items():
        assert torch.equal(tensor, doubled[name]), name
    plain.load_state_dict(doubled)
    assert_close("y of the doubled", parallel(x).detach(), plain(x).detach())


@case
def fsdp_layers_are_not_merged() -> None:
    parallel = fsdp(adapted(MLP()))
    x = next(batches())[0]
    y = parallel(x).detach()
    with pytest.raises(ValueError, match="model is sharded by fully_shard"):
        merge_lora(parallel)
    assert not any(layer.merged for layer in layers(parallel).values())
    assert torch.equal(parallel(x), y)
    fully_shard(layer := FusedLoRALinear(32, 48, device=DEVICE, dtype=DTYPE))
    with pytest.raises(RuntimeError, match="weight is sharded over ranks"):
        layer.merge()


@case
def fsdp_llama_trains_as_on_one_process() -> None:
    single = adapted(tiny_llama())
    parallel = copy.deepcopy(single)
    parallel = fsdp(parallel, list(parallel.model.layers))
    exact = copy.deepcopy(single).double()
    ids = torch.randint(64, (4, 9), device=DEVICE)
    steps = [optimizer_of(model) for model in (parallel, single, exact)]
    for _ in range(3):
        losses = []
        for model, optimizer, rows in zip((parallel, single, exact), steps, (part(ids), ids, ids)):
            optimizer.zero_grad()
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_close("loss", mean_over_ranks(losses[0]), losses[1], max(CLOSE, 1e-6))
    assert_same_training(parallel, single, max(CLOSE, 1e-6), exact)  # transformers forms its rotary tables in float32
