"""DoRA's launches compiled ahead of time, for GPUs that are not here; `--slow` compiles all pairs."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
import triton

from fusedlora.calls import by_weight
from fusedlora.config import SHARED_MEMORY
from fusedlora.kernels.backward import lora_backward
from fusedlora.kernels.dora import dora_backward, dora_scale
from fusedlora.kernels.dora_gain import dora_gain
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


BY_WEIGHT = {n for n, (r, dtype, _, wide) in VARIANTS.items() if by_weight(2, 1, r, dtype, wide)}


def cases(variants=VARIANTS):
    for case in itertools.product(TYPICAL_SMS, (name for name in VARIANTS if name in variants)):
        yield pytest.param(*case, id=f"sm{case[0]}-{case[1]}", marks=() if case in QUICK else pytest.mark.slow)


def launches_of(capability: int, variant: str, weight_gain: bool = False) -> list[Launch]:
    """The gain and the pass over dy, or with `weight_gain` what backward launches with the gain on W."""
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
        given = (empty(M, N), empty(M, N), gain, norm, bias, empty(M, K), weight, s)
        settings = {"adapter_dtype": adapter_dtype, "magnitude_dtype": parameter_dtype}
        if weight_gain:
            dora_backward(*given, lora_A, lora_B, lora_backward, scaling=2.0, **settings)
            return
        dora_scale(*given, lora_B, need_dy=True, need_dm=True, **settings)

    return record(capability, call)


def too_old(capability: int) -> bool:
    return capability == 100 and tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


@pytest.mark.parametrize("capability, variant", list(cases()))
def test_compiles_within_limits(capability: int, variant: str) -> None:
    if too_old(capability):
        pytest.skip("why_not refuses compute capability 10.0 there")
    gain, scale = launches_of(capability, variant)
    for launch in (gain, scale):
        report = inspect_launch(launch, capability)
        assert report.registers > 16, "an empty kernel"
        assert report.shared <= SHARED_MEMORY[capability] // (2 if capability == 90 else 1)
        assert report.spills <= (4 if capability == 90 else 16)
        assert report.loop_spills == 0 or capability != 90
        assert report.warnings == ()
        assert report.count("ld.global.nc") == 0
        assert report.begins_early == (capability >= 90)
        assert report.count("griddepcontrol") == (2 if capability >= 90 else 0)
        assert report.count("cp.async"), "W, or dy and y, are not read ahead"
        if launch is scale and VARIANTS[variant][1] is not FP32:
            assert report.registers <= 128, "the pass over dy lives on programs that hide each other's waits"


@pytest.mark.parametrize("capability, variant", list(cases(BY_WEIGHT)))
def test_gain_on_the_weight_compiles_within_limits(capability: int, variant: str) -> None:
    if too_old(capability):
        pytest.skip("why_not refuses compute capability 10.0 there")
    _, scale, backward = launches_of(capability, variant, weight_gain=True)
    assert [scale.kernel.__name__, backward.kernel.__name__] == ["scale_kernel", "backward_kernel"]
    for launch in (scale, backward):
        report = inspect_launch(launch, capability)
        assert report.begins_early == (capability >= 90)
        assert report.count("griddepcontrol") == (2 if capability >= 90 else 0)
        assert report.registers > 16, "an empty kernel"
        assert report.shared <= SHARED_MEMORY[capability]
        assert report.spills <= (0 if capability == 90 else 32)
        assert report.loop_spills == 0 or capability != 90
        assert report.warnings == ()
        assert report.count("ld.global.nc") == 0
        if launch is scale and capability == 90 and "fp32" not in variant:
            assert report.registers <= 128, "two programs share an SM"
        if launch is backward and capability == 90:
            assert report.count("wgmma.mma_async") and report.count("cp.async.bulk.tensor")
            assert report.count("release.gpu") and report.count("acquire.gpu")
