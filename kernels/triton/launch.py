"""What both launchers need from the host: synchronisation words, the descriptors' scratch, launches."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
import triton
from triton.runtime import _allocation

from fusedlora import dropout
from fusedlora.config import block_r
from fusedlora.kernels.common import INTERPRET, PAIRED, PLAIN

# Words of one device's slab. A captured graph keeps the words of its launches for good, since it may be replayed at
# any time: a layer's forward and backward take some 600 words.
SLAB_WORDS = 1 << 20
_WORDS_PER_LINE = 32


class _Slab:
    """Zeroed int32 words of one device, handed out once and never taken back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.used = SLAB_WORDS
        # Kept for good: graphs hold addresses in them.
        self.slabs: list[torch.Tensor] = []
        self.by_stream: dict[int, torch.Tensor] = {}

    def take(self, count: int, capturing: bool) -> torch.Tensor | None:
        """`count` zeroed words, or None where a capture finds none left (memory can't be zeroed eagerly there)."""
        count = -(-count // _WORDS_PER_LINE) * _WORDS_PER_LINE
        with self.lock:
            if self.used + count > SLAB_WORDS // 2 and not capturing:
                # Renewed with half left, so that a capture, which can't renew it, always finds some.
                self.slabs.append(torch.zeros(max(SLAB_WORDS, 2 * count), dtype=torch.int32, device=self.device))
                self.used = 0
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
            if not self.slabs or self.used + count > self.slabs[-1].numel():
                return None
            taken = self.slabs[-1][self.used : self.used + count]
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
    if _capturing(device):
        words = slab.take(count, capturing=True)
        return torch.zeros(count, dtype=torch.int32, device=device) if words is None else words
    words = slab.by_stream.get(stream)
    if words is None or words.numel() < count:
        words = slab.take(max(count, 1024), capturing=False)
        assert words is not None
        slab.by_stream[stream] = words
    return words


def words_run_out(device: torch.device) -> bool:
    """Whether a launch captured now would find no words of its own left, and so capture their zeroing."""
    slab = _slab(device)
    return _capturing(device) and (not slab.slabs or slab.used + 1024 > slab.slabs[-1].numel())


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if torch._C._cuda_getDevice() == device.index:
        return bool(torch._C._cuda_isCurrentStreamCapturing())
    with torch.cuda.device(device):
        return bool(torch._C._cuda_isCurrentStreamCapturing())


class _Scratch:
    """One device's memory for device-made descriptors.

    Launches on one stream follow one another and share it; a graph has its own. Triton asks the allocator of the thread
    that launches, with the device made current; the caller's own is put back at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_stream: dict[int, torch.Tensor] = {}

    def __call__(self, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        if stream is None or torch._C._cuda_isCurrentStreamCapturing():
            return torch.empty(size, dtype=torch.int8, device=self.device)
        buffer = self.by_stream.get(stream)
        if buffer is None or buffer.numel() < size:
            buffer = self.by_stream[stream] = torch.empty(size, dtype=torch.int8, device=self.device)
        return buffer


_scratch = functools.cache(_Scratch)


# Triton keeps the launch of a compiled kernel to itself; these versions were read (3.6 also run) and agree on it.
_DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 10)

# Where a thread's allocator for descriptors' memory is kept; a triton without it can't be used, and says so on import.
_allocator = _allocation._allocator


class Launcher:
    """One kernel with its constexpr arguments, for one device and one kind of run-time arguments.

    The first launch goes through Triton and leaves the compiled kernel, which later ones call directly: Triton's own
    way of finding it takes longer than many a layer's forward. No address is kept. What Triton would specialise (the
    divisibility of sizes, strides and addresses) must be the same at each call: it belongs in the caller's key.
    """

    def __init__(self, kernel: Any, num_programs: int, device: torch.device, constants: dict[str, Any]) -> None:
        self.kernel, self.num_programs, self.device, self.constants = kernel, num_programs, device, constants
        names = [parameter.name for parameter in kernel.params if parameter.is_constexpr] if not INTERPRET else []
        self.tail = tuple(constants[name] for name in names)
        self.scratch = _scratch(device)
        self.compiled: Any = None

    def __call__(self, stream: int, *arguments: Any) -> None:
        if INTERPRET:
            self.kernel[(self.num_programs,)](*arguments, **self.constants)
            return
        token = _allocator.set(self.scratch)
        try:
            index = self.device.index
            if torch._C._cuda_getDevice() == index:
                self._launch(stream, arguments)
            else:
                with torch.cuda.device(index):
                    self._launch(stream, arguments)
        finally:
            _allocator.reset(token)

    def _launch(self, stream: int, arguments: tuple[Any, ...]) -> None:
        compiled = self.compiled
        runtime = triton.knobs.runtime
        if compiled is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            compiled = self.kernel[(self.num_programs,)](*arguments, **self.constants)
            self.compiled = compiled if _DIRECT else None
            return
        compiled.run(
            self.num_programs, 1, 1, stream, compiled.function, compiled.packed_metadata,
            None, None, None, *arguments, *self.tail,
        )  # fmt: skip


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
    row, last = tensor.stride()
    if last == 1 and row >= tensor.shape[1] and row * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0:
        return tensor
    copy = tensor.contiguous()
    return copy.clone() if copy.data_ptr() % 16 else copy


def skinny_rows(tensor: torch.Tensor) -> torch.Tensor:
    """lora_A or lora_B as the kernels index them, in packed rows."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def rank_alignment(r: int) -> int:
    """The largest power of two up to 16 that divides the rank: how many adjacent ranks one load may take."""
    return min(16, r & -r)


def launch_dropout(
    seed: torch.Tensor | None, dropout_p: float, scaling: float
) -> tuple[float, torch.Tensor | int | None, int | None]:
    """The kernels' scaling, seed and threshold: what dropout keeps is scaled up along with S and T.

    A seed on the CPU goes along as a number; being 2⁶² or more it is always typed alike.
    """
    if seed is None:
        return scaling, None, None
    number = seed if seed.is_cuda else seed.item()
    return scaling / (1.0 - dropout_p), number, dropout.threshold(dropout_p)


def mask_method(capability: int) -> int:
    """The kernels' DROPOUT where there is one: how they make its mask."""
    return (PAIRED if capability >= 90 and not INTERPRET else PLAIN).value


def num_terms(param_dtype: torch.dtype, adapter_dtype: torch.dtype, dtype: torch.dtype) -> int:
    """The kernels' TERMS: 16-bit terms of each fp32 parameter, 0 where parameters are of x's dtype."""
    return 0 if param_dtype == dtype else 1 if adapter_dtype == dtype else 3


def common_constants(r: int, capability: int, terms: int, dropout: bool) -> dict[str, Any]:
    """The constexpr arguments that both kernels take and no tile configuration sets."""
    return {
        "DROPOUT": mask_method(capability) if dropout else 0,
        "TERMS": terms,
        "PRECISION": PRECISION,
        "R_ALIGN": rank_alignment(r),
        "BLOCK_R": block_r(r),
        "DELAY": 0,
    }


def separate(phases: dict[str, bool]) -> list[dict[str, bool]]:
    """Launches that wait for nothing, each with one of the phases that are asked for, in their order."""
    return [{other: other == name for other in phases} for name, wanted in phases.items() if wanted]


# How fp32 operands are multiplied: three tf32 products, near fp32's precision. Nothing is said of 16-bit operands.
PRECISION = "tf32x3"


def alignment(*tensors: torch.Tensor | None) -> int:
    """A bit for each tensor whose address is no multiple of 16 bytes: Triton specialises for every one by itself."""
    bits = 0
    for tensor in tensors:
        bits *= 2
        if tensor is not None and tensor.data_ptr() % 16:
            bits += 1
    return bits
