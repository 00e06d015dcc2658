"""What launchers need of memory: tensors as the kernels read them, and what launches share or hand back.

The latter are synchronisation words, descriptors' scratch and workspaces. Nothing here imports triton.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

# Words of one device's slab. A captured graph keeps the words of its launches for good, since it may be replayed at
# any time: a layer's forward and backward take some 600 words.
SLAB_WORDS = 1 << 20
_WORDS_PER_LINE = 32
# Bytes of scratch or workspace that a stream keeps for its next launches; what is larger is allocated for each.
MOST_KEPT = 4 << 20


def capturing(index: int) -> bool:
    """Whether the current stream of this CUDA device is being captured; the current device may be another one."""
    if torch._C._cuda_getDevice() == index:
        return torch._C._cuda_isCurrentStreamCapturing()
    with torch.cuda.device(index):
        return torch._C._cuda_isCurrentStreamCapturing()


class DeviceMemory:
    """One device's zeroed int32 words, handed out once and never taken back, and what its streams hold."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = device.index if device.type == "cuda" else None
        self.lock = threading.Lock()
        # Kept for good: graphs hold addresses in them. Words are taken from the last one.
        self.slabs: list[torch.Tensor] = []
        self.used = 0
        # Whether half of it is gone: an eager launch makes a new one then, since a capture can't.
        self.low = True
        self.by_stream: dict[int, StreamMemory] = {}

    def take(self, count: int, capturing: bool) -> torch.Tensor | None:
        """`count` zeroed words, or None where a capture finds none left (memory can't be zeroed eagerly there)."""
        count = -(-count // _WORDS_PER_LINE) * _WORDS_PER_LINE
        with self.lock:
            half = self.slabs[-1].numel() // 2 if self.slabs else 0
            if self.used + count > half and not capturing:
                half = max(SLAB_WORDS // 2, count)
                self.slabs.append(torch.zeros(2 * half, dtype=torch.int32, device=self.device))
                self.used = 0
                if self.index is not None:
                    torch.cuda.current_stream(self.device).synchronize()
            if self.used + count > 2 * half:
                return None
            taken = self.slabs[-1][self.used : self.used + count]
            self.used += count
            self.low = self.used > half
            return taken

    def of_current_stream(self) -> StreamMemory:
        """What the next launch on the current stream uses."""
        index = self.index
        if index is None:
            stream, captured = 0, False
        else:
            stream, captured = torch._C._cuda_getCurrentRawStream(index), capturing(index)
        memory = None if captured else self.by_stream.get(stream)
        if memory is None:
            memory = StreamMemory(self, stream, captured)
            if not captured:
                self.by_stream[stream] = memory
        return memory

    def words_run_out(self) -> bool:
        """Whether a launch captured now would find no words of its own left, and so capture their zeroing."""
        if self.index is None or not capturing(self.index):
            return False
        return not self.slabs or self.used + 1024 > self.slabs[-1].numel()


@functools.cache
def device_memory(device: torch.device) -> DeviceMemory:
    return DeviceMemory(device)


class StreamMemory:
    """Words and scratch of one stream: eager launches on it follow one another and share them.

    A captured launch gets words that nobody else ever uses, and scratch of the graph's own.
    """

    def __init__(self, owner: DeviceMemory, stream: int, captured: bool) -> None:
        self.owner, self.stream, self.captured = owner, stream, captured
        # With their number, as one attribute: another thread may put others there at any time.
        self.shared_words: tuple[Any, int] = (None, -1)
        self.descriptors, self.work = Reused(owner.device, captured), Reused(owner.device, captured)

    def words(self, count: int) -> torch.Tensor:
        """At least `count` int32 words that are zero when the launch begins; the kernel zeroes them again.

        Where the slab has none left inside a capture, the zeroing is captured with the launch.
        """
        words, kept = self.shared_words
        if count <= kept and not self.owner.low:
            return words
        if self.captured:
            words = self.owner.take(count, capturing=True)
            return torch.zeros(count, dtype=torch.int32, device=self.owner.device) if words is None else words
        words = self.owner.take(max(count, kept, 1024), capturing=False)
        assert words is not None
        self.shared_words = words, words.numel()
        return words

    def __call__(self, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        """As Triton asks its allocator for the memory of the descriptors that a launch makes on the device."""
        return self.descriptors.take(size)


class Reused:
    """Memory that each launch on a stream may use, as it waits for the one before; none is kept for a captured one."""

    def __init__(self, device: torch.device, captured: bool) -> None:
        self.device, self.captured = device, captured
        # With its size, as one attribute: another thread may put other memory there at any time.
        self.kept: tuple[Any, int] = (None, -1)

    def take(self, size: int, shared: bool = True) -> torch.Tensor:
        """At least `size` bytes, to be held until the launch is made."""
        memory, kept = self.kept
        if shared and size <= kept:
            return memory
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        if shared and size <= MOST_KEPT and not self.captured:
            self.kept = memory, size
        return memory


class Workspace:
    """Memory that one launch needs for itself: pieces of one allocation, each of a dtype and a number of elements."""

    def __init__(self, *pieces: tuple[torch.dtype, int] | None) -> None:
        self.pieces = pieces
        self.starts: list[int | None] = []
        self.size = 0
        for piece in pieces:
            self.starts.append(None if piece is None else self.size)
            if piece is not None:
                dtype, count = piece
                self.size += -(-count * dtype.itemsize // 256) * 256

    def addresses(self, memory: torch.Tensor) -> list[int | None]:
        """The pieces in memory of `size` bytes, at multiples of 256 bytes."""
        if not self.size:
            return self.starts
        base = memory.data_ptr()
        return [None if start is None else base + start for start in self.starts]

    def tensors(self, memory: torch.Tensor) -> list[torch.Tensor | None]:
        """The same as tensors, from which Triton learns their dtypes."""
        return [
            None
            if piece is None or start is None
            else memory[start : start + piece[1] * piece[0].itemsize].view(piece[0])
            for piece, start in zip(self.pieces, self.starts)
        ]


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where a tensor-map descriptor can read it, else a contiguous copy.

    A descriptor needs unit stride in a row, a 16-byte aligned base and row strides of whole 16 bytes.
    """
    row, last = tensor.stride()
    aligned = last == 1 and tensor.data_ptr() % 16 == 0
    if aligned and row >= tensor.shape[1] and row * tensor.element_size() % 16 == 0:
        return tensor
    if aligned and tensor.shape[0] == 1:  # contiguous with any stride of its row
        return tensor.as_strided(tensor.shape, (tensor.shape[1], 1))
    copy = tensor.contiguous()
    return copy.clone() if copy.data_ptr() % 16 else copy


def skinny_rows(tensor: torch.Tensor) -> torch.Tensor:
    """lora_A or lora_B as the kernels index them, in packed rows."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
