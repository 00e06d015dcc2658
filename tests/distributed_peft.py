"""Cases of PEFT's layers through fusedlora: DDP and FSDP2 against PEFT's own layers in one process."""

import copy
from collections.abc import Callable

import torch
from distributed_worker import (
    DEVICE,
    DTYPE,
    MLP,
    ON_GPU,
    assert_trains_alike,
    batches,
    case,
    part,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fusedlora.integrations import peft as backend

BACKEND = "triton" if ON_GPU else "reference"


def adapted(**options: object) -> nn.Module:
    config = LoraConfig(target_modules=["up", "down"], r=4, **options)
    model = get_peft_model(MLP().to(DEVICE, DTYPE), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def trained(shard: Callable[[nn.Module], nn.Module], **options: object) -> nn.Module:
    """Fused layers after they have trained as stock ones do."""
    single = adapted(**options)
    fused = backend.fuse(copy.deepcopy(single))
    assert_trains_alike(shard(fused), single)
    return fused


def blocks(model: nn.Module, **options: object) -> nn.Module:
    for block in [*model.base_model.model, model]:
        fully_shard(block, **options)
    return model


def inner(name: str) -> Callable[[nn.Module], nn.Module]:
    """fully_shard of one module inside of every LoRA layer."""

    def shard(model: nn.Module) -> nn.Module:
        for layer in [module for module in model.modules() if isinstance(module, backend.Linear)]:
            fully_shard(layer.base_layer if name == "base_layer" else getattr(layer, name)["default"])
        fully_shard(model)
        return model

    return shard


def assert_all(model: nn.Module, backend_name: str | None, reason: str = "") -> None:
    for layer in backend.report(model).layers:
        assert layer.backend == backend_name, layer
        assert layer.why_not is None if backend_name else reason in layer.why_not, layer


@case
def ddp_trains_as_stock_on_one_process() -> None:
    rank = torch.distributed.get_rank()
    assert_all(trained(lambda m: DistributedDataParallel(m, [rank] if ON_GPU else None)), BACKEND)


@case
def fsdp_blocks_train_as_stock_on_one_process() -> None:
    assert_all(trained(blocks), BACKEND)


@case
def fsdp_blocks_of_dora_train_as_stock() -> None:
    assert_all(trained(blocks, use_dora=True), BACKEND)


@case
def fsdp_of_whole_layers_is_fused() -> None:
    def shard(model: nn.Module) -> nn.Module:
        for layer in [module for module in model.modules() if isinstance(module, backend.Linear)]:
            fully_shard(layer)
        fully_shard(model)
        return model

    assert_all(trained(shard), BACKEND)


@case
def fsdp_inside_a_layer_stays_stock() -> None:
    for name in ("base_layer", "lora_A", "lora_B"):
        assert_all(trained(inner(name)), None, f"{name} is a")


@case
def fsdp_in_mixed_precision() -> None:
    model = backend.fuse(adapted())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks(model, mp_policy=policy)
    ((x, target),) = batches(1)
    before = backend.calls["fused"]
    y = model(part(x))
    assert y.dtype is torch.bfloat16 and backend.calls["fused"] - before == 4
    F.mse_loss(y, part(target).to(y.dtype)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.dtype is DTYPE for p in trained.values())
    assert_all(model, BACKEND)
