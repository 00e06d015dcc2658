"""Why a kind of kernels does not take a call, or "auto" leaves it to others; what is asked of the machine for it."""

from functools import cache

import torch

from . import costs, cuda, tuning
from .calls import Call
from .config import MAX_RANK, MAX_RANK_FLOAT32
from .cuda_config import FEW_CONVERTED, MAX_RANK_PRECISE, prefers_cuda
from .cuda_config import MAX_RANK as MAX_RANK_CUDA
from .doctor import doctor_passed
from .dropout import MAX_P


@cache
def _triton_missing() -> str | None:
    """Why the kernels cannot be imported, None when they can."""
    try:
        from fusedlora.kernels import backward, forward  # noqa: F401
    except Exception as error:  # a broken install raises anything; the reason is kept and shown
        return f"triton cannot be used ({type(error).__name__}: {error})"
    return None


@cache
def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# Where kernels whose programs wait for one another have been run; elsewhere each call takes two launches until
# `python -m fusedlora doctor` has passed there.
_WAITING_HAS_RUN = ((9, 0),)


@cache
def takes_one_launch(device: torch.device) -> bool:
    """Whether a call's phases go into one launch there, whose programs wait for one another."""
    if device.type != "cuda":
        return True
    capability = _capability(device)
    return capability in _WAITING_HAS_RUN or doctor_passed(capability)


def _interpreted() -> bool:
    """Whether this process runs the kernels in triton's interpreter, and so on CPU tensors."""
    if _triton_missing() is not None:
        return False
    from fusedlora.kernels.common import INTERPRET

    return bool(INTERPRET)


def triton_why_not(call: Call) -> str | None:
    """Why Triton's kernels do not take the call, None where they do."""
    kind = call.device.type
    if kind == "cuda":
        if torch.version.hip is not None:
            return "this is a ROCm build of torch, where the kernels have not been run"
        capability = _capability(call.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        if (missing := _triton_missing()) is not None:
            return missing
        if capability[0] == 10 and _triton_version() < (3, 9):
            return (
                f"triton before 3.9 compiles some of the kernels to empty ones for compute capability "
                f"{capability[0]}.{capability[1]}"
            )
        if capability[0] == 10 and call.dropout:
            return (
                f"triton compiles some of the kernels with dropout to empty ones for compute capability "
                f"{capability[0]}.{capability[1]}"
            )
    elif call.named and (missing := _triton_missing()) is not None:
        return missing
    elif not (kind == "cpu" and call.named and _interpreted()):
        return f"x is on {kind}, the kernels run on cuda"
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype is {call.dtype}, the kernels take bfloat16, float16 and float32"
    if call.dtype is torch.float16 and call.adapter_dtype is torch.float32:
        return (
            "lora_A is float32 beside a float16 x outside autocast: the kernels keep such adapters' precision over bf16"
        )
    if (reason := _shapes_why_not(call, MAX_RANK_FLOAT32 if call.dtype is torch.float32 else MAX_RANK)) is not None:
        return reason
    if call.precision == "highest":
        return (
            'x is float32 and torch.get_float32_matmul_precision() is "highest": '
            'the kernels form float32 products from tf32 ones, which "high" allows'
        )
    if call.dtype is torch.float32 and not call.named:
        return "x is float32, where the kernels have not been measured faster"
    return _why_slower("triton", call)


def cuda_why_not(call: Call) -> str | None:
    """The same of the kernels in csrc."""
    if call.device.type != "cuda":
        return f"x is on {call.device.type}, the kernels run on cuda"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch, the kernels are for NVIDIA's Hopper GPUs"
    capability = _capability(call.device)
    if capability != (9, 0):
        return f"compute capability is {capability[0]}.{capability[1]}, the kernels are compiled for 9.0"
    if not call.named and (reason := _why_triton(call)) is not None:
        return reason
    if (missing := cuda.missing()) is not None:
        return missing
    precise = call.adapter_dtype is not call.dtype
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {call.dtype}, the kernels take bfloat16 and float16"
    if precise and (call.dtype is not torch.bfloat16 or call.r > MAX_RANK_PRECISE):
        return (
            f"lora_A is {call.param_dtype} outside autocast and r is {call.r}: the kernels keep that precision "
            f"over bfloat16 up to r = {MAX_RANK_PRECISE}, x is {call.dtype}"
        )
    if call.scale:
        return "scaling is a tensor, which is read on the device: the kernels take a number"
    reason = _shapes_why_not(call, MAX_RANK_CUDA)
    return reason or _why_slower("cuda", call)


def _shapes_why_not(call: Call, max_rank: int) -> str | None:
    """What any kernels that read through tensor maps have against the tensors."""
    if call.dropout == "mask":
        return f"dropout comes as a mask, as it does above a rate of {MAX_P}: the kernels make theirs from a seed"
    size = call.dtype.itemsize
    for name, columns in (("in_features", call.K), ("out_features", call.N)):
        if columns * size % 16:
            return f"{name} {columns} of {call.dtype} is not a multiple of 16 bytes"
    if call.r > max_rank:
        return f"r is {call.r}, the kernels take up to {max_rank} in {call.dtype}"
    row, last, offset = call.weight_layout
    if last != 1 or row < call.K or row * size % 16 or offset:
        return (
            f"weight has strides ({row}, {last}) and starts {offset} bytes past a multiple of 16: "
            "its rows must be contiguous and start at multiples of 16 bytes"
        )
    return None


# How a reason begins that nobody is warned of.
SLOWER = "PyTorch's own products are expected to take less time"


def _why_slower(kernels: str, call: Call) -> str | None:
    """Why "auto" leaves the call to PyTorch's products. Beside those the reference would make a mask or copies of x."""
    if call.named or not call.plain or call.dropout or call.scale or call.adapter_dtype is not call.dtype:
        return None
    if call.device.type != "cuda":
        return None
    if (found := _compared(call)) is not None:
        us = found.us if kernels == "triton" else _cuda_us(call, found)
        if us is not None and found.products_us is not None:
            told = f"{SLOWER}: measured {found.products_us:.0f} µs, the kernels {us:.0f}"
            return told if found.products_us < us else None
    # Where nobody has compared them the kernels' wide ranks are no others.
    if _capability(call.device) != (9, 0) and call.r <= costs.MAX_RANK_FASTER:
        return None
    about = call.direction == "forward", call.rows, call.N, call.K, call.r, call.param_dtype is not call.dtype
    why = costs.why_slower(kernels, *about, cuda.num_sms(call.device))
    return why and f"{SLOWER}: {why}"


def _why_triton(call: Call) -> str | None:
    """Why "auto" prefers Triton's kernels to those of csrc."""
    found = _compared(call)
    if found is not None and (us := _cuda_us(call, found)) is not None:
        told = f"Triton's kernels take less time: measured {found.us:.0f} µs, these {us:.0f}"
        return told if found.us < us else None
    precise, converts = call.adapter_dtype is not call.dtype, call.param_dtype is not call.dtype
    about = (call.direction, call.rows, call.N, call.K, call.r, call.dropout != "", converts, precise)
    return None if prefers_cuda(*about) else "these kernels have not been measured faster here"


def _compared(call: Call) -> tuning.Compared | None:
    """What was measured for about such a call on its GPU."""
    major, minor = _capability(call.device)
    problem = call.problem(call.rows, call.direction, 10 * major + minor, cuda.num_sms(call.device))
    return tuning.compared(call.direction, problem, call.device)


def _cuda_us(call: Call, found: tuning.Compared) -> float | None:
    """What csrc's kernels took. With few rows other ones take fp32 parameters, which autocast rounds: unknown."""
    return None if call.param_dtype is not call.adapter_dtype and call.rows <= FEW_CONVERTED else found.cuda_us
