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
from .timing import WallTimer, interleave, ratios

RANK = 16
SCALING = 2.0
# M and r, for 1024 → 768. Of rank 32 Triton's tiles wait for S, of rank 16 some compute it themselves.
CHECKS = ((1, RANK), (63, RANK), (512, RANK), (512, 32))
REPEATED = ((500, RANK), (2048, 32))
# Rounding is random: at M = 1 two ways of equal quality may differ by some percent, as S and T are 16 numbers there.
# A wrong result is off by orders of magnitude; the tests hold the kernels to the eager error itself.
WORST_RATIO = 1.25
NAMES = ("y", "dX", "dA", "dB")


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
    tell(gpus=gpus, no_gpu=no_gpu, cpu=f"{torch.get_num_threads()} threads")


def inputs(device: torch.device, dtype: torch.dtype, M: int, K: int, N: int, seed: int, r: int = RANK) -> list[Tensor]:
    """x [M, K], weight [N, K], lora_A [r, K], lora_B [N, r], dy [M, N]; drawn on the CPU, so equal everywhere."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((M, K, 1.0), (N, K, K**-0.5), (r, K, K**-0.5), (N, r, r**-0.5), (M, N, 1.0))
    return [(torch.randn(a, b, generator=generator) * scale).to(device, dtype) for a, b, scale in shapes]


def eager(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(x, lora_A), lora_B) * SCALING


def fused(backend: str) -> Callable[..., Tensor]:
    def forward(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return lora_linear(x, weight, lora_A, lora_B, scaling=SCALING, backend=backend)

    return forward


def step(forward: Callable[..., Tensor], x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dX, dA, dB of one forward and one backward."""
    x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
    y = forward(x, weight, A, B)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]


def error_ratios(backend: str, given: list[Tensor]) -> dict[str, float]:
    """Error against float64 over that of eager PyTorch's separate calls in the same dtype, for y, dX, dA, dB."""
    exact = step(eager, *(t.double() for t in given))
    theirs = step(eager, *given)
    ours = step(fused(backend), *given)
    result = {}
    for name, want, base, got in zip(NAMES, exact, theirs, ours):
        error = (got.double() - want).norm().item()
        floor = torch.finfo(got.dtype).eps * 1e-2 * want.norm().item()  # eager exact by luck, as for M = 1
        result[name] = error / max((base.double() - want).norm().item(), floor)
    return result


def repeats_agree(backend: str, given: list[list[Tensor]], rounds: int) -> bool:
    """The same bits every time, with two streams at work at once."""
    forward = fused(backend)
    first = [step(forward, *tensors) for tensors in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(rounds):
        again = []
        for stream, tensors in zip(streams, given):
            with torch.cuda.stream(stream):
                again.append(step(forward, *tensors))
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for f, g in zip(first, again) for a, b in zip(f, g)):
            return False
    return True


def frozen(x: Tensor, weight: Tensor, dy: Tensor) -> None:
    x = x.detach().requires_grad_()
    torch.autograd.grad(F.linear(x, weight), x, dy)


def timing(backend: str, device: torch.device, given: list[Tensor]) -> str:
    """Wall time of forward + backward, median of interleaved rounds, beside eager LoRA and the frozen linear."""
    x, weight, _, _, dy = given
    calls: dict[str, Callable[[], object]] = {
        "frozen linear": lambda: frozen(x, weight, dy),
        "eager LoRA": lambda: step(eager, *given),
        "fusedlora": lambda: step(fused(backend), *given),
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
    plan = explain(*inputs(device, dtype, rows, side, side, seed=0)[:4])
    backend = plan.backend if plan.backward is None else "auto"
    launches = plan.config.split(";")[0] if plan.config else ""
    about = f"{plan.taken}, {launches}" if launches else plan.taken
    tell(backend=about, one_launch=backend == "triton" and launches.startswith("one launch"), why_not=plan.why_not)

    worst: tuple[float, str] = (0.0, "")
    for M, r in CHECKS:
        tell(stage=f"forward and backward of backend {backend} at M = {M}, r = {r}; the first call compiles")
        for name, ratio in error_ratios(backend, inputs(device, dtype, M, 1024, 768, seed=M, r=r)).items():
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
