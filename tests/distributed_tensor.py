"""Cases of tensor parallelism: ColwiseLoRA and RowwiseLoRA against one process with the whole layer."""

import copy

import pytest
import torch
from distributed_worker import (
    CLOSE,
    DEVICE,
    DTYPE,
    MLP,
    PLAN,
    SIZE,
    adapted,
    assert_close,
    assert_same_training,
    batches,
    case,
    every_rank,
    layers,
    mesh,
    one_layer,
    optimizer_of,
    sharded_pair,
    tiny_llama,
    whole,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

from fusedlora import merge_lora
from fusedlora.parallel import ColwiseLoRA, ParallelLoRALinear, RowwiseLoRA

FULL = StateDictOptions(full_state_dict=True)


@case
def training_equals_the_single_process() -> None:
    assert_trains_alike(*sharded_pair(), bias=True)


@case
def lora_bias_beside_a_frozen_bias_and_a_trained_one() -> None:
    for bias in (False, True):
        sharded, single = sharded_pair(lora_bias=True)
        assert_trains_alike(sharded, single, bias)
        assert all(adapter.lora_bias.any() for adapter in layers(single).values())


def assert_trains_alike(sharded: nn.Module, single: nn.Module, bias: bool) -> None:
    for model in (sharded, single):
        for adapter in layers(model).values():
            adapter.bias.requires_grad_(bias)
    steps = [optimizer_of(model) for model in (sharded, single)]
    for x, target in batches():
        losses, grads = [], []
        for model, optimizer in zip((sharded, single), steps):
            optimizer.zero_grad()
            given = x.clone().requires_grad_()
            loss = F.mse_loss(model(given), target)
            loss.backward()
            losses.append(loss.detach())
            grads.append(given.grad)
        assert_close("loss", *losses)
        assert_close("x.grad", *grads)
        for name, parameter in sharded.named_parameters():
            if ".lora_" in name:
                assert parameter.grad.placements == parameter.placements, name
        for optimizer in steps:
            optimizer.step()
        assert_same_training(sharded, single)


@case
def replicas_are_the_same_bits_on_every_rank() -> None:
    sharded, _ = sharded_pair()
    optimizer = optimizer_of(sharded)
    for x, target in batches():
        F.mse_loss(sharded(x), target).backward()
    optimizer.step()
    for name in ("0.up.lora_A", "0.down.lora_B"):
        parameter = sharded.get_parameter(name)
        assert parameter.placements == parameter.grad.placements == (Replicate(),)
        for tensor in (parameter.to_local().detach(), parameter.grad.to_local()):
            first, *others = every_rank(tensor)
            assert all(torch.equal(first, other) for other in others), name


@case
def gradients_accumulate() -> None:
    sharded, single = sharded_pair()
    for model in (sharded, single):
        for x, target in batches(2):
            F.mse_loss(model(x), target).backward()
    assert_same_training(sharded, single)


@case
def llama_trains_as_on_one_process() -> None:
    single = adapted(tiny_llama())
    columns = {
        f"model.layers.*.{name}": ColwiseLoRA() for name in ("self_attn.[qkv]_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    rows = {f"model.layers.*.{name}": RowwiseLoRA() for name in ("self_attn.o_proj", "mlp.down_proj")}
    sharded = parallelize_module(copy.deepcopy(single), mesh(), {**columns, **rows})
    assert all(isinstance(adapter, ParallelLoRALinear) for adapter in layers(sharded).values())
    exact = copy.deepcopy(single).double()
    ids = torch.randint(64, (4, 9), device=DEVICE)
    steps = [optimizer_of(model) for model in (sharded, single, exact)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((sharded, single, exact), steps):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_close("loss", *losses[:2])
    assert_same_training(sharded, single, max(CLOSE, 1e-6), exact)  # transformers forms its rotary tables in float32


@case
def every_layout() -> None:
    """x and y in each placement that they may come and leave in, as plain tensors and as DTensors."""
    single = one_layer()
    x = torch.randn(SIZE, 6, 32, device=DEVICE, dtype=DTYPE)
    dy = torch.randn(SIZE, 6, 48, device=DEVICE, dtype=DTYPE)
    expected_x = x.clone().requires_grad_()
    expected = single(expected_x)
    expected.backward(dy)
    for style in (ColwiseLoRA, RowwiseLoRA):
        for given_as in (Replicate(), Shard(1), Shard(-1)):
            for left_as in (Replicate(), Shard(1), Shard(-1)):
                for local in (True, False):
                    options = {"input_layouts": given_as, "output_layouts": left_as, "use_local_output": local}
                    sharded = parallelize_module(copy.deepcopy(single), mesh(), style(**options))
                    sharded.zero_grad()
                    given = cut(x, given_as).requires_grad_()
                    y = sharded(given)
                    assert isinstance(y, DTensor) is not local
                    if local:
                        y.backward(cut(dy, left_as))
                    else:
                        assert_close("y", whole(y.detach()), expected.detach())
                        y = y.to_local()
                        y.backward(cut(dy, left_as))
                    assert_close("y", y.detach(), cut(expected.detach(), left_as))
                    assert_close("x.grad", given.grad, cut(expected_x.grad, given_as))
                    for name in ("lora_A", "lora_B"):
                        grad = sharded.get_parameter(name).grad
                        assert_close(f"{name}.grad", whole(grad), single.get_parameter(name).grad)


def cut(tensor: Tensor, placement: object) -> Tensor:
    if placement == Replicate():
        return tensor.clone()
    return tensor.chunk(dist.get_world_size(), placement.dim)[dist.get_rank()].clone()


@case
def adapter_off_is_the_plain_linear() -> None:
    single = one_layer()
    x = torch.randn(SIZE, 32, device=DEVICE, dtype=DTYPE)
    expected = F.linear(x, single.weight, single.bias)
    for style in (ColwiseLoRA(output_layouts=Replicate()), RowwiseLoRA(input_layouts=Replicate())):
        sharded = parallelize_module(copy.deepcopy(single), mesh(), style)
        sharded.adapters_enabled = False
        assert_close("y", sharded(x), expected)


@case
def whole_state_dict_there_and_back() -> None:
    sharded, single = sharded_pair()
    state = get_model_state_dict(sharded, options=FULL)
    assert state.keys() == single.state_dict().keys()
    for name, tensor in single.state_dict().items():
        assert torch.equal(state[name], tensor), name
    plain = adapted(MLP())
    plain.load_state_dict(state)
    x = next(batches())[0]
    assert_close("y", plain(x).detach(), single(x).detach(), 0)
    doubled = {name: tensor * 2 for name, tensor in state.items()}
    set_model_state_dict(sharded, dict(doubled), options=FULL)  # which writes into the dict
    for name, tensor in get_model_state_dict(sharded, options=FULL).items():
        assert torch.equal(tensor, doubled[name]), name


@case
def under_fsdp_on_a_mesh_of_two_dimensions() -> None:
    both = init_device_mesh(DEVICE, (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    single = adapted(MLP())
    sharded = parallelize_module(copy.deepcopy(single), both["tp"], PLAN)
    for block in [*sharded, sharded]:
        fully_shard(block, mesh=both["dp"])
    for model in (sharded, single):
        optimizer = optimizer_of(model)
        for x, target in batches():
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
    assert_same_training(sharded, single)


@case
def misfits_are_refused() -> None:
    styles = (ColwiseLoRA(), RowwiseLoRA())
    width = {ColwiseLoRA: "out_features", RowwiseLoRA: "in_features"}
    for style in styles:
        with pytest.raises(TypeError, match="module is a Linear, .*LoRA takes a FusedLoRALinear"):
            parallelize_module(nn.Linear(4, 4), mesh(), style)
        merged = one_layer().merge()
        with pytest.raises(RuntimeError, match="merged into the weight: unmerge"):
            parallelize_module(merged, mesh(), style)
        with pytest.raises(ValueError, match=f"{width[type(style)]} is 33, must be a multiple of the mesh's 2 ranks"):
            parallelize_module(one_layer(33, 33), mesh(), style)
        with pytest.raises(ValueError, match="device_mesh has 2 dimensions"):
            style._apply(one_layer(), init_device_mesh(DEVICE, (1, dist.get_world_size())))
        odd = one_layer()
        odd.magnitude = nn.Parameter(torch.ones(48))
        with pytest.raises(TypeError, match="parameters magnitude, which"):
            parallelize_module(odd, mesh(), style)
        hooked = one_layer()
        hooked.forward = hooked.forward
        with pytest.raises(TypeError, match="forward was replaced"):
            parallelize_module(hooked, mesh(), style)
        sharded = parallelize_module(one_layer(), mesh(), style)
        assert type(style).__name__ in repr(sharded) and "2 ranks" in repr(sharded)
        with pytest.raises(TypeError, match="takes exactly a FusedLoRALinear"):
            parallelize_module(sharded, mesh(), style)
        with pytest.raises(RuntimeError, match="weight is sharded over ranks"):
            merge_lora(nn.Sequential(sharded))
        assert not sharded.merged
    x = torch.ones(3, 32, device=DEVICE, dtype=DTYPE)
    with pytest.raises(ValueError, match="x has 64 features over the mesh, must have in_features 32: is input_layouts"):
        sharded(x)


@case
def compiled_trains_as_eager() -> None:
    compiled, _ = sharded_pair()
    eager = copy.deepcopy(compiled)
    x, target = next(batches())
    results = []
    for model in (torch.compile(compiled, backend="aot_eager", fullgraph=True), eager):
        given = x.clone().requires_grad_()
        y = model(given)
        F.mse_loss(y, target).backward()
        results.append([y.detach(), given.grad])
    assert_close("y", *(y for y, _ in results))
    assert_close("x.grad", *(grad for _, grad in results))
    for name, parameter in eager.named_parameters():
        if parameter.grad is not None:
            assert_close(name, whole(compiled.get_parameter(name).grad), whole(parameter.grad))
    dropping, _ = sharded_pair(lora_dropout=0.4)
    with pytest.raises(Exception, match="RowwiseLoRA cannot draw a rank's own dropout mask"):
        torch.compile(dropping, backend="aot_eager", fullgraph=True)(x)
    torch.compile(dropping, backend="aot_eager")(x)  # that layer eagerly, the rest compiled
