"""Which modules read a child's weight in their forward instead of calling the child.

Such an owner would compute with the base weight alone, past the adapter, and nothing would fail. So the source of
every owner's forward is searched for `self.<child>.weight`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

import torch
from torch import nn

Path = tuple[str, ...]

# What may be asked of a weight without computing with it.
_METADATA = frozenset(
    "device dtype dim element_size is_contiguous is_cuda is_floating_point is_meta is_quantized itemsize layout ndim "
    "numel requires_grad shape size stride".split()
)
# Calls that look at a tensor's type or take its dtype and device.
_LOOKS = frozenset(("isinstance", "type", "to", "type_as", "id", "is_floating_point"))


def reader_of_weight(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Who reads the weight of the module called `name` past its forward, and the remedy; None if no one does.

    Args:
        name: a full dotted name.
        modules: every module of the model by every full name, the root under "".

    Source that can't be found (a class typed at a prompt) is taken to call its children, as most do, and a weight
    read through a local variable is not seen.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = modules[".".join(parts[:depth])]
        reads = weight_reads(type(owner))  # type: ignore[arg-type]  # mypy takes Module's __hash__ for its class's
        if not any(_covers(path, tuple(parts[depth:])) for path in reads):
            continue
        title = f"{type(owner).__name__} {'.'.join(parts[:depth]) or '(the model itself)'}"
        if isinstance(owner, nn.TransformerEncoderLayer):
            if fast_path_possible(owner) and torch.backends.mha.get_fastpath_enabled():
                return (
                    f"its owner, {title}, reads its weight in the fused inference path instead of calling it; call "
                    "torch.backends.mha.set_fastpath_enabled(False) first, or build the layer with batch_first=False"
                )
        elif not _never_reads(owner):
            return (
                f"its owner, {title}, reads its weight instead of calling it, so an adapter would be ignored there; "
                f"leave it out (exclude_modules) or let {type(owner).__name__} call the module"
            )
    return None


def fast_path_possible(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether eval may take the fused path as the layer is built, torch.backends.mha's switch and hooks aside."""
    attention = layer.self_attn
    return bool(
        attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
    )


def _never_reads(owner: nn.Module) -> bool:
    # Bloom slices its weights only to imitate tensor parallelism, off by default; otherwise it calls its linears.
    sliced = getattr(owner, "pretraining_tp", 1) > 1 and getattr(owner, "slow_but_exact", False)
    return type(owner).__name__ in ("BloomAttention", "BloomMLP") and not sliced


@functools.cache
def weight_reads(cls: type) -> frozenset[Path]:
    """Paths below `self` whose `.weight` the forward of `cls`, or a method it calls, computes with.

    `self.mlp.fc.weight` is ("mlp", "fc"); a subscript is "*".
    """
    reads: set[Path] = set()
    seen: set[FunctionType] = set()
    waiting = list(_implementations(cls, "forward", own=True))
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        tree = _syntax(function)
        if tree is None or not tree.args.args:
            continue
        me = tree.args.args[0].arg
        exempt = _looked_at(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            path = _path_below(me, node)
            if path is None:
                if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super":
                    waiting += _implementations(cls, node.attr, own=False)
            elif len(path) == 1:
                waiting += _implementations(cls, path[0], own=True)
            elif path[-1] == "weight" and isinstance(node.ctx, ast.Load) and node not in exempt:
                reads.add(path[:-1])
    return frozenset(reads)


def _implementations(cls: type, name: str, *, own: bool) -> Iterator[FunctionType]:
    """The plain function behind a method or property; with own=False also those that super() may reach."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        member = base.__dict__.get(name)
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        function = inspect.unwrap(member) if callable(member) else None
        if isinstance(function, FunctionType):
            yield function
            if own:
                return


def _syntax(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _looked_at(tree: ast.AST) -> set[ast.AST]:
    """Nodes used only for their type, dtype, device or shape, or compared with None."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            found.add(node.value)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in _LOOKS:
                found.update(node.args)
        elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            found.update((node.left, *node.comparators))
    return found


def _path_below(me: str, node: ast.expr) -> Path | None:
    parts: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        parts.append(node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    return tuple(reversed(parts)) if isinstance(node, ast.Name) and node.id == me and parts else None


def _covers(path: Path, parts: Path) -> bool:
    return len(path) == len(parts) and all(a in ("*", b) for a, b in zip(path, parts))
