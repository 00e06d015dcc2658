"""The protocol of a launch, played through in plain Python: it ends, does everything once, and is well balanced.

The player keeps the kernels' rules (claims by ticket, waits for row blocks, jobs after tiles) and lets only so many
programs be resident at a time, as beside another kernel that holds most SMs.
"""

import heapq
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from fusedlora.config import Problem, backward_config, forward_config
from fusedlora.schedule import Schedule, backward_schedule, cdiv, forward_schedule, shrink_us, tile_us

SHAPES = {
    "square": (8192, 4096, 4096, 16),
    "wide-rank": (8192, 4096, 4096, 64),
    "up": (8192, 14336, 4096, 16),
    "down": (8192, 4096, 14336, 16),
    "key-value": (8192, 1024, 4096, 16),
    "short": (2048, 4096, 4096, 16),
    "shorter": (512, 4096, 4096, 16),
    "token": (1, 4096, 4096, 16),
    "ragged": (1000, 4104, 1032, 5),
    "long": (131072, 2048, 2048, 8),
}


class Launch:
    """The shared state of one launch; `program` is what one program does, as a generator of pauses and waits."""

    def __init__(self, p: Problem, config, schedule: Schedule, jobs: int) -> None:
        self.p, self.config, self.schedule, self.jobs = p, config, schedule, jobs
        self.ticket = self.job = self.done = 0
        self.blocks = cdiv(p.M, config.SHRINK_M)
        self.progress: Counter[int] = Counter()
        self.tiles_m, self.tiles_n = cdiv(p.M, config.BLOCK_M), cdiv(p.out, config.BLOCK_N)
        self.finished: Counter[tuple[str, int]] = Counter()

    def row(self, tile: int) -> int:
        group = self.config.GROUP_M * self.tiles_n
        first = tile // group * self.config.GROUP_M
        rows = min(self.tiles_m - first, self.config.GROUP_M)
        return (first + tile % group % rows) * self.config.BLOCK_M

    def awaited(self, row: int) -> tuple[int, int]:
        """The progress word of a tile's rows and the count to wait for, as the kernels' progress_of."""
        c = self.config
        if c.SHRINK_M < c.BLOCK_M:
            return row // c.BLOCK_M, cdiv(min(self.p.M - row, c.BLOCK_M), c.SHRINK_M)
        block = row // c.SHRINK_M
        return block % self.schedule.num_tasks, block // self.schedule.num_tasks + 1

    def program(self) -> Iterator[float | tuple[int, int]]:
        """Yields microseconds to be busy for, or (word, count) of published row blocks to wait for (word −1: all)."""
        tasks = self.schedule.num_tasks
        ticket, self.ticket = self.ticket, self.ticket + 1
        while ticket < tasks:
            for block in range(ticket, self.blocks, tasks):
                yield shrink_us(self.p, self.config)
                row = block * self.config.SHRINK_M
                self.progress[self.awaited(row)[0]] += 1
                self.finished["block", block] += 1
            self.done += 1
            ticket, self.ticket = self.ticket, self.ticket + 1
        place = ticket - tasks
        if place < self.schedule.tile_programs:
            for tile in range(place, self.tiles_m * self.tiles_n, self.schedule.tile_programs):
                yield tile_us(self.p, self.config)
                yield self.awaited(self.row(tile))
                self.finished["tile", tile] += 1
        if self.jobs:
            yield -1, tasks
        while self.job < self.jobs:
            job, self.job = self.job, self.job + 1
            yield 3.0
            self.finished["job", job] += 1

    def ready(self, wait: tuple[int, int]) -> bool:
        word, count = wait
        return (self.done if word < 0 else self.progress[word]) >= count


def play(launch: Launch, resident: int, seed: int) -> float:
    """The time at which the last program leaves. Fails where the resident programs wait for one that is not."""
    order = random.Random(seed)
    waiting_to_start = launch.schedule.num_programs
    running: list[tuple[float, float, Iterator]] = []
    blocked: list[tuple[Iterator, tuple[int, int]]] = []
    now = 0.0
    while waiting_to_start or running or blocked:
        while waiting_to_start and len(running) + len(blocked) < resident:
            heapq.heappush(running, (now, order.random(), launch.program()))
            waiting_to_start -= 1
        woken = [item for item in blocked if launch.ready(item[1])]
        blocked = [item for item in blocked if not launch.ready(item[1])]
        for program, _ in woken:
            heapq.heappush(running, (now, order.random(), program))
        assert running, f"{len(blocked)} programs wait, {waiting_to_start} have not started: nobody can go on"
        now, _, program = heapq.heappop(running)
        step = next(program, None)
        if isinstance(step, tuple):
            blocked.append((program, step))
        elif step is not None:
            heapq.heappush(running, (now + step * order.uniform(0.9, 1.1), order.random(), program))
    return now


def launches(shape: tuple[int, int, int, int]) -> Iterator[Launch]:
    M, out, depth, r = shape
    p = Problem(M, out, depth, r, 2, False, 90, 132)
    forward, backward = forward_config(p), backward_config(p)
    yield Launch(p, forward, forward_schedule(p, forward), 0)
    schedule = backward_schedule(p, backward, True, True, True)
    yield Launch(p, backward, schedule, schedule.parts * cdiv(out, backward.STRIPE_N) + 64)


@pytest.mark.parametrize("resident", [1, 2, 7, 131, 132])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_everything_is_done_once_however_few_are_resident(shape, resident: int) -> None:
    for launch in launches(shape):
        play(launch, resident, seed=resident)
        expected = {("block", b) for b in range(launch.blocks)} | {("job", j) for j in range(launch.jobs)}
        expected |= {("tile", t) for t in range(launch.tiles_m * launch.tiles_n)}
        assert launch.finished == Counter(expected)


@pytest.mark.parametrize("name", ["square", "up", "down", "short"])
def test_tiles_are_not_kept_waiting(name: str) -> None:
    """The forward ends within 8 % of the tiles' own rounds: shrink tasks find their place beside them."""
    launch = next(launches(SHAPES[name]))
    rounds = cdiv(launch.tiles_m * launch.tiles_n, launch.p.num_sms) * tile_us(launch.p, launch.config)
    assert play(launch, launch.p.num_sms, seed=0) <= 1.08 * rounds * 1.1


def test_the_player_notices_a_deadlock() -> None:
    """Were tiles computed before every shrink task is claimed, one resident program would wait for ever."""

    class Broken(Launch):
        def program(self):
            yield 0, 1

    launch = next(launches(SHAPES["square"]))
    with pytest.raises(AssertionError, match="nobody can go on"):
        play(Broken(launch.p, launch.config, launch.schedule, 0), 1, seed=0)
