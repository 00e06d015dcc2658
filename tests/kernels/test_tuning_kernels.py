"""The tuner's child, its processes and what a launch takes: in triton's interpreter, and all of it on a GPU."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import fusedlora
from fusedlora import __main__ as cli
from fusedlora import backends, cuda_build, reference, tune, tune_check, tune_gpu, tuning
from fusedlora.cache import cache_dir
from fusedlora.config import backward_config, forward_config
from fusedlora.kernels import backward, forward
from fusedlora.kernels.common import INTERPRET
from fusedlora.kernels.launch import device_facts
from fusedlora.testing import make_inputs
from fusedlora.tune_check import Checker, Shape

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
TABLES = tuning.tables.__wrapped__  # which conftest.py puts out of the way


@interpreted
@pytest.mark.parametrize("direction, outputs", tune_check.OUTPUTS.items())
def test_the_child_launches_csrc_by_its_configurations(direction: str, outputs, monkeypatch) -> None:
    """With PyTorch in its place, of which one configuration gets the last output wrong."""
    launched = []

    def stand_in(way):
        def run(*tensors, config, **settings):
            launched.append(config)
            about = {"dropout_p": 0.0} | settings
            out = way(*tensors, *[None] * (8 - len(tensors)), **about)
            if config.group == 3:
                out[-1][0, 0] += 1.0
            return out

        return run

    monkeypatch.setattr(tune_check.cuda, "lora_forward", stand_in(reference.forward))
    monkeypatch.setattr(tune_check.cuda, "lora_backward", stand_in(reference.backward))
    shape = Shape(70, 64, 72, 8, "fp16", "fp16")
    kernel = tuning.cuda_kernel(direction)
    base = tuning.heuristic(kernel, shape.problem(direction, 90, 4))
    checker = Checker(kernel, shape, CPU)
    assert [config.group for config in launched] == [base.group] and set(checker.limits) == set(outputs)
    other, wrong = (dataclasses.replace(base, group=group) for group in (2, 3))
    assert checker.why_not(other) is None
    assert (checker.why_not(wrong) or "").startswith(f"{outputs[-1]}'s error is")
    assert [config.group for config in launched[1:]] == [2, 2, 3]


@interpreted
@pytest.mark.parametrize("kernel, outputs", tune_check.OUTPUTS.items())
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_child_tells_right_from_wrong(kernel: str, outputs, dropout: float, monkeypatch, tmp_path, capsys) -> None:
    """A job of three configurations, of which the second's last output is wrong and the third is refused."""
    shape = Shape(70, 64, 72, 8, "fp16", "fp16", dropout)
    checker = Checker(kernel, shape, CPU)
    base = tuning.heuristic(kernel, shape.problem(kernel, 90, 4))
    assert set(checker.limits) == set(outputs) and checker.why_not(base) is None
    launch = tune_check.launch

    def spoiled(kernel, i, config, s=None):
        out = launch(kernel, i, config, s)
        if config.GROUP_M == 3:
            out[-1][0, 0] += 1.0
        if config.GROUP_M == 5:
            raise ValueError("out of resources")
        return out

    monkeypatch.setattr(tune_check, "launch", spoiled)
    configs = [(n, dataclasses.asdict(dataclasses.replace(base, GROUP_M=group))) for n, group in enumerate((2, 3, 5))]
    job = {"device": "cpu", "kernel": kernel, "shape": dataclasses.asdict(shape), "configs": configs}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    tune_check.main(str(path))
    told = {}
    for line in capsys.readouterr().out.splitlines():
        told |= json.loads(line)
    assert told["0"] is None
    assert told["1"].startswith(f"{outputs[-1]}'s error is")
    assert told["2"] == "ValueError: out of resources"


@interpreted
def test_results_that_do_not_repeat_are_wrong(monkeypatch) -> None:
    checker = Checker("forward", Shape(40, 64, 64, 8, "fp16", "fp16"), CPU)
    outputs, runs = checker.outputs, []

    def unsteady(config):
        runs.append(config)
        return {name: t + (len(runs) % 2) * 1e-4 for name, t in outputs(config).items()}

    monkeypatch.setattr(checker, "outputs", unsteady)
    monkeypatch.setattr(checker, "limits", dict.fromkeys(checker.limits, 100.0))
    assert checker.why_not(forward_config(Shape(40, 64, 64, 8).problem("forward", 90, 4))) == "two runs differ"


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
def test_launches_and_explain_take_a_table(deterministic: bool, monkeypatch, tmp_path: Path) -> None:
    gpu = tuning.Gpu("A GPU", 90, 4)
    entries = []
    for kernel, heuristic in (("forward", forward_config), ("backward", backward_config)):
        p = Shape(40, 64, 72, 8, "fp16", "fp16").problem(kernel, 90, 4)
        entries.append(tuning.Entry(kernel, p, dataclasses.replace(heuristic(p), GROUP_M=3), 1.0, 2.0))
    table = tuning.Table(gpu, entries, tmp_path / "table.json")
    monkeypatch.setattr(tuning, "tables", lambda gpu: (table,))
    monkeypatch.setattr(tuning, "gpu_of", lambda device: gpu)
    i = make_inputs(40, 64, 72, 8, torch.float16, bias=False)
    taken = {}
    for module, kernel in ((forward, "forward_kernel"), (backward, "backward_kernel")):

        class Recorder(module.Launcher):
            def __call__(self, memory, arguments, kernel=kernel):
                taken[kernel] = self.constants["GROUP_M"]

        monkeypatch.setattr(module, "Launcher", Recorder)
        monkeypatch.setattr(module, "_plan", module._plan.__wrapped__)
    torch.use_deterministic_algorithms(deterministic)
    try:
        _, s = forward.lora_forward(
            i.x, i.weight, i.lora_A, i.lora_B, None, scaling=1.0, adapter_dtype=torch.float16, save_s=True
        )
        backward.lora_backward(
            i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, scaling=1.0, adapter_dtype=torch.float16,
            need_dx=True, need_dA=True, need_dB=True,
        )  # fmt: skip
        told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, backend="triton").config
    finally:
        torch.use_deterministic_algorithms(False)
    assert taken == dict.fromkeys(taken, 3) if not deterministic else 3 not in taken.values()
    assert told.count("(heuristic)" if deterministic else f"(measured at M = 40, {table.path})") == 2


CHILDREN = {
    "hangs": ("time.sleep(99)", "HANG"),
    "dies": ("os.kill(os.getpid(), 9)", "signal 9"),
    "says nothing": ("sys.exit(0)", "said nothing"),
}


@pytest.mark.parametrize("what", CHILDREN)
def test_a_child_that_does_not_finish_costs_one_configuration(what: str, monkeypatch) -> None:
    """Configuration 2 ends the child; the others are right in a child after it."""
    code, reason = CHILDREN[what]
    program = (
        "import json, os, sys, time\n"
        "for n, config in json.load(open(sys.argv[1]))['configs']:\n"
        "    print(json.dumps({'stage': f'configuration {n}'}), flush=True)\n"
        f"    if n == 2: {code}\n"
        "    print(json.dumps({str(n): None}), flush=True)\n"
    )
    monkeypatch.setattr(tune_gpu, "CHILD", [sys.executable, "-c", program])
    monkeypatch.setattr(tune_gpu, "START_S", 3.0)
    monkeypatch.setattr(tune_gpu, "EACH_S", 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    shape = Shape(64, 64, 64, 8)
    config = forward_config(shape.problem("forward", 90, 132))
    counted = []
    reasons = tune_gpu.OnGpu(CPU, 2, counted.append).reasons("forward", shape, [config] * 5)
    assert [r is None for r in reasons] == [True, True, False, True, True]
    assert reason in reasons[2] and max(counted) == 5


@pytest.mark.gpu
def test_one_tiny_shape(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself, with few configurations: its table is taken by the next call, and its numbers are right."""
    monkeypatch.setattr(tune, "STEPS", dict.fromkeys(tuning.KERNELS, ("order",)))
    library = cuda_build.find_library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if library is not None and cuda_build.find_library() is None:  # where children look for it too
        shutil.copytree(library.parent, cache_dir() / library.parent.name)
    monkeypatch.setattr(tuning, "tables", TABLES)
    monkeypatch.setattr(TABLES, "cache_clear", lambda: None, raising=False)
    command = ["tune", "--rows", "256", "--in-features", "512", "--out-features", "1024", "--r", "8"]
    assert cli.main([*command, "--jobs", str(min(8, os.cpu_count() or 1))]) == 0
    lines = capsys.readouterr().out.splitlines()
    shape, device = Shape(256, 512, 1024, 8), torch.device("cuda", 0)
    built = backends.CUDA.why_not(tune.call_of(shape, device)) is None
    kernels = [f"{kind}{way}" for way in ("forward", "backward") for kind in (["cuda_"] if built else []) + [""]]
    assert [line.split()[8] for line in lines[1:-1]] == kernels, lines
    table = tuning.read(
        tuning.user_path(tuning.gpu_of(torch.device("cuda", 0))), tuning.gpu_of(torch.device("cuda", 0))
    )
    assert table.path.exists() and lines[-1].startswith(f"{len(table.entries.items)} entries")
    i = make_inputs(256, 512, 1024, 8, torch.bfloat16, device="cuda", bias=False)
    told = [fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, backend="triton").config]
    told += [fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, backend="cuda").config] if built else []
    assert sum(config.count("measured at M = 256") for config in told) == len(table.entries.items)
    for kernel in kernels:
        checker = Checker(kernel, shape, device)
        assert (
            checker.why_not(tuning.heuristic(kernel, shape.problem(checker.direction, *device_facts(device)))) is None
        )
        for entry in table.entries.items.values():
            assert entry.us < entry.heuristic_us
            if entry.kernel == kernel:
                assert checker.why_not(entry.config) is None
    assert {kernel for kernel, _ in table.compared.items} == {"forward", "backward"}
    for compared in table.compared.items.values():
        assert compared.us > 0 and compared.products_us > 0 and (compared.cuda_us is not None) == built
