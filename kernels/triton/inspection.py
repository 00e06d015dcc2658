"""Compiling a launch ahead of time, for any GPU and without one, and reading what ptxas says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedlora.kernels import backward, decode, dora, dora_gain, forward
from fusedlora.kernels.launch import Launcher
from fusedlora.memory import StreamMemory

# SMs of a typical GPU of each compute capability: A100, A10, RTX 4090, H100, B200, RTX 5090.
TYPICAL_SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
# No NVIDIA GPU's capability: config.py takes its smallest tiles, the kernels use no PTX.
UNKNOWN = 0
_OPTIONS = ("num_warps", "num_stages")
_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_POINTER |= {torch.int32: "*i32", torch.int64: "*i64"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it would have been launched with."""

    kernel: Any
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compiled launch needs and contains. Sizes in bytes; instruction counts are those in the PTX.

    loop_spills: instructions for spilled registers inside the innermost loops that multiply on tensor cores.
    """

    shared: int
    registers: int
    spills: int
    loop_spills: int
    warnings: tuple[str, ...]
    ptx: str

    def count(self, instruction: str) -> int:
        return self.ptx.count(instruction)

    @property
    def begins_early(self) -> bool:
        """Whether it lets the next launch begin and waits for the one before, as `common.begin_early` has it."""
        before, _, after = self.ptx.partition("griddepcontrol.wait")
        touched = re.compile(r"\b(ld|st|atom|red|cp|tensormap)\.\S*global")
        first = bool(touched.search(after)) and not touched.search(before)
        return first and "griddepcontrol.launch_dependents" in before


@dataclasses.dataclass(frozen=True)
class AmdReport:
    """What one launch compiled for an AMD GPU needs: bytes of LDS and of scratch, spilled registers; its assembly."""

    shared: int
    scratch: int
    spills: int
    assembly: str


@contextlib.contextmanager
def recorded_launches(capability: int) -> Iterator[list[Launch]]:
    """Inside, launchers called with CPU tensors choose as on a GPU of this capability, and launch nothing.

    UNKNOWN stands for a GPU that config.py knows nothing of.
    """
    seen: list[Launch] = []

    class Recorder(Launcher):
        def __call__(self, memory: StreamMemory, arguments: tuple[Any, ...]) -> None:
            names = [parameter.name for parameter in self.kernel.params if not parameter.is_constexpr]
            seen.append(Launch(self.kernel, dict(zip(names, arguments, strict=True)) | self.constants))

    facts = (capability, TYPICAL_SMS.get(capability, 304))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(decode, "Launcher", Recorder))
        for module in (forward, backward, dora, dora_gain):
            for name, stand_in in (
                ("Launcher", Recorder),
                ("_plan", module._plan.__wrapped__),  # a plan made here must not be kept
                ("device_facts", lambda device: facts),
            ):
                stack.enter_context(mock.patch.object(module, name, stand_in))
        yield seen


def record(capability: int, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make."""
    with recorded_launches(capability) as seen:
        call()
    return seen


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compiles with the specialisations Triton would choose for these arguments (16-byte multiples, ones, None)."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            aligned = specialised and value.data_ptr() % 16 == 0
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialised and value % 16 == 0
        else:
            signature[name] = "fp32"
            aligned = False
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton_compile(source, target=target, options={name: launch.arguments[name] for name in _OPTIONS})


def inspect_launch(launch: Launch, capability: int) -> Report:
    """Compiles for an NVIDIA GPU, anew in order to learn what Triton's own ptxas says of the binary that would run."""
    said = io.StringIO()
    with (
        mock.patch.object(knobs.compilation, "always_compile", True),
        mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
        contextlib.redirect_stdout(said),
    ):
        compiled = compile_launch(launch, GPUTarget("cuda", capability, 32))
    log = said.getvalue()
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    return Report(
        shared=compiled.metadata.shared,
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", log)),
        spills=spills,
        loop_spills=_loop_spills(compiled.asm["cubin"]) if spills else 0,
        warnings=tuple(sorted(set(re.findall(r"C7[45]\d\d", log)))),
        ptx=compiled.asm["ptx"],
    )


def _loop_spills(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), words) for at, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]*);", text)]
    jumps = [(int(to[1], 16), at) for at, words in code if (to := re.search(r"\bBRA\b.*0x([0-9a-f]+)", words))]
    loops = {
        (first, last): [words for at, words in code if first <= at <= last] for first, last in jumps if first < last
    }
    multiplying = [loop for loop, body in loops.items() if any("MMA" in words for words in body)]
    assert multiplying, "no loop of this kernel multiplies on tensor cores"
    # what lies around another one may begin in the middle of it
    innermost = [
        (first, last)
        for first, last in multiplying
        if not any(a <= last and first <= b and b - a < last - first for a, b in multiplying)
    ]
    return sum("LDL" in words or "STL" in words for loop in innermost for words in loops[loop])


def inspect_amd_launch(launch: Launch, architecture: str = "gfx942") -> AmdReport:
    """Compiles for an AMD GPU, on which fp32 is multiplied as it is."""
    changed = Launch(launch.kernel, launch.arguments | {"PRECISION": "ieee"})
    compiled = compile_launch(changed, GPUTarget("hip", architecture, 64))
    assembly = compiled.asm["amdgcn"]

    def most(name: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return AmdReport(
        shared=compiled.metadata.shared,
        scratch=most("private_segment_fixed_size"),
        spills=most("vgpr_spill_count"),
        assembly=assembly,
    )
