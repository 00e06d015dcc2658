"""How the C++ autograd node makes a launch: what the launchers tell it once for a kind of call. See node.py."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

# What a hole of a recipe takes: enum Source of csrc/node.cpp, in its order.
SOURCES = (
    *("x", "dy", "w", "a", "b", "bias", "s", "y", "dx", "da", "db"),
    *("workspace", "words", "scratch", "stream", "scaling", "scaling32", "seed"),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one launch is made from a call's tensors and numbers.

    slots are 8 bytes each, as a C struct of the CUDA library or as a kernel's parameters one by one; holes say which
    of them a call fills, with what of SOURCES, and what is added to it.
    """

    function: int  # address of the CUDA library's, or a CUfunction
    slots: bytes
    holes: tuple[tuple[int, str, int], ...]
    programs: int = 0  # of a kernel
    threads: int = 0
    shared: int = 0
    early: bool = False  # its programs may take their places while the launch before it on the stream ends
    problem: int = 0  # address of the function that tells what went wrong in the CUDA library
    work_size: int = 0
    num_words: int = 0
    scratch_size: int = 0
    keeps: object = None  # what `function` lives as long as
    watchers: tuple[Any, ...] | None = None  # Triton's hooks: one set at forward makes both launches Python's


def address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
