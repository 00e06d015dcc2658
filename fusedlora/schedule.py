"""How the work of one launch is spread over its programs: a small cost model in plain Python.

Times are rough microseconds of one SM. They only have to rank alternatives: who waits for whom, and so freedom from
deadlock, does not depend on them, nor do the bits of any result.
"""

from __future__ import annotations

import dataclasses
import functools

from fusedlora.config import BackwardConfig, ForwardConfig, Problem

# Measured on an H100: a 128×256×4096 bf16 tile takes 44 µs; beside busy neighbours one SM streams about 65 KB/µs
# through a shrink task of a small rank, 50 KB/µs of a rank above 32, 42 KB/µs where the task forms dB as well, and
# 15 KB/µs where it splits fp32 adapters, 25 KB/µs where the rows are too few to fill its tensor cores. A dropout mask
# costs 1 µs for each 25,000 elements.
FLOP_PER_US = 6.3e6
BYTES_PER_US, BYTES_PER_US_WIDE, BYTES_PER_US_FUSED, BYTES_PER_US_SPLIT = 65e3, 50e3, 42e3, 15e3
BYTES_PER_US_FEW_ROWS = 25e3
MASKED_PER_US = 25e3
STEP_US = 1.5
# More parts than this would write more partial sums than the balance is worth.
MAX_PARTS = 16
# Each shrink task has a synchronisation word; a power of two, as the kernels clear them in one store.
MAX_TASKS = 256


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Run-time counts of one launch: programs, shrink tasks, programs with tiles; parts of a stripe of dA or dB."""

    num_programs: int
    num_tasks: int
    tile_programs: int
    parts: int = 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_us(p: Problem, c: ForwardConfig) -> float:
    """Time of one GEMM tile."""
    return 2.0 * c.BLOCK_M * c.BLOCK_N * p.depth * (p.itemsize / 2) / FLOP_PER_US + STEP_US


def shrink_us(p: Problem, c: ForwardConfig) -> float:
    """Time of one row block of a shrink task."""
    rate = BYTES_PER_US if p.r <= 32 else BYTES_PER_US_WIDE
    if isinstance(c, BackwardConfig) and c.FUSE_DB:
        rate = BYTES_PER_US_FUSED
    if c.SHRINK_M < 128:
        rate = min(rate, BYTES_PER_US_FEW_ROWS)
    if p.split:
        rate = BYTES_PER_US_SPLIT
    masked = p.dropout and not isinstance(c, BackwardConfig)
    return c.SHRINK_M * p.depth * (p.itemsize / rate + masked / MASKED_PER_US) + STEP_US


def _place(p: Problem, c: ForwardConfig, num_tiles: int, num_programs: int) -> tuple[int, int]:
    """The number of shrink tasks and of programs with tiles.

    Tiles take `waves` rounds. Programs that the last round leaves without a tile are better kept off tiles
    altogether: they run ahead of the tiles with the shrink tasks, row block by row block, where that is fast enough.
    Otherwise the shrink tasks come first, on the programs that have a tile less than the others if these are enough
    to finish within the first round, or else on all.
    """
    blocks = cdiv(p.M, c.SHRINK_M)
    if c.SHRINK_M < c.BLOCK_M and cdiv(p.M, c.BLOCK_M) > MAX_TASKS:
        raise ValueError(
            f"SHRINK_M is {c.SHRINK_M}, below BLOCK_M, {c.BLOCK_M}: that goes up to {MAX_TASKS} blocks, M is {p.M}"
        )
    if num_tiles == 0:
        return min(blocks, num_programs, MAX_TASKS), 0
    waves = cdiv(num_tiles, num_programs)
    tile_programs = cdiv(num_tiles, waves)
    free = num_programs - tile_programs
    tiles_n = cdiv(p.out, c.BLOCK_N)
    rows_first = min(p.M, cdiv(tile_programs, tiles_n * c.GROUP_M) * c.GROUP_M * c.BLOCK_M)
    for tasks, first_round_blocks, programs in (
        (free, cdiv(rows_first, c.SHRINK_M), tile_programs),
        (-num_tiles % num_programs, blocks, num_programs),
    ):
        keeps_up = cdiv(blocks, max(tasks, 1)) * shrink_us(p, c) <= waves * tile_us(p, c)
        if tasks and keeps_up and cdiv(first_round_blocks, tasks) * shrink_us(p, c) <= 1.25 * tile_us(p, c):
            return min(tasks, blocks, MAX_TASKS), programs
    return min(blocks, num_programs, MAX_TASKS), num_programs


@functools.lru_cache(maxsize=4096)
def forward_schedule(p: Problem, c: ForwardConfig) -> Schedule:
    """The schedule of the forward kernel on p.num_sms programs at most."""
    num_tiles = cdiv(p.M, c.BLOCK_M) * cdiv(p.out, c.BLOCK_N)
    num_programs = max(1, min(p.num_sms, num_tiles + cdiv(p.M, c.SHRINK_M)))
    return Schedule(num_programs, *_place(p, c, num_tiles, num_programs))


@functools.lru_cache(maxsize=4096)
def backward_schedule(p: Problem, c: BackwardConfig, dx: bool, da: bool, db: bool) -> Schedule:
    """The schedule of the backward kernel: as forward, and the parts of a stripe, of about `c.stripe_rows` rows."""
    num_tiles = cdiv(p.M, c.BLOCK_M) * cdiv(p.out, c.BLOCK_N) if dx else 0
    parts = max(1, min(MAX_PARTS, cdiv(p.M, c.stripe_rows)))
    jobs = ((cdiv(p.out, c.STRIPE_N) if da else 0) + (cdiv(p.depth, c.STRIPE_N) if db else 0)) * parts
    num_programs = max(1, min(p.num_sms, num_tiles + jobs + cdiv(p.M, c.SHRINK_M)))
    tasks, tile_programs = _place(p, c, num_tiles, num_programs)
    return Schedule(num_programs, tasks if dx or da else 0, tile_programs, parts)
