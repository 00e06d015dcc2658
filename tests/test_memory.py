"""What launches share: words, workspaces; and rows as a descriptor reads them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from fusedlora import dense_buffers, dropout, memory
from fusedlora.memory import SLAB_WORDS, DeviceMemory, Reused, StreamMemory, row_major

CPU = torch.device("cpu")


@pytest.fixture
def switching() -> Iterator[None]:
    """New threads take turns within the lines of memory.py, as they may without a global lock."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != memory.__file__:
            return None
        frame.f_trace_opcodes = True
        time.sleep(0)
        return trace

    before = threading.gettrace()
    threading.settrace(trace)
    yield
    threading.settrace(before)


def test_threads_on_one_stream_get_what_they_ask_for(switching: None) -> None:
    device, short = DeviceMemory(CPU), []

    def ask(first: int, take: Callable[[int], torch.Tensor], together: threading.Barrier) -> None:
        together.wait()
        short.extend(count for count in range(first, first + 5) if take(count).numel() < count)

    for _ in range(50):
        words, reused, together = StreamMemory(device, 1, False).words, Reused(CPU, False).take, threading.Barrier(4)
        asked = ((900, words), (3000, words), (100, reused), (700, reused))
        threads = [threading.Thread(target=ask, args=(*each, together)) for each in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not short


def test_an_eager_launch_renews_the_words_that_captures_have_used_up() -> None:
    device = DeviceMemory(CPU)
    eager = StreamMemory(device, 1, False)
    first = eager.words(300)
    assert eager.words(300) is first and len(device.slabs) == 1
    for _ in range(SLAB_WORDS // 2 // 1024):
        assert device.take(1024, capturing=True) is not None
    second = eager.words(300)
    assert len(device.slabs) == 2 and second is not first and eager.words(300) is second
    assert device.take(SLAB_WORDS // 2, capturing=True) is not None
    big = StreamMemory(device, 2, False)
    words = big.words(2 * SLAB_WORDS)
    assert words.numel() >= 2 * SLAB_WORDS and big.words(300) is words, "the larger ones serve smaller launches"


def test_captures_are_looked_for_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def switched(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: current[-1] == 1, raising=False)
    monkeypatch.setattr(torch.cuda, "device", switched)
    there = [SimpleNamespace(device=torch.device("cuda", index)) for index in range(2)]
    assert [memory.capturing(x.device.index) for x in there] == [False, True]
    assert [dropout.drawn_on_device(x) for x in there] == [False, True]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(2, 3))
    monkeypatch.setattr(dense_buffers, "_free", {})
    with dense_buffers.borrowed((2, 3), torch.float32, there[1].device):
        pass
    assert not dense_buffers._free, "a captured call's is memory of its own"


def test_a_single_row_may_have_any_stride() -> None:
    for tensor in (
        torch.randn(16, 1).t(),
        torch.randn(1, 16).as_strided((1, 16), (0, 1)),
        torch.randn(3, 40)[1:2, :16],
    ):
        seen = row_major(tensor)
        assert torch.equal(seen, tensor) and seen.data_ptr() == tensor.data_ptr()
        assert seen.stride(1) == 1 and seen.stride(0) >= 16 and seen.stride(0) % 4 == 0
