"""What both launchers need from the host: synchronisation words, the descriptors' scratch, launches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime import _allocation

from fusedlora.kernels.common import INTERPRET

# Words of one device's slab. A captured graph keeps the words of its launches for good, since it may be replayed at
# any time: a layer's forward and backward take about 100 words.
SLAB_WORDS = 1 << 20
_WORDS_PER_LINE = 32


class _Slab:
    """Zeroed int32 words of one device, handed out once and never taken back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.used = SLAB_WORDS
        self.words: torch.Tensor | None = None
        self.by_stream: dict[int, torch.Tensor] = {}

    def take(self, count: int, capturing: bool) -> torch.Tensor | None:
        """`count` zeroed words, or None where a capture finds none left (memory can't be zeroed eagerly there)."""
        count = -(-count // _WORDS_PER_LINE) * _WORDS_PER_LINE
        with self.lock:
            if self.used + count > SLAB_WORDS // 2 and not capturing:
                # Renewed with half left, so that a capture, which can't renew it, always finds some.
                self.words = torch.zeros(max(SLAB_WORDS, 2 * count), dtype=torch.int32, device=self.device)
                self.used = 0
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
            if self.words is None or self.used + count > self.words.numel():
                return None
            taken = self.words[self.used : self.used + count]
            self.used += count
            return taken


@functools.cache
def _slab(device: torch.device) -> _Slab:
    return _Slab(device)


def sync_words(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """At least `count` int32 words that are zero when the next launch on this stream begins; the kernel zeroes them.

    Eager launches on one stream follow one another and share theirs. Inside a graph capture each launch gets words
    of its own that nobody else ever uses; where the slab has none left, the zeroing is captured with the launch.
    """
    slab = _slab(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        words = slab.take(count, capturing=True)
        return torch.zeros(count, dtype=torch.int32, device=device) if words is None else words
    words = slab.by_stream.get(stream)
    if words is None or words.numel() < count:
        words = slab.take(max(count, 512), capturing=False)
        assert words is not None
        slab.by_stream[stream] = words
    return words


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@contextmanager
def _scratch_allocator() -> Iterator[None]:
    """Gives device-made descriptors their memory, in this thread, and puts the caller's allocator back."""
    token = _allocation._allocator.set(_scratch)
    try:
        yield
    finally:
        _allocation._allocator.reset(token)


def launch(kernel: Any, num_programs: int, device: torch.device, arguments: dict[str, Any]) -> None:
    """Launches under the tensors' own device, whatever the current one is."""
    if INTERPRET:
        kernel[(num_programs,)](**arguments)
        return
    with torch.cuda.device(device), _scratch_allocator():
        kernel[(num_programs,)](**arguments)


def current_stream(device: torch.device) -> int:
    return 0 if INTERPRET else torch._C._cuda_getCurrentRawStream(device.index)


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """Compute capability as 10 · major + minor, and the number of SMs. The interpreter poses as a small Hopper."""
    if INTERPRET:
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where a tensor-map descriptor can read it, else a contiguous copy.

    A descriptor needs unit stride in a row, a 16-byte aligned base and row strides of whole 16 bytes.
    """
    if (
        tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
    ):
        return tensor
    copy = tensor.contiguous()
    return copy.clone() if copy.data_ptr() % 16 else copy


def skinny_rows(tensor: torch.Tensor) -> torch.Tensor:
    """lora_A or lora_B as the kernels index it: any row stride for lora_A, packed rows of r for lora_B."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def rank_alignment(r: int) -> int:
    """The largest power of two up to 16 that divides the rank: how many adjacent ranks one load may take."""
    return min(16, r & -r)


# How fp32 operands are multiplied: three tf32 products, near fp32's precision. Nothing is said of 16-bit operands.
PRECISION = "tf32x3"
