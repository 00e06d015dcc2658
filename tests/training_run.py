"""Twenty steps of a two-block Llama in peft, in fusedlora, and in fusedlora on ranks: see test_training_runs.py.

`python -P training_run.py RANK WORLD_SIZE FOLDER` is one rank of a run under FSDP2; rank 0 writes the losses to
FOLDER/losses.json.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from fusedlora import FusedLoRALinear, apply_lora

STEPS, VOCAB, R, ALPHA = 20, 128, 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[Tensor], Tensor]


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def llama(device: str) -> nn.Module:
    """The same random weights each time, in bf16 on a GPU."""
    torch.manual_seed(0)
    width = 512 if device == "cuda" else 64
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation="eager",  # the same bits at each run
    )
    return transformers.LlamaForCausalLM(config).to(device, dtype_on(device))


def batches(device: str) -> list[Tensor]:
    length = 128 if device == "cuda" else 16
    ids = torch.randint(VOCAB, (4, 4, length), generator=torch.Generator().manual_seed(1))
    return [ids[step % 4].to(device) for step in range(STEPS)]


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """Every weight one rounding up or down."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            away = torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, torch.inf, -torch.inf)
            weight = parameter.cpu()
            parameter.copy_(torch.nextafter(weight, away.to(weight.dtype)))
    return model


def ours(device: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(2)
    return apply_lora(llama(device), TARGETS, r=R, lora_alpha=ALPHA, lora_dropout=dropout).train()


def of_peft(device: str, perturbation: int = 0) -> nn.Module:
    """peft's model with the adapters of `ours`."""
    model = llama(device) if not perturbation else perturbed(llama(device), perturbation)
    config = peft.LoraConfig(target_modules=TARGETS, r=R, lora_alpha=ALPHA)
    model = peft.get_peft_model(model, config).train()
    start = layers(ours(device))
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(start[name].lora_A)
    return model


def layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


def train(model: nn.Module, device: str, call: nn.Module | None = None, part: slice = slice(None)) -> list[Tensor]:
    """The loss of each step, over the rows `part` of each batch; `call` is what is called, the model if None."""
    rate = 2e-3 if device == "cuda" else 5e-3  # the wider model's largest without leaps
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    torch.manual_seed(3)
    for ids in batches(device):
        optimizer.zero_grad()
        rows = ids[part]
        loss = (model if call is None else call)(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def main(rank: int, world_size: int, folder: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    method = f"file://{folder}/rendezvous"
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=world_size)
    mesh = dist.device_mesh.init_device_mesh(device, (world_size,))
    model = ours(device)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = 4 // world_size
    losses = torch.stack(train(model, device, part=slice(rank * rows, (rank + 1) * rows)))
    dist.all_reduce(losses)
    taken = {layer.last_backend for layer in layers(model).values()}
    assert taken == {"triton" if device == "cuda" else "reference"}, taken
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps((losses / world_size).tolist()))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past the destructors of torch's threads, one of which now and then aborts the process


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
