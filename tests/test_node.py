"""The C++ autograd node on CPU tensors, its launches computed by the formulas: what calls it takes, and as what."""

import ctypes
import dataclasses
import gc
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fusedlora
from fusedlora import backends, cuda, dropout, node, node_build, plans, reference
from fusedlora.calls import Call
from fusedlora.cuda_build import BuildError
from fusedlora.packed import PackedPlan
from fusedlora.quantised import QuantisedWeight, quantised_lora_linear
from fusedlora.recipe import Recipe, address

LOAD = node.load.__wrapped__  # before conftest.py puts something in its place
BF16 = torch.bfloat16
M, N, K, R = 6, 24, 16, 4
FORWARD = ("x", "w", "a", "b", "bias", "y", "s")
BACKWARD = ("dy", "x", "s", "w", "a", "b", "dx", "da", "db")
NUMBERS = ("scaling", "seed", "workspace", "words", "stream")
STREAM = 77

LIBRARY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p)


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        *(("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)),
        *(
            ("stream", ctypes.c_uint64),
            ("attributes", ctypes.POINTER(LaunchAttribute)),
            ("num_attributes", ctypes.c_uint),
        ),
    ]


KERNEL = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(LaunchConfig),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)),
    ctypes.c_void_p,
)


@pytest.fixture(scope="session")
def module() -> Any:
    try:
        return node.import_module(node_build.build())
    except BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise


def at(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor | None:
    if address == 0:
        return None
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Launch:
    """A launch by the formulas: `launch` as Python's, and a recipe for one with the same effect."""

    def __init__(
        self, stand_in: "StandIn", direction: str, param_dtype: torch.dtype, adapter_dtype: torch.dtype
    ) -> None:
        self.owner, self.direction = stand_in, direction
        shapes = {"x": (M, K), "dy": (M, N), "w": (N, K), "a": (R, K), "b": (N, R), "bias": (N,), "s": (M, R)}
        self.shapes = shapes | {"y": (M, N), "dx": (M, K), "da": (R, K), "db": (N, R)}
        self.dtypes = dict.fromkeys(self.shapes, BF16) | dict.fromkeys(("a", "b", "da", "db"), param_dtype)
        self.dtypes["s"] = self.adapter_dtype = adapter_dtype

    def compute(self, t: dict[str, Any], scaling: float, seed: int | None) -> None:
        settings = {"scaling": scaling, "dropout_p": 0.0, "adapter_dtype": self.adapter_dtype}
        if seed is not None:
            settings |= {"scaling": scaling * 0.5, "dropout_p": 0.5}
        mask = None if seed is None else dropout.as_mask(torch.tensor([seed]), M, K, 0.5, torch.device("cpu"))
        with torch.no_grad():
            if self.direction == "forward":
                given = (t["x"], t["w"], t["a"], t["b"], t["bias"], mask, None, None)
                made = dict(zip(("y", "s"), reference.forward(*given, save_s=True, **settings)))
            else:
                needs = dict.fromkeys(("need_dx", "need_dA", "need_dB"), True)
                given = (t["dy"], t["x"], t["w"], t["a"], t["b"], t["s"], mask, None)
                made = dict(zip(("dx", "da", "db"), reference.backward(*given, **settings, **needs)))
            for name, value in made.items():
                if t[name] is not None:
                    t[name].copy_(value)

    def launch(self, tensors: tuple[torch.Tensor | None, ...], scaling: float, seed: int | None, _: Any) -> None:
        s_alone = self.direction == "forward" and tensors[7] is None
        self.owner.log.append("python S" if s_alone else f"python {self.direction}")
        if s_alone and self.owner.status:
            raise RuntimeError("out of luck")
        if self.direction == "forward":
            x, w, a, b, bias, _, _, y, s = (*tensors, None)[:9]
            given = dict(zip(FORWARD, (x, w, a, b, bias, y, s)))
        else:
            dy, x, s, w, a, b, _, *made = tensors
            given = dict(zip(BACKWARD, (dy, x, s, w, a, b, *made)))
        flat = {name: None if t is None else t.view(self.shapes[name]) for name, t in given.items()}
        self.compute(flat, scaling, seed)

    def recipe(self, tensors: tuple[str | None, ...], threshold: int | None) -> Recipe | None:
        there = FORWARD if self.direction == "forward" else BACKWARD
        names = (*(name for name in there if name in tensors), *NUMBERS)
        drops = threshold is not None

        def run(slots: Any, single: bool) -> int:
            owner = self.owner
            if owner.status:
                return owner.status
            owner.log.append(f"node {self.direction}")
            value = dict(zip(names, slots))
            assert value["stream"] == STREAM
            words, work = at(value["words"], torch.int32, 3), at(value["workspace"], torch.uint8, 100)
            assert words is not None and work is not None and not words.any(), "words are zero at each launch"
            work.fill_(1)
            owner.places.append((value["words"], value["workspace"]))
            size, kind = (4, "f") if single else (8, "d")
            scaling = struct.unpack(kind, value["scaling"].to_bytes(8, "little")[:size])[0]
            given = {name: at(value.get(name, 0), self.dtypes[name], *self.shapes[name]) for name in there}
            self.compute(given, scaling, value["seed"] if drops else None)
            return 0

        how: dict[str, Any]
        if self.owner.kernels:
            self.owner.kernel_runs.append(run)
            how = {
                "function": len(self.owner.kernel_runs),
                "programs": 5,
                "threads": 128,
                "shared": 1000,
                "early": True,
            }
        else:
            function = LIBRARY(lambda slots, sizes: run(slots[: len(names)], False))
            how = {"function": address(function), "problem": address(self.owner.problem), "keeps": function}
        source = {"scaling": "scaling32"} if self.owner.kernels else {}
        holes = tuple((slot, source.get(name, name), 0) for slot, name in enumerate(names))
        return Recipe(slots=bytes(8 * len(names)), holes=holes, work_size=100, num_words=3, **how)


class StandIn:
    """In place of kernels, for bf16 CPU tensors of one shape; as the library's functions, or as kernels."""

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels
        self.log: list[str] = []
        self.places: list[tuple[int, int]] = []
        self.status = self.captures = 0
        self.sums_s_alone = True
        self.kernel_runs: list[Any] = []
        self.said = ctypes.create_string_buffer(b"out of luck")
        self.problem = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(self.said))

    def backend(self) -> backends.Backend:
        def why_not(call: Call) -> str | None:
            return None if call.dtype is BF16 and call.dropout != "mask" else "not here"

        def op(direction: str, run: Any) -> Any:
            def logged(*arguments: Any, **settings: Any) -> Any:
                self.log.append(f"op {direction}")
                return run(*arguments, **settings)

            return logged

        def launchers(device: torch.device) -> Any:
            def plan(direction: str) -> Any:
                def make(*tensors: Any, adapter_dtype: torch.dtype, tiles: bool = True, **_: Any) -> Launch | None:
                    made = Launch(self, direction, tensors[3].dtype, adapter_dtype)
                    return made if tiles or self.sums_s_alone else None

                return make

            return plan("forward"), plan("backward")

        ops = op("forward", reference.forward), op("backward", reference.backward)
        return backends.Backend("triton", why_not, *ops, launchers)

    def functions(self) -> tuple[Any, ...]:
        def current_stream(index: int, stream: Any) -> int:
            stream[0] = STREAM
            return 0

        def is_capturing(stream: int, status: Any) -> int:
            assert stream == STREAM
            status[0] = self.captures
            return 0

        def launch_kernel(config, function, params, extra) -> int:
            told = config.contents
            assert (list(told.grid), list(told.block)) == ([5, 1, 1], [128, 1, 1])
            assert (told.shared, told.stream, told.num_attributes, extra) == (1000, STREAM, 1, None)
            attribute = told.attributes.contents  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            assert (attribute.id, attribute.value[0]) == (6, 1)
            run = self.kernel_runs[function - 1]
            return run((params[i][0] for i in range(20)), True)

        pointer = ctypes.POINTER
        types = (
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, pointer(ctypes.c_uint64)),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, pointer(ctypes.c_int)),
            KERNEL,
        )
        return tuple(kind(f) for kind, f in zip(types, (current_stream, is_capturing, launch_kernel)))


@pytest.fixture(params=["library", "kernels"])
def stand_in(module: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[StandIn]:
    made = StandIn(request.param == "kernels")
    monkeypatch.setattr(backends, "BACKENDS", (made.backend(), backends.REFERENCE))
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(plans, "_plans", {})
    make = plans._make
    monkeypatch.setattr(plans, "_make", lambda *arguments: make(*arguments[:-1], True))
    monkeypatch.setattr(node, "load", lambda kind: True)
    monkeypatch.setattr(node, "run", None)
    monkeypatch.setattr(node, "_module", None)
    functions = made.functions()

    def draw(x: torch.Tensor, dropout_p: float, backend: str) -> torch.Tensor:
        return torch.randint(2**62, 2**63 - 1, (1,), dtype=torch.int64)

    monkeypatch.setattr(dropout, "draw", draw)
    node.use(module, *functions, draw)
    yield made
    module.clear()


def make_layer(**options: Any) -> fusedlora.FusedLoRALinear:
    torch.manual_seed(0)
    options = {"bias": True, "r": R, "dtype": BF16, "adapter_dtype": BF16} | options
    layer = fusedlora.FusedLoRALinear(K, N, **options)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def make_x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (M, K)), dtype=BF16, requires_grad=True)


def step(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of x, lora_A and lora_B."""
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)]


def known(layer: torch.nn.Module, stand_in: StandIn, shape: tuple[int, ...] = (M, K)) -> None:
    """Runs the layer once through Python, forward and backward, and forgets that in the log."""
    step(layer, make_x(*shape), torch.ones(*shape[:-1], N, dtype=BF16))
    with torch.no_grad():
        layer(make_x(*shape))
    stand_in.log.clear()


KINDS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((M, K), {"bias": False}),
    "bias": ((M, K), {}),
    "three dimensions": ((2, 3, K), {}),
    "fp32 adapters": ((M, K), {"adapter_dtype": torch.float32}),
    "dropout": ((M, K), {"lora_dropout": 0.5}),
}


@pytest.mark.parametrize(("shape", "options"), KINDS.values(), ids=KINDS)
def test_a_known_kind_runs_without_python_and_gives_the_same(stand_in, shape, options) -> None:
    layer, x = make_layer(**options), make_x(*shape)
    dy = torch.randn(*shape[:-1], N, dtype=BF16)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(1)
        with torch.no_grad():
            y = layer(x)
        return [*step(layer, x, dy), y]

    first = results()
    assert stand_in.log == ["python forward", "python forward", "python backward"]
    stand_in.log.clear()
    layer.last_backend = backends.last_used = backends.last_backward = None
    second = results()
    assert stand_in.log == ["node forward", "node forward", "node backward"]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert layer.last_backend == backends.last_used == backends.last_backward == "triton"
    assert type(second[0]) is torch.Tensor and second[0].grad_fn.name() == "LoRALinearBackward"
    assert not second[-1].requires_grad
    assert len(set(stand_in.places)) == 1, "launches of one stream share words and workspace"


def test_a_backward_tells_who_took_it(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    for thread in (False, True):
        y = layer(x)
        backends.last_used = backends.last_backward = None
        if thread:
            run = threading.Thread(target=y.backward, args=(torch.ones_like(y),))
            run.start()
            run.join()
        else:
            y.backward(torch.ones_like(y))
        assert backends.last_used == backends.last_backward == "triton"
    assert stand_in.log == ["node forward", "node backward"] * 2


@pytest.mark.parametrize(
    ("shape", "options"), [((2, 3, K), {}), ((M, K), {"lora_dropout": 0.5})], ids=["plain", "dropout"]
)
def test_a_backward_that_no_kernels_take(stand_in, shape, options, monkeypatch) -> None:
    kernels = stand_in.backend()
    forward_alone = dataclasses.replace(
        kernels, why_not=lambda call: kernels.why_not(call) if call.direction == "forward" else "slow here"
    )
    monkeypatch.setattr(backends, "BACKENDS", (forward_alone, backends.REFERENCE))
    layer, x = make_layer(**options), make_x(*shape)
    dy = torch.randn(*shape[:-1], N, dtype=BF16)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(1)
        return step(layer, x, dy)

    first = results()
    assert stand_in.log == ["python forward"]
    second = results()
    assert stand_in.log == ["python forward", "node forward"]
    assert second[0].grad_fn.name() == "LoRALinearBackward" and second[1].shape == x.shape
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    y = layer(x)
    assert layer.last_backend == "triton forward + reference backward"
    y.backward(dy)
    assert backends.last_used == "reference"


def test_numbers_are_read_at_each_call(stand_in) -> None:
    layer, x, dy = make_layer(), make_x(), torch.randn(M, N, dtype=BF16)
    known(layer, stand_in)
    for scaling in (3.0, 2, 0.1):
        layer.scaling = scaling
        got = step(layer, x, dy)
        assert stand_in.log == ["node forward", "node backward"]
        layer.backend = "reference"
        expected = step(layer, x, dy)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        layer.backend = "auto"
        stand_in.log.clear()


def test_a_rate_that_is_off_is_the_same_kind(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    layer(x)
    layer.lora_dropout = 0.5
    layer.eval()(x)
    plans._plans.clear()
    layer.lora_dropout = 0.0
    layer(x)
    assert stand_in.log == ["node forward"] * 3


OTHERS = {
    "rows": lambda layer, x: layer(x[:4]),
    "an offset": lambda layer, x: layer(torch.empty(M * K + 1, dtype=BF16)[1:].view(M, K)),
    "strides": lambda layer, x: layer(torch.randn(K, M, dtype=BF16).t()),
    "a frozen x": lambda layer, x: layer(x.detach()),
    "a trained weight": lambda layer, x: layer.requires_grad_()(x),
    "a frozen adapter": lambda layer, x: layer.requires_grad_(False)(x),
    "scaling as a tensor": lambda layer, x: (setattr(layer, "scaling", torch.tensor(2.0)), layer(x))[1],
    "another dropout": lambda layer, x: (setattr(layer, "lora_dropout", 0.1), layer(x))[1],
    "autocast": lambda layer, x: autocast(lambda: layer(x)),
    "a mode": lambda layer, x: under_a_mode(lambda: layer(x)),
    "determinism": lambda layer, x: under(True, layer, x),
    "a capture": lambda layer, x: layer(x),
}


def autocast(run: Any) -> Any:
    with torch.autocast("cpu", torch.float16):
        return run()


def under_a_mode(run: Any) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return run()


def under(deterministic: bool, run: Callable[..., Any], *arguments: Any) -> Any:
    torch.use_deterministic_algorithms(deterministic)
    try:
        return run(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("other", OTHERS)
def test_other_calls_are_pythons(stand_in, other: str, monkeypatch) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    stand_in.captures = other == "a capture"
    try:
        OTHERS[other](layer, x)
    except (RuntimeError, TypeError) as error:  # what the stand-in or the reference takes is not asked here
        assert "node" not in str(error)
    assert "node forward" not in stand_in.log
    stand_in.captures = 0
    layer = make_layer()
    stand_in.log.clear()
    layer(x)
    assert stand_in.log == ["node forward"]


def test_bad_input_is_refused_as_ever(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    with pytest.raises(ValueError, match="weight has in_features 16, x has 8"):
        layer(x[:, :8])
    with pytest.raises(TypeError, match="weight has dtype torch.bfloat16, x has torch.float32"):
        layer(x.float())
    with pytest.raises(ValueError, match="backend is 'none'"):
        fusedlora.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, scaling=1.0, backend="none")
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.vmap(layer)(x[None].detach())


GRADIENTS = {
    "expanded": lambda: torch.ones((), dtype=BF16).expand(M, N),
    "transposed": lambda: torch.randn(N, M, dtype=BF16).t(),
    "misaligned": lambda: torch.randn(M * N + 1, dtype=BF16)[1:].view(M, N),
}


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_a_gradient_that_no_kernel_reads_takes_the_op(stand_in, make) -> None:
    layer, x, dy = make_layer(), make_x(), make()
    known(layer, stand_in)
    got = step(layer, x, dy)
    assert stand_in.log == ["node forward", "op backward"]
    layer.backend = "reference"
    assert all(torch.equal(*pair) for pair in zip(got, step(layer, x, dy), strict=True))


def test_a_captured_backward_takes_the_op(stand_in) -> None:
    layer, x = make_layer(lora_dropout=0.5), make_x(2, 3, K)
    known(layer, stand_in, (2, 3, K))
    y = layer(x)
    stand_in.captures = 1
    y.backward(torch.ones_like(y))
    assert stand_in.log == ["node forward", "op backward"] and x.grad.shape == x.shape


def test_it_is_differentiated_once(stand_in) -> None:
    layer, x, dy = make_layer(), make_x(), make_x(M, N)
    known(layer, stand_in)
    y = layer(x)
    wrt = (x, layer.lora_A, layer.lora_B)
    grads = torch.autograd.grad(y, wrt, dy, create_graph=True)
    assert stand_in.log == ["node forward", "node backward"]
    for grad in grads:
        for tensor in (*wrt, dy):
            with pytest.raises(RuntimeError, match="differentiated only once: it has no double backward"):
                torch.autograd.grad(grad.sum(), tensor, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiated only once"):
            grad.sum().backward(retain_graph=True)


def test_backward_twice(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    y = layer(x)
    y.backward(torch.ones_like(y), retain_graph=True)
    y.backward(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(torch.ones_like(y))


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_a_saved_tensor_must_stay(stand_in, name: str) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    y = layer(x)
    with torch.no_grad():
        (x if name == "x" else getattr(layer, name)).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))
    assert stand_in.log == ["node forward"]


def test_hooks_see_what_is_saved(stand_in) -> None:
    layer, x, dy = make_layer(lora_dropout=0.5), make_x(), torch.randn(M, N, dtype=BF16)
    known(layer, stand_in)
    packed = []
    torch.manual_seed(1)
    expected = step(layer, x, dy)
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t.clone()):
        got = step(layer, x, dy)
    assert stand_in.log == 2 * ["node forward", "node backward"]
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    shapes = [(M, K), (N, K), (R, K), (N, R), (M, R), (1,)]
    assert [tuple(t.shape) for t in packed] == shapes


@pytest.fixture(params=["node", "python"])
def runs(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Who takes calls whose tensors are packed."""
    if request.param == "python":
        monkeypatch.setattr(node, "load", lambda kind: False)
        monkeypatch.setattr(node, "run", None)
    return request.param


@pytest.mark.parametrize("saved", ["x", "weight", "lora_A", "lora_B", "S"])
@pytest.mark.parametrize("change", [torch.Tensor.float, lambda t: t[:1]], ids=["dtype", "shape"])
def test_a_hook_that_gives_back_something_else(
    stand_in, runs: str, change: Callable[[torch.Tensor], torch.Tensor], saved: str
) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    shape = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "S": (M, R)}[saved]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: change(t) if t.shape == shape else t):
        y = layer(x)
    with pytest.raises(RuntimeError, match=f"backward got a .* {saved} of shape .*, where its forward had a"):
        y.backward(torch.ones_like(y))
    assert stand_in.log == [f"{runs} forward"]


@pytest.mark.parametrize("on", [True, False], ids=["then not", "not at first"])
def test_determinism_that_changes_before_backward(stand_in, runs: str, on: bool) -> None:
    """That is not launched by the tuned tables of the other setting, and no such launch is kept for later ones."""
    layer, x, dy = make_layer(), make_x(), torch.randn(M, N, dtype=BF16)
    for _ in range(2):
        y = under(on, layer, x)
        under(not on, y.backward, dy)
    assert set(stand_in.log) == {"python forward", "op backward"}
    under(on, known, layer, stand_in)
    for setting, logged in ((on, f"{runs} backward"), (not on, "op backward")):
        y = under(on, layer, x)
        under(setting, y.backward, dy)
        assert stand_in.log == [f"{runs} forward", logged]
        stand_in.log.clear()


class Watching(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__torch_function__(*args, **kwargs)


def test_a_subclass_is_pythons(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    layer(x.detach().as_subclass(Watching).requires_grad_())
    assert "node forward" not in stand_in.log


def test_a_rate_out_of_range_is_refused_in_eval_too(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    given = layer.weight, layer.lora_A, layer.lora_B, layer.bias
    fusedlora.lora_linear(x, *given, scaling=layer.scaling, dropout_p=0.5, training=False)
    assert stand_in.log == ["node forward"]
    with pytest.raises(ValueError, match="dropout_p is 1.5"):
        fusedlora.lora_linear(x, *given, scaling=layer.scaling, dropout_p=1.5, training=False)


class Hooked(Exception):
    pass


def test_an_error_of_a_hook_comes_through(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)

    def fail(_: Any) -> Any:
        raise Hooked

    with torch.autograd.graph.saved_tensors_hooks(fail, fail), pytest.raises(Hooked):
        layer(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fail):
        y = layer(x)
    with pytest.raises(Hooked):
        y.sum().backward()


def block_of(layer: torch.nn.Module, end: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Two calls of the layer, the second one's input wide enough again, and what comes after them."""
    return lambda x: end(layer(layer(x)[..., :K].contiguous()))


BLOCKS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "the layer last": (lambda y: y, True),
    "a sum last, which saves nothing": (lambda y: y + 1, True),
    "a product last, which saves y": (lambda y: y * y, False),
}


@pytest.fixture(params=["node", "python"])
def by(request: pytest.FixtureRequest, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who runs a known kind of call."""
    if request.param == "python":
        monkeypatch.setattr(node, "run", None)
        monkeypatch.setattr(node, "add", lambda *_: None)
    return request.param


@pytest.mark.parametrize(("end", "s_is_enough"), BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.5}, {"adapter_dtype": torch.float32}], ids=["plain", "dropout", "fp32"]
)
def test_checkpointing(stand_in, by: str, end, s_is_enough: bool, use_reentrant: bool, options) -> None:
    layer, x, dy = make_layer(**options), make_x(), torch.randn(M, N, dtype=BF16)
    known(layer, stand_in)
    block, grads = block_of(layer, end), []
    for wrapped in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        layer.zero_grad()
        x.grad = None
        stand_in.log.clear()
        wrapped(x).backward(dy)
        grads.append([x.grad, layer.lora_A.grad, layer.lora_B.grad])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    # of the last layer nothing is wanted again but S, where checkpointing stops once it has what backward reads
    forward, last = f"{by} forward", "python S" if s_is_enough and not use_reentrant else f"{by} forward"
    assert stand_in.log == [forward, forward, forward, last, f"{by} backward", f"{by} backward"]


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_checkpointing_with_a_frozen_half(stand_in, frozen: str) -> None:
    layer, x, dy = make_layer(), make_x(), torch.randn(M, N, dtype=BF16)
    getattr(layer, frozen).requires_grad_(False)
    wrt = [x, *layer.parameters()]
    wrt = [tensor for tensor in wrt if tensor.requires_grad and tensor is not layer.bias]
    expected = torch.autograd.grad(layer(x), wrt, dy)
    stand_in.log.clear()
    got = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), wrt, dy)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    # with lora_B frozen nothing of the second forward is wanted
    assert stand_in.log == ["python forward", *(["python S"] if frozen == "lora_A" else []), "op backward"]


def test_checkpointing_over_a_quantised_weight(stand_in) -> None:
    layer, x, dy = make_layer(), make_x(), torch.randn(M, N, dtype=BF16)
    decoded = []

    def decode(packed: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        decoded.append(packed)
        return packed.to(BF16)

    weight = QuantisedWeight(torch.randint(-9, 9, (N, K), dtype=torch.int8), (N, K), BF16, decode, fills=False)

    def call(x: torch.Tensor) -> torch.Tensor:
        return quantised_lora_linear(x, weight, layer.lora_A, layer.lora_B, layer.bias, scaling=2.0)

    wrt = x, layer.lora_A, layer.lora_B
    expected = torch.autograd.grad(call(x), wrt, dy)
    y = checkpoint(call, x, use_reentrant=False)
    stand_in.log.clear()
    decoded.clear()
    got = torch.autograd.grad(y, wrt, dy)
    assert stand_in.log == ["python S", "python backward"] and len(decoded) == 1
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    got = torch.autograd.grad(checkpoint(lambda x: call(x) ** 2, x, use_reentrant=False), wrt, dy)
    expected = torch.autograd.grad(call(x) ** 2, wrt, dy)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("why", ["no launch sums it alone", "its plan is gone"])
def test_checkpointing_where_s_takes_a_forward(stand_in, by: str, why: str) -> None:
    layer, x, dy = make_layer(), make_x(), torch.randn(M, N, dtype=BF16)
    known(layer, stand_in)
    expected = step(layer, x, dy)[1:]
    y = checkpoint(layer, x, use_reentrant=False)
    if why == "its plan is gone":
        plans._plans.clear()
    else:
        stand_in.sums_s_alone = False
    stand_in.log.clear()
    y.backward(dy)
    again = "node forward" if by == "node" else "python S"  # Python makes the plan anew
    assert stand_in.log[:1] == [again if why == "its plan is gone" else "python forward"]
    got = x.grad, layer.lora_A.grad, layer.lora_B.grad
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("plan_is_gone", [False, True])
def test_checkpointing_where_s_fails(stand_in, by: str, plan_is_gone: bool) -> None:
    class Kept:
        pass

    kept = []

    def block(x: torch.Tensor) -> torch.Tensor:
        its_own = Kept()
        kept.append(weakref.ref(its_own))
        return layer(x)

    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    y = checkpoint(block, x, use_reentrant=False)
    if plan_is_gone:
        plans._plans.clear()
    stand_in.status = 7
    with pytest.raises(RuntimeError, match="out of luck|cuLaunchKernelEx: error 7") as raised:
        y.backward(torch.ones_like(y))
    assert x.grad is None and layer.lora_A.grad is None
    raised.value.__traceback__ = None
    del y, raised
    gc.collect()
    assert all(own() is None for own in kept), "the error that was replaced holds on to the block"


def nested(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x: checkpoint(lambda x: checkpoint(block, x, use_reentrant=False), x, use_reentrant=False)


def under_a_hook(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def hooked(x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return block(x)

    return lambda x: checkpoint(hooked, x, use_reentrant=False)


def never_stopped(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        with set_checkpoint_early_stop(False):
            return checkpoint(block, x, use_reentrant=False)

    return run


@pytest.mark.parametrize("way", [nested, under_a_hook, never_stopped], ids=lambda way: way.__name__)
def test_other_ways_to_checkpoint(stand_in, by: str, way: Any) -> None:
    layer, x, dy = make_layer(lora_dropout=0.5), make_x(), torch.randn(M, N, dtype=BF16)
    known(layer, stand_in)
    block, wrt = block_of(layer, lambda y: y), (x, layer.lora_A, layer.lora_B)
    found = []
    for wrapped in (block, way(block)):
        torch.manual_seed(2)
        y = wrapped(x)
        found += [torch.autograd.grad(y, wrt, dy, retain_graph=True), torch.autograd.grad(y, wrt, dy)]
    for made in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(made, found[0], strict=True))


@pytest.mark.parametrize("node_first", [False, True])
def test_a_forward_that_the_other_computes_again(stand_in, monkeypatch, node_first: bool) -> None:
    layer, x, dy = make_layer(lora_dropout=0.5), make_x(), torch.randn(M, N, dtype=BF16)
    known(layer, stand_in)
    torch.manual_seed(2)
    expected = step(layer, x, dy)[1:]
    run = node.run
    stand_in.log.clear()
    monkeypatch.setattr(node, "run", run if node_first else None)
    torch.manual_seed(2)
    y = checkpoint(layer, x, use_reentrant=False)
    monkeypatch.setattr(node, "run", None if node_first else run)
    got = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    first = "node" if node_first else "python"
    assert stand_in.log == [f"{first} forward", "python S", f"{first} backward"]


def test_a_hook_of_ones_own_may_look_into_s(stand_in, by: str) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.clone()) or t, lambda t: t):
        layer(x)
    expected = reference.forward(
        x,
        layer.weight,
        layer.lora_A,
        layer.lora_B,
        None,
        None,
        None,
        None,
        save_s=True,
        scaling=layer.scaling,
        dropout_p=0.0,
        adapter_dtype=BF16,
    )[1]
    assert torch.equal(seen[4], expected)


def test_inference_mode(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    expected = layer(x)
    with torch.inference_mode():
        y = layer(x)
    assert stand_in.log == ["node forward"] * 2 and torch.equal(y, expected) and y.is_inference()


def test_a_launch_that_fails(stand_in) -> None:
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    y = layer(x)
    stand_in.status = 7
    match = "cuLaunchKernelEx: error 7" if stand_in.kernels else "could not be launched: out of luck"
    with pytest.raises(RuntimeError, match=match):
        layer(x)
    with pytest.raises(RuntimeError, match=match):
        y.backward(torch.ones_like(y))


def test_threads(stand_in) -> None:
    layer = make_layer()
    known(layer, stand_in)
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(M, K, generator=generator).to(BF16).requires_grad_()
        dy = torch.randn(M, N, generator=generator).to(BF16)
        expected = None
        for _ in range(20):
            got = step(layer, x, dy)
            expected = expected or got
            wrong.extend(pair for pair in zip(got, expected, strict=True) if not torch.equal(*pair))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and set(stand_in.log) == {"node forward", "node backward"}


def test_a_watched_launch_is_pythons(stand_in, monkeypatch) -> None:
    class Chain:
        calls: list[Any] = []

    tell = node.tell
    watched = lambda call, which, recipe: tell(  # noqa: E731
        call, which, dataclasses.replace(recipe, watchers=(Chain(),))
    )
    monkeypatch.setattr(node, "tell", watched)
    layer, x = make_layer(), make_x()
    known(layer, stand_in)
    layer(x)
    assert stand_in.log == ["node forward"]
    monkeypatch.setattr(Chain, "calls", [print])
    layer(x)
    assert stand_in.log == ["node forward", "python forward"]


# What comes to the node from other nodes compiled autograd knows nothing of when it traces.
LOSSES = {
    "the gradient given": lambda y, dy: y.backward(dy),
    "of a product": lambda y, dy: (y * dy).sum().backward(),
    "of a sum": lambda y, dy: y.sum().backward(),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("backward", LOSSES.values(), ids=LOSSES)
def test_compiled_autograd_traces_the_op(backward: Any, backend: str, stand_in) -> None:
    from torch._dynamo import compiled_autograd

    layer, dy = make_layer(), torch.randn(2, 3, N, dtype=BF16)
    if backward is LOSSES["of a sum"]:
        dy = torch.ones_like(dy)
    known(layer, stand_in, (2, 3, K))
    for _ in range(2):  # traced, and from the cache
        x = make_x(2, 3, K)
        _, *expected = step(layer, x, dy)
        layer.zero_grad()
        y = layer(x)
        stand_in.log.clear()
        with compiled_autograd._enable(torch.compile(backend=backend)):
            backward(y, dy)
        assert stand_in.log == ["op backward"]
        got = x.grad, layer.lora_A.grad, layer.lora_B.grad
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_autocast_to_what_the_tensors_have(stand_in) -> None:
    layer, x, dy = make_layer(adapter_dtype=torch.float32), make_x(), torch.randn(M, N, dtype=BF16)
    known(layer, stand_in)
    with torch.autocast("cpu", BF16):
        first = step(layer, x, dy)
        assert stand_in.log == ["python forward", "python backward"], "another kind: its adapter runs in bf16"
        second = step(layer, x, dy)
    assert stand_in.log[2:] == ["node forward", "node backward"]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def loaded(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plans, "_plans", {})
        monkeypatch.setattr(node, "_module", None)
        assert LOAD("cuda"), "anew, after the stand-ins"
        monkeypatch.setattr(node, "load", lambda kind: True)

    def problem(self, M: int, N: int, backend: str, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """A layer of 1024 columns, x and dy."""
        with torch.device("cuda"):
            torch.manual_seed(0)
            layer = fusedlora.FusedLoRALinear(1024, N, r=16, dtype=BF16, **options)
            layer.backend = backend
            torch.nn.init.normal_(layer.lora_B, std=0.1)
            return layer, torch.randn(M, 1024, dtype=BF16, requires_grad=True), torch.randn(M, N, dtype=BF16)

    @pytest.mark.parametrize("M", [16, 300, 2048])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    @pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32])
    @pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
    def test_bits_are_pythons(self, M: int, dropout_p: float, adapter_dtype, backend: str, monkeypatch) -> None:
        if backend == "cuda" and (cuda.missing() or adapter_dtype is torch.float32):
            pytest.skip("the CUDA library is not there or does not take this")
        layer, x, dy = self.problem(M, 1536, backend, adapter_dtype=adapter_dtype, lora_dropout=dropout_p)

        def results() -> list[torch.Tensor]:
            torch.cuda.manual_seed(1)
            return step(layer, x, dy)

        run = node.run
        monkeypatch.setattr(node, "run", None)
        expected = results()
        monkeypatch.setattr(node, "run", run)
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = results()
            torch.cuda.synchronize()
            assert got[0].grad_fn.name() == "LoRALinearBackward"
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))

    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    @pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32])
    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_checkpointing(self, dropout_p: float, adapter_dtype, backend: str, monkeypatch) -> None:
        if backend == "cuda" and cuda.missing():
            pytest.skip("the CUDA library is not there")
        layer, x, dy = self.problem(2048, 4096, backend, adapter_dtype=adapter_dtype, lora_dropout=dropout_p)
        fill_s, filled = PackedPlan.fill_s, []
        monkeypatch.setattr(PackedPlan, "fill_s", lambda plan, *rest: filled.append(plan) or fill_s(plan, *rest))
        run, grads = node.run, []
        wrt = x, layer.lora_A, layer.lora_B
        for way in (None, run, None, run):
            monkeypatch.setattr(node, "run", way)
            wrapped = layer if len(grads) < 2 else lambda x: checkpoint(layer, x, use_reentrant=False)
            torch.cuda.manual_seed(1)
            grads.append(torch.autograd.grad(wrapped(x), wrt, dy))
        assert len(filled) == 2 and filled[0].s_alone is not None
        assert all(torch.equal(first, other) for made in grads[1:] for first, other in zip(grads[0], made, strict=True))
