"""torch's generators under tensor parallelism: one dropout mask on all ranks, or another on each.

Everything goes through the generator's state, which activation checkpointing restores before it computes a layer again.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .memory import capturing

# 2^64 over the golden ratio, odd: seeds this far apart stay distinct in their low 32 bits, all that a CPU's uses.
_SEED_STEP = 0x9E3779B97F4A7C15


def require_one_generator(device: torch.device, mesh: DeviceMesh) -> None:
    """Raises RuntimeError where the ranks' generators of `device` are in different states; one small all-gather."""
    generator = _generator(device)
    state: Any
    if device.type == "cuda":
        state = (generator.initial_seed(), generator.get_offset())
    else:
        state = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
    states: list[Any] = [None] * mesh.size()
    dist.all_gather_object(states, state, group=mesh.get_group())
    if any(other != states[0] for other in states):
        raise RuntimeError(
            "torch's generators differ between the ranks of the mesh, so ColwiseLoRA's dropout would drop other "
            "elements on each: call torch.manual_seed with one seed on all of them, after parallelize_module"
        )


@contextmanager
def own_stream(device: torch.device, rank: int) -> Iterator[None]:
    """torch's generator of `device` on numbers that no other rank draws.

    They follow from its state and the rank, so restoring the state gives them again. Ranks whose generators were in
    one state find them in one state afterwards.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("RowwiseLoRA cannot draw a rank's own dropout mask under torch.compile with fullgraph=True")
    generator = _generator(device)
    if device.type == "cuda":
        if capturing(device.index):
            raise RuntimeError("RowwiseLoRA cannot draw a rank's own dropout mask in a CUDA graph's capture")
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.manual_seed((seed + rank * _SEED_STEP) % 2**64)
        generator.set_offset(offset)
        try:
            yield
        finally:
            offset = generator.get_offset()
            generator.manual_seed(seed)
            generator.set_offset(offset)
    else:
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        state = generator.get_state()
        generator.manual_seed((seed + rank * _SEED_STEP) % 2**64)
        try:
            yield
        finally:
            generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    if device.type == "cpu":
        return torch.default_generator
    raise RuntimeError(f"x is on {device.type}: dropout of a sharded layer knows the generators of cpu and cuda")
