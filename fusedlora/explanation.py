"""explain(): which backend a call takes, with which tiles, what it copies, and why the others do not take it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, dora, dropout, tuning
from .arguments import admit, check_magnitude
from .calls import Call, backward_of, describe_call
from .linear import FusedLoRALinear
from .memory import device_memory, row_major, skinny_rows
from .why_not import takes_one_launch


@dataclass(frozen=True)
class Explanation:
    """What a call would do; str() gives it in a few lines."""

    backend: str
    why_not: dict[str, str]  # the reason of each backend that does not take the call, or one direction of it
    config: str | None  # how the kernels are launched, None where no kernel is
    copies: tuple[str, ...]  # tensors that are made beside the outputs, S and T
    backward: str | None = None  # backward's backend, where "auto" takes another one than for forward

    @property
    def taken(self) -> str:
        """The backend in words, or both."""
        return backends.told(self.backend, self.backward)

    def __str__(self) -> str:
        lines = [f"backend: {self.taken}"]
        if self.config is not None:
            lines.append(f"config: {self.config}")
        lines += [f"not {name}: {reason}" for name, reason in self.why_not.items()]
        lines += [f"copy: {copy}" for copy in self.copies]
        return "\n".join(lines)


def explain(
    x: Tensor,
    layer_or_weight: FusedLoRALinear | Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dropout_p: float | None = None,
    training: bool | None = None,
    backend: str | None = None,
) -> Explanation:
    """What `layer(x)`, or lora_linear with these tensors, would do here and now, autocast included. Runs nothing.

    Args:
        x: [..., in_features].
        layer_or_weight: a FusedLoRALinear, which brings all the rest, or weight [out_features, in_features].
        lora_A, lora_B, bias, dropout_p, training, backend: as in lora_linear, beside a weight only.

    Raises what the call would raise for its arguments, but for a named backend that does not take the call: that one
    is answered with its reason in why_not and "none" as the backend. TypeError for arguments that a layer brings.
    """
    names = "lora_A", "lora_B", "bias", "dropout_p", "training", "backend"
    settings = lora_A, lora_B, bias, dropout_p, training, backend
    weight: Tensor
    scaling: float | Tensor = 1.0  # which number it is makes no difference
    magnitude = None
    dora_gain = False
    if isinstance(layer_or_weight, FusedLoRALinear):
        layer = layer_or_weight
        if given_too := [name for name, value in zip(names, settings) if value is not None]:
            raise TypeError(f"{', '.join(given_too)} given beside a FusedLoRALinear, which brings its own")
        layer.require_consistent()
        if not layer.adapter_in_use:
            state = "merged into the weight" if layer.merged else "turned off"
            reasons = {b.name: f"the adapter is {state}" for b in backends.BACKENDS}
            return Explanation("plain linear", reasons, None, ())
        weight, lora_A, lora_B, bias = layer.weight, layer.lora_A, layer.lora_B, layer.bias
        dropout_p, training, backend = layer.lora_dropout, layer.training, layer.backend
        scaling = layer.scaling
        magnitude = layer.lora_magnitude_vector
        dora_gain = layer.use_dora
    else:
        weight = layer_or_weight
        dropout_p = 0.0 if dropout_p is None else dropout_p
        training = training is None or training
        backend = "auto" if backend is None else backend
    if lora_A is None or lora_B is None:
        raise TypeError("explain takes a FusedLoRALinear, or weight, lora_A and lora_B")
    stored_A = lora_A
    given = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
    with torch.no_grad():
        x, weight, lora_A, lora_B, bias, adapter_dtype = admit(
            x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p, backend=backend
        )
    if dora_gain:
        check_magnitude(magnitude, weight, stored_A.dtype)
    scale = scaling if isinstance(scaling, Tensor) else None
    now = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
    copies = [
        f"{name}, cast to {tensor.dtype} by autocast"
        for name, tensor in now.items()
        if tensor is not None and tensor is not given[name]
    ]
    if dora_gain and training and dropout_p > 0.0:
        copies.append("W + scaling · B A, x under the mask, and the result of each operation")
        chosen = "reference" if backend in ("auto", "reference") else "none"
        reasons = {b.name: dora.WITH_DROPOUT for b in backends.BACKENDS if b.name != "reference"}
        return Explanation(chosen, reasons, None, tuple(copies))
    mask = None
    if training and dropout_p > 0.0:
        kind = torch.int64 if dropout.seeded(x, dropout_p, backend) else torch.bool
        mask = torch.empty(0, dtype=kind, device=x.device if dropout.drawn_on_device(x) else None)
    tensors = (x, weight, lora_A, lora_B, mask, scale)
    call = describe_call(backend, *tensors, adapter_dtype, plain=not dora_gain)
    taker, reasons = _taker(backend, call)
    backward, reasons_backward = _taker(backend, backward_of(call))
    config = None
    flat = x.reshape(-1, x.shape[-1])
    configs = {name: _CONFIGS[name](flat, call) for name in (taker, backward) if name in _CONFIGS}
    if backward == taker and taker in configs:
        launches, *both = configs[taker]
        config = "{} each way; forward {}; backward {}".format(launches, *both)
    elif len(configs) == 2:
        (up, up_config, _), (down, _, down_config) = configs[taker], configs[backward]
        config = f"forward: {up}, {up_config}; backward: {down}, {down_config}"
    if "cuda" in configs:
        copies += _cuda_copies(flat, lora_A, lora_B, call)
    if "triton" in configs:
        copies += _triton_copies(flat, lora_A, lora_B, call)
    if taker == "reference":
        if mask is not None:
            copies.append("dropout mask, one byte an element of x; x under the mask")
        if adapter_dtype != x.dtype:
            copies.append(f"x in {adapter_dtype}, for the adapter's products")
    reasons = _of_both(reasons, reasons_backward)
    copies = list(dict.fromkeys(copies))
    return Explanation(taker, reasons, config, tuple(copies), None if backward == taker else backward)


def _taker(backend: str, call: Call) -> tuple[str, dict[str, str]]:
    """The backend that takes a call of one direction, or "none", and why the others do not."""
    reasons = {}
    taker = None
    for candidate in backends.BACKENDS:
        reason = candidate.why_not(call)
        if backend not in ("auto", candidate.name):
            reason = reason or f"backend {backend!r} was asked for"
        elif reason is None and taker is not None:
            reason = f"{taker} comes first"
        if reason is None:
            taker = candidate.name
        else:
            reasons[candidate.name] = reason
    return taker or "none", reasons


def _of_both(forward: dict[str, str], backward: dict[str, str]) -> dict[str, str]:
    """Reasons by backend; one against a single direction says which."""
    reasons = {}
    for name in (b.name for b in backends.BACKENDS if b.name in forward or b.name in backward):
        found = {"forward": forward.get(name), "backward": backward.get(name)}
        if found["forward"] == found["backward"]:
            reasons[name] = forward[name]
        else:
            reasons[name] = "; ".join(f"{direction}: {reason}" for direction, reason in found.items() if reason)
    return reasons


def _cuda_config(x: Tensor, call: Call) -> tuple[str, str, str]:
    """What is launched, and how forward and backward are configured."""
    from .cuda import num_sms
    from .cuda_config import cuda_config

    def config(direction: str) -> str:
        problem = call.problem(x.shape[0], direction, 90, num_sms(call.device))
        if direction == "backward" and call.adapter_dtype is call.dtype and _with_dm(call):
            return f"(heuristic) {cuda_config(problem, False, dora=True)}"
        chosen, why = tuning.choose(tuning.cuda_kernel(direction), problem, call.device, tuning.in_use())
        return f"({why}) {chosen}"

    return "one launch", config("forward"), config("backward")


def _with_dm(call: Call) -> bool:
    """Whether the call is DoRA's and its backward kernel forms dm, with the gain on the rows of W."""
    return not backward_of(call).plain


def _cuda_copies(x: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call) -> list[str]:
    copies = _layout_copies(x, lora_A, lora_B)
    if call.adapter_dtype != call.dtype:
        copies.append(f"lora_A and lora_B as three {call.dtype} terms, and S in backward, written by the launch itself")
    elif call.param_dtype != call.dtype:
        copies.append(f"lora_A and lora_B in {call.dtype}, written by the launch itself")
    return copies


def _layout_copies(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> list[str]:
    copies = []
    if row_major(x).data_ptr() != x.data_ptr():
        copies.append("x, made contiguous: its rows must be contiguous and start at multiples of 16 bytes")
    copies += [f"{n}, made contiguous" for n, t in (("lora_A", lora_A), ("lora_B", lora_B)) if skinny_rows(t) is not t]
    if device_memory(x.device).words_run_out():
        copies.append("synchronisation words, zeroed by a memset in the captured graph")
    return copies


def _triton_config(x: Tensor, call: Call) -> tuple[str, str, str]:
    from fusedlora.kernels.backward import beside_dora
    from fusedlora.kernels.launch import device_facts

    from .config import DecodeConfig
    from .schedule import backward_schedule, forward_schedule

    facts = device_facts(call.device)
    launches = "one launch" if takes_one_launch(call.device) else "a launch for each phase"
    up, down = (call.problem(x.shape[0], direction, *facts) for direction in ("forward", "backward"))
    forward, why_forward = tuning.choose("forward", up, call.device, tuning.in_use())
    backward, why_backward = tuning.choose("backward", down, call.device, tuning.in_use())
    decodes = isinstance(forward, DecodeConfig)  # in one launch wherever it runs
    first = f"({why_forward}) {forward}, " + ("one launch" if decodes else str(forward_schedule(up, forward)))
    if with_dm := _with_dm(call):
        backward = beside_dora(backward)
    plan = backward_schedule(down, backward, True, True, True, dora=with_dm)
    return launches, first, f"({why_backward}) {backward}, {plan}"


_CONFIGS = {"cuda": _cuda_config, "triton": _triton_config}


def _triton_copies(x: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call) -> list[str]:
    from fusedlora.kernels.launch import num_terms

    copies = _layout_copies(x, lora_A, lora_B)
    if terms := num_terms(call.param_dtype, call.adapter_dtype, call.dtype):
        copies.append(f"lora_A and lora_B as {terms} {call.dtype} term(s), written by the launch itself")
    return copies
