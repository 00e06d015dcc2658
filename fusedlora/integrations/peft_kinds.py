"""The classes of PEFT's layers that have a fused forward, and the switch that gives it to all their instances."""

import functools
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from peft.import_utils import is_bnb_4bit_available, is_bnb_available, is_torchao_available


@dataclass(frozen=True)
class Kind:
    """PEFT's class, ours (a subclass with another forward), and PEFT's forward."""

    stock: Any
    fused: Any
    stock_forward: Any

    @property
    def has_own_forward(self) -> bool:
        """Whether the stock class has a forward of its own; else that of another kind is its."""
        return "forward" in vars(self.stock)

    def require_stock_forward(self) -> None:
        """Raises where the stock class's forward is neither PEFT's own nor ours."""
        if not self.has_own_forward:
            return
        found = self.stock.forward
        if self.stock_forward.__code__.co_filename != self.stock.__repr__.__code__.co_filename:
            found = self.stock_forward  # it was replaced before the fused class was made
        elif found is self.stock_forward or found is self.fused.forward:
            return
        raise RuntimeError(
            f"peft.tuners.lora.{self.stock.__name__}.forward has been replaced by {_where(found)}: "
            "fusedlora does not go over another library's patch; turn it off first"
        )


KINDS: list[Kind] = []
# Those of PEFT that make layers over quantised weights: (target, adapter_name, config, **options) -> a layer or None.
DISPATCHERS: list[Any] = []
CLASSES: dict[type, Kind] = {}  # by both of their classes


def add_kind(kind: Kind, dispatcher: Any = None) -> None:
    """Makes a class of PEFT known to every door, and what in PEFT makes its instances over quantised weights."""
    KINDS.append(kind)
    if dispatcher is not None:
        DISPATCHERS.append(dispatcher)
    CLASSES[kind.stock] = CLASSES[kind.fused] = kind


@functools.cache
def load_kinds() -> None:
    """Makes those over quantised weights known, of the libraries installed, which PEFT imports for any LoRA model."""
    if is_bnb_available() and is_bnb_4bit_available():
        from . import peft_bnb  # noqa: F401
    if is_torchao_available():
        from . import peft_torchao  # noqa: F401


def require_stock_forwards() -> None:
    """Raises RuntimeError where another library has replaced the forward of one of PEFT's classes."""
    for kind in KINDS:
        kind.require_stock_forward()


class Hold:
    """What enable() returns: `with` it, to end at the block's end what this call began."""

    def __enter__(self) -> "Hold":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            if self in _holds:
                _end({self})


_lock = threading.RLock()
_holds: set[Hold] = set()  # the calls of enable() that are not ended yet


def enable() -> Hold:
    """Fuses every layer of these classes in this process, also in models made later, until disable().

    They are peft.tuners.lora.Linear and those over the quantised weights of libraries that are installed.
    `with enable():` ends it at the block's end, unless another enable() is still on. To be called before
    torch.compile: what is compiled already stays as it is. Raises RuntimeError where another library has replaced
    PEFT's forward.
    """
    hold = Hold()
    with _lock:
        load_kinds()
        require_stock_forwards()
        for kind in KINDS:
            if kind.has_own_forward:
                kind.stock.forward = kind.fused.forward
        _holds.add(hold)
    return hold


def disable() -> None:
    """Ends every enable(). Layers of `fuse` and `register` stay fused.

    Raises RuntimeError where another library has replaced the forward since.
    """
    with _lock:
        _end(set(_holds))


def _end(holds: set[Hold]) -> None:
    if holds and holds == _holds:
        require_stock_forwards()
        for kind in KINDS:
            if kind.has_own_forward:
                kind.stock.forward = kind.stock_forward
    _holds.difference_update(holds)


def _where(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
