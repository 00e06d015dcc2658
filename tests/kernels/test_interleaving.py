"""Both kernels in triton's interpreter with their programs taking turns: bits, waits and words for any schedule.

By itself the interpreter runs one program after another. Here each has a thread, and one of them runs at a time: at
every atomic the turn goes to a program drawn at random from those that are resident, of which there are only so many,
as on a GPU that other work fills.
"""

import contextlib
import dataclasses
import functools
import random
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter

from fusedlora.config import BackwardConfig, DecodeConfig, ForwardConfig
from fusedlora.kernels import backward, decode, forward, launch
from fusedlora.memory import StreamMemory, device_memory
from fusedlora.schedule import Schedule
from fusedlora.testing import Inputs, make_inputs, poisoned_memory

pytestmark = pytest.mark.skipif(not launch.INTERPRET, reason="needs TRITON_INTERPRET=1")

SMALL_FORWARD = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
SMALL_FORWARD |= {"RANK_K": 16, "SHRINK_M": 32, "SHRINK_K": 32, "SHRINK_STAGES": 2}
SMALL_BACKWARD = SMALL_FORWARD | {"STRIPE_N": 32, "STRIPE_M": 32, "STRIPE_STAGES": 2, "stripe_rows": 64}
SEED = torch.tensor([2**62 + 0x123456789ABCDEF])

M, K, N, R = 200, 32, 64, 8
BLOCKS = 7
PROGRAMS = 6
# num_tasks, shared_blocks, side_programs, tile_programs, job_period
SCHEDULES = {
    "every-program-has-tasks": (6, 7, 0, 6, 0),
    "few-tasks": (2, 7, 0, 6, 0),
    "jobs-after-every-tile": (2, 7, 0, 6, 1),
    "jobs-in-turns": (6, 7, 0, 4, 2),
    "beside-the-tiles": (0, 0, 3, 3, 0),
    "both": (4, 4, 2, 4, 0),
    "few-tiles": (3, 5, 1, 1, 1),
}
KINDS = {
    "plain": {},
    "db-stripes": {"fuse_db": False},
    "fp32-adapters": {},
    "dropout": {"dropout": True},
    "autocast": {"autocast": True},
    "flat": {"flat": True},
    "flat-autocast": {"flat": True, "autocast": True},
    "flat-dropout": {"flat": True, "dropout": True},
}
FP32_ADAPTERS = ("fp32-adapters", "autocast", "flat-autocast")
# Far more than any test takes: programs that still wait then would wait for ever.
MAX_TURNS = 20_000


class Turns:
    """Runs `program` for each index below `count`, `resident` of them at a time."""

    def __init__(self, program: Callable[[], None], count: int, resident: int, seed: int) -> None:
        self.program, self.order, self.left = program, random.Random(seed), MAX_TURNS
        self.alive, self.resident = list(range(count)), resident
        self.events = [threading.Event() for _ in range(count)]
        self.current = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._run, args=(index,)) for index in self.alive]
        for thread in threads:
            thread.start()
        self._wake()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def switch(self) -> None:
        """Goes on once it is this program's turn again."""
        self.left -= 1
        if self.left < 0:
            raise TimeoutError(f"{len(self.alive)} programs still wait: nobody can go on")
        me = self.current
        self._wake()
        self._wait(me)

    def _wake(self) -> None:
        if self.alive:
            self.events[self.order.choice(self.alive[: self.resident])].set()

    def _wait(self, index: int) -> None:
        self.events[index].wait()
        self.events[index].clear()
        self.current = index
        interpreter.interpreter_builder.grid_idx = (index, 0, 0)
        if self.error is not None:
            raise self.error

    def _run(self, index: int) -> None:
        try:
            self._wait(index)
            self.program()
        except BaseException as error:
            self.error = self.error or error
        self.alive.remove(index)
        self._wake()


class InterleavedLauncher(launch.Launcher):
    """A Launcher whose programs take turns. `resident` and `seed` are set on a subclass; see `interleaved`."""

    resident: int
    seed: int

    def __call__(self, stream: StreamMemory, arguments: tuple[object, ...]) -> None:
        builder = interpreter.interpreter_builder
        program = functools.partial(self.kernel[(1,)], *arguments, **self.constants)
        turns = Turns(program, self.num_programs, self.resident, self.seed)
        real_rmw = builder.create_atomic_rmw

        def create_atomic_rmw(*args: object) -> object:
            # before, what is published is late; after, what a claim is of
            before = turns.order.random() < 0.5
            if before:
                turns.switch()
            found = real_rmw(*args)
            if not before:
                turns.switch()
            return found

        # The language is patched once for all threads, also as the functions in triton's own modules see it, and each
        # executor is told of the whole grid.
        scopes = [interpreter._patch_lang(fn) for fn in (self.kernel.fn, tl.sum.fn)]
        try:
            with (
                mock.patch.object(interpreter, "_patch_lang", lambda fn: mock.Mock()),
                mock.patch.multiple(
                    builder,
                    create_atomic_rmw=create_atomic_rmw,
                    set_grid_dim=lambda *grid: None,
                    set_grid_idx=lambda *index: None,
                ),
            ):
                builder.grid_dim = (self.num_programs, 1, 1)
                turns.run()
        finally:
            for scope in reversed(scopes):
                scope.restore()


def interleaved(resident: int, seed: int) -> type[InterleavedLauncher]:
    """The Launcher to put in place of a module's own."""
    return type("Interleaved", (InterleavedLauncher,), {"resident": resident, "seed": seed})


@contextlib.contextmanager
def scheduled(counts: tuple[int, ...], launcher: type[launch.Launcher] = launch.Launcher) -> Iterator[None]:
    """Launches take this schedule and this launcher."""

    def with_counts(schedule: Schedule) -> Schedule:
        names = ("num_tasks", "shared_blocks", "side_programs", "tile_programs", "job_period")
        return dataclasses.replace(schedule, num_programs=PROGRAMS, **dict(zip(names, counts)))

    with contextlib.ExitStack() as stack:
        for module, name in ((forward, "forward_schedule"), (backward, "backward_schedule")):
            made = getattr(module, name)
            stack.enter_context(
                mock.patch.object(module, name, lambda *args, made=made, **named: with_counts(made(*args, **named)))
            )
            stack.enter_context(mock.patch.object(module, "_plan", module._plan.__wrapped__))
            stack.enter_context(mock.patch.object(module, "Launcher", launcher))
        yield


def launch_both(
    i: Inputs, fuse_db: bool = True, dropout: bool = False, autocast: bool = False, flat: bool = False
) -> list[torch.Tensor]:
    """y, dX, dA, dB; all that the launchers allocate starts as NaN."""
    common = {"scaling": 0.5, "adapter_dtype": i.x.dtype if autocast else i.lora_A.dtype}
    common |= {"seed": SEED, "dropout_p": 0.3} if dropout else {}
    forward_config = ForwardConfig(**SMALL_FORWARD, FLAT=flat)
    backward_config = BackwardConfig(**SMALL_BACKWARD, FUSE_DB=fuse_db, FLAT=flat and not dropout)
    with poisoned_memory():
        y, s = forward.lora_forward(
            i.x, i.weight, i.lora_A, i.lora_B, i.bias, save_s=True, config=forward_config, **common
        )
        gradients = backward.lora_backward(
            i.dy, i.x, i.weight, i.lora_A, i.lora_B, s,
            need_dx=True, need_dA=True, need_dB=True, config=backward_config, **common,
        )  # fmt: skip
    return [y, *gradients]


@functools.cache
def one_after_another(kind: str) -> tuple[Inputs, list[torch.Tensor]]:
    """Inputs, and what the programs give that the interpreter runs by itself."""
    i = make_inputs(M, K, N, R, torch.float16, torch.float32 if kind in FP32_ADAPTERS else None)
    with scheduled(SCHEDULES["every-program-has-tasks"]):
        return i, launch_both(i, **KINDS[kind])


@pytest.mark.parametrize("resident", [1, PROGRAMS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_bits_do_not_depend_on_whose_turn_it_is(counts, kind: str, resident: int) -> None:
    i, expected = one_after_another(kind)
    assert not any(t.isnan().any() for t in expected)
    with scheduled(counts, interleaved(resident, seed=sum(counts))):
        got = launch_both(i, **KINDS[kind])
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert not any(words.any() for words in device_memory(i.x.device).slabs)


@pytest.mark.parametrize("resident", [1, 2, PROGRAMS])
@pytest.mark.parametrize("seed", range(6))
def test_tiles_that_compute_s_wait_for_terms_alone(seed: int, resident: int) -> None:
    i = make_inputs(M, K, N, R, torch.float16, torch.float32)
    config = ForwardConfig(**SMALL_FORWARD, IN_TILES=True, FLAT=seed % 2 == 1)

    def launched() -> tuple[torch.Tensor, torch.Tensor]:
        tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
        with poisoned_memory():
            return forward.lora_forward(*tensors, scaling=0.5, adapter_dtype=i.x.dtype, save_s=True, config=config)

    counts = (0, 0, 0, PROGRAMS, 0)
    with scheduled(counts):
        expected = launched()
    assert not any(t.isnan().any() for t in expected)
    with scheduled(counts, interleaved(resident, seed)):
        assert all(torch.equal(a, b) for a, b in zip(launched(), expected))
    assert not any(words.any() for words in device_memory(i.x.device).slabs)


@pytest.mark.parametrize("resident", [1, 3, 16])
@pytest.mark.parametrize("seed", range(3))
def test_decoding_gives_the_same_bits_whoever_comes_last(resident: int, seed: int) -> None:
    """Four column blocks in four parts each, launched twice: the words must be zero in between."""
    i = make_inputs(5, 96, 128, R, torch.float16)
    config = DecodeConfig(BLOCK_N=32, BLOCK_K=32, SPLIT=4, num_warps=4, num_stages=2, early=False)

    def launched() -> tuple[torch.Tensor, torch.Tensor]:
        tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
        with poisoned_memory():
            return forward.lora_forward(*tensors, scaling=0.5, adapter_dtype=i.x.dtype, save_s=True, config=config)

    expected = launched()
    assert not any(t.isnan().any() for t in expected)
    with (
        mock.patch.object(forward, "_plan", forward._plan.__wrapped__),
        mock.patch.object(decode, "Launcher", interleaved(resident, seed)),
    ):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(launched(), expected))
    assert not any(words.any() for words in device_memory(i.x.device).slabs)


def test_a_row_block_that_nobody_takes_is_noticed() -> None:
    i = make_inputs(M, K, N, R, torch.float16)
    with scheduled((3, BLOCKS - 1, 0, 3), interleaved(PROGRAMS, 0)):
        with pytest.raises(Exception, match="nobody can go on"):
            launch_both(i)
    device_memory.cache_clear()  # its words were left as they were


def test_tiles_that_nobody_takes_are_noticed() -> None:
    i = make_inputs(M, K, N, R, torch.float16)
    with scheduled((3, BLOCKS, 0, PROGRAMS + 1, 0), interleaved(PROGRAMS, 0)):
        assert launch_both(i)[0].isnan().any()
