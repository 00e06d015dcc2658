"""What a call is to those who choose: all that decides who takes it, read off its tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import Problem


class Call(NamedTuple):
    """What decides who takes a call. A tuple: cheap to build, and the key of the choices made."""

    named: bool  # asked for by name, not by "auto"
    device: torch.device
    dtype: torch.dtype  # of x, weight and y
    adapter_dtype: torch.dtype  # of S, T and the adapter's products
    param_dtype: torch.dtype  # of lora_A and lora_B
    N: int
    K: int
    r: int
    dropout: str  # "", "seed", "device seed" or "mask": what `dropout.draw` gave
    weight_layout: tuple[int, int, int]  # row stride, last stride, address % 16
    precision: str  # float32_matmul_precision, "" unless dtype is float32
    rows: int = 1  # counted_rows(M)
    scale: bool = False  # whether scaling is read on the device
    direction: str = "forward"  # or "backward": "auto" may take one backend for the one and another for the other
    plain: bool = False  # the products of lora_linear and no more: "auto" may leave them to PyTorch where it is faster

    def problem(self, M: int, direction: str, capability: int, num_sms: int) -> Problem:
        """What such a call of M rows is to the configurations of a direction's kernels."""
        sides = (self.N, self.K) if direction == "forward" else (self.K, self.N)
        precise = self.adapter_dtype is not self.dtype
        return Problem(M, *sides, self.r, self.dtype.itemsize, precise, capability, num_sms, self.dropout != "")


def describe_call(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    adapter_dtype: torch.dtype,
    direction: str = "forward",
    *,
    plain: bool = False,
) -> Call:
    """The call of lora_linear's tensors; x may be dy, and weight None where no asked gradient reads it."""
    r, K = lora_A.shape
    N = lora_B.shape[0]
    dtype = x.dtype
    if weight is None:
        layout = (K, 1, 0)
    else:
        row, last = weight.stride()
        layout = (row, last, weight.data_ptr() % 16)
    precision = float32_precision() if dtype is torch.float32 else ""
    named = backend != "auto"
    if mask is None:
        noise = ""
    elif mask.dtype is torch.bool:
        noise = "mask"
    else:
        noise = "device seed" if mask.is_cuda else "seed"
    rows = counted_rows(x.numel() // x.shape[-1])
    dtypes = dtype, adapter_dtype, lora_A.dtype
    return Call(named, x.device, *dtypes, N, K, r, noise, layout, precision, rows, scale is not None, direction, plain)


def counted_rows(M: int) -> int:
    """M rounded up, by less than a sixteenth, so that choices are few."""
    step = 1 << max(0, (M - 1).bit_length() - 5)
    return max(1, -(-M // step) * step)


def backward_of(call: Call) -> Call:
    """The call of a forward's backward. DoRA's is plain though its forward is not, unless the gain goes to W's rows."""
    about = call.rows, call.K, call.r, call.dtype, call.adapter_dtype
    return call._replace(direction="backward", plain=call.plain or not by_weight(*about))


def by_weight(M: int, K: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> bool:
    """Whether the kernels put the gain on the rows of W, not on the columns of dy.

    That reads and writes W once, and y beside dB's read of dy; scaling dy takes a pass over dy and y and writes as much
    as dy. Not where fp32 adapters of a high rank leave too few registers for dm.
    """
    return dtype.itemsize == 2 and K < M and (adapter_dtype == dtype or r <= 128)


def float32_precision() -> str:
    """torch.get_float32_matmul_precision(), also where torch.backends' newer settings make that one raise."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
