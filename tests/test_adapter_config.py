"""Every field of adapter_config.json: honoured, inert, or refused by name and value; names match as in peft."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from fusedlora.adapter_config import HONOURED, INERT, OFF, AdapterConfig, parse_config, pattern_key
from fusedlora.adapter_files import build_config

peft = pytest.importorskip("peft")
PEFT_FIELDS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
MINIMAL = {"peft_type": "LORA", "target_modules": ["q"]}

# What each field that must be off looks like when it is on.
ON = {
    "fan_in_fan_out": [True],
    "use_qalora": [True],
    "ensure_weight_tying": [True],
    "megatron_config": [{"hidden_size": 8}],
    "layer_replication": [[[0, 2]]],
    "target_parameters": [["mlp.weight"]],
    "trainable_token_indices": [[0, 1], {"embed": [3]}],
    "alora_invocation_tokens": [[1], []],
    "velora_config": [{"num_groups": 2}, {}],
    "kasa_config": [{"beta": 1e-4}, {}],
    "monteclora_config": [{"num_samples": 2}, {}],
    "use_bdlora": [{"nblocks": 2}, {}],
    "arrow_config": [{"top_k": 2}, {}],
}


def test_every_field_of_the_installed_peft_is_in_one_table() -> None:
    tables = (set(HONOURED), set(INERT), set(OFF))
    assert PEFT_FIELDS.keys() <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert ON.keys() == OFF.keys()


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in ON.items() for v in values], ids=repr)
def test_a_field_that_is_on_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {re.escape(repr(value))}"):
        parse_config(MINIMAL | {field: value})


@pytest.mark.parametrize("field", sorted(OFF))
def test_a_field_that_is_off_is_accepted(field: str) -> None:
    for value in (None, False, *OFF[field]):
        parse_config(MINIMAL | {field: value})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", 1, None])
def test_an_init_that_changes_the_base_is_refused(init: object) -> None:
    with pytest.raises(ValueError, match=f"^init_lora_weights is {re.escape(repr(init))}"):
        parse_config(MINIMAL | {"init_lora_weights": init})


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_init_that_leaves_the_base_is_inert(init: object) -> None:
    assert parse_config(MINIMAL | {"init_lora_weights": init}) == parse_config(MINIMAL)


@pytest.mark.parametrize("field", sorted(INERT))
def test_an_inert_field_changes_nothing(field: str) -> None:
    assert parse_config(MINIMAL | {field: "anything"}) == parse_config(MINIMAL)


def test_a_field_of_a_later_peft_is_refused_unless_it_is_off() -> None:
    assert parse_config(MINIMAL | {"use_next_year": False, "next_config": None}) == parse_config(MINIMAL)
    with pytest.raises(ValueError, match="^use_next_year is True, which is not a field known here"):
        parse_config(MINIMAL | {"use_next_year": True})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("use_rslora", "yes"),
        ("use_dora", "yes"),
        ("lora_bias", "yes"),
        ("bias", "some"),
        ("bias", True),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", [1]),
        ("target_modules", "(q"),
        ("exclude_modules", 3),
        ("exclude_modules", "(q"),
        ("modules_to_save", "head"),
        ("modules_to_save", ["(head"]),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [1.5]),
        ("layers_pattern", 2),
        ("layers_pattern", "layers"),
        ("rank_pattern", [4]),
        ("rank_pattern", {"(q": 4}),
        ("alpha_pattern", {"(q": 4}),
    ],
    ids=repr,
)
def test_a_wrong_value_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {re.escape(repr(value))}"):
        parse_config(MINIMAL | {field: value})


@pytest.mark.parametrize(("field", "value"), [("rank_pattern", 0), ("rank_pattern", 1.5), ("alpha_pattern", "16")])
def test_a_wrong_pattern_value_names_the_pattern(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}\['q'\] is {re.escape(repr(value))}"):
        parse_config(MINIMAL | {field: {"q": value}})


def test_lora_bias_goes_without_dora_as_in_peft() -> None:
    with pytest.raises(ValueError, match="^lora_bias is True, must be false with use_dora"):
        parse_config(MINIMAL | {"lora_bias": True, "use_dora": True})
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        peft.LoraConfig(lora_bias=True, use_dora=True)


def test_layers_to_transform_needs_a_list_of_targets() -> None:
    with pytest.raises(ValueError, match="^layers_to_transform is 1, which needs target_modules as a list"):
        parse_config(MINIMAL | {"target_modules": ".*q", "layers_to_transform": 1})


def test_a_file_of_old_peft_with_few_fields_gets_its_defaults() -> None:
    config = parse_config(MINIMAL)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 8, 0.0, False)
    defaults = peft.LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (defaults.r, defaults.lora_alpha, 0.0)
    assert (config.bias, config.lora_bias) == (defaults.bias, defaults.lora_bias) == ("none", False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.qq = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.h = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(4, 2)


NAMES = [name for name, _ in Net().named_modules() if name]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q"]},
        {"target_modules": ["layers.0.q", "experts.1"]},
        {"target_modules": r"layers\.\d+\.q"},
        {"target_modules": r"q"},
        {"target_modules": ["q", "qq"], "exclude_modules": ["layers.1.q"]},
        {"target_modules": ["q", "qq"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q", "head"], "modules_to_save": ["head"]},
        {"target_modules": ["q"], "modules_to_save": ["layers.1"]},
        {"target_modules": ["q"], "layers_to_transform": 1},
        {"target_modules": ["q", "experts.0"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["nothing", "layers"]},
        {"target_modules": ["q"], "layers_to_transform": []},
        {"target_modules": ["q"], "rank_pattern": {"q": 2}, "alpha_pattern": {"layers.1.q": 3}},
        {"target_modules": ["q", "qq"], "rank_pattern": {"^q": 2, r".*\.0\.q+": 5}, "use_rslora": True},
        {"target_modules": ["q"], "rank_pattern": {r"layers\.(0|2)\.q": 3, "q": 1}, "alpha_pattern": {"^q": 0.5}},
    ],
    ids=repr,
)
def test_targets_ranks_and_scalings_are_those_of_peft(fields: dict) -> None:
    config = parse_config({"peft_type": "LORA"} | fields)
    adapted = peft.get_peft_model(Net(), peft.LoraConfig(**fields)).base_model.model
    theirs = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert theirs
    assert {name: (config.rank(name), config.scaling(name)) for name in NAMES if config.targets(name)} == theirs


@pytest.mark.parametrize(
    "layers",
    [
        {"q": (4, 8)},
        {"layers.0.q": (4, 8), "layers.1.q": (4, 8)},
        {name: (4, 8) for name in NAMES if name.endswith(".q")},
        {name: (4, 8) for name in NAMES if name.endswith("q")},
        {"q": (1, 8), "layers.0.q": (2, 8), "layers.1.q": (4, 16), "layers.2.q": (4, 16)},
        {"q": (1, 8), "h.0.q": (4, 8), "layers.0.q": (4, 3.5)},
        {"layers.0.experts.0": (2, 1), "layers.1.experts.1": (3, 1), "h.0.experts.0": (3, 1)},
    ],
    ids=lambda layers: ",".join(layers),
)
def test_what_is_written_selects_the_same_in_peft(layers: dict[str, tuple[int, float]]) -> None:
    fields = _built(layers)
    config = peft.LoraConfig.from_peft_type(**fields)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(Net(), config).base_model.model
    theirs = {
        name: (module.r["default"], module.lora_alpha["default"])
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert theirs == layers
    ours = _reread(fields)
    assert {n: (ours.rank(n), ours.scaling(n)) for n in NAMES if ours.targets(n)} == {
        n: (r, alpha / r) for n, (r, alpha) in layers.items()
    }


def test_last_names_are_written_where_they_suffice() -> None:
    layers = {name: (4, 8.0) for name in NAMES if name.endswith("qq")}
    assert _built(layers)["target_modules"] == ["qq"]


def test_only_fields_that_the_oldest_supported_peft_knows_are_written() -> None:
    # exclude_modules came with 0.14, lora_bias with 0.14, trainable_token_indices with 0.15.
    later = {"exclude_modules", "lora_bias", "trainable_token_indices", "target_parameters", "peft_version"}
    assert not later & _built({"q": (4, 8)}).keys()
    assert _built({"q": (4, 8)}).keys() <= PEFT_FIELDS.keys()


def test_the_first_pattern_wins_and_a_part_of_a_name_does_not_match() -> None:
    assert pattern_key({"q": 1, "layers.0.q": 2}, "layers.0.q") == "q"
    assert pattern_key({"q": 1}, "layers.0.qq") == "layers.0.qq"


def _built(layers: dict[str, tuple[int, float]]) -> dict:
    return build_config(
        layers,
        ["", *NAMES],
        use_rslora=False,
        use_dora=False,
        lora_bias=False,
        bias="none",
        lora_dropout=0.0,
        modules_to_save=[],
        task_type=None,
        base_model_name_or_path=None,
    )


def _reread(fields: dict) -> AdapterConfig:
    patterns = {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in fields.items()}
    return parse_config(patterns)
