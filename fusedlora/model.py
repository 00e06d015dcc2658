"""Whole models: swap their linears for FusedLoRALinear, freeze the rest, merge, unload.

    model = apply_lora(model, target_modules="all-linear", r=16)
    print(report(model))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

Which modules are taken and why others aren't is in `targets.py`; what moves along with a swap in `carry.py`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from fusedlora import carry
from fusedlora.adapter_config import BIASES
from fusedlora.layer_options import check_finite, check_size
from fusedlora.linear import FusedLoRALinear
from fusedlora.summary import RECORD, Applied, LayerReport, Report, applied, report
from fusedlora.targets import names_in, per_module, select
from fusedlora.ties import tied_by_config, tied_weights
from fusedlora.weight_reads import fast_path_possible
from fusedlora.wrappers import require_module, uncompiled

__all__ = [
    "Applied",
    "LayerReport",
    "Report",
    "applied",
    "apply_lora",
    "lora_parameters",
    "merge_and_unload",
    "merge_lora",
    "report",
    "unmerge_lora",
]


def apply_lora(
    model: nn.Module,
    target_modules: str | Iterable[str],
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    *,
    exclude_modules: str | Iterable[str] | None = None,
    modules_to_save: Iterable[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    bias: Literal["none", "all", "lora_only"] = "none",
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Swap the nn.Linear modules of `model` for FusedLoRALinear, in place, freeze the rest, and return the model.

    Weights are shared, not copied; hooks and attributes of a swapped module carry over. A module under several names
    is swapped under all of them. Only modules whose type is exactly nn.Linear and that their owner calls are swapped:
    one that isn't raises when it is named and is listed in `report(model).skipped` under "all-linear". The rules for
    names and patterns are PEFT's.

    Where a model of Hugging Face's kind has activation checkpointing on, now or later, the output of its input
    embedding is made to require a gradient; a model that calls torch.utils.checkpoint by itself must not use the
    reentrant form on a frozen input.

    Everything is checked before anything changes: on an error, also on a warning turned into one, the model is as it
    was.

    Args:
        model: any nn.Module without adapters; not yet wrapped by DDP or FSDP.
        target_modules: a list of full names or dotted endings of names; a regular expression for the whole name; or
            "all-linear", every nn.Linear but the output embedding and the classification head of a Hugging Face model.
        r: rank; a module's own where rank_pattern has one.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; alpha_pattern as rank_pattern.
        lora_dropout: rate of the dropout on the adapters' input, in [0, 1).
        exclude_modules: a list or a regular expression as above; these are passed over.
        modules_to_save: names or endings of modules to train in full, such as a new head; not swapped.
        rank_pattern, alpha_pattern: {pattern: value}; the first pattern that matches the end of a name, from a dot on.
        use_dora: DoRA, as in FusedLoRALinear.
        lora_bias: a bias on every lora_B, as in FusedLoRALinear.
        bias: which biases of the model train beside the adapters: "none", those of the swapped modules ("lora_only"),
            or every parameter called bias ("all"). Switching adapters off does not take their training back.
        adapter_dtype: dtype of the adapters; None means float32 over a 16-bit weight.

    Raises:
        TypeError: a named module can't be swapped (the message has its type and the remedy), or a misfit argument.
        ValueError: nothing matches, the model has adapters already, a value out of range, lora_bias with use_dora, or
            modules_to_save names one of two tied modules.

    Warns where a name matches no module, and where a target's weight is tied to another module's: it trains, but
    merging is refused until it is untied.
    """
    if bias not in BIASES:
        raise ValueError(f"bias is {bias!r}, must be one of {', '.join(BIASES)}")
    to_save = names_in(() if modules_to_save is None else modules_to_save)
    if to_save is None:
        raise TypeError(f"modules_to_save is {modules_to_save!r}, must be a list of module names")
    given, model = model, uncompiled(model)
    selection = select(model, target_modules, exclude_modules, to_save)
    ranks = per_module("rank_pattern", rank_pattern, selection.linears, r, check_size)
    alphas = per_module("alpha_pattern", alpha_pattern, selection.linears, lora_alpha, check_finite)
    for pair in tied_weights(selection.modules, selection.linears):
        warnings.warn(f"{pair}: the adapter trains, but merging is refused until they are untied", stacklevel=2)

    undo: list[Callable[[], object]] = []
    for parameter in model.parameters():
        undo.append(lambda p=parameter, flag=parameter.requires_grad: p.requires_grad_(flag))  # type: ignore[misc]
    try:
        new: dict[nn.Module, nn.Module] = {}
        for name, linear in selection.linears.items():
            layer = FusedLoRALinear.from_linear(
                linear,
                r=ranks[name],
                lora_alpha=alphas[name],
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                use_dora=use_dora,
                lora_bias=lora_bias,
                adapter_dtype=adapter_dtype,
            )
            layer.train(linear.training)
            carry.carry_in(linear, layer)
            new[linear] = layer
        undo.append(lambda: carry.drop_hooks(model))
        _replace(model, new, undo)
        trained = {
            id(p)
            for layer in new.values()
            if isinstance(layer, FusedLoRALinear)
            for p in layer.adapter_parameters.values()
        }
        trained |= {id(p) for m in selection.saved.values() for p in m.parameters() if p.is_floating_point()}
        trained |= {id(p) for p in bias_parameters(model, bias).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        _watch_checkpointing(model)
        _guard_fast_paths(model)
        record = Applied(tuple(to_save), tuple(selection.saved), selection.skipped, bias)
        model.__dict__[RECORD] = record
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return given


def bias_parameters(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    """The biases that `bias` trains, by full name; those of modules_to_save and of lora_B may be among them."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        parameter = module._parameters.get("bias")
        if parameter is not None and parameter.is_floating_point():
            if bias == "all" or (bias == "lora_only" and isinstance(module, FusedLoRALinear)):
                found[f"{name}.bias" if name else "bias"] = parameter
    return found


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters of every layer, each once; not those of modules_to_save, nor the biases that train."""
    return [p for layer in _layers(model).values() for p in layer.adapter_parameters.values()]


def merge_lora(model: nn.Module, *, keep_base: Literal["cpu", "device", False] = "cpu") -> nn.Module:
    """Merge every adapter of `model` into its weight, in place, and return the model; merged layers are left alone.

    Args:
        model: a model with FusedLoRALinear layers.
        keep_base: where the base weights wait for `unmerge_lora`, as in FusedLoRALinear.merge; False drops them.

    Raises, with no layer merged:
        TypeError: `model` is no nn.Module.
        ValueError: there is no adapter, a merged weight would not be finite, the model is sharded by fully_shard, or a
            weight is tied to another module's: merging would untie them in memory, and a checkpoint loads them tied.
        RuntimeError: a layer's weight is on the meta device, sharded over ranks (tensor parallelism) or computed by a
            parametrization. This and the weight that is not finite come with the layer's name.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no FusedLoRALinear; call apply_lora first")
    if any(hasattr(module, "unshard") and hasattr(module, "reshard") for module in model.modules()):
        raise ValueError(
            "model is sharded by fully_shard, which would put the unmerged weights back: load its full state_dict into "
            "a plain model and merge that one"
        )
    layers = {name: layer for name, layer in layers.items() if not layer.merged}
    modules = dict(model.named_modules())
    if tied := tied_weights(modules, layers) or tied_by_config(modules, layers):
        raise ValueError(
            "\n".join(f"{pair}; merging would change one and not the other" for pair in tied)
            + "\nuntie first: give the layer a weight of its own (layer.weight = nn.Parameter(layer.weight.clone(), "
            "requires_grad=False)) and set model.config.tie_word_embeddings = False where there is one"
        )
    done: list[FusedLoRALinear] = []
    try:
        if keep_base is False:
            # Without a base there is no way back, so every weight is tried before the first is replaced.
            for name, layer in layers.items():
                with _naming(name):
                    layer.merged_weight()
                    layer.merged_bias()
        for name, layer in layers.items():
            with _naming(name):
                layer.merge(keep_base=keep_base)
            done.append(layer)
    except BaseException:
        if keep_base is not False:
            for layer in done:
                layer.unmerge()
        raise
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put the base weights back under every merged adapter, bit for bit, and return the model.

    Raises ValueError where no layer is merged, and RuntimeError, with nothing unmerged, where a base was not kept.
    """
    layers = {name: layer for name, layer in _layers(model).items() if layer.merged}
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no merged FusedLoRALinear")
    if lost := [name for name, layer in layers.items() if not layer.can_unmerge]:
        raise RuntimeError(f"{', '.join(lost)}: the base weight was not kept (merged with keep_base=False)")
    for layer in layers.values():
        layer.unmerge()
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge every adapter and put plain nn.Linear modules back under the original names; returns the model.

    Afterwards nothing of fusedlora is left on it and `save_pretrained` writes a stock checkpoint. Base weights are not
    kept. Parameters stay frozen as they are. A model that is itself a FusedLoRALinear is not changed in place: the
    returned nn.Linear takes its weight. Raises as `merge_lora`, and then changes nothing.

    With lora_bias a linear that had no bias gets one, which warns: what loads such a checkpoint must have it too.
    """
    if without := [n for n, m in _layers(model).items() if m.bias is None and m.lora_bias is not None]:
        warnings.warn(
            f"lora_bias gives {', '.join(without[:3])} ({len(without)} in all) a bias: a model class that builds them "
            "without one drops it on loading",
            stacklevel=2,
        )
    merge_lora(model, keep_base=False)
    new: dict[nn.Module, nn.Module] = {layer: _plain(layer) for layer in _layers(model).values()}
    if model in new:
        return new[model]
    _replace(model, new, [])
    carry.drop_hooks(model)
    for module in model.modules():  # apply_lora may have been given a part of it
        module.__dict__.pop(RECORD, None)
    return model


def _layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    require_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if type(error) not in (ValueError, RuntimeError):  # such as OutOfMemoryError, which callers may wait for
            raise
        raise type(error)(f"{name or 'the layer'}: {error}; nothing was merged") from error


def _plain(layer: FusedLoRALinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = layer.weight
    linear.register_parameter("bias", layer.bias)
    linear.train(layer.training)
    carry.carry_out(layer, linear)
    return linear


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module], undo: list[Callable[[], object]]) -> None:
    """Put `new[m]` wherever `m` is a child, and append to `undo` what takes each step back."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in new:
                undo.append(functools.partial(parent._modules.__setitem__, key, child))
                parent._modules[key] = new[child]
    for old, module in new.items():
        undo.append(functools.partial(carry.rebind, old))
        carry.rebind(module)


def _watch_checkpointing(model: nn.Module) -> None:
    flagged = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not flagged:
        return
    hook = carry.InputGradients(flagged)
    embeddings: set[nn.Module] = set()
    for module in model.modules():
        ask = getattr(module, "get_input_embeddings", None)
        if not callable(ask):
            continue
        try:
            embedding = ask()
        except (NotImplementedError, AttributeError):
            continue  # a Hugging Face model without one, such as a model of audio features
        if isinstance(embedding, nn.Module) and embedding not in embeddings:
            embeddings.add(embedding)
            embedding.register_forward_hook(hook)


def _guard_fast_paths(model: nn.Module) -> None:
    for owner in model.modules():
        if isinstance(owner, nn.TransformerEncoderLayer) and fast_path_possible(owner):
            inside = [layer for layer in owner.modules() if isinstance(layer, FusedLoRALinear)]
            if inside:
                owner.register_forward_pre_hook(carry.FastPathGuard(inside))
