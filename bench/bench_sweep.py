"""The sweep: ours against the frozen linear and eager arithmetic at 200 shapes, kept in a file that a next run goes on.

A shape's record holds for the code and the versions that it was measured with: another code measures it again.
"""

import ast
import hashlib
import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_cases import Case
from bench_contenders import sweep_contenders
from bench_measure import DoesNotFit, Lab
from bench_rows import Row

import fusedlora.kernels
from fusedlora import explain
from fusedlora.explanation import Explanation
from fusedlora.timing import GraphTimer, WallTimer, ratios

Record = dict[str, Any]


# The package's modules that decide the speed, beside the kernels.
DECISIVE = (
    "backends", "calls", "config", "costs", "cuda", "cuda_build", "cuda_config", "memory", "packed", "schedule",
    "why_not",
)  # fmt: skip


def code_id() -> str:
    """Eight digits for what decides the speed: the kernels, their launchers, their configs and the choice of backend.

    Comments and docstrings do not change it.
    """
    package = Path(fusedlora.__file__).parent
    kernels = Path(fusedlora.kernels.__file__).parent
    files = [*kernels.glob("*.py"), *(package / f"{name}.py" for name in DECISIVE)]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    csrc = package.parent / "csrc"
    for path in [*sorted(package.glob("tuning/*.json")), *sorted(csrc.glob("*.[ch]*"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def file_name(facts: dict[str, str]) -> str:
    """sweep-h100-80gb-hbm3, without an ending, for the GPU of `machine`; sweep-cpu without one."""
    words = re.findall(r"[a-z0-9]+", facts.get("gpu", "cpu").lower())
    return "-".join(["sweep", *(word for word in words if word not in ("nvidia", "amd"))])


class Store:
    """The records in a file, a line each; without a path in memory alone."""

    def __init__(self, path: Path | None, facts: dict[str, str]) -> None:
        self.path = path
        self.facts = facts
        self.versions = {name: facts[name] for name in ("torch", "cuda", "triton")} | {"code": code_id()}
        self.state: dict[str, str] = {}  # clocks and power while the frozen linear ran
        self.copy_gbps: float | None = None
        self.records: list[Record] = []
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            self.records = content["shapes"]
            if content["machine"].get("gpu") == facts.get("gpu"):
                self.copy_gbps = content["copy_gbps"]

    def current(self) -> dict[str, Record]:
        """The records that hold for this code and these versions, by the shape's name."""
        return {record["id"]: record for record in self.records if record["versions"] == self.versions}

    def add(self, record: Record) -> None:
        """Put it in the place of any other of its shape, and write the file as a whole, or not at all."""
        self.records = [old for old in self.records if old["id"] != record["id"]]
        self.records.append(record | {"versions": self.versions})
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(
            {"machine": self.facts, "state": self.state, "copy_gbps": self.copy_gbps}, indent=1
        ).removesuffix("\n}")
        lines = ",\n".join(map(json.dumps, self.records))
        beside = self.path.with_suffix(".part")
        beside.write_text(f'{head},\n "shapes": [\n{lines}\n]\n}}\n')
        os.replace(beside, self.path)


class OutOfTime(Exception):
    """The seconds given to the sweep have passed."""


class Sweep:
    """Measures shapes that the store does not have yet."""

    def __init__(self, lab: Lab, store: Store, seconds: float | None) -> None:
        self.lab, self.store, self.seconds = lab, store, seconds
        self.began = time.monotonic()

    def measure(self, case: Case, *, compile: bool) -> tuple[Record, list[float]] | None:
        """The shape's record, now in the store, and the times of ours a round; None where it was there.

        Raises:
            OutOfTime: the seconds have passed.
            AssertionError: ours, the frozen linear or the eager arithmetic failed; nothing is stored.
        """
        if case.id in self.store.current():
            return None
        if self.seconds is not None and time.monotonic() - self.began > self.seconds:
            raise OutOfTime(f"{self.seconds:.0f} s have passed: run it again to go on")
        if self.store.copy_gbps is None:
            self.store.copy_gbps = copy_gbps(self.lab)
        told = chosen(case, self.lab.device)
        about = {"auto": told.taken, "why_not": told.why_not.get("triton")}
        record: Record = {"id": case.id, "case": asdict(case)} | about
        rows = sweep_contenders(case, told.backend, told.backward, compile=compile)
        try:
            found = {name: row for (_, name), row in self.lab.measure(case, {"training": rows}).items()}
        except DoesNotFit as error:
            record["does_not_fit"] = str(error)
            self.store.add(record)
            return record, []
        for name in ("frozen", "fusedlora", "eager"):
            if found[name].failed is not None:
                raise AssertionError(f"{case.title}, {name}: {found[name].failed}\n{found[name].trace}")
        self.store.state = self.lab.state
        ours = found["fusedlora"]
        record["config"] = ours.config
        record["rows"] = {name: _facts(row) for name, row in found.items()}
        for name, row in found.items():
            if name != "fusedlora" and row.times:
                record["rows"][name]["ours_over_this"] = asdict(ratios(ours.times, row.times))
        self.store.add(record)
        return record, ours.times


def _facts(row: Row) -> Record:
    """A row as it is kept."""
    known = row.as_dict()
    names = ("seconds", "tax", "versus_rival", "tflops", "gbps", "errors", "peak_bytes", "backend", "failed", "rounds")
    return {name: known[name] for name in names if known.get(name) is not None}


def chosen(case: Case, device: torch.device) -> Explanation:
    """What `auto` takes for a shape, and why not the others."""
    dtype = case.torch_dtype
    shapes = ((case.M, case.K), (case.N, case.K), (case.r, case.K), (case.N, case.r))
    return explain(*(torch.empty(shape, device=device, dtype=dtype) for shape in shapes))


def copy_gbps(lab: Lab) -> float:
    """Bytes read and written a second by a large copy: the ceiling of a roofline."""
    count = (1 << 28) if lab.device.type == "cuda" else (1 << 22)
    pairs = [tuple(torch.ones(count, device=lab.device) for _ in range(2)) for _ in range(2)]
    calls = [lambda a=a, b=b: a.copy_(b) for a, b in pairs]
    if lab.stream is None:
        timer: GraphTimer | WallTimer = WallTimer(calls, device=lab.device)
    else:
        lab.stream.wait_stream(torch.cuda.current_stream(lab.device))
        timer = GraphTimer(calls, stream=lab.stream)
    seconds = min(timer() for _ in range(5))
    timer.close()
    return 2 * 4 * count / seconds / 1e9
