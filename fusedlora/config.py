"""Tile configurations of the Triton kernels: what is valid, what was measured, and a heuristic for the rest.

Nothing here imports triton, torch or a kernel, so configurations can be listed, checked and simulated anywhere.
"""

from __future__ import annotations

import dataclasses
import functools

MAX_RANK = 256

# Bytes of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications). An unknown capability is treated as the smallest.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of one kernel. Sizes are elements; `num_stages` and `*_STAGES` are buffers of the software pipelines."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    # Ranks that one step of a tile's epilogue takes.
    RANK_K: int
    # Shrink tasks: SHRINK_M rows, SHRINK_K elements of depth a step.
    SHRINK_M: int
    SHRINK_K: int
    SHRINK_STAGES: int


@dataclasses.dataclass(frozen=True)
class BackwardConfig(ForwardConfig):
    """Adds the stripes of dA and dB: STRIPE_N columns, STRIPE_M rows a step, about `stripe_rows` rows a job."""

    STRIPE_N: int
    STRIPE_M: int
    STRIPE_STAGES: int
    stripe_rows: int = 2048


def block_r(r: int) -> int:
    """The rank as the kernels pad it in registers: a power of two, at least 16 (a tensor core's depth)."""
    return max(16, 1 << (r - 1).bit_length())


def check_config(config: ForwardConfig) -> None:
    """Raises ValueError where a configuration breaks a rule of the kernels (powers of two, tensor-core minima)."""
    minima = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "RANK_K": 16, "SHRINK_M": 16, "SHRINK_K": 16}
    minima |= {"STRIPE_N": 16, "STRIPE_M": 16, "GROUP_M": 1, "num_warps": 1, "num_stages": 1, "stripe_rows": 1}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        least = minima.get(field.name, 1)
        if value < least:
            raise ValueError(f"{field.name} is {value}; it must be at least {least}")
        tile_size = field.name.isupper() and field.name != "GROUP_M" and not field.name.endswith("STAGES")
        if tile_size and (value & (value - 1) or value > 256):
            raise ValueError(f"{field.name} is {value}; a tile size must be a power of two up to 256")
    if config.num_warps not in (4, 8):
        raise ValueError(f"num_warps is {config.num_warps}; it must be 4 or 8")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a configuration is chosen by. `out` and `depth` are N and K forward, K and N backward."""

    M: int
    out: int
    depth: int
    r: int
    itemsize: int
    # fp32 adapters kept at fp32 precision over a 16-bit base.
    split: bool
    # IEEE fp32 products: no tensor cores.
    ieee: bool
    capability: int
    num_sms: int


@functools.lru_cache(maxsize=4096)
def forward_config(problem: Problem) -> ForwardConfig:
    """The configuration of the forward kernel: the measured table where it has the shape, else the heuristic."""
    return ForwardConfig(**_heuristic(problem))


@functools.lru_cache(maxsize=4096)
def backward_config(problem: Problem) -> BackwardConfig:
    """As `forward_config`, for the backward kernel."""
    tile = _heuristic(problem)
    wide = block_r(problem.r)
    narrow = problem.itemsize == 4 or problem.split or wide > 64
    stripe = {"STRIPE_N": 64 if narrow else 128, "STRIPE_M": 64 if narrow or wide > 32 else 128, "STRIPE_STAGES": 4}
    if problem.capability not in (90, 100, 103):
        stripe |= {"STRIPE_N": 64, "STRIPE_M": 64, "STRIPE_STAGES": 3}
    return BackwardConfig(**tile, **stripe)


def _heuristic(p: Problem) -> dict[str, int]:
    wide = block_r(p.r)
    if p.ieee:
        tile = _tile(64, 64, 32, warps=4, stages=2)
        return tile | _skinny(rank_k=16, m=64, k=32, stages=2)
    large_shared = SHARED_MEMORY.get(p.capability, 0) > 200_000
    if p.itemsize == 4:
        tile = _tile(128, 128, 32, warps=8, stages=3 if large_shared else 2)
        return tile | _skinny(rank_k=16, m=64, k=32, stages=3 if large_shared else 2)
    if not large_shared:
        # Shared memory of 99 KB (163 KB on sm_80) and mma.sync: registers hold 128×128.
        tile = _tile(128, 128, 32, warps=8, stages=3)
        return tile | _skinny(rank_k=16 if p.split else min(wide, 32), m=64, k=32 if wide > 64 else 64, stages=3)
    # Hopper and later. 128×256 has the best ratio of arithmetic to loads; smaller tiles where they would leave
    # SMs without one.
    tiles_large = -(-p.M // 128) * -(-p.out // 256)
    if tiles_large >= p.num_sms:
        tile = _tile(128, 256, 64, warps=8, stages=3)
    elif p.M <= 64:
        tile = _tile(64, 64, 128, warps=4, stages=4)
    elif 2 * tiles_large >= p.num_sms // 2:
        tile = _tile(128, 128, 64, warps=8, stages=4)
    else:
        tile = _tile(64, 128, 64, warps=4, stages=4)
    if wide > 64 or p.split:
        skinny = _skinny(rank_k=32, m=64, k=64, stages=3)
    elif wide > 32:
        skinny = _skinny(rank_k=32, m=128, k=128, stages=4)
    else:
        skinny = _skinny(rank_k=wide, m=128, k=128, stages=4)
    return tile | skinny


def _tile(m: int, n: int, k: int, *, warps: int, stages: int, group: int = 16) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "num_warps": warps, "num_stages": stages}


def _skinny(*, rank_k: int, m: int, k: int, stages: int) -> dict[str, int]:
    return {"RANK_K": rank_k, "SHRINK_M": m, "SHRINK_K": k, "SHRINK_STAGES": stages}
