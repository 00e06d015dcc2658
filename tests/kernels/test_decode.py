"""The decode kernel, the forward's for few rows: on a GPU as compiled, elsewhere in Triton's interpreter."""

import dataclasses
import os
from collections.abc import Callable
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import fusedlora
from fusedlora import plans
from fusedlora.config import DecodeConfig
from fusedlora.kernels import decode, forward
from fusedlora.kernels.common import INTERPRET
from fusedlora.kernels.forward import lora_forward
from fusedlora.memory import device_memory
from fusedlora.testing import Inputs, eager_peft, error_ratios, exact, make_inputs, poisoned_memory, run

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)
DEVICE = "cpu" if INTERPRET else "cuda"
HALF = torch.float16 if INTERPRET else torch.bfloat16
FP32 = torch.float32
# Small tiles, so that small shapes have several column blocks and parts.
SMALL = {"BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3, "early": True}


@dataclasses.dataclass(frozen=True)
class Case:
    M: int
    K: int
    N: int
    r: int
    split: int
    dtype: torch.dtype = HALF
    adapter_dtype: torch.dtype | None = None
    autocast: bool = False
    bias: torch.dtype | None = None
    gain: bool = False
    scale: bool = False

    def __str__(self) -> str:
        words = [f"{self.M}x{self.K}x{self.N}r{self.r}-{self.split}parts", str(self.dtype).removeprefix("torch.")]
        words += ["fp32-adapters"] if self.adapter_dtype else []
        words += [name for name in ("autocast", "bias", "gain", "scale") if getattr(self, name)]
        return "-".join(words)


CASES = [
    Case(1, 64, 64, 16, 1),
    Case(1, 136, 72, 1, 2),
    Case(2, 40, 8, 5, 1, bias=HALF),
    Case(16, 256, 64, 16, 4, bias=FP32),
    Case(17, 264, 104, 24, 4, gain=True),
    Case(33, 160, 40, 33, 2, bias=HALF, gain=True),
    Case(64, 96, 96, 64, 2),
    Case(5, 72, 64, 128, 2, scale=True),
    Case(3, 96, 40, 256, 2),
    Case(7, 32, 64, 8, 4),  # more parts than steps
    Case(30, 136, 72, 16, 2, dtype=torch.float16, scale=True),
    Case(9, 136, 72, 16, 2, adapter_dtype=FP32, bias=HALF),
    Case(40, 64, 40, 20, 1, adapter_dtype=FP32),
    Case(9, 136, 72, 3, 2, adapter_dtype=FP32, autocast=True),
    Case(20, 68, 36, 5, 2, dtype=FP32, bias=FP32),
]


def inputs(case: Case) -> Inputs:
    i = make_inputs(case.M, case.K, case.N, case.r, case.dtype, case.adapter_dtype, DEVICE, bias=bool(case.bias))
    return i if case.bias is None else dataclasses.replace(i, bias=i.bias.to(case.bias))


def settings(case: Case, i: Inputs) -> dict:
    keep = case.adapter_dtype is not None and not case.autocast
    made = {"scaling": i.scaling, "adapter_dtype": FP32 if keep else case.dtype}
    if case.scale:
        made |= {"scaling": 1.0, "scale": torch.tensor(i.scaling, device=DEVICE, dtype=FP32)}
    if case.gain:
        made["gain"] = torch.linspace(0.5, 1.5, case.N, device=DEVICE)
    return made


def launch(case: Case, i: Inputs, save_s: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and S; every buffer that the launcher allocates starts as NaN."""
    config = DecodeConfig(**SMALL, SPLIT=case.split)
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
    with poisoned_memory():
        return lora_forward(*tensors, save_s=save_s, config=config, **settings(case, i))


def answers(case: Case, i: Inputs, linear: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """y and S by PyTorch's own operations, y's bias added after the gain."""
    with torch.autocast(DEVICE, dtype=case.dtype, enabled=case.autocast and i.x.dtype is case.dtype):
        y = linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=i.scaling)
        s = torch.nn.functional.linear(i.x.to(i.lora_A.dtype), i.lora_A) * i.scaling
    if case.gain:
        y = y * torch.linspace(0.5, 1.5, case.N, device=DEVICE).to(y.dtype)
    return {"y": y if i.bias is None else y + i.bias.to(y.dtype), "S": s}


@pytest.fixture(autouse=True)
def _precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_not_above_the_eager_path(case: Case) -> None:
    i = inputs(case)
    y, s = launch(case, i)
    if case.dtype is FP32:
        torch.set_float32_matmul_precision("high")  # where the kernels take fp32 at all
    ratios = error_ratios({"y": y, "S": s}, answers(case, i, eager_peft), answers(case, i.double(), eager_peft))
    # fp16 stands in for bf16 in the interpreter; its exponent range drops the last of the terms of fp32 adapters.
    split = case.adapter_dtype is not None and not case.autocast
    assert max(ratios.values()) <= (2.0 if split else 1.02), ratios


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_y_is_the_same_where_s_is_not_saved(case: Case) -> None:
    i = inputs(case)
    y, s = launch(case, i, save_s=False)
    assert s is None and torch.equal(y, launch(case, i)[0])


def test_words_are_zero_after_a_launch() -> None:
    case = Case(16, 256, 200, 16, 4)
    i = inputs(case)
    launch(case, i)
    assert not any(words.any() for words in device_memory(i.x.device).slabs)


def test_an_infinite_x_spoils_its_own_row_alone() -> None:
    case = Case(4, 96, 64, 5, 1)
    i = inputs(case)
    expected = launch(case, i)[0]
    i.x[2, 7] = float("inf")
    got = launch(case, i)[0]
    assert not got[2].isfinite().any()
    assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.gpu
@pytest.mark.parametrize("M, K, N", [(1, 4096, 4096), (16, 4096, 1032), (64, 2056, 4096)])
def test_replays_beside_eager_calls(M: int, K: int, N: int) -> None:
    """Launches that follow one another, and may begin early, in a graph and on another stream, give the same bits."""
    i = make_inputs(M, K, N, 16, HALF, device=DEVICE)

    def call() -> tuple[torch.Tensor, torch.Tensor | None]:
        tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
        return lora_forward(*tensors, scaling=i.scaling, adapter_dtype=HALF, save_s=True)

    expected, stream, graph = call(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [call() for _ in range(8)]
    wrong = torch.zeros((), device=DEVICE, dtype=torch.int64)
    for _ in range(100):
        for pair in outputs:
            for t in pair:
                t.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        beside = [call() for _ in range(8)]
        torch.cuda.synchronize()
        for pair in (*outputs, *beside):
            for a, b in zip(pair, expected):
                wrong += (a != b).sum()
    assert wrong.item() == 0
    assert not any(words.any() for words in device_memory(i.x.device).slabs)


class TestChoice:
    """Which kernel a call takes that names none."""

    def kernel(self, M: int, r: int, dropout_p: float = 0.0, adapter_dtype: torch.dtype = HALF) -> str:
        taken = []

        class Recorder(forward.Launcher):
            def __call__(self, memory, arguments) -> None:
                taken.append(self.kernel.__name__)

        i = make_inputs(M, 512, 72, r, HALF, adapter_dtype, DEVICE, bias=True)
        with (
            mock.patch.object(forward, "Launcher", Recorder),
            mock.patch.object(decode, "Launcher", Recorder),
            mock.patch.object(forward, "_plan", forward._plan.__wrapped__),
            mock.patch.object(plans, "_plans", {}),
        ):
            tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
            fusedlora.lora_linear(*tensors, scaling=0.5, dropout_p=dropout_p, backend="triton")
            self.told = fusedlora.explain(*tensors, dropout_p=dropout_p, backend="triton")
        (name,) = taken
        return name

    @pytest.mark.parametrize("M, r", [(1, 1), (16, 16), (64, 64)])
    def test_few_rows(self, M: int, r: int) -> None:
        assert self.kernel(M, r) == "decode_kernel"
        assert "forward (heuristic) DecodeConfig(BLOCK_N" in str(self.told)

    @pytest.mark.parametrize("kind", [{"M": 65}, {"r": 65}, {"dropout_p": 0.1}], ids=str)
    def test_all_else_is_the_tile_kernels(self, kind: dict) -> None:
        assert self.kernel(**{"M": 16, "r": 16} | kind) == "forward_kernel"
        assert "ForwardConfig(BLOCK_M" in str(self.told)

    def test_the_layer_gives_the_same_numbers_with_and_without_gradients(self) -> None:
        i = make_inputs(6, 512, 72, 4, HALF, device=DEVICE).leaves()
        tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
        y = fusedlora.lora_linear(*tensors, scaling=i.scaling, backend="triton")
        grads = torch.autograd.grad(y, (i.x, i.lora_A, i.lora_B), i.dy)
        with torch.no_grad():
            assert torch.equal(y, fusedlora.lora_linear(*tensors, scaling=i.scaling, backend="triton"))
        ratios = error_ratios({"y": y, "dB": grads[2]}, run(eager_peft, i), exact(i))
        assert max(ratios.values()) <= 1.02, ratios
