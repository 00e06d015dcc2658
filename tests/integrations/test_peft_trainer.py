"""transformers' Trainer, as most people train LoRA, with stock layers and with fused ones: the same losses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fusedlora.integrations import peft as backend  # noqa: E402

STEPS = 16
LAYERS = 14  # two blocks of seven projections
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:.*pin_memory.*")


def build(dtype: torch.dtype) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    base = transformers.LlamaForCausalLM(config).to(dtype)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(base, options)


def train(model: Any, folder: Path, **options: Any) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 97, (16, 1), generator=generator) + torch.arange(12)
    data = [{"input_ids": row % 97, "labels": row % 97} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # over more, Trainer replicates with DataParallel: no plain Parameters
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
def test_the_same_losses(bf16: bool, checkpointing: bool, device: torch.device, tmp_path: Path) -> None:
    options = {"bf16": bf16, "gradient_checkpointing": checkpointing, "use_cpu": device.type == "cpu"}
    stock = build(torch.bfloat16 if bf16 else torch.float32)
    fused = backend.fuse(copy.deepcopy(stock))
    expected = train(stock, tmp_path, **options)
    before = dict(backend.calls)
    found = train(fused, tmp_path, **options)
    made = {key: count - before.get(key, 0) for key, count in backend.calls.items() if count != before.get(key, 0)}
    forwards = STEPS * 2 * (2 if checkpointing else 1)
    assert set(made) == {"fused"} and forwards * LAYERS * 0.9 < made["fused"] <= forwards * LAYERS
    assert len(found) == STEPS and found[-1] < 0.9 * found[0], "it trains"
    # rounding alone moves them, by far less than training does
    assert found == pytest.approx(expected, rel=1e-2 if bf16 else 1e-4)
    report = backend.report(fused)
    assert report.share() == pytest.approx(1.0) and len(report.layers) == LAYERS
    assert {layer.backend for layer in report.layers} <= {"reference", "triton"}


def test_enabled_for_the_process(device: torch.device, tmp_path: Path) -> None:
    model = build(torch.float32)
    before = backend.calls["fused"]
    with backend.enable():
        train(model, tmp_path, use_cpu=device.type == "cpu")
    assert backend.calls["fused"] - before == STEPS * 2 * LAYERS


def test_qlora_as_transformers_loads_it(device: torch.device, tmp_path: Path) -> None:
    """NF4 with double quantisation, prepared as PEFT's guide has it: fp32 norms, so fp32 x under autocast."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def qlora() -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, device_map=str(device), dtype=torch.bfloat16
        )
        base = peft.prepare_model_for_kbit_training(base)
        torch.manual_seed(1)
        options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))

    options = {"bf16": True, "gradient_checkpointing": True, "use_cpu": device.type == "cpu"}
    expected = train(qlora(), tmp_path, **options)
    fused = backend.fuse(qlora())
    before = dict(backend.calls)
    found = train(fused, tmp_path, **options)
    made = {key: count - before.get(key, 0) for key, count in backend.calls.items() if count != before.get(key, 0)}
    assert set(made) == {"fused"} and made["fused"] > STEPS * 2 * LAYERS
    report = backend.report(fused)
    assert len(report.layers) == LAYERS and report.share() == 1.0
    assert expected[-1] < 0.9 * expected[0], "it trains"
    assert found == pytest.approx(expected, rel=1e-2)
