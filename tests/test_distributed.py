"""DDP, FSDP2 and tensor parallelism in two processes, against one: gloo on the CPU, NCCL where there are two GPUs.

The cases run in distributed_worker.py; here each is a test.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fusedlora import FusedLoRALinear, rank_masks
from fusedlora.parallel import ColwiseLoRA, RowwiseLoRA

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without torch.distributed")

RANKS = 2
SECONDS = 240
CASES = {
    "data": [
        "ddp_trains_as_on_one_process",
        "ddp_accumulates_without_sync",
        "fsdp_trains_as_on_one_process",
        "fsdp_in_mixed_precision",
        "fsdp_over_parameters_of_two_dtypes",
        "fsdp_keeps_no_weight_for_backward",
        "fsdp_blocks_checkpointed_with_dropout",
        "fsdp_whole_state_dict_there_and_back",
        "fsdp_layers_are_not_merged",
        "fsdp_llama_trains_as_on_one_process",
    ],
    "tensor": [
        "training_equals_the_single_process",
        "lora_bias_beside_a_frozen_bias_and_a_trained_one",
        "replicas_are_the_same_bits_on_every_rank",
        "gradients_accumulate",
        "llama_trains_as_on_one_process",
        "every_layout",
        "adapter_off_is_the_plain_linear",
        "whole_state_dict_there_and_back",
        "under_fsdp_on_a_mesh_of_two_dimensions",
        "misfits_are_refused",
        "compiled_trains_as_eager",
    ],
    "dropout": [
        "columns_share_a_mask_and_it_is_the_single_process_one",
        "rows_have_masks_of_their_own",
        "checkpointed_blocks_drop_the_same_again",
        "generators_apart_are_refused",
    ],
    "peft": [
        "ddp_trains_as_stock_on_one_process",
        "fsdp_blocks_train_as_stock_on_one_process",
        "fsdp_blocks_of_dora_train_as_stock",
        "fsdp_of_whole_layers_is_fused",
        "fsdp_inside_a_layer_stays_stock",
        "fsdp_in_mixed_precision",
    ],
}
_done: dict[str, list[dict[str, str | None]]] = {}


def outcomes(family: str, folder: Path, config: pytest.Config) -> list[dict[str, str | None]]:
    """For each rank what came of each case; the processes run once, whatever tests are chosen."""
    if family == "peft":
        pytest.importorskip("peft")
    if family not in _done:
        worker = str(Path(__file__).with_name("distributed_worker.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if config.getoption("--device") == "cpu" or torch.cuda.device_count() < RANKS:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        logs = [(folder / f"{rank}.log").open("w") for rank in range(RANKS)]
        processes = [
            # -P: tests/kernels must not answer to `import kernels`
            subprocess.Popen(
                [sys.executable, "-P", worker, family, str(rank), str(RANKS), str(folder)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                time.sleep(2)  # the others may be about to fail with something to say
                break
            time.sleep(0.05)
        for process, log in zip(processes, logs):
            process.kill()
            process.wait()
            log.close()
        _done[family] = []
        for rank in range(RANKS):
            written = folder / f"{rank}.json"
            found = json.loads(written.read_text()) if written.exists() else {}
            if processes[rank].returncode:
                log = (folder / f"{rank}.log").read_text()[-3000:]
                found[""] = f"rank {rank} ended with {processes[rank].returncode} after {list(found)}:\n{log}"
            _done[family].append(found)
    return _done[family]


@pytest.mark.parametrize("family, name", [(family, name) for family, names in CASES.items() for name in names])
def test_distributed(family: str, name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if "llama" in name:
        pytest.importorskip("transformers")
    for rank, found in enumerate(outcomes(family, tmp_path, pytestconfig)):
        assert name in found, f"did not run on rank {rank}\n{found.get('')}"
        assert found[name] is None, f"rank {rank}:\n{found[name]}"


@pytest.mark.parametrize("family", CASES)
def test_every_case_has_a_test(family: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    for found in outcomes(family, tmp_path, pytestconfig):
        assert list(found) == [name for name in CASES[family] if name in found or "llama" not in name]


@pytest.mark.parametrize("style", [ColwiseLoRA, RowwiseLoRA])
def test_style_names_its_options(style: type) -> None:
    assert repr(style(use_local_output=False)).startswith(f"{style.__name__}(input_layouts=(")
    assert "use_local_output=False" in repr(style(use_local_output=False))


def test_parameters_taken_away_between_forward_and_backward(device: torch.device) -> None:
    """As DeepSpeed's ZeRO-3 does: outside of a module's forward and backward its parameters hold no data."""
    layer = FusedLoRALinear(32, 48, device=device, r=4)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 32, device=device, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
    whole = {parameter: parameter.data for parameter in layer.parameters()}

    def gather(*_: object) -> None:
        for parameter, data in whole.items():
            parameter.data = data

    def partition(*_: object) -> None:
        for parameter in whole:
            parameter.data = parameter.new_empty(0)

    partition()
    with pytest.raises(ValueError, match=r"weight has shape \(0,\)"):
        layer(x)
    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(partition)
    layer.register_full_backward_pre_hook(gather)
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
    # so what is saved is the parameter itself, not its data of that moment
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert all(any(t is parameter for t in saved) for parameter in (layer.weight, layer.lora_A, layer.lora_B))


class CudaGenerator:
    """What of a CUDA generator counts: a seed, and an offset that seeding resets."""

    def __init__(self, seed: int, offset: int) -> None:
        self.seed, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def manual_seed(self, seed: int) -> None:
        assert 0 <= seed < 2**64
        self.seed, self.offset = seed, 0

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_streams_of_a_gpu_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank in range(4):
        generator = CudaGenerator(2**64 - 3, 40)
        monkeypatch.setattr(rank_masks, "_generator", lambda device, generator=generator: generator)
        monkeypatch.setattr(rank_masks, "capturing", lambda index: False)
        with pytest.raises(KeyError), rank_masks.own_stream(torch.device("cuda", 0), rank):
            drawn.append((generator.seed, generator.offset))
            generator.offset += 4
            raise KeyError
        assert (generator.seed, generator.offset) == (2**64 - 3, 44)
    assert len({seed for seed, _ in drawn}) == 4 and {offset for _, offset in drawn} == {40}
    monkeypatch.setattr(rank_masks, "capturing", lambda index: True)
    with pytest.raises(RuntimeError, match="in a CUDA graph's capture"):
        with rank_masks.own_stream(torch.device("cuda", 0), 0):
            pass
