"""DoRA's launches compiled ahead of time, for GPUs that are not here; `--slow` compiles all pairs."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
import triton

from fusedlora.config import SHARED_MEMORY
from fusedlora.kernels.dora import dora_gain, dora_scale
from fusedlora.kernels.inspection import TYPICAL_SMS, Launch, inspect_launch, record

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name -> r, dtype, dtype of lora_A and lora_B, dtype of the adapter's products
VARIANTS = {
    "r16": (16, BF16, BF16, BF16),
    "r5": (5, FP16, FP16, FP16),
    "r64": (64, BF16, BF16, BF16),
    "r128": (128, BF16, BF16, BF16),
    "r256": (256, BF16, BF16, BF16),
    "autocast-r16": (16, BF16, FP32, BF16),
    "autocast-r256": (256, BF16, FP32, BF16),
    "fp32-adapters-r16": (16, BF16, FP32, FP32),
    "fp32-adapters-r64": (64, BF16, FP32, FP32),
    "fp32-adapters-r256": (256, BF16, FP32, FP32),
    "fp32-r16": (16, FP32, FP32, FP32),
    "fp32-r64": (64, FP32, FP32, FP32),
}
QUICK = [(90, v) for v in VARIANTS] + [(cc, v) for cc in (80, 86, 100, 120) for v in ("r16", "fp32-adapters-r16")]


def cases():
    for case in itertools.product(TYPICAL_SMS, VARIANTS):
        yield pytest.param(*case, id=f"sm{case[0]}-{case[1]}", marks=() if case in QUICK else pytest.mark.slow)


def launches_of(capability: int, variant: str) -> list[Launch]:
    r, dtype, parameter_dtype, adapter_dtype = VARIANTS[variant]
    M, K, N = 8192, 4096, 4096

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    weight, bias = empty(N, K), empty(N)
    lora_A, lora_B = empty(r, K, dtype=parameter_dtype), empty(N, r, dtype=parameter_dtype)
    s = empty(M, r, dtype=adapter_dtype)

    def call() -> None:
        magnitude = empty(N, dtype=parameter_dtype)
        gain, norm = dora_gain(weight, lora_A, lora_B, magnitude, scaling=2.0, adapter_dtype=adapter_dtype)
        given = (empty(M, N), empty(M, N), gain, norm, bias, empty(M, K), weight, s, lora_B)
        settings = {"adapter_dtype": adapter_dtype, "magnitude_dtype": parameter_dtype}
        dora_scale(*given, need_dy=True, need_dm=True, **settings)

    return record(capability, call)


@pytest.mark.parametrize("capability, variant", list(cases()))
def test_compiles_within_limits(capability: int, variant: str) -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if capability == 100 and version < (3, 9):
        pytest.skip("why_not refuses compute capability 10.0 there")
    gain, scale = launches_of(capability, variant)
    for launch in (gain, scale):
        report = inspect_launch(launch, capability)
        assert report.registers > 16, "an empty kernel"
        assert report.shared <= SHARED_MEMORY[capability] // (2 if capability == 90 else 1)
        assert report.spills <= (0 if capability == 90 else 16)
        assert report.warnings == ()
        assert report.count("ld.global.nc") == 0
        if launch is gain:
            assert report.count("cp.async"), "W is not read ahead"
        elif VARIANTS[variant][1] is not FP32:
            assert report.registers <= 128, "the pass over dy lives on programs that hide each other's waits"
