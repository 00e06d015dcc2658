"""Gradients: every combination of what needs one, what is saved, checkpointing, double backward and torch.compile."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedlora import backends, dropout, lora_linear
from fusedlora.testing import Inputs, exact, make_inputs, relative_error

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
COMBINATIONS = [c for c in itertools.product([True, False], repeat=5) if any(c)]


def combination_id(needs: tuple[bool, ...]) -> str:
    return "+".join(name for name, need in zip(NAMES, needs) if need)


def tensors(i: Inputs, needs: tuple[bool, ...] = (True,) * 5) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(i, name).clone().requires_grad_(need) for name, need in zip(NAMES, needs))


@pytest.mark.parametrize("lead", [(3,), (1, 3), ()], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(lead, dropout_p, device):
    i = make_inputs(3, 5, 4, 2, torch.float64, device=device)
    x, *rest = tensors(i)
    x = x.detach()[:1].reshape(5) if lead == () else x.detach().reshape(*lead, 5)

    def linear(*given):
        torch.manual_seed(0)
        return lora_linear(*given, scaling=1.7, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), *rest))


@pytest.mark.parametrize("needs", COMBINATIONS, ids=combination_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_every_combination_gets_its_gradients(needs, dropout_p, device):
    i = make_inputs(6, 16, 24, 3, torch.float64, device=device)
    given = tensors(i, needs)
    torch.manual_seed(5)
    y = lora_linear(*given, scaling=i.scaling, dropout_p=dropout_p)
    y.backward(i.dy)

    whole = tensors(i)
    torch.manual_seed(5)
    lora_linear(*whole, scaling=i.scaling, dropout_p=dropout_p).backward(i.dy)
    for name, got, want, need in zip(NAMES, given, whole, needs):
        assert (got.grad is not None) == need, name
        if need:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-12, atol=1e-12)


@pytest.fixture
def recorded(monkeypatch):
    """The calls that reach the reference backend, as (direction, settings, the names of tensors given)."""
    calls = []
    plain = backends.REFERENCE

    def forward(*args, **settings):
        calls.append(("forward", settings, None))
        return plain.forward(*args, **settings)

    def backward(dy, x, weight, lora_A, lora_B, s, mask, scale, **settings):
        given = {"x": x, "weight": weight, "s": s, "mask": mask}
        calls.append(("backward", settings, {name for name, tensor in given.items() if tensor is not None}))
        return plain.backward(dy, x, weight, lora_A, lora_B, s, mask, scale, **settings)

    recording = backends.Backend("reference", plain.why_not, forward, backward)
    monkeypatch.setattr(backends, "BACKENDS", (recording,))
    monkeypatch.setattr(backends, "_chosen", {})
    return calls


@pytest.mark.parametrize("needs", COMBINATIONS, ids=combination_id)
def test_no_work_for_what_is_not_needed(needs, recorded, device):
    need_x, need_weight, need_A, need_B, need_bias = needs
    i = make_inputs(6, 16, 24, 3, device=device)
    lora_linear(*tensors(i, needs), scaling=i.scaling, dropout_p=0.5).backward(i.dy)
    forward, *backward = recorded
    assert forward[1]["save_s"] == need_B
    if not (need_x or need_A or need_B):
        assert backward == []
        return
    ((_, settings, given),) = backward
    asked = {"need_dx": need_x, "need_dA": need_A, "need_dB": need_B}
    assert {name: settings[name] for name in asked} == asked
    read = {"x": need_A or need_weight, "weight": need_x, "s": need_B, "mask": need_x or need_A}
    assert given == {name for name, is_read in read.items() if is_read}


def test_one_forward_and_one_backward_call(recorded, device):
    i = make_inputs(6, 16, 24, 3, device=device)
    lora_linear(*tensors(i), scaling=i.scaling).backward(i.dy)
    assert [direction for direction, *_ in recorded] == ["forward", "backward"]


def saved_sizes(needs: tuple[bool, ...], dropout_p: float = 0.0) -> list[int]:
    """Elements of each tensor saved for backward, the frozen weight and the adapter apart."""
    i = make_inputs(6, 16, 24, 3)
    given = tensors(i, needs)
    sizes = []

    def pack(tensor):
        if all(tensor.data_ptr() != parameter.data_ptr() for parameter in given[1:4]):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(*given, scaling=1.0, dropout_p=dropout_p)
    return sorted(sizes)


X, S, MASK = 6 * 16, 6 * 3, 6 * 16


@pytest.mark.parametrize(
    ("needs", "dropout_p", "sizes"),
    [
        ((True, False, True, True, False), 0.0, [S, X]),
        ((True, False, True, True, False), 0.5, [S, X, MASK]),
        ((False, False, True, True, False), 0.0, [S, X]),
        ((True, False, False, False, False), 0.0, []),
        ((True, False, False, False, False), 0.5, [MASK]),
        ((False, False, False, True, False), 0.5, [S]),
        ((False, False, False, False, True), 0.5, []),
        ((False, True, False, False, False), 0.5, [X]),
    ],
    ids=str,
)
def test_only_what_is_read_is_saved(needs, dropout_p, sizes):
    assert saved_sizes(needs, dropout_p) == sizes


def test_nothing_is_saved_without_grad():
    assert saved_sizes((False,) * 5) == []


def test_a_changed_input_is_noticed(device):
    i = make_inputs(6, 16, 24, 3, device=device)
    x, weight, lora_A, lora_B, bias = tensors(i)
    y = lora_linear(x, weight, lora_A, lora_B, bias, scaling=1.0)
    with torch.no_grad():
        lora_A.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("of", ["x", "lora_A", "lora_B"])
def test_double_backward_is_refused(of, device):
    i = make_inputs(6, 16, 24, 3, torch.float64, device=device)
    given = dict(zip(NAMES, tensors(i)))
    y = lora_linear(**given, scaling=1.0)
    (first,) = torch.autograd.grad(y.sum(), given[of], create_graph=True)
    want = exact(Inputs(**{**vars(i), "scaling": 1.0, "dy": torch.ones_like(i.dy)}))
    assert relative_error(first, want[{"x": "dx", "lora_A": "dA", "lora_B": "dB"}[of]]) < 1e-12
    with pytest.raises(RuntimeError, match="lora_linear can be differentiated only once: it has no double backward"):
        first.pow(2).sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing(use_reentrant, dropout_p, device):
    i = make_inputs(6, 16, 24, 3, device=device)

    def step(wrap):
        x, weight, lora_A, lora_B, bias = tensors(i)
        torch.manual_seed(7)
        y = wrap(lambda h: lora_linear(h, weight, lora_A, lora_B, bias, scaling=1.0, dropout_p=dropout_p), x)
        torch.rand(3, device=device)  # the generator moves on before backward
        y.backward(i.dy)
        return [y.detach(), x.grad, weight.grad, lora_A.grad, lora_B.grad, bias.grad]

    plain = step(lambda f, x: f(x))
    wrapped = step(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    for got, want in zip(wrapped, plain):
        assert torch.equal(got, want)


COMPILED = [
    (True, False, True, True, False),
    (False, False, True, True, False),
    (True, False, False, True, False),
    (True, False, False, False, False),
    (True, True, True, True, True),
    (False, True, False, False, True),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("needs", COMPILED, ids=combination_id)
def test_compiled_gradients_are_the_eager_ones(needs, dropout_p, device, monkeypatch):
    torch._dynamo.reset()
    if device.type == "cuda":  # where eager calls draw their seeds another way
        seed = torch.tensor([2**62 + 5], device=device)
        monkeypatch.setattr(dropout, "draw", lambda x, dropout_p, backend: seed)
    i = make_inputs(2 * 6, 16, 24, 3, device=device)

    def block(x, *rest):
        h = lora_linear(x.reshape(2, 6, 16), *rest, scaling=i.scaling, dropout_p=dropout_p)
        return torch.nn.functional.silu(h).flatten(0, 1)

    def step(fn):
        given = tensors(i, needs)
        torch.manual_seed(9)
        y = fn(*given)
        y.backward(i.dy)
        return [y.detach(), *(tensor.grad for tensor in given)]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(step(compiled), step(block), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)


def test_compiled_under_checkpointing(device):
    torch._dynamo.reset()
    i = make_inputs(6, 16, 24, 3, device=device)

    def block(*given):
        return checkpoint(lambda *a: lora_linear(*a, scaling=1.0), *given, use_reentrant=False)

    def gradients(fn):
        given = tensors(i)
        return torch.autograd.grad(fn(*given), given, i.dy)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(block)):
        torch.testing.assert_close(got, want)


def test_compiled_under_autocast(device):
    torch._dynamo.reset()
    i = make_inputs(6, 16, 24, 3, device=device)

    def block(*given):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return lora_linear(*given, scaling=1.0)

    def gradients(fn):
        given = tensors(i)
        y = fn(*given)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y, given, i.dy.bfloat16())

    for got, want in zip(gradients(torch.compile(block, fullgraph=True, backend="aot_eager")), gradients(block)):
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want)


def test_exported(device):
    i = make_inputs(6, 16, 24, 3, device=device)

    class Block(torch.nn.Module):
        def forward(self, x):
            return lora_linear(x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=1.0)

    program = torch.export.export(Block(), (i.x,), dynamic_shapes=({0: torch.export.Dim("M", min=2, max=64)},))
    x = torch.randn(9, 16, device=device)
    torch.testing.assert_close(program.module()(x), Block()(x))


def test_backward_in_a_thread_of_its_own(device):
    import threading

    i = make_inputs(6, 16, 24, 3, device=device)
    given = tensors(i)
    y = lora_linear(*given, scaling=i.scaling)
    thread = threading.Thread(target=y.backward, args=(i.dy,))
    thread.start()
    thread.join()
    again = tensors(i)
    lora_linear(*again, scaling=i.scaling).backward(i.dy)
    for got, want in zip(given, again):
        assert torch.equal(got.grad, want.grad)
