"""How the work of one launch is spread over its programs: a small cost model in plain Python.

Times are rough microseconds of one SM. They only have to rank alternatives: who waits for whom, and so freedom from
deadlock, does not depend on them, nor do the bits of any result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from fusedlora.config import BackwardConfig, ForwardConfig, Problem, TileConfig, cdiv

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
# The time of a tile that computes its rows of S over one's that does not.
OWN_S = 1.15
# More parts than this would write more partial sums than the balance is worth.
MAX_PARTS = 16
# Rounds of tiles looked at one by one; a launch of more is looked at in steps, which takes less of the host's time.
MAX_ROUNDS = 64
# A program takes a job after every so many tiles, or, with 0, after all of them. What the cost model tries; of equals
# the first, as fewer jobs at once leave the tiles more of the L2.
JOB_PERIODS = (0, 24, 16, 12, 8, 6, 5, 4, 3, 2, 1)
# Synchronisation words of a launch before those that count row blocks and parts.
FIXED_WORDS = 5
# The kernels' arguments that a schedule gives.
SCHEDULED = ("num_tasks", "shared_blocks", "side_programs", "tile_programs")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Run-time counts of one launch.

    `num_tasks` shrink tasks, which come before all else, share the first `shared_blocks` row blocks; `side_programs`
    more tasks take the others while `tile_programs` programs compute tiles. `parts`: of a stripe of dA or dB. A program
    takes one of the backward's jobs after every `job_period` of its tiles, or with 0 only after all of them.
    """

    num_programs: int
    num_tasks: int
    shared_blocks: int
    side_programs: int
    tile_programs: int
    num_words: int
    parts: int = 1
    job_period: int = 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """What the kernels take, in their order."""
        return self.num_tasks, self.shared_blocks, self.side_programs, self.tile_programs


def tile_us(p: Problem, c: TileConfig) -> float:
    """Time of one GEMM tile, with its rows of S where it computes them."""
    us = 2.0 * c.BLOCK_M * c.BLOCK_N * p.depth * (p.itemsize / 2) / FLOP_PER_US + STEP_US
    return us if c.has_tasks else OWN_S * us


def _blocks(p: Problem, c: TileConfig) -> int:
    """Row blocks of S or T that shrink tasks compute."""
    return cdiv(p.M, c.SHRINK_M) if c.has_tasks else 0


def shrink_us(p: Problem, c: TileConfig, streaming: int = 1) -> float:
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


def job_us(p: Problem, c: BackwardConfig, parts: int, streaming: float = 1) -> float:
    """Time of one part of a stripe of dA."""
    rate = BYTES_PER_US if p.r <= 32 else BYTES_PER_US_WIDE
    if p.split:
        rate = BYTES_PER_US_SPLIT
    rate = min(rate, BYTES_PER_US_ALL / max(streaming, 1))
    return cdiv(p.M, parts) * c.STRIPE_N * (p.itemsize / rate + p.dropout / MASKED_PER_US) + 2 * STEP_US


def takes_turns(p: Problem, dora: bool) -> bool:
    """Whether programs may take jobs between their tiles: where there are registers for that, and it was measured."""
    return p.capability == 90 and p.r <= 64 and not (p.dropout or p.split or dora)


def _alternatives(
    whole: Schedule, blocks: int, num_tiles: int, job_periods: tuple[int, ...] = (0,)
) -> Iterator[Schedule]:
    """Other ways to spread the row blocks than `whole`.

    Tiles come in rounds of one a program. Either some tasks take all blocks before their programs' tiles, as many as
    the last round leaves without one; or that last round is shortened: programs that it does not need compute no tiles
    at all and take the blocks, or what of them is not shared, and the jobs, beside the others. Without such programs
    there are turns for jobs.
    """
    programs = whole.num_programs
    rounds = cdiv(num_tiles, programs)
    idle = -num_tiles % programs  # in the last round
    for tasks in {idle, blocks, cdiv(blocks, 2)}:
        if tasks:
            before = dataclasses.replace(whole, num_tasks=min(tasks, blocks, programs))
            yield from (dataclasses.replace(before, job_period=period) for period in job_periods if period < rounds)
    free = programs - cdiv(num_tiles, rounds)
    for side in {free, max(1, free // 2), cdiv(free, 2) + 1, programs - cdiv(num_tiles, rounds + 1)}:
        if not 0 < side < programs:
            continue
        for eighth in range(8):
            shared = blocks * eighth // 8
            yield dataclasses.replace(
                whole,
                num_tasks=min(shared, programs),
                shared_blocks=shared,
                side_programs=min(side, blocks - shared),
                tile_programs=programs - side,
            )


def _end_us(p: Problem, c: TileConfig, s: Schedule, num_tiles: int, jobs: int) -> float:
    """Microseconds until a launch so scheduled ends."""
    tile, tiles_n, blocks = tile_us(p, c), cdiv(p.out, c.BLOCK_N), _blocks(p, c)
    rounds = cdiv(num_tiles, s.tile_programs)
    if not blocks:
        return rounds * tile
    idle = rounds * s.tile_programs - num_tiles  # of those that compute tiles, in their last round

    # Row blocks: those of the tasks, and those of the side programs, which begin late where tasks were left for them.
    task_us, side_us = shrink_us(p, c, s.num_tasks), shrink_us(p, c, s.side_programs)
    shared_end = cdiv(s.shared_blocks, s.num_tasks) * task_us if s.num_tasks else 0.0
    side_begin = shared_end if s.num_tasks > s.num_programs - s.side_programs else 0.0
    side_end = side_begin
    if s.side_programs:
        side_end += cdiv(blocks - s.shared_blocks, s.side_programs) * side_us

    # Tiles, round by round, when their rows are there. Tasks that only idle and side programs have delay nobody.
    hidden = s.num_tasks <= idle + s.side_programs
    end = 0.0 if hidden else shared_end
    step = max(1, rounds // MAX_ROUNDS)
    for begin in range(0, rounds, step):
        last = min((begin + step) * s.tile_programs, num_tiles) - 1
        row = min(p.M, (last // (tiles_n * c.GROUP_M) + 1) * c.GROUP_M * c.BLOCK_M)
        block = cdiv(row, c.SHRINK_M) - 1
        if block < s.shared_blocks:
            ready = (block // s.num_tasks + 1) * task_us
        else:
            ready = side_begin + ((block - s.shared_blocks) // s.side_programs + 1) * side_us
        end = max(end + min(step, rounds - begin) * tile, ready)
    if hidden:
        end = max(end, shared_end + (rounds - 1) * tile)
    if not jobs:
        return max(end, side_end)

    # Jobs: some beside the tiles, by side programs, idle ones and those whose turn it is, the others when all are free.
    assert isinstance(c, BackwardConfig)
    job, t_end = job_us(p, c, s.parts), max(side_end, shared_end)
    beside = s.side_programs * max(0.0, end - t_end) // job
    if s.num_tasks < idle:
        beside += (idle - s.num_tasks) * (tile // job)
    if s.job_period:
        first = math.ceil(t_end / tile)
        taken = min(s.tile_programs * _turns(s.job_period, rounds, first), jobs - beside)
        if taken <= 0:
            return math.inf
        beside += taken
        # Tiles of a round end together, and whose turn it was while there was no T come with the first who find it.
        together = s.tile_programs / s.job_period
        end += job_us(p, c, s.parts, together * min(max(first, 1), s.job_period))
        end += (math.ceil(taken / s.tile_programs) - 1) * job_us(p, c, s.parts, together)
    left = max(0, jobs - int(beside))
    rest = cdiv(left, s.num_programs) * job_us(p, c, s.parts, min(left, s.num_programs))
    return max(end, side_end) + rest


def _turns(period: int, rounds: int, first: int) -> float:
    """How many jobs a program takes between its tiles, on average, where T is there after `first` tiles."""
    last = rounds - 1
    return sum(max(0, (last - max(until, first)) // period + 1) for until in range(1, period + 1)) / period


def _schedule(
    p: Problem,
    c: TileConfig,
    num_tiles: int,
    *,
    jobs: int = 0,
    parts: int = 1,
    stripes: int = 0,
    turns: bool = False,
) -> Schedule:
    """The schedule that should end first."""
    blocks = _blocks(p, c)
    num_programs = max(1, min(p.num_sms, num_tiles + jobs + blocks))
    whole = Schedule(
        num_programs,
        num_tasks=min(blocks, num_programs),
        shared_blocks=blocks,
        side_programs=0,
        tile_programs=num_programs if num_tiles else 0,
        num_words=FIXED_WORDS + cdiv(p.M, max(c.BLOCK_M, c.SHRINK_M)) + stripes,
        parts=parts,
    )
    if num_tiles == 0 or blocks == 0:
        return whole
    best, least = whole, _end_us(p, c, whole, num_tiles, jobs)
    for other in _alternatives(whole, blocks, num_tiles, JOB_PERIODS if turns else (0,)):
        us = _end_us(p, c, other, num_tiles, jobs)
        if us < 0.995 * least:
            best, least = other, us
    return best


@functools.lru_cache(maxsize=4096)
def forward_schedule(p: Problem, c: ForwardConfig, tiles: bool = True) -> Schedule:
    """The schedule of the forward kernel on p.num_sms programs at most; without `tiles` that of S alone."""
    return _schedule(p, c, _tiles(p, c) if tiles else 0)


def _tiles(p: Problem, c: TileConfig) -> int:
    return cdiv(p.M, c.BLOCK_M) * cdiv(p.out, c.BLOCK_N)


def _jobs(p: Problem, c: BackwardConfig, dx: bool, da: bool, db: bool, dora: bool) -> tuple[int, int, int]:
    """The parts of a stripe, the stripes of dA and dB, and the jobs that are left to take."""
    parts = max(1, min(MAX_PARTS, cdiv(p.M, c.stripe_rows)))
    da_stripes, db_stripes = cdiv(p.out, c.STRIPE_N), cdiv(p.depth, c.STRIPE_N)
    fused = c.FUSE_DB and not p.split and (dx or da)  # into the shrink tasks, where there are any
    return parts, da_stripes + db_stripes, (da_stripes * da + db_stripes * (db and not fused) * (1 + dora)) * parts


@functools.lru_cache(maxsize=4096)
def backward_schedule(p: Problem, c: BackwardConfig, dx: bool, da: bool, db: bool, dora: bool = False) -> Schedule:
    """The schedule of the backward kernel: as forward, and the parts of a stripe, of about `c.stripe_rows` rows.

    With DoRA's tensors a stripe of dB reads twice as much.
    """
    num_tiles = _tiles(p, c) if dx else 0
    parts, stripes, jobs = _jobs(p, c, dx, da, db, dora)
    turns = jobs > 0 and takes_turns(p, dora)
    schedule = _schedule(p, c, num_tiles, jobs=jobs, parts=parts, stripes=stripes, turns=turns)
    if not dx and not da:
        schedule = dataclasses.replace(schedule, num_tasks=0, shared_blocks=0, side_programs=0)
    return schedule


def forward_end_us(p: Problem, c: ForwardConfig) -> float:
    """Microseconds until the launch of `forward_schedule` ends."""
    return _end_us(p, c, forward_schedule(p, c), _tiles(p, c), 0)


def backward_end_us(p: Problem, c: BackwardConfig) -> float:
    """The same of `backward_schedule`, where all gradients are asked for."""
    return _end_us(
        p, c, backward_schedule(p, c, True, True, True), _tiles(p, c), _jobs(p, c, True, True, True, False)[2]
    )
