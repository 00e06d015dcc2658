"""Adapters on disk against real peft: both ways, same outputs; the fields and names are in test_adapter_config.py."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedlora import FusedLoRALinear, apply_lora, load_adapter, merge_lora, save_adapter, unmerge_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False))
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def classifier() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 4, dim_feedforward=20, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


BUILD: dict[str, Callable[[], nn.Module]] = {"llama": llama, "classifier": classifier, "encoder": encoder, "mlp": MLP}
# (model, fields): the names are those of LoraConfig and of apply_lora alike.
CASES = {
    "llama attention": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}),
    "llama all-linear": ("llama", {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.25}),
    "llama regex": ("llama", {"target_modules": r".*\.1\.mlp\.\w+_proj", "r": 3, "lora_alpha": 5}),
    "llama lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"], "r": 3}),
    "llama rslora": ("llama", {"target_modules": ["o_proj"], "r": 3, "lora_alpha": 7, "use_rslora": True}),
    "llama exclude": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    ),
    "llama patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"k_proj": 1, r"layers\.1\.mlp\.up_proj": 5},
            "alpha_pattern": {"q_proj": 2, "^model.layers.0.mlp.up_proj": 0.5},
            "r": 3,
            "lora_alpha": 6,
            "use_rslora": True,
        },
    ),
    "llama embeddings": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "classifier head": ("classifier", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}),
    "encoder": ("encoder", {"target_modules": ["linear1", "linear2"], "r": 3}),
    "mlp": ("mlp", {"target_modules": ["body.0", "body.2", "head"], "r": 1, "lora_alpha": 3}),
    "mlp saved": ("mlp", {"target_modules": ["0"], "r": 2, "modules_to_save": ["head", "norm"]}),
}
MLP_FIELDS = {"target_modules": ["body.0", "body.2"], "r": 2, "lora_alpha": 6, "modules_to_save": ["head"]}


@pytest.fixture(autouse=True)
def _no_fast_path() -> Iterator[None]:
    # In eval it would read the encoder's weights past the adapters, here and in peft.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def run(kind: str, model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind in ("llama", "classifier", "gpt2"):
        return model(input_ids=torch.randint(1, 64, (2, 7), generator=generator)).logits
    shape = (6, 12) if kind == "mlp" else (2, 7, 12)
    return model(torch.randn(shape, generator=generator, dtype=torch.float64))


def train(kind: str, model: nn.Module) -> nn.Module:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    model.eval()
    for module in model.modules():
        # Its buffers move only where they are saved.
        if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad:
            module.train()
    for _ in range(3):
        optimizer.zero_grad()
        run(kind, model).square().mean().backward()
        optimizer.step()
    return model.eval()


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() <= 1e-12 * b.norm()


def same_weights(first: Path, second: Path) -> None:
    a, b = (safetensors_torch.load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def same_files(first: Path, second: Path) -> None:
    same_weights(first, second)
    assert (first / "adapter_config.json").read_text() == (second / "adapter_config.json").read_text()


@pytest.mark.parametrize("case", CASES)
def test_trained_here_loads_in_peft_and_here(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    base = BUILD[kind]().double().eval()
    untrained = run(kind, base)
    model = train(kind, apply_lora(copy.deepcopy(base), **fields))
    expected = run(kind, model)
    assert (expected - untrained).norm() > 1e-3 * untrained.norm()

    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|Unexpected|mismatch).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    same(run(kind, theirs), expected)
    plain = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    same(run(kind, plain), expected)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == trained
    adapted = apply_lora(copy.deepcopy(base), **fields)
    assert load_adapter(adapted, tmp_path / "adapter") is adapted
    same(run(kind, adapted), expected)


@pytest.mark.parametrize("case", CASES)
def test_trained_in_peft_loads_here_and_goes_back(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    base = BUILD[kind]().double().eval()
    config = peft.LoraConfig(**copy.deepcopy(fields))
    theirs = train(kind, peft.get_peft_model(copy.deepcopy(base), config))
    expected = run(kind, theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)

    model = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    same(run(kind, model), expected)
    count = sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())
    assert sum(isinstance(m, FusedLoRALinear) for m in model.modules()) == count
    same(run(kind, load_adapter(apply_lora(copy.deepcopy(base), **fields), tmp_path / "theirs")), expected)

    save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    same(run(kind, back), expected)
    same_weights(tmp_path / "theirs", tmp_path / "ours")


def test_layers_to_transform_of_peft(tmp_path: Path) -> None:
    base = llama().double().eval()
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    theirs = train("llama", peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(base, tmp_path)
    same(run("llama", model), run("llama", theirs))
    assert [n for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)] == [
        "model.layers.1.self_attn.q_proj"
    ]


def test_the_heads_that_peft_adds_for_a_task(tmp_path: Path) -> None:
    base = classifier().double().eval()
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    theirs = train("classifier", peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "score",
    ]
    model = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    same(run("classifier", model), run("classifier", theirs))
    save_adapter(model, tmp_path / "ours", task_type="SEQ_CLS")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert type(back) is peft.PeftModelForSequenceClassification
    same(run("classifier", back), run("classifier", theirs))


def test_conv1d_of_gpt2_is_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json: fan_in_fan_out is True"):
        load_adapter(gpt2(), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"fan_in_fan_out": False}))
    with pytest.raises(TypeError, match="Conv1D"):
        load_adapter(gpt2(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_dtype_over_a_16_bit_base(dtype: torch.dtype, tmp_path: Path) -> None:
    base = llama().to(dtype)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    default, narrow = (
        load_adapter(copy.deepcopy(base), tmp_path / "a"),
        load_adapter(base, tmp_path / "a", adapter_dtype=dtype),
    )
    for model, want in ((default, torch.float32), (narrow, dtype)):
        assert {m.lora_A.dtype for m in model.modules() if isinstance(m, FusedLoRALinear)} == {want}
        save_adapter(model, tmp_path / "b")
        assert {
            t.dtype for t in safetensors_torch.load_file(tmp_path / "b" / "adapter_model.safetensors").values()
        } == {want}


def test_gradients_after_loading_are_those_of_peft(tmp_path: Path) -> None:
    base = MLP().double()
    theirs = train("mlp", peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**MLP_FIELDS)))
    theirs.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    model = load_adapter(base, tmp_path)
    for m in (theirs, model):
        run("mlp", m).square().sum().backward()
    same(model.body[0].lora_A.grad, theirs.base_model.model.body[0].lora_A["default"].weight.grad)
    same(model.body[2].lora_B.grad, theirs.base_model.model.body[2].lora_B["default"].weight.grad)
    same(model.head.weight.grad, theirs.base_model.model.head.modules_to_save["default"].weight.grad)


def test_a_merged_model_saves_the_same_and_does_not_load(tmp_path: Path) -> None:
    model = train("mlp", apply_lora(MLP().double(), **MLP_FIELDS))
    save_adapter(model, tmp_path / "before")
    merge_lora(model)
    save_adapter(model, tmp_path / "merged")
    same_files(tmp_path / "before", tmp_path / "merged")
    with pytest.raises(ValueError, match=r"body\.0 is merged: call unmerge_lora"):
        load_adapter(model, tmp_path / "before")
    load_adapter(unmerge_lora(model), tmp_path / "before")


def test_layers_that_differ_in_what_the_format_holds_once(tmp_path: Path) -> None:
    model = MLP().double()
    model.body[0] = FusedLoRALinear.from_linear(model.body[0], r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.5)
    model.body[2] = FusedLoRALinear.from_linear(model.body[2], r=2, lora_alpha=3)
    model.body[2].scaling = 0.7
    model.requires_grad_(False).eval()
    for layer in (model.body[0], model.body[2]):
        nn.init.normal_(layer.lora_B)
    with pytest.warns(UserWarning, match="one lora_dropout"):
        save_adapter(model, tmp_path)
    base = MLP().double().eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    same(run("mlp", peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), run("mlp", model))
    same(run("mlp", load_adapter(base, tmp_path)), run("mlp", model))


def test_compiled_and_nested_models_keep_their_names(tmp_path: Path) -> None:
    model = train("mlp", apply_lora(MLP().double(), **MLP_FIELDS))
    save_adapter(model, tmp_path / "bare")
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "whole")
    save_adapter(nn.DataParallel(model), tmp_path / "parallel")
    model.body = torch.compile(model.body, backend="eager")
    save_adapter(model, tmp_path / "part")
    for name in ("whole", "parallel", "part"):
        same_files(tmp_path / "bare", tmp_path / name)
    load_adapter(model, tmp_path / "bare")


def test_values_go_to_the_device_of_the_model(device: torch.device, tmp_path: Path) -> None:
    model = train("mlp", apply_lora(MLP().double(), **MLP_FIELDS))
    save_adapter(model, tmp_path / "cpu")
    moved = load_adapter(MLP().to(device), tmp_path / "cpu")
    assert {p.device.type for p in moved.parameters()} == {device.type}
    assert all(
        torch.equal(p.cpu(), model.get_parameter(n).float()) for n, p in moved.named_parameters() if p.requires_grad
    )
    save_adapter(moved, tmp_path / "back")
    back = safetensors_torch.load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert torch.equal(back["base_model.model.body.0.lora_A.weight"], model.body[0].lora_A.float())


def test_a_list_of_modules_is_saved_as_its_parts(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(12, 12)
            self.heads = nn.ModuleList([nn.Linear(12, 2), nn.Linear(12, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([head(self.body(x)) for head in self.heads], -1)

    base = Heads().double().eval()
    model = train("", apply_lora(copy.deepcopy(base), ["body"], modules_to_save=["heads"]))
    save_adapter(model, tmp_path)
    # peft wraps what it saves, and a ModuleList can't be wrapped.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["heads.0", "heads.1"]
    same(run("", peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), run("", model))
    same(
        run("", load_adapter(apply_lora(copy.deepcopy(base), ["body"], modules_to_save=["heads"]), tmp_path)),
        run("", model),
    )
    same(run("", load_adapter(base, tmp_path)), run("", model))


def test_a_part_of_a_model_saves_under_the_names_of_the_whole(tmp_path: Path) -> None:
    whole = nn.ModuleDict({"inner": MLP().double()})
    train("mlp", apply_lora(whole["inner"], **MLP_FIELDS))
    save_adapter(whole, tmp_path)
    keys = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.inner.body.0.lora_A.weight" in keys and "base_model.model.inner.head.bias" in keys
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["inner.head"]
