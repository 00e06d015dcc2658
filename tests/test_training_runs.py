"""A training run of a two-block Llama by every way of running it: losses agree with peft's to the noise of the dtype.

The noise is measured: how far the losses of peft's own run go apart when each weight is moved by one rounding.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
# Tests run in importlib mode, where a neighbour is no module to import by name.
_spec = importlib.util.spec_from_file_location("fusedlora_training_run", Path(__file__).with_name("training_run.py"))
assert _spec is not None and _spec.loader is not None
run = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(run)

# transformers renames these; the old names are in every version from 5.0 on.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

PERTURBED = 6
RANKS = 2


def losses(model: nn.Module, device: torch.device, call: nn.Module | None = None) -> Tensor:
    """Of each step; what each layer took is asserted."""
    found = torch.stack(run.train(model, device.type, call)).double().cpu()
    taken = {layer.last_backend for layer in run.layers(model).values()}
    expected = {"triton" if device.type == "cuda" else "reference"} if call is None else {None}
    assert taken == (expected if run.layers(model) else set())
    return found


@pytest.fixture(scope="module")
def peft_losses(device: torch.device) -> tuple[Tensor, Tensor]:
    """peft's losses, and their noise up to each step."""
    plain = losses(run.of_peft(device.type), device)
    others = [losses(run.of_peft(device.type, seed), device) for seed in range(1, 1 + PERTURBED)]
    spread = torch.stack([(other - plain).abs() for other in others]).amax(0)
    learnt = plain[:4].mean() - plain[-4:].mean()
    assert learnt > 0.05 * plain[0], "it does not train"
    assert 0 < spread.max() < 0.05 * learnt, "the noise hides the training"
    return plain, spread.cummax(0).values


def assert_agree(found: Tensor, peft_losses: tuple[Tensor, Tensor]) -> None:
    """Within twice the noise, and what a loss itself is rounded to: it is a float32."""
    expected, noise = peft_losses
    bound = 2 * noise + 2 * torch.finfo(torch.float32).eps * expected
    over = (found - expected).abs() / bound
    assert over.max() <= 1, f"{over.max():.2f} times the noise at step {over.argmax()}"


@pytest.fixture(scope="module")
def our_losses(device: torch.device) -> Tensor:
    return losses(run.ours(device.type), device)


def test_eager(our_losses: Tensor, peft_losses: tuple[Tensor, Tensor]) -> None:
    assert_agree(our_losses, peft_losses)


def test_a_wrong_scaling_would_be_seen(device: torch.device, peft_losses: tuple[Tensor, Tensor]) -> None:
    model = run.ours(device.type)
    for layer in run.layers(model).values():
        layer.scaling *= 1.5
    with pytest.raises(AssertionError, match="times the noise"):
        assert_agree(losses(model, device), peft_losses)


def compiled_losses(device: torch.device, backend: str) -> Tensor:
    torch._dynamo.reset()
    model = run.ours(device.type)
    found = losses(model, device, torch.compile(model, fullgraph=True, backend=backend))
    torch._dynamo.reset()
    return found


def test_compiled(device: torch.device, peft_losses: tuple[Tensor, Tensor]) -> None:
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    assert_agree(compiled_losses(device, backend), peft_losses)


@pytest.mark.slow
def test_compiled_by_inductor(device: torch.device, peft_losses: tuple[Tensor, Tensor]) -> None:
    assert_agree(compiled_losses(device, "inductor"), peft_losses)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed(reentrant: bool, dropout: float, device: torch.device, our_losses: Tensor) -> None:
    """To the bit as without: a checkpoint computes the same again, masks too."""
    model = run.ours(device.type, dropout)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain = losses(run.ours(device.type, dropout), device) if dropout else our_losses
    assert torch.equal(losses(model, device), plain)
    assert torch.equal(plain, our_losses) == (dropout == 0.0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_repeats_to_the_bit(dropout: float, device: torch.device) -> None:
    """Under dropout, from the same seed."""
    models = [run.ours(device.type, dropout) for _ in range(2)]
    first, second = (losses(model, device) for model in models)
    assert torch.equal(first, second)
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models)):
        assert torch.equal(one, other), name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without torch.distributed")
def test_fsdp(device: torch.device, peft_losses: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """FSDP2 on two ranks, a half of each batch on each: on two GPUs, or on the CPU."""
    if device.type == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs, there is {torch.cuda.device_count()}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    children = [
        # -P: tests/kernels must not answer to `import kernels`
        subprocess.Popen(
            [sys.executable, "-P", run.__file__, str(rank), str(RANKS), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert not any(child.returncode for child in children), "\n".join(text[-3000:] for text in said)
    assert_agree(torch.tensor(json.loads((tmp_path / "losses.json").read_text())).double(), peft_losses)
