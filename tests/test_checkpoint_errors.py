"""Wrong files are named and leave the model as it was."""

import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedlora import apply_lora, load_adapter, save_adapter

safetensors_torch = pytest.importorskip("safetensors.torch")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = {"target_modules": ["0", "2"], "r": 2, "lora_alpha": 6, "modules_to_save": ["3"]}
A, B, HEAD = (f"base_model.model.{key}" for key in ("0.lora_A.weight", "2.lora_B.weight", "3.weight"))


def base() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(_hook)
    model[2].weight.requires_grad_(False)
    return model


def _hook(module: nn.Module, args: object, output: object) -> None:
    pass


def adapted(alpha: float = 6) -> nn.Module:
    model = apply_lora(base(), **FIELDS | {"lora_alpha": alpha})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def picture(model: nn.Module) -> dict[str, object]:
    """All of a model that a failed load could change."""
    found: dict[str, object] = {"": str(model), "record": {k for k in vars(model) if k.startswith("_fused")}}
    for name, module in model.named_modules():
        found[name] = (id(module), type(module), module.training, list(module._forward_hooks.values()))
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[name] = (id(tensor), tensor.requires_grad, tensor.detach().clone().numpy().tobytes())
    return found


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = safetensors_torch.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors_torch.save_file(tensors, folder / WEIGHTS)

    return apply


def edit_config(**fields: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(text | fields))

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def torch_save(folder: Path) -> None:
    torch.save({A: torch.zeros(2, 6)}, folder / WEIGHTS)


def only_pickle(folder: Path) -> None:
    torch_save(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def metadata(text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = safetensors_torch.load_file(folder / WEIGHTS)
        safetensors_torch.save_file(tensors, folder / WEIGHTS, {"fusedlora_scaling": text})

    return apply


# name: (what is done to a good folder, the error, what it says beside the folder's path)
WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, f"{CONFIG}: no such file"),
    "config not JSON": (cut(CONFIG, 40), ValueError, f"{CONFIG}: not JSON"),
    "config not UTF-8": (write(CONFIG, b"\xff\xfe{"), ValueError, f"{CONFIG}: not JSON"),
    "config a list": (write(CONFIG, b"[]"), ValueError, f"{CONFIG}: holds a JSON list, not an object"),
    "task type a list": (edit_config(task_type=["x"]), ValueError, f"{CONFIG}: task_type is ['x'], must be a string"),
    "task type a number": (edit_config(task_type=3), ValueError, f"{CONFIG}: task_type is 3, must be a string"),
    "config refused": (edit_config(use_qalora=True), ValueError, f"{CONFIG}: use_qalora is True"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, f"{WEIGHTS}: no such file"),
    "weights empty": (cut(WEIGHTS, 0), ValueError, f"{WEIGHTS} is damaged"),
    "header cut": (cut(WEIGHTS, 100), ValueError, f"{WEIGHTS} is damaged"),
    "data cut": (cut(WEIGHTS, -4), ValueError, f"{WEIGHTS} is damaged"),
    "git-lfs pointer": (write(WEIGHTS, b"version https://git-lfs.example/v1\n"), ValueError, f"{WEIGHTS} is damaged"),
    "torch.save": (torch_save, ValueError, f"{WEIGHTS} is a pickle"),
    "pickle": (write(WEIGHTS, pickle.dumps({"a": 1}, 4)), ValueError, f"{WEIGHTS} is a pickle"),
    "only a .bin": (only_pickle, ValueError, "adapter_model.bin is a pickle"),
    "missing": (edit_tensors(lambda t: t.pop(B)), ValueError, f"lacks {B}"),
    "missing head": (edit_tensors(lambda t: t.pop(HEAD)), ValueError, f"lacks {HEAD}"),
    "unexpected": (edit_tensors(lambda t: t.update({"other": torch.ones(1)})), ValueError, "doesn't, other"),
    "lora bias": (
        edit_tensors(lambda t: t.update({A.replace("A.weight", "B.bias"): torch.ones(1)})),
        ValueError,
        "doesn't, base_model.model.0.lora_B.bias",
    ),
    "no prefix": (
        edit_tensors(lambda t: t.update({A.removeprefix("base_model.model."): t.pop(A)})),
        ValueError,
        f"lacks {A}",
    ),
    "shape": (edit_tensors(lambda t: t.update({A: torch.ones(2, 5)})), ValueError, f"{A} has shape [2, 5]"),
    "transposed": (edit_tensors(lambda t: t.update({B: torch.ones(2, 8)})), ValueError, f"{B} has shape [2, 8]"),
    "3-D": (edit_tensors(lambda t: t.update({A: torch.ones(2, 6, 1)})), ValueError, f"{A} has shape [2, 6, 1]"),
    "head shape": (edit_tensors(lambda t: t.update({HEAD: torch.ones(5, 8)})), ValueError, f"{HEAD} has shape [5, 8]"),
    "rank": (edit_tensors(lambda t: t.update({A: torch.ones(3, 6)})), ValueError, f"{A} has shape [3, 6]"),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].int()})), ValueError, f"{A} has dtype torch.int32"),
    "other r": (edit_config(r=3), ValueError, f"r is 3 in {CONFIG}"),
    "enormous r": (edit_config(r=10**12), ValueError, f"r is {10**12} in {CONFIG}"),
    "other rank_pattern": (edit_config(rank_pattern={"2": 4}), ValueError, f"r is 4 in {CONFIG}"),
    "other alpha": (edit_config(lora_alpha=7), ValueError, "scaling"),
    "other rslora": (edit_config(use_rslora=True), ValueError, "scaling"),
    "fewer targets": (edit_config(target_modules=["2"]), ValueError, "0"),
    "no such target": (edit_config(target_modules=["q_proj"]), ValueError, "q_proj"),
    "no such head": (edit_config(modules_to_save=["score"]), ValueError, "'score'"),
    "scaling not JSON": (metadata("{"), ValueError, f"{WEIGHTS} has fusedlora_scaling '{{', which is not JSON"),
    "scaling a list": (metadata("[1]"), ValueError, "fusedlora_scaling '[1]', must map names to numbers"),
    "scaling a text": (metadata('{"0": "3"}'), ValueError, "must map names to numbers"),
}


@pytest.mark.parametrize("make", [base, adapted], ids=["plain", "adapted"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_named_and_the_model_is_as_before(
    wrong: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    save_adapter(adapted(), tmp_path)
    damage, error, text = WRONG[wrong]
    damage(tmp_path)
    model = make()
    before = picture(model)
    with pytest.raises(error, match=f"{re.escape(str(tmp_path))}.*{re.escape(text)}"):
        load_adapter(model, tmp_path)
    assert picture(model) == before


def test_what_the_model_has_must_be_what_the_file_says(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    for fields, text in (
        ({"r": 4}, r"r of 0 is 2 in adapter_config\.json, 4 in the model"),
        (
            {"lora_alpha": 3},
            r"scaling \(lora_alpha, use_rslora\) of 0 is 3.0 in adapter_config\.json, 1.5 in the model",
        ),
        ({"lora_dropout": 0.5}, r"lora_dropout of 0 is 0.0 in adapter_config\.json, 0.5 in the model"),
        ({"use_dora": True}, r"use_dora of 0 is False in adapter_config\.json, True in the model"),
        ({"target_modules": ["0"]}, r"target_modules is .* but the model has no adapter on \['2'\]"),
        ({"modules_to_save": None}, r"modules_to_save is \['3'\], \['3'\] of this model, but it was given \[\]"),
    ):
        model = apply_lora(base(), **FIELDS | fields)
        before = picture(model)
        with pytest.raises(ValueError, match=text):
            load_adapter(model, tmp_path)
        assert picture(model) == before


def test_a_model_that_cannot_take_the_adapter(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    narrow = base()
    narrow[2] = nn.Linear(10, 9, bias=False)
    with pytest.raises(ValueError, match=r"2\.lora_B\.weight has shape \[8, 2\] .* \[9, 2\] in the model"):
        load_adapter(narrow, tmp_path)
    with pytest.raises(ValueError, match="0.weight is on the meta device"):
        load_adapter(base().to("meta"), tmp_path)
    with pytest.raises(ValueError, match=r"3\.weight is on the meta device"):
        load_adapter(apply_lora(base().to("meta"), **FIELDS), tmp_path)
    with pytest.raises(FileNotFoundError, match="user/adapter is not a folder; adapters are read from disk only"):
        load_adapter(base(), "user/adapter")


def test_without_safetensors_both_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapted(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="save_adapter needs the package safetensors"):
        save_adapter(adapted(), tmp_path)
    with pytest.raises(ImportError, match="load_adapter needs the package safetensors"):
        load_adapter(base(), tmp_path)
