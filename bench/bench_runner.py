"""One contender over every set of a case: its calls, its check against float64, its timers."""

import functools
import math
from collections.abc import Callable

import torch
from bench_cases import Case
from bench_check import OUTPUTS, Expected, compare, error_limit
from bench_contenders import Contender, assert_backend
from bench_layers import Built, Layer
from bench_rows import Effort
from torch import Tensor

from fusedlora import explain
from fusedlora.timing import GraphTimer, WallTimer, peak_memory, synchronize

# A GPU takes microseconds for a few rows: many calls a graph, so that no gap between two replays is seen.
DECODE_CYCLES = 8


class Runner:
    """Raises what a contender's build raises."""

    def __init__(self, contender: Contender, case: Case, layers: list[Layer], device: torch.device) -> None:
        self.contender, self.case, self.layers, self.device = contender, case, layers, device
        self.built: list[Built] = [contender.build(layer, case) for layer in layers]
        self.errors: dict[str, float] = {}
        self.peak_bytes: int | None = None
        self.config: str | None = None

    def forward(self, i: int) -> Tensor:
        with self.contender.context(self.device, self.case):
            return self.built[i].call(self.layers[i].x)

    def decode(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.forward(i)

    def backward(self, i: int, y: Tensor, *, retain: bool = False) -> tuple[Tensor, ...]:
        wrt = (self.layers[i].x, *self.built[i].parameters)
        return torch.autograd.grad(y, wrt, self.layers[i].dy, retain_graph=retain)

    def training(self, i: int) -> tuple[Tensor, ...]:
        y = self.forward(i)
        return (y.detach(), *self.backward(i, y))

    def step(self, *, only_decode: bool) -> tuple[Tensor, ...]:
        """Outputs of the last set."""
        last = len(self.layers) - 1
        return (self.decode(last),) if only_decode else self.training(last)

    def check(self, session: str, expected: Expected, *, only_decode: bool) -> None:
        """Compare the last set's outputs with float64, ours as calls that their backend takes; note errors and memory.

        session: the backend of rows that have none of their own.

        Raises:
            WrongResult, BackendMismatch: it fails.
        """
        last = len(self.layers) - 1
        step = functools.partial(self.step, only_decode=only_decode)
        if self.contender.ours:
            forward, backward = (self.contender.taker(way, session) for way in ("forward", "backward"))
            if only_decode:
                assert_backend(forward, step)
            else:
                y = assert_backend(forward, lambda: self.forward(last))
                assert_backend(backward, lambda: self.backward(last, y))
                del y
            with self.contender.context(self.device, self.case):
                self.config = explain(self.layers[last].x, self.built[last].call).config
        self._note_kept(True)
        outputs = step()
        right = expected.of(self.contender.adapter, self.contender.feature, self.built[last].kept)
        self._note_kept(False)
        self.errors = compare(outputs, right[:1] if only_decode else right, error_limit(self.case))
        del outputs, right
        step()  # the first calls allocate workspaces that stay
        self.peak_bytes = peak_memory(step, self.device)

    def _note_kept(self, wanted: bool) -> None:
        """Only where it is read: what dropout keeps would count in the peak memory."""
        kept = self.built[-1].kept
        kept.wanted, kept.read = wanted, None

    def calls(self, group: str) -> tuple[list[Callable], list[Callable] | None]:
        """The calls to time and, for backward alone, what must run before each of them."""
        n = range(len(self.layers))
        if group == "decode":
            cycles = DECODE_CYCLES if self.device.type == "cuda" else 1
            return [lambda i=i: self.decode(i) for i in n] * cycles, None
        if group == "forward":
            return [lambda i=i: self.forward(i) for i in n], None
        if group == "backward":
            # Retained, a replay finds what forward saved untouched. A compiled backward may refuse that, since it
            # uses saved memory again; its replays then read overwritten numbers, at the same speed.
            retain = not self.contender.compiled
            backward = [lambda y, i=i: self.backward(i, y, retain=retain) for i in n]
            return backward, [lambda i=i: self.forward(i) for i in n]
        return [lambda i=i: self.training(i) for i in n], None

    def timer(
        self, group: str, stream: "torch.cuda.Stream | None", effort: Effort, expected: Expected
    ) -> GraphTimer | WallTimer:
        """A timer of the group's calls: on a stream by graph replay, whose outputs are checked; else of wall time.

        Raises:
            WrongResult: a replay's outputs are wrong.
        """
        calls, prepare = self.calls(group)
        if stream is None or group == "module":
            return WallTimer(calls, device=self.device, prepare=prepare, block_seconds=effort.wall_block_seconds)
        self._note_kept(True)
        # the check has warmed up one set: a pass over all of them is enough
        timer = GraphTimer(calls, stream=stream, prepare=prepare, warmup=1, block_seconds=effort.block_seconds)
        self._check_replay(group, timer, expected)
        self._note_kept(False)
        return timer

    def _check_replay(self, group: str, timer: GraphTimer, expected: Expected) -> None:
        """The captured graph must give the right numbers too: its outputs are poisoned, replayed and compared."""
        outputs = timer.outputs if isinstance(timer.outputs, tuple) else (timer.outputs,)
        with torch.no_grad():
            for out in outputs:
                out.fill_(math.nan)
        timer.replay()
        synchronize(outputs[0].device)
        part = {"forward": slice(0, 1), "decode": slice(0, 1), "backward": slice(1, None)}.get(group, slice(None))
        right = expected.of(self.contender.adapter, self.contender.feature, self.built[-1].kept)
        compare(outputs, right[part], error_limit(self.case), OUTPUTS[part])
