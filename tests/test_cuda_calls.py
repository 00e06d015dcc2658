"""What the launchers hand to the CUDA library, with a recorder in the library's place, and which calls they take."""

import dataclasses
import functools
import itertools
import struct
from typing import Any

import pytest
import torch

from fusedlora import backends, cuda, dropout, explanation, why_not
from fusedlora.calls import Call, describe_call
from fusedlora.config import Problem, cdiv
from fusedlora.cuda_config import (
    FASTER,
    MAX_RANK,
    Calls,
    CudaConfig,
    cuda_config,
    decode_config,
    prefers_cuda,
    suits,
)
from fusedlora.testing import Inputs, make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = (*cuda.SETTINGS, *cuda.POINTERS, *cuda.NUMBERS)
SEED = torch.tensor([2**62 + 0x123456789ABCDEF])
CONFIG = CudaConfig(block_n=128, group=3, programs=10, shrink_clusters=2, parts=4)


class Recorder:
    """Decodes every launch as the library would read it."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.queries: list[dict[str, Any]] = []
        self.status = 0

    def _called(self, direction: str, arguments: bytes, sizes: Any) -> int:
        values = struct.unpack(f"={len(cuda.SETTINGS)}q{len(cuda.POINTERS)}Q2d3q", arguments)
        call = dict(zip(NAMES, values, strict=True)) | {"direction": direction}
        if sizes is None:
            self.launches.append(call)
            return self.status
        self.queries.append(call)
        sizes._obj[0], sizes._obj[1] = 5000, 77
        return 0

    def fusedlora_forward(self, arguments: bytes, sizes: Any) -> int:
        return self._called("forward", arguments, sizes)

    def fusedlora_backward(self, arguments: bytes, sizes: Any) -> int:
        return self._called("backward", arguments, sizes)

    def fusedlora_problem(self) -> bytes:
        return b"cudaLaunchKernelEx: error 1"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(cuda, "found", lambda: made)
    monkeypatch.setattr(cuda, "num_sms", lambda device: 132)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)  # as a CPU's index
    cuda._plan.cache_clear()
    yield made
    cuda._plan.cache_clear()


def forward(i: Inputs, **settings: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    settings = {"adapter_dtype": i.x.dtype, "save_s": True, "scaling": i.scaling} | settings
    return cuda.lora_forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, **settings)


def backward(i: Inputs, s: torch.Tensor | None, need: tuple[bool, bool, bool] = (True,) * 3, **settings: Any):
    needs = dict(zip(("need_dx", "need_dA", "need_dB"), need))
    settings = {"adapter_dtype": i.x.dtype, "scaling": i.scaling} | needs | settings
    return cuda.lora_backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, **settings)


def addresses(call: dict[str, Any], **tensors: torch.Tensor | None) -> None:
    """The call's pointers are those of `tensors`, and no others are there."""
    passing = {"workspace", "words", "stream"}
    expected = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
    assert {name: call[name] for name in cuda.POINTERS if call[name] and name not in passing} == {
        name: address for name, address in expected.items() if address
    }
    assert call["workspace"] % 16 == 0 and call["words"] % 16 == 0 and call["workspace"] and call["words"]


@pytest.mark.parametrize("save_s", [True, False])
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, BF16), (FP16, FP32)], ids=["bf16", "fp16-fp32"])
def test_forward(recorder: Recorder, dtype, adapter_dtype, save_s: bool) -> None:
    i = make_inputs(5, 64, 72, 3, dtype, adapter_dtype)
    gain = torch.ones(72)
    y, s = forward(i, gain=gain, seed=SEED, dropout_p=0.25, save_s=save_s, config=CONFIG)
    assert y.shape == (5, 72) and y.dtype is dtype
    assert (s is not None) == save_s and (s is None or (s.shape == (5, 3) and s.dtype is dtype))
    (call,) = recorder.launches
    addresses(call, x=i.x, w=i.weight, a=i.lora_A, b=i.lora_B, bias=i.bias, gain=gain, y=y, saved_s=s)
    expected = {"is_bf16": int(dtype is BF16), "param_is_float": int(adapter_dtype is FP32), "bias_is_float": 0}
    expected |= {
        "block_n": 128,
        "group": 3,
        "programs": 10,
        "shrink_clusters": 2,
        "slices": 1,
        "in_tiles": 0,
        "parts_a": 4,
        "parts_b": 4,
    }
    expected |= {"M": 5, "N": 72, "K": 64, "r": 3, "x_pitch": 64, "w_pitch": 64, "a_pitch": 64, "b_pitch": 3}
    expected |= {"has_seed": 1, "seed": SEED.item(), "bound": dropout.threshold(0.25), "scaling": i.scaling / 0.75}
    assert {name: call[name] for name in expected} == expected and call["direction"] == "forward"


def test_fp32_adapters_go_as_three_terms_outside_autocast_and_as_one_inside(recorder: Recorder) -> None:
    i = make_inputs(5, 64, 72, 3, BF16, FP32)
    for adapter_dtype, terms in ((FP32, 3), (BF16, 1), (FP32, 3)):
        _, s = forward(i, adapter_dtype=adapter_dtype)
        assert s is not None and s.dtype is adapter_dtype
        backward(i, s, adapter_dtype=adapter_dtype)
        assert [(call["terms"], call["param_is_float"]) for call in recorder.launches[-2:]] == [(terms, 1)] * 2


def test_above_the_highest_rate_of_dropout_the_kernels_refuse(hopper) -> None:
    i = make_inputs(5, 64, 72, 3, BF16)
    kinds = {}
    for p in (dropout.MAX_P, 0.97):
        drawn = dropout.draw(i.x, p, "triton")
        call = describe_call("cuda", i.x, i.weight, i.lora_A, i.lora_B, drawn, None, BF16)
        kinds[p] = backends.CUDA.why_not(call._replace(device=torch.device("cuda", 0), weight_layout=(64, 1, 0)))
    assert kinds[dropout.MAX_P] is None and "it does above a rate of 0.96" in (kinds[0.97] or "taken")


@pytest.mark.parametrize("need", range(1, 8), ids=lambda n: f"dx{n & 1}-dA{n >> 1 & 1}-dB{n >> 2}")
def test_backward(recorder: Recorder, need: int) -> None:
    i = make_inputs(5, 64, 72, 3, BF16, FP32)
    s = torch.ones(5, 3, dtype=BF16)
    wanted = bool(need & 1), bool(need & 2), bool(need & 4)
    grads = backward(i, s, wanted)
    assert tuple(grad is not None for grad in grads) == wanted
    shapes = ((5, 64), BF16), ((3, 64), FP32), ((72, 3), FP32)
    assert all(grad is None or (grad.shape, grad.dtype) == shape for grad, shape in zip(grads, shapes))
    (call,) = recorder.launches
    given = {"dy": i.dy, "x": i.x if wanted[1] else i.dy, "w": i.weight, "a": i.lora_A, "b": i.lora_B}
    addresses(call, **given, s=s if wanted[2] else None, dx=grads[0], da=grads[1], db=grads[2])
    expected = {"dy_pitch": 72, "has_seed": 0, "seed": 0, "scaling": i.scaling, "M": 5, "N": 72, "K": 64, "r": 3}
    assert {name: call[name] for name in expected} == expected and call["direction"] == "backward"
    (query,) = recorder.queries
    assert all(bool(query[name]) == bool(call[name]) for name in cuda.POINTERS[:-3])


def test_backward_with_dm(recorder: Recorder) -> None:
    kernels = pytest.importorskip("fusedlora.kernels.backward", exc_type=ImportError)
    i = make_inputs(5, 64, 72, 16, BF16)
    s, y, gain, norm = torch.ones(5, 16, dtype=BF16), torch.ones(5, 72, dtype=BF16), torch.ones(72), torch.ones(72)
    for dm, bias in ((torch.ones(72), None), (torch.ones(72, dtype=BF16), torch.ones(72))):
        dx, dA, dB = backward(i, s, dora=kernels.Dora(dm, y, gain, norm, bias, 0.5))
        given = {"dy": i.dy, "x": i.x, "w": i.weight, "a": i.lora_A, "b": i.lora_B, "s": s, "y": y, "bias": bias}
        addresses(recorder.launches[-1], **given, gain=gain, norm=norm, dx=dx, da=dA, db=dB, dm=dm)
    flags = ("dm_is_float", "bias_is_float", "least")
    assert [tuple(call[name] for name in flags) for call in recorder.launches] == [(1, 0, 0.5), (0, 1, 0.5)]
    problem = Problem(8192, 4096, 4096, 16, 2, False, 90, 132)
    assert cuda_config(problem, False).db_with_t and not cuda_config(problem, False, dora=True).db_with_t


def test_what_is_told_of_a_backward_with_dm(hopper, monkeypatch) -> None:
    """The configurations that are launched: not those of a backward without, where dB may come with T."""
    launch = pytest.importorskip("fusedlora.kernels.launch", exc_type=ImportError)
    monkeypatch.setattr(launch, "device_facts", lambda device: (90, 132))
    monkeypatch.setattr(explanation, "takes_one_launch", lambda device: True)
    shapes = (8192, 4096), (4096, 4096), (16, 4096), (4096, 16)
    x, weight, lora_A, lora_B = (torch.empty(*shape, dtype=BF16, device="meta") for shape in shapes)
    told, triton = {}, {}
    for plain in (True, False):
        call = describe_call("cuda", x, weight, lora_A, lora_B, None, None, BF16, plain=plain)
        told[plain], triton[plain] = (explanation._CONFIGS[name](x, call)[2] for name in ("cuda", "triton"))
    problem = Problem(8192, 4096, 4096, 16, 2, False, 90, 132)
    assert told[True] == f"(heuristic) {cuda_config(problem, False)}"
    assert told[False] == f"(heuristic) {cuda_config(problem, False, dora=True)}" != told[True]
    assert "FUSE_DB=True" in triton[True] and "FUSE_DB=False" in triton[False]


def test_a_plan_serves_the_calls_of_a_kind(recorder: Recorder) -> None:
    i, j = (make_inputs(5, 64, 72, 3, BF16, seed=seed) for seed in range(2))
    forward(i), forward(j, scaling=3.0), forward(i, seed=SEED, dropout_p=0.5), forward(i, save_s=False)
    assert len(recorder.launches) == 4 and len(recorder.queries) == 3
    assert recorder.launches[1]["x"] == j.x.data_ptr() and recorder.launches[1]["scaling"] == 3.0


def test_a_table_gives_the_configuration_where_it_was_measured(recorder: Recorder, monkeypatch) -> None:
    """Of all outputs, with the precision and dropout of the call; never over one that the caller gives."""
    asked = []

    def choose(kernel: str, problem: Problem, device: torch.device, tuned: bool) -> tuple[CudaConfig, str]:
        asked.append((kernel, problem, tuned))
        return CONFIG, "measured"

    monkeypatch.setattr(cuda.tuning, "choose", choose)
    i = make_inputs(5, 64, 72, 3, BF16, FP32)
    _, s = forward(i, adapter_dtype=FP32, seed=SEED, dropout_p=0.5)
    backward(i, s, adapter_dtype=FP32)
    about = (3, 2, True, 90, 132)
    assert asked == [
        ("cuda_forward", Problem(5, 72, 64, *about, True), True),
        ("cuda_backward", Problem(5, 64, 72, *about, False), True),
    ]
    assert [(call["group"], call["parts_a"]) for call in recorder.launches] == [(3, 4)] * 2
    torch.use_deterministic_algorithms(True)
    try:
        forward(i, adapter_dtype=FP32, seed=SEED, dropout_p=0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [tuned for *_, tuned in asked] == [True, True, False]
    for need in itertools.product((False, True), repeat=3):
        if need not in ((False,) * 3, (True,) * 3):
            backward(i, s, need, adapter_dtype=FP32)
    forward(i, config=dataclasses.replace(CONFIG, group=5))
    assert len(asked) == 3 and recorder.launches[-1]["group"] == 5


def test_any_address_of_the_adapters(recorder: Recorder) -> None:
    """How much workspace is needed depends on whether they can be read in place: another plan, asked for as it is."""
    i = make_inputs(5, 64, 72, 16, BF16)
    moved = torch.cat([i.lora_A.new_zeros(1), i.lora_A.flatten()])[1:].view(16, 64)
    forward(i), forward(dataclasses.replace(i, lora_A=moved))
    assert [query["a"] % 16 for query in recorder.queries] == [0, moved.data_ptr() % 16] and moved.data_ptr() % 16


def test_db_comes_with_t_where_t_is_wanted_and_s_is_read_as_it_lies(recorder: Recorder) -> None:
    config = dataclasses.replace(CONFIG, block_n=256, db_with_t=True)

    def asked(r: int, need: tuple[bool, bool, bool] = (True,) * 3, moved: bool = False, **settings: Any) -> int:
        precise = settings.get("adapter_dtype") is FP32
        i = make_inputs(5, 64, 72, r, BF16, FP32 if precise else BF16)
        s = torch.ones(5 * r + 1, dtype=FP32 if precise else BF16)[int(moved) :][: 5 * r].view(5, r)
        backward(i, s, need, config=config, **settings)
        return recorder.launches[-1]["db_with_t"]

    assert asked(16) == asked(8) == asked(16, (True, False, True)) == asked(16, (False, True, True)) == 1
    assert asked(16, (False, False, True)) == asked(16, (True, True, False)) == 0
    assert asked(16, moved=True) == asked(12) == asked(32) == asked(16, adapter_dtype=FP32) == 0


def test_rows_that_a_tensor_map_cannot_read_are_copied(recorder: Recorder) -> None:
    i = make_inputs(5, 64, 72, 3, BF16)
    bias = torch.stack([i.bias, i.bias], 1)[:, 0]
    forward(dataclasses.replace(i, x=i.x.t().contiguous().t(), bias=bias))
    backward(dataclasses.replace(i, dy=i.dy[:, :1].expand(5, 72)), torch.ones(5, 3, dtype=BF16))
    up, down = recorder.launches
    assert up["x"] not in (0, i.x.data_ptr()) and up["x_pitch"] == 64 and up["bias"] != bias.data_ptr()
    assert down["dy"] not in (0, i.dy.data_ptr()) and down["dy_pitch"] == 72
    sliced = torch.zeros(5, 128, dtype=BF16)[:, :64]
    forward(dataclasses.replace(i, x=sliced))
    assert recorder.launches[-1]["x"] == sliced.data_ptr() and recorder.launches[-1]["x_pitch"] == 128


def test_one_row_of_any_stride(recorder: Recorder) -> None:
    i = make_inputs(1, 64, 72, 1, BF16)
    i = dataclasses.replace(i, x=i.x.as_strided((1, 64), (3, 1)), lora_A=i.lora_A.as_strided((1, 64), (3, 1)))
    forward(i)
    backward(dataclasses.replace(i, dy=i.dy.as_strided((1, 72), (1, 1))), torch.ones(1, 1, dtype=BF16))
    up, down = recorder.launches
    assert up["x_pitch"] == up["a_pitch"] == down["x_pitch"] == down["a_pitch"] == 64 and down["dy_pitch"] == 72


def test_plans_look_for_the_library_once(monkeypatch) -> None:
    recorder, looked = Recorder(), []
    monkeypatch.setattr(cuda, "found", functools.cache(cuda.found.__wrapped__))
    monkeypatch.setattr(cuda, "find_library", lambda: looked.append(1) or "a path")
    monkeypatch.setattr(cuda, "library", lambda path: recorder)
    for direction in ("forward", "backward"):
        cuda.CudaPlan(direction, torch.device("cpu"), {}, [0] * 15)
    assert len(recorder.queries) == 2 and len(looked) == 1


DECODE = dataclasses.replace(CONFIG, decode_rows=128, decode_split=4)


def test_the_decode_kernel_is_asked_for_by_configuration(recorder: Recorder) -> None:
    i = make_inputs(64, 64, 72, 3, BF16)
    for config in (DECODE, dataclasses.replace(DECODE, decode_early=False), CONFIG, None):
        forward(i, config=config)
    forward(make_inputs(65, 64, 72, 3, BF16))
    found = [(call["decode_rows"], call["decode_split"], call["decode_early"]) for call in recorder.launches]
    assert found == [(128, 4, 1), (128, 4, 0), (0, 0, 0), (64, 1, 0), (0, 0, 0)]


def test_calls_that_the_decode_kernel_leaves_to_the_other(recorder: Recorder) -> None:
    i = make_inputs(64, 64, 72, 3, BF16)
    moved = torch.cat([i.lora_A.new_zeros(1), i.lora_A.flatten()])[1:].view(3, 64)
    assert moved.data_ptr() % 16
    forward(make_inputs(65, 64, 72, 3, BF16), config=DECODE)
    forward(make_inputs(64, 64, 72, 3, BF16, FP32), config=DECODE)
    forward(dataclasses.replace(i, lora_A=moved), config=DECODE)
    forward(i, seed=SEED, dropout_p=0.25, config=DECODE)
    backward(i, torch.ones(64, 3, dtype=BF16), config=DECODE)
    assert [(call["decode_rows"], call["block_n"]) for call in recorder.launches] == [(0, 128)] * 5


@pytest.mark.parametrize(
    "out, depth, expected, early",
    [
        (4096, 4096, (64, 2), True),  # 128 blocks
        (14336, 4096, (128, 2), False),  # 224: two on some SMs
        (4096, 14336, (64, 2), False),
        (1024, 4096, (64, 4), True),
        (1024, 512, (64, 2), True),  # not below 256 of depth
        (520, 776, (64, 2), True),
        (8, 8, (64, 1), True),
        (128256, 4096, (128, 2), False),
        (128256, 256, (64, 1), False),
    ],
)
def test_decode_configurations(out: int, depth: int, expected: tuple[int, int], early: bool) -> None:
    assert decode_config(Problem(1, out, depth, 16, 2, False, 90, 132)) == (*expected, early)
    assert decode_config(Problem(64, out, depth, 16, 2, False, 90, 132)) == (*expected, False)


def test_no_rows(recorder: Recorder) -> None:
    i = make_inputs(0, 64, 72, 3, BF16)
    y, s = forward(i)
    dx, dA, dB = backward(i, s)
    assert y.shape == (0, 72) and dx.shape == (0, 64) and not dA.any() and not dB.any()
    assert recorder.launches == []


def test_a_refused_launch_raises(recorder: Recorder) -> None:
    recorder.status = 1
    with pytest.raises(RuntimeError, match="CUDA kernels could not be launched: cudaLaunchKernelEx: error 1"):
        forward(make_inputs(5, 64, 72, 3, BF16))


@pytest.mark.parametrize("M", [1, 63, 500, 512, 2048, 8192])
@pytest.mark.parametrize("out, depth", [(4096, 4096), (14336, 4096), (4096, 14336), (64, 64)])
@pytest.mark.parametrize("tiles", [True, False])
def test_configurations(M: int, out: int, depth: int, tiles: bool) -> None:
    config = cuda_config(Problem(M, out, depth, 16, 2, False, 90, 133), False, tiles=tiles)
    assert config.block_n in (128, 256) and config.programs == 132
    pairs = -(-M // 256)
    assert 1 <= config.shrink_clusters <= min(pairs, 66)
    if tiles:
        several = {(2048, 4096, 4096): 4, (2048, 4096, 14336): 4, (8192, 4096, 4096): 4, (8192, 4096, 14336): 5}
        several |= {(2048, 64, 64): 2, (8192, 64, 64): 4}
    else:
        several = {(2048, 64, 64): 3, (8192, 64, 64): 8, (8192, 4096, 4096): 3, (8192, 14336, 4096): 2}
    assert config.parts == several.get((M, out, depth), 1)
    assert config.first_job in (0, config.shrink_clusters)
    assert not config.db_with_t or (tiles and config.block_n == 256 and depth >= 4096)
    if config.block_n == 128:
        assert pairs * -(-out // 256) < 4 * 66, "of many turns of tiles the last one counts little"


def test_what_is_chosen_is_what_was_measured_fastest() -> None:
    """On an H200, backwards of 1 to 6 parts, dB with T and without; within two percent of the fastest."""

    def chosen(M: int, out: int, depth: int, r: int = 16, drops: bool = False) -> tuple[int, int, bool]:
        config = cuda_config(Problem(M, out, depth, r, 2, False, 90, 132, drops), False)
        return config.shrink_clusters, config.parts, config.db_with_t

    assert [chosen(M, 4096, 4096) for M in (2048, 4096, 8192)] == [(4, 4, True), (8, 4, True), (16, 4, True)]
    assert [chosen(M, 4096, 4096) for M in (512, 1024)] == [(2, 1, False), (2, 1, False)]
    assert chosen(8192, 14336, 4096) == (16, 1, True) and chosen(8192, 4096, 2048) == (16, 4, True)
    assert chosen(8192, 8192, 2048) == (16, 2, True)
    assert chosen(8192, 4096, 1024) == (16, 3, False), "of few columns dB takes little, and with T that comes late"
    assert chosen(8192, 4096, 14336) == (16, 5, True) and chosen(2048, 4096, 14336) == (4, 4, True)
    assert chosen(2048, 14336, 4096) == (8, 1, False) and chosen(1024, 8192, 8192) == (2, 2, True)
    assert chosen(8192, 5120, 5120) == (16, 3, True) and chosen(8192, 8192, 8192) == (16, 5, True)
    assert chosen(8192, 4096, 4096, drops=True) == (16, 4, True), "a mask makes jobs longer"
    assert [chosen(8192, 4096, 4096, r) for r in (4, 8, 32, 64, 128)] == [
        *((16, 2, False), (16, 4, True)),
        *((16, 2, False), (16, 2, False), (16, 2, False)),
    ]
    # dX [8192, 2048] of dy [8192, 8192]: eight clusters have a tile less, which is not enough for T. Sixteen others sum
    # some of it, and jobs begin with those that do not.
    config = cuda_config(Problem(8192, 2048, 8192, 16, 2, False, 90, 132), False)
    assert (config.shrink_clusters, config.parts, config.first_job) == (24, 1, 24)
    without_dx = cuda_config(Problem(8192, 4096, 4096, 16, 2, False, 90, 132), False, tiles=False)
    assert (without_dx.block_n, without_dx.shrink_clusters) == (256, 32), "one unit of T each"


def test_the_width_of_tiles_is_that_measured_faster() -> None:
    def width(M: int, out: int, depth: int, forward: bool = True) -> int:
        return cuda_config(Problem(M, out, depth, 16, 2, False, 90, 132), forward).block_n

    assert width(8192, 4096, 4096) == width(2048, 4096, 4096) == width(577, 4096, 5376) == 256
    assert width(512, 4096, 4096) == 128, "half of the SMs would have no tile"
    assert width(2048, 5120, 5120) == width(2048, 5120, 5120, False) == 128, "160 wide tiles on 66 clusters"
    assert cuda_config(Problem(1000, 4096, 4096, 256, 2, False, 90, 132), True).block_n == 256


def test_one_configuration_serves_all_rows_of_a_pair_of_row_blocks() -> None:
    found = {cuda_config(Problem(M, 4096, 4096, 16, 2, False, 90, 132), False) for M in range(1025, 1281)}
    assert len(found) == 1


def test_how_s_is_cut() -> None:
    """slices, whether they are in tiles, and how many clusters sum them otherwise."""

    def cut(
        M: int,
        out: int,
        r: int = 16,
        drops: bool = False,
        depth: int = 4096,
        precise: bool = False,
        forward: bool = True,
    ) -> tuple[int, bool, int]:
        config = cuda_config(Problem(M, out, depth, r, 2, precise, 90, 132, drops), forward)
        return config.slices, config.in_tiles, config.shrink_clusters

    assert cut(8192, 4096) == (1, False, 16), "512 tiles on 66 clusters: 16 have one less"
    assert cut(8192, 1024) == cut(4096, 1024) == cut(2048, 1024) == cut(8192, 1024, r=32) == (4, True, 0)
    assert cut(8192, 512) == (2, True, 0) and cut(8192, 256) == (2, True, 0) and cut(8192, 128) == (1, False, 32)
    assert cut(512, 1024) == (1, False, 2), "50 of 66 clusters have no tile"
    assert cut(8192, 1024, r=33) == cut(8192, 1024, r=64) == (1, False, 28), "sums that take long"
    assert cut(8192, 1024, depth=1024) == cut(8192, 1024, r=32, depth=2048) == (1, False, 28), "too few steps"
    assert cut(8192, 1280) == (1, False, 16) and cut(16384, 1280) == (4, True, 0), "2.4 turns of tiles, and 4.9"
    assert cut(8192, 1024, drops=True) == cut(8192, 2048, drops=True) == (4, True, 0)
    assert cut(2048, 1024, drops=True) == (8, False, 64), "a mask beside narrow tiles"
    assert cut(8192, 1024, drops=True, r=64) == cut(8192, 1024, precise=True) == (2, False, 64), "nearly all take some"
    assert cut(8192, 4096, drops=True) == (1, False, 16) and cut(8192, 4096, drops=True, r=64) == (2, False, 64)
    assert cut(8192, 1024, forward=False) == (1, False, 28), "the four that have a tile less have two units"
    assert cut(512, 4096, drops=True) == (16, False, 32) and cut(1024, 4096, drops=True) == (16, False, 64)
    assert cut(100, 4096, drops=True, depth=520) == (4, False, 4)
    assert cut(512, 4096, r=128, drops=True) == (16, False, 32)
    assert cut(8192, 3584, r=128) == (1, False, 18), "a unit of S takes long: the 14 with a tile less have no three"
    assert cut(8192, 3584, r=64) == (1, False, 14)
    assert cut(512, 4096, drops=True, forward=False) == (1, False, 2)


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
def test_tiles_that_sum_slices_of_the_same_rows_are_of_one_turn(drops: bool) -> None:
    """Or a tile would wait for a slice that comes a turn later."""
    found = 0
    for M, out in itertools.product(range(256, 33000, 1024), range(256, 2049, 256)):
        p = Problem(M, out, 4096, 16, 2, False, 90, 132, drops)
        config = cuda_config(p, True)
        if config.in_tiles:
            columns, clusters = cdiv(out, config.block_n), config.programs // 2
            found += 1
            assert suits(p, config) and config.group <= cdiv(M, 256)
            if cdiv(M, 256) * columns > clusters:
                assert clusters == config.group * columns, "a turn is whole groups"
    assert found > 50


GOOD = Call(True, torch.device("cuda", 0), BF16, BF16, BF16, 64, 128, 16, "seed", (128, 1, 0), "")
TAKEN = {
    "bf16": {},
    "fp16": {"dtype": FP16, "adapter_dtype": FP16, "param_dtype": FP16},
    "fp32 adapters under autocast": {"param_dtype": FP32},
    "fp32 adapters": {"adapter_dtype": FP32, "param_dtype": FP32},
    "r=1": {"r": 1},
    "r=256": {"r": MAX_RANK},
    "no dropout": {"dropout": ""},
    "captured dropout": {"dropout": "device seed"},
    "padded rows": {"weight_layout": (136, 1, 0)},
}
REFUSED = {
    "cpu": ({"device": torch.device("cpu")}, "x is on cpu, the kernels run on cuda"),
    "fp32": ({"dtype": FP32, "adapter_dtype": FP32}, "dtype is torch.float32, the kernels take bfloat16 and float16"),
    "fp32 adapters, r = 17": (
        {"adapter_dtype": FP32, "param_dtype": FP32, "r": 17},
        "lora_A is torch.float32 outside autocast and r is 17",
    ),
    "fp32 adapters beside fp16": ({"dtype": FP16, "adapter_dtype": FP32, "param_dtype": FP32}, "x is torch.float16"),
    "rank": ({"r": MAX_RANK + 1}, "r is 257, the kernels take up to 256 in torch.bfloat16"),
    "scale": ({"scale": True}, "scaling is a tensor, which is read on the device"),
    "a mask": ({"dropout": "mask"}, "dropout comes as a mask"),
    "K": ({"K": 132}, "in_features 132 of torch.bfloat16 is not a multiple of 16 bytes"),
    "N": ({"N": 60}, "out_features 60 of torch.bfloat16 is not a multiple of 16 bytes"),
    "unaligned weight": ({"weight_layout": (128, 1, 2)}, "starts 2 bytes past a multiple of 16"),
    "transposed weight": ({"weight_layout": (1, 64, 0)}, "weight has strides (1, 64)"),
}


@pytest.fixture
def hopper(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library too."""
    monkeypatch.setattr(cuda, "missing", lambda: None)


@pytest.mark.parametrize("changed", TAKEN.values(), ids=TAKEN)
def test_the_kernels_take(hopper, changed: dict[str, Any]) -> None:
    assert backends.CUDA.why_not(GOOD._replace(**changed)) is None


@pytest.mark.parametrize("changed, reason", REFUSED.values(), ids=REFUSED)
def test_the_kernels_do_not_take(hopper, changed: dict[str, Any], reason: str) -> None:
    assert reason in (backends.CUDA.why_not(GOOD._replace(**changed)) or "taken")


def test_other_machines(hopper, monkeypatch) -> None:
    for capability in ((8, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(why_not, "_capability", lambda device, found=capability: found)
        told = f"compute capability is {capability[0]}.{capability[1]}, the kernels are compiled for 9.0"
        assert backends.CUDA.why_not(GOOD) == told
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in (backends.CUDA.why_not(GOOD) or "taken")


def test_no_library(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cuda, "found", cuda.found.__wrapped__)
    monkeypatch.setattr(cuda, "find_library", lambda: None)
    assert cuda.missing() == "its kernels have not been built (python -m fusedlora build)"
    broken = tmp_path / "libfusedlora.so"
    broken.write_text("no library")
    monkeypatch.setattr(cuda, "find_library", lambda: broken)
    assert (cuda.missing() or "").startswith(f"{broken} cannot be loaded (")
    monkeypatch.setattr(why_not, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_chosen", {})
    with pytest.raises(RuntimeError, match="backend 'cuda' does not take this call: .*cannot be loaded"):
        backends.select("cuda", GOOD)


def test_auto_takes_them_only_where_measured(hopper, monkeypatch, recwarn) -> None:
    call = GOOD._replace(named=False)
    assert set(FASTER) == {"forward", "backward"}
    about = (10**9, call.N, call.K, call.r, True, False, False)
    assert not prefers_cuda("forward", *about), "of no such rows is anything known"
    asked = []
    monkeypatch.setattr(why_not, "prefers_cuda", lambda *about: asked.append(about))
    assert backends.select("auto", call) is backends.TRITON
    assert backends.CUDA.why_not(call) == "these kernels have not been measured faster here"
    asked.clear()
    monkeypatch.setattr(why_not, "prefers_cuda", lambda *about: asked.append(about) or True)
    monkeypatch.setattr(backends, "_chosen", {})
    assert backends.select("auto", call._replace(rows=512)) is backends.CUDA
    assert asked == [(direction, 512, 64, 128, 16, True, False, False) for direction in ("forward", "backward")]
    assert backends.select("auto", call._replace(scale=True)) is backends.TRITON
    assert not recwarn.list, "nobody is told of a choice between kernels"


def test_the_table_of_what_is_faster(monkeypatch) -> None:
    few = Calls(rows=(1, 64), K=(64, 4096), r=(1, 16), dropout=(False,), converts=(False,))
    monkeypatch.setitem(FASTER, "forward", (few, Calls(rows=(8192, 8192))))
    monkeypatch.setitem(FASTER, "backward", ())
    assert prefers_cuda("forward", 64, 64, 4096, 16, False, False, False)
    assert not prefers_cuda("forward", 8192, 64, 4096, 16, False, True, True), "another speed, to be named by itself"
    near_by = {"rows": 128, "K": 4104, "r": 17, "dropout": True, "converts": True}
    for changed in near_by.items():
        about = {"rows": 64, "N": 64, "K": 4096, "r": 16, "dropout": False, "converts": False, "precise": False}
        about |= dict([changed])
        assert not prefers_cuda("forward", **about), changed
        assert prefers_cuda("forward", **about | {"rows": 8192})
        assert not prefers_cuda("backward", **about | {"rows": 8192})


def test_narrow_forwards_are_csrcs_but_where_tritons_tiles_compute_s() -> None:
    for N, K, rows, r, drops in itertools.product(
        (256, 512, 1024), (1536, 3072, 4096, 8192), (1024, 2048, 4096, 8192, 32768), (16, 64), (False, True)
    ):
        few = rows < {256: 1 << 30, 512: 8192, 1024: 2048 if K > 3072 else 4096}[N] or (N == 512 and K < 2048)
        theirs = not drops and (few if r == 16 else rows < 2048)
        assert prefers_cuda("forward", rows, N, K, r, drops, False, False) is not theirs, (N, K, rows, r, drops)


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_recipe_makes_the_same_arguments(recorder: Recorder, monkeypatch, drops: bool, bias: bool) -> None:
    monkeypatch.setattr(cuda, "address", lambda function: 5)
    i = make_inputs(5, 64, 72, 3, BF16, bias=bias)
    seed, rate = (SEED, 0.25) if drops else (None, 0.0)
    numbers = dropout.launch_dropout(seed, rate, i.scaling)
    y, s = i.x.new_empty(5, 72), i.x.new_empty(5, 3)
    up = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, None, None, y, s)
    down = (i.dy, i.x, s, i.weight, i.lora_A, i.lora_B, None, i.x, i.lora_A, i.lora_B)
    names = ("x", "w", "a", "b", "bias", None, None, "y", "s"), ("dy", "x", "s", "w", "a", "b", None, "dx", "da", "db")
    common = {"seed": seed, "adapter_dtype": BF16}
    plans = (
        cuda.forward_plan(*up[:5], gain=None, save_s=True, **common),
        cuda.backward_plan(*down[:2], *down[3:6], s, needs=(True, True, True), **common),
    )
    for plan, tensors, named in zip(plans, (up, down), names):
        plan.launch(tensors, *numbers)
        call = dict(recorder.launches[-1])
        call.pop("direction")
        made = plan.recipe(named, numbers[2])
        assert (made.work_size, made.num_words, made.programs) == (5000, 77, 0)
        filled = list(struct.unpack(f"={len(NAMES)}Q", made.slots))
        given = {name: tensor.data_ptr() for name, tensor in zip(named, tensors) if name and tensor is not None}
        given |= {name: call[name] for name in ("workspace", "words", "stream")}
        given["scaling"] = int.from_bytes(struct.pack("d", numbers[0]), "little")
        given["seed"] = numbers[1]
        for slot, source, offset in made.holes:
            assert filled[slot] == 0, "a hole is empty"
            filled[slot] = given[source] + offset
        call["scaling"] = given["scaling"]
        assert dict(zip(NAMES, filled)) == call
