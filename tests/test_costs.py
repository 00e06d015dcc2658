"""The choice between kernels and PyTorch's own products, against what was measured."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fusedlora import backends, costs, cuda
from fusedlora.calls import Call, backward_of, counted_rows
from fusedlora.config import Problem

MEASURED = Path(__file__).parents[1] / "bench" / "results" / "directions-h200.json"
GPU, SMS = torch.device("cuda", 0), 132


class Measured(NamedTuple):
    forward: bool
    shape: tuple[int, int, int, int]  # M, N, K, r
    us: dict[str, float]  # by backend

    def __str__(self) -> str:
        M, N, K, r = self.shape
        return f"{'forward' if self.forward else 'backward'} of M={M} {K}→{N} r={r}: {self.us}"


def measured() -> Iterator[Measured]:
    for found in json.loads(MEASURED.read_text())["shapes"]:
        case, us = found["case"], found["us"]
        for way in range(2):
            times = {name: both[way] for name, both in us.items() if name != "linear"}
            yield Measured(way == 0, (case["M"], case["N"], case["K"], case["r"]), times)


ALL = list(measured())


def chosen(call: Measured) -> str:
    M, N, K, r = call.shape
    rows, bf16 = counted_rows(M), torch.bfloat16
    asked = Call(False, GPU, bf16, bf16, bf16, N, K, r, "", (K, 1, 0), "", rows, plain=True)
    if not call.forward:
        asked = backward_of(asked)
    return backends.select("auto", asked).name


@pytest.mark.parametrize("built", [True, False])
def test_the_choice_is_near_the_best(hopper, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`built`: the CUDA kernels are there."""
    monkeypatch.setattr(cuda, "missing", lambda: None if built else "not built")
    assert len(ALL) >= 390
    losses, over = [], []
    for call in ALL:
        of_choice = call.us[chosen(call)]
        losses.append(of_choice / min(us for name, us in call.us.items() if built or name != "cuda"))
        over.append(of_choice / call.us["reference"])
    assert statistics.mean(losses) < (1.017 if built else 1.03)
    assert sum(ratio > 1.02 for ratio in over) <= 12, "of 390, as far as times can be told beforehand"
    assert max(over) < 1.3, ALL[over.index(max(over))]


def test_times_are_about_right() -> None:
    """What is compared, where it is compared: ranks that the kernels may take."""
    for kind, most in (("reference", 0.11), ("cuda", 0.12), ("triton", 0.13)):
        errors = []
        for call in ALL:
            (M, N, K, r), us = call.shape, call.us.get(kind)
            if us is None or (kind == "triton" and r > costs.MAX_RANK_FASTER):
                continue
            p = Problem(M, *((N, K) if call.forward else (K, N)), r, 2, False, 90, SMS)
            if kind == "reference":
                expected = costs.products_us(M, N, K, r, call.forward, False, SMS)
            else:
                expected = (costs.cuda_us if kind == "cuda" else costs.triton_us)(p, call.forward)
            errors.append(abs(expected / us - 1))
        assert statistics.mean(errors) < most, kind


def test_what_decides() -> None:
    def slower(M: int, N: int, K: int, r: int = 16, forward: bool = True) -> bool:
        return costs.why_slower("triton", forward, M, N, K, r, False, SMS) is not None

    assert not slower(8192, 4096, 4096) and not slower(8192, 4096, 4096, forward=False)
    assert slower(8192, 4096, 4096, 65) and slower(8192, 4096, 4096, 128, forward=False), "wide ranks"
    assert not slower(1, 512, 2048, 64) and slower(1, 512, 2048, 65), "launches decide for small weights"
    assert not slower(1, 4096, 4096) and slower(1, 4096, 4096, forward=False), "no split depth backward"
    assert slower(577, 4096, 5376), "five row blocks of 128"
    assert slower(1, 4096, 1024, forward=False) and not slower(1, 1024, 4096, forward=False), "as deep as N"
    assert costs.why_slower("triton", False, 1, 4096, 4096, 16, False, SMS) == "about 28 µs, the kernels 31"


def test_casts_are_counted() -> None:
    about = (2048, 4096, 4096, 16)
    for forward, count in ((True, 2), (False, 4)):
        plain, cast = (costs.products_us(*about, forward, converts, SMS) for converts in (False, True))
        assert cast - plain == pytest.approx(count * costs.LAUNCH_US)
