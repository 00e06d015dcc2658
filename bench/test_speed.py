"""The rows of the tables: a test a group, shape and contender.

    pytest bench/ --benchmark                       everything (on a GPU: select with -k)
    pytest bench/ --benchmark -k headline           the shapes of the README's tables
    pytest bench/ --benchmark -k "training and headline and not compile"
    pytest bench/ --benchmark -k "features and headline"    what dropout, a bias, fp32 adapters and DoRA cost
    pytest bench/ --benchmark -k decode             a few rows, forward alone
    pytest bench/ --benchmark -k "training and M512 and r16 and not compile"
    pytest bench/ --benchmark -k "features and headline and not eager and not cuda"

Where the CUDA C++ kernels run, each row of ours has a twin with `cuda` in its name; those that they refuse are listed
with the reason, and so is what backend="auto" takes. A line of progress tells when a shape's kernels were compiled,
its rows checked, and a group timed.

The figures are taken outside of pytest-benchmark, in interleaved rounds over all rows of a shape, and handed to its
fixture round by round, so that its JSON, its comparison and its statistics work on them.
"""

import pytest
from bench_record import hand_over, recorded
from bench_rows import CPU_BOUND, Row


def record(benchmark, plan, group: str, case: str, contender: str) -> Row:
    """Hand the row to pytest-benchmark and to the tables; what did not run fails, a baseline is skipped."""
    row: Row = plan.row(group, case, contender)
    plan.recorded.append(row)
    if row.failed is not None:
        if row.contender.ours or contender == "frozen":
            raise AssertionError(f"{row.contender.label}, {row.case.title}: {row.failed}\n{row.trace}")
        pytest.skip(f"failed: {row.failed}")
    hand_over(benchmark, f"{group} {row.case.title}", row.times, row.as_dict())
    return row


@recorded
def test_forward(benchmark, plan, bench_group, case, contender):
    record(benchmark, plan, bench_group, case, contender)


@recorded
def test_backward(benchmark, plan, bench_group, case, contender):
    record(benchmark, plan, bench_group, case, contender)


@recorded
def test_training(benchmark, plan, bench_group, case, contender):
    row = record(benchmark, plan, bench_group, case, contender)
    if plan.measure and not plan.on_gpu and row.contender.ours:
        assert row.versus_rival.median <= CPU_BOUND, f"time over the eager arithmetic's: {row.versus_rival}"
        assert row.rival_peak_ratio <= CPU_BOUND, f"peak memory over the eager arithmetic's: {row.rival_peak_ratio}"


@recorded
def test_module(benchmark, plan, bench_group, case, contender):
    record(benchmark, plan, bench_group, case, contender)


@recorded
def test_features(benchmark, plan, bench_group, case, contender):
    record(benchmark, plan, bench_group, case, contender)


@recorded
def test_decode(benchmark, plan, bench_group, case, contender):
    record(benchmark, plan, bench_group, case, contender)
