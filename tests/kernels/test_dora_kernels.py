"""DoRA's kernels against float64: on a GPU as compiled, elsewhere in Triton's interpreter (see test_interpreter.py)."""

import dataclasses
import math
import os
import statistics
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from fusedlora import backends, cuda
from fusedlora.calls import by_weight
from fusedlora.dora import dora_linear
from fusedlora.kernels import launch
from fusedlora.kernels.backward import lora_backward
from fusedlora.kernels.common import INTERPRET
from fusedlora.kernels.dora import LEAST_GAIN, LEAST_GAIN_BESIDE_BIAS, dora_backward, dora_scale
from fusedlora.kernels.dora_gain import dora_gain
from fusedlora.memory import device_memory
from fusedlora.testing import error_ratios, make_inputs, poisoned_memory, relative_error

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)
DEVICE = "cpu" if INTERPRET else "cuda"
HALF = torch.float16 if INTERPRET else torch.bfloat16
FP16, FP32 = torch.float16, torch.float32
NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")
SCALING = 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype = HALF
    adapter_dtype: torch.dtype | None = None
    autocast: bool = False
    bias: bool = False
    small: bool = False  # some magnitudes of zero and near it

    @property
    def split(self) -> bool:
        return self.adapter_dtype is not None and not self.autocast

    def __str__(self) -> str:
        words = [f"{self.M}x{self.K}x{self.N}r{self.r}", str(self.dtype).removeprefix("torch.")]
        words += ["fp32-adapters"] if self.adapter_dtype else []
        return "-".join(words + [name for name in ("autocast", "bias", "small") if getattr(self, name)])


CASES = [
    Case(64, 64, 64, 16),
    Case(1, 64, 136, 1, bias=True),
    Case(63, 40, 72, 5, bias=True, small=True),
    Case(600, 48, 136, 40),
    Case(70, 64, 64, 256, small=True),
    Case(70, 64, 64, 16, dtype=FP16, bias=True),
    Case(70, 64, 72, 3, adapter_dtype=FP32, small=True),
    Case(90, 64, 64, 64, adapter_dtype=FP32, bias=True),
    Case(66, 64, 64, 128, adapter_dtype=FP32, bias=True, small=True),
    Case(70, 64, 72, 20, adapter_dtype=FP32, autocast=True),
    Case(77, 40, 72, 5, dtype=FP32, bias=True, small=True),
    Case(70, 80, 72, 5, bias=True, small=True),
    Case(50, 64, 72, 16, adapter_dtype=FP32, small=True),
]


def make(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """dora_linear's tensors by name, and dy."""
    i = make_inputs(
        case.M, case.K, case.N, case.r, case.dtype, case.adapter_dtype, DEVICE, bias=case.bias, seed=seed
    )  # fmt: skip
    norm = (i.weight.double() + SCALING * i.lora_B.double() @ i.lora_A.double()).norm(dim=1)
    spread = 1 + 0.2 * torch.randn(case.N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if case.small:
        spread[3], spread[5:7], spread[-1] = 0.0, LEAST_GAIN_BESIDE_BIAS * 0.5, -LEAST_GAIN * 0.5
    magnitude = (norm * spread.to(DEVICE)).to(i.lora_A.dtype)
    return dict(zip((*NAMES, "dy"), (i.x, i.weight, i.lora_A, i.lora_B, magnitude, i.bias, i.dy)))


def exact(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The formulas in float64; the weight's and the bias's gradients, which no kernel makes, left out."""
    x, weight, A, B, magnitude, bias, dy = (None if given[n] is None else given[n].double() for n in (*NAMES, "dy"))
    norm = (weight + SCALING * B @ A).norm(dim=1)
    s = SCALING * x @ A.t()
    u = x @ weight.t() + s @ B.t()
    scaled = dy * magnitude / norm
    t = SCALING * scaled @ B
    y = u * magnitude / norm
    out = {"y": y if bias is None else y + bias, "x": scaled @ weight + t @ A, "lora_A": t.t() @ x}
    return out | {"lora_B": scaled.t() @ s, "magnitude": (dy * u).sum(0) / norm, "u": u, "norm": norm}


def eager(x, weight, lora_A, lora_B, magnitude, bias, *, scaling: float) -> torch.Tensor:
    """What PEFT computes, in its dtypes."""
    plain = F.linear(x, weight, bias)
    wide = x.to(lora_A.dtype)
    adapted = weight.to(wide.dtype) + scaling * F.linear(lora_A.t(), lora_B).t().to(wide.dtype)
    gain = magnitude / adapted.norm(dim=1).detach()
    base = plain if bias is None else plain - bias
    adapter = F.linear(F.linear(wide, lora_A), lora_B)
    return (plain + ((gain - 1) * base + gain * adapter * scaling)).to(plain.dtype)


def answers(linear, case: Case, given: dict[str, torch.Tensor], **settings) -> dict[str, torch.Tensor]:
    """y and the gradients of x and the adapter."""
    trained = ("x", "lora_A", "lora_B", "magnitude")
    leaves = {name: given[name].detach().clone().requires_grad_() for name in trained}
    with torch.autocast(DEVICE, case.dtype, enabled=case.autocast):
        y = linear(*((given | leaves)[name] for name in NAMES), scaling=SCALING, **settings)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), given["dy"])))


@pytest.fixture(autouse=True)
def _precision():
    """The kernels take float32 where "high" allows its products to be made of tf32 ones."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _fp16_stands_in_for_bf16(monkeypatch):
    """The kernels refuse fp32 adapters over fp16, as their terms leave its range; the interpreter has no bf16."""
    if INTERPRET:
        triton = dataclasses.replace(backends.TRITON, why_not=lambda call: None)
        monkeypatch.setattr(backends, "BACKENDS", (triton, backends.REFERENCE))
        monkeypatch.setattr(backends, "_chosen", {})


DRAWS = 3 if INTERPRET else 24


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_not_above_the_eager_path(case: Case) -> None:
    logs = {}
    for seed in range(DRAWS):
        given = make(case, seed)
        want = exact(given)
        with poisoned_memory():
            got = answers(dora_linear, case, given, backend="triton")
        assert backends.last_used == "triton"
        theirs = answers(eager, case, given)
        assert {n: g.dtype for n, g in got.items()} == {n: g.dtype for n, g in theirs.items()}
        for name, ratio in error_ratios(got, theirs, want).items():
            if name == "magnitude" and (case.split or case.dtype is FP32):
                # u is taken from y, rounded once, where PEFT rounds x Wᵀ once and has the rest in fp32 beside it
                base = given["x"].double() @ given["weight"].double().t()
                ratio *= (base.norm() / want["u"].norm()).item()
            logs.setdefault(name, []).append(math.log(ratio))
    for name, values in logs.items():
        # fp16 stands in for bf16 in the interpreter; its exponent range drops some terms of fp32 adapters
        limit = 2.0 if INTERPRET and case.split else 1.02
        luck = 2 * statistics.stdev(values) / math.sqrt(DRAWS)
        assert statistics.mean(values) <= math.log(limit) + luck, (name, math.exp(statistics.mean(values)))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("case", [c for c in CASES if not c.autocast], ids=str)
def test_gain(case: Case, size: float) -> None:
    given = make(case)
    B = (given["lora_B"] * size).to(given["lora_B"].dtype)
    if size == 1.0:  # rows that the adapter all but cancels
        given["weight"][:4] = (-SCALING * B[:4].double() @ given["lora_A"].double() * (1 + 2**-5)).to(case.dtype)
    wide = torch.promote_types(case.dtype, case.adapter_dtype or case.dtype)
    gain, norm = dora_gain(given["weight"], given["lora_A"], B, given["magnitude"], scaling=SCALING, adapter_dtype=wide)
    want = (given["weight"].double() + SCALING * B.double() @ given["lora_A"].double()).norm(dim=1)
    dtype = given["magnitude"].dtype
    close = 1e-5 if dtype is FP32 else 1.01 * torch.finfo(dtype).eps / 2
    assert gain.dtype is norm.dtype is FP32 and torch.equal(norm, norm.to(dtype).float())
    assert ((norm - want).abs() / want).max() <= close
    assert torch.equal(gain, given["magnitude"].float() / norm)


@pytest.mark.parametrize("N, K", [(40, 1032), (72, 2600), (32, 5000)], ids=str)
def test_gain_of_long_rows(N: int, K: int) -> None:
    """Several programs sum a row's squares, the last of them adds their sums, in whatever order they come."""
    parts, plain = [], launch.Launcher.__call__

    def noted(self, memory, arguments):
        parts.append(arguments[-1])
        plain(self, memory, arguments)

    given = make(Case(4, K, N, 5, adapter_dtype=FP32))
    tensors = [given[name] for name in NAMES[1:5]]
    with poisoned_memory(), mock.patch.object(launch.Launcher, "__call__", noted):
        gain, norm = dora_gain(*tensors, scaling=SCALING, adapter_dtype=FP32)
        again = dora_gain(*tensors, scaling=SCALING, adapter_dtype=FP32)
    assert min(parts) > 1
    assert relative_error(norm, exact(given)["norm"]) < 1e-6
    assert torch.equal(gain, given["magnitude"] / norm) and torch.equal(again[0], gain)


def test_gain_is_one_where_the_adapter_is_zero() -> None:
    """For the norm itself as magnitude; the rounding of both is one."""
    given = make(CASES[0])
    B = torch.zeros_like(given["lora_B"])
    settings = {"scaling": SCALING, "adapter_dtype": HALF}
    _, norm = dora_gain(given["weight"], given["lora_A"], B, given["magnitude"], **settings)
    gain, _ = dora_gain(given["weight"], given["lora_A"], B, norm.to(HALF), **settings)
    assert torch.equal(gain, torch.ones_like(gain))


def test_gain_reads_the_scale_on_the_device() -> None:
    given = make(CASES[2])
    tensors = [given[name] for name in NAMES[1:5]]
    settings = {"adapter_dtype": HALF}
    scale = torch.tensor(SCALING, device=DEVICE)
    both = dora_gain(*tensors, scaling=1.0, scale=scale, **settings), dora_gain(*tensors, scaling=SCALING, **settings)
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])


def scale_arguments(case: Case, given: dict[str, torch.Tensor]) -> tuple[tuple, dict, dict[str, torch.Tensor]]:
    want = exact(given)
    norm = want["norm"].float()
    gain = given["magnitude"].float() / norm
    wide = torch.promote_types(case.dtype, case.adapter_dtype or case.dtype)
    s = (SCALING * given["x"].double() @ given["lora_A"].double().t()).to(wide)
    y = want["y"].to(case.dtype)
    tensors = (given["dy"], y, gain, norm, given["bias"], given["x"], given["weight"], s, given["lora_B"])
    settings = {"adapter_dtype": wide, "magnitude_dtype": FP32, "need_dy": True, "need_dm": True}
    return tensors, settings, want


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale(case: Case) -> None:
    tensors, settings, want = scale_arguments(case, make(case))
    scaled, dm = dora_scale(*tensors, **settings)
    dy, y, gain, norm, bias = tensors[:5]
    assert torch.equal(scaled, (dy.float() * gain).to(case.dtype))
    u = (y.double() - (0 if bias is None else bias.double())) / gain.double()
    least = LEAST_GAIN if bias is None else LEAST_GAIN_BESIDE_BIAS
    small = gain.abs() < least
    assert small.any() or not case.small
    dm_want = (dy.double() * torch.where(small, want["u"], u)).sum(0) / norm.double()
    assert relative_error(dm[~small], dm_want[~small]) < 2e-6
    # made of S, which is 16-bit itself, or of two 16-bit terms of it
    close = 2e-6 if case.dtype is FP32 else 2e-5 if case.split else 4e-3
    assert relative_error(dm[small], dm_want[small]) < close
    again = dora_scale(*tensors, **settings)
    assert torch.equal(again[0], scaled) and torch.equal(again[1], dm)


@pytest.mark.parametrize("need_dy, need_dm", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(need_dy: bool, need_dm: bool) -> None:
    case = CASES[2]
    tensors, settings, _ = scale_arguments(case, make(case))
    whole = dora_scale(*tensors, **settings)
    if not need_dm:
        dy, _, gain, *_, B = tensors
        tensors = (dy, None, gain, None, None, None, None, None, B)
    got = dora_scale(*tensors, **settings | {"need_dy": need_dy, "need_dm": need_dm})
    assert [out is not None for out in got] == [need_dy, need_dm]
    assert all(out is None or torch.equal(out, full) for out, full in zip(got, whole))


LAYOUTS = {
    "sliced-columns": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.t().contiguous().t(),
    "stride-0": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["dy", "x"])
def test_layouts(which: str, layout: str) -> None:
    case = Case(48, 64, 64, 16, bias=True, small=True)
    tensors, settings, _ = scale_arguments(case, make(case))
    made = LAYOUTS[layout]
    place = {"dy": 0, "x": 5}[which]
    odd = [made(t) if at == place else t for at, t in enumerate(tensors)]
    plain = [t.contiguous() if at == place else t for at, t in enumerate(odd)]
    got, want = dora_scale(*odd, **settings), dora_scale(*plain, **settings)
    # another stride is another kernel, whose compiler may contract the sum's terms in another way
    assert torch.equal(got[0], want[0]) and relative_error(got[1], want[1]) < 1e-6


STRIDED = {"one-for-all": lambda t: t[:1].expand(t.shape), "every-other": lambda t: t.repeat_interleave(2)[::2]}


@pytest.mark.parametrize("strides", STRIDED)
def test_a_bias_with_strides(strides: str) -> None:
    case = Case(80, 64, 64, 16, bias=True, small=True)
    given = make(case)
    bias = STRIDED[strides](given["bias"])
    odd, plain = given | {"bias": bias}, given | {"bias": bias.contiguous()}
    tensors, settings, _ = scale_arguments(case, plain)
    assert torch.equal(dora_scale(*tensors[:4], bias, *tensors[5:], **settings)[1], dora_scale(*tensors, **settings)[1])
    got, want = (answers(dora_linear, case, tensors, backend="triton") for tensors in (odd, plain))
    assert all(torch.equal(got[name], want[name]) for name in want)


BY_WEIGHT = [c for c in CASES if by_weight(c.M, c.K, c.r, c.dtype, FP32 if c.split else c.dtype)]
BY_WEIGHT.append(Case(1100, 16, 136, 16, bias=True, small=True))


def backward_arguments(case: Case, given: dict[str, torch.Tensor]) -> tuple[list, dict, dict[str, torch.Tensor]]:
    (dy, y, gain, norm, bias, x, weight, s, B), settings, want = scale_arguments(case, given)
    if case.autocast:
        s, settings["adapter_dtype"] = s.to(case.dtype), case.dtype
    tensors = [dy, y, gain, norm, bias, x, weight, s, given["lora_A"], B]
    settings = {name: settings[name] for name in ("adapter_dtype", "magnitude_dtype")}
    return tensors, settings | {"scaling": SCALING}, want


@pytest.mark.parametrize("launcher", [lora_backward, pytest.param(cuda.lora_backward, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", BY_WEIGHT, ids=str)
def test_gain_on_the_weight(case: Case, launcher, request) -> None:
    """The same gradients as with the gain on dy, up to roundings, and again to the bit."""
    given = make(case)
    tensors, settings, want = backward_arguments(case, given)
    if launcher is cuda.lora_backward:
        request.getfixturevalue("cuda_kernels")
        if settings["adapter_dtype"] is FP32:
            pytest.skip("dm is not formed beside terms")
    with poisoned_memory():
        got = dora_backward(*tensors, launcher, **settings)
        again = dora_backward(*tensors, launcher, **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    for name, out in zip(("x", "lora_A", "lora_B"), got):
        assert relative_error(out, want[name]) < (2**-9 if case.dtype is FP16 else 2**-7), name
    # dm of the columns with a large gain is that of y, whose rounding it has
    dm = dora_scale(*tensors[:8], tensors[9], **scale_arguments(case, given)[1] | {"need_dy": False})[1]
    assert relative_error(got[3], dm) < 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["dy", "x"])
def test_gain_on_the_weight_in_other_layouts(which: str, layout: str) -> None:
    case = Case(80, 64, 64, 16, bias=True, small=True)
    tensors, settings, _ = backward_arguments(case, make(case))
    place = {"dy": 0, "x": 5}[which]
    odd = LAYOUTS[layout](tensors[place])
    got = dora_backward(*tensors[:place], odd, *tensors[place + 1 :], lora_backward, **settings)
    want = dora_backward(*tensors[:place], odd.contiguous(), *tensors[place + 1 :], lora_backward, **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_no_rows() -> None:
    case = Case(0, 64, 72, 16)
    out = answers(dora_linear, case, make(case), backend="triton")
    assert out["y"].shape == (0, 72) and out["x"].shape == (0, 64)
    assert not any(out[name].any() for name in ("lora_A", "lora_B", "magnitude"))


def test_words_are_zero_after_a_launch() -> None:
    answers(dora_linear, CASES[3], make(CASES[3]), backend="triton")
    slabs = device_memory(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)).slabs
    assert slabs and not any(words.any() for words in slabs)


@pytest.mark.parametrize(
    "case, backward", [(CASES[0], 2), (CASES[9], 2), (CASES[6], 2), (CASES[11], 2), (CASES[12], 3)], ids=str
)
def test_launches(case: Case, backward: int) -> None:
    """Two forward and two backward; fp32 adapters at their precision take one more where dy has the gain."""
    names, plain = [], launch.Launcher.__call__

    def counted(self, *arguments):
        names.append(self.kernel.__name__)
        plain(self, *arguments)

    given = make(case)
    for name in ("x", "lora_A", "lora_B", "magnitude"):
        given[name].requires_grad_()
    with mock.patch.object(launch.Launcher, "__call__", counted):
        with torch.autocast(DEVICE, case.dtype, enabled=case.autocast):
            y = dora_linear(*(given[name] for name in NAMES), scaling=SCALING, backend="triton")
        assert names == ["gain_kernel", "decode_kernel" if case.M <= 64 else "forward_kernel"]
        names.clear()
        y.backward(given["dy"])
    assert names == ["scale_kernel"] + ["backward_kernel"] * (backward - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c.M > 1 and not c.autocast], ids=str)
def test_in_a_graph(case: Case) -> None:
    """Forward and backward captured and replayed, the magnitude changed in between."""
    given = make(case)
    static = {n: t if t is None else t.clone() for n, t in given.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    leaves = [static[n].requires_grad_() for n in ("x", "lora_A", "lora_B", "magnitude")]

    def step():
        y = dora_linear(*(static[n] for n in NAMES), scaling=SCALING, backend="triton")
        return y, *torch.autograd.grad(y, leaves, static["dy"])

    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for factor in (1.0, 1.5):
            with torch.no_grad():
                static["magnitude"].copy_(given["magnitude"] * factor)
            graph.replay()
            replayed = [t.clone() for t in captured]
            assert all(torch.equal(a, b) for a, b in zip(replayed, step()))
    torch.cuda.current_stream().wait_stream(stream)
