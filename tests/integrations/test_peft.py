"""fusedlora under PEFT: stock and fused layers side by side, on the same inputs with a random cotangent."""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
# Tests run in importlib mode, where a neighbour is no module to import by name.
_spec = importlib.util.spec_from_file_location("peft_sides", Path(__file__).with_name("peft_sides.py"))
assert _spec is not None and _spec.loader is not None
sides = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(sides)
from peft import LoraConfig, get_peft_model  # noqa: E402

from fusedlora.testing import error_ratios, relative_error  # noqa: E402

backend = sides.backend
Case = sides.Case

pytestmark = pytest.mark.filterwarnings("ignore:.*has no bias. This means that merging")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DORA = (("use_dora", True),)
LORA_BIAS = (("lora_bias", True),)
CASES = {
    "fp32": Case(),
    "fp32-no-bias": Case(bias=False),
    "fp64": Case(FP64),
    "bf16": Case(BF16),
    "fp16": Case(FP16),
    "bf16-fp32-adapters": Case(BF16, FP32),
    "bf16-fp32-adapters-no-bias": Case(BF16, FP32, bias=False),
    "fp16-fp32-adapters": Case(FP16, FP32),
    "bf16-fp32-adapters-autocast": Case(BF16, FP32, autocast=BF16),
    "fp32-autocast": Case(FP32, autocast=BF16),
    "fp32-base-bf16-x-autocast": Case(FP32, x_dtype=BF16, autocast=BF16),
    "bf16-base-fp32-x-autocast": Case(BF16, FP32, x_dtype=FP32, autocast=BF16),
    "bf16-adapters-fp32-x-autocast": Case(BF16, BF16, x_dtype=FP32, autocast=BF16),
    "fp16-base-bf16-autocast": Case(FP16, FP32, autocast=BF16),
    "dropout": Case(dropout=0.3),
    "dropout-bf16": Case(BF16, dropout=0.3),
    "dropout-bf16-fp32-adapters": Case(BF16, FP32, dropout=0.1),
    "dropout-autocast": Case(BF16, FP32, autocast=BF16, dropout=0.3),
    "dropout-eval": Case(dropout=0.3, training=False),
    "rslora": Case(options=(("use_rslora", True), ("r", 5))),
    "rank-1": Case(BF16, FP32, options=(("r", 1),)),
    "lora-bias": Case(options=LORA_BIAS),
    "lora-bias-no-bias": Case(bias=False, options=LORA_BIAS),
    "lora-bias-bf16": Case(BF16, options=LORA_BIAS),
    "lora-bias-bf16-fp32-adapters": Case(BF16, FP32, options=LORA_BIAS),
    "lora-bias-autocast": Case(BF16, FP32, autocast=BF16, options=LORA_BIAS),
    "lora-bias-dropout": Case(BF16, FP32, dropout=0.2, options=LORA_BIAS),
    "bias-trained": Case(options=(("bias", "lora_only"),)),
    "bias-trained-bf16": Case(BF16, FP32, options=(("bias", "all"),)),
    "base-trained": Case(trained=("base_layer",)),
    "A-frozen": Case(frozen=("lora_A",)),
    "B-frozen": Case(BF16, frozen=("lora_B",)),
    "dora": Case(options=DORA),
    "dora-no-bias": Case(bias=False, options=DORA),
    "dora-bf16": Case(BF16, options=DORA),
    "dora-bf16-fp32-adapters": Case(BF16, FP32, options=DORA),
    "dora-autocast": Case(BF16, FP32, autocast=BF16, options=DORA),
    "dora-dropout-eval": Case(dropout=0.3, training=False, options=DORA),
    "dora-base-trained": Case(options=DORA, trained=("base_layer",)),
    "pissa": Case(options=(("init_lora_weights", "pissa"),)),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(name: str, device: torch.device) -> None:
    sides.compare(CASES[name], device)


@pytest.mark.parametrize("shape", [(1,), (), (0,), (2, 0), (1, 1), (2, 3, 4)], ids=str)
def test_every_shape_of_x(shape: tuple[int, ...], device: torch.device) -> None:
    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    x = torch.randn(*shape, sides.K, device=device)
    dy = torch.randn_like(x)
    ours, calls = sides.fused_calls(lambda: sides.run(fused, x, dy))
    theirs = sides.run(stock, x, dy)
    assert calls == 2
    sides.assert_close(ours, theirs)


def test_x_of_strange_strides(device: torch.device) -> None:
    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    for x in (torch.randn(sides.K, 5, device=device).t(), torch.randn(1, sides.K, device=device).expand(4, -1)):
        y, calls = sides.fused_calls(lambda x=x: fused(x))
        assert calls == 2
        torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-4)


def test_without_gradients(device: torch.device) -> None:
    stock = sides.build(Case(BF16, FP32), device)
    fused = backend.fuse(copy.deepcopy(stock))
    x, _ = sides.inputs(Case(BF16), device)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y, calls = sides.fused_calls(lambda: fused(x))
            assert calls == 2 and not y.requires_grad
            torch.testing.assert_close(y, stock(x), rtol=2e-2, atol=2e-2)


def test_gradients_accumulate(device: torch.device) -> None:
    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    for _ in range(2):
        x, dy = sides.inputs(Case(), device)
        for model in (stock, fused):
            model(x).backward(dy)
    ours, theirs = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (fused, stock))
    sides.assert_close(ours, theirs)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_drops_the_same_again(use_reentrant: bool, device: torch.device) -> None:
    case = Case(dropout=0.4)
    model = backend.fuse(sides.build(case, device))
    x, dy = sides.inputs(case, device)
    torch.manual_seed(1)
    plain = sides.run(model, x, dy)
    torch.manual_seed(1)
    found, calls = sides.fused_calls(lambda: sides.run(Checkpointed(model, use_reentrant), x, dy))
    assert calls > 2, "forward and again in backward"
    for key, value in plain.items():
        again = found[key if key in found else f"model.{key}"]
        torch.testing.assert_close(again, value, rtol=0, atol=0, msg=key)


class TestCompiled:
    @pytest.mark.parametrize(
        "name",
        ["fp32", "bf16-fp32-adapters", "bf16-fp32-adapters-autocast", "fp32-autocast", "lora-bias", "dora", "A-frozen"],
    )
    def test_equal_to_eager(self, name: str, device: torch.device) -> None:
        case = CASES[name]
        torch._dynamo.reset()
        model = backend.fuse(sides.build(case, device))
        x, dy = sides.inputs(case, device)
        eager, calls = sides.fused_calls(lambda: sides.run(model, x, dy, case.autocast))
        assert calls == 2
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = sides.run(compiled, x, dy, case.autocast)
        assert found.keys() == {k if k in ("y", "dx") else f"_orig_mod.{k}" for k in eager}
        for key, value in found.items():
            # of whole tensors: single elements of a sum that cancels may be further apart
            error = relative_error(value, eager[key.removeprefix("_orig_mod.")])
            assert error <= 4 * torch.finfo(value.dtype).eps, (key, error)

    @pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
    def test_the_graph_holds_the_fused_op(self, dora: bool, device: torch.device) -> None:
        torch._dynamo.reset()
        case = Case(dropout=0.0 if dora else 0.2, options=DORA if dora else ())
        model = backend.fuse(sides.build(case, device))
        seen: list[str] = []

        def keep(graph: Any, example: Any) -> Any:
            seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph

        torch.compile(model, fullgraph=True, backend=keep)(sides.inputs(case, device)[0])
        op = "fusedlora.dora_linear" if dora else "fusedlora.linear"
        assert sum(op in name for name in seen) == 2, seen
        assert not any("nn.functional.linear" in name or "_C._nn.linear" in name for name in seen), seen

    def test_a_changed_state_is_seen(self, device: torch.device) -> None:
        """Merging, scaling and switching off after compilation: guards let nothing stale through."""
        torch._dynamo.reset()
        stock = sides.build(Case(), device, ("default", "other"))
        fused = backend.fuse(copy.deepcopy(stock))
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        x, _ = sides.inputs(Case(), device)
        changes: list[Any] = [
            lambda m: None,
            lambda m: m.base_model.model.up.set_scale("default", 2.5),
            lambda m: m.set_adapter("other"),
            lambda m: m.base_model.disable_adapter_layers(),
            lambda m: m.base_model.enable_adapter_layers(),
            lambda m: m.merge_adapter(),
            lambda m: m.unmerge_adapter(),
        ]
        for change in changes:
            for model in (stock, fused):
                change(model)
            torch.testing.assert_close(compiled(x), stock(x), rtol=1e-4, atol=1e-4)


def broken(part: str, patch: pytest.MonkeyPatch) -> None:
    """Breaks one thing of the fused path."""
    from fusedlora import functional

    find, linear, rule = functional.find, backend.lora_linear, backend.parts_or_reason

    class WrongPlan:
        """Stands before the plan of any backend: a plan of the kernels calls no op."""

        def __init__(self, plan: Any) -> None:
            self.plan, self.forward = plan, plan.forward

        def backward(self, dy: Tensor, saved: Any, scaling: float, *rest: Any) -> Any:
            _, weight, _, _, _, mask, _ = saved
            if part == "the dropout mask in backward" and mask is not None:
                other = ~mask if mask.dtype is torch.bool else mask + 1
                saved = (*saved[:5], other, saved[6])
            dx, dA, dB = self.plan.backward(dy, saved, scaling, *rest)
            if part == "scaling in dA":
                dA = dA / scaling
            if part == "the sign of dA":
                dA = -dA
            if part == "the LoRA term of dX":
                dx = dy @ weight
            if part == "scaling in dB":
                dB = dB / scaling
            return dx, dA, dB

    def wrong_linear(x: Tensor, *given: Any, **settings: Any) -> Tensor:
        if part == "the dropout":
            settings["dropout_p"] = 0.0
        y = linear(x, *given, **settings)
        return y.float() if part == "the cast of the output" else y

    def wrong_rule(layer: Any, x: Tensor, classes: Any) -> Any:
        merged, layer.merged_adapters = layer.merged_adapters, []
        try:
            return rule(layer, x, classes)
        finally:
            layer.merged_adapters = merged

    patch.setattr(functional, "find", lambda *given: WrongPlan(find(*given)))
    patch.setattr(backend, "lora_linear", wrong_linear)
    if part == "the merged state":
        patch.setattr(backend, "parts_or_reason", wrong_rule)


def contract(device: torch.device) -> None:
    """What every mutant must fail."""
    sides.compare(Case(BF16, FP32, autocast=BF16, dropout=0.3), device)
    sides.compare(Case(BF16, FP32), device)
    stock = sides.build(Case(), device)
    fused = backend.fuse(copy.deepcopy(stock))
    x, _ = sides.inputs(Case(), device)
    for model in (stock, fused):
        model.merge_adapter()
    torch.testing.assert_close(fused(x), stock(x), rtol=0, atol=0)


MUTANTS = [
    "scaling in dA",
    "scaling in dB",
    "the sign of dA",
    "the LoRA term of dX",
    "the dropout mask in backward",
    "the dropout",
    "the cast of the output",
    "the merged state",
]


@pytest.mark.parametrize("part", MUTANTS)
def test_a_broken_path_is_noticed(part: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    contract(device)
    broken(part, monkeypatch)
    with pytest.raises(AssertionError):
        contract(device)


def test_unbroken_the_mutants_wrappers_pass(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    broken("nothing", monkeypatch)
    contract(device)


NUMBERS = {
    "bf16": Case(BF16, BF16, bias=False, options=(("r", 16),)),
    "fp32-adapters": Case(BF16, FP32, bias=False, options=(("r", 16),)),
    "fp32-adapters-autocast": Case(BF16, FP32, bias=False, autocast=BF16, options=(("r", 16),)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_errors_of_a_wide_layer_are_not_above_stocks(name: str, device: torch.device) -> None:
    """y, dx, dA and dB of one layer against float64; at this width luck averages out."""
    case = NUMBERS[name]
    size, rows = 1024, 256
    layer = peft_layer(size, case, device)
    fused = backend.fuse(copy.deepcopy(layer))
    x, dy = (torch.randn(rows, size, device=device, dtype=BF16) for _ in range(2))
    ours, calls = sides.fused_calls(lambda: sides.run(fused, x, dy, case.autocast))
    assert calls == 1
    theirs, exact = sides.run(layer, x, dy, case.autocast), sides.run(layer.double(), x.double(), dy)
    assert len(ours) == 4
    for key, ratio in error_ratios(ours, theirs, exact).items():
        assert ratio <= 1.01, (key, ratio)


def peft_layer(size: int, case: Any, device: torch.device) -> Any:
    net = nn.Sequential(nn.Linear(size, size, bias=False)).to(device, case.dtype)
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, **dict(case.options))
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (parameter.data * 0.3).to(case.adapter_dtype)
    return model.base_model.model[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [None, BF16], ids=["", "autocast"])
def test_no_copy_of_x_is_kept(autocast: torch.dtype | None, dropout: float, device: torch.device) -> None:
    """Under PEFT's default, fp32 adapters over bf16: what three layers over one x keep for backward."""
    case = Case(BF16, FP32, dropout=dropout, autocast=autocast)
    stock = nn.ModuleList(sides.build(case, device).base_model.model.up for _ in range(3))
    fused = backend.fuse(copy.deepcopy(stock))
    x = torch.randn(1024, sides.K, device=device, dtype=BF16, requires_grad=True)

    def kept(layers: nn.ModuleList) -> int:
        """Bytes beside x and the parameters."""
        known = {p.untyped_storage().data_ptr() for p in layers.parameters()} | {x.untyped_storage().data_ptr()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast(x.device.type, autocast or BF16, enabled=autocast is not None),
        ):
            results = [layer(x) for layer in layers]
        assert len(results) == 3
        return sum(saved.values())

    ours, theirs = kept(fused), kept(stock)
    s = 3 * 4 * 4 * x.shape[0]  # three [M, r] of fp32
    mask = 0 if x.is_cuda or not dropout else 3 * x.numel()  # on a CPU dropout keeps its mask, a byte an element
    assert ours <= s + mask + 4096, ours
    assert theirs >= 3 * x.numel() * 2, "which stock keeps"
