"""Memory that quantised weights are decoded into: one buffer for a (device, dtype, stream), used again by every layer.

A call takes a buffer, decodes into it and launches what reads it, and gives it back before the next one takes it: on
one stream the work is done in that order, on a CPU it is done already. A thread that finds it taken gets another one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .memory import capturing

_lock = threading.Lock()
_free: dict[Any, list[Tensor]] = {}  # flat buffers by (device, dtype, stream), none of them in use


@contextmanager
def borrowed(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A contiguous tensor [N, K] of any content, for work on the current stream alone.

    It is memory of its own, freed at the end, inside a graph capture (where it is the graph's, for all replays), under
    a mode that sees every operation, and on devices other than CUDA's and the CPU.
    """
    numel = shape[0] * shape[1]
    stream = 0
    pooled = torch._C._len_torch_dispatch_stack() == 0 and device.type in ("cpu", "cuda")
    if pooled and device.type == "cuda":
        pooled = not capturing(device.index)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    if not pooled:
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    key = (device, dtype, stream)
    with _lock:
        pool = _free.setdefault(key, [])
        buffer = pool.pop() if pool else None
    if buffer is None or buffer.numel() < numel:
        buffer = None  # freed before the larger one is there
        with torch.inference_mode(False):  # a tensor made in it could not be written to outside
            buffer = torch.empty(numel, dtype=dtype, device=device)
    try:
        yield buffer[:numel].view(shape)
    finally:
        with _lock:
            if _free.get(key) is pool:  # no release since
                pool.append(buffer)


def release_buffers() -> int:
    """Frees the buffers; the next calls make new ones. Returns the bytes that were held by those not in use."""
    with _lock:
        held = sum(buffer.untyped_storage().nbytes() for pool in _free.values() for buffer in pool)
        _free.clear()
    return held
