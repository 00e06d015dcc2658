"""The loss over 200 steps on real text, a small Llama in stock peft and the same by fuse(): one curve.

    pytest bench/ --benchmark -k loss_curve

A random frozen decoder learns to predict the next byte of the standard library's docstrings by its adapters alone. On a
GPU the base is bf16 and the adapters fp32 under autocast, on a CPU all is fp32. Curves go to `--bench-out`.
"""

import contextlib
import copy
import json
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bench_end_to_end import require_fused
from bench_record import hand_over, recorded

from fusedlora.demo_text import stdlib_docstrings
from fusedlora.timing import machine

BATCH, LENGTH, WARMUP = 16, 128, 10
# Largest distance between the curves, as a share of what the loss falls by. Two runs whose sums are rounded in other
# orders part slowly; a gradient that is off by a few per cent parts them at once.
LIMIT = 0.02


class Shape(NamedTuple):
    width: int
    layers: int
    steps: int


SMOKE, FULL, FULL_ON_GPU = Shape(64, 1, 4), Shape(64, 2, 200), Shape(512, 4, 200)


class Curve(NamedTuple):
    losses: list[float]
    seconds: list[float]  # of each step


def batches(count: int) -> torch.Tensor:
    """[count, BATCH, LENGTH + 1] bytes of text, the same in every run."""
    text = "\n".join(text for text, _ in stdlib_docstrings().train).encode()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - LENGTH - 1, (count, BATCH), generator=generator)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[starts[..., None] + torch.arange(LENGTH + 1)].long()


def adapted(shape: Shape, device: torch.device):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 32,
        num_key_value_heads=shape.width // 32,
        max_position_embeddings=LENGTH,
        initializer_range=shape.width**-0.5,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()


def train(model: torch.nn.Module, data: torch.Tensor) -> Curve:
    device = data.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    on_gpu = device.type == "cuda"
    losses, seconds = [], []
    for batch in data:
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return Curve(losses, seconds)


def draw(curves: dict[str, Curve], path: Path) -> bool:
    """Whether there was a matplotlib to draw with."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for (name, curve), style in zip(curves.items(), ("-", (0, (2, 2))), strict=True):
        ax.plot(range(1, len(curve.losses) + 1), curve.losses, linestyle=style, label=name)
    ax.set(xlabel="step", ylabel="cross entropy of the next byte, nats")
    ax.legend(frameon=False)
    figure.savefig(path)
    return True


@recorded
def test_loss_curve(benchmark, plan):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from fusedlora.integrations.peft import fuse

    shape = SMOKE if not plan.measure else FULL_ON_GPU if plan.on_gpu else FULL
    data = batches(shape.steps).to(plan.device)
    stock = adapted(shape, plan.device)
    fused = fuse(copy.deepcopy(stock))
    curves = {"peft": train(stock, data), "peft, fuse()": train(fused, data)}
    require_fused(fused, plan.backend)

    ours, theirs = (torch.tensor(curves[name].losses) for name in ("peft, fuse()", "peft"))
    apart = (ours - theirs).abs().max().item()
    fallen = (theirs[0] - theirs[-10:].mean()).item()
    facts = {"steps": shape.steps, "first": theirs[0].item(), "last": [c.losses[-1] for c in curves.values()]}
    facts |= {"largest_distance": apart}
    if plan.measure:
        folder = Path(plan.config.option.bench_out)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(plan.device), **facts, "losses": {n: c.losses for n, c in curves.items()}}
        (folder / "loss-curve.json").write_text(json.dumps(content, indent=1) + "\n")
        drawn = draw(curves, folder / "loss-curve.png")
        told = f"loss {facts['first']:.3f} to {facts['last']}, at most {apart:.4f} apart"
        plan.say(f"{told}; written to {folder}: loss-curve.json{', .png' if drawn else ''}")
        assert fallen > 1.0, "it has not learnt"
        assert apart <= LIMIT * fallen
    else:
        assert apart <= 1e-3
    hand_over(benchmark, "loss curve", curves["peft, fuse()"].seconds, facts)
