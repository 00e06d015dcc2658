"""The tuner's child process: `python -m fusedlora.tune_check FILE` compiles configurations and checks their numbers.

The file holds JSON: device, kernel, shape, configs. Prints a JSON object a line, {"0": null} for a configuration that
is right and {"1": "reason"} for one that is not; "stage" says where it is. May hang or die: only tune_gpu.py starts it.
What it compiles stays in Triton's cache.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cuda, dropout
from .config import Problem, forward_config
from .cuda_config import AnyConfig, CudaConfig
from .testing import Inputs, eager_peft, error_ratios, exact, make_inputs, run
from .timing import synchronize
from .tuning import config_class, direction_of, heuristic

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEED = 2**62 + 1
# Errors may be as large as eager PyTorch's or the heuristic's, whichever are larger, and this much for luck.
LUCK = 1.05
OUTPUTS = {"forward": ("y", "S"), "backward": ("dx", "dA", "dB")}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer's call. Dtypes are names in DTYPES; `adapter` is fp32 to keep fp32 adapters at fp32 precision."""

    M: int
    in_features: int
    out_features: int
    r: int
    dtype: str = "bf16"
    adapter: str = "bf16"
    dropout: float = 0.0

    def __str__(self) -> str:
        words = f"{self.M}, {self.in_features} → {self.out_features}, r = {self.r}, {self.dtype}"
        words += f", {self.adapter} adapters" if self.adapter != self.dtype else ""
        return words + (f", dropout {self.dropout:g}" if self.dropout else "")

    def problem(self, direction: str, capability: int, num_sms: int) -> Problem:
        out, depth = self.out_features, self.in_features
        if direction == "backward":
            out, depth = depth, out
        itemsize = DTYPES[self.dtype].itemsize
        split = self.adapter != self.dtype
        return Problem(self.M, out, depth, self.r, itemsize, split, capability, num_sms, self.dropout > 0.0)


def draw(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Random inputs without a mask, drawn on the device."""
    i = make_inputs(
        *(shape.M, shape.in_features, shape.out_features, shape.r, DTYPES[shape.dtype], DTYPES[shape.adapter], device),
        bias=False,
        scaling=1.0,
        seed=seed,
        drawn_on=device,
    )
    return dataclasses.replace(i, dropout_p=shape.dropout)


def launch(direction: str, i: Inputs, config: AnyConfig, s: Tensor | None = None) -> tuple[Tensor, ...]:
    """y and S of the forward kernel; dX, dA and dB of the backward kernel, which takes s."""
    kernels: tuple[Callable[..., Any], Callable[..., Any]] = cuda.lora_forward, cuda.lora_backward
    if not isinstance(config, CudaConfig):
        from fusedlora.kernels.backward import lora_backward
        from fusedlora.kernels.forward import lora_forward

        kernels = lora_forward, lora_backward
    forward, backward = kernels

    common: dict[str, Any] = {"scaling": i.scaling, "adapter_dtype": i.lora_A.dtype, "config": config}
    if i.dropout_p:
        common |= {"seed": torch.tensor([SEED]), "dropout_p": i.dropout_p}
    if direction == "forward":
        return forward(i.x, i.weight, i.lora_A, i.lora_B, None, save_s=True, **common)
    needs = {"need_dx": True, "need_dA": True, "need_dB": True}
    return backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, **needs, **common)


def saved_s(i: Inputs, problem: Problem) -> Tensor:
    """S as Triton's forward kernel saves it; problem is of either direction."""
    M, K = i.x.shape
    forward = dataclasses.replace(problem, M=M, out=i.weight.shape[0], depth=K)
    return launch("forward", i, forward_config(forward))[1]


def _shrunk(i: Inputs) -> Tensor:
    """S by PyTorch's own calls."""
    x = i.x.to(i.lora_A.dtype)
    if i.mask is not None:
        x = x * i.mask / (1.0 - i.dropout_p)
    return i.scaling * (x @ i.lora_A.t())


class Checker:
    """Holds configurations' errors against float64 to those of eager PyTorch and of the heuristic's configuration."""

    def __init__(self, kernel: str, shape: Shape, device: torch.device) -> None:
        from fusedlora.kernels.launch import device_facts

        self.direction, i = direction_of(kernel), draw(shape, device, seed=0)
        problem = shape.problem(self.direction, *device_facts(device))
        mask = None
        if shape.dropout:
            mask = dropout.as_mask(torch.tensor([SEED]), shape.M, shape.in_features, shape.dropout, device)
        masked = dataclasses.replace(i, mask=mask)
        self.inputs = i
        self.s = saved_s(i, problem) if self.direction == "backward" else None
        self.eager = run(eager_peft, masked, mask=mask, dropout_p=shape.dropout)
        self.exact = exact(masked)
        if self.direction == "forward":
            self.eager["S"], self.exact["S"] = (_shrunk(masked), _shrunk(masked.double()))
        base = self.ratios(self.outputs(heuristic(kernel, problem)))
        self.limits = {name: LUCK * max(1.0, ratio) for name, ratio in base.items()}

    def outputs(self, config: AnyConfig) -> dict[str, Tensor]:
        return dict(zip(OUTPUTS[self.direction], launch(self.direction, self.inputs, config, self.s)))

    def ratios(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        return error_ratios(outputs, self.eager, self.exact)

    def why_not(self, config: AnyConfig) -> str | None:
        """What is wrong with a configuration, None where nothing is."""
        first = self.outputs(config)
        for name, ratio in self.ratios(first).items():
            if not ratio <= self.limits[name]:
                return f"{name}'s error is {ratio:.2f} of eager PyTorch's, at most {self.limits[name]:.2f} is right"
        again = self.outputs(config)
        if not all(torch.equal(first[name], again[name]) for name in first):
            return "two runs differ"
        return None


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    device, kernel = torch.device(job["device"]), job["kernel"]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    print(json.dumps({"stage": "the heuristic's configuration"}), flush=True)
    checker = Checker(kernel, Shape(**job["shape"]), device)
    for index, fields in job["configs"]:
        print(json.dumps({"stage": f"configuration {index}"}), flush=True)
        try:
            reason = checker.why_not(config_class(kernel, fields)(**fields))
            synchronize(device)
        except Exception as error:  # one that Triton refuses says so in many ways; a broken context ends the process
            if isinstance(error, torch.AcceleratorError):
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(json.dumps({str(index): reason}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
