"""How the work of one launch is spread over its programs: a small cost model in plain Python.

Times are rough microseconds of one SM. They only have to rank alternatives: who waits for whom, and so freedom from
deadlock, does not depend on them, nor do the bits of any result.
"""

from __future__ import annotations

import dataclasses
import functools

from fusedlora.config import BackwardConfig, ForwardConfig, Problem

# Measured on an H100: a 128×256×4096 bf16 tile takes 45 µs; one SM streams about 60 KB/µs beside busy neighbours.
FLOP_PER_US = 6.0e6
BYTES_PER_US = 60e3
STEP_US = 2.0
# More parts than this would write more partial sums than the balance is worth.
MAX_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Run-time counts of one launch. Backward only: parts, front_jobs, mid_jobs (see `backward_kernel`)."""

    num_programs: int
    num_shrink_tasks: int
    parts: int = 1
    front_jobs: int = 0
    mid_jobs: int = 0


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_us(p: Problem, c: ForwardConfig) -> float:
    """Time of one GEMM tile."""
    return 2.0 * c.BLOCK_M * c.BLOCK_N * p.depth * (p.itemsize / 2) / FLOP_PER_US + STEP_US


def shrink_us(p: Problem, c: ForwardConfig) -> float:
    """Time of one row block of a shrink task."""
    return c.SHRINK_M * p.depth * p.itemsize / BYTES_PER_US + STEP_US


def _shrink_tasks(p: Problem, c: ForwardConfig, num_tiles: int, num_programs: int) -> int:
    """The number of shrink tasks: on the programs that have a tile less than others, if those finish in time.

    In time means before the first tiles reach their epilogue.
    """
    blocks = cdiv(p.M, c.SHRINK_M)
    slack = -num_tiles % num_programs
    needed = cdiv(int(blocks * shrink_us(p, c)), max(1, int(tile_us(p, c))))
    if slack >= needed:
        return max(1, min(slack, blocks))
    return max(1, min(blocks, num_programs))


@functools.lru_cache(maxsize=4096)
def forward_schedule(p: Problem, c: ForwardConfig) -> Schedule:
    """The schedule of the forward kernel for p.num_sms programs at most."""
    num_tiles = cdiv(p.M, c.BLOCK_M) * cdiv(p.out, c.BLOCK_N)
    num_programs = max(1, min(p.num_sms, num_tiles + cdiv(p.M, c.SHRINK_M)))
    return Schedule(num_programs, _shrink_tasks(p, c, num_tiles, num_programs))


@functools.lru_cache(maxsize=4096)
def backward_schedule(p: Problem, c: BackwardConfig, dx: bool, da: bool, db: bool) -> Schedule:
    """The schedule of the backward kernel: as forward, and the jobs of dA's and dB's stripes between the tiles.

    A stripe is cut into parts of about `c.stripe_rows` rows. Programs with a tile less than others take jobs first
    (`front_jobs` each, what fits beside their shrink tasks); all programs share the rest (`mid_jobs` each).
    """
    num_tiles = cdiv(p.M, c.BLOCK_M) * cdiv(p.out, c.BLOCK_N) if dx else 0
    parts = max(1, min(MAX_PARTS, cdiv(p.M, c.stripe_rows)))
    jobs = ((cdiv(p.out, c.STRIPE_N) if da else 0) + (cdiv(p.depth, c.STRIPE_N) if db else 0)) * parts
    shrinks = cdiv(p.M, c.SHRINK_M) if dx or da else 0
    num_programs = max(1, min(p.num_sms, num_tiles + jobs + shrinks))
    tasks = _shrink_tasks(p, c, num_tiles, num_programs) if shrinks else 0
    job_us = cdiv(p.M, parts) * c.STRIPE_N * p.itemsize / BYTES_PER_US + STEP_US
    slack = -num_tiles % num_programs
    front = 0
    if slack:
        shrink_time = cdiv(shrinks, tasks) * shrink_us(p, c) if tasks else 0.0
        front = max(0, int((tile_us(p, c) - shrink_time) / job_us))
        front = min(front, cdiv(jobs, slack))
    mid = cdiv(max(0, jobs - front * slack), num_programs)
    return Schedule(num_programs, tasks, parts, front, mid)
