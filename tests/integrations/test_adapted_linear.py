"""fusedlora under loralib and litgpt: stock and fused layers side by side on the same inputs, dy random."""

import copy
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")  # whose tests' measures are used here
_spec = importlib.util.spec_from_file_location("peft_sides", Path(__file__).with_name("peft_sides.py"))
assert _spec is not None and _spec.loader is not None
sides = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(sides)

K, N = sides.K, sides.N
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32-no-bias": {"bias": False},
    "fp64": {"dtype": FP64},
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": FP16},
    "rank-1": {"r": 1},
    "dropout": {"lora_dropout": 0.3},
    "dropout-bf16": {"dtype": BF16, "lora_dropout": 0.3},
    "dropout-eval": {"lora_dropout": 0.3, "training": False},
    "autocast": {"autocast": BF16},
    "autocast-bf16-base": {"dtype": BF16, "adapter_dtype": FP32, "autocast": BF16},
    "autocast-dropout": {"autocast": BF16, "lora_dropout": 0.3},
    "base-trained": {"train_base": True},
}


class Library:
    """One of the two, under one face."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend: Any = importlib.import_module(f"fusedlora.integrations.{name}")
        self.stock: Any = self.backend.StockLinear
        self.fused: Any = next(kind for kind in vars(self.backend).values() if kind in self.stock.__subclasses__())

    def layer(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = FP32,
        adapter_dtype: torch.dtype | None = None,
        training: bool = True,
        train_base: bool = False,
        r: int = 4,
        **options: Any,
    ) -> Any:
        """A layer K -> N whose every parameter is random."""
        if self.name == "loralib":
            options = {"merge_weights": False} | options  # else eval() merges
        layer = self.stock(K, N, r=r, lora_alpha=6, **options).to(device, dtype)
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.normal_(0.0, 0.3).to(adapter_dtype or dtype)
            elif "weight" in name:
                parameter.requires_grad_(train_base)
        layer.train(training)  # loralib's returns nothing
        return layer

    def with_mask(self, layer: Any, masks: list[torch.Tensor], p: float) -> Any:
        layer.lora_dropout = sides.FixedDropout(list(masks), p)
        return layer

    def fused_calls(self, call: Any) -> tuple[Any, int]:
        before = self.backend.calls["fused"]
        return call(), self.backend.calls["fused"] - before


@pytest.fixture(params=["loralib", "litgpt"])
def library(request: pytest.FixtureRequest) -> Library:
    pytest.importorskip(request.param)
    return Library(request.param)


def compare(library: Library, case: dict[str, Any], device: torch.device) -> None:
    options = dict(case)
    autocast = options.pop("autocast", None)
    stock = library.layer(device, **options)
    fused = library.backend.fuse(copy.deepcopy(stock))
    exact = copy.deepcopy(stock).double()
    x = torch.randn(4, 33, K, device=device).to(options.get("dtype", FP32))
    dy = torch.randn(4, 33, N, device=device)
    with sides.recorded_masks() as masks:
        ours, calls = library.fused_calls(lambda: sides.run(fused, x, dy, autocast))
    assert calls == 1
    p = options.get("lora_dropout", 0.0)
    assert len(masks) == (1 if p and options.get("training", True) else 0)
    if masks:
        stock, exact = (library.with_mask(layer, masks, p) for layer in (stock, exact))
    theirs = sides.run(stock, x, dy, autocast)
    assert len(ours) == 4 + options.get("bias", True) + options.get("train_base", False)
    sides.judge(ours, theirs, sides.run(exact, x.double(), dy.to(theirs["y"].dtype)))


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(library: Library, name: str, device: torch.device) -> None:
    compare(library, CASES[name], device)


@pytest.mark.parametrize("part", ["dA", "dX", "dropout", "nothing"])
def test_a_broken_path_is_noticed(
    library: Library, part: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedlora import functional

    backward = functional.ops.backward

    def wrong(dy: Any, x: Any, weight: Any, A: Any, B: Any, s: Any, mask: Any, *rest: Any) -> Any:
        if part == "dropout":
            mask = ~mask if mask.dtype is torch.bool else mask + 1
        dx, dA, dB = backward(dy, x, weight, A, B, s, mask, *rest)
        return dy @ weight if part == "dX" else dx, -dA if part == "dA" else dA, dB

    monkeypatch.setattr(functional.ops, "backward", wrong)
    if part == "nothing":
        return compare(library, CASES["dropout"], device)
    with pytest.raises(AssertionError):
        compare(library, CASES["dropout"], device)


def test_fuse_and_unfuse(library: Library, device: torch.device) -> None:
    model = nn.Sequential(library.layer(device), nn.Tanh())
    x = torch.randn(3, K, device=device)
    expected, state = model(x), model.state_dict()
    for _ in range(2):
        assert library.backend.fuse(model) is model
        assert type(model[0]) is library.fused
        assert library.fused_calls(lambda: model(x))[1] == 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for _ in range(2):
        assert library.backend.unfuse(model) is model
        assert type(model[0]) is library.stock
        y, calls = library.fused_calls(lambda: model(x))
        assert calls == 0 and torch.equal(y, expected)
    with pytest.raises(ValueError, match="Sequential without a .*Linear: nothing to fuse"):
        library.backend.fuse(nn.Sequential(nn.Linear(2, 2)))


def test_copies_stay_fused(library: Library, device: torch.device) -> None:
    layer = library.backend.fuse(library.layer(device, lora_dropout=0.1))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is library.fused
        assert library.fused_calls(lambda again=again: again(torch.randn(3, K, device=device)))[1] == 1


def test_compiled(library: Library, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = library.backend.fuse(library.layer(device))
    x, dy = torch.randn(5, K, device=device), torch.randn(5, N, device=device)
    seen: list[str] = []

    def keep(graph: Any, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(layer, fullgraph=True, backend=keep)(x)
    assert any("fusedlora.linear" in name for name in seen), seen
    found = sides.run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, dy)
    for key, value in sides.run(layer, x, dy).items():
        torch.testing.assert_close(found[key if key in found else f"_orig_mod.{key}"], value, msg=key)


def test_why_not(library: Library, device: torch.device) -> None:
    why_not = library.backend.why_not
    x = torch.randn(3, K, device=device)

    def reason(change: Any = None, x: Any = x, **options: Any) -> str | None:
        layer = library.backend.fuse(library.layer(device, **options))
        if change is not None:
            change(layer)
        told = why_not(layer, x)
        before = dict(library.backend.calls)
        try:
            layer(x)
        except RuntimeError:  # stock does not take these dtypes either
            assert told is not None
        made = {key for key, count in library.backend.calls.items() if count != before.get(key, 0)}
        assert made == ({"fused"} if told is None else {told} if "own" not in told else made), "as the call itself"
        return told

    def mask(module: nn.Module) -> None:
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())

    assert reason() is None
    assert reason(lora_dropout=0.5) is None
    assert why_not(library.layer(device)) == "fuse(model) has not been called"
    assert "no adapter" in str(reason(r=0))
    assert "merged" in str(reason(lambda layer: setattr(layer, "merged", True)))
    assert "lora_A has dtype" in str(reason(dtype=BF16, adapter_dtype=FP32, x=x.to(BF16)))
    assert "autocast is off" in str(reason(x=x.to(BF16)))
    assert "lora_dropout" in str(reason(lambda layer: setattr(layer, "lora_dropout", lambda x: 2 * x)))
    hook = lambda layer: layer.lora_dropout.register_forward_hook(lambda *given: None)  # noqa: E731
    assert "Dropout has hooks" in str(reason(hook, lora_dropout=0.1))
    assert "forward of its own" in str(reason(lambda layer: setattr(layer, "forward", layer.forward)))
    assert "not exactly" in str(why_not(nn.Linear(2, 2)))
    with torch.nn.modules.module.register_module_forward_hook(lambda *given: None):
        assert "all modules" in str(why_not(library.backend.fuse(library.layer(device, lora_dropout=0.1)), x))


class TestLoralib:
    def layer(self, device: torch.device, **options: Any) -> tuple[Any, Any]:
        """A stock and a fused layer."""
        stock = Library("loralib").layer(device, **options)
        return stock, fuse_loralib(copy.deepcopy(stock))

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("loralib")

    def test_eval_merges_and_train_unmerges(self, device: torch.device) -> None:
        library = Library("loralib")
        stock, fused = self.layer(device, merge_weights=True)
        x = torch.randn(3, K, device=device)
        for mode, calls in ((True, 1), (False, 0), (False, 0), (True, 1)):
            for layer in (stock, fused):
                layer.train(mode)
                assert layer.merged is not mode
            assert torch.equal(fused.weight, stock.weight)
            assert (library.backend.why_not(fused, x) is None) is mode
            y, made = library.fused_calls(lambda: fused(x))
            assert made == calls
            torch.testing.assert_close(y, stock(x), rtol=1e-5, atol=1e-5) if mode else None
            assert mode or torch.equal(y, stock(x))

    def test_fan_in_fan_out_stays(self, device: torch.device) -> None:
        library = Library("loralib")
        stock, fused = self.layer(device, fan_in_fan_out=True)
        x = torch.randn(3, K, device=device)
        y, calls = library.fused_calls(lambda: fused(x))
        assert calls == 0 and torch.equal(y, stock(x))
        assert "fan_in_fan_out" in library.backend.why_not(fused)

    def test_other_layers_are_named(self) -> None:
        import loralib

        why_not = Library("loralib").backend.why_not
        assert "MergedLinear" in why_not(loralib.MergedLinear(8, 12, r=2, enable_lora=[True, False, True]))
        assert "Embedding" in why_not(loralib.Embedding(8, 12, r=2))


def fuse_loralib(layer: Any) -> Any:
    return Library("loralib").backend.fuse(layer)


class TestLitgpt:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("litgpt")

    def test_merge_stays_as_it_is(self, device: torch.device) -> None:
        library = Library("litgpt")
        stock = library.layer(device)
        fused = library.backend.fuse(copy.deepcopy(stock))
        x = torch.randn(3, K, device=device)
        for layer in (stock, fused):
            layer.merge()
        y, calls = library.fused_calls(lambda: fused(x))
        assert calls == 0 and torch.equal(y, stock(x))

    def test_a_replaced_linear_stays(self, device: torch.device) -> None:
        class Other(nn.Linear):
            pass

        library = Library("litgpt")
        layer = library.backend.fuse(library.layer(device))
        layer.linear.__class__ = Other
        assert "linear is a " in library.backend.why_not(layer)
        assert library.fused_calls(lambda: layer(torch.randn(3, K, device=device)))[1] == 0

    def test_a_model_of_its_own(self, device: torch.device) -> None:
        """litgpt's GPT with all of its LoRA switches: logits and the gradients of every adapter."""
        from litgpt.lora import GPT, Config, LoRAQKVLinear, mark_only_lora_as_trainable

        library = Library("litgpt")
        switches = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp", "head")}
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "intermediate_size": 64, "padded_vocab_size": 48}
        stock = GPT(Config(block_size=16, lora_r=4, lora_alpha=8, **switches, **sizes)).to(device)
        mark_only_lora_as_trainable(stock)
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, 0.2)
        fused = library.backend.fuse(copy.deepcopy(stock))
        kinds = [type(module) for module in fused.modules()]
        assert kinds.count(library.fused) == 2 * 3 + 1 and kinds.count(LoRAQKVLinear) == 2
        qkv = next(module for module in fused.modules() if type(module) is LoRAQKVLinear)
        assert "litgpt.lora.LoRAQKVLinear, not exactly" in library.backend.why_not(qkv)

        tokens = torch.randint(48, (2, 16), device=device)
        dy = torch.randn(2, 16, 48, device=device)
        results = []
        for model in (fused, stock):
            y, calls = library.fused_calls(lambda model=model: model(tokens))
            assert calls == (7 if model is fused else 0)
            y.backward(dy)
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append({"y": y.detach()} | gradients)
        assert len(results[0]) == 1 + 2 * (2 * 4 + 1)
        sides.assert_close(*results)
