"""What all launchers need from the host: the launch itself, and how tensors and settings reach a kernel."""

from __future__ import annotations

import dataclasses
import functools
import struct
from typing import Any

import torch
import triton
from triton.runtime import _allocation

from fusedlora.config import block_r
from fusedlora.kernels.common import INTERPRET
from fusedlora.kernels.masks import PAIRED, PLAIN
from fusedlora.memory import DeviceMemory, StreamMemory, Workspace
from fusedlora.recipe import Recipe

# Triton keeps the launch of a compiled kernel to itself. These versions were read; 3.6 and 3.9 were also run.
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_READ = (3, 6) <= _VERSION < (3, 10)
_runtime = triton.knobs.runtime

# Where a thread's allocator for descriptors' memory is kept; a triton without it can't be used, and says so on import.
_allocator = _allocation._allocator


class Launcher:
    """One kernel with its constexpr arguments, for one device and one kind of run-time arguments.

    The first launch goes through Triton and leaves the compiled kernel. Later ones call the C function below Triton's
    launcher: what lies between takes three times as long. No address is kept. What Triton would specialise (the
    divisibility of sizes, strides and addresses) must be the same at each call: it belongs in the caller's key.

    Pointers may be given as addresses once `compiled` is there.
    """

    def __init__(self, kernel: Any, num_programs: int, device: torch.device, constants: dict[str, Any]) -> None:
        self.kernel, self.num_programs, self.device, self.constants = kernel, num_programs, device, constants
        names = [parameter.name for parameter in kernel.params if parameter.is_constexpr] if not INTERPRET else []
        self.tail = tuple(constants[name] for name in names)
        self.index = device.index
        self.compiled: Any = None
        self.scratch_size = 0
        # Below Triton's launcher: its C function, and what that takes beside a stream, scratch and arguments.
        self.launch: Any = None
        self.what: tuple[Any, ...] = ()
        self.settings: tuple[Any, ...] = ()

    def __call__(self, memory: StreamMemory, arguments: tuple[Any, ...]) -> None:
        """Launches on the stream of `memory`."""
        if (
            self.launch is None
            or torch._C._cuda_getDevice() != self.index
            or _runtime.launch_enter_hook.calls
            or _runtime.launch_exit_hook.calls
        ):
            self._through_triton(memory, arguments)
            return
        scratch = memory.descriptors.take(self.scratch_size)
        head = (self.num_programs, 1, 1, memory.stream, *self.what, scratch, None, *self.settings)
        if _VERSION < (3, 7):
            self.launch(*head, *arguments, *self.tail)
        else:
            self.launch(*head, arguments + self.tail)

    def _through_triton(self, memory: StreamMemory, arguments: tuple[Any, ...]) -> None:
        if INTERPRET:
            self.kernel[(self.num_programs,)](*arguments, **self.constants)
            return
        # Triton asks the allocator of the thread that launches; the caller's own is put back at once.
        token = _allocator.set(memory)
        try:
            with torch.cuda.device(self.index):
                if self.compiled is not None:
                    self.compiled[(self.num_programs, 1, 1)](*arguments, *self.tail, stream=memory.stream)
                    return
                compiled = self.kernel[(self.num_programs,)](*arguments, **self.constants)
        finally:
            _allocator.reset(token)
        if not _READ:
            return
        self.compiled = compiled
        run, told = compiled.run, (compiled.packed_metadata, None, None, None)  # without hooks
        if run.profile_scratch_size or getattr(run, "gsan_enabled", False):
            return
        what = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        # Another thread may launch by these once there is `launch`; one that came here too sets the same ones.
        self.scratch_size = self.num_programs * run.num_ctas * run.global_scratch_size
        if _VERSION < (3, 7):
            self.what, self.settings = what, told
        else:
            self.what, self.settings = what + told, (run.arg_annotations, run.kernel_signature)
        self.launch = run.launch

    def recipe(self, arguments: tuple[Any, ...]) -> Recipe | None:
        """The launch as plain parameters of cuLaunchKernelEx; None before the first one and where it is none.

        arguments: as for a launch, with names of the recipe's sources, or pairs of one and what is added to it, in the
        places of what a call brings.
        """
        if self.launch is None:
            return None
        num_warps, num_ctas, shared = self.compiled.packed_metadata
        run = self.compiled.run
        if num_ctas != 1 or run.launch_cooperative_grid:
            return None
        types = [self.compiled.src.signature[name] for name in self.kernel.arg_names[: len(arguments)]]
        values = [value for value, kind in zip(arguments, types, strict=True) if kind != "constexpr"]
        # a kernel's last parameters are its scratch and that of a profiler, which it has none of
        values += ["scratch", 0]
        holes = []
        for slot, value in enumerate(values):
            if not isinstance(value, int):
                source, offset = (value, 0) if isinstance(value, str) else value
                holes.append((slot, source, offset))
        return Recipe(
            function=self.compiled.function,
            slots=struct.pack(f"={len(values)}q", *(value if isinstance(value, int) else 0 for value in values)),
            holes=tuple(holes),
            programs=self.num_programs,
            threads=32 * num_warps,
            shared=shared,
            early=run.launch_pdl,
            scratch_size=self.scratch_size,
            keeps=self.compiled,
            watchers=(_runtime.launch_enter_hook, _runtime.launch_exit_hook),
        )


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """All that the launches of one kind of call need beside its tensors. They are given the same arguments, in order:

    tensors, the pieces of the workspace, synchronisation words, sizes, scaling, counts, seed, threshold, the last two
    only where the kernels have a dropout (`drops`).
    """

    launchers: tuple[Launcher, ...]
    memory: DeviceMemory
    workspace: Workspace
    num_words: int
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    drops: bool = True

    def launch(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        scaling: float,
        seed: torch.Tensor | int | None,
        threshold: int | None,
    ) -> None:
        """scaling, seed and threshold are those of `dropout.launch_dropout`."""
        stream = self.memory.of_current_stream()
        workspace = self.workspace
        # the second of two launches reads what the first left, when another thread may have launched between them
        work = stream.work.take(workspace.size, shared=len(self.launchers) == 1)
        compiled = self.launchers[-1].compiled is not None
        pieces = workspace.addresses(work) if compiled else workspace.tensors(work)
        words = stream.words(self.num_words)
        mask = (seed, threshold) if self.drops else ()
        arguments = (*tensors, *pieces, words, *self.sizes, scaling, *self.counts, *mask)
        for launcher in self.launchers:
            launcher(stream, arguments)

    def recipe(self, tensors: tuple[str | None, ...], threshold: int | None) -> Recipe | None:
        """tensors: names of the recipe's sources; threshold: that of `dropout.launch_dropout`."""
        if len(self.launchers) != 1:
            return None
        pieces = [None if start is None else ("workspace", start) for start in self.workspace.starts]
        mask = (None if threshold is None else "seed", threshold) if self.drops else ()
        arguments = (*tensors, *pieces, "words", *self.sizes, "scaling32", *self.counts, *mask)
        recipe = self.launchers[0].recipe(arguments)
        if recipe is None:
            return None
        return dataclasses.replace(recipe, work_size=self.workspace.size, num_words=self.num_words)


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """Compute capability as 10 · major + minor, and the number of SMs. The interpreter poses as a small Hopper."""
    if INTERPRET:
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def rank_alignment(r: int) -> int:
    """The largest power of two up to 16 that divides the rank: how many adjacent ranks one load may take."""
    return min(16, r & -r)


def early_constants(capability: int, wanted: bool = True) -> dict[str, bool]:
    """The EARLY of a kernel that calls `begin_early`, and the option of its launch that belongs to it."""
    early = wanted and capability >= 90 and not INTERPRET
    return {"EARLY": early, "launch_pdl": early}


def mask_method(capability: int) -> int:
    """The kernels' DROPOUT where there is one: how they make its mask."""
    return (PAIRED if capability >= 90 and not INTERPRET else PLAIN).value


def num_terms(param_dtype: torch.dtype, adapter_dtype: torch.dtype, dtype: torch.dtype) -> int:
    """The kernels' TERMS: 16-bit terms of each fp32 parameter, 0 where parameters are of x's dtype."""
    return 0 if param_dtype == dtype else 1 if adapter_dtype == dtype else 3


def common_constants(r: int, capability: int, terms: int, dropout: bool) -> dict[str, Any]:
    """The constexpr arguments that both kernels take and no tile configuration sets, and an option of the launch."""
    return early_constants(capability) | {
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
