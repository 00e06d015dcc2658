"""The build of the autograd node: where it lies, and one clear line where it cannot be made."""

import functools
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fusedlora import __main__ as cli
from fusedlora import cuda_build, node, node_build
from fusedlora.recipe import SOURCES

LOAD = node.load.__wrapped__  # before conftest.py puts something in its place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the node is built on Linux")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    node_build.module_path.cache_clear()
    yield tmp_path / "cache/fusedlora"
    node_build.module_path.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a script in the compiler's place."""

    def make(script: str = 'while [ "$1" != -o ]; do shift; done; echo module > "$2"') -> Path:
        path = tmp_path / "my c++"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return make


def test_it_is_built_once_for_a_torch_and_a_python(compiler, cache_folder: Path, monkeypatch) -> None:
    compiler()
    path = node_build.build()
    assert path == node_build.module_path() and path.read_text() == "module\n"
    assert path.parent.parent == cache_folder and not list(path.parent.glob("build-*"))
    compiler("exit 1")
    assert node_build.build() == path, "nothing is compiled again"
    monkeypatch.setattr(torch, "__version__", "9.9")
    node_build.module_path.cache_clear()
    assert node_build.module_path() != path


def test_one_line_says_why_not(compiler, monkeypatch, capsys, cache_folder: Path) -> None:
    monkeypatch.setattr(cuda_build, "build", lambda say: Path(__file__))
    path = compiler('echo "node.cpp:7:9: fatal error: Python.h: No such file"; echo "and more"; exit 1')
    assert cli.main(["build"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"not built: {path} failed: node.cpp:7:9: fatal error: Python.h: No such file (all of its")
    (log,) = cache_folder.rglob(node_build.LOG)
    assert "and more" in log.read_text() and str(log) in line and not list(cache_folder.rglob("*.so"))


def test_no_compiler(monkeypatch, capsys) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cuda_build, "build", lambda say: Path(__file__))
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert cli.main(["build"]) == 1
    assert capsys.readouterr().err == "not built: no C++ compiler: neither c++ nor g++ is on PATH\n"


def test_a_compiler_asked_for_by_name_is_taken_or_missing(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(node_build.BuildError, match="CXX is 'no-such-compiler'"):
        node_build.find_compiler()


def test_nothing_is_loaded_where_nothing_is_built(recwarn) -> None:
    assert not LOAD("cpu") and not LOAD("cuda") and not recwarn.list


def test_what_is_no_module_is_said_and_left(monkeypatch, tmp_path: Path) -> None:
    broken = tmp_path / "fusedlora_node.so"
    broken.write_text("no module")
    monkeypatch.setattr(node_build, "module_path", functools.cache(lambda: broken))
    with pytest.warns(UserWarning, match="fusedlora_node.so cannot be loaded, calls go through Python: "):
        assert not LOAD("cuda")
    assert node.run is None


def test_sources_have_the_same_order_in_both_languages() -> None:
    (names,) = re.findall(r"enum Source : int64_t {(.*?)SOURCES,", node_build.source().read_text(), re.DOTALL)
    assert tuple(name.strip().lower() for name in names.split(",") if name.strip()) == SOURCES
