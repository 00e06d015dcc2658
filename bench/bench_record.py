"""Hands figures taken outside of pytest-benchmark to its fixture, so that its JSON and its comparison work on them."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest


class RecordedClock:
    """A timer for pytest-benchmark that only moves by durations already taken."""

    now = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.now

    @classmethod
    def replay(cls, durations: Iterator[float]) -> None:
        cls.now += next(durations, 0.0)


recorded = pytest.mark.benchmark(timer=RecordedClock.read)


def hand_over(benchmark: Any, group: str, times: Sequence[float], facts: dict[str, Any]) -> None:
    """Seconds, one a round, and what goes into extra_info beside them."""
    benchmark.group = group
    benchmark.extra_info.update(facts)
    RecordedClock.now = 0.0
    durations = iter(times)
    benchmark.pedantic(RecordedClock.replay, args=(durations,), rounds=len(times), iterations=1)
