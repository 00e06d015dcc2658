"""Configurations and schedules are valid wherever the heuristics are asked."""

import dataclasses
import itertools
import time

import pytest

from fusedlora.config import (
    SHARED_MEMORY,
    BackwardConfig,
    Problem,
    TileConfig,
    backward_config,
    cdiv,
    check_config,
    decode_config,
    decode_rows,
    forward_config,
)
from fusedlora.schedule import MAX_PARTS, Schedule, backward_schedule, forward_schedule

PROBLEMS = [
    Problem(M, out, depth, r, itemsize, split, capability, num_sms)
    for M, (out, depth), r, (itemsize, split), (capability, num_sms) in itertools.product(
        (1, 63, 500, 512, 2048, 8192, 131072),
        ((8, 8), (4096, 4096), (14336, 4096), (1024, 4096), (128256, 2048)),
        (1, 16, 33, 64, 256),
        ((2, False), (2, True), (4, False)),
        ((75, 20), (80, 108), (86, 84), (90, 132), (120, 170), (999, 3)),
    )
]


def check_schedule(p: Problem, config: TileConfig, s: Schedule) -> None:
    blocks = cdiv(p.M, config.SHRINK_M) if config.has_tasks else 0
    assert 1 <= s.num_programs <= p.num_sms, (p, s)
    assert 1 <= s.parts <= MAX_PARTS, (p, s)
    # Every row block is somebody's, and nobody is without one, which would count as finished what is not.
    assert 0 <= s.num_tasks <= s.shared_blocks <= blocks, (p, s)
    assert (s.num_tasks == 0) == (s.shared_blocks == 0), (p, s)
    assert 0 <= s.side_programs <= blocks - s.shared_blocks, (p, s)
    assert (s.side_programs == 0) == (s.shared_blocks == blocks), (p, s)
    # Every program gets a place, and the first of them compute tiles.
    assert 1 <= s.tile_programs <= s.num_programs - s.side_programs, (p, s)
    # Turns come only where there are tiles to take them between.
    assert s.job_period == 0 or s.job_period * s.tile_programs < cdiv(p.M, config.BLOCK_M) * cdiv(p.out, config.BLOCK_N)


def test_every_choice_is_valid() -> None:
    for p in PROBLEMS:
        forward, backward = forward_config(p), backward_config(p)
        check_config(forward)
        check_config(backward)
        check_schedule(p, forward, forward_schedule(p, forward))
        check_schedule(p, backward, backward_schedule(p, backward, True, True, True))


def test_few_rows_have_a_program_for_nearly_every_sm() -> None:
    for p in PROBLEMS:
        config = decode_config(p)
        if p.M > 64 or p.r > 64:
            assert config is None
        if config is None:
            continue
        check_config(config)
        programs = cdiv(p.out, config.BLOCK_N) * config.SPLIT
        full = config.SPLIT * config.BLOCK_N * decode_rows(p.M) == 8192  # of parts, in registers
        assert config.SPLIT == 8 or full or programs >= 0.8 * p.num_sms or p.depth < 1024 * config.SPLIT, (p, config)
        assert config.SPLIT == 1 or p.depth >= 512 * config.SPLIT, (p, config)


def test_a_launch_without_tiles_or_shrink_tasks() -> None:
    p = Problem(8192, 4096, 4096, 16, 2, False, 90, 132)
    config = backward_config(p)
    without_dx = backward_schedule(p, config, False, True, True)
    assert without_dx.tile_programs == 0 and without_dx.shared_blocks == cdiv(p.M, config.SHRINK_M)
    only_db = backward_schedule(p, config, False, False, True)
    assert only_db.counts == (0, 0, 0, 0) and only_db.num_programs == p.num_sms


@pytest.mark.parametrize("p", [Problem(131072, 128256, 8192, 16, 2, False, 90, 132)], ids=["128k-rows-of-logits"])
def test_a_schedule_takes_little_of_the_hosts_time(p: Problem) -> None:
    """Each new number of rows makes its own."""
    config = backward_config(p)
    begin = time.thread_time()  # other processes may be at work
    backward_schedule.__wrapped__(p, config, True, True, True)
    assert time.thread_time() - begin < 0.1


def test_a_config_breaks_a_rule() -> None:
    good = backward_config(PROBLEMS[0])
    for field, value, rule in (
        ("BLOCK_M", 48, "power of two"),
        ("BLOCK_N", 8, "at least 16"),
        ("num_warps", 3, "4 or 8"),
        ("STRIPE_N", 512, "up to 256"),
    ):
        with pytest.raises(ValueError, match=f"{field} is {value}.*{rule}"):
            check_config(dataclasses.replace(good, **{field: value}))


def test_unknown_gpus_get_a_choice() -> None:
    assert 999 not in SHARED_MEMORY
    config = backward_config(dataclasses.replace(PROBLEMS[0], capability=999))
    assert isinstance(config, BackwardConfig)
