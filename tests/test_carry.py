"""What moves along with a swap, both ways: sharing, hooks, attributes, accelerate's wrappers."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedlora import FusedLoRALinear, apply_lora, merge_and_unload, report

pytest.importorskip("transformers")
# Tests run in importlib mode, where a neighbour is no module to import by name.
_spec = importlib.util.spec_from_file_location("fusedlora_model_zoo", Path(__file__).with_name("model_zoo.py"))
assert _spec is not None and _spec.loader is not None
zoo = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(zoo)


def test_a_shared_module_gets_one_adapter() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.ReLU(), shared)})
    apply_lora(model, ["a.0"])
    assert model["a"][0] is model["b"][0] is model["b"][2]
    assert type(model["a"][0]) is FusedLoRALinear and len(report(model).layers) == 1
    merge_and_unload(model)
    assert model["a"][0] is model["b"][0] is model["b"][2] and type(model["a"][0]) is nn.Linear


def test_hooks_and_attributes_carry_over_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.MLP()
    seen: list[str] = []
    fc1 = model.fc1
    fc1.note = "kept"
    handles = [
        fc1.register_forward_pre_hook(lambda m, args: seen.append("pre")),
        fc1.register_forward_hook(lambda m, args, kwargs, y: seen.append("post"), with_kwargs=True),
        fc1.register_full_backward_hook(lambda m, gx, gy: seen.append("backward")),
        fc1.register_state_dict_post_hook(lambda m, state, prefix, local: seen.append("save")),
        fc1.register_load_state_dict_pre_hook(lambda m, *args: seen.append(f"load {m is model.fc1}")),
    ]
    expected = ["pre", "post", "backward", "save", "load True"]

    def run() -> list[str]:
        seen.clear()
        model(torch.randn(2, 20, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(seen)

    assert run() == expected
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr("fusedlora.model._guard_fast_paths", lambda model: 1 / 0)
        apply_lora(model, ["fc1"])
    assert type(model.fc1) is nn.Linear
    assert run() == expected
    apply_lora(model, ["fc1"])
    del fc1
    assert isinstance(model.fc1, FusedLoRALinear) and model.fc1.note == "kept"
    assert run() == expected
    merge_and_unload(model)
    assert type(model.fc1) is nn.Linear and model.fc1.note == "kept" and not hasattr(model.fc1, "lora_alpha")
    assert run() == expected
    for handle in handles:
        handle.remove()
    assert run() == []


def test_accelerate_hooks_carry_over_and_offloaded_layers_are_refused() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    stock = zoo.MLP()
    model = copy.deepcopy(stock)
    hooks.add_hook_to_module(model.fc1, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    zoo.adapted(model, ["fc1"])
    hook, calls = model.fc1._hf_hook, []
    pre_forward = hook.pre_forward
    hook.pre_forward = lambda m, *a, **k: calls.append(m) or pre_forward(m, *a, **k)
    expected = zoo.call("mlp", zoo.eager_twin(stock, model))
    torch.testing.assert_close(zoo.call("mlp", model), expected)
    assert calls == [model.fc1] and isinstance(model.fc1, FusedLoRALinear)
    merge_and_unload(model)
    torch.testing.assert_close(zoo.call("mlp", model), expected)
    assert calls[1:] == [model.fc1] and type(model.fc1) is nn.Linear

    model = copy.deepcopy(stock)
    hooks.add_hook_to_module(model.fc1, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(TypeError, match="offloaded by accelerate"):
        apply_lora(model, ["fc1"])
