"""The protocol of a launch, played through in plain Python: it ends, does everything once, and is well balanced.

The player keeps the kernels' rules (claims by ticket, waits for terms, row blocks and all of T) and lets only so many
programs be resident at a time, as beside another kernel that holds most SMs.
"""

import dataclasses
import heapq
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from fusedlora.config import BackwardConfig, Problem, TileConfig, backward_config, cdiv, forward_config
from fusedlora.schedule import (
    FIXED_WORDS,
    JOB_PERIODS,
    Schedule,
    _alternatives,
    _end_us,
    backward_schedule,
    forward_schedule,
    job_us,
    shrink_us,
    takes_turns,
    tile_us,
)

# M, in_features, out_features, r
SHAPES = {
    "square": (8192, 4096, 4096, 16),
    "wide-rank": (8192, 4096, 4096, 64),
    "up": (8192, 4096, 14336, 16),
    "down": (8192, 14336, 4096, 16),
    "key-value": (8192, 4096, 1024, 16),
    "key-value-wide-rank": (8192, 4096, 1024, 32),
    "short": (2048, 4096, 4096, 16),
    "shorter": (512, 4096, 4096, 16),
    "token": (1, 4096, 4096, 16),
    "ragged": (1000, 1032, 4104, 5),
    "long": (65536, 2048, 2048, 8),
}
KINDS = {"plain": {}, "fp32-adapters": {"split": True}, "dropout": {"dropout": True}, "autocast": {"converts": True}}

# A word and the count to wait for.
Wait = tuple[str, int]
CONVERTED, DONE = "converted", "done"


@dataclasses.dataclass
class Launch:
    """The shared state of one launch. Forward: jobs of neither kind."""

    p: Problem
    config: TileConfig
    schedule: Schedule
    conversions: int = 0
    da_jobs: int = 0
    db_jobs: int = 0
    fuse_db: bool = False

    def __post_init__(self) -> None:
        self.ticket = self.job = self.streaming = self.published = 0
        self.words: Counter[str] = Counter()
        self.finished: Counter[tuple[str, int]] = Counter()
        self.blocks = cdiv(self.p.M, self.config.SHRINK_M) if self.config.has_tasks else 0
        self.tiles_m, self.tiles_n = cdiv(self.p.M, self.config.BLOCK_M), cdiv(self.p.out, self.config.BLOCK_N)
        self.num_tiles = self.tiles_m * self.tiles_n if self.schedule.tile_programs else 0
        self.rows_a_word = max(self.config.BLOCK_M, self.config.SHRINK_M)

    def everything(self) -> Counter[tuple[str, int]]:
        counts = {"conversion": self.conversions, "block": self.blocks, "tile": self.num_tiles}
        counts["job"] = self.da_jobs + self.db_jobs
        return Counter((kind, index) for kind, count in counts.items() for index in range(count))

    def claim(self) -> int:
        self.ticket += 1
        return self.ticket - 1

    def add_to(self, word: str) -> None:
        self.words[word] += 1
        self.published += 1

    def publish(self, word: str, kind: str, index: int) -> None:
        self.add_to(word)
        self.finished[kind, index] += 1

    def row(self, tile: int) -> int:
        """First row of a tile, as by the kernels' tile_coordinates."""
        group = self.config.GROUP_M * self.tiles_n
        first = tile // group * self.config.GROUP_M
        rows = min(self.tiles_m - first, self.config.GROUP_M)
        return (first + tile % group % rows) * self.config.BLOCK_M

    def progress_of(self, row: int) -> Wait:
        """The progress word of a tile's rows and the count to wait for, as the kernels' function of this name."""
        word = row // self.rows_a_word
        rows = min(self.p.M - word * self.rows_a_word, self.rows_a_word)
        return f"progress {word}", cdiv(rows, self.config.SHRINK_M)

    def program(self) -> Iterator[float | Wait]:
        """What one program does: yields microseconds to be busy for, or what it waits for."""
        s, conversions = self.schedule, self.conversions
        ticket = self.claim()
        while ticket < conversions:
            yield 1.0
            self.publish(CONVERTED, "conversion", ticket)
            ticket = self.claim()
        task = ticket - conversions
        if task < s.num_tasks + s.side_programs:
            yield CONVERTED, conversions
        while task < s.num_tasks + s.side_programs:
            side = task >= s.num_tasks
            begin = task - s.num_tasks + s.shared_blocks if side else task
            end = self.blocks if side else s.shared_blocks
            workers = s.side_programs if side else s.num_tasks
            for block in range(begin, end, workers):
                yield shrink_us(self.p, self.config, workers)
                self.publish(self.progress_of(block * self.config.SHRINK_M)[0], "block", block)
            self.add_to(DONE)
            task = self.claim() - conversions
        place = task - s.num_tasks - s.side_programs
        tiles = range(place, self.num_tiles, s.tile_programs) if place < s.tile_programs else range(0)
        until_job = place % max(s.job_period, 1)
        if tiles and not self.config.has_tasks:
            yield CONVERTED, conversions
        for tile in tiles:
            yield tile_us(self.p, self.config)
            if self.config.has_tasks:
                yield self.progress_of(self.row(tile))
            self.finished["tile", tile] += 1
            until_job -= 1
            if tile != tiles[-1] and s.job_period and until_job < 0 and self.words[DONE] >= self.all_of_t[1]:
                until_job += s.job_period
                yield from self.one_job()
        if self.num_jobs and self.fuse_db:
            yield self.all_of_t
        while self.job < self.num_jobs:
            yield from self.one_job()

    @property
    def num_jobs(self) -> int:
        return self.da_jobs + self.db_jobs

    @property
    def all_of_t(self) -> Wait:
        return DONE, self.schedule.num_tasks + self.schedule.side_programs

    def one_job(self) -> Iterator[float | Wait]:
        job = self.job
        self.job += 1
        if job >= self.num_jobs:
            return
        assert isinstance(self.config, BackwardConfig)
        first_da = 0 if self.fuse_db else self.db_jobs
        is_da = first_da <= job < first_da + self.da_jobs
        if self.db_jobs:
            yield CONVERTED, self.conversions
        if is_da:
            yield self.all_of_t
        if self.fuse_db and not is_da:
            yield 0.5  # sums of partial ones take next to nothing
        else:
            self.streaming += 1
            yield job_us(self.p, self.config, self.schedule.parts, self.streaming)
            self.streaming -= 1
        self.finished["job", job] += 1


def play(launch: Launch, resident: int, seed: int = 0, jitter: float = 0.0) -> float:
    """The time at which the last program leaves. Fails where the resident programs wait for one that is not."""
    order = random.Random(seed)
    waiting_to_start = launch.schedule.num_programs
    running: list[tuple[float, float, Iterator[float | Wait]]] = []
    blocked: list[tuple[Iterator[float | Wait], Wait]] = []
    now, looked = 0.0, 0

    def ready(wait: Wait) -> bool:
        return launch.words[wait[0]] >= wait[1]

    while waiting_to_start or running or blocked:
        while waiting_to_start and len(running) + len(blocked) < resident:
            heapq.heappush(running, (now, order.random(), launch.program()))
            waiting_to_start -= 1
        if blocked and launch.published != looked:
            for program, wait in blocked:
                if ready(wait):
                    heapq.heappush(running, (now, order.random(), program))
            blocked = [item for item in blocked if not ready(item[1])]
            looked = launch.published
        assert running, f"{len(blocked)} programs wait, {waiting_to_start} have not started: nobody can go on"
        now, _, program = heapq.heappop(running)
        step = next(program, None)
        if isinstance(step, tuple):
            if ready(step):
                heapq.heappush(running, (now, order.random(), program))
            else:
                blocked.append((program, step))
        elif step is not None:
            heapq.heappush(running, (now + step * order.uniform(1 - jitter, 1 + jitter), order.random(), program))
    return now


def forward_launch(shape: tuple[int, int, int, int], **kind: bool) -> Launch:
    M, K, N, r = shape
    p = Problem(M, N, K, r, 2, kind.get("split", False), 90, 132, kind.get("dropout", False))
    config = forward_config(p)
    conversions = cdiv(r * K, 4096) + cdiv(r * N, 4096) if p.split or kind.get("converts") else 0
    return Launch(p, config, forward_schedule(p, config), conversions)


def backward_launch(shape: tuple[int, int, int, int], dx: bool = True, db: bool = True, **kind: bool) -> Launch:
    M, K, N, r = shape
    p = Problem(M, K, N, r, 2, kind.get("split", False), 90, 132, kind.get("dropout", False))
    config = backward_config(p)
    schedule = backward_schedule(p, config, dx, True, db)
    conversions = dx * cdiv(r * K, 4096) + cdiv(r * N, 4096) if p.split or kind.get("converts") else 0
    conversions += db * cdiv(M * r, 4096) if p.split else 0
    fuse_db = config.FUSE_DB and db
    db_jobs = cdiv(N * r, 512) if fuse_db else cdiv(N, config.STRIPE_N) * schedule.parts
    da_jobs = cdiv(K, config.STRIPE_N) * schedule.parts
    return Launch(p, config, schedule, conversions, da_jobs, db_jobs * db, fuse_db)


def launches(shape: tuple[int, int, int, int], **kind: bool) -> list[Launch]:
    return [forward_launch(shape, **kind), backward_launch(shape, **kind)]


@pytest.mark.parametrize("resident", [1, 2, 7, 131, 132])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_everything_is_done_once_however_few_are_resident(shape, kind, resident: int) -> None:
    for launch in [*launches(shape, **kind), backward_launch(shape, dx=False, **kind)]:
        play(launch, resident, seed=resident, jitter=0.5)
        assert launch.finished == launch.everything()
        assert launch.words[DONE] == launch.schedule.num_tasks + launch.schedule.side_programs


def alternatives(launch: Launch) -> list[Schedule]:
    """All that the cost model had to choose from."""
    tasks = min(launch.blocks, launch.schedule.num_programs)
    whole = dataclasses.replace(
        launch.schedule,
        num_tasks=tasks,
        shared_blocks=launch.blocks,
        side_programs=0,
        tile_programs=launch.schedule.num_programs,
        job_period=0,
    )
    periods = JOB_PERIODS if launch.num_jobs and takes_turns(launch.p, False) else (0,)
    return list({whole, *_alternatives(whole, launch.blocks, launch.num_tiles, periods)})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_alternative_is_safe(shape) -> None:
    """Whatever the cost model might pick does everything once, and the words used are those that are cleared."""
    for launch in launches(shape):
        p, c = launch.p, launch.config
        assert launch.schedule in alternatives(launch)
        for schedule in alternatives(launch):
            other = dataclasses.replace(launch, schedule=schedule)
            play(other, 3, seed=1, jitter=0.5)
            assert other.finished == other.everything()
            words = {word for word in other.words if word.startswith("progress")}
            row_words = cdiv(p.M, max(c.BLOCK_M, c.SHRINK_M))
            assert words == ({f"progress {n}" for n in range(row_words)} if launch.blocks else set())
            stripes = cdiv(p.out, c.STRIPE_N) + cdiv(p.depth, c.STRIPE_N) if isinstance(c, BackwardConfig) else 0
            assert schedule.num_words == FIXED_WORDS + row_words + stripes


def gemm_us(launch: Launch) -> float:
    """Of a tile that computes no S."""
    config = launch.config
    return tile_us(launch.p, config if config.has_tasks else dataclasses.replace(config, IN_TILES=False))


# How long forward and backward take on 132 SMs, over the rounds that their tiles alone take. The backward's tiles of
# keys and values leave little room for the row blocks, and those of 512 rows for the jobs.
BALANCE = {
    "square": (1.01, 1.06),
    "wide-rank": (1.01, 1.08),
    "up": (1.01, 1.04),
    "down": (1.01, 1.04),
    "key-value": (1.16, 1.13),  # whose forward's tiles compute S
    "key-value-wide-rank": (1.39, 1.14),
    "short": (1.01, 1.12),
    "shorter": (1.01, 1.39),
}


@pytest.mark.parametrize("name, bounds", BALANCE.items(), ids=BALANCE.keys())
def test_balance(name: str, bounds: tuple[float, float]) -> None:
    for launch, bound in zip(launches(SHAPES[name]), bounds):
        us = play(launch, 132)
        assert us <= bound * cdiv(launch.num_tiles, 132) * gemm_us(launch)
        jobs = launch.da_jobs + launch.db_jobs * (not launch.fuse_db)
        assert us == pytest.approx(_end_us(launch.p, launch.config, launch.schedule, launch.num_tiles, jobs), rel=0.11)
        others = [dataclasses.replace(launch, schedule=other) for other in alternatives(launch)]
        assert us <= 1.05 * min(play(other, 132) for other in others)


def test_the_player_notices_a_deadlock() -> None:
    """Were tiles computed before every shrink task is claimed, one resident program would wait for ever."""

    class Broken(Launch):
        def program(self) -> Iterator[float | Wait]:
            yield self.progress_of(0)

    launch = forward_launch(SHAPES["square"])
    with pytest.raises(AssertionError, match="nobody can go on"):
        play(Broken(launch.p, launch.config, launch.schedule), 1)
