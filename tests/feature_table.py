"""Features of a layer, each run on a backend and compared with peft's layer in float64: the cells of test_features.py.

`python -P feature_table.py` with TRITON_INTERPRET=1 runs those of the interpreter and prints {feature: None or the
traceback} as JSON.
"""

import copy
import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from unittest import mock

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusedlora import FusedLoRALinear, backends, dropout
from fusedlora.testing import error_ratios

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
P = 0.3


@dataclasses.dataclass(frozen=True)
class Column:
    """Where a layer runs: what it is asked for, and which backend has to take every call."""

    backend: str
    device: str
    half: torch.dtype
    M: int
    K: int
    N: int
    r: int
    # Of our error over that of peft's layer: what one draw of so many elements gives to luck, a vector more than a
    # matrix, and fp32 adapters, whose last term leaves fp16's range where it stands in for bf16.
    matrix: float = 1.02
    vector: float = 1.1
    fp32_adapters: float = 1.02


COLUMNS = {
    "reference": Column("reference", "cpu", BF16, 250, 96, 128, 16, matrix=1.1, vector=1.4, fp32_adapters=1.1),
    "interpreter": Column("triton", "cpu", FP16, 20, 32, 48, 4, matrix=1.3, vector=1.6, fp32_adapters=2.0),
    "gpu": Column("triton", "cuda", BF16, 500, 512, 768, 16),
}
EVERYWHERE, ON_A_GPU = tuple(COLUMNS), ("gpu",)
Outputs = dict[str, Tensor]


# peft's side


class Masked(nn.Module):
    """Dropout by a given mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask * (1.0 / (1.0 - P))


def peft_twin(layer: FusedLoRALinear, mask: Tensor | None, exact: bool) -> nn.Module:
    """peft's layer with the same numbers, in float64 or in the dtypes that they have."""
    flags = {"use_dora": layer.use_dora, "lora_bias": layer.lora_bias is not None}
    config = peft.LoraConfig(r=layer.r, target_modules=["0"], **flags)
    base = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))
    twin = peft.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
    for name, (owner, attribute) in places(twin).items():
        value = getattr(layer, name)
        if value is not None:
            value = value.detach().clone()
            trains = getattr(layer, name).requires_grad
            setattr(owner, attribute, nn.Parameter(value.double() if exact else value, requires_grad=trains))
    twin.scaling["default"] = float(layer.scaling)
    if mask is not None:
        twin.lora_dropout["default"] = Masked(mask)
    twin.enable_adapters(layer.adapters_enabled)
    for name in places(twin):  # which enable_adapters sets
        if (parameter := parameter_of(twin, name)) is not None:
            parameter.requires_grad_(getattr(layer, name).requires_grad)
    return twin


def places(twin: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    found = {"weight": (twin.base_layer, "weight"), "bias": (twin.base_layer, "bias")}
    A, B = twin.lora_A["default"], twin.lora_B["default"]
    found |= {"lora_A": (A, "weight"), "lora_B": (B, "weight"), "lora_bias": (B, "bias")}
    if "default" in twin.lora_magnitude_vector:
        found["lora_magnitude_vector"] = (twin.lora_magnitude_vector["default"], "weight")
    return found


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    if not hasattr(model, "base_layer"):
        return getattr(model, name)
    owner, attribute = places(model).get(name, (model, ""))
    return getattr(owner, attribute, None)


NAMES = ("weight", "bias", "lora_A", "lora_B", "lora_bias", "lora_magnitude_vector")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: parameter_of(model, name) for name in NAMES}
    return {name: p for name, p in found.items() if p is not None and p.requires_grad}


# ways to run a layer, ours or peft's, forward and backward


@contextmanager
def must_take(model: nn.Module, backend: str | None) -> Iterator[None]:
    """Each forward and each backward of one of our layers takes this backend; None where it runs no op of ours."""
    ours = not hasattr(model, "base_layer")
    backends.last_used = None
    yield
    if ours:
        assert backends.last_used == backend, f"{backends.last_used} took the call, not {backend}"


@dataclasses.dataclass
class Run:
    """A model's inputs and surroundings. `ours` is False for what is compared with."""

    model: nn.Module
    x: Tensor
    dy: Tensor
    backend: str | None
    autocast: torch.dtype | None = None
    ours: bool = False

    def context(self):
        kind = self.x.device.type
        return nullcontext() if self.autocast is None else torch.autocast(kind, dtype=self.autocast)

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with must_take(self.model, self.backend), self.context():
            return call(x)

    def gradients(self, y: Tensor, x: Tensor) -> Outputs:
        leaves = ({"x": x} if x.requires_grad else {}) | trained(self.model)
        with must_take(self.model, self.backend):
            grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype), allow_unused=True)
        return {"y": y.detach()} | {name: grad for name, grad in zip(leaves, grads) if grad is not None}


def once(run: Run, call: Callable[[Tensor], Tensor] | None = None) -> Outputs:
    x = run.x.detach().clone().requires_grad_()
    return run.gradients(run.forward(run.model if call is None else call, x), x)


def frozen_x(run: Run) -> Outputs:
    return run.gradients(run.forward(run.model, run.x), run.x)


def accumulated(run: Run) -> Outputs:
    """Over two parts of the batch."""
    x = run.x.detach().clone().requires_grad_()
    parts = []
    for rows, dy in zip(x.chunk(2), run.dy.chunk(2)):
        parts.append(run.forward(run.model, rows))
        with must_take(run.model, run.backend):
            parts[-1].backward(dy)
    return {"y": torch.cat(parts).detach(), "x": x.grad} | {n: p.grad for n, p in trained(run.model).items()}


def checkpointed(reentrant: bool) -> Callable[[Run], Outputs]:
    def drive(run: Run) -> Outputs:
        if not run.ours:
            return once(run)
        x = run.x.detach().clone().requires_grad_()
        y = run.forward(lambda x: checkpoint(run.model, x, use_reentrant=reentrant), x)
        with must_take(run.model, run.backend):
            y.backward(run.dy)
        return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in trained(run.model).items()}

    return drive


def compiled(run: Run) -> Outputs:
    if not run.ours:
        return once(run)
    torch._dynamo.reset()
    backend = "inductor" if run.x.is_cuda else "aot_eager"
    return once(run, torch.compile(run.model, fullgraph=True, backend=backend))


def scaled(run: Run) -> Outputs:
    """AMP as it is used: the loss multiplied by a GradScaler, which divides the gradients and steps the optimizer."""
    if run.autocast is None:
        return once(run)
    # peft's dA is a sum in fp16: a larger scale overflows it
    scaler = torch.amp.GradScaler(run.x.device.type, init_scale=SCALE)
    optimizer = torch.optim.SGD(trained(run.model).values(), lr=1e-3)
    x = run.x.detach().clone().requires_grad_()
    y = run.forward(run.model, x)
    with must_take(run.model, run.backend):
        scaler.scale((y.float() * run.dy).sum()).backward()
    scaler.unscale_(optimizer)
    before = {name: p.detach().clone() for name, p in trained(run.model).items()}
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE, "a step was skipped"
    assert not any(torch.equal(p, before[name]) for name, p in trained(run.model).items())
    grads = {name: p.grad for name, p in trained(run.model).items()}
    return {"y": y.detach(), "x": x.grad / SCALE} | grads


STEPS, RATE, SCALE = 3, 0.05, 2.0**4


def trained_in_a_graph(run: Run) -> Outputs:
    """What some steps of SGD change: ours forward, backward and step replayed from one CUDA graph."""
    parameters = trained(run.model)
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE, momentum=0.9)
    start = {name: p.detach().clone() for name, p in parameters.items()}

    def step() -> Tensor:
        y = run.forward(run.model, run.x)
        with must_take(run.model, run.backend):
            grads = torch.autograd.grad(y, list(parameters.values()), run.dy.to(y.dtype))
        for parameter, grad in zip(parameters.values(), grads):
            parameter.grad = grad
        optimizer.step()
        return y.detach()

    if run.ours:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(start[name])
                    optimizer.state[parameter]["momentum_buffer"].zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = step()
        for _ in range(STEPS):
            graph.replay()
        torch.cuda.synchronize()
    else:
        for _ in range(STEPS):
            y = step()
    return {"y": y} | {name: p.detach() - start[name] for name, p in parameters.items()}


# the rows


def train_bias(layer: FusedLoRALinear) -> None:
    layer.bias.requires_grad_()


def freeze(*names: str) -> Callable[[FusedLoRALinear], None]:
    def change(layer: FusedLoRALinear) -> None:
        for name in names:
            getattr(layer, name).requires_grad_(False)

    return change


def another_number(layer: FusedLoRALinear) -> None:
    layer.scaling = -0.7


def a_tensor(layer: FusedLoRALinear) -> None:
    layer.scaling = torch.tensor(0.7, device=layer.weight.device)


def another_value(layer: FusedLoRALinear) -> None:
    layer.scaling.fill_(-1.3)


def switch_off(layer: FusedLoRALinear) -> None:
    layer.adapters_enabled = False


@dataclasses.dataclass(frozen=True)
class Feature:
    """A row: how the layer is made, what is done to it, and how it runs."""

    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None  # of the weight; None is the column's
    adapter_dtype: torch.dtype | None = None  # None is the weight's
    autocast: bool = False
    changes: tuple[Callable[[FusedLoRALinear], None], ...] = ()  # a step is run before each but the first
    drive: Callable[[Run], Outputs] = once
    columns: tuple[str, ...] = EVERYWHERE


FEATURES: dict[str, Feature] = {
    "plain": Feature({"bias": False}),
    "bias": Feature(),
    "trained bias": Feature(changes=(train_bias,)),
    "fp32 adapters": Feature(adapter_dtype=FP32),
    "fp32 adapters under autocast": Feature(adapter_dtype=FP32, autocast=True),
    "dropout": Feature({"lora_dropout": P}),
    "dropout, fp32 adapters": Feature({"lora_dropout": P}, adapter_dtype=FP32),
    "DoRA": Feature({"use_dora": True}),
    "DoRA, fp32 adapters": Feature({"use_dora": True}, adapter_dtype=FP32),
    "lora_bias": Feature({"lora_bias": True}),
    "lora_bias without a bias": Feature({"lora_bias": True, "bias": False}),
    "lora_bias, fp32 adapters": Feature({"lora_bias": True}, adapter_dtype=FP32),
    "lora_bias, fp32 adapters under autocast": Feature({"lora_bias": True}, adapter_dtype=FP32, autocast=True),
    "rsLoRA": Feature({"use_rslora": True}),
    "scaling changed": Feature(changes=(lambda layer: None, another_number)),
    "scaling in a tensor": Feature(changes=(a_tensor, another_value)),
    "scaling in a tensor, DoRA": Feature({"use_dora": True}, changes=(a_tensor, another_value)),
    "adapter off": Feature({"lora_dropout": P}, changes=(switch_off,)),
    "frozen A": Feature(changes=(freeze("lora_A"),)),
    "frozen B": Feature(changes=(freeze("lora_B"),)),
    "frozen x": Feature(drive=frozen_x),
    "gradient accumulation": Feature(drive=accumulated),
    "checkpoint": Feature({"lora_dropout": P}, drive=checkpointed(False)),
    "reentrant checkpoint": Feature({"lora_dropout": P}, drive=checkpointed(True)),
    "torch.compile": Feature(drive=compiled),
    "fp16 AMP with GradScaler": Feature(dtype=FP32, adapter_dtype=FP32, autocast=True, drive=scaled, columns=ON_A_GPU),
    "CUDA graph": Feature(adapter_dtype=FP32, drive=trained_in_a_graph, columns=ON_A_GPU),
}


def make_layer(column: Column, feature: Feature) -> FusedLoRALinear:
    dtype = feature.dtype or column.half
    options = {"r": column.r, "lora_alpha": 1.3 * column.r} | dict(feature.options)
    layer = FusedLoRALinear(
        column.K,
        column.N,
        device=column.device,
        dtype=dtype,
        adapter_dtype=feature.adapter_dtype or dtype,
        **options,
    )
    layer.backend = column.backend
    with torch.no_grad():
        layer.lora_A.normal_(std=column.K**-0.5)
        layer.lora_B.normal_(std=column.r**-0.5)
        layer.weight.normal_(std=column.K**-0.5)
        for name in ("bias", "lora_bias"):
            if getattr(layer, name) is not None:
                getattr(layer, name).normal_(std=0.3)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(1 + 0.3 * torch.rand_like(layer.lora_magnitude_vector))
    return layer


@contextmanager
def admitted(column: Column, feature: Feature) -> Iterator[None]:
    """The kernels refuse fp32 adapters over fp16, whose range their terms leave; the interpreter has no bf16."""
    if column is not COLUMNS["interpreter"] or feature.adapter_dtype is None or feature.autocast:
        yield
        return
    triton = dataclasses.replace(backends.TRITON, why_not=lambda call: None)
    with (
        mock.patch.object(backends, "BACKENDS", (triton, backends.REFERENCE)),
        mock.patch.object(backends, "_chosen", {}),
    ):
        yield


def check(column_name: str, feature_name: str) -> None:
    """One cell: AssertionError where an output is further from peft's in float64 than peft's own, or a call strays."""
    column, feature = COLUMNS[column_name], FEATURES[feature_name]
    torch.manual_seed(1)
    layer = make_layer(column, feature)
    dtype = layer.weight.dtype
    x = torch.randn(column.M, column.K, device=column.device, dtype=dtype)
    dy = torch.randn(column.M, column.N, device=column.device, dtype=dtype)
    autocast = None if not feature.autocast else FP16 if dtype is FP32 else dtype
    with admitted(column, feature):
        for n, change in enumerate(feature.changes):
            if n:
                once(Run(layer, x, dy, column.backend, autocast, ours=True))
            change(layer)
        start = copy.deepcopy(layer)
        drawn: list[Tensor] = []
        draw = dropout.draw
        backend = column.backend if layer.adapter_in_use else None
        with mock.patch.object(dropout, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1]):
            ours = feature.drive(Run(layer, x, dy, backend, autocast, ours=True))
    assert layer.last_backend in (backend, None), layer.last_backend
    mask = None
    if layer.lora_dropout and layer.adapter_in_use:
        masks = [dropout.as_mask(seed, column.M, column.K, P, x.device) for seed in drawn]
        mask = masks[0]
        assert all(torch.equal(mask, other) for other in masks), "a checkpoint dropped others again"
        assert (len(masks) == 2) == ("checkpoint" in feature_name)
        assert 0.8 * P < 1 - mask.double().mean() < 1.2 * P
    else:
        assert not drawn
    theirs = feature.drive(Run(peft_twin(start, mask, exact=False), x, dy, None, autocast))
    exact = feature.drive(Run(peft_twin(start, mask, exact=True), x.double(), dy.double(), None))
    assert ours.keys() == theirs.keys() == exact.keys(), (ours.keys(), exact.keys())
    assert {name: out.dtype for name, out in ours.items()} == {name: out.dtype for name, out in theirs.items()}
    if backend is None:
        assert torch.equal(ours["y"], F.linear(x, layer.weight, layer.bias)) and torch.equal(ours["x"], theirs["x"])
    matrix = column.fp32_adapters if feature.adapter_dtype is FP32 and not feature.autocast else column.matrix
    for name, ratio in error_ratios(ours, theirs, exact).items():
        limit = max(matrix, column.vector) if ours[name].dim() == 1 else matrix
        assert ratio <= limit, f"{name}: {ratio:.3f} times peft's error, of {limit}"


def main() -> None:
    found: dict[str, str | None] = {}
    for name, feature in FEATURES.items():
        if "interpreter" in feature.columns:
            try:
                check("interpreter", name)
                found[name] = None
            except Exception:
                found[name] = traceback.format_exc()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
