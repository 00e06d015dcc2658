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
        "replicas_are_the_same_bits_on_every_rank",
        "gradients_accumulate",
        "llama_trains_as_on_one_process",
        "every_layout",
        "adapter_off_is_the_plain_linear",
        "whole_state_dict_there_and_back",
        "under_fsdp_on_a_mesh_of_two_dimensions",
        "misfits_are_refused",
    ],
    "dropout": [
        "columns_share_a_mask_and_it_is_the_single_process_one",
        "rows_have_masks_of_their_own",
        "checkpointed_blocks_drop_the_same_again",
        "generators_apart_are_refused",
    ],
}
_done: dict[str, list[dict[str, str | None]]] = {}


def outcomes(family: str, folder: Path) -> list[dict[str, str | None]]:
    """For each rank what came of each case; the processes run once, whatever tests are chosen."""
    if family not in _done:
        worker = str(Path(__file__).with_name("distributed_worker.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
def test_distributed(family: str, name: str, tmp_path: Path) -> None:
    if "llama" in name:
        pytest.importorskip("transformers")
    for rank, found in enumerate(outcomes(family, tmp_path)):
        assert name in found, f"did not run on rank {rank}\n{found.get('')}"
        assert found[name] is None, f"rank {rank}:\n{found[name]}"


@pytest.mark.parametrize("family", CASES)
def test_every_case_has_a_test(family: str, tmp_path: Path) -> None:
    for found in outcomes(family, tmp_path):
        assert list(found) == [name for name in CASES[family] if name in found or "llama" not in name]


@pytest.mark.parametrize("style", [ColwiseLoRA, RowwiseLoRA])
def test_style_names_its_options(style: type) -> None:
    assert repr(style(use_local_output=False)).startswith(f"{style.__name__}(input_layouts=(")
    assert "use_local_output=False" in repr(style(use_local_output=False))
