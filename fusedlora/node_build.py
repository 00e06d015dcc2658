"""Builds csrc/node.cpp, lora_linear's autograd node in C++, against the torch and the Python that run this.

It needs a C++ compiler and Python's headers, no GPU and no nvcc. It lies in the user's cache, in a folder named by its
source and these versions; another torch or Python needs another.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch

from .cuda_build import LOG, BuildError, locked, sources_dir

MODULE = "fusedlora_node"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
# what torch's own Python module needs too: they are loaded already, and found without a path
LIBRARIES = ("torch_python", "torch_cpu", "c10")


def source() -> Path:
    return sources_dir() / "node.cpp"


@cache
def module_path() -> Path:
    """Where the node of this source, torch and Python lies, built or not."""
    from .cache import cache_dir

    digest = hashlib.sha256(repr(FLAGS).encode() + source().read_bytes()).hexdigest()[:16]
    python = sysconfig.get_config_var("SOABI") or platform.python_version()
    name = f"node-{digest}-torch{torch.__version__}-{python}"
    return cache_dir() / name / f"{MODULE}.so"


def find_compiler() -> Path:
    """The compiler of CXX, else c++ or g++ of PATH. Raises BuildError where there is none."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++"):
        if found := shutil.which(name):
            return Path(found)
    raise BuildError(
        f"no C++ compiler: CXX is {asked!r}" if asked else "no C++ compiler: neither c++ nor g++ is on PATH"
    )


def command(compiler: Path, out: Path) -> list[str]:
    assert torch.__file__ is not None
    home = Path(torch.__file__).parent
    places = [f"-I{home / 'include'}", f"-I{sysconfig.get_path('include')}", f"-L{home / 'lib'}"]
    return [str(compiler), *FLAGS, *places, str(source()), "-o", str(out), *(f"-l{name}" for name in LIBRARIES)]


def build() -> Path:
    """Builds the node into the user's cache, if it is not there, and returns its path.

    Only one process builds at a time; the others wait for it. Nobody ever sees half a module.

    Raises:
        BuildError: it could not be built; the message is one line.
    """
    if sys.platform != "linux":
        raise BuildError(f"the autograd node is built on Linux, this is {sys.platform}")
    compiler, path = find_compiler(), module_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / "lock"):
            if not path.is_file():
                _compile(compiler, path)
    except OSError as error:
        raise BuildError(f"cannot write {path.parent} ({error})") from None
    return path


def _compile(compiler: Path, path: Path) -> None:
    # beside the module, so that moving it there is atomic
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        out = Path(scratch, path.name)
        done = subprocess.run(command(compiler, out), capture_output=True, text=True, errors="replace")
        output, log = done.stdout + done.stderr, path.parent / LOG
        log.write_text(output)
        if done.returncode != 0:
            said = [line.strip() for line in output.splitlines() if re.search(r"\b(error|fatal)\b", line)]
            why = said[0] if said else f"it ended with status {done.returncode}"
            raise BuildError(f"{compiler} failed: {why} (all of its output: {log})")
        os.replace(out, path)
