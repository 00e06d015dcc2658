"""dora_linear against peft itself: outputs, every gradient, errors, dropout, what is saved, torch.compile."""

import itertools
import math
import statistics

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedlora import backends, dora, dora_gradients, dora_ops
from fusedlora.dora import dora_linear
from fusedlora.testing import error_ratios, make_inputs, relative_error

peft = pytest.importorskip("peft")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")


SCALING = 0.7


def make(
    M, K, N, r, dtype=FP64, adapter_dtype=None, device="cpu", *, bias=True, seed=0, scaling=SCALING
) -> dict[str, torch.Tensor]:
    """dora_linear's tensors by name, and dy; magnitudes of about the norms, as training leaves them."""
    i = make_inputs(M, K, N, r, dtype, adapter_dtype, device, bias=bias, seed=seed)
    norm = (i.weight.double() + scaling * i.lora_B.double() @ i.lora_A.double()).norm(dim=1)
    spread = 1 + 0.2 * torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(norm.device)
    magnitude = (norm * spread).to(i.lora_A.dtype)
    return dict(zip((*NAMES, "dy"), (i.x, i.weight, i.lora_A, i.lora_B, magnitude, i.bias, i.dy)))


def gradients(y: torch.Tensor, dy: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype).reshape(y.shape))
    return {"y": y.detach()} | dict(zip(leaves, grads))


def ours(given: dict[str, torch.Tensor], linear=dora_linear, **settings) -> dict[str, torch.Tensor]:
    """y and the gradient of each tensor."""
    leaves = {n: given[n].detach().clone().requires_grad_() for n in NAMES if given[n] is not None}
    y = linear(*(leaves.get(name) for name in NAMES), **({"scaling": SCALING} | settings))
    return gradients(y, given["dy"], leaves)


def peft_layer(given: dict[str, torch.Tensor], scaling: float = SCALING, dropout: float = 0.0) -> nn.Module:
    """peft's own DoRA layer over these very tensors, all of which require a gradient."""
    weight, A, bias = given["weight"], given["lora_A"], given["bias"]
    base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    r = A.shape[0]
    config = peft.LoraConfig(r=r, lora_alpha=scaling * r, lora_dropout=dropout, use_dora=True, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]

    def parameter(name: str) -> nn.Parameter:
        return nn.Parameter(given[name].detach().clone())

    layer.base_layer.weight = parameter("weight")
    layer.base_layer.bias = None if bias is None else parameter("bias")
    layer.lora_A["default"].weight = parameter("lora_A")
    layer.lora_B["default"].weight = parameter("lora_B")
    layer.lora_magnitude_vector["default"].weight = parameter("magnitude")
    layer.scaling["default"] = scaling
    return layer


def theirs(given: dict[str, torch.Tensor], draw: int = 0, **settings) -> dict[str, torch.Tensor]:
    """The same of peft's layer; `draw` is the seed of its dropout."""
    layer = peft_layer(given, **settings)
    torch.manual_seed(draw)
    x = given["x"].detach().clone().requires_grad_()
    leaves = {
        "x": x,
        "weight": layer.base_layer.weight,
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
    }
    if given["bias"] is not None:
        leaves["bias"] = layer.base_layer.bias
    return gradients(layer(x), given["dy"], leaves)


def exact(given: dict[str, torch.Tensor], scaling: float = SCALING) -> dict[str, torch.Tensor]:
    """The formulas in float64, whatever dtype the tensors have."""
    x, weight, A, B, magnitude, bias, dy = (None if given[n] is None else given[n].double() for n in (*NAMES, "dy"))
    norm = (weight + scaling * B @ A).norm(dim=1)
    gain = magnitude / norm
    s = scaling * x @ A.t()
    u = x @ weight.t() + s @ B.t()
    scaled = dy * gain
    t = scaling * scaled @ B
    out = {"y": u * gain if bias is None else u * gain + bias, "x": scaled @ weight + t @ A, "weight": scaled.t() @ x}
    out |= {"lora_A": t.t() @ x, "lora_B": scaled.t() @ s, "magnitude": (dy * u).sum(0) / norm, "bias": dy.sum(0)}
    return out


# the numbers


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (63, 24, 40, 5), (130, 32, 16, 16)], ids=str)
def test_float64_is_peft_and_the_formula(shape, bias: bool, device) -> None:
    given = make(*shape, device=device, bias=bias)
    got, want, peft_gives = ours(given), exact(given), theirs(given)
    for name, out in got.items():
        assert relative_error(out, want[name]) < 1e-14, name
        assert relative_error(out, peft_gives[name]) < 1e-14, name


DRAWS = 24


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "dtype, adapter_dtype", [(FP32, None), (BF16, None), (FP16, None), (BF16, FP32), (FP16, FP32)], ids=str
)
@pytest.mark.parametrize("shape", [(200, 128, 96, 16), (63, 72, 120, 5)], ids=str)
def test_errors_are_not_above_those_of_peft(shape, dtype, adapter_dtype, autocast: bool, bias: bool, device) -> None:
    cast = dtype if dtype.itemsize == 2 else BF16
    draws = []
    for seed in range(DRAWS):
        # over an octave, as either side rounds dy times something else, and some factors are luck
        scaling = 0.5 * 2 ** (seed / DRAWS)
        given = make(*shape, dtype, adapter_dtype, device, bias=bias, seed=seed, scaling=scaling)
        with torch.autocast(device.type, cast, enabled=autocast):
            got, peft_gives = ours(given, backend="reference", scaling=scaling), theirs(given, scaling=scaling)
        assert {n: g.dtype for n, g in got.items()} == {n: g.dtype for n, g in peft_gives.items()}
        draws.append(error_ratios(got, peft_gives, exact(given, scaling)))
    for name in draws[0]:
        logs = [math.log(draw[name]) for draw in draws]
        # of the small shape's magnitudes a draw's ratio strays by 13 %
        luck = 2 * statistics.stdev(logs) / math.sqrt(DRAWS)
        assert statistics.mean(logs) <= math.log(1.02) + luck, (name, math.exp(statistics.mean(logs)))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, FP32), (BF16, FP32)], ids=str)
def test_norm_is_right_for_small_and_large_adapters(dtype, adapter_dtype, size: float, device) -> None:
    given = make(4, 512, 64, 8, dtype, adapter_dtype, device)
    B = given["lora_B"] * size
    if size == 1.0:  # rows that the adapter all but cancels
        given["weight"][:8] = (-SCALING * B[:8] @ given["lora_A"] * (1 + 2**-6)).to(dtype)
    _, norm = dora_ops.gain_of(
        given["weight"], given["lora_A"], B, given["magnitude"], scaling=SCALING, adapter_dtype=FP32
    )
    want = (given["weight"].double() + SCALING * B.double() @ given["lora_A"].double()).norm(dim=1)
    assert norm.dtype is FP32
    assert ((norm - want) / want).abs().max() < 1e-5


def test_the_adapted_weight_is_never_whole(device, monkeypatch) -> None:
    sizes = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.update(t.numel() for t in [out] if torch.is_tensor(t))
            return out

    given = make(4, 32, 24, 2, FP32, device=device)
    tensors = [given[name] for name in NAMES[1:5]]
    whole = dora_ops.gain_of(*tensors, scaling=SCALING, adapter_dtype=FP32)
    monkeypatch.setattr(dora_ops, "_CHUNK", 5 * 32)
    with Sizes():
        parts = dora_ops.gain_of(*tensors, scaling=SCALING, adapter_dtype=FP32)
    assert 5 * 32 in sizes and max(sizes) == 5 * 32
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(parts, whole))


@pytest.mark.parametrize("M", [1, 7])
def test_gradcheck_with_the_norm_held(M: int, device, monkeypatch) -> None:
    given = make(M, 6, 5, 3, device=device)
    _, norm = dora_ops.gain_of(*(given[n] for n in NAMES[1:5]), scaling=SCALING, adapter_dtype=FP64)
    monkeypatch.setattr(dora, "dora_gain", lambda w, a, b, magnitude, *_: (magnitude / norm, norm))
    leaves = [given[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *t: dora_linear(*t, scaling=SCALING), leaves)


def test_scaling_may_be_a_tensor(device) -> None:
    given = make(9, 16, 24, 4, device=device)
    number, tensor = ours(given), ours(given, scaling=torch.tensor(0.7, dtype=FP64, device=device))
    assert all(relative_error(tensor[name], number[name]) < 1e-14 for name in number)


@pytest.mark.parametrize("zero", [0.0, 1e-30])
def test_a_magnitude_of_zero(zero: float, device) -> None:
    given = make(30, 16, 24, 4, FP32, device=device)
    given["magnitude"][::3] = zero
    got, want = ours(given), exact(given)
    assert torch.equal(got["y"][:, ::3], given["bias"][::3].expand(30, -1))
    for name, out in got.items():
        assert relative_error(out, want[name]) < 2e-6, name
    assert relative_error(got["magnitude"][::3], want["magnitude"][::3]) < 2e-6


def test_a_row_without_direction_is_not_a_number_as_in_peft(device) -> None:
    given = make(5, 16, 24, 4, FP32, device=device)
    given["weight"][2], given["lora_B"][2] = 0, 0
    y, peft_gives = ours(given)["y"], theirs(given)["y"]
    assert y[:, 2].isnan().all() and peft_gives[:, 2].isnan().all()
    assert torch.equal(y.isnan(), peft_gives.isnan())


def test_no_rows(device) -> None:
    out = ours(make(0, 16, 24, 2, FP32, device=device))
    assert out["y"].shape == (0, 24) and out["x"].shape == (0, 16)
    assert not any(out[name].any() for name in NAMES[1:])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 4)], ids=str)
def test_leading_dimensions(lead, device) -> None:
    M = max(1, int(torch.tensor(lead).prod())) if 0 not in lead else 0
    given = make(M, 16, 24, 4, device=device)
    flat = ours(given)
    shaped = ours(given | {"x": given["x"].reshape(*lead, 16)})
    assert shaped["y"].shape == (*lead, 24) and shaped["x"].shape == (*lead, 16)
    for name in flat:
        torch.testing.assert_close(shaped[name].reshape(flat[name].shape), flat[name], rtol=1e-13, atol=1e-13)


# what is computed and saved

COMBINATIONS = [c for c in itertools.product([True, False], repeat=6) if any(c)]


def named(needs) -> str:
    return "+".join(name for name, need in zip(NAMES, needs) if need)


@pytest.mark.parametrize("dtype, adapter_dtype", [(FP64, None), (BF16, FP32)], ids=["float64", "bfloat16-float32"])
@pytest.mark.parametrize("needs", COMBINATIONS, ids=named)
def test_every_combination_gets_its_gradients(needs, dtype, adapter_dtype, device) -> None:
    given = make(6, 16, 24, 3, dtype, adapter_dtype, device)
    whole = ours(given, backend="reference")
    leaves = [given[name].clone().requires_grad_(need) for name, need in zip(NAMES, needs)]
    dora_linear(*leaves, scaling=SCALING, backend="reference").backward(given["dy"])
    for name, leaf, need in zip(NAMES, leaves, needs):
        assert (leaf.grad is not None) == need, name
        if need:
            assert relative_error(leaf.grad, whole[name]) < 1e-12, name


EVERYTHING = {"x", "weight", "lora_A", "lora_B", "s", "y", "gain", "norm", "bias"}


@pytest.mark.parametrize(
    "needs, saved",
    [
        ((True, False, True, True, True, False), EVERYTHING),
        ((True, False, True, True, False, False), {"x", "weight", "lora_A", "lora_B", "s", "gain"}),
        ((True, False, False, False, False, False), {"weight", "lora_A", "lora_B", "gain"}),
        ((False, False, False, False, True, False), EVERYTHING),
        ((False, False, True, False, False, False), {"x", "lora_A", "lora_B", "gain"}),
    ],
    ids=["usual", "frozen-magnitude", "x", "magnitude", "lora_A"],
)
def test_what_is_saved(needs, saved, device) -> None:
    given = make(7, 16, 24, 3, FP32, device=device)
    leaves = [given[name].clone().requires_grad_(need) for name, need in zip(NAMES, needs)]
    shapes = {(7, 16): "x", (24, 16): "weight", (3, 16): "lora_A", (24, 3): "lora_B", (7, 3): "s", (7, 24): "y"}
    found, vectors = set(), 0

    def pack(tensor):
        nonlocal vectors
        found.add(shapes.get(tuple(tensor.shape), "vector"))
        vectors += tensor.shape == (24,)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dora_linear(*leaves, scaling=SCALING)
    assert found == saved - {"gain", "norm", "bias"} | {"vector"}
    assert vectors == len(saved & {"gain", "norm", "bias"})


def test_a_changed_y_is_noticed(device) -> None:
    given = make(6, 16, 24, 3, FP32, device=device)
    leaves = [given[name].requires_grad_() for name in NAMES]
    y = dora_linear(*leaves, scaling=SCALING)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, device) -> None:
    given = make(6, 16, 24, 3, FP32, device=device)
    plain = ours(given)

    def linear(*tensors, **settings):
        return checkpoint(lambda *t: dora_linear(*t, **settings), *tensors, use_reentrant=reentrant)

    leaves = {name: given[name].clone().requires_grad_() for name in NAMES}
    y = linear(*leaves.values(), scaling=SCALING)
    y.backward(given["dy"])
    assert all(torch.equal(leaf.grad, plain[name]) for name, leaf in leaves.items())


def test_double_backward_raises(device) -> None:
    leaves = [make(3, 8, 8, 2, FP32, device=device)[name].requires_grad_() for name in NAMES]
    y = dora_linear(*leaves, scaling=SCALING)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="dora_linear can be differentiated only once"):
        dx.sum().backward()


def test_func_transforms_raise(device) -> None:
    given = make(3, 8, 8, 2, FP32, device=device)
    rest = [given[name] for name in NAMES[1:]]
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: dora_linear(x, *rest, scaling=SCALING).sum())(given["x"])


def test_no_grad_is_the_same(device) -> None:
    given = make(6, 16, 24, 3, FP32, device=device)
    with torch.no_grad():
        y = dora_linear(*(given[name] for name in NAMES), scaling=SCALING)
    assert torch.equal(y, ours(given)["y"])


# bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"magnitude": None}, TypeError, "magnitude is None, must be a tensor"),
        ({"magnitude": torch.ones(23)}, ValueError, r"magnitude has shape \(23,\), must be \(24,\)"),
        ({"magnitude": torch.ones(24, 1)}, ValueError, r"magnitude has shape \(24, 1\)"),
        ({"magnitude": torch.ones(24, dtype=BF16)}, TypeError, "magnitude has dtype torch.bfloat16, must be lora_A's"),
        ({"magnitude": torch.ones(24, device="meta")}, ValueError, "magnitude is on meta, x is on"),
        ({"x": torch.ones(3, 15)}, ValueError, "weight has in_features 16, x has 15"),
    ],
    ids=["none", "shape", "dims", "dtype", "device", "x"],
)
def test_bad_input(change, error, message: str) -> None:
    given = make(3, 16, 24, 3, FP32) | change
    with pytest.raises(error, match=message):
        dora_linear(*(given[name] for name in NAMES), scaling=SCALING)


def test_a_named_backend_runs_or_raises() -> None:
    given = make(3, 16, 24, 3, FP32)
    tensors = [given[name] for name in NAMES]
    if torch.cuda.is_available():
        tensors = [t.cuda() for t in tensors]
    with pytest.raises(RuntimeError, match="backend 'triton' does not take this call"):
        dora_linear(*tensors, scaling=SCALING, backend="triton")  # float32 at the highest precision
    dora_linear(*tensors, scaling=SCALING, backend="reference")
    assert backends.last_used == "reference"


# dropout


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, None), (BF16, None), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_dropout_in_training_is_pefts_to_the_bit(dtype, adapter_dtype, autocast: bool, bias: bool, device) -> None:
    given = make(20, 16, 24, 3, dtype, adapter_dtype, device, bias=bias)
    with torch.autocast(device.type, BF16, enabled=autocast):
        torch.manual_seed(3)
        got = ours(given, dropout_p=0.4)
        want = theirs(given, draw=3, dropout=0.4)
    assert not torch.equal(got["y"], ours(given)["y"])
    # autograd adds up what reaches a leaf by several ways in no fixed order; cuBLAS chooses its kernels as it likes
    assert torch.equal(got["y"], want["y"]) or device.type == "cuda"
    for name, out in got.items():
        assert relative_error(out, want[name]) < torch.finfo(dtype).eps, name


def test_dropout_out_of_training_is_none(device) -> None:
    given = make(20, 16, 24, 3, FP32, device=device)
    assert torch.equal(ours(given, dropout_p=0.4, training=False)["y"], ours(given)["y"])


def test_no_kernel_takes_dropout_in_training(device) -> None:
    given = make(3, 16, 24, 3, FP32, device=device)
    with pytest.raises(RuntimeError, match="'triton' does not take this call: with dropout in training"):
        dora_linear(*(given[name] for name in NAMES), scaling=SCALING, dropout_p=0.1, backend="triton")
    backends.last_used = None
    dora_linear(*(given[name] for name in NAMES), scaling=SCALING, dropout_p=0.1, backend="reference")
    assert backends.last_used == "reference"


# the ops


def gain_arguments(given) -> tuple:
    scale = torch.tensor(0.5, device=given["x"].device)
    return *(given[name] for name in NAMES[1:5]), scale, 0.7, given["lora_A"].dtype, "auto"


@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, None), (BF16, None), (BF16, FP32), (FP64, None)], ids=str)
def test_gain_op(dtype, adapter_dtype, device) -> None:
    given = make(3, 16, 24, 4, dtype, adapter_dtype, device)
    torch.library.opcheck(dora_ops.dora_gain, gain_arguments(given))
    gain, norm = dora_ops.dora_gain(*gain_arguments(given))
    wide = torch.promote_types(dtype, FP32)
    assert gain.shape == norm.shape == (24,) and gain.dtype is norm.dtype is wide
    assert torch.equal(norm, norm.to(given["magnitude"].dtype).to(wide))


@pytest.mark.parametrize("need_dy, need_dm", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(9, 16, 24, 4), (0, 16, 24, 4)], ids=str)
@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, None), (BF16, FP32)], ids=str)
def test_scale_op(dtype, adapter_dtype, shape, need_dy: bool, need_dm: bool, device) -> None:
    given = make(*shape, dtype, adapter_dtype, device)
    gain, norm = dora_ops.dora_gain(*gain_arguments(given))
    wide = given["lora_A"].dtype
    s = 0.35 * given["x"].to(wide) @ given["lora_A"].t()
    y = given["dy"].clone()
    read = (y, gain, norm, given["bias"], given["x"], given["weight"], s)
    read = read if need_dm else (None, gain, None, None, None, None, None)
    args = (given["dy"], *read, given["lora_A"], given["lora_B"], wide, wide, need_dy, need_dm, "auto")
    torch.library.opcheck(dora_ops.dora_scale, args)
    scaled, dm = dora_ops.dora_scale(*args)
    assert scaled.shape == (given["dy"].shape if need_dy else (0,)) and scaled.dtype is dtype
    assert dm.shape == ((24,) if need_dm else (0,)) and dm.dtype is wide


@pytest.mark.parametrize("shape", [(9, 16, 24, 4), (40, 16, 24, 4), (0, 16, 24, 4)], ids=str)
@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, None), (BF16, FP32), (BF16, None)], ids=str)
def test_backward_op(dtype, adapter_dtype, shape, device) -> None:
    given = make(*shape, dtype, adapter_dtype, device)
    gain, norm = dora_ops.dora_gain(*gain_arguments(given))
    wide = given["lora_A"].dtype
    s = 0.35 * given["x"].to(wide) @ given["lora_A"].t()
    y = given["dy"].clone()
    read = (y, gain, norm, given["bias"], given["x"], given["weight"], s, given["lora_A"], given["lora_B"], None)
    args = (given["dy"], *read, 0.35, wide, wide, "auto")
    torch.library.opcheck(dora_gradients.dora_backward, args)
    dx, dA, dB, dm = dora_gradients.dora_backward(*args)
    assert dx.shape == given["x"].shape and dA.shape == given["lora_A"].shape and dB.shape == given["lora_B"].shape
    assert dx.dtype is dtype and dA.dtype is dB.dtype is dm.dtype is wide and dm.shape == (24,)


@pytest.mark.parametrize(
    "taker, dtypes, launched",
    [
        ("cuda", (BF16, BF16, BF16), ("cuda", BF16)),
        ("cuda", (BF16, BF16, FP32), ("cuda", FP32)),
        ("cuda", (FP16, FP16, BF16), ("cuda", FP32)),  # autocast to another dtype than the model's
        ("cuda", (BF16, FP32, FP32), None),  # dm is not formed beside terms
        ("triton", (FP16, FP16, BF16), ("triton", BF16)),
        ("triton", (BF16, FP32, FP32), ("triton", FP32)),
        ("reference", (BF16, BF16, BF16), None),
    ],
)
def test_who_forms_dm_beside_dB(taker, dtypes, launched, monkeypatch) -> None:
    """And in which dtype it is asked for; it comes in the magnitude's."""
    kernels = pytest.importorskip("fusedlora.kernels.dora", exc_type=ImportError)
    from fusedlora.kernels import backward

    seen = []
    dtype, adapter_dtype, magnitude_dtype = dtypes
    given = make(40, 16, 24, 4, dtype, adapter_dtype)
    x, dy, ones = given["x"], given["dy"], torch.ones(24)
    named = next(b for b in backends.BACKENDS if b.name == taker)

    def record(*tensors, **settings):
        assert tensors[0] is dy and settings["adapter_dtype"] is adapter_dtype
        launchers = {backends.cuda.lora_backward: "cuda", backward.lora_backward: "triton"}
        seen.append((launchers[tensors[10]], settings["magnitude_dtype"]))
        assert ("scale" in settings) == ("one_launch" in settings) == (tensors[10] is backward.lora_backward)
        return x, given["lora_A"], given["lora_B"], torch.ones(24, dtype=settings["magnitude_dtype"])

    monkeypatch.setattr(kernels, "dora_backward", record)
    monkeypatch.setattr(dora_gradients, "select", lambda name, call: named)
    monkeypatch.setattr(dora_gradients, "scaled_by_kernels", lambda name, call: name in ("cuda", "triton"))
    s = torch.zeros(40, 4, dtype=adapter_dtype)
    tensors = (dy, dy, ones, ones, None, x, given["weight"], s, given["lora_A"], given["lora_B"], None)
    *_, dm = dora_gradients.dora_backward(*tensors, 0.7, adapter_dtype, magnitude_dtype, "reference")
    assert dm.dtype is magnitude_dtype and seen == ([launched] if launched else [])


def test_linear_op(device) -> None:
    given = make(9, 16, 24, 4, FP32, device=device)
    leaves = [given[name].requires_grad_() for name in NAMES]
    torch.library.opcheck(torch.ops.fusedlora.dora_linear.default, (*leaves, None, 0.7, FP32, "auto", "version"))


# torch.compile


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield torch.compile(dora_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, None), (BF16, FP32)], ids=str)
def test_compiled_gradients_are_the_eager_ones(dtype, adapter_dtype, compiled, device) -> None:
    for M in (6, 7, 12):
        given = make(M, 16, 24, 3, dtype, adapter_dtype, device)
        with torch._dynamo.config.patch(error_on_recompile=M > 6):
            got = ours(given, compiled)
        want = ours(given)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_compiled_with_dropout(compiled, device) -> None:
    given = make(200, 16, 24, 3, FP32, device=device)
    torch.manual_seed(1)
    y = ours(given, compiled, dropout_p=0.5)["y"]
    assert y.shape == (200, 24) and not torch.equal(y, ours(given)["y"])


@pytest.mark.slow
def test_compiled_by_inductor(device) -> None:
    torch._dynamo.reset()
    given = make(6, 16, 24, 3, FP32, device=device)
    got, want = ours(given, torch.compile(dora_linear, fullgraph=True)), ours(given)
    assert all(relative_error(got[name], want[name]) < 1e-6 for name in want)
