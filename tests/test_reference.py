"""The formulas in plain PyTorch: right to float64, and no worse than the eager path in every dtype."""

import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedlora
from fusedlora import reference as module
from fusedlora.testing import eager_peft, error_ratios, exact, make_inputs, relative_error, relative_errors, run

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def reference(*args, **kwargs):
    return fusedlora.lora_linear(*args, backend="reference", **kwargs)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (63, 24, 40, 5), (500, 64, 32, 16)], ids=str)
def test_float64_is_the_formula(shape, bias: bool, device) -> None:
    i = make_inputs(*shape, FP64, device=device, bias=bias)
    assert max(relative_errors(run(reference, i), exact(i)).values()) < 1e-14


DRAWS = 24  # one draw's ratio of fp32 errors strays by 3 % with the order of the sums, the mean's by 0.6 %


def mean_ratios(ours, theirs, shape, *dtypes, device, **settings) -> dict[str, float]:
    """Each output's error over the eager path's, the geometric mean over draws; both are called with the inputs."""
    draws = []
    for seed in range(DRAWS):
        # 0.7: by 0.75 or a power of two the eager path would multiply a 16-bit dy exactly, to fp32, which is luck.
        i = make_inputs(*shape, *dtypes, device, seed=seed, scaling=0.7, **settings)
        draws.append(error_ratios(ours(i), theirs(i), exact(i)))
    return {name: statistics.geometric_mean(draw[name] for draw in draws) for name in draws[0]}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "dtype, adapter_dtype", [(FP32, None), (BF16, None), (FP16, None), (BF16, FP32), (FP16, FP32)], ids=str
)
@pytest.mark.parametrize("shape", [(200, 128, 96, 16), (250, 64, 96, 64), (63, 72, 40, 5)], ids=str)
def test_errors_are_not_above_the_eager_path(shape, dtype, adapter_dtype, autocast: bool, device) -> None:
    def through(linear):
        def call(i):
            with torch.autocast(device.type, dtype=dtype if dtype.itemsize == 2 else BF16, enabled=autocast):
                return run(linear, i)

        return call

    ratios = mean_ratios(through(reference), through(eager_peft), shape, dtype, adapter_dtype, device=device)
    # on a GPU the two sides' products of a few fp32 elements may be summed in other orders, by other kernels
    assert max(ratios.values()) <= (1.02 if device.type == "cpu" else 1.04), ratios


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("M", [1, 7])
def test_gradcheck(M: int, dropout_p: float, device) -> None:
    i = make_inputs(M, 6, 5, 3, FP64, device=device).leaves()
    weight, bias = i.weight.requires_grad_(), i.bias.requires_grad_()

    def call(x, w, a, b, c):
        torch.manual_seed(3)  # the same mask at each evaluation
        return reference(x, w, a, b, c, scaling=1.7, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(call, (i.x, weight, i.lora_A, i.lora_B, bias))


@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, None), (BF16, None), (FP16, None), (BF16, FP32)], ids=str)
def test_errors_with_dropout_are_not_above_the_eager_path(dtype, adapter_dtype, device) -> None:
    p = 0.3
    wide = torch.promote_types(dtype, adapter_dtype or dtype)

    def ours(i):
        settings = {"scaling": i.scaling, "dropout_p": p, "adapter_dtype": wide}
        needs = {"need_dx": True, "need_dA": True, "need_dB": True}
        y, s = module.forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.mask, None, None, save_s=True, **settings)
        grads = module.backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, i.mask, None, **needs, **settings)
        return dict(zip(("y", "dx", "dA", "dB"), (y, *grads)))

    def theirs(i):
        return run(eager_peft, i, mask=i.mask, dropout_p=p)

    ratios = mean_ratios(ours, theirs, (200, 128, 96, 16), dtype, adapter_dtype, device=device, dropout_p=p)
    assert max(ratios.values()) <= 1.02, ratios


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_scale_is_applied_before_the_one_rounding(dtype, device) -> None:
    i = make_inputs(64, 128, 32, 8, dtype, device=device)
    settings = {"scaling": 0.37, "dropout_p": 0.0, "adapter_dtype": dtype}
    _, s = module.forward(i.x, i.weight, i.lora_A, i.lora_B, None, None, None, None, save_s=True, **settings)
    want = 0.37 * (i.x.double() @ i.lora_A.double().t())
    assert s.dtype == dtype
    assert relative_error(s, want) < 0.9 * relative_error((i.x @ i.lora_A.t()) * 0.37, want)


def test_uninitialised_memory_does_not_reach_the_result(device) -> None:
    """The accumulator handed to addmm is empty memory, which deterministic mode fills with NaN."""
    i = make_inputs(5, 16, 24, 2, FP64, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        outputs = run(reference, i)
    finally:
        torch.use_deterministic_algorithms(False)
    assert max(relative_errors(outputs, exact(i)).values()) < 1e-14


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_rows(dropout_p: float, device) -> None:
    out = run(reference, make_inputs(0, 16, 24, 2, device=device), dropout_p=dropout_p)
    assert out["y"].shape == (0, 24) and out["dx"].shape == (0, 16)
    assert not out["dA"].any() and not out["dB"].any() and out["dA"].shape == (2, 16) and out["dB"].shape == (24, 2)


class CountProducts(TorchDispatchMode):
    """Collects the shape of each matrix product's result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(out.shape))
        return out


M, K, N, R = 5, 7, 11, 2
T, DX, DA, DB = (M, R), (M, K), (R, K), (N, R)


@pytest.mark.parametrize(
    "needs, products",
    [
        ((True, True, True), [T, DA, DB, DX, DX]),
        ((True, False, False), [T, DX, DX]),
        ((False, True, False), [T, DA]),
        ((False, False, True), [DB]),
        ((False, True, True), [T, DA, DB]),
        ((True, False, True), [T, DB, DX, DX]),
        ((True, True, False), [T, DA, DX, DX]),
        ((False, False, False), []),
    ],
    ids=str,
)
def test_backward_multiplies_only_for_what_is_needed(needs, products, device) -> None:
    i = make_inputs(M, K, N, R, device=device)
    need_dx, need_dA, need_dB = needs
    x, weight = i.x if need_dA else None, i.weight if need_dx else None
    s = i.x @ i.lora_A.t() if need_dB else None
    settings = {"scaling": 1.0, "dropout_p": 0.0, "adapter_dtype": FP32}
    flags = {"need_dx": need_dx, "need_dA": need_dA, "need_dB": need_dB}
    with CountProducts() as count:
        grads = module.backward(i.dy, x, weight, i.lora_A, i.lora_B, s, None, None, **settings, **flags)
    assert sorted(count.shapes) == sorted(products)
    assert tuple(grad is not None for grad in grads) == needs
