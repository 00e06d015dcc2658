"""Configurations and schedules are valid wherever the heuristics are asked."""

import dataclasses
import itertools

import pytest

from fusedlora.config import SHARED_MEMORY, BackwardConfig, Problem, backward_config, check_config, forward_config
from fusedlora.schedule import MAX_TASKS, backward_schedule, cdiv, forward_schedule

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


def test_every_choice_is_valid() -> None:
    for p in PROBLEMS:
        forward, backward = forward_config(p), backward_config(p)
        check_config(forward)
        check_config(backward)
        for schedule in (forward_schedule(p, forward), backward_schedule(p, backward, True, True, True)):
            assert 1 <= schedule.num_tasks <= min(MAX_TASKS, cdiv(p.M, 16)), p
            assert 1 <= schedule.tile_programs <= schedule.num_programs <= p.num_sms, p
            # Claims leave `num_programs` places; the tiles need the first `tile_programs` of them.
            assert schedule.num_tasks <= schedule.num_programs, p


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
