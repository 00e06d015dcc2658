"""python -m fusedlora tune: measures which configurations of the kernels are fastest on this GPU, for given shapes.

A configuration is only timed after a child process found its numbers right, and only kept where it beats the
heuristic's in interleaved rounds: of Triton's kernels and, where they are built, of csrc's. The best of each are then
timed beside each other and PyTorch's own products. The table goes to the user's cache directory, where the launchers,
and whoever chooses between these, look for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import command_line, tuning
from .command_line import integer, integers
from .config import Problem
from .cuda_config import AnyConfig
from .tuning_candidates import STEPS, variants

if TYPE_CHECKING:
    from .calls import Call
    from .timing import Spread
    from .tune_check import Shape

# Rounds of a first look, and of the last comparison with the heuristic.
LOOK, LAST = 7, 25
# What a configuration must gain for an entry: less is within the noise of a GPU's clocks.
LEAST_GAIN = 0.01


class Tools(Protocol):
    """What tune_gpu.OnGpu gives; tests put something else in its place."""

    def takes_cuda(self, direction: str, shape: Shape) -> bool: ...

    def reasons(self, kernel: str, shape: Shape, configs: Sequence[AnyConfig]) -> list[str | None]: ...

    def times(
        self, direction: str, shape: Shape, ways: Sequence[AnyConfig | None], rounds: int
    ) -> list[tuple[float, Spread] | None]: ...


@dataclasses.dataclass
class Outcome:
    """What became of one kernel at one shape; `entry` is None where the heuristic's configuration stays."""

    config: AnyConfig  # which is taken from now on
    entry: tuning.Entry | None
    us: float
    heuristic_us: float
    cuda_us: float | None = None  # csrc's, where they are built and take such calls
    products_us: float | None = None  # PyTorch's, where "auto" may take them
    tried: int = 0
    wrong: list[tuple[AnyConfig, str]] = dataclasses.field(default_factory=list)


def tune_kernel(kernel: str, shape: Shape, problem: Problem, tools: Tools, say: Callable[[str], None]) -> Outcome:
    """Varies one group of fields after another around the best so far, the heuristic's configuration at first."""
    direction, heuristic = tuning.direction_of(kernel), tuning.heuristic(kernel, problem)
    best, outcome = heuristic, Outcome(heuristic, None, 0.0, 0.0)
    for step in STEPS[kernel]:
        candidates = variants(best, problem, step)
        say(f"{kernel}: checking {len(candidates)} configurations of the {step}")
        reasons = tools.reasons(kernel, shape, candidates)
        outcome.tried += len(candidates)
        outcome.wrong += [(config, reason) for config, reason in zip(candidates, reasons) if reason is not None]
        right = [config for config, reason in zip(candidates, reasons) if reason is None]
        say(f"{kernel}: timing {len(right)} configurations of the {step}")
        best = _fastest(direction, shape, [best, *right], tools)
    base, last = tools.times(direction, shape, [heuristic, best], LAST)
    if base is None:
        raise RuntimeError(f"the {kernel} kernel's outputs are not finite for {shape}")
    outcome.us = outcome.heuristic_us = base[0]
    if best != heuristic and last is not None:
        us, spread = last
        if spread.median <= 1.0 - LEAST_GAIN and spread.p90 < 1.0:
            outcome.config, outcome.us = best, base[0] * spread.median
            outcome.entry = tuning.Entry(kernel, problem, best, outcome.us, base[0])
    return outcome


def compare(direction: str, shape: Shape, outcome: Outcome, cuda: Outcome | None, tools: Tools) -> None:
    """Tells outcome, Triton's, what csrc's best configuration and PyTorch's products take beside its own."""
    products = shape.adapter == shape.dtype != "fp32" and not shape.dropout  # else "auto" takes none
    others: dict[str, AnyConfig | None] = {} if cuda is None else {"cuda": cuda.config}
    others |= {"products": None} if products else {}
    us: dict[str, float] = {}
    if others:
        _, *times = tools.times(direction, shape, [outcome.config, *others.values()], LAST)
        us = {name: outcome.us * time[1].median for name, time in zip(others, times) if time is not None}
    outcome.cuda_us, outcome.products_us = us.get("cuda"), us.get("products")


def _fastest(direction: str, shape: Shape, configs: list[AnyConfig], tools: Tools) -> AnyConfig:
    """The first of the configurations unless another takes less than its time."""
    times = tools.times(direction, shape, configs, LOOK)
    shares = [(t[1].median, index) for index, t in enumerate(times) if t is not None and index > 0]
    share, index = min(shares, default=(1.0, 0))
    return configs[index if share < 1.0 else 0]


def shapes_of(path: Path, rows: Sequence[int], ranks: Sequence[int], settings: dict[str, Any]) -> list[Shape]:
    """Shapes of a JSON file: a list of objects with Shape's fields, or a model's config.json in Hugging Face's format.

    Raises ValueError where it is neither.
    """
    from .tune_check import Shape

    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, list):
        try:
            return [Shape(**settings | shape) for shape in data]
        except TypeError as error:
            raise ValueError(f"{path}: a shape takes M, in_features, out_features and r ({error})") from error
    try:
        hidden, heads = data["hidden_size"], data["num_attention_heads"]
        size = data.get("head_dim") or hidden // heads
        kv = data.get("num_key_value_heads") or heads
        layers = [(hidden, heads * size), (hidden, kv * size), (heads * size, hidden)]
        layers += [(hidden, data["intermediate_size"]), (data["intermediate_size"], hidden)]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is no list of shapes and no decoder's config.json: {error} is missing") from error
    layers = list(dict.fromkeys(layers))
    return [Shape(M, *layer, r, **settings) for M in rows for layer in layers for r in ranks]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=Path, help="a model's config.json, or a JSON list of shapes")
    parser.add_argument(
        "--rows", type=integers, default="8192", help="M, tokens of a call; several with commas between (%(default)s)"
    )
    parser.add_argument("--in-features", type=integer(1), default=4096, help="without --shapes (%(default)s)")
    parser.add_argument("--out-features", type=integer(1), default=4096, help="without --shapes (%(default)s)")
    parser.add_argument("--r", type=integers, default="16", help="rank; several with commas between (%(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of x and the weight")
    parser.add_argument(
        "--adapter-dtype", choices=("same", "fp32"), default="same", help="fp32: kept at fp32 precision, no autocast"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="its rate (%(default)g)")
    parser.add_argument("--device", type=command_line.device, default="cuda", help="(%(default)s)")
    parser.add_argument(
        "--jobs", type=integer(1), default=min(8, os.cpu_count() or 1), help="processes that compile (%(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run measured")


def run(args: argparse.Namespace) -> int:
    """0: done, the table says what was gained; 1: no GPU that the kernels run on; 2: no such shapes."""
    import torch

    from .tune_check import Shape

    device = torch.device(args.device)
    reason = command_line.missing_gpu(args.device) if device.type == "cuda" else f"the device is {device}"
    if reason is not None:
        print(f"tune: needs a GPU that torch can use; {reason}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    settings = {"dtype": args.dtype, "adapter": args.dtype if args.adapter_dtype == "same" else "fp32"}
    settings["dropout"] = args.dropout
    try:
        if args.shapes is None:
            layer = args.in_features, args.out_features
            shapes = [Shape(M, *layer, r, **settings) for M in args.rows for r in args.r]
        else:
            shapes = shapes_of(args.shapes, args.rows, args.r, settings)
        refuse(shapes, device)
    except (OSError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    from .tune_gpu import OnGpu

    gpu = tuning.gpu_of(device)
    assert gpu is not None
    path = tuning.user_path(gpu)
    table = tuning.Table(gpu, path=path) if args.fresh else tuning.read(path, gpu)
    bar = Bar()
    tools = OnGpu(device, args.jobs, bar.count)
    work = [
        (shape, direction, tools.takes_cuda(direction, shape))
        for shape in shapes
        for direction in ("forward", "backward")
    ]
    bar.total = sum(1 + takes_cuda for *_, takes_cuda in work)
    print(f"{gpu.name}, sm_{gpu.capability}, {gpu.num_sms} SMs; {len(shapes)} shapes, {bar.total} kernels in all")
    for shape, direction, takes_cuda in work:
        problem = shape.problem(direction, gpu.capability, gpu.num_sms)
        found: dict[str, Outcome] = {}
        for kernel in (*([tuning.cuda_kernel(direction)] if takes_cuda else []), direction):
            outcome = found[kernel] = tune_kernel(kernel, shape, problem, tools, bar.say)
            table.entries.drop(kernel, problem)
            if outcome.entry is not None:
                table.entries.put(outcome.entry)
            if kernel == direction:
                bar.say(f"{direction}: timing the best beside each other")
                compare(direction, shape, outcome, found.get(tuning.cuda_kernel(direction)), tools)
                table.compared.drop(direction, problem)
                if (outcome.cuda_us, outcome.products_us) != (None, None):
                    times = outcome.us, outcome.cuda_us, outcome.products_us
                    table.compared.put(tuning.Compared(direction, problem, *times))
            tuning.write(table, path)  # after each: a run that is stopped keeps what it found
            bar.done(report(kernel, shape, outcome))
    print(f"{len(table.entries.items)} entries in {path}")
    return 0


def call_of(shape: Shape, device: Any, direction: str = "forward") -> Call:
    """The call that is tuned, as one that names its backend."""
    import torch

    from .calls import Call
    from .dropout import MAX_P
    from .tune_check import DTYPES

    x, adapter = DTYPES[shape.dtype], DTYPES[shape.adapter]
    noise = "" if shape.dropout == 0.0 else "seed" if shape.dropout <= MAX_P else "mask"
    return Call(
        True, device, x, adapter, adapter, shape.out_features, shape.in_features, shape.r,
        noise, (shape.in_features, 1, 0), "high" if x is torch.float32 else "", direction=direction,
    )  # fmt: skip


def refuse(shapes: Sequence[Shape], device: Any) -> None:
    """Raises ValueError for a shape that the kernels do not take."""
    from . import backends

    for shape in shapes:
        if shape.M < 1 or not 0.0 <= shape.dropout < 1.0:
            reason: str | None = f"M is {shape.M}, dropout is {shape.dropout}; they must be at least 1, and in [0, 1)"
        else:
            reason = backends.TRITON.why_not(call_of(shape, device))
        if reason is not None:
            raise ValueError(f"{shape}: {reason}")


def report(kernel: str, shape: Shape, outcome: Outcome) -> str:
    """What one kernel gained at one shape, in a line."""
    text = f"{str(shape):<44} {kernel:<13} {outcome.heuristic_us:9.1f} → {outcome.us:9.1f} µs"
    gain = 1.0 - outcome.us / outcome.heuristic_us
    text += f"  {-100 * gain:+5.1f} %" if outcome.entry else "  the heuristic's stays"
    text += f"  ({outcome.tried} tried, {len(outcome.wrong)} of them wrong or not possible)"
    others = {"the CUDA kernels": outcome.cuda_us, "PyTorch's products": outcome.products_us}
    taken = {name: us for name, us in others.items() if us is not None}
    least = min(taken.values(), default=outcome.us)
    for name, us in taken.items():
        text += f"; {name} take {us:.1f} µs" + (": auto takes those" if us == least < outcome.us else "")
    return text


class Bar:
    """A progress bar on a terminal's last line of stderr; elsewhere only the finished lines on stdout."""

    def __init__(self) -> None:
        self.total, self.finished, self.begin, self.text = 1, 0, time.monotonic(), ""
        self.shown = sys.stderr.isatty()

    def say(self, text: str) -> None:
        self.text = text
        self.count(0)

    def count(self, number: int) -> None:
        if self.shown:
            full = round(20 * self.finished / self.total)
            clock = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self.begin))
            line = f"[{'█' * full}{'·' * (20 - full)}] {self.finished}/{self.total} {clock} {self.text} {number or ''}"
            print(f"\r\033[K{line[:118]}", end="", file=sys.stderr, flush=True)

    def done(self, line: str) -> None:
        self.finished += 1
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(line, flush=True)
