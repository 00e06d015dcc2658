"""Who takes a call, who does not and why, and that a fallback says so once."""

import sys
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch

import fusedlora
from fusedlora import backends, costs, cuda, why_not
from fusedlora.calls import Call, describe_call, float32_precision
from fusedlora.testing import make_inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CUDA = torch.device("cuda", 0)
GOOD = Call(False, CUDA, BF16, BF16, BF16, 64, 128, 16, False, (128, 1, 0), "")


def also(**changed) -> Call:
    return GOOD._replace(**changed)


IN_FP32 = {"dtype": FP32, "adapter_dtype": FP32, "param_dtype": FP32}

TAKEN = {
    "bf16": GOOD,
    "fp16": also(dtype=FP16, adapter_dtype=FP16, param_dtype=FP16),
    "fp32 adapters under autocast": also(param_dtype=FP32),
    "fp32 adapters": also(param_dtype=FP32, adapter_dtype=FP32),
    "fp16 under autocast": also(dtype=FP16, adapter_dtype=FP16, param_dtype=FP32),
    "r=1": also(r=1),
    "r=256": also(r=256),
    "padded rows": also(weight_layout=(136, 1, 0)),
    "precision is fp32's alone": also(precision=""),
    "named fp32": also(named=True, **IN_FP32, precision="high"),
    "named fp32, medium": also(named=True, **IN_FP32, precision="medium"),
    "named fp32, r=64": also(named=True, **IN_FP32, precision="high", r=64),
    "fp32's multiple of 16 bytes": also(named=True, **IN_FP32, precision="high", N=60, K=68, weight_layout=(68, 1, 0)),
}


@pytest.mark.parametrize("call", TAKEN.values(), ids=TAKEN)
def test_the_kernels_take(hopper, call) -> None:
    assert backends.TRITON.why_not(call) is None
    assert backends.REFERENCE.why_not(call) is None


REFUSED = {
    "cpu": (also(device=torch.device("cpu")), "x is on cpu, the kernels run on cuda"),
    "cpu, named": (also(device=torch.device("cpu"), named=True), "x is on cpu, the kernels run on cuda"),
    "mps": (also(device=torch.device("mps")), "x is on mps, the kernels run on cuda"),
    "xpu": (also(device=torch.device("xpu")), "x is on xpu, the kernels run on cuda"),
    "meta": (also(device=torch.device("meta")), "x is on meta, the kernels run on cuda"),
    "fp64": (also(dtype=FP64), "dtype is torch.float64, the kernels take bfloat16, float16 and float32"),
    "dropout": (also(dropout="mask"), "dropout comes as a mask"),
    "K": (also(K=129), "in_features 129 of torch.bfloat16 is not a multiple of 16 bytes"),
    "N": (also(N=60), "out_features 60 of torch.bfloat16 is not a multiple of 16 bytes"),
    "N, fp32": (
        also(named=True, **IN_FP32, precision="high", N=62),
        "out_features 62 of torch.float32 is not a multiple of 16 bytes",
    ),
    "rank": (also(r=257), "r is 257, the kernels take up to 256 in torch.bfloat16"),
    "rank, fp32": (
        also(named=True, **IN_FP32, precision="high", r=65),
        "r is 65, the kernels take up to 64 in torch.float32",
    ),
    "transposed weight": (also(weight_layout=(1, 64, 0)), "weight has strides (1, 64)"),
    "strided columns": (also(weight_layout=(256, 2, 0)), "weight has strides (256, 2)"),
    "rows on one another": (also(weight_layout=(0, 1, 0)), "weight has strides (0, 1)"),
    "unaligned rows": (also(weight_layout=(130, 1, 0)), "start at multiples of 16 bytes"),
    "unaligned start": (also(weight_layout=(128, 1, 2)), "starts 2 bytes past a multiple of 16"),
    "fp32 adapters over fp16": (also(dtype=FP16, adapter_dtype=FP32, param_dtype=FP32), "float32 beside a float16 x"),
    "fp32, auto": (also(**IN_FP32, precision="high"), "not been measured faster"),
    "fp32, highest": (also(**IN_FP32, precision="highest"), 'get_float32_matmul_precision() is "highest"'),
    "fp32, highest, named": (also(named=True, **IN_FP32, precision="highest"), '"highest"'),
}


@pytest.mark.parametrize("call, reason", REFUSED.values(), ids=REFUSED)
def test_the_kernels_do_not_take(hopper, call, reason: str) -> None:
    assert reason in (backends.TRITON.why_not(call) or "taken")
    assert backends.REFERENCE.why_not(call) is None


def test_auto_leaves_to_pytorch_what_that_does_faster(hopper, monkeypatch, recwarn) -> None:
    wide = also(r=128, plain=True)
    expected = "PyTorch's own products are expected to take less time: "
    assert backends.TRITON.why_not(wide) == expected + "r is 128, above 64"
    assert backends.select("auto", wide) is backends.REFERENCE
    assert not recwarn.list, "nobody is told of a choice that costs nothing"
    kept = {
        "asked for by name": {"named": True},
        "DoRA's": {"plain": False},
        "a mask": {"dropout": "seed"},
        "fp32's precision": {"param_dtype": FP32, "adapter_dtype": FP32},
        "a scale on the device": {"scale": True},
        "few ranks": {"r": 16},
    }
    for why, settings in kept.items():
        assert backends.TRITON.why_not(wide._replace(**settings)) is None, why
    monkeypatch.setattr(why_not, "_capability", lambda device: (8, 0))
    assert backends.TRITON.why_not(wide) is not None, "wide ranks are no different there"
    few = wide._replace(r=16, rows=1, N=4096, K=4096, weight_layout=(4096, 1, 0), direction="backward")
    assert backends.TRITON.why_not(few) is None, "where nobody has measured"
    monkeypatch.setattr(why_not, "_capability", lambda device: (9, 0))
    assert (backends.TRITON.why_not(few) or "").startswith(expected + "about ")


def test_both_kinds_of_kernels_are_compared(hopper, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "missing", lambda: None)
    call = also(plain=True, rows=512, N=4096, K=4096, weight_layout=(4096, 1, 0))
    asked = []
    answers = {"cuda": "slow", "triton": None}
    monkeypatch.setattr(costs, "why_slower", lambda *about: asked.append(about) or answers[about[0]])
    assert backends.select("auto", call) is backends.TRITON
    expected = [(kind, way, 512, 4096, 4096, 16, False, 132) for way in (True, False) for kind in ("cuda", "triton")]
    assert asked == expected


@pytest.mark.parametrize(
    "M, rows", [(0, 1), (1, 1), (32, 32), (33, 34), (197, 200), (500, 512), (577, 608), (8192, 8192)]
)
def test_rows_are_counted_in_steps(M: int, rows: int) -> None:
    i = make_inputs(1, 16, 24, 4)
    call = describe_call("auto", i.x.new_empty(M, 16), i.weight, i.lora_A, i.lora_B, None, None, FP32)
    assert call.rows == rows and not call.plain


def test_rocm(hopper, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in (backends.TRITON.why_not(GOOD) or "taken")


def test_old_gpus_and_broken_installs(hopper, monkeypatch) -> None:
    monkeypatch.setattr(why_not, "_triton_missing", lambda: "triton cannot be used (ImportError: libcuda)")
    assert backends.TRITON.why_not(GOOD) == "triton cannot be used (ImportError: libcuda)"
    monkeypatch.setattr(why_not, "_capability", lambda device: (7, 5))
    assert backends.TRITON.why_not(GOOD) == "compute capability 7.5 is below 8.0"
    with pytest.warns(UserWarning, match="reference path, not triton: compute capability 7.5 is below 8.0"):
        assert backends.select("auto", GOOD) is backends.REFERENCE


def test_a_broken_triton_is_a_reason(monkeypatch) -> None:
    """Whatever its import raises; on a CPU a triton asked for by name says so before all else."""
    monkeypatch.setitem(sys.modules, "fusedlora.kernels", None)
    missing = why_not._triton_missing.__wrapped__
    assert (missing() or "").startswith("triton cannot be used (ModuleNotFoundError: ")
    monkeypatch.setattr(why_not, "_triton_missing", missing)
    i = make_inputs(4, 16, 24, 4)
    with pytest.raises(RuntimeError, match="backend 'triton' does not take this call: triton cannot be used"):
        fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0, backend="triton")


def test_an_empty_kernel_is_not_launched(hopper, monkeypatch) -> None:
    monkeypatch.setattr(why_not, "_capability", lambda device: (10, 0))
    assert "empty ones for compute capability 10.0" in (backends.TRITON.why_not(GOOD) or "")
    monkeypatch.setattr(why_not, "_triton_version", lambda: (3, 9))
    assert backends.TRITON.why_not(GOOD) is None
    assert backends.TRITON.why_not(GOOD._replace(param_dtype=FP32, adapter_dtype=FP32)) is None
    told = backends.TRITON.why_not(GOOD._replace(dropout="seed")) or "taken"
    assert "with dropout to empty ones for compute capability 10.0" in told


def test_auto_prefers_the_kernels_and_remembers(hopper) -> None:
    assert backends.select("auto", GOOD) is backends.TRITON
    assert backends.last_used == "triton"
    with pytest.warns(UserWarning, match="r is 300"):
        assert backends.select("auto", GOOD._replace(r=300)) is backends.REFERENCE
    assert backends.last_used == "reference"
    assert backends.select("auto", GOOD) is backends.TRITON and backends.last_used == "triton"


def test_a_choice_is_made_once(monkeypatch) -> None:
    asked = []
    counting = replace(backends.REFERENCE, why_not=asked.append)
    monkeypatch.setattr(backends, "BACKENDS", (counting,))
    monkeypatch.setattr(backends, "_chosen", {})
    i = make_inputs(4, 16, 24, 4)
    for M in (40, 39, 40):  # the number of rows counts in steps
        fusedlora.lora_linear(i.x[:M], i.weight, i.lora_A, i.lora_B, scaling=1.0)
    assert [(call.direction, call.named) for call in asked] == [("forward", False), ("backward", False)]
    fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0, backend="reference")
    assert len(asked) == 4 and asked[2] == asked[0]._replace(named=True)
    fusedlora.lora_linear(i.x, i.weight, i.lora_A[:3], i.lora_B[:, :3], scaling=1.0)
    assert len(asked) == 6 and asked[4].r == 3


def test_a_call_is_described_by_its_tensors() -> None:
    i = make_inputs(4, 16, 24, 3, BF16, FP32)
    weight = torch.zeros(24 * 20 + 1, dtype=BF16)[1:].view(24, 20)[:, :16]
    call = describe_call("auto", i.x, weight, i.lora_A, i.lora_B, None, None, FP32)
    layout = (20, 1, weight.data_ptr() % 16)
    expected = Call(False, i.x.device, BF16, FP32, FP32, 24, 16, 3, "", layout, "", rows=4)
    assert call == expected and layout[2] % 8
    named = describe_call("triton", i.x, None, i.lora_A, i.lora_B, i.x > 0, None, FP32)
    assert named.named and named.dropout == "mask" and named.weight_layout == (16, 1, 0)


@pytest.mark.parametrize("setting, precision", [("tf32", "high"), ("ieee", "highest")])
def test_precision_set_through_either_api(setting: str, precision: str) -> None:
    """torch's older getter raises after the newer setter has been used; a float32 call must not."""
    i = make_inputs(4, 16, 24, 4)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert float32_precision() == precision
        call = describe_call("auto", i.x, i.weight, i.lora_A, i.lora_B, None, None, FP32)
        assert call.precision == precision
        fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


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
    with pytest.warns(UserWarning, match="dropout comes as a mask"):
        backends.select("auto", GOOD._replace(dropout="mask"))


def test_one_launch_only_where_waiting_has_run(monkeypatch) -> None:
    monkeypatch.setattr(why_not, "_capability", lambda device: (8, 6))
    why_not.takes_one_launch.cache_clear()
    monkeypatch.setattr(why_not, "doctor_passed", lambda capability: False)
    assert not why_not.takes_one_launch(CUDA)
    why_not.takes_one_launch.cache_clear()
    monkeypatch.setattr(why_not, "doctor_passed", lambda capability: capability == (8, 6))
    assert why_not.takes_one_launch(CUDA)
    why_not.takes_one_launch.cache_clear()


def test_auto_on_a_cpu_is_the_reference() -> None:
    i = make_inputs(4, 16, 24, 4)
    told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B)
    assert told.backend == "reference" and told.config is None and told.copies == ()
    assert told.why_not == dict.fromkeys(("cuda", "triton"), "x is on cpu, the kernels run on cuda")
    assert str(told).splitlines() == ["backend: reference", *(f"not {n}: {r}" for n, r in told.why_not.items())]
    backends.last_used = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0)
    assert backends.last_used == "reference"


def test_triton_by_name_on_a_cpu_raises_with_its_reason() -> None:
    i = make_inputs(4, 16, 24, 4)
    reason = why_not._triton_missing() or "x is on cpu, the kernels run on cuda"
    with pytest.raises(RuntimeError) as raised:
        fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=1.0, backend="triton")
    assert str(raised.value) == f"backend 'triton' does not take this call: {reason}"
    told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, backend="triton")
    assert told.backend == "none" and told.config is None
    asked = "backend 'triton' was asked for"
    assert told.why_not == {"cuda": "x is on cpu, the kernels run on cuda", "triton": reason, "reference": asked}


COPIES = {
    "dropout": ({}, {"dropout_p": 0.1}, ["dropout mask, one byte an element of x; x under the mask"]),
    "dropout, eval": ({}, {"dropout_p": 0.1, "training": False}, []),
    "fp32 adapters": (
        {"dtype": BF16, "adapter_dtype": FP32},
        {},
        ["x in torch.float32, for the adapter's products"],
    ),
}


@pytest.mark.parametrize("inputs, settings, copies", COPIES.values(), ids=COPIES)
def test_explain_names_the_copies(inputs, settings, copies) -> None:
    i = make_inputs(4, 16, 24, 4, **inputs)
    told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, i.bias, **settings)
    assert told.backend == "reference" and list(told.copies) == copies
    assert all(f"copy: {copy}" in str(told).splitlines() for copy in copies)


def test_explain_under_autocast() -> None:
    i = make_inputs(4, 16, 24, 4)
    with torch.autocast("cpu", dtype=BF16):
        told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, i.bias)
    assert told.copies == tuple(f"{name}, cast to torch.bfloat16 by autocast" for name in ("x", "weight"))


def test_explain_draws_and_runs_nothing(monkeypatch) -> None:
    i = make_inputs(4, 16, 24, 4)
    state = torch.get_rng_state()
    failing = mock.Mock(side_effect=AssertionError("run"))
    kept = tuple(replace(b, forward=failing, backward=failing) for b in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", kept)
    fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, dropout_p=0.5)
    assert torch.equal(state, torch.get_rng_state()) and not failing.called


def test_explain_asks_for_the_adapter() -> None:
    i = make_inputs(4, 16, 24, 4)
    with pytest.raises(TypeError, match="explain takes a FusedLoRALinear, or weight, lora_A and lora_B"):
        fusedlora.explain(i.x, i.weight)
    with pytest.raises(ValueError, match="lora_A has in_features 16, x has 15|weight has in_features 16, x has 15"):
        fusedlora.explain(i.x[:, :15], i.weight, i.lora_A, i.lora_B)


def test_explain_a_layer() -> None:
    layer = fusedlora.FusedLoRALinear(16, 24, lora_dropout=0.1)
    x = torch.ones(1, 16)
    told = fusedlora.explain(x, layer)
    assert told.backend == "reference" and len(told.copies) == 1
    assert fusedlora.explain(x, layer.eval()).copies == ()
    layer.backend = "triton"
    assert fusedlora.explain(x, layer).backend == "none"


def test_explain_a_layer_whose_adapter_is_not_in_use() -> None:
    layer = fusedlora.FusedLoRALinear(16, 24)
    layer.adapters_enabled = False
    assert fusedlora.explain(torch.ones(1, 16), layer).why_not["reference"] == "the adapter is turned off"
    layer.adapters_enabled = True
    layer.merge()
    told = fusedlora.explain(torch.ones(1, 16), layer)
    assert told.backend == "plain linear" and told.why_not["triton"] == "the adapter is merged into the weight"


@pytest.mark.parametrize(
    "options, attributes, error, message",
    [
        ({"use_dora": True}, {"lora_magnitude_vector": "float64"}, TypeError, "magnitude has dtype torch.float64"),
        ({}, {"scaling": torch.ones(2)}, TypeError, r"scaling is a tensor with shape \(2,\)"),
        (
            {},
            {"merged": True, "adapters_enabled": False},
            RuntimeError,
            "adapters_enabled is False, but the adapter is",
        ),
    ],
    ids=["magnitude", "scaling", "merged and off"],
)
def test_explain_raises_what_the_call_raises(options, attributes, error, message: str) -> None:
    layer = fusedlora.FusedLoRALinear(16, 24, **options)
    for name, value in attributes.items():
        setattr(layer, name, torch.nn.Parameter(torch.ones(24).double()) if value == "float64" else value)
    for call in (layer, lambda x: fusedlora.explain(x, layer)):
        with pytest.raises(error, match=message):
            call(torch.ones(1, 16))


@pytest.mark.parametrize("given", [{"dropout_p": 7.0, "backend": "zz"}, {"training": True}, {"bias": torch.ones(24)}])
def test_explain_takes_no_argument_that_a_layer_brings(given) -> None:
    with pytest.raises(TypeError, match=f"{', '.join(given)} given beside a FusedLoRALinear, which brings its own"):
        fusedlora.explain(torch.ones(1, 16), fusedlora.FusedLoRALinear(16, 24), **given)
