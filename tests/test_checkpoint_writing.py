"""Writing an adapter: a save that dies leaves the old one; what is warned of and refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedlora import FusedLoRALinear, apply_lora, load_adapter, save_adapter

safetensors_torch = pytest.importorskip("safetensors.torch")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = {"target_modules": ["0", "2"], "r": 2, "lora_alpha": 6, "modules_to_save": ["3"]}


def base() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 4), nn.BatchNorm1d(4))


def adapted(alpha: float = 6) -> nn.Module:
    model = apply_lora(base(), **FIELDS | {"lora_alpha": alpha})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("exists", [True, False], ids=["over an old one", "new"])
@pytest.mark.parametrize("step", ["write", "first rename", "second rename"])
def test_a_save_that_fails_leaves_the_old_adapter(
    step: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exists:
        save_adapter(adapted(alpha=6), tmp_path)
        (tmp_path / "notes.txt").write_text("kept")
    before = files(tmp_path)
    renames = iter(["first rename", "second rename", "restore"])
    replace, save_file = os.replace, safetensors_torch.save_file

    def failing_replace(source: object, target: object) -> None:
        if next(renames) == step:
            raise OSError("disk full")
        replace(source, target)

    def failing_save(tensors: dict[str, torch.Tensor], file: Path, **kwargs: object) -> None:
        save_file(tensors, file, **kwargs)
        if step == "write":
            raise OSError("disk full")

    monkeypatch.setattr(os, "replace", failing_replace)
    monkeypatch.setattr(safetensors_torch, "save_file", failing_save)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapted(alpha=8), tmp_path)
    monkeypatch.undo()
    assert files(tmp_path) == before
    save_adapter(adapted(alpha=8), tmp_path)
    assert {CONFIG, WEIGHTS} <= files(tmp_path).keys() <= {CONFIG, WEIGHTS, "notes.txt"}
    assert {m.scaling for m in load_adapter(base(), tmp_path).modules() if isinstance(m, FusedLoRALinear)} == {4.0}


KILLED = """
import os, sys
import torch
from fusedlora import apply_lora, save_adapter
model = apply_lora(torch.nn.Sequential(torch.nn.Linear(6, 10)), ["0"], r=2, lora_alpha=8)
replace, left = os.replace, int(sys.argv[2])
def dying(source, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    replace(source, target)
os.replace = dying
save_adapter(model, sys.argv[1])
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_process_that_dies_in_a_save(renames: int, tmp_path: Path) -> None:
    old = apply_lora(nn.Sequential(nn.Linear(6, 10)), ["0"], r=2, lora_alpha=6)
    save_adapter(old, tmp_path)
    before = {CONFIG: (tmp_path / CONFIG).read_bytes(), WEIGHTS: (tmp_path / WEIGHTS).read_bytes()}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(renames)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    if renames == 0:
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        load_adapter(old, tmp_path)
    else:
        # New weights beside the old configuration: each whole, and known not to belong together.
        assert (tmp_path / CONFIG).read_bytes() == before[CONFIG]
        with pytest.raises(ValueError, match="they are not of one save"):
            load_adapter(old, tmp_path)
    save_adapter(old, tmp_path)
    load_adapter(old, tmp_path)


def test_saving_copies_what_it_writes(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(model), tmp_path)
    before = {k: v.clone() for k, v in again.state_dict().items()}
    with torch.no_grad():
        model[0].lora_A.zero_()
    save_adapter(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_both_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    (tmp_path / "other").touch()
    assert {(tmp_path / name).stat().st_mode for name in (CONFIG, WEIGHTS)} == {(tmp_path / "other").stat().st_mode}


def test_what_is_trained_and_not_saved_warns(tmp_path: Path) -> None:
    model = apply_lora(base(), ["0"])
    model[4].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not saved: 4\.weight"):
        save_adapter(model, tmp_path)


def test_an_ending_that_peft_reads_differently_warns(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match=r"peft will take \['lm_head'\]"):
        save_adapter(apply_lora(model, ["a"], modules_to_save=["head"]), tmp_path)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model Sequential has no FusedLoRALinear below it"):
        save_adapter(base(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"lora_A\.weight is on the meta device"):
        save_adapter(apply_lora(base().to("meta"), ["0"]), tmp_path / "a")
    with pytest.raises(ValueError, match="has no FusedLoRALinear below it"):
        save_adapter(FusedLoRALinear(4, 4), tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save_adapter(apply_lora(base(), ["0"]), tmp_path / "file")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "attribute, value, error, text",
    [
        ("scaling", float("inf"), ValueError, "scaling of 2 is inf, must be finite"),
        ("scaling", float("nan"), ValueError, "scaling of 2 is nan, must be finite"),
        ("scaling", 1e308, ValueError, r"scaling · r of 2, .* is inf, must be finite"),
        ("scaling", torch.tensor(float("inf")), ValueError, "scaling of 2 is inf, must be finite"),
        ("scaling", torch.tensor([1.0, 2.0]), ValueError, r"scaling of 2 is tensor\(\[1., 2.\]\), must be a number"),
        ("scaling", "2", TypeError, "scaling of 2 is '2', must be a number"),
        ("lora_dropout", "a", TypeError, "lora_dropout of 2 is 'a', must be a number"),
        ("lora_dropout", 1.5, ValueError, r"lora_dropout of 2 is 1.5, must be in \[0, 1\)"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(attribute: str, value, error, text: str, tmp_path: Path) -> None:
    model = apply_lora(base(), ["0", "2"], r=32)
    save_adapter(model, tmp_path)
    before = files(tmp_path)
    setattr(model[2], attribute, value)
    with pytest.raises(error, match=text):
        save_adapter(model, tmp_path)
    assert files(tmp_path) == before


def test_arguments_of_saving_and_loading_are_named() -> None:
    model = apply_lora(base(), ["0"])
    for call in (save_adapter, load_adapter):
        with pytest.raises(TypeError, match="path is None, must be the path of a folder"):
            call(model, None)
        with pytest.raises(ValueError, match="path is '', must be the path of a folder"):
            call(model, "")
        with pytest.raises(TypeError, match="model is None, must be a torch.nn.Module"):
            call(None, Path(__file__).parent)
    with pytest.raises(TypeError, match=r"task_type is \['x'\], must be a string or None"):
        save_adapter(model, "unused", task_type=["x"])


def test_a_sharded_adapter_is_refused(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(adapted(), mesh=mesh)
        with pytest.raises(ValueError, match=r"weight is sharded \(DTensor\): gather it first"):
            save_adapter(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()
    finally:
        distributed.destroy_process_group()


def test_the_name_of_the_base_model(tmp_path: Path) -> None:
    model = apply_lora(base(), ["0"])
    for own, given, written in (
        (None, None, None),
        ("org/own", None, "org/own"),
        ("org/own", "org/given", "org/given"),
    ):
        model.name_or_path = own
        save_adapter(model, tmp_path, base_model_name_or_path=given)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == written
