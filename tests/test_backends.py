"""Who takes a call, who does not and why, and that a fallback says so once."""

import warnings

import pytest
import torch

import fusedlora
from fusedlora import backends
from fusedlora.testing import make_inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CUDA = torch.device("cuda", 0)
GOOD = backends.Call(False, CUDA, BF16, BF16, BF16, 64, 128, 16, False, (128, 1, 0), "")


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a GPU and with kernels, as far as why_not looks."""
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    monkeypatch.setattr(backends, "_triton_version", lambda: (3, 6))
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "last_used", None)


@pytest.mark.parametrize(
    "call",
    [
        GOOD,
        GOOD._replace(dtype=FP16, adapter_dtype=FP16, param_dtype=FP16),
        GOOD._replace(param_dtype=FP32),
        GOOD._replace(param_dtype=FP32, adapter_dtype=FP32),
        GOOD._replace(r=256),
        GOOD._replace(weight_layout=(136, 1, 0)),
        GOOD._replace(named=True, dtype=FP32, adapter_dtype=FP32, param_dtype=FP32, precision="high"),
    ],
)
def test_the_kernels_take(hopper, call) -> None:
    assert backends.TRITON.why_not(call) is None


@pytest.mark.parametrize(
    "call, reason",
    [
        (GOOD._replace(device=torch.device("cpu")), "x is on cpu, the kernels run on cuda"),
        (GOOD._replace(device=torch.device("mps")), "x is on mps, the kernels run on cuda"),
        (GOOD._replace(dtype=FP64), "dtype is torch.float64"),
        (GOOD._replace(masked=True), "dropout is on"),
        (GOOD._replace(K=129), "in_features 129 of torch.bfloat16 is not a multiple of 16 bytes"),
        (GOOD._replace(N=60), "out_features 60 of torch.bfloat16 is not a multiple of 16 bytes"),
        (GOOD._replace(r=257), "r is 257, the kernels take up to 256"),
        (GOOD._replace(weight_layout=(1, 64, 0)), r"weight has strides \(1, 64\)"),
        (GOOD._replace(weight_layout=(130, 1, 0)), "start at multiples of 16 bytes"),
        (GOOD._replace(weight_layout=(128, 1, 2)), "starts 2 bytes past a multiple of 16"),
        (GOOD._replace(dtype=FP16, adapter_dtype=FP32, param_dtype=FP32), "float32 beside a float16 x"),
        (GOOD._replace(dtype=FP32, adapter_dtype=FP32, param_dtype=FP32, precision="high"), "not been measured faster"),
        (GOOD._replace(named=True, dtype=FP32, adapter_dtype=FP32, precision="highest"), '"highest"'),
        (GOOD._replace(named=True, dtype=FP32, adapter_dtype=FP32, precision="high", r=65), "up to 64"),
    ],
)
def test_the_kernels_do_not_take(hopper, call, reason: str) -> None:
    said = backends.TRITON.why_not(call)
    assert said is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said)


def test_old_gpus_and_broken_installs(hopper, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_triton_missing", lambda: "triton cannot be used (ImportError: libcuda)")
    assert backends.TRITON.why_not(GOOD) == "triton cannot be used (ImportError: libcuda)"
    monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
    assert backends.TRITON.why_not(GOOD) == "compute capability 7.5 is below 8.0"
    assert backends.select("auto", GOOD) is backends.REFERENCE


def test_an_empty_kernel_is_not_launched(hopper, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_capability", lambda device: (10, 0))
    split = GOOD._replace(param_dtype=FP32, adapter_dtype=FP32)
    assert "empty kernel" in (backends.TRITON.why_not(split) or "")
    assert backends.TRITON.why_not(GOOD) is None
    monkeypatch.setattr(backends, "_triton_version", lambda: (3, 9))
    assert backends.TRITON.why_not(split) is None


def test_auto_prefers_the_kernels_and_remembers(hopper) -> None:
    assert backends.select("auto", GOOD) is backends.TRITON
    assert backends.last_used == "triton"
    assert backends.select("auto", GOOD._replace(r=300)) is backends.REFERENCE
    assert backends.last_used == "reference"
    assert backends.select("auto", GOOD) is backends.TRITON and backends.last_used == "triton"


def test_a_named_backend_runs_or_raises(hopper) -> None:
    assert backends.select("reference", GOOD) is backends.REFERENCE
    with pytest.raises(RuntimeError, match="backend 'triton' does not take this call: r is 300"):
        backends.select("triton", GOOD._replace(r=300))


def test_the_first_fallback_for_a_reason_warns_once(hopper) -> None:
    with pytest.warns(UserWarning, match="reference path, not triton: r is 300"):
        backends.select("auto", GOOD._replace(r=300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select("auto", GOOD._replace(r=300, K=256, weight_layout=(256, 1, 0)))
        backends.select("auto", GOOD._replace(device=torch.device("cpu")))  # nobody expects kernels there
    with pytest.warns(UserWarning, match="dropout is on"):
        backends.select("auto", GOOD._replace(masked=True))


def test_one_launch_only_where_waiting_has_run(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 6))
    backends._one_launch.cache_clear()
    monkeypatch.setattr(backends, "doctor_passed", lambda capability: False)
    assert not backends._one_launch(CUDA)
    backends._one_launch.cache_clear()
    monkeypatch.setattr(backends, "doctor_passed", lambda capability: capability == (8, 6))
    assert backends._one_launch(CUDA)
    backends._one_launch.cache_clear()


def test_on_a_cpu() -> None:
    i = make_inputs(4, 16, 24, 4)
    told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B)
    assert told.backend == "reference" and told.config is None and told.copies == ()
    assert "x is on cpu" in told.why_not["triton"] and "not triton: x is on cpu" in str(told)
    with pytest.raises(RuntimeError, match="backend 'triton' does not take this call"):
        fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0, backend="triton")
    assert fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, backend="triton").backend == "none"


def test_explain_a_layer_whose_adapter_is_not_in_use() -> None:
    layer = fusedlora.FusedLoRALinear(16, 24)
    layer.adapters_enabled = False
    assert fusedlora.explain(torch.ones(1, 16), layer).why_not["reference"] == "the adapter is turned off"
    layer.adapters_enabled = True
    layer.merge()
    told = fusedlora.explain(torch.ones(1, 16), layer)
    assert told.backend == "plain linear" and told.why_not["triton"] == "the adapter is merged into the weight"
