"""torch.compile over layers: one graph, any batch, eager gradients, fusion around the ops, and opcheck of every op."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import fusedlora
from fusedlora import FusedLoRALinear, backends, dora_ops, node, ops
from fusedlora.testing import exact, make_inputs, relative_error, run

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
K, N, R = 64, 96, 8
P = 0.3

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "no bias": {"bias": False},
    "dropout": {"lora_dropout": P},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "fp32 adapters": {"dtype": BF16, "adapter_dtype": FP32},
    "DoRA, fp32 adapters": {"use_dora": True, "dtype": BF16, "adapter_dtype": FP32},
    "scaling in a tensor": {},
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_layer(variant: str, device: torch.device) -> FusedLoRALinear:
    """In fp32 on a CPU, in bf16 by the kernels on a GPU."""
    dtype = BF16 if device.type == "cuda" else FP32
    options = {"dtype": dtype, "r": R, "lora_alpha": 6, "device": device} | VARIANTS[variant]
    layer = FusedLoRALinear(K, N, **({"adapter_dtype": options["dtype"]} | options))
    for name, parameter in layer.adapter_parameters.items():
        if name in ("lora_B", "lora_bias"):
            nn.init.normal_(parameter, std=0.3)
    if device.type == "cuda":
        layer.backend = "triton"
    if variant == "scaling in a tensor":
        layer.scaling = torch.tensor(0.7, device=device)
    return layer


def rows(layer: FusedLoRALinear, M: int) -> Tensor:
    generator = torch.Generator().manual_seed(M)
    return torch.randn(M, K, generator=generator).to(layer.weight.device, layer.weight.dtype)


def through(call: Callable[[Tensor], Tensor], layer: FusedLoRALinear, x: Tensor) -> dict[str, Tensor]:
    """y and all gradients; the backend that ran is asserted."""
    expected = "triton" if x.is_cuda else "reference"
    leaves = {"x": x.detach().clone().requires_grad_()} | layer.adapter_parameters
    backends.last_used = None
    torch.manual_seed(3)
    y = call(leaves["x"])
    assert backends.last_used == expected
    backends.last_used = None
    grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    assert backends.last_used == expected
    return {"y": y.detach()} | dict(zip(leaves, grads))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph_with_eager_gradients(variant: str, device) -> None:
    layer = make_layer(variant, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = rows(layer, 40)
    got, want = through(compiled, layer, x), through(layer, layer, x)
    assert not counters["graph_break"]
    if variant == "dropout" and device.type == "cuda":
        return  # eager draws its seeds on the host, a graph on the device: see test_one_mask_for_output_and_gradients
    assert len(got) >= 4 and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_gradients(variant: str, device) -> None:
    layer = make_layer(variant, device).eval()
    x = rows(layer, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("marked", [True, False], ids=["marked dynamic", "found dynamic"])
def test_no_batch_compiles_anew(variant: str, marked: bool, device) -> None:
    """One graph where M is marked dynamic; without a mark one more, for the second size."""
    layer = make_layer(variant, device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)

    def call(x: Tensor) -> Tensor:
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    for M in (16, 24, 40, 7, 500):
        x = rows(layer, M)
        got, want = through(call, layer, x), through(layer, layer, x)
        if variant != "dropout":
            assert all(torch.equal(got[name], want[name]) for name in want), M
    assert counter.frame_count == (1 if marked else 2)
    assert not counters["graph_break"]


def test_the_function_serves_every_batch(device) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fusedlora.lora_linear, fullgraph=True, backend=counter)
    for M in (16, 24, 5, 500):
        i = make_inputs(M, 16, 24, 4, FP64, device=device, seed=M)
        for name, want in exact(i).items():
            assert relative_error(run(compiled, i)[name], want) < 1e-13, (M, name)
    assert counter.frame_count <= 2  # static, then dynamic in M


def test_a_node_that_is_loaded_later_compiles_nothing_anew(device, monkeypatch) -> None:
    layer = make_layer("plain", device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    monkeypatch.setattr(node, "run", None)
    compiled(rows(layer, 16))
    monkeypatch.setattr(node, "run", lambda *_: None)
    compiled(rows(layer, 16))
    assert counter.frame_count == 1


def test_scalings_at_run_time(device) -> None:
    """A tensor is read at each call; another number is another graph, and the right one."""
    layer = make_layer("scaling in a tensor", device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = rows(layer, 40)
    seen = []
    for value in (0.7, -1.5, 2.0):
        layer.scaling.fill_(value)
        got, want = through(compiled, layer, x), through(layer, layer, x)
        assert all(torch.equal(got[name], want[name]) for name in want)
        seen.append(got["y"])
    assert counter.frame_count == 1 and not torch.equal(seen[0], seen[1])
    for value in (0.5, 0.25):
        layer.scaling = value
        got, want = through(compiled, layer, x), through(layer, layer, x)
        assert all(torch.equal(got[name], want[name]) for name in want), value


def test_one_mask_for_output_and_gradients(device) -> None:
    """W = 0, A = B = 1: y is x under the mask, which can be read from it, and dx is dy under the same one."""
    dtype = BF16 if device.type == "cuda" else FP32
    options = {"r": 64, "lora_alpha": 64, "lora_dropout": P, "adapter_dtype": dtype}
    layer = FusedLoRALinear(64, 64, False, device, dtype, **options)
    layer.backend = "triton" if device.type == "cuda" else "auto"
    with torch.no_grad():
        layer.weight.zero_()
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.copy_(torch.eye(64))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    masks = []
    for _ in range(2):
        x = torch.ones(200, 64, device=device, dtype=dtype, requires_grad=True)
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        mask = y != 0
        kept = mask.to(dtype) / (1 - P)
        torch.testing.assert_close(y.detach(), kept, rtol=1e-2, atol=0)
        torch.testing.assert_close(dx, kept, rtol=1e-2, atol=0)
        assert abs(mask.double().mean() - (1 - P)) < 0.02  # five standard deviations
        masks.append(mask)
    assert not torch.equal(*masks)


GENERATED = re.compile(r"^((?:cpp|triton_\w+)_fused_\w+) = ", re.M)
OPS = re.compile(r"= torch\.ops\.fusedlora\.(\w+)\.default\(")


@pytest.mark.parametrize(
    "variant, forward, backward",
    [
        ("plain", ["forward"], ["backward"]),
        ("dropout", ["forward"], ["backward"]),
        ("DoRA", ["dora_gain", "forward"], ["dora_backward"]),
        ("lora_bias", ["forward"], ["backward"]),
    ],
)
def test_inductor_fuses_what_surrounds_the_ops(variant: str, forward, backward, device) -> None:
    """What is before and what is behind are a kernel each, and the ops stand between.

    The seed of a mask, or a mask, and what becomes of lora_bias may take one more.
    """
    layer = make_layer(variant, device)

    def block(x: Tensor) -> Tensor:
        return F.gelu(layer(x * 2 + 1)) * 3

    x = rows(layer, 40)
    compiled = torch.compile(block, fullgraph=True)
    got, codes = run_and_get_code(lambda: through(compiled, layer, x))
    more = variant in ("dropout", "lora_bias")
    assert [OPS.findall(code) for code in codes] == [forward, backward]
    for code in codes:
        assert 2 <= len(GENERATED.findall(code)) <= 2 + more, GENERATED.findall(code)
    if variant != "dropout":
        for name, want in through(block, layer, x).items():
            assert relative_error(got[name], want) < 4 * torch.finfo(want.dtype).eps, name


# the ops, through every check of opcheck: schema, fakes, dispatch, and gradients by AOTAutograd, static and dynamic


def arguments(device: torch.device, dropout_p: float = 0.0, **settings) -> dict[str, tuple]:
    """Of every op; the mask of a dropout is a seed on a GPU."""
    on_gpu = device.type == "cuda"
    i = make_inputs(6, 64, 96, 8, device=device, dropout_p=dropout_p, **settings)
    mask = torch.tensor([2**62 + 5], device=device) if on_gpu and dropout_p else i.mask
    backend = "triton" if on_gpu else "auto"
    wide = i.lora_A.dtype
    scale = torch.tensor(0.5, device=device)
    magnitude = torch.rand(96, device=device).to(wide) + 1
    forward = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, mask, scale, None, 0.7, dropout_p, wide, True, backend)
    _, s = ops.forward(*forward)
    gain_of = (i.weight, i.lora_A, i.lora_B, magnitude, scale, 0.7, wide, backend)
    gain, norm = dora_ops.dora_gain(*gain_of)
    saved = (i.dy.clone(), gain, norm, i.bias, i.x, i.weight, s, i.lora_A, i.lora_B)
    j = i.leaves()
    read, needs = (i.x, i.weight, i.lora_A, i.lora_B), (True, True, True)
    leaves = (j.x, i.weight, j.lora_A, j.lora_B)
    return {
        "forward": forward,
        "backward": (i.dy, *read, s, mask, scale, 0.7, dropout_p, wide, *needs, backend),
        "linear": (*leaves, i.bias, mask, scale, 0.7, dropout_p, wide, backend, "version"),
        "dora_gain": gain_of,
        "dora_scale": (i.dy, *saved, wide, wide, True, True, backend),
        "dora_backward": (i.dy, *saved, scale, 0.7, wide, wide, backend),
        "dora_linear": (*leaves, magnitude.clone().requires_grad_(), i.bias, scale, 0.7, wide, backend, "version"),
    }


NAMES = ["forward", "backward", "linear", "dora_gain", "dora_scale", "dora_backward", "dora_linear"]


@pytest.mark.parametrize("settings", [{}, {"adapter_dtype": FP32}, {"dropout_p": 0.5}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, settings, device) -> None:
    dtype = {"dtype": BF16, "adapter_dtype": BF16} if device.type == "cuda" or settings else {"dtype": FP32}
    given = arguments(device, **(dtype | settings))[name]
    torch.library.opcheck(getattr(torch.ops.fusedlora, name).default, given)


@pytest.mark.parametrize("grads", [True, False], ids=["grads", "no grads"])
@pytest.mark.parametrize("M", [6, 0])
def test_opcheck_of_what_the_compiler_sees(M: int, grads: bool, device) -> None:
    i = make_inputs(M, 16, 24, 4, device=device)
    i = i.leaves() if grads else i
    tensors = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, None, None)
    given = (*tensors, i.scaling, 0.0, i.lora_A.dtype, "auto", "version")
    torch.library.opcheck(torch.ops.fusedlora.linear.default, given)


def test_every_op_is_checked() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("fusedlora::") for name in registered if name.startswith("fusedlora::")} == set(NAMES)
