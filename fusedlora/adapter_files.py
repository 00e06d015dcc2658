"""The two files of an adapter's folder: read without trust, written so that a crash keeps the old ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fusedlora.adapter_config import compiled_pattern, matches

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of the weights file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pickle, or damaged; names the file.
    """
    safetensors = require_safetensors("load_adapter")
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        if (folder / PICKLE_NAME).is_file():
            raise ValueError(f"{folder / PICKLE_NAME} is a pickle, which can run code: save it as {WEIGHTS_NAME}")
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with safetensors.safe_open(os.fspath(file), framework="pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except safetensors.SafetensorError as error:
        # Only now: the length that a safetensors file starts with can have the same bytes.
        with file.open("rb") as raw:
            pickled = raw.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        if pickled:
            raise ValueError(f"{file} is a pickle (torch.save), which can run code, not safetensors") from error
        raise ValueError(f"{file} is damaged or not safetensors: {error}") from error


def write_files(
    folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], config: dict[str, Any]
) -> None:
    """Write both files beside their names, flush them, then rename; put the old weights back if that fails halfway."""
    save_file = require_safetensors("save_adapter").torch.save_file
    folder.mkdir(parents=True, exist_ok=True)
    weights_file, config_file = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        scratch = Path(name)
        save_file(tensors, scratch / WEIGHTS_NAME, metadata=metadata)
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # safetensors makes a file for its owner alone; others may read the one as they may the other.
        (scratch / WEIGHTS_NAME).chmod((scratch / CONFIG_NAME).stat().st_mode & 0o777)
        for file in (scratch / WEIGHTS_NAME, scratch / CONFIG_NAME):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        old = scratch / "old"
        if weights_file.exists():
            try:
                os.link(weights_file, old)
            except OSError:  # a file system without hard links
                shutil.copy2(weights_file, old)
        os.replace(scratch / WEIGHTS_NAME, weights_file)
        try:
            os.replace(scratch / CONFIG_NAME, config_file)
        except BaseException:
            if old.exists():
                os.replace(old, weights_file)
            else:
                weights_file.unlink()
            raise


def build_config(
    layers: Mapping[str, tuple[int, float]],
    all_names: Iterable[str],
    *,
    use_rslora: bool,
    use_dora: bool,
    lora_bias: bool,
    bias: str,
    lora_dropout: float,
    modules_to_save: list[str],
    task_type: str | None,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    """The fields of adapter_config.json for `layers`, {module name: (rank, alpha)}.

    Only fields that peft 0.11 knows already, so that older versions read the file. `all_names` are all of the model's
    module names: PEFT matches endings, and none but `layers` may match.
    """
    r, lora_alpha = (_commonest(column) for column in zip(*layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": _exact_targets(layers, all_names),
        "rank_pattern": _exact_patterns({name: rank for name, (rank, _) in layers.items()}, r),
        "alpha_pattern": _exact_patterns({name: alpha for name, (_, alpha) in layers.items()}, lora_alpha),
        "modules_to_save": modules_to_save or None,
        "init_lora_weights": True,
        "bias": bias,
        "fan_in_fan_out": False,
        "use_dora": use_dora,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        **({"lora_bias": True} if lora_bias else {}),  # which came with peft 0.14
    }


def _exact_targets(layers: Iterable[str], all_names: Iterable[str]) -> str | list[str]:
    """The shortest of: last names, full names, one regex, that PEFT matches to `layers` and to nothing else."""
    wanted, every = set(layers), list(all_names)
    for names in ({name.rpartition(".")[2] for name in wanted}, wanted):
        if {name for name in every if matches(names, name)} == wanted:
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Entries for the names whose value isn't `default`, such that PEFT's rule gives every name its own value."""
    # An anchored key is read from peft 0.15 on, so it comes second.
    for spell in (str, lambda name: f"^{re.escape(name)}"):
        patterns = {spell(name): value for name, value in values.items() if value != default}
        hits = {n: {v for key, v in patterns.items() if compiled_pattern(key).match(n)} for n in values}
        # PEFT sorts the keys when it writes the file again, so no name may hit two values.
        if all((hits[name] or {default}) == {value} for name, value in values.items()):
            return patterns
    raise AssertionError(f"an anchored, escaped full name matches itself alone: {sorted(values)}")


def _commonest(column: Iterable[Any]) -> Any:
    return Counter(column).most_common(1)[0][0]


def require_safetensors(caller: str) -> ModuleType:
    """The package safetensors; ImportError that says who needs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{caller} needs the package safetensors: pip install safetensors") from error
    return safetensors
