"""The demo's text: the docstrings of Python's standard library, each labelled with the package it comes from.

The sources are parsed, never imported. What is found depends on the Python version, nothing else.
"""

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Left out where only some installations have them: removed by Python 3.12 or 3.13, or packaged apart.
NOT_EVERYWHERE = {"distutils", "idlelib", "lib2to3", "test", "tkinter", "turtledemo"}
SHORTEST = 25  # characters; below that a docstring says nothing


@dataclass(frozen=True)
class Corpus:
    """Texts with the index of their package in `packages`."""

    packages: tuple[str, ...]
    train: list[tuple[str, int]]
    val: list[tuple[str, int]]


def _sources(root: Path, package: str) -> list[Path]:
    folder, module = root / package, root / f"{package}.py"
    if folder.is_dir():
        files = folder.rglob("*.py")
        return sorted(f for f in files if not {"test", "tests"} & set(f.relative_to(root).parts))
    return [module] if module.is_file() else []


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # a few files of the library are examples of errors
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= SHORTEST:
                yield text


@cache
def _by_package(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for package in sorted(sys.stdlib_module_names - NOT_EVERYWHERE):
        for file in _sources(root, package):
            for text in _docstrings(file):
                if text not in seen:
                    seen.add(text)
                    found.setdefault(package, []).append(text)
    return found


def stdlib_docstrings(packages: int = 20, *, at_most: int = 250, val_share: float = 0.2, seed: int = 0) -> Corpus:
    """Docstrings of the packages that have most of them, split at random within each package.

    A text that occurs twice counts once, for the first package in alphabetical order, so that none is in both parts.

    Args:
        packages: number of classes.
        at_most: docstrings kept of a package.
        val_share: part of each package kept for validation.
        seed: of the choice and the split.

    Raises:
        ValueError: so many packages there are not.
        RuntimeError: the standard library's sources are not installed (some embedded Pythons ship bytecode only).
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = _by_package(root)
    names = sorted(sorted(found), key=lambda name: -len(found[name]))[:packages]
    if len(names) < min(packages, 2):
        raise RuntimeError(
            f"{len(names)} packages with docstrings in {root}, the demo needs {packages}: "
            "this Python has come without the sources of its standard library"
        )
    if len(names) < packages:
        raise ValueError(f"packages is {packages}, must be at most {len(names)}: so many in {root} have docstrings")
    rng = random.Random(seed)
    train, val = [], []
    for label, name in enumerate(names):
        texts = rng.sample(found[name], min(at_most, len(found[name])))
        held_out = max(1, round(len(texts) * val_share))
        val += [(text, label) for text in texts[:held_out]]
        train += [(text, label) for text in texts[held_out:]]
    return Corpus(tuple(names), train, val)
