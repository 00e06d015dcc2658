"""PEFT's layers over quantised base weights: stock and fused side by side, and how the fused calls read the weight."""

import copy
import dataclasses
import gc
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
_spec = importlib.util.spec_from_file_location("quantised_sides", Path(__file__).with_name("quantised_sides.py"))
assert _spec is not None and _spec.loader is not None
q = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(q)
from fusedlora import quantised  # noqa: E402
from fusedlora.testing import relative_errors  # noqa: E402

sides, backend, Case = q.sides, q.backend, q.Case
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*inputs will be cast from", "ignore:.*instantiated without `get_apply_tensor_subclass`"
)

LORA_BIAS = (("lora_bias", True),)
CASES = {
    f"{kind}-{name}": Case(kind, **options)
    for kind in (*q.FOUR_BIT, *q.EIGHT_BIT, *q.TORCHAO)
    for name, options in {
        "fp32": {"dtype": FP32},
        "bf16-fp32-adapters": {},
        "bf16": {"adapter_dtype": BF16},
        "autocast": {"autocast": BF16},
        "dropout": {"dropout": 0.3},
    }.items()
}
CASES |= {
    "nf4-nested-fp16": Case("nf4-nested", FP16),
    "nf4-no-bias": Case("nf4", bias=False),
    "nf4-lora-bias": Case("nf4", options=LORA_BIAS),
    "nf4-eval": Case("nf4", training=False, dropout=0.3),
    "nf4-nested-autocast-fp32-x": Case("nf4-nested", x_dtype=FP32, autocast=BF16),
    "nf4-autocast-fp32-x-dropout": Case("nf4", x_dtype=FP32, autocast=BF16, dropout=0.2),
    "nf4-autocast-bf16-adapters": Case("nf4", adapter_dtype=BF16, x_dtype=FP32, autocast=BF16),
    "int8-fp16": Case("int8", FP16),
    "int8-no-bias": Case("int8", bias=False),
    "torchao-int8-no-bias": Case("torchao-int8", bias=False),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(name: str, device: torch.device) -> None:
    q.compare(CASES[name], device)


@pytest.mark.parametrize("kind", q.EIGHT_BIT)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_8_bits_decoded_are_nearer_than_an_int8_product(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Stock rounds x to int8 in eval, on a GPU always; with a threshold not the columns of outliers."""
    case = Case(kind, dtype, training=False)
    stock = q.build(case, device)
    fused, exact = backend.fuse(copy.deepcopy(stock)), q.in_float64(stock, case, device)
    x = torch.randn(64, sides.K, device=device).to(dtype)
    x[:, 3] *= 8
    with torch.no_grad():
        ours, calls = sides.fused_calls(lambda: fused(x))
        errors = [relative_errors({"y": y}, {"y": exact(x.double())})["y"] for y in (ours, stock(x))]
    assert calls == 2
    assert errors[0] < errors[1] * (0.5 if dtype is FP16 else 0.9), errors  # bf16's own rounding is in both


@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8"])
class TestMemory:
    SIZE, ROWS = 512, 4

    def chain(self, kind: str, layers: int, device: torch.device) -> Any:
        case = Case(kind)
        net = nn.Sequential(*(nn.Linear(self.SIZE, self.SIZE, bias=False) for _ in range(layers))).to(device)
        for i, linear in enumerate(net):
            net[i] = q.quantised(linear, case, device)
        return backend.fuse(q.peft_model(net, case, [str(i) for i in range(layers)]))

    def x(self, device: torch.device) -> Tensor:
        return torch.randn(self.ROWS, self.SIZE, device=device, dtype=BF16, requires_grad=True)

    def test_the_graph_keeps_the_quantised_weight(self, kind: str, device: torch.device) -> None:
        model = self.chain(kind, 2, device)
        packed = [layer.base_layer.weight for layer in model.base_model.model]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, calls = sides.fused_calls(lambda: model(self.x(device)))
        assert calls == 2
        weights = [tensor for tensor in saved if tensor.numel() >= self.SIZE**2 // 2]
        assert len(weights) == 2 and all(any(w is p for p in packed) for w in weights), [w.shape for w in weights]

        backend.release_buffers()
        gc.collect()
        known = {id(tensor) for tensor in packed}
        dense = [
            t
            for t in gc.get_objects()
            if type(t) is Tensor and id(t) not in known and t.dtype is BF16 and t.numel() >= self.SIZE**2
        ]
        assert not dense, "nothing decoded is alive between forward and backward"
        y.sum().backward()

    def test_peak_memory_does_not_grow_with_the_layers(self, kind: str, device: torch.device) -> None:
        if device.type != "cpu":
            pytest.skip("the profiler's events of the CPU's allocator")

        def peak(layers: int) -> int:
            model, x = self.chain(kind, layers, device), self.x(device)
            backend.release_buffers()
            with torch.profiler.profile(profile_memory=True) as profile:
                model(x).sum().backward()
            held = highest = 0
            events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            for event in sorted(events, key=lambda event: event.start_ns()):
                held += event.nbytes()
                highest = max(highest, held)
            return highest

        dense = self.SIZE**2 * 2
        few, many = peak(2), peak(6)
        assert few >= dense, "a weight was decoded"
        assert many - few < dense / 2, (few, many, dense)

    def test_decoded_again_in_backward_where_dx_is_needed(
        self, kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = self.chain(kind, 2, device)
        decoded: list[str] = []
        dense = quantised.QuantisedWeight.dense
        phase = "forward"
        monkeypatch.setattr(
            quantised.QuantisedWeight, "dense", lambda self, packed: (decoded.append(phase), dense(self, packed))[1]
        )
        y = model(self.x(device).detach())
        phase = "backward"
        y.sum().backward()
        assert decoded == ["forward", "forward", "backward"], "the first layer's x needs no gradient"


def test_stock_torchao_keeps_dense_weights(device: torch.device) -> None:
    """What the fused call does away with there."""
    model = q.build(Case("torchao-int8"), device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(4, sides.K, device=device, dtype=BF16, requires_grad=True))
    assert sum(type(t) is Tensor and t.dtype is BF16 and t.numel() == sides.K * sides.N for t in saved) >= 2


@pytest.mark.parametrize("part", ["backward's weight", "forward's weight", "dropout", "nothing"])
def test_a_broken_path_is_noticed(part: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = quantised._DecodingPlan
    forward, backward = plan.forward, plan.backward

    def wrong_forward(self: Any, given: Any, *rest: Any) -> Any:
        if part == "forward's weight":
            given = (given[0], given[1].data.roll(1, 0), *given[2:])
        return forward(self, given, *rest)

    def wrong_backward(self: Any, dy: Any, saved: Any, *rest: Any) -> Any:
        if part == "backward's weight":
            saved = (saved[0], saved[1].data.roll(1, 0), *saved[2:])
        if part == "dropout":
            mask = saved[5]
            saved = (*saved[:5], ~mask if mask.dtype is torch.bool else mask + 1, saved[6])
        return backward(self, dy, saved, *rest)

    monkeypatch.setattr(plan, "forward", wrong_forward)
    monkeypatch.setattr(plan, "backward", wrong_backward)
    if part == "nothing":
        return q.compare(CASES["nf4-dropout"], device)
    with pytest.raises(AssertionError):
        q.compare(CASES["nf4-dropout"], device)


@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8"])
class TestOperations:
    def sides(self, kind: str, device: torch.device) -> tuple[Any, Any, Tensor]:
        stock = q.build(Case(kind, FP32), device)
        return stock, backend.fuse(copy.deepcopy(stock)), torch.randn(3, sides.K, device=device, requires_grad=True)

    def test_fuse_and_unfuse(self, kind: str, device: torch.device) -> None:
        stock, fused, x = self.sides(kind, device)
        layer = fused.base_model.model.up
        theirs = type(stock.base_model.model.up)
        assert type(layer) is not theirs and isinstance(layer, theirs) and type(layer).__name__ == theirs.__name__
        assert repr(layer).startswith(f"lora.{theirs.__name__}(\n  fusedlora")
        assert stock.state_dict().keys() == fused.state_dict().keys()
        assert sides.fused_calls(lambda: copy.deepcopy(layer)(x))[1] == 1
        backend.unfuse(fused)
        assert type(layer) is theirs
        assert torch.equal(fused(x), stock(x))

    def test_switched_and_rescaled(self, kind: str, device: torch.device) -> None:
        stock, fused, x = self.sides(kind, device)
        for change, calls in (
            (lambda m: m.base_model.model.up.set_scale("default", 2.5), 2),
            (lambda m: m.base_model.disable_adapter_layers(), 0),
            (lambda m: m.base_model.enable_adapter_layers(), 2),
        ):
            for model in (stock, fused):
                change(model)
            before = backend.calls["fused"]
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
            assert backend.calls["fused"] - before == calls

    def test_merged(self, kind: str, device: torch.device) -> None:
        if kind == "torchao-int8":
            pytest.skip("PEFT merges these only in models that transformers has quantised")
        stock, fused, x = self.sides(kind, device)
        with pytest.warns(UserWarning, match="Merge lora module"):
            stock.merge_adapter(), fused.merge_adapter()
        assert backend.why_not(fused.base_model.model.up) == "the adapter is merged into the weight"
        assert torch.equal(fused(x), stock(x))

    def test_checkpointing_and_one_differentiation(self, kind: str, device: torch.device) -> None:
        _, fused, x = self.sides(kind, device)
        dy = torch.randn_like(x)
        plain = sides.run(fused, x, dy)
        x.grad = None
        fused.zero_grad(set_to_none=True)
        checkpoint(fused, x, use_reentrant=False).backward(dy)
        torch.testing.assert_close(x.grad, plain["dx"], rtol=0, atol=0)
        (dx,) = torch.autograd.grad(fused(x), x, dy, create_graph=True)
        with pytest.raises(RuntimeError, match="only once"):
            dx.sum().backward()

    def test_doors_and_report(self, kind: str, device: torch.device) -> None:
        model = q.build(Case(kind, FP32), device)
        x = torch.randn(3, sides.K, device=device)
        assert "neither fuse" in backend.why_not(model.base_model.model.up)
        with backend.enable():
            assert sides.fused_calls(lambda: model(x))[1] == 2
            assert backend.why_not(model.base_model.model.up, x) is None
        before = backend.calls["fused"]
        model(x)
        assert backend.calls["fused"] == before

        case = Case(kind, FP32)
        net = sides.Net().to(device)
        net.up, net.down = q.quantised(net.up, case, device), q.quantised(net.down, case, device)
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind in q.FOUR_BIT, kind in q.EIGHT_BIT
        config = backend.register(peft.LoraConfig(target_modules=["up", "down"], init_lora_weights=False))
        made = peft.get_peft_model(net, config)
        assert sides.fused_calls(lambda: made(x))[1] == 2
        report = backend.report(made)
        assert report.share() == 1.0 and report.layers[0].in_features == sides.K
        assert f"lora.{type(made.base_model.model.up).__name__}  {sides.K}→{sides.N}" in str(report)

    def test_compiled_calls_stay_stock(self, kind: str, device: torch.device) -> None:
        torch._dynamo.reset()
        stock, fused, x = self.sides(kind, device)
        before = dict(backend.calls)
        y = torch.compile(fused, backend="eager")(x)
        assert backend.calls["fused"] == before.get("fused", 0)
        torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-4)


def test_another_librarys_patch_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: Any, x: Any) -> Any:
        return x

    theirs.__module__ = "quicklora"
    model = q.build(Case("nf4"), device)
    stock = type(model.base_model.model.up)
    own = stock.forward
    with backend.enable():
        assert stock.forward is not own
    assert stock.forward is own
    with monkeypatch.context() as patch:
        patch.setattr(stock, "forward", theirs)
        for door in (lambda: backend.fuse(model), lambda: backend.register(peft.LoraConfig()), backend.enable):
            with pytest.raises(RuntimeError, match="Linear4bit.forward has been replaced by quicklora.*theirs"):
                door()
        assert stock.forward is theirs and type(model.base_model.model.up) is stock


class TestWhyNot:
    def reason(self, case: Any, device: torch.device, change: Any = None, x: Any = None) -> str:
        """That of `up`; its call must be stock with the same one."""
        layer = backend.fuse(q.build(case, device)).base_model.model.up
        if change is not None:
            change(layer)
        x = torch.randn(3, sides.K, device=device).to(case.dtype) if x is None else x
        told = backend.why_not(layer, x)
        before = backend.calls["fused"]
        layer(x)
        assert backend.calls["fused"] == before
        assert told is not None
        return told

    def test_four_bits(self, device: torch.device) -> None:
        bnb = pytest.importorskip("bitsandbytes")

        def base(**attributes: Any) -> Any:
            return lambda layer: vars(layer.base_layer).update(attributes)

        x = torch.randn(3, sides.K, device=device)
        case = Case("nf4")
        assert "compute_dtype is not set" in self.reason(case, device, base(compute_type_is_set=False))
        assert "autocast is off" in self.reason(case, device, x=x)
        wide = Case("nf4", bias=False)
        with torch.autocast(device.type, FP16):
            assert "under autocast to torch.float16" in self.reason(wide, device, x=x)
        to_fp32 = lambda layer: setattr(layer.base_layer.bias, "data", layer.base_layer.bias.float())  # noqa: E731
        assert "a stock call converts it" in self.reason(case, device, to_fp32)
        assert "variant of LoRA" in self.reason(Case("nf4", options=(("use_dora", True),)), device)

        raw = bnb.nn.Linear4bit(sides.K, sides.N, compute_dtype=FP32)
        net = nn.Sequential(raw)
        layer = backend.fuse(q.peft_model(net, case, ["0"])).base_model.model[0]
        assert "quant_state is missing" in backend.why_not(layer)
        layer.to(device)
        assert backend.why_not(layer) is None

    def test_the_first_call_sets_the_compute_dtype(self, device: torch.device) -> None:
        layer = backend.fuse(q.build(Case("nf4", FP32), device)).base_model.model.up
        layer.base_layer.compute_type_is_set, layer.base_layer.compute_dtype = False, None
        x = torch.randn(3, sides.K, device=device)
        calls = backend.calls["fused"]
        layer(x)
        assert backend.calls["fused"] == calls
        layer(x)
        assert backend.calls["fused"] == calls + 1

    def test_packed_for_a_cpu(self, device: torch.device) -> None:
        layer = backend.fuse(q.build(Case("nf4", FP32), device)).base_model.model.up
        layer.base_layer.weight.quant_state.packing_format_for_cpu = True
        assert "packed for inference" in backend.why_not(layer)

    def test_eight_bits(self, device: torch.device) -> None:
        case = Case("int8", FP32)
        x = torch.randn(3, sides.K, device=device)
        assert "a stock call converts it" in self.reason(case, device, x=x.to(BF16))
        with torch.autocast(device.type, BF16):
            assert "under autocast" in self.reason(case, device)
        layer = backend.fuse(q.build(case, device)).base_model.model.up
        layer.base_layer.state.has_fp16_weights = True
        assert "fp16 weights" in backend.why_not(layer)
        layer.base_layer.state.has_fp16_weights = False
        layer.base_layer.weight.SCB = layer.base_layer.state.SCB = None
        assert "SCB" in backend.why_not(layer)

    def test_torchao(self, device: torch.device) -> None:
        ao = pytest.importorskip("torchao.quantization")
        case = Case("torchao-int8")
        linear = nn.Linear(sides.K, sides.N).to(device, BF16)
        ao.quantize_(linear, ao.Int8DynamicActivationInt8WeightConfig())
        layer = backend.fuse(q.peft_model(nn.Sequential(linear), case, ["0"])).base_model.model[0]
        assert "quantises x too" in backend.why_not(layer)
        x = torch.randn(3, sides.K, device=device)
        with torch.autocast(device.type, BF16):
            assert "under autocast" in self.reason(case, device, x=x)


def test_the_bare_function(device: torch.device) -> None:
    weight = q.build(Case("int8", FP32), device).base_model.model.up.base_layer
    from fusedlora.integrations.peft_bnb import eight_bit

    x, A, B = (torch.randn(*s, device=device) for s in ((5, sides.K), (4, sides.K), (sides.N, 4)))
    found = eight_bit(weight, x)
    assert isinstance(found, quantised.QuantisedWeight)
    y = quantised.quantised_lora_linear(x, found, A, B, scaling=torch.tensor(0.5, device=device))
    expected = x.double() @ q.dense_weight(weight).t() + 0.5 * (x.double() @ A.double().t()) @ B.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="weight has dtype torch.float32, x has torch.bfloat16"):
        quantised.quantised_lora_linear(x.to(BF16), found, A, B, scaling=1.0)
    with pytest.raises(ValueError, match="lora_A has in_features 7"):
        quantised.quantised_lora_linear(x, found, A[:, :7], B, scaling=1.0)


@pytest.mark.parametrize("kind", q.FOUR_BIT)
def test_four_bits_are_decoded_into_a_buffer(kind: str, device: torch.device) -> None:
    """As on a GPU; a CPU's bitsandbytes has no such kernel, so one is lent to it."""
    pytest.importorskip("bitsandbytes")
    from fusedlora.integrations.peft_bnb import four_bit

    base = q.build(Case(kind, FP32), device).base_model.model.up.base_layer
    x, A, B = (torch.randn(*s, device=device) for s in ((5, sides.K), (4, sides.K), (sides.N, 4)))
    expected = x.double() @ q.dense_weight(base).t() + 0.5 * (x.double() @ A.double().t()) @ B.double().t()
    found = four_bit(base, x)
    filled: list[int] = []

    def into(packed: Any, absmax: Any, blocksize: int, kind: str, shape: Any, dtype: Any, out: Tensor) -> None:
        filled.append(out.data_ptr())
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, blocksize, kind, shape, dtype))

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        if device.type == "cpu":
            assert found.fills is False
            library.impl("dequantize_4bit.out", into, "CPU")
        x.requires_grad_()
        y = quantised.quantised_lora_linear(x, dataclasses.replace(found, fills=True), A, B, scaling=0.5)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert device.type == "cuda" or (len(filled) == 2 and len(set(filled)) == 1), "one buffer, twice"
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    adapter = 0.5 * B.double().sum(0) @ A.double()
    torch.testing.assert_close(dx.double(), (q.dense_weight(base).sum(0) + adapter).expand(5, -1), rtol=1e-4, atol=1e-4)
