"""Tuned tables: the configurations that were measured fastest on a GPU, which the launchers take before the heuristics.

`python -m fusedlora tune` writes one to the user's cache directory; others may come with the package, in its folder
tuned. A table belongs to one GPU, one triton and these kernels. It also says how long Triton's kernels, those of csrc
and PyTorch's own products took side by side.
Importing this module imports neither torch nor triton.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .cache import cache_dir
from .config import (
    BackwardConfig,
    DecodeConfig,
    ForwardConfig,
    Problem,
    backward_config,
    decode_config,
    decode_rows,
    forward_config,
)
from .cuda_build import sources_hash
from .cuda_config import DECODE_UP_TO, AnyConfig, CudaConfig, check_any_config, cuda_config, suits
from .doctor import fingerprint

if TYPE_CHECKING:
    import torch

FORMAT = 3
SHIPPED = Path(__file__).parent / "tuned"
# An entry serves as many rows as it was measured with, and up to this many times more or fewer.
NEAR = 2**0.5

# What an entry says of its problem; the GPU's fields stand in the table's head.
_PROBLEM = tuple(f.name for f in dataclasses.fields(Problem) if f.name not in ("capability", "num_sms"))


# Triton's, called by their direction, and those of csrc.
KERNELS = ("forward", "backward", "cuda_forward", "cuda_backward")


def cuda_kernel(direction: str) -> str:
    return f"cuda_{direction}"


def direction_of(kernel: str) -> str:
    return kernel.removeprefix("cuda_")


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    capability: int
    num_sms: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A configuration of a kernel in KERNELS, its time and the heuristic's in microseconds."""

    kernel: str
    problem: Problem
    config: AnyConfig
    us: float
    heuristic_us: float


@dataclasses.dataclass(frozen=True)
class Compared:
    """Microseconds of Triton's "forward" or "backward" kernel, as it was tuned, of csrc's and of PyTorch's products.

    None where csrc is not built or does not take such calls, and where "auto" takes no products whatever they take.
    """

    kernel: str
    problem: Problem
    us: float
    cuda_us: float | None
    products_us: float | None


Item = TypeVar("Item", Entry, Compared)


class Nearby(Generic[Item]):
    """Items by kernel and problem; of two for the same problem the later counts."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.items: dict[tuple[str, Problem], Item] = {}
        self.groups: dict[tuple[str, Problem], list[Item]] = {}
        for item in items:
            self.put(item)

    def put(self, item: Item) -> None:
        self.drop(item.kernel, item.problem)
        self.items[item.kernel, item.problem] = item
        self.groups.setdefault(_group(item.kernel, item.problem), []).append(item)

    def drop(self, kernel: str, problem: Problem) -> None:
        item = self.items.pop((kernel, problem), None)
        if item is not None:
            self.groups[_group(kernel, problem)].remove(item)

    def find(self, kernel: str, problem: Problem, fits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """The item whose number of rows is nearest, None where none is near."""
        near = [
            (abs(math.log(item.problem.M / problem.M)), index, item)
            for index, item in enumerate(self.groups.get(_group(kernel, problem), ()))
            if item.problem.M <= NEAR * problem.M and problem.M <= NEAR * item.problem.M
            if _alike(item, problem) and fits(item)
        ]
        return min(near)[2] if near else None


def _alike(item: Entry | Compared, problem: Problem) -> bool:
    """Forwards of few rows may take a decode kernel, whose tiles are as high as its rows are padded."""
    M, other = item.problem.M, problem.M
    if direction_of(item.kernel) == "backward" or min(M, other) > DECODE_UP_TO:
        return True
    return max(M, other) <= DECODE_UP_TO and decode_rows(M) == decode_rows(other)


def _group(kernel: str, problem: Problem) -> tuple[str, Problem]:
    return kernel, dataclasses.replace(problem, M=0)


class Table:
    """What was measured on one GPU."""

    def __init__(
        self, gpu: Gpu, entries: Iterable[Entry] = (), path: Path | None = None, compared: Iterable[Compared] = ()
    ) -> None:
        self.gpu, self.path = gpu, path
        self.entries, self.compared = Nearby(entries), Nearby(compared)

    def dump(self) -> str:
        def plain(item: Entry | Compared) -> dict[str, Any]:
            problem = {name: getattr(item.problem, name) for name in _PROBLEM}
            return dataclasses.asdict(item) | {"problem": problem}

        head = {
            "format": FORMAT,
            "gpu": dataclasses.asdict(self.gpu),
            "versions": fingerprint(),
            "csrc": sources_hash(),
        }
        head["entries"] = [plain(entry) for entry in self.entries.items.values()]
        head["compared"] = [plain(compared) for compared in self.compared.items.values()]
        return json.dumps(head, indent=1)


def parse(text: str, gpu: Gpu, path: Path | None = None) -> Table:
    """The table of `dump`'s text. Raises ValueError where it is damaged, or of another GPU, triton or kernels."""
    try:
        data = json.loads(text)
        own = {"format": FORMAT, "gpu": dataclasses.asdict(gpu), "versions": fingerprint()}
        for name, value in own.items():
            if data[name] != value:
                raise ValueError(f"{name} is {data[name]}, here it is {value}")
        compared = [_compared(item, gpu) for item in data["compared"]]
        entries = [_entry(entry, gpu) for entry in data["entries"]]
        if data["csrc"] != sources_hash():  # other kernels than those
            compared = [dataclasses.replace(item, cuda_us=None) for item in compared]
            entries = [entry for entry in entries if not isinstance(entry.config, CudaConfig)]
        return Table(gpu, entries, path, compared)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its form is not a table's ({type(error).__name__}: {error})") from error


def _entry(data: dict[str, Any], gpu: Gpu) -> Entry:
    kernel = data["kernel"]
    cls = config_class(kernel, data["config"])
    config = cls(**_typed(cls, data["config"]))
    check_any_config(config)
    return Entry(kernel, _problem(data, gpu), config, float(data["us"]), float(data["heuristic_us"]))


def _compared(data: dict[str, Any], gpu: Gpu) -> Compared:
    if data["kernel"] not in ("forward", "backward"):
        raise ValueError(f"kernel is {data['kernel']}; it must be forward or backward")
    others = (None if data[name] is None else float(data[name]) for name in ("cuda_us", "products_us"))
    return Compared(data["kernel"], _problem(data, gpu), float(data["us"]), *others)


def _problem(data: dict[str, Any], gpu: Gpu) -> Problem:
    problem = Problem(**_typed(Problem, data["problem"]), capability=gpu.capability, num_sms=gpu.num_sms)
    if problem.M < 1:
        raise ValueError(f"M is {problem.M}; it must be at least 1")
    return problem


def config_class(kernel: str, fields: dict[str, Any]) -> type[AnyConfig]:
    """What a configuration of a kernel in KERNELS with these fields is."""
    forward = DecodeConfig if "SPLIT" in fields else ForwardConfig
    return dict(zip(KERNELS, (forward, BackwardConfig, CudaConfig, CudaConfig)))[kernel]


def _typed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    kinds = {f.name: {"int": int, "bool": bool}[str(f.type)] for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if type(value) is not kinds[name]:
            raise TypeError(f"{name} is {value!r}")
    return values


def file_name(gpu: Gpu) -> str:
    versions = fingerprint()
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", gpu.name).strip("-")
    return f"{slug}-sm{gpu.capability}-triton{versions['triton']}-{versions['kernels']}.json"


def user_path(gpu: Gpu) -> Path:
    return cache_dir() / "tuning" / file_name(gpu)


def read(path: Path, gpu: Gpu) -> Table:
    """The table of a file, empty where there is none. One that does not fit is ignored with a warning."""
    try:
        if path.exists():
            return parse(path.read_text(encoding="utf-8"), gpu, path)
    except (OSError, ValueError) as error:
        warnings.warn(f"fusedlora ignores the tuned table {path}: {error}", stacklevel=2)
    return Table(gpu, path=path)


def write(table: Table, path: Path) -> None:
    """Raises OSError where it cannot. Readers see the old table or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(table.dump(), encoding="utf-8")
    scratch.replace(path)
    tables.cache_clear()


@functools.cache
def tables(gpu: Gpu) -> tuple[Table, ...]:
    """The user's table and the package's, in the order in which they are asked. Read once in a process."""
    return read(user_path(gpu), gpu), read(SHIPPED / file_name(gpu), gpu)


@functools.cache
def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU, None for the interpreter's CPU."""
    import torch

    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    return Gpu(about.name, 10 * about.major + about.minor, about.multi_processor_count)


def in_use() -> bool:
    """Whether tuned tables are asked: they are not where the user asked for deterministic algorithms."""
    import torch

    return not torch.are_deterministic_algorithms_enabled()


def heuristic(kernel: str, problem: Problem) -> AnyConfig:
    """The configuration of a kernel in KERNELS where nothing was measured."""
    direction = direction_of(kernel)
    if kernel == cuda_kernel(direction):
        return cuda_config(problem, direction == "forward")
    if direction == "backward":
        return backward_config(problem)
    return decode_config(problem) or forward_config(problem)


def _asked(device: torch.device, tuned: bool) -> tuple[Table, ...]:
    gpu = gpu_of(device) if tuned else None
    return () if gpu is None else tables(gpu)


def choose(kernel: str, problem: Problem, device: torch.device, tuned: bool) -> tuple[Any, str]:
    """The configuration of a kernel in KERNELS and where it comes from."""
    base = heuristic(kernel, problem)
    for table in _asked(device, tuned):
        entry = table.entries.find(kernel, problem, lambda entry: _fits(entry.config, base, problem))
        if entry is not None:
            return entry.config, f"measured at M = {entry.problem.M}, {table.path}"
    return base, "heuristic"


def _fits(config: AnyConfig, base: AnyConfig, problem: Problem) -> bool:
    """Whether a configuration that was measured near problem serves it too; base is the heuristic's.

    How csrc's kernels cut S and whether its decode kernel runs go by the rows.
    """
    if not isinstance(config, CudaConfig):
        return True
    assert isinstance(base, CudaConfig)

    def kind(config: CudaConfig) -> tuple[int, bool, bool]:
        return config.slices, config.in_tiles, config.decode_rows > 0

    return kind(config) == kind(base) and suits(problem, config)


def compared(kernel: str, problem: Problem, device: torch.device) -> Compared | None:
    """What was measured side by side on this GPU at about as many rows."""
    found = (table.compared.find(kernel, problem) for table in _asked(device, in_use()))
    return next((item for item in found if item is not None), None)
