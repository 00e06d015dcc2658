"""What the tuner tries: configurations near a given one that keep the kernels' rules and fit the shared memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from .config import (
    SHARED_MEMORY,
    BackwardConfig,
    Config,
    DecodeConfig,
    ForwardConfig,
    Problem,
    TileConfig,
    block_r,
    cdiv,
    check_for,
    decode_rows,
)
from .cuda_config import AnyConfig, CudaConfig, check_any_config, count_units, in_tiles, suits

# Groups of fields that are varied together, each around the best of the groups before it.
STEPS = {
    "forward": ("tile", "order", "shrink"),
    "backward": ("tile", "order", "shrink", "stripe"),
    "cuda_forward": ("tile", "order", "shrink"),
    "cuda_backward": ("tile", "order", "shrink", "jobs"),
}
# fp32 numbers of an accumulator that a thread's registers hold beside all else.
MOST_A_THREAD = 128


def variants(config: AnyConfig, p: Problem, step: str) -> list[AnyConfig]:
    """Other choices of one group's fields that may run, in a fixed order; the decode kernels have one group."""
    made: Iterator[dict[str, Any]]
    if isinstance(config, CudaConfig):
        made = _cuda(config, p, step)
    elif isinstance(config, DecodeConfig):
        made = _decodes(config, p) if step == "tile" else iter(())
    else:
        made = {"tile": _tiles, "order": _orders, "shrink": _shrinks, "stripe": _stripes}[step](config, p)
    found = dict.fromkeys(dataclasses.replace(config, **changes) for changes in made)
    return [other for other in found if other != config and _may_run(other, p)]


def shared_bytes(c: Config, p: Problem) -> int:
    """At least what a program takes of shared memory: the buffers of its deepest loop."""
    if isinstance(c, DecodeConfig):
        return (c.num_stages - 1) * (c.BLOCK_N + decode_rows(p.M) + block_r(p.r)) * c.BLOCK_K * p.itemsize
    tile = c.num_stages * (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * p.itemsize
    if c.FLAT:  # beside the tile that is stored
        tile += c.BLOCK_M * c.BLOCK_N * p.itemsize
    if not c.has_tasks:
        return tile + c.num_stages * block_r(p.r) * c.BLOCK_K * p.itemsize
    shrink = c.SHRINK_STAGES * c.SHRINK_M * c.SHRINK_K * p.itemsize
    stripe = c.STRIPE_STAGES * c.STRIPE_M * c.STRIPE_N * p.itemsize if isinstance(c, BackwardConfig) else 0
    return max(tile, shrink, stripe)


def _may_run(c: AnyConfig, p: Problem) -> bool:
    try:
        check_any_config(c)
        if isinstance(c, TileConfig):
            check_for(p, c)
    except ValueError:
        return False
    if isinstance(c, CudaConfig):
        return suits(p, c)
    threads = 32 * c.num_warps
    fits = shared_bytes(c, p) <= SHARED_MEMORY.get(p.capability, min(SHARED_MEMORY.values()))
    if isinstance(c, DecodeConfig):
        parts = c.SPLIT * c.BLOCK_N * decode_rows(p.M)
        return fits and (c.SPLIT == 1 or parts <= MOST_A_THREAD * threads // 2)
    skinny = max(c.SHRINK_M, c.STRIPE_N if isinstance(c, BackwardConfig) else 0) * block_r(p.r)
    if max(c.BLOCK_M * c.BLOCK_N, skinny) > MOST_A_THREAD * threads or c.BLOCK_M * c.BLOCK_N < 4 * threads:
        return False
    if c.RANK_K > block_r(p.r):
        return False
    return fits


def _cuda(c: CudaConfig, p: Problem, step: str) -> Iterator[dict[str, Any]]:
    """Of csrc's kernels; whether S is summed in tiles or in slices stays as it is."""
    if c.decode_rows:
        for rows, split, early in itertools.product((64, 128), (1, 2, 4, 8), (False, True)) if step == "tile" else ():
            yield {"decode_rows": rows, "decode_split": split, "decode_early": early}
    elif step == "tile" and c.in_tiles:
        for other in in_tiles(p):  # a width's groups are whole turns
            if other.slices == c.slices:
                yield {name: getattr(other, name) for name in ("block_n", "group", "programs")}
    elif step == "tile":
        yield from ({"block_n": n, "db_with_t": c.db_with_t and n == 256} for n in (128, 256))
    elif step == "order" and not c.in_tiles:
        yield from ({"group": group} for group in (2, 4, 8, 16))
    elif step == "shrink" and c.slices == 1 and not c.in_tiles:
        counts = {min(c.clusters, cdiv(count_units(p, c), each)) for each in range(1, 9)}
        yield from ({"shrink_clusters": n, "first_job": n % c.clusters if c.first_job else 0} for n in sorted(counts))
    elif step == "jobs":
        starts = {0, c.shrink_clusters % c.clusters}
        for with_t, first, parts in itertools.product((False, True), sorted(starts), range(1, 9)):
            yield {"db_with_t": with_t, "first_job": first, "parts": parts}


def _decodes(c: DecodeConfig, p: Problem) -> Iterator[dict[str, Any]]:
    """Tiles that about fill the GPU, and enough of W on its way."""
    for n, k, split, warps in itertools.product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (4, 8)):
        programs = cdiv(p.out, n) * split
        deep = p.depth >= 2 * k * split or split == 1
        # Tensor cores truncate within a step: fp32 adapters keep steps as long as the heuristic's, or shorter.
        if not deep or (split > 1 and programs > 4 * p.num_sms) or (p.split and k > c.BLOCK_K) or 16 * n < 64 * warps:
            continue
        if split == 1 or 2 * programs >= p.num_sms:
            yield {"BLOCK_N": n, "BLOCK_K": k, "SPLIT": split, "num_warps": warps}
    for stages in range(2, 9):
        yield {"num_stages": stages}


def _tiles(c: TileConfig, p: Problem) -> Iterator[dict[str, Any]]:
    """Up to 64 rows: tiles no taller than they need. More rows: tiles that keep the tensor cores busy."""
    few = p.M <= 64
    heights = (16, 32, 64) if few else (64, 128, 256)
    depths = (64, 128) if SHARED_MEMORY.get(p.capability, 0) > 200_000 and p.itemsize == 2 else (32, 64)
    for m, n, k, warps, stages in itertools.product(heights, (32, 64, 128, 256), depths, (4, 8), (3, 4)):
        if few and m > max(16, 1 << (p.M - 1).bit_length()):
            continue
        busy = 32 * 32 * warps <= m * n and n <= 4 * m and m <= 2 * n and (m, n) != (256, 256)
        if few or (busy and (p.M <= 1024 or m * n >= 128 * 128 or (m, n) == (c.BLOCK_M, c.BLOCK_N))):
            yield {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def _orders(c: TileConfig, p: Problem) -> Iterator[dict[str, Any]]:
    for group in (4, 8, 16, 32):
        yield {"GROUP_M": group}
    yield {"FLAT": not c.FLAT}


def _shrinks(c: TileConfig, p: Problem) -> Iterator[dict[str, Any]]:
    if isinstance(c, ForwardConfig):
        yield {"IN_TILES": not c.IN_TILES}
    if not c.has_tasks:
        return
    # Tensor cores truncate within a step: fp32 adapters keep steps as long as the heuristic's, or shorter.
    longest = c.SHRINK_K if p.split else 256
    for m, k, stages in itertools.product((32, 64, 128, 256), (32, 64, 128, 256), (3, 4)):
        if (
            k <= longest
            and 2048 <= m * k <= 32768
            and (stages == c.SHRINK_STAGES or (m, k) == (c.SHRINK_M, c.SHRINK_K))
        ):
            yield {"SHRINK_M": m, "SHRINK_K": k, "SHRINK_STAGES": stages}
    for rank in (16, 32, 64):
        yield {"RANK_K": rank}


def _stripes(c: TileConfig, p: Problem) -> Iterator[dict[str, Any]]:
    assert isinstance(c, BackwardConfig)
    longest = c.STRIPE_M if p.split else 128
    for n, m, stages in itertools.product((32, 64, 128, 256), (32, 64, 128), (3, 4)):
        if m <= longest and (stages == c.STRIPE_STAGES or (n, m) == (c.STRIPE_N, c.STRIPE_M)):
            yield {"STRIPE_N": n, "STRIPE_M": m, "STRIPE_STAGES": stages}
    for rows in (512, 1024, 2048, 4096):
        yield {"stripe_rows": rows}
    if p.itemsize == 2 and not p.split:
        yield {"FUSE_DB": not c.FUSE_DB}
