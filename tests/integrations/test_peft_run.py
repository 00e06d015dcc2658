"""python -m fusedlora run, in processes of its own, and the plugin for axolotl."""

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusedlora import run as run_module

peft = pytest.importorskip("peft")

SCRIPT = """
import sys, torch
from torch import nn
from peft import LoraConfig, get_peft_model
model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
model(torch.randn(2, 8))
print("ran", *sys.argv[1:])
"""
TOLD = "fusedlora: 1 call of PEFT's LoRA layers fused, 0 stock"

NO_FUSEDLORA = """
import os, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "fusedlora":
            raise ModuleNotFoundError("No module named 'fusedlora'", name="fusedlora")
if "autoload" in os.environ["PYTHONPATH"]:
    sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def call(*command: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LOCAL_RANK")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    full = [sys.executable, "-m", "fusedlora", "run", *command]
    return subprocess.run(full, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_script(script: str) -> None:
    done = call("--", sys.executable, script, "--flag", "--", "x")
    assert (done.returncode, done.stdout) == (0, "ran --flag -- x\n"), done.stderr
    assert done.stderr.splitlines()[-1] == TOLD


def test_without_it_nothing_is_fused(script: str) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=True)
    assert "fusedlora" not in done.stderr


def test_child_processes(script: str) -> None:
    """As torchrun and axolotl start them; beside rank 0 none speaks."""
    code = (
        "import os, subprocess, sys\nfor rank in '01':\n"
        f"  subprocess.run([sys.executable, {script!r}], env=os.environ | {{'LOCAL_RANK': rank}}, check=True)"
    )
    done = call("--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "ran\nran\n"), done.stderr
    assert done.stderr.count(TOLD) == 1


def test_accelerate_launch(script: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script]
    done = call("--", *launch, HF_HOME=str(tmp_path))
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr
    assert TOLD in done.stderr


def test_stock_calls_are_told(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT + "model.merge_adapter()\nmodel(torch.randn(2, 8))\n")
    done = call("--", sys.executable, str(path))
    assert "1 call of PEFT's LoRA layers fused, 1 stock\nfusedlora:   1 stock: the adapter is merged" in done.stderr


@pytest.mark.parametrize(
    "eager, told",
    [
        ("", "fusedlora: no eager call of PEFT's LoRA layers; calls that torch.compile has compiled are not counted"),
        ("model(x); model(x); ", "2 calls of PEFT's LoRA layers fused, 0 stock; calls that torch.compile has compiled"),
    ],
    ids=["none", "two"],
)
def test_compiled_calls_are_not_taken_for_none(eager: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    call_it = f"x = torch.randn(2, 8); {eager}torch.compile(model, backend='eager')(x)"
    path.write_text(SCRIPT.replace("model(torch.randn(2, 8))", call_it))
    done = call("--", sys.executable, str(path))
    assert done.returncode == 0 and told in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_command_takes_the_place_of_the_process() -> None:
    for code, expected in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)):
        assert call("--", sys.executable, "-c", code).returncode == expected


def test_no_command_and_an_unknown_one() -> None:
    assert (call().returncode, call("--").returncode) == (2, 2)
    assert "no command given" in call().stderr
    done = call("--", "no-such-command")
    assert done.returncode == 127 and "no-such-command is not found" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="file modes")
def test_a_file_that_cannot_be_run(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    for mode, reason in ((0o644, "permission denied"), (0o755, "Exec format error")):
        path.chmod(mode)
        done = call("--", str(path))
        assert done.returncode == 126 and done.stderr.endswith(f"{path} cannot be run: {reason}\n"), done.stderr
    assert call("--", str(tmp_path)).stderr.endswith("cannot be run: it is a folder\n")


def test_another_sitecustomize_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.they_ran = True\n")
    code = "import sitecustomize, sys; print(they_ran, sitecustomize.__file__, 'torch' in sys.modules)"
    done = call("--", sys.executable, "-c", code, path=tmp_path)
    assert done.stdout.split() == ["True", str(tmp_path / "sitecustomize.py"), "False"], done.stderr


def test_looking_for_peft_does_not_import_it() -> None:
    code = (
        "import sys, importlib.util, importlib.metadata as m\n"
        "spec = importlib.util.find_spec('peft'); importlib.util.find_spec('peft')\n"
        "print(spec.name, spec.loader.get_source('peft') is not None, 'peft' in sys.modules, m.version('peft'))"
    )
    done = call("--", sys.executable, "-c", code)
    assert done.stdout.split() == ["peft", "True", "False", peft.__version__], done.stderr


def test_an_environment_without_fusedlora_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_FUSEDLORA)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("")
    done = call("--", sys.executable, "-c", "import peft", path=tmp_path)
    assert done.returncode == 1 and "has peft, but no fusedlora" in done.stderr
    assert call("--", sys.executable, "-c", "import json", path=tmp_path).returncode == 0


def test_pythonpath_is_kept(tmp_path: Path) -> None:
    done = call("--", sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])", path=tmp_path)
    assert done.stdout.strip().split(os.pathsep) == [str(run_module.AUTOLOAD), str(tmp_path)]


class TestAxolotl:
    @pytest.fixture
    def plugin(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The plugin over a stand-in for axolotl's base class, loaded as axolotl loads one."""
        import importlib

        base = types.ModuleType("axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
        module = importlib.import_module("fusedlora.integrations.axolotl")
        monkeypatch.delitem(module.__dict__, "FusedLoRAPlugin", raising=False)
        plugin = module.FusedLoRAPlugin()
        assert isinstance(plugin, base.BasePlugin) and type(plugin) is module.FusedLoRAPlugin
        yield plugin
        module.__dict__.pop("FusedLoRAPlugin")

    def test_fuses_and_tells(self, plugin: Any, capsys: pytest.CaptureFixture[str]) -> None:
        from fusedlora.integrations import peft as backend

        with backend.enable():  # so that the block's end takes back what the plugin turns on
            plugin.pre_model_load({"adapter": "lora", "lora_o_kernel": False, "lora_mlp_kernel": None})
            assert backend.StockLinear.forward is backend.forward
            config = peft.LoraConfig(target_modules=["0"])
            trainer = types.SimpleNamespace(model=peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config))
            trainer.model(torch.randn(2, 8))
            plugin.post_trainer_create({}, trainer)
            assert "1 LoRA layers: 1 fused" in capsys.readouterr().out
            backend.disable()
        assert backend.StockLinear.forward is not backend.forward

    @pytest.mark.parametrize("name", ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "unsloth_lora_qkv"])
    def test_other_kernels_must_be_off(self, name: str, plugin: Any) -> None:
        with pytest.raises(ValueError, match=f"{name}: false"):
            plugin.pre_model_load({name: True})

    def test_without_axolotl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import fusedlora.integrations.axolotl as module

        monkeypatch.setitem(sys.modules, "axolotl", None)
        with pytest.raises(ImportError, match="needs axolotl"):
            module.FusedLoRAPlugin  # noqa: B018
        with pytest.raises(AttributeError, match="NoSuchPlugin"):
            module.NoSuchPlugin  # noqa: B018
