"""Builds csrc, the CUDA C++ kernels for Hopper, into a library of its own: python -m fusedlora build.

The library has a C interface and knows neither torch nor Python, so one build serves them all; it needs nvcc and ninja,
no GPU. It lies in the user's cache, in a folder named by its sources and its nvcc, or in the package itself where
setup.py was asked for it. This module imports the standard library alone, so that setup.py can load it by its path.
"""

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LIBRARY = "libfusedlora.so"
LOG = "build.log"  # beside it in the cache: all that the compilers said
# 12.5 brings cudaGetDriverEntryPointByVersion.
OLDEST_NVCC = (12, 5)
FLAGS = (
    *("-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC", "-cudart", "static"),
    *("-Xptxas", "-v"),  # the log then tells of registers and spills
)
# What lora.cu is compiled as, side by side: the kernels of a direction and so many 16 ranks, and so many terms of an
# adapter's numbers, those of decoding, and what lies above them.
UNITS = {
    f"{direction}_r{16 * ranks}_{terms}": (
        f"-DFUSEDLORA_UNIT_RANKS={ranks}",
        f"-DFUSEDLORA_UNIT_BACKWARD={backward}",
        f"-DFUSEDLORA_UNIT_TERMS={terms}",
    )
    for ranks, terms in ((4, 1), (16, 1), (8, 1), (4, 3), (2, 1), (1, 1))  # the longest first
    for backward, direction in ((1, "backward"), (0, "forward"))
} | {
    "decode_bf16": ("-DFUSEDLORA_UNIT_DECODE=1",),
    "decode_fp16": ("-DFUSEDLORA_UNIT_DECODE=0",),
    "interface": ("-DFUSEDLORA_UNITS",),
}
# A compiler takes 0.25 GB (nvcc 13.0); the rest is for what else may want memory meanwhile.
MEMORY_PER_JOB = 1 << 30


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


def sources_dir() -> Path:
    """csrc: in the package where that was installed, else beside it."""
    here = Path(__file__).resolve().parent
    installed = here / "_csrc"
    return installed if installed.is_dir() else here.parent / "csrc"


@cache
def sources_hash() -> str:
    """Of the sources and of how they are compiled."""
    digest = hashlib.sha256(repr((FLAGS, UNITS)).encode())
    for file in sorted(file for file in sources_dir().iterdir() if file.suffix in (".cu", ".cuh", ".h")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda. Raises BuildError where there is none."""
    home = os.environ.get("CUDA_HOME")
    for place in (os.path.join(home, "bin") if home else None, os.environ.get("PATH"), "/usr/local/cuda/bin"):
        if place and (found := shutil.which("nvcc", path=place)):
            return Path(found)
    raise BuildError("nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda/bin")


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """Its major and minor version. Raises BuildError where it does not tell."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{nvcc} does not run ({error})") from None
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if release is None:
        raise BuildError(f"{nvcc} --version names no release")
    return int(release[1]), int(release[2])


def find_ninja() -> Path:
    """ninja of PATH or of this Python's environment. Raises BuildError where there is none."""
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if found is None:
        raise BuildError("ninja was not found (pip install ninja)")
    return Path(found)


def find_library() -> Path | None:
    """The library of the sources as they are now, if it has been built."""
    packaged = Path(__file__).resolve().parent / LIBRARY
    if packaged.is_file():
        return packaged
    from .cache import cache_dir

    def version(library: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", library.parent.name.split("nvcc")[1].split("-")[0])]

    built = cache_dir().glob(f"cuda-{sources_hash()}-nvcc*-{platform.machine()}/{LIBRARY}")
    return max(built, key=version, default=None)


def build(say: Callable[[str], None]) -> Path:
    """Builds the library into the user's cache, if it is not there, and returns its path.

    Only one process builds at a time; the others wait for it. Nobody ever sees half a library.

    Raises:
        BuildError: it could not be built; the message is one line.
    """
    nvcc, version, ninja = _tools()
    from .cache import cache_dir

    name = f"cuda-{sources_hash()}-nvcc{version[0]}.{version[1]}-{platform.machine()}"
    library = cache_dir() / name / LIBRARY
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with locked(library.parent / "lock"):
            if not library.is_file():
                _compile(nvcc, ninja, library, library.parent / LOG, say)
    except OSError as error:
        raise BuildError(f"cannot write {library.parent} ({error})") from None
    return library


def build_into(library: Path, say: Callable[[str], None]) -> None:
    """Builds the library at this path, for setup.py. Raises BuildError."""
    nvcc, _, ninja = _tools()
    library.parent.mkdir(parents=True, exist_ok=True)
    _compile(nvcc, ninja, library, Path(tempfile.gettempdir(), f"fusedlora-{os.getpid()}-{LOG}"), say)


def _tools() -> tuple[Path, tuple[int, int], Path]:
    if sys.platform != "linux":
        raise BuildError(f"the CUDA kernels are built on Linux, this is {sys.platform}")
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    if version < OLDEST_NVCC:
        raise BuildError(
            f"{nvcc} is {version[0]}.{version[1]}, the kernels need {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer"
        )
    return nvcc, version, find_ninja()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of this file: only one process does."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _jobs() -> int:
    """As many as there are processors and memory for them."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) << 10 if available else free
        # a container's limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass
    return max(1, min(len(os.sched_getaffinity(0)), len(UNITS), free // MEMORY_PER_JOB))


def ninja_file(nvcc: Path) -> str:
    """What ninja is told: an object of each unit, and the library of all."""

    def quoted(*words: str | Path) -> str:
        return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")

    source = re.sub(r"([$: ])", r"$\1", str(sources_dir() / "lora.cu"))
    lines = [
        f"rule compile\n command = {quoted(nvcc, *FLAGS)} $defines -c $in -o $out\n description = $out",
        f"rule link\n command = {quoted(nvcc, *FLAGS, '--shared')} $in -o $out\n description = $out",
    ]
    lines += [f"build {name}.o: compile {source}\n defines = {quoted(*defines)}" for name, defines in UNITS.items()]
    lines.append(f"build {LIBRARY}: link {' '.join(f'{name}.o' for name in UNITS)}")
    return "\n".join(lines) + "\n"


def _compile(nvcc: Path, ninja: Path, library: Path, log: Path, say: Callable[[str], None]) -> None:
    # beside the library, so that moving it there is atomic
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        Path(scratch, "build.ninja").write_text(ninja_file(nvcc))
        status = {**os.environ, "NINJA_STATUS": "[%f/%t] %e s  "}
        process = subprocess.Popen(
            [ninja, "-C", scratch, "-j", str(_jobs())],
            env=status,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith("["):
                say(line.rstrip())
        log.write_text("".join(output))
        if process.wait() != 0:
            said = [line.strip() for line in output if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
            why = said[0] if said else f"ninja ended with status {process.returncode}"
            raise BuildError(f"{nvcc} failed: {why} (all of its output: {log})")
        os.replace(Path(scratch, LIBRARY), library)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes none."""


def run(args: argparse.Namespace) -> int:
    """Builds the library and the autograd node and says where they lie.

    0: they are there; 1: one of them could not be built, for the reason printed.
    """
    from . import node_build  # needs torch

    status = 0
    for make in (lambda: build(lambda line: print(f"  {line}", flush=True)), node_build.build):
        begin = time.monotonic()
        try:
            made = make()
        except BuildError as error:
            print(f"not built: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"{made}: {made.stat().st_size / 2**20:.1f} MB, {time.monotonic() - begin:.0f} s")
    return status
