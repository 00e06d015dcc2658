"""Backend cuda on an H100: what tests/kernels/test_gpu.py, which runs for both backends, does not ask of it."""

import dataclasses
import statistics
import threading
import time
from typing import Any

import pytest
import torch

import fusedlora
from fusedlora import backends, cuda, dropout
from fusedlora.cuda_config import MAX_RANK_NARROW, CudaConfig
from fusedlora.memory import device_memory
from fusedlora.testing import (
    Inputs,
    eager_peft,
    error_ratios,
    exact,
    make_inputs,
    poisoned_memory,
    relative_error,
    run,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_kernels")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([2**62 + 0x123456789ABCDEF])
# Two right answers to the last bit of their dtype still differ by luck.
LUCK = 1.02


@dataclasses.dataclass(frozen=True)
class Case:
    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype = BF16
    fp32_adapters: bool = False
    precise: bool = False  # outside autocast
    bias: bool = False
    dropout_p: float = 0.0

    def __str__(self) -> str:
        words = [f"{self.M}x{self.K}x{self.N}r{self.r}", str(self.dtype).removeprefix("torch.")]
        flags = ("fp32_adapters", "precise", "bias", "dropout_p")
        return "-".join([*words, *(name for name in flags if getattr(self, name))])

    def inputs(self) -> Inputs:
        adapter_dtype = FP32 if self.fp32_adapters or self.precise else self.dtype
        i = make_inputs(
            self.M, self.K, self.N, self.r, self.dtype, adapter_dtype, "cuda", bias=self.bias, scaling=1.5, seed=self.M
        )
        if self.dropout_p:
            mask = dropout.as_mask(SEED, self.M, self.K, self.dropout_p, i.x.device)
            i = dataclasses.replace(i, mask=mask, dropout_p=self.dropout_p)
        return i


CASES = [
    Case(1, 64, 64, 3),
    Case(63, 40, 72, 5, bias=True),
    Case(128, 64, 8, 16),
    Case(129, 8, 264, 1),
    Case(500, 272, 528, 17, FP16, bias=True),
    Case(1000, 1024, 1544, 33),
    Case(1000, 1024, 1544, 64, FP16),
    Case(1000, 1024, 1544, 16, fp32_adapters=True),
    Case(700, 512, 520, 48, fp32_adapters=True, bias=True),
    Case(520, 512, 512, 16, dropout_p=0.3, bias=True),
    Case(520, 512, 520, 5, FP16, dropout_p=0.9),
    Case(520, 512, 520, 40, dropout_p=0.1, fp32_adapters=True),
    Case(5000, 512, 768, 16, dropout_p=0.1),
    Case(5000, 768, 512, 64),
    Case(1000, 1024, 1544, 16, precise=True),
    Case(700, 512, 520, 5, precise=True, bias=True),
    Case(5000, 4096, 768, 12, precise=True, dropout_p=0.1),
    Case(520, 520, 512, 16, dropout_p=0.1),
    Case(1000, 1032, 520, 64, dropout_p=0.1),
    Case(700, 520, 520, 5, precise=True, dropout_p=0.1),
    Case(520, 512, 520, 5, FP16, dropout_p=dropout.MAX_P),
    Case(500, 272, 528, 8),
    Case(1300, 768, 2056, 16, FP16),
    Case(5000, 520, 1032, 8, dropout_p=0.1),
    Case(1100, 512, 520, 16),  # nine row blocks: the last unit of T with dB is of one block of the cluster
    Case(1000, 520, 776, 24),
    Case(700, 512, 520, 48, FP16, dropout_p=0.3),
    Case(1000, 512, 528, 72),
    Case(1000, 1024, 1544, 128),
    Case(700, 520, 520, 65, FP16, bias=True),
    Case(700, 512, 520, 96, fp32_adapters=True, bias=True),
    Case(1000, 1032, 520, 128, dropout_p=0.1),
    Case(3000, 512, 768, 100, FP16, dropout_p=0.3),
    Case(5000, 768, 512, 256),
    Case(129, 512, 264, 200, FP16, bias=True),
    Case(1000, 1032, 520, 256, dropout_p=0.1),
    Case(700, 512, 520, 130, fp32_adapters=True, dropout_p=0.1),
]
WIDE = CudaConfig(block_n=256, group=4, programs=132, shrink_clusters=66, parts=1)
CONFIGS = {
    "table": None,
    "wide": WIDE,
    "narrow": dataclasses.replace(WIDE, block_n=128, group=1),
    "parts": dataclasses.replace(WIDE, parts=3),
    "dB-with-T": dataclasses.replace(WIDE, shrink_clusters=3, db_with_t=True),
    "two-blocks": CudaConfig(block_n=128, group=2, programs=2, shrink_clusters=1, parts=2),
}


def launch_both(i: Inputs, config: CudaConfig | None = None, *, precise: bool = False) -> dict[str, torch.Tensor]:
    """y, dx, dA, dB; every buffer that the launchers allocate starts as NaN."""
    adapter_dtype = FP32 if precise else i.x.dtype
    common: dict[str, Any] = {"scaling": i.scaling, "adapter_dtype": adapter_dtype, "config": config}
    if i.dropout_p:
        common |= {"seed": SEED, "dropout_p": i.dropout_p}
    with poisoned_memory():
        y, s = cuda.lora_forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, save_s=True, **common)
        needs = {"need_dx": True, "need_dA": True, "need_dB": True}
        dx, dA, dB = cuda.lora_backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, **needs, **common)
    assert dx is not None and dA is not None and dB is not None
    return {"y": y, "dx": dx, "dA": dA, "dB": dB}


def eager_answers(case: Case, i: Inputs) -> dict[str, torch.Tensor]:
    """What the eager path gives in the same dtypes; fp32 adapters run under autocast, unless they are precise."""

    def linear(*tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        with torch.autocast("cuda", dtype=case.dtype, enabled=case.fp32_adapters):
            return eager_peft(*tensors, **settings)

    return run(linear, i, mask=i.mask, dropout_p=i.dropout_p)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_not_above_the_eager_path(case: Case, config: CudaConfig | None) -> None:
    if config and config.block_n == 128 and case.r > MAX_RANK_NARROW:
        pytest.skip("no room for such ranks")
    i = case.inputs()
    ours, answers = launch_both(i, config, precise=case.precise), exact(i)
    assert ours["dA"].dtype == i.lora_A.dtype and ours["dB"].dtype == i.lora_B.dtype
    ratios = error_ratios(ours, eager_answers(case, i), answers)
    for name, ratio in ratios.items():
        few = case.M * case.r < 1024 or min(case.M, case.K, case.N) < 64
        lucky = few and relative_error(ours[name], answers[name]) <= 4 * torch.finfo(case.dtype).eps
        assert ratio <= LUCK or lucky, ratios


@pytest.mark.parametrize("config", [None, CONFIGS["two-blocks"], CONFIGS["wide"]], ids=["table", "two-blocks", "wide"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_s_alone(case: Case, config: CudaConfig | None) -> None:
    if config and config.block_n == 128 and case.r > MAX_RANK_NARROW:
        pytest.skip("no room for such ranks")
    i = case.inputs()
    if config and (case.precise or case.dropout_p) and case.K >= 512:
        config = dataclasses.replace(config, slices=3)
    settings: dict[str, Any] = {"adapter_dtype": FP32 if case.precise else i.x.dtype, "config": config, "save_s": True}
    settings["seed"] = SEED if case.dropout_p else None
    tensors = i.x, i.weight, i.lora_A, i.lora_B, i.bias
    plan = cuda.forward_plan(*tensors, tiles=False, **settings)
    if plan is None:
        assert config is None, "a table's configuration alone may sum S in tiles or be the decode kernel's"
        return
    with poisoned_memory():
        _, s = cuda.lora_forward(*tensors, scaling=1.5, dropout_p=case.dropout_p, **settings)
        alone = torch.empty_like(s)
    plan.launch((*tensors, None, None, None, alone), *dropout.launch_dropout(settings["seed"], case.dropout_p, 1.5))
    assert torch.equal(alone, s)


@pytest.mark.parametrize(
    "case, db_with_t",
    [
        *((case, False) for case in (CASES[5], CASES[6], CASES[9], CASES[12], CASES[16])),
        *((case, False) for case in CASES if case.r >= 128),
        *((case, True) for case in CASES if case.r in (8, 16) and case.M > 256 and not case.precise),
    ],
    ids=str,
)
def test_the_bits_do_not_depend_on_who_computes_what(case: Case, db_with_t: bool) -> None:
    """Nor on the run, for one number of parts."""
    i = case.inputs()
    wide = dataclasses.replace(WIDE, db_with_t=db_with_t)
    expected = launch_both(i, wide, precise=case.precise)
    for programs, clusters in ((132, 66), (132, 1), (132, 7), (130, 65), (64, 3), (2, 1)):
        config = dataclasses.replace(wide, programs=programs, shrink_clusters=clusters, first_job=clusters // 2)
        for _ in range(3):
            got = launch_both(i, config, precise=case.precise)
            assert all(torch.equal(got[name], expected[name]) for name in expected), (programs, clusters)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("block_n", [256, 128])
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.dropout_p and not case.precise and case.M > 1], ids=str
)
def test_dm_with_db(case: Case, block_n: int, parts: int) -> None:
    """dx and dA as without, dB with the gain, and dm where the gain is not small, whoever computes what."""
    kernels = pytest.importorskip("fusedlora.kernels.backward", exc_type=ImportError)
    if block_n == 128 and case.r > MAX_RANK_NARROW:
        pytest.skip("no room for such ranks")
    i = case.inputs()
    dm_dtype = FP32 if case.fp32_adapters else case.dtype
    bias = i.bias if i.bias is None or case.dtype is FP16 else i.bias.float()
    gain = torch.randn(case.N, device="cuda")
    gain[::5] *= 0.01
    norm, y = torch.rand(case.N, device="cuda") + 0.5, torch.randn_like(i.dy)
    s = (i.scaling * i.x.double() @ i.lora_A.double().t()).to(case.dtype)
    config = dataclasses.replace(WIDE, block_n=block_n, parts=parts)

    def backward(config: CudaConfig, dora: Any) -> tuple[torch.Tensor | None, ...]:
        settings: dict[str, Any] = {"scaling": i.scaling, "adapter_dtype": case.dtype, "config": config, "dora": dora}
        needs = {"need_dx": True, "need_dA": True, "need_dB": True}
        with poisoned_memory():
            return cuda.lora_backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, **needs, **settings)

    def with_dm(config: CudaConfig) -> tuple[torch.Tensor | None, ...]:
        dm = torch.full((case.N,), 7.0, device="cuda", dtype=dm_dtype)
        return *backward(config, kernels.Dora(dm, y, gain, norm, bias, 0.25)), dm

    dx, dA, dB, dm = expected = with_dm(config)
    plain = backward(config, None)
    assert torch.equal(dx, plain[0]) and torch.equal(dA, plain[1])
    exact_dB = gain.double()[:, None] * (i.dy.double().t() @ s.double())
    assert relative_error(dB, exact_dB) <= 1.5 * max(relative_error(plain[2], exact_dB / gain[:, None]), 1e-7)
    u = (y.double() - (0 if bias is None else bias.double())) / gain.double()
    exact_dm, small = (i.dy.double() * u).sum(0) / norm.double(), gain.abs() < 0.25
    assert relative_error(dm[~small], exact_dm[~small]) <= (1e-6 if dm_dtype is FP32 else torch.finfo(dm_dtype).eps)
    assert small.any() and (dm[small] == 7).all()
    for programs, clusters in ((132, 1), (130, 65), (64, 3), (2, 1)):
        again = with_dm(dataclasses.replace(config, programs=programs, shrink_clusters=clusters))
        assert all(torch.equal(a, b) for a, b in zip(again, expected)), (programs, clusters)


@pytest.mark.parametrize("block_n", [256, 128])
@pytest.mark.parametrize(
    "case", [case for case in CASES if (case.dropout_p or case.precise) and case.K >= 512], ids=str
)
def test_slices_before_the_tiles(case: Case, block_n: int) -> None:
    """The bits of y and S depend on how S is cut, not on who sums a slice."""
    if block_n == 128 and case.r > MAX_RANK_NARROW:
        pytest.skip("no room for such ranks")
    i = case.inputs()
    config = dataclasses.replace(WIDE, block_n=block_n, slices=4)
    settings: dict[str, Any] = {"scaling": i.scaling, "save_s": True}
    settings["adapter_dtype"] = FP32 if case.precise else case.dtype
    if case.dropout_p:
        settings |= {"seed": SEED, "dropout_p": i.dropout_p}

    def forward(config: CudaConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
        with poisoned_memory():
            return cuda.lora_forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, config=config, **settings)

    expected = forward(config)
    ratios = error_ratios({"y": expected[0]}, eager_answers(case, i), exact(i))
    assert ratios["y"] <= LUCK, ratios
    for programs, clusters in ((132, 66), (132, 5), (64, 32), (320, 160)):  # more blocks than there are SMs
        again = forward(dataclasses.replace(config, programs=programs, shrink_clusters=clusters))
        assert all(torch.equal(a, b) for a, b in zip(again, expected)), (programs, clusters)


@pytest.mark.parametrize(
    "case",
    [
        Case(1000, 2056, 520, 16),
        Case(1300, 4096, 1032, 5, FP16, bias=True),
        Case(700, 2304, 1536, 32),
        Case(520, 2304, 520, 32, fp32_adapters=True),
        Case(5000, 4096, 1024, 16),
        Case(700, 2304, 1536, 16, dropout_p=0.1),
        Case(1300, 4096, 1032, 5, FP16, bias=True, dropout_p=0.3),
        Case(520, 2304, 520, 32, fp32_adapters=True, dropout_p=0.1),
        Case(5000, 4096, 1024, 16, dropout_p=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_n, slices", [(256, 2), (256, 4), (256, 6), (128, 4)])
def test_slices_in_tiles(case: Case, block_n: int, slices: int) -> None:
    if case.N <= block_n * (slices - 1):
        pytest.skip("no column for each slice")
    if case.dropout_p and block_n == 128:
        pytest.skip("a mask beside narrow tiles is not taken")
    i = case.inputs()
    config = dataclasses.replace(WIDE, block_n=block_n, group=2, shrink_clusters=0, slices=slices, in_tiles=True)
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
    settings: dict[str, Any] = {"scaling": i.scaling, "adapter_dtype": case.dtype, "save_s": True}
    kept = i.x.double()
    if case.dropout_p:
        settings |= {"seed": SEED, "dropout_p": case.dropout_p}
        kept = kept * i.mask / (1 - case.dropout_p)
    expected = cuda.lora_forward(*tensors, config=config, **settings)
    ratios = error_ratios({"y": expected[0]}, eager_answers(case, i), exact(i))
    assert ratios["y"] <= LUCK, ratios
    exact_s = i.scaling * kept @ i.lora_A.double().t()
    assert relative_error(expected[1], exact_s) <= torch.finfo(case.dtype).eps
    # With more blocks than there are SMs some have not begun when others want their slices.
    for programs in (132, 132, 64, 24, 320):
        with poisoned_memory():
            again = cuda.lora_forward(*tensors, config=dataclasses.replace(config, programs=programs), **settings)
        assert all(torch.equal(a, b) for a, b in zip(again, expected)), programs


DECODE_CASES = [
    *(Case(M, 4096, 1024, 16) for M in (1, 2, 5, 8, 16, 17, 33, 64)),
    *(Case(M, 776, 520, r, FP16, bias=True) for M in (1, 9, 64) for r in (1, 3, 33, 64)),
    Case(7, 8, 8, 2),
    Case(64, 40, 72, 64, bias=True),
    Case(64, 4096, 14336, 33),
    Case(3, 14336, 4096, 16, FP16),
]
DECODE_SPLITS = [(64, 1), (64, 2), (64, 4), (64, 8), (128, 2), (128, 4), (128, 8)]


def decode(rows: int, split: int) -> CudaConfig:
    return dataclasses.replace(WIDE, decode_rows=rows, decode_split=split)


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decoding_has_no_more_error_than_the_eager_path_and_repeats(case: Case) -> None:
    i = case.inputs()
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
    eager, answer = eager_peft(*tensors, scaling=i.scaling), exact(i)
    exact_s = i.scaling * i.x.double() @ i.lora_A.double().t()
    for rows, split in DECODE_SPLITS:
        settings: dict[str, Any] = {"scaling": i.scaling, "adapter_dtype": case.dtype, "config": decode(rows, split)}
        with poisoned_memory():
            y, s = cuda.lora_forward(*tensors, save_s=True, **settings)
        ratio = error_ratios({"y": y}, {"y": eager}, answer)["y"]
        lucky = case.M * case.N < 4096 and relative_error(y, answer["y"]) <= 4 * torch.finfo(case.dtype).eps
        assert ratio <= LUCK or lucky, (rows, split, ratio)
        assert s is not None and relative_error(s, exact_s) <= torch.finfo(case.dtype).eps, (rows, split)
        for _ in range(3):
            with poisoned_memory():
                again, _ = cuda.lora_forward(*tensors, save_s=False, **settings)
            assert torch.equal(again, y), (rows, split)


def test_decoding_reads_rows_of_any_pitch_and_keeps_infinity_to_its_row() -> None:
    x = torch.randn(9, 1024, device="cuda", dtype=BF16)[:, :768]
    weight = torch.randn(264, 1000, device="cuda", dtype=BF16)[:, 8:776]
    lora_A, lora_B = (torch.randn(*shape, device="cuda", dtype=BF16) for shape in ((5, 768), (264, 5)))
    gain, bias = torch.rand(264, device="cuda") + 0.5, torch.randn(264, device="cuda")

    def y(x: torch.Tensor, config: CudaConfig | None) -> torch.Tensor:
        settings: dict[str, Any] = {"scaling": 0.1, "adapter_dtype": BF16, "save_s": False, "config": config}
        return cuda.lora_forward(x, weight, lora_A, lora_B, bias, gain=gain, **settings)[0]

    found = y(x, decode(64, 2))
    assert relative_error(found, y(x, None)) <= 4e-3
    x[1, 5] = float("inf")
    infinite = y(x, decode(64, 2))
    assert not infinite[1].isfinite().any()
    others = [m for m in range(9) if m != 1]
    assert torch.equal(infinite[others], found[others])


def test_decoding_is_replayed_by_a_graph() -> None:
    i = make_inputs(16, 4096, 4096, 16, BF16, device="cuda", bias=False)
    settings: dict[str, Any] = {"scaling": i.scaling, "adapter_dtype": BF16, "save_s": True, "config": decode(128, 4)}
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, None)
    cuda.lora_forward(*tensors, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, s = cuda.lora_forward(*tensors, **settings)
    for _ in range(20):
        i.x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        want, want_s = cuda.lora_forward(*tensors, **settings)
        assert torch.equal(y, want) and s is not None and want_s is not None and torch.equal(s, want_s)


@pytest.mark.parametrize("need", range(1, 8), ids=lambda n: f"dx{n & 1}-dA{n >> 1 & 1}-dB{n >> 2}")
@pytest.mark.parametrize(
    "M, r, dropout_p, precise",
    [
        *((300, 16, 0.0, 0), (300, 16, 0.3, 0), (5000, 16, 0.0, 0), (300, 16, 0.0, 1)),
        *((300, 128, 0.0, 0), (300, 128, 0.3, 0), (5000, 256, 0.0, 0), (300, 256, 0.3, 0)),
    ],
)
@pytest.mark.parametrize("db_with_t", [False, True])
def test_only_the_needed_gradients(need: int, M: int, r: int, dropout_p: float, precise: int, db_with_t: bool) -> None:
    """dB comes with T where T is wanted for another, the same bits whichever; elsewhere by itself."""
    if db_with_t and (r != 16 or precise):
        pytest.skip("dB never comes with T")
    i = Case(M, 512, 520, r, dropout_p=dropout_p, precise=bool(precise)).inputs()
    config = dataclasses.replace(WIDE, db_with_t=True) if db_with_t else None
    by_itself = WIDE if db_with_t else None
    whole = launch_both(i, by_itself if need == 4 else config, precise=bool(precise))
    wanted = dict(zip(("dx", "dA", "dB"), (bool(need & 1), bool(need & 2), bool(need & 4))))
    settings: dict[str, Any] = {"scaling": i.scaling, "adapter_dtype": FP32 if precise else BF16, "config": config}
    if dropout_p:
        settings |= {"seed": SEED, "dropout_p": dropout_p}
    _, s = cuda.lora_forward(i.x, i.weight, i.lora_A, i.lora_B, None, save_s=True, **settings)
    needs = {f"need_{name}": value for name, value in wanted.items()}
    with poisoned_memory():
        grads = cuda.lora_backward(
            i.dy,
            i.x if wanted["dA"] else None,
            i.weight,
            i.lora_A,
            i.lora_B,
            s if wanted["dB"] else None,
            **needs,
            **settings,
        )
    for (name, is_wanted), grad in zip(wanted.items(), grads):
        assert (grad is not None) == is_wanted
        assert grad is None or torch.equal(grad, whole[name]), name


@pytest.mark.parametrize("layout", ["sliced-columns", "misaligned", "transposed", "stride-0"])
def test_layouts_a_tensor_map_cannot_read(layout: str) -> None:
    i = make_inputs(48, 64, 64, 16, BF16, device="cuda", bias=False)
    made = {
        "sliced-columns": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        "transposed": lambda t: t.t().contiguous().t(),
        "stride-0": lambda t: t[:1, :1].expand(t.shape),
    }[layout]
    odd = dataclasses.replace(i, x=made(i.x), dy=made(i.dy), lora_A=made(i.lora_A), lora_B=made(i.lora_B))
    plain = odd.map(lambda t: t.clone(memory_format=torch.contiguous_format))
    left, right = launch_both(odd), launch_both(plain)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_gain_multiplies_before_the_bias() -> None:
    i = make_inputs(300, 512, 520, 16, BF16, device="cuda", bias=True)
    gain = torch.rand(520, device="cuda") + 0.5
    y, _ = cuda.lora_forward(
        i.x, i.weight, i.lora_A, i.lora_B, i.bias, gain=gain, scaling=i.scaling, adapter_dtype=BF16, save_s=False
    )
    plain = exact(dataclasses.replace(i, bias=None))["y"]
    assert relative_error(y, plain * gain.double() + i.bias.double()) <= 4e-3


def test_words_are_zero_after_the_launches() -> None:
    for case in CASES[:6]:
        launch_both(case.inputs())
    slabs = device_memory(torch.device("cuda", 0)).slabs
    assert slabs and not any(words.any() for words in slabs)


def test_named_calls_take_it_and_repeat() -> None:
    i = make_inputs(600, 512, 768, 16, BF16, device="cuda")
    first = run(fusedlora.lora_linear, i, backend="cuda")
    assert backends.last_used == "cuda"
    for _ in range(20):
        with poisoned_memory():
            again = run(fusedlora.lora_linear, i, backend="cuda")
        assert all(torch.equal(again[name], first[name]) for name in first)
    told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, backend="cuda")
    assert told.backend == "cuda" and "block_n" in str(told)


@pytest.mark.parametrize("autocast", [None, FP16], ids=str)
@pytest.mark.parametrize("M, K", [(300, 512), (1100, 512), (700, 1032)])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32], ids=str)
def test_dora_goes_through_it(adapter_dtype: torch.dtype, M: int, K: int, autocast, monkeypatch) -> None:
    """dm comes with dB where M is above K and the adapter's products are 16-bit."""
    with_dm, plain = [], cuda.lora_backward

    def noted(*args: Any, dora: Any = None, **settings: Any) -> tuple[torch.Tensor | None, ...]:
        with_dm.append(dora is not None)
        return plain(*args, dora=dora, **settings)

    monkeypatch.setattr(cuda, "lora_backward", noted)
    i = make_inputs(M, K, 520, 16, BF16, adapter_dtype, device="cuda", bias=True)
    magnitude = torch.linalg.vector_norm(i.weight.float(), dim=1).to(adapter_dtype).requires_grad_()
    answers = {}
    for backend in ("cuda", "triton"):
        leaves = i.leaves()
        tensors = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, magnitude, leaves.bias)
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            y = fusedlora.dora_linear(*tensors, scaling=i.scaling, backend=backend)
        assert backends.last_used == backend
        wanted = (leaves.x, leaves.lora_A, leaves.lora_B, magnitude)
        grads = torch.autograd.grad(y, wanted, i.dy.to(y.dtype))
        assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in wanted]
        answers[backend] = [y.detach(), *grads]
    assert all(relative_error(a, b) <= 8e-3 for a, b in zip(answers["cuda"], answers["triton"]))
    precise = adapter_dtype is FP32 and autocast is None
    assert with_dm == ([M > K] if not precise else [False] * len(with_dm)) and with_dm


def test_a_seed_on_the_device_is_the_same_seed() -> None:
    i = make_inputs(300, 512, 520, 16, BF16, device="cuda")
    seed = torch.tensor([2**62 + (5 << 32) + 7])
    answers = []
    for given in (seed, seed.cuda()):
        shared = {"scaling": i.scaling, "seed": given, "dropout_p": 0.3, "adapter_dtype": BF16}
        y, s = cuda.lora_forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, save_s=True, **shared)
        needs = {"need_dx": True, "need_dA": True, "need_dB": True}
        answers.append([y, s, *cuda.lora_backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, **shared, **needs)])
    assert all(torch.equal(a, b) for a, b in zip(*answers))


def test_a_captured_call_drops_anew_at_each_replay() -> None:
    i = make_inputs(300, 512, 512, 16, BF16, device="cuda")
    tensors = (i.x, i.weight, i.lora_A, i.lora_B)
    fusedlora.lora_linear(*tensors, scaling=1.0, dropout_p=0.1, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fusedlora.lora_linear(*tensors, scaling=1.0, dropout_p=0.1, backend="cuda")
    assert backends.last_used == "cuda"
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)
    plain = fusedlora.lora_linear(*tensors, scaling=1.0, backend="cuda")
    assert 0.01 < relative_error(y, plain) < 0.5


def test_threads_do_not_share_arguments() -> None:
    problems = [make_inputs(300 + 8 * n, 512, 512, 16, BF16, device="cuda", seed=n) for n in range(4)]
    expected = [run(fusedlora.lora_linear, i, backend="cuda") for i in problems]
    torch.cuda.synchronize()
    wrong = []

    def work(n: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                got = run(fusedlora.lora_linear, problems[n], backend="cuda")
                wrong.extend(name for name in got if not torch.equal(got[name], expected[n][name]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_two_streams_beside_a_kernel_that_holds_the_sms() -> None:
    problems = [make_inputs(1000, 512, 1024, 16, BF16, device="cuda", seed=n) for n in range(2)]
    expected = [launch_both(i) for i in problems]
    streams = [torch.cuda.Stream() for _ in range(3)]
    big = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    wrong = torch.zeros(2, device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    for n in range(100):
        if n % 10 == 0:
            with torch.cuda.stream(streams[2]):
                big @ big
        for i, want, stream, count in zip(problems, expected, streams, wrong):
            with torch.cuda.stream(stream):
                got = launch_both(i)
                for name in got:
                    count.add_((got[name] != want[name]).sum())
    torch.cuda.synchronize()
    assert not wrong.any()


def test_a_launch_costs_the_host_little() -> None:
    """Below 8 µs on a server of its own; here a bound that a shared machine keeps too."""
    i = make_inputs(64, 512, 512, 16, BF16, device="cuda", bias=False)
    plan = cuda.forward_plan(i.x, i.weight, i.lora_A, i.lora_B, None, seed=None, adapter_dtype=BF16, save_s=False)
    y = i.x.new_empty(64, 512)
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, None, None, None, y)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(50):
            plan.launch(tensors, 1.0, None, None)
        times.append((time.perf_counter() - begin) / 50 * 1e6)
    assert statistics.median(times) < 16, times
