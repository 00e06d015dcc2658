"""PEFT's `adapter_config.json`: what each field means here, and reading one.

Every field falls in one table: HONOURED is used, INERT can't change what the loaded adapter computes, and the rest
(OFF) is refused unless it has a value that switches it off. A field in no table is refused too, unless null or false.
The matching rules are PEFT's (`check_target_module_exists` and `get_pattern_key` of peft 0.21).
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HONOURED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "bias",
        "lora_bias",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "task_type",
    }
)

INERT = {
    "auto_mapping": "names the class of the base model",
    "base_model_name_or_path": "names the base model",
    "revision": "names the revision of the base model",
    "peft_version": "names the version that wrote the file",
    "inference_mode": "only says whether PEFT freezes the adapter after loading",
    "megatron_core": "read only with megatron_config",
    "qalora_group_size": "read only with use_qalora",
    "loftq_config": "read only when the adapter is created",
    "eva_config": "read only when the adapter is created",
    "corda_config": "read only when the adapter is created",
    "lora_ga_config": "read only when the adapter is created",
    "runtime_config": "never stored; PEFT ignores it in a file",
}

# Beside null and false, a value that PEFT itself treats as "off".
OFF: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (),
    "use_qalora": (),
    "ensure_weight_tying": (),
    "megatron_config": ({},),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": (),
    "alora_invocation_tokens": (),
    "velora_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "use_bdlora": (),
    "arrow_config": (),
}

# Initialisations that leave the base weight and the training rule alone. pissa, olora, corda, loftq and lora_ga store
# an adapter of a changed base weight; mica keeps lora_B frozen.
PLAIN_INIT = (True, False, "gaussian", "eva", "orthogonal")

# Which biases train beside the adapters.
BIASES = ("none", "all", "lora_only")

# PEFT adds these to modules_to_save for a classification task, whether or not the model has both.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that shape a LoRA adapter; the names are PEFT's."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    bias: Literal["none", "all", "lora_only"]
    lora_bias: bool
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None
    modules_to_save: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None
    task_type: str | None

    @property
    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def rank(self, name: str) -> int:
        """The rank of the module called `name`."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, name), self.r)

    def scaling(self, name: str) -> float:
        """The scaling of the module called `name`: alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, name), self.lora_alpha)
        return alpha / (math.sqrt(self.rank(name)) if self.use_rslora else self.rank(name))

    def targets(self, name: str) -> bool:
        """Whether the module called `name` carries an adapter. Not for "all-linear", which asks for types."""
        if self.exclude_modules and matches(self.exclude_modules, name):
            return False
        if any(_compiled(rf"(^|.*\.){saved}($|\..*)").match(name) for saved in self.modules_to_save):
            return False
        if not matches(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return True
        return self._wanted_layer(name)

    def _wanted_layer(self, name: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        regexes = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns or ()] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((m for m in (re.match(regex, name) for regex in regexes) if m), None)
        return found is not None and int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)


def matches(wanted: str | Collection[str], name: str) -> bool:
    """PEFT's rule: a string is a regex for the full name, a list holds full names or dotted endings of them."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name[dot.end() :] in wanted for dot in re.finditer(r"\.", name))


def pattern_key(patterns: Iterable[str], name: str) -> str:
    """The first key of rank_pattern or alpha_pattern that applies to `name`, or `name` itself."""
    return next((key for key in patterns if compiled_pattern(key).match(name)), name)


def compiled_pattern(key: str) -> re.Pattern[str]:
    """PEFT's reading of a key of rank_pattern or alpha_pattern: it matches whole dotted endings of a name."""
    return _compiled(rf"(.*\.)?({key})$")


# A model of many layers can have a pattern for each: more than the cache of `re` holds.
_compiled = functools.lru_cache(maxsize=8192)(re.compile)


def read_config(file: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't a JSON object, or a field has a value that can't be honoured; names file, field and value.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; an adapter is a folder that holds it")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: holds a JSON {type(fields).__name__}, not an object")
    try:
        return parse_config(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def parse_config(fields: Mapping[str, Any]) -> AdapterConfig:
    """Check every field of `fields`; ValueError with the field and its value where one can't be honoured."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {fields.get('peft_type')!r}; only 'LORA' is supported")
    for name, value in fields.items():
        off = value is None or value is False or value in OFF.get(name, ())
        if name not in HONOURED and name not in INERT and not off:
            known = "is not supported" if name in OFF else "is not a field known here"
            raise ValueError(f"{name} is {value!r}, which {known}: ignoring it would change the outputs")
    init = fields.get("init_lora_weights", True)
    if not any(init is plain or (isinstance(init, str) and init == plain) for plain in PLAIN_INIT):
        raise ValueError(
            f"init_lora_weights is {init!r}: such an adapter belongs to a changed base weight or training rule; "
            "save it with peft's path_initial_model_for_weight_conversion"
        )

    target: Any = fields.get("target_modules")
    _require(_names(target) and target != "" and target != [], "target_modules", target, "a list of names or a regex")
    exclude, layers, pattern = (fields.get(n) for n in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    _require(exclude is None or _names(exclude), "exclude_modules", exclude, "a list of names or a regex")
    _require(
        layers is None or _int(layers) or (isinstance(layers, list) and all(map(_int, layers))),
        "layers_to_transform",
        layers,
        "an index or a list of them",
    )
    _require(pattern is None or _names(pattern), "layers_pattern", pattern, "a name or a list of names")
    if isinstance(target, str) and (layers is not None or pattern):
        raise ValueError(f"layers_to_transform is {layers!r}, which needs target_modules as a list, not {target!r}")
    if pattern and layers is None:
        raise ValueError(f"layers_pattern is {pattern!r}, but layers_to_transform is null")
    saved = fields.get("modules_to_save") or []
    _require(isinstance(saved, list) and _names(saved), "modules_to_save", saved, "a list of names")
    regexes = {"target_modules": target, "exclude_modules": exclude}
    for name, text in regexes.items():
        if isinstance(text, str):
            _regex(name, text, text)
    for name, texts in {"modules_to_save": saved, "layers_pattern": pattern or []}.items():
        for text in [texts] if isinstance(texts, str) else texts:
            _regex(name, text, texts)

    r, alpha, dropout = fields.get("r", 8), fields.get("lora_alpha", 8), fields.get("lora_dropout", 0.0)
    flags = {name: fields.get(name) or False for name in ("use_rslora", "use_dora", "lora_bias")}
    bias: Any = fields.get("bias") or "none"
    _require(_int(r) and r >= 1, "r", r, "an integer of at least 1")
    _require(_number(alpha), "lora_alpha", alpha, "a finite number")
    _require(_number(dropout) and 0 <= dropout < 1, "lora_dropout", dropout, "in [0, 1)")
    for name, flag in flags.items():
        _require(isinstance(flag, bool), name, flag, "true or false")
    if flags["lora_bias"] and flags["use_dora"]:
        raise ValueError("lora_bias is True, must be false with use_dora")
    _require(isinstance(bias, str) and bias in BIASES, "bias", bias, f"one of {', '.join(BIASES)}")
    task: Any = fields.get("task_type")
    _require(task is None or isinstance(task, str), "task_type", task, "a string or null")
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    for name, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        _require(isinstance(patterns, dict), name, patterns, "an object")
        for key, value in patterns.items():
            _regex(name, key, patterns)
            good = _int(value) and value >= 1 if name == "rank_pattern" else _number(value)
            _require(good, f"{name}[{key!r}]", value, "a rank" if name == "rank_pattern" else "a finite number")
    return AdapterConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=float(dropout),
        **flags,
        bias=bias,
        target_modules=target,
        exclude_modules=exclude,
        modules_to_save=list(dict.fromkeys(saved)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        layers_to_transform=layers,
        layers_pattern=pattern,
        task_type=task,
    )


def _require(good: Any, name: str, value: Any, rule: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value!r}, must be {rule}")


def _regex(name: str, text: str, value: Any) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{name} is {value!r}, and {text!r} is not a valid regex: {error}") from error


def _names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) and v for v in value))


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
