"""Compiles what the rows of a case will launch, all rows at once: Triton's passes and ptxas let other threads run.

A kernel takes one to five seconds, a case that shows every feature has about twenty, and a GPU waits for them.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from unittest import mock

import torch
from bench_runner import Runner

from fusedlora import dropout


def compile_ahead(runners: Sequence[Runner], stream: "torch.cuda.Stream | None", only_decode: bool) -> None:
    """A step of each; with dropout another one, whose seed lies on the device as in a captured call.

    What fails here fails again in the row's check, which tells.
    """
    here = threading.local()
    known = dropout.drawn_on_device

    def step(runner: Runner, captured: bool) -> None:
        here.captured = captured
        # torch has one thread for all backward passes of a device; so each runs in its own
        with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
            runner.step(only_decode=only_decode)

    def drawn_on_device(x: torch.Tensor) -> bool:
        return getattr(here, "captured", False) or known(x)

    steps = [(runner, False) for runner in runners]
    steps += [(runner, True) for runner in runners if runner.contender.feature == "dropout"]
    with mock.patch.object(dropout, "drawn_on_device", drawn_on_device), ThreadPoolExecutor() as pool:
        wait([pool.submit(step, *one) for one in steps])
