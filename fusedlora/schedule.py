"""How the work of one launch is spread over its programs: a small cost model in plain Python.

Times are rough microseconds of one SM. They only have to rank alternatives: who waits for whom, and so freedom from
deadlock, does not depend on them, nor do the bits of any result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from fusedlora.config import BackwardConfig, ForwardConfig, Problem

# Measured on an H100: a 128×256×4096 bf16 tile takes 44 µs; beside busy neighbours one SM streams about 65 KB/µs
# through a shrink task of a small rank, 50 KB/µs of a rank above 32, 42 KB/µs where the task forms dB as well, and
# 15 KB/µs where it splits fp32 adapters, 25 KB/µs where the rows are too few to fill its tensor cores; all SMs
# together 2,500 KB/µs. A dropout mask costs 1 µs for each 25,000 elements.
FLOP_PER_US = 6.3e6
BYTES_PER_US, BYTES_PER_US_WIDE, BYTES_PER_US_FUSED, BYTES_PER_US_SPLIT = 65e3, 50e3, 42e3, 15e3
BYTES_PER_US_FEW_ROWS = 25e3
BYTES_PER_US_ALL = 2500e3
MASKED_PER_US = 25e3
STEP_US = 1.5
# More parts than this would write more partial sums than the balance is worth.
MAX_PARTS = 16
# Synchronisation words of a launch before those that count row blocks and parts.
FIXED_WORDS = 5
# The kernels' arguments that a schedule gives.
SCHEDULED = ("num_tasks", "shared_blocks", "side_programs", "tile_programs")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Run-time counts of one launch.

    `num_tasks` shrink tasks, which come before all else, share the first `shared_blocks` row blocks; `side_programs`
    programs take the others while `tile_programs` compute tiles. `parts`: of a stripe of dA or dB.
    """

    num_programs: int
    num_tasks: int
    shared_blocks: int
    side_programs: int
    tile_programs: int
    num_words: int
    parts: int = 1

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """What the kernels take, in their order."""
        return self.num_tasks, self.shared_blocks, self.side_programs, self.tile_programs


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_us(p: Problem, c: ForwardConfig) -> float:
    """Time of one GEMM tile."""
    return 2.0 * c.BLOCK_M * c.BLOCK_N * p.depth * (p.itemsize / 2) / FLOP_PER_US + STEP_US


def shrink_us(p: Problem, c: ForwardConfig, streaming: int = 1) -> float:
    """Time of one row block of a shrink task where so many programs stream at once."""
    rate = BYTES_PER_US if p.r <= 32 else BYTES_PER_US_WIDE
    if isinstance(c, BackwardConfig) and c.FUSE_DB:
        rate = BYTES_PER_US_FUSED
    if c.SHRINK_M < 128:
        rate = min(rate, BYTES_PER_US_FEW_ROWS)
    if p.split:
        rate = BYTES_PER_US_SPLIT
    masked = p.dropout and not isinstance(c, BackwardConfig)
    rate = min(rate, BYTES_PER_US_ALL / max(streaming, 1))
    return c.SHRINK_M * p.depth * (p.itemsize / rate + masked / MASKED_PER_US) + STEP_US


def job_us(p: Problem, c: BackwardConfig, parts: int, streaming: int = 1) -> float:
    """Time of one part of a stripe of dA."""
    rate = BYTES_PER_US if p.r <= 32 else BYTES_PER_US_WIDE
    if p.split:
        rate = BYTES_PER_US_SPLIT
    rate = min(rate, BYTES_PER_US_ALL / max(streaming, 1))
    return cdiv(p.M, parts) * c.STRIPE_N * (p.itemsize / rate + p.dropout / MASKED_PER_US) + 2 * STEP_US


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the row blocks might be spread; see Schedule."""

    num_tasks: int
    shared_blocks: int
    side_programs: int
    tile_programs: int


def _splits(blocks: int, num_tiles: int, num_programs: int) -> Iterator[_Split]:
    """Candidates. Tiles take `waves` rounds; programs that the last round leaves without one may do without tiles."""
    waves = cdiv(num_tiles, num_programs)
    free = num_programs - cdiv(num_tiles, waves)
    late = -num_tiles % num_programs  # programs that have a tile less than the others
    for tasks in {late, blocks, cdiv(blocks, 2)}:
        if tasks:
            yield _Split(min(tasks, blocks, num_programs), blocks, 0, num_programs)
    for side in {free, max(1, free // 2), cdiv(free, 2) + 1, num_programs - cdiv(num_tiles, waves + 1)}:
        if not 0 < side < num_programs:
            continue
        for eighth in range(8):
            shared = blocks * eighth // 8
            yield _Split(min(shared, num_programs), shared, min(side, blocks - shared), num_programs - side)


def _finish(p: Problem, c: ForwardConfig, s: _Split, num_tiles: int, num_programs: int, jobs: int, parts: int) -> float:
    """Microseconds until a launch so spread ends."""
    tile, tiles_n, blocks = tile_us(p, c), cdiv(p.out, c.BLOCK_N), cdiv(p.M, c.SHRINK_M)
    shared_us, side_us = shrink_us(p, c, s.num_tasks), shrink_us(p, c, s.side_programs)
    rounds = cdiv(s.shared_blocks, s.num_tasks) if s.num_tasks else 0
    begin = rounds * shared_us
    side_begin = begin if s.num_tasks > num_programs - s.side_programs else 0.0
    side_end = side_begin + cdiv(blocks - s.shared_blocks, s.side_programs) * side_us if s.side_programs else 0.0
    waves = cdiv(num_tiles, s.tile_programs)
    late = waves * s.tile_programs - num_tiles
    # Tasks come before a program's tiles, of which those that come late have one less.
    hidden = s.num_tasks <= late + s.side_programs
    now = 0.0 if hidden else begin
    for wave in range(waves):
        last = min((wave + 1) * s.tile_programs, num_tiles) - 1
        row = min(p.M, (last // (tiles_n * c.GROUP_M) + 1) * c.GROUP_M * c.BLOCK_M)
        block = cdiv(row, c.SHRINK_M) - 1
        if block < s.shared_blocks:
            ready = (block // s.num_tasks + 1) * shared_us
        else:
            ready = side_begin + ((block - s.shared_blocks) // s.side_programs + 1) * side_us
        now = max(now + tile, ready)
    if hidden:
        now = max(now, begin + (waves - 1) * tile)
    if not jobs:
        return max(now, side_end)
    assert isinstance(c, BackwardConfig)
    each = job_us(p, c, parts)
    beside = s.side_programs * max(0.0, now - max(side_end, begin)) // each
    if s.num_tasks < late:
        beside += (late - s.num_tasks) * (tile // each)
    left = max(0, jobs - int(beside))
    return max(now, side_end) + (cdiv(left, num_programs) * job_us(p, c, parts, min(left, num_programs)))


def _place(p: Problem, c: ForwardConfig, num_tiles: int, num_programs: int, jobs: int, parts: int) -> _Split:
    """How row blocks and tiles are spread: of the candidates the one that should end first."""
    blocks = cdiv(p.M, c.SHRINK_M)
    everyone = _Split(min(blocks, num_programs), blocks, 0, num_programs if num_tiles else 0)
    if num_tiles == 0:
        return everyone
    best, least = everyone, _finish(p, c, everyone, num_tiles, num_programs, jobs, parts)
    for split in _splits(blocks, num_tiles, num_programs):
        us = _finish(p, c, split, num_tiles, num_programs, jobs, parts)
        if us < 0.995 * least:
            best, least = split, us
    return best


def _schedule(
    p: Problem, c: ForwardConfig, num_programs: int, num_tiles: int, jobs: int, parts: int, words: int
) -> Schedule:
    split = _place(p, c, num_tiles, num_programs, jobs, parts)
    num_words = FIXED_WORDS + cdiv(p.M, max(c.BLOCK_M, c.SHRINK_M)) + words
    return Schedule(num_programs, *dataclasses.astuple(split), num_words, parts)


@functools.lru_cache(maxsize=4096)
def forward_schedule(p: Problem, c: ForwardConfig) -> Schedule:
    """The schedule of the forward kernel on p.num_sms programs at most."""
    num_tiles = cdiv(p.M, c.BLOCK_M) * cdiv(p.out, c.BLOCK_N)
    num_programs = max(1, min(p.num_sms, num_tiles + cdiv(p.M, c.SHRINK_M)))
    return _schedule(p, c, num_programs, num_tiles, 0, 1, 0)


@functools.lru_cache(maxsize=4096)
def backward_schedule(p: Problem, c: BackwardConfig, dx: bool, da: bool, db: bool) -> Schedule:
    """The schedule of the backward kernel: as forward, and the parts of a stripe, of about `c.stripe_rows` rows."""
    num_tiles = cdiv(p.M, c.BLOCK_M) * cdiv(p.out, c.BLOCK_N) if dx else 0
    parts = max(1, min(MAX_PARTS, cdiv(p.M, c.stripe_rows)))
    stripes = cdiv(p.out, c.STRIPE_N), cdiv(p.depth, c.STRIPE_N)
    jobs = (stripes[0] * da + stripes[1] * (db and not c.FUSE_DB)) * parts
    num_programs = max(1, min(p.num_sms, num_tiles + jobs + cdiv(p.M, c.SHRINK_M)))
    schedule = _schedule(p, c, num_programs, num_tiles, jobs, parts, sum(stripes))
    if not dx and not da:
        schedule = dataclasses.replace(schedule, num_tasks=0, shared_blocks=0, side_programs=0)
    return schedule
