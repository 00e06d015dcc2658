"""What is built, what is installed, and what importing it does: without a GPU, and without triton."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = sysconfig.get_paths()["purelib"]

# Put in front of a child's code: any import of triton fails as if it were not installed.
BLOCK_TRITON = """
import sys
class _NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, _NoTriton())
"""


def run_child(code: str, cwd: Path, *, first: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> str:
    """Runs code in a Python of its own that sees no GPU, `first` leading its path; returns what it printed."""
    full_env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    full_env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    full_env["PYTHONPATH"] = os.pathsep.join(p for p in (*first, full_env.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env=full_env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def source_files() -> set[str]:
    """Files that an installed package must hold, by their installed path."""
    package = [p.relative_to(ROOT) for p in (ROOT / "fusedlora").rglob("*.py")]
    kernels = [
        Path("fusedlora/kernels") / p.relative_to(ROOT / "kernels/triton")
        for p in (ROOT / "kernels/triton").rglob("*.py")
    ]
    sources = [Path("fusedlora/_csrc") / p.name for p in (ROOT / "csrc").iterdir() if p.suffix != ".md"]
    return {p.as_posix() for p in [*package, *kernels, *sources]} | {"fusedlora/py.typed"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources to build in, so that no build output lands in the checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not run from a source tree")
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md"):
        shutil.copy2(ROOT / name, copy / name)
    for name in ("fusedlora", "kernels", "csrc", "tests", "bench"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel built from that sdist, as `python -m build` makes them."""
    for module in ("build", "setuptools", "wheel"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return out


def test_a_wheel_with_the_library_is_for_this_kind_of_machine(tree: Path, tmp_path: Path) -> None:
    """nvcc is played by a script here, so that no GPU code is compiled; tests/test_cuda_build.py compiles it."""
    pytest.importorskip("build")
    if sys.platform != "linux" or shutil.which("ninja") is None:
        pytest.skip("needs Linux and ninja")
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo "release 13.0,"; exit;; esac\n'
        'while [ $# -gt 1 ]; do shift; done\necho library > "$1"\n'
    )
    nvcc.chmod(0o755)
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--wheel"]
    command += ["--outdir", str(tmp_path), str(tree)]
    env = os.environ | {"FUSEDLORA_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"fusedlora-[^-]*-py3-none-linux_\w+\.whl", path.name)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("fusedlora/libfusedlora.so") == b"library\n"
    shutil.rmtree(tree / "build")
    nvcc.write_text('#!/bin/sh\necho "release 11.8,"\n')
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert f"FUSEDLORA_BUILD_CUDA=1: {nvcc} is 11.8, the kernels need 12.5 or newer" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == source_files()
    assert "fusedlora/kernels/__init__.py" in names


def test_sdist_holds_the_sources_and_the_tests(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    kernels = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    wanted = {n for n in source_files() if not n.startswith(("fusedlora/kernels/", "fusedlora/_csrc/"))} | kernels
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").iterdir()}
    assert not wanted - names
    assert {"pyproject.toml", "README.md", "tests/conftest.py", "tests/test_packaging.py"} <= names
    assert not [n for n in names if n.endswith(".pyc")]


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)([^;\n]*)(.*)$", metadata, re.MULTILINE)
    core = {name: (bound, marker) for name, bound, marker in required if "extra ==" not in marker}
    assert set(core) == {"torch", "numpy", "safetensors", "triton"}
    assert "linux" in core["triton"][1]
    for name, (bound, _) in core.items():
        assert not re.search(r"==|<|~", bound), f"{name}{bound} is pinned"
    assert re.search(r"^Requires-Python: >=3\.\d+$", metadata, re.MULTILINE)


def test_version_is_the_packages(wheel: Path) -> None:
    import fusedlora

    assert wheel.name.split("-")[1] == fusedlora.__version__


WHERE = """
import json, importlib.util, fusedlora, fusedlora.kernels, fusedlora.backends
spec = importlib.util.find_spec("kernels")
from fusedlora import cuda_build
print(json.dumps({
    "package": fusedlora.__file__,
    "sources": str(cuda_build.sources_dir()),
    "kernels": list(fusedlora.kernels.__path__),
    "top_level_kernels": list(spec.submodule_search_locations or []) if spec else [],
}))
"""


def test_installed_wheel_imports_and_has_no_top_level_kernels(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    found = json.loads(run_child(WHERE, tmp_path, first=(str(site),)))
    assert found["package"] == str(site / "fusedlora/__init__.py")
    assert found["kernels"] == [str(site / "fusedlora/kernels")]
    assert found["sources"] == str(site / "fusedlora/_csrc")
    assert not any(str(site) in place for place in found["top_level_kernels"])


def test_editable_install_imports_and_has_no_top_level_kernels(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    site = tmp_path / "site"
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, timeout=300)
    (editable,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(editable).extractall(site)
    # -S keeps this environment's own installation out; PYTHONPATH reads no .pth file, addsitedir does.
    libraries = tuple(p for p in sys.path if p and Path(p) != ROOT)
    code = f"import site; site.addsitedir({str(site)!r})\n{WHERE}"
    found = json.loads(run_child(code, tmp_path, options=("-S",), first=(str(site), *libraries)))
    assert found["package"] == str(tree / "fusedlora/__init__.py")
    assert found["kernels"] == [str(tree / "kernels/triton")]
    assert found["sources"] == str(tree / "csrc")
    assert not any(str(tree) in place for place in found["top_level_kernels"])


def test_checkout_does_not_pass_for_hugging_faces_kernels() -> None:
    """With the checkout as working directory kernels/ is a namespace package: transformers must not take it."""
    pytest.importorskip("transformers")
    code = "import transformers.utils.import_utils as u; print(u.is_kernels_available())"
    elsewhere = run_child(code, Path(SITE))
    assert run_child(code, ROOT) == elsewhere


SIDE_EFFECTS = """
import json, os, random, sys, threading, warnings
import torch
def state():
    return {
        "rng": torch.get_rng_state().sum().item(),
        "python_rng": hash(random.getstate()),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.cuda.is_initialized(),
        "environment": dict(os.environ),
        "python_threads": threading.active_count(),
        "files": sorted(os.listdir(".")),
        "meta_path": len(sys.meta_path),
        "filters": len(warnings.filters),
    }
shown = []
warnings.showwarning = lambda *args, **kwargs: shown.append(str(args[0]))
before, modules = state(), set(sys.modules)
import fusedlora
after = state()
print(json.dumps({
    "changed": [k for k in before if before[k] != after[k]],
    "warnings": shown,
    "new": sorted({m.split(".")[0] for m in set(sys.modules) - modules}),
}))
"""


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    seen = json.loads(run_child(SIDE_EFFECTS, tmp_path))
    assert seen["changed"] == []
    assert seen["warnings"] == []
    foreign = set(seen["new"]) & {"triton", "transformers", "peft", "safetensors", "matplotlib", "tqdm", "numpy"}
    assert not foreign, "importing fusedlora alone brings in no other library than torch"


def test_every_public_name_resolves_without_triton(tmp_path: Path) -> None:
    code = """
import json, fusedlora
names = list(fusedlora.__all__)
assert not set(names) - set(dir(fusedlora)), "dir() lists every public name"
for name in names:
    getattr(fusedlora, name)
try:
    fusedlora.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise SystemExit("an unknown name gave no AttributeError")
assert not [m for m in sys.modules if m.split(".")[0] == "triton"]
print(json.dumps(names))
"""
    names = json.loads(run_child(BLOCK_TRITON + code, tmp_path))
    assert len(names) == len(set(names))
    assert set(names) >= {
        "FusedLoRALinear",
        "__version__",
        "apply_lora",
        "dora_linear",
        "explain",
        "load_adapter",
        "lora_linear",
        "lora_parameters",
        "merge_and_unload",
        "merge_lora",
        "report",
        "save_adapter",
        "unmerge_lora",
    }


TRAIN = """
import torch, fusedlora
layer = fusedlora.FusedLoRALinear(32, 48, r=3)
x = torch.randn(5, 32)
layer(x).sum().backward()
assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
print(fusedlora.explain(x, layer))
try:
    fusedlora.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, scaling=1.0, backend="triton")
except (RuntimeError, ValueError) as error:
    print("named:", error)
else:
    raise SystemExit("backend='triton' ran without triton")
"""

BROKEN_TRITON = 'raise OSError("libcuda.so.1: cannot open shared object file")\n'


@pytest.mark.parametrize("triton", ["missing", "broken"])
def test_trains_on_a_cpu_with_triton(triton: str, tmp_path: Path) -> None:
    """A missing or broken triton is a reason not to take the triton backend, not an error."""
    if triton == "missing":
        out = run_child(BLOCK_TRITON + TRAIN, tmp_path)
    else:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton/__init__.py").write_text(BROKEN_TRITON)
        out = run_child(TRAIN, tmp_path, first=(str(tmp_path),))
    explained, named = out.split("named:")
    assert "reference" in explained
    wanted = "No module named 'triton'" if triton == "missing" else "libcuda.so.1"
    assert wanted in named, "the reason names what importing triton said"


def test_kernels_directory_has_no_init() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "it would install a top-level `kernels`"


def test_readme_names_what_exists() -> None:
    import fusedlora

    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\bfusedlora\.(\w+)\(", text)) <= set(fusedlora.__all__)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (ROOT / link).exists()]
    anchors = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.findall(r"-e '\.\[(\w+)\]'", text)
    assert extras and set(extras) <= set(metadata["project"]["optional-dependencies"])
