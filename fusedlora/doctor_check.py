"""The doctor's child process: `python -m fusedlora.doctor_check facts | check DEVICE`.

Prints JSON objects, one a line, as it goes; "stage" is what it is about to do, so that its parent can say where it
hung. May hang or die: only doctor.py starts it.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import doctor
from .explanation import explain
from .functional import lora_linear
from .testing import Inputs, eager_peft, error_ratios, exact, make_inputs, run
from .timing import WallTimer, interleave, ratios

RANK = 16
SCALING = 2.0
# M and r, for 1024 → 768. Of rank 32 Triton's tiles wait for S, of rank 16 some compute it themselves.
CHECKS = ((1, RANK), (63, RANK), (512, RANK), (512, 32))
REPEATED = ((500, RANK), (2048, 32))
# Rounding is random: at M = 1 two ways of equal quality may differ by some percent, as S and T are 16 numbers there.
# A wrong result is off by orders of magnitude; the tests hold the kernels to the eager error itself.
WORST_RATIO = 1.25


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def facts() -> None:
    cuda = torch.version.cuda and f"CUDA {torch.version.cuda}"
    hip = torch.version.hip and f"ROCm {torch.version.hip}"
    tell(stage="asking for GPUs", torch=f"{torch.__version__}, built with {cuda or hip or 'no GPU support'}")
    try:
        import triton

        tell(triton=triton.__version__)
    except Exception as error:  # a broken install raises anything; it is shown, not suffered
        tell(triton=f"cannot be imported ({type(error).__name__}: {error})")
    gpus = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            gpus[f"cuda:{index}"] = {
                "name": p.name,
                "capability": (p.major, p.minor),
                "sms": p.multi_processor_count,
                "gib": p.total_memory / 2**30,
            }
    no_gpu = "none that this torch can use" if cuda or hip else "none: this torch is a CPU build"
    threads = torch.get_num_threads()
    tell(gpus=gpus, no_gpu=no_gpu, cpu=f"{threads} thread{'s' * (threads != 1)}")


def inputs(device: torch.device, dtype: torch.dtype, M: int, K: int, N: int, seed: int, r: int = RANK) -> Inputs:
    return make_inputs(M, K, N, r, dtype, device=device, bias=False, scaling=SCALING, seed=seed)


def step(linear: Callable[..., Tensor], i: Inputs, **settings: Any) -> None:
    """One forward and one backward of leaves; `run` without the copies that it makes them by."""
    y = linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=i.scaling, **settings)
    torch.autograd.grad(y, (i.x, i.lora_A, i.lora_B), i.dy)


def repeats_agree(backend: str, given: list[Inputs], rounds: int) -> bool:
    """The same bits every time, with two streams at work at once."""
    first = [run(lora_linear, i, backend=backend) for i in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(rounds):
        again = []
        for stream, i in zip(streams, given):
            with torch.cuda.stream(stream):
                again.append(run(lora_linear, i, backend=backend))
        torch.cuda.synchronize()
        if not all(torch.equal(f[name], g[name]) for f, g in zip(first, again) for name in f):
            return False
    return True


def timing(backend: str, device: torch.device, i: Inputs) -> str:
    """Wall time of forward + backward, median of interleaved rounds, beside eager LoRA and the frozen linear."""
    i = i.leaves()
    calls: dict[str, Callable[[], object]] = {
        "frozen linear": lambda: torch.autograd.grad(F.linear(i.x, i.weight), i.x, i.dy),
        "eager LoRA": lambda: step(eager_peft, i),
        "fusedlora": lambda: step(lora_linear, i, backend=backend),
    }
    rounds = interleave({name: WallTimer([call], device=device) for name, call in calls.items()}, 7)
    base = rounds["frozen linear"]
    parts = []
    for name, times in rounds.items():
        tax = "" if times is base else f" ({ratios(times, base).median:.2f}×)"
        parts.append(f"{name} {statistics.median(times) * 1e3:.2f} ms{tax}")
    return ", ".join(parts)


def check(device: torch.device) -> None:
    """One device: which backend takes a call, whether its numbers are right, how long it takes."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        doctor.under_test = True
    dtype = torch.bfloat16 if cuda else torch.float32
    side = 4096 if cuda else 768
    rows = 2048 if cuda else 512
    tell(stage="choosing a backend", call=f"x [M, {side}] → [M, {side}], r = {RANK}, {dtype}".replace("torch.", ""))
    i = inputs(device, dtype, rows, side, side, seed=0)
    plan = explain(i.x, i.weight, i.lora_A, i.lora_B)
    backend = plan.backend if plan.backward is None else "auto"
    launches = plan.config.split(";")[0] if plan.config else ""
    about = f"{plan.taken}, {launches}" if launches else plan.taken
    tell(backend=about, one_launch=backend == "triton" and launches.startswith("one launch"), why_not=plan.why_not)

    worst: tuple[float, str] = (0.0, "")
    for M, r in CHECKS:
        tell(stage=f"forward and backward of backend {backend} at M = {M}, r = {r}; the first call compiles")
        i = inputs(device, dtype, M, 1024, 768, seed=M, r=r)
        # an error against float64 over that of eager PyTorch's separate calls in the same dtype
        found = error_ratios(run(lora_linear, i, backend=backend), run(eager_peft, i), exact(i))
        for name, ratio in found.items():
            at = f"{name} at M = {M}, r = {r}"
            worst = max(worst, (ratio, at)) if ratio == ratio else (float("inf"), f"NaN in {name}")
    ok = worst[0] <= WORST_RATIO
    text = f"errors against float64 are at most {worst[0]:.2f} of eager LoRA's ({worst[1]})"
    if cuda and ok:
        tell(stage="many launches on two streams")
        given = [inputs(device, dtype, M, 1024, 768, seed=M, r=r) for M, r in REPEATED]
        ok = repeats_agree(backend, given, rounds=100)
        text += ", 100 rounds on two streams give the same bits" if ok else ", but rounds on two streams DIFFER"
    tell(check=f"{text}: {'right' if ok else 'WRONG'}")
    if ok:
        tell(stage="timing")
        timed = timing(backend, device, inputs(device, dtype, rows, side, side, seed=1))
        tell(timing=f"forward + backward at M = {rows}: {timed}")
    tell(ok=ok, stage="done")


def main(argv: list[str]) -> int:
    match argv:
        case ["facts"]:
            facts()
        case ["check", device]:
            check(torch.device(device))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
