"""A call whose forward "auto" gives to one backend and its backward to another, with stand-ins for the kernels."""

from typing import Any

import pytest
import torch

import fusedlora
from fusedlora import backends, explanation, plans, reference
from fusedlora.calls import Call
from fusedlora.testing import make_inputs

BF16 = torch.bfloat16


def stand_in(name: str, wanted: set[str], log: list[str]) -> backends.Backend:
    """The formulas under a kernels' name, with launches of their own; it takes the directions that are wanted."""

    def why_not(call: Call) -> str | None:
        return None if call.named or call.direction in wanted else f"{name} is slow here"

    class Launch:
        def __init__(self, direction: str) -> None:
            self.direction = direction

        def launch(self, tensors: tuple[torch.Tensor | None, ...], scaling: float, *noise: Any) -> None:
            log.append(f"{name} launches {self.direction}")
            settings = {"scaling": scaling, "dropout_p": 0.0, "adapter_dtype": BF16}
            if self.direction == "forward":
                *given, y, s = (*tensors, None)[:9]
                x, weight, lora_A, lora_B, bias, *_ = given
                x = x.flatten(0, -2)
                outputs = y.view(-1, y.shape[-1]), s
                made = reference.forward(x, weight, lora_A, lora_B, bias, None, None, None, save_s=True, **settings)
            else:
                dy, x, s, weight, lora_A, lora_B, _, *outputs = tensors
                needs = dict.fromkeys(("need_dx", "need_dA", "need_dB"), True)
                made = reference.backward(dy, x, weight, lora_A, lora_B, s, None, None, **settings, **needs)
            for output, value in zip(outputs, made):
                if output is not None:
                    output.copy_(value)

    def forward(*arguments: Any, **settings: Any) -> Any:
        log.append(f"{name} forward")
        return reference.forward(*arguments, **settings)

    def backward(*arguments: Any, **settings: Any) -> Any:
        log.append(f"{name} backward")
        return reference.backward(*arguments, **settings)

    launchers = lambda device: tuple(lambda *_, d=d, **__: Launch(d) for d in ("forward", "backward"))  # noqa: E731
    return backends.Backend(name, why_not, forward, backward, launchers, optional=name == "cuda")


BOTH = {"forward", "backward"}
# what CUDA's kernels take, and Triton's where those do not
DIRECTIONS = {
    "cuda": (BOTH, BOTH),
    "cuda forward + triton backward": ({"forward"}, BOTH),
    "triton forward + cuda backward": ({"backward"}, BOTH),
    "triton": (set(), BOTH),
    "cuda forward + reference backward": ({"forward"}, set()),
    "reference forward + triton backward": (set(), {"backward"}),
    "reference": (set(), set()),
}


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """Stand-ins for both kernels on CPU tensors; what they were called for."""
    log: list[str] = []
    cuda, triton = DIRECTIONS[request.param]
    made = stand_in("cuda", cuda, log), stand_in("triton", triton, log), backends.REFERENCE
    monkeypatch.setattr(backends, "BACKENDS", made)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(explanation, "_CONFIGS", {})
    monkeypatch.setattr(plans, "_plans", {})
    return log


@pytest.mark.parametrize("two_kernels", DIRECTIONS, indirect=True)
@pytest.mark.parametrize("way", ["ops", "packed"])
def test_auto_may_take_another_backend_for_backward(two_kernels, way: str, monkeypatch, request) -> None:
    told = request.node.callspec.params["two_kernels"]
    takers = told.split()[0], told.split()[-2] if "+" in told else told
    torch.manual_seed(0)
    layer = fusedlora.FusedLoRALinear(64, 72, r=4, dtype=BF16, adapter_dtype=BF16)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 64, dtype=BF16, requires_grad=True)
    wrt, dy = (x, layer.lora_A, layer.lora_B), torch.randn(5, 72, dtype=BF16)
    layer.backend = "reference"
    y = layer(x)
    expected = [y, *torch.autograd.grad(y, wrt, dy)]
    layer.backend = "auto"
    if way == "packed":  # as on a GPU, without the condition that x lies there
        make = plans._make
        monkeypatch.setattr(plans, "_make", lambda *arguments: make(*arguments[:-1], True))
    y = layer(x)
    assert layer.last_backend == told and backends.last_used == takers[0]
    got = [y, *torch.autograd.grad(y, wrt, dy)]
    assert backends.last_used == takers[1]
    verb = "launches " if way == "packed" else ""
    expected_log = [f"{taker} {verb}{direction}" for taker, direction in zip(takers, ("forward", "backward"))]
    assert two_kernels == [line for line in expected_log if not line.startswith("reference")]
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    explained = fusedlora.explain(x, layer)
    assert str(explained).startswith(f"backend: {told}\n") and explained.backend == takers[0]
    assert explained.backward == (None if takers[0] == takers[1] else takers[1])
    assert f"backend {told}" in str(fusedlora.report(layer))
    layer.backend = "triton"
    layer(x)
    assert layer.last_backend == "triton", "a named backend takes both"


@pytest.mark.parametrize("two_kernels", ["cuda forward + triton backward"], indirect=True)
def test_explain_says_which_direction_is_refused(two_kernels, monkeypatch) -> None:
    configs = {name: lambda x, call, n=name: ("one launch", f"{n}'s up", f"{n}'s down") for name in ("cuda", "triton")}
    monkeypatch.setattr(explanation, "_CONFIGS", configs)
    for name in ("_cuda_copies", "_triton_copies"):
        monkeypatch.setattr(explanation, name, lambda *_: ["the same copy"])
    i = make_inputs(5, 64, 72, 3, BF16)
    told = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B)
    assert told.why_not == {
        "cuda": "backward: cuda is slow here",
        "triton": "forward: cuda comes first",
        "reference": "forward: cuda comes first; backward: triton comes first",
    }
    assert told.config == "forward: one launch, cuda's up; backward: one launch, triton's down"
    assert told.copies == ("the same copy",)
    named = fusedlora.explain(i.x, i.weight, i.lora_A, i.lora_B, backend="triton")
    assert named.config == "one launch each way; forward triton's up; backward triton's down"
