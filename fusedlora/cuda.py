"""Launchers of the CUDA C++ kernels (csrc), called through the C interface of the library that cuda_build makes.

A launch's arguments are one C struct, `Arguments` of csrc/arguments.h. What is the same for all calls of a kind is
packed once, the rest at each call, into bytes that no other thread sees.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tuning
from .config import Problem
from .cuda_build import find_library
from .cuda_config import MAX_DECODE, MAX_DECODE_RANK, RANKS_DB_WITH_T, CudaConfig, cuda_config
from .dropout import launch_dropout
from .memory import device_memory, row_major, skinny_rows
from .recipe import SOURCES, Recipe, address

if TYPE_CHECKING:
    from .kernels.backward import Dora

# The struct's members: those that a plan fixes, then those of each call. test_cuda_build.py compares them with C's.
SETTINGS = (
    *("is_bf16", "param_is_float", "bias_is_float", "dm_is_float", "terms"),
    *("block_n", "group", "programs", "shrink_clusters", "slices", "in_tiles", "parts_a", "parts_b", "db_with_t"),
    *("first_job", "decode_rows", "decode_split", "decode_early"),
    *("M", "N", "K", "r", "x_pitch", "dy_pitch", "w_pitch", "a_pitch", "b_pitch"),
)
POINTERS = (
    *("x", "dy", "w", "a", "b", "bias", "gain", "norm", "s", "y", "saved_s", "dx", "da", "db", "dm"),
    *("workspace", "words", "stream"),
)
NUMBERS = ("scaling", "least", "has_seed", "seed", "bound")
# What a recipe fills in by itself, where a launch has it; the names are its sources' but for where S goes.
_HOLES = {name: name for name in (*POINTERS, "scaling", "seed") if name in SOURCES} | {"saved_s": "s"}
_pack_settings = struct.Struct(f"={len(SETTINGS)}q").pack
_pack_rest = struct.Struct(f"={len(POINTERS)}Q2d3q").pack


@functools.cache
def found() -> ctypes.CDLL | str:
    """The library to call, or why there is none."""
    path = find_library()
    if path is None:
        return "its kernels have not been built (python -m fusedlora build)"
    try:
        return library(str(path))
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded ({error})"


def missing() -> str | None:
    """Why there is no library to call, None where there is one."""
    there = found()
    return there if isinstance(there, str) else None


@functools.cache
def library(path: str) -> ctypes.CDLL:
    """The loaded library. Raises OSError or AttributeError where this is none."""
    loaded = ctypes.CDLL(path)
    for function in (loaded.fusedlora_forward, loaded.fusedlora_backward):
        function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_void_p), ctypes.c_int
    loaded.fusedlora_problem.restype = ctypes.c_char_p
    return loaded


class CudaPlan:
    """All that the launches of one kind of call need beside its tensors."""

    def __init__(self, direction: str, device: torch.device, settings: dict[str, int], pointers: list[int]) -> None:
        """pointers stand for those of the calls: which there are, and whether they are aligned to 16 bytes."""
        there = found()
        if isinstance(there, str):
            raise RuntimeError(f"the CUDA kernels cannot be launched: {there}")
        self.library = there
        self.function = getattr(self.library, f"fusedlora_{direction}")
        self.index, self.memory = device.index, device_memory(device)
        self.head = _pack_settings(*(settings.get(name, 0) for name in SETTINGS))
        self.there = {name for name, pointer in zip(POINTERS, pointers) if pointer}
        sizes = (ctypes.c_int64 * 2)()
        self._check(self.function(self.head + _pack_rest(*pointers, 0, 0, 0, 1.0, 0.0, 0, 0, 0), ctypes.byref(sizes)))
        self.work_size, self.num_words = sizes

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"the CUDA kernels could not be launched: {self.library.fusedlora_problem().decode()}")

    def recipe(self, tensors: tuple[str | None, ...], threshold: int | None) -> Recipe:
        """tensors: of what `launch` takes the names; threshold: that of `dropout.launch_dropout`."""
        noise = (0, 0, 0) if threshold is None else (1, 0, threshold)
        names = (*SETTINGS, *POINTERS, *NUMBERS)
        filled = self.there | {"workspace", "words", "stream", "scaling", *(("seed",) if threshold is not None else ())}
        return Recipe(
            function=address(self.function),
            slots=self.head + _pack_rest(*(0 for _ in POINTERS), 0.0, 0.0, *noise),
            holes=tuple((names.index(name), _HOLES[name], 0) for name in filled),
            problem=address(self.library.fusedlora_problem),
            work_size=self.work_size,
            num_words=self.num_words,
        )

    def run(
        self,
        pointers: tuple[int, ...],
        scaling: float,
        seed: Tensor | int | None,
        threshold: int | None,
        least: float = 0.0,
    ) -> None:
        """Launches on the current stream; scaling, seed and threshold are `dropout.launch_dropout`'s, least Dora's."""
        stream = self.memory.of_current_stream()
        work, words = stream.work.take(self.work_size), stream.words(self.num_words)
        noise: tuple[int | None, ...] = (0, 0, 0)
        if seed is not None:
            noise = (2, seed.data_ptr(), threshold) if isinstance(seed, Tensor) else (1, seed, threshold)
        about = work.data_ptr(), words.data_ptr(), stream.stream, scaling, least
        call = self.head + _pack_rest(*pointers, *about, *noise)
        if torch._C._cuda_getDevice() == self.index:
            status = self.function(call, None)
        else:
            with torch.cuda.device(self.index):
                status = self.function(call, None)
        self._check(status)


class ForwardPlan(CudaPlan):
    """y, and S where it is given."""

    def launch(self, tensors: tuple[Tensor | None, ...], *numbers: Any) -> None:
        """tensors: x, weight, lora_A, lora_B, bias, gain, None, y, and S if it is wanted; y is none for S alone."""
        x, weight, lora_A, lora_B, bias, gain, _, y = tensors[:8]
        assert x is not None and weight is not None and lora_A is not None and lora_B is not None
        pointers = (
            x.data_ptr(), 0, weight.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr(),
            _pointer(bias), _pointer(gain), 0, 0,
            _pointer(y), _pointer(tensors[8]) if len(tensors) > 8 else 0, 0, 0, 0, 0,
        )  # fmt: skip
        self.run(pointers, *numbers)


class BackwardPlan(CudaPlan):
    """dX, dA and dB, those that are given, and dm."""

    def launch(
        self,
        tensors: tuple[Tensor | None, ...],
        scaling: float,
        seed: Tensor | int | None,
        threshold: int | None,
        dora: Dora | None = None,
    ) -> None:
        """tensors: dy, x, S, weight, lora_A, lora_B, None, dX, dA, dB; scaling, seed, threshold: `launch_dropout`'s."""
        dy, x, s, weight, lora_A, lora_B, _, dx, da, db = tensors
        dm, y, gain, norm, bias = (None,) * 5 if dora is None else dora.tensors
        pointers = (
            _pointer(x), _pointer(dy), _pointer(weight), _pointer(lora_A), _pointer(lora_B),
            _pointer(bias), _pointer(gain), _pointer(norm), _pointer(s),
            _pointer(y), 0, _pointer(dx), _pointer(da), _pointer(db), _pointer(dm),
        )  # fmt: skip
        self.run(pointers, scaling, seed, threshold, 0.0 if dora is None else dora.least)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def _plan(
    direction: str,
    device: torch.device,
    sizes: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None, torch.dtype | None],
    pitches: tuple[int, int, int, int, int],
    there: tuple[int, ...],
    drops: bool,
    config: CudaConfig | None,
    tuned: bool,
) -> Any:
    """dtypes: of x, the adapter's products, its parameters, the bias and dm. there: for each pointer up to dm 0 where
    there is none, else its address modulo 16, or 16. tuned: whether a table's configuration is taken.
    """
    M, N, K, r = sizes
    dtype, adapter_dtype, param_dtype, bias_dtype, dm_dtype = dtypes
    forward, pointers = direction == "forward", dict(zip(POINTERS, there))
    if config is None:
        sides, precise = (N, K) if forward else (K, N), adapter_dtype is not dtype
        problem = Problem(M, *sides, r, dtype.itemsize, precise, 90, num_sms(device), drops)
        all_wanted = forward or (pointers["dx"] and pointers["da"] and pointers["db"])
        if all_wanted and not pointers["dm"]:
            config, _ = tuning.choose(tuning.cuda_kernel(direction), problem, device, tuned)
        else:
            config = cuda_config(problem, forward, tiles=pointers["dx"] > 0, dora=pointers["dm"] > 0)
    if forward and not pointers["y"]:
        # Where tiles or the decode kernel sum S no other launch gives its bits.
        if config.in_tiles or (config.decode_rows and M <= MAX_DECODE):
            return None
        config = dataclasses.replace(config, shrink_clusters=config.clusters)
    settings = {
        "is_bf16": dtype is torch.bfloat16,
        "param_is_float": param_dtype is torch.float32,
        "bias_is_float": bias_dtype is torch.float32,
        "dm_is_float": dm_dtype is torch.float32,
        "terms": 1 if adapter_dtype is dtype else 3,
        "block_n": config.block_n,
        "group": config.group,
        "programs": config.programs,
        "shrink_clusters": config.shrink_clusters,
        "slices": config.slices,
        "in_tiles": config.in_tiles,
        "parts_a": config.parts,
        "parts_b": config.parts,
        "first_job": config.first_job,
    }
    s_as_it_lies = adapter_dtype is dtype and r in RANKS_DB_WITH_T and pointers["s"] == 16
    if config.db_with_t and s_as_it_lies and pointers["db"] and (pointers["dx"] or pointers["da"]):
        settings["db_with_t"] = True
    # The decode kernel reads A in place.
    in_place = param_dtype is dtype and pointers["a"] == 16 and pitches[3] % 8 == 0
    decodes = forward and not drops and M <= MAX_DECODE and r <= MAX_DECODE_RANK
    if config.decode_rows and decodes and in_place:
        settings |= {f"decode_{name}": getattr(config, f"decode_{name}") for name in ("rows", "split", "early")}
    settings |= dict(zip(SETTINGS[-9:], (*sizes, *pitches)))
    plan = ForwardPlan if forward else BackwardPlan
    return plan(direction, device, settings, list(there))


def _there(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() % 16 or 16 for tensor in tensors)


def forward_plan(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    *,
    scale: None = None,
    gain: Tensor | None = None,
    seed: Tensor | None,
    adapter_dtype: torch.dtype,
    save_s: bool,
    tiles: bool = True,
    config: CudaConfig | None = None,
) -> ForwardPlan | None:
    """The launch for these tensors, x [M, K] as `row_major` and lora_A and lora_B as `skinny_rows` give them.

    It serves all tensors that have their shapes, strides, dtypes and device, and addresses aligned to 16 bytes alike.
    scale is none: nothing else is taken. Without `tiles` S alone, in the same bits; None where no launch does that.
    """
    sizes = (x.shape[0], *weight.shape, lora_A.shape[0])
    dtypes = (x.dtype, adapter_dtype, lora_A.dtype, None if bias is None else bias.dtype, None)
    pitches = (x.stride(0), 0, weight.stride(0), lora_A.shape[1], lora_B.shape[1])
    # y and S come from torch's allocator
    there = (*_there(x, None, weight, lora_A, lora_B, bias, gain, None, None), 16 * tiles, 16 * save_s, 0, 0, 0, 0)
    about = x.device, sizes, dtypes, pitches, there, seed is not None, config
    plan: ForwardPlan | None = _plan("forward", *about, config is None and tuning.in_use())
    return plan


def lora_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    gain: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype,
    save_s: bool,
    config: CudaConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launches the forward kernel.

    Args:
        x: [M, K], bf16 or fp16. Copied where a tensor map can't read it (see `memory.row_major`).
        weight: [N, K] of x's dtype, rows readable by a tensor map.
        lora_A, lora_B: [r, K] and [N, r], x's dtype or fp32, r ≤ 256; fp32 is rounded to adapter_dtype first.
        bias: [N] of x's dtype or fp32, or None.
        scaling: multiplies S in fp32, before it is rounded.
        gain: [N] fp32, multiplies y before the bias; None is 1.
        seed: [1] int64 on the CPU or x's device: of the dropout mask on the adapter's x; None is no dropout.
        dropout_p: its rate.
        adapter_dtype: what S and the adapter's products have: x's dtype, or fp32 over bf16, with parameters in fp32 and
            r ≤ 16, whose products are then formed of three bf16 terms.
        save_s: whether S is wanted back.
        config: tiles and counts; None takes a tuned table's, where it has one and all outputs are wanted, or
            `cuda_config`'s.

    Returns:
        y [M, N] of x's dtype and S [M, r] of adapter_dtype (None unless `save_s`).

    Raises:
        RuntimeError: the driver or the library refused the launch.
    """
    M, N, r = x.shape[0], weight.shape[0], lora_A.shape[0]
    y = x.new_empty(M, N)
    s = x.new_empty(M, r, dtype=adapter_dtype) if save_s else None
    if M > 0:
        x, lora_A, lora_B = row_major(x), skinny_rows(lora_A), skinny_rows(lora_B)
        bias = None if bias is None else bias.contiguous()
        settings = {"gain": gain, "seed": seed, "adapter_dtype": adapter_dtype, "save_s": save_s, "config": config}
        plan = forward_plan(x, weight, lora_A, lora_B, bias, **settings)  # type: ignore[arg-type]
        assert plan is not None
        plan.launch((x, weight, lora_A, lora_B, bias, gain, None, y, s), *launch_dropout(seed, dropout_p, scaling))
    return y, s


def backward_plan(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    *,
    scale: None = None,
    seed: Tensor | None,
    adapter_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    dora: Dora | None = None,
    config: CudaConfig | None = None,
) -> BackwardPlan:
    """The launch for these tensors, dy [M, N] and x as `row_major`, lora_A and lora_B as `skinny_rows` give them.

    It serves all tensors that have their shapes, strides, dtypes and device, and addresses aligned to 16 bytes alike.
    scale is none: nothing else is taken.
    """
    sizes = (*dy.shape, weight.shape[1], lora_A.shape[0])
    pitches = (x.stride(0), dy.stride(0), weight.stride(0), lora_A.shape[1], lora_B.shape[1])
    dm, y, gain, norm, bias = (None,) * 5 if dora is None else dora.tensors
    there = (
        *_there(x, dy, weight, lora_A, lora_B, bias, gain, norm, s, y),
        *(0, *(16 * need for need in needs), 0 if dm is None else 16),
    )
    given = None if bias is None else bias.dtype, None if dm is None else dm.dtype
    dtypes = (dy.dtype, adapter_dtype, lora_A.dtype, *given)
    about = dy.device, sizes, dtypes, pitches, there, seed is not None, config
    plan: BackwardPlan = _plan("backward", *about, config is None and tuning.in_use())
    return plan


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    *,
    scaling: float,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    dora: Dora | None = None,
    config: CudaConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launches the backward kernel.

    Args:
        dy: [M, N], gradient of y. Copied where a tensor map can't read it (see `memory.row_major`).
        x, weight, lora_A, lora_B: as given to `lora_forward`; x only for dA.
        s: [M, r], as `lora_forward` returned it; only for dB.
        scaling, seed, dropout_p, adapter_dtype: as given to `lora_forward`.
        need_dx, need_dA, need_dB: which gradients to compute.
        dora: with need_dB, no dropout and adapter_dtype dy's, what dm is made of and goes to: y and bias contiguous, dm
            of dy's dtype or fp32; weight and lora_B then have the gain on their rows.
        config: tiles and counts, beside dora not `db_with_t`; None takes a tuned table's, where it has one, all outputs
            are wanted and there is no dora, or `cuda_config`'s.

    Returns:
        dX [M, K] of dy's dtype, dA [r, K] and dB [N, r] of their parameters' dtypes, None where not needed.

    Raises:
        RuntimeError: the driver or the library refused the launch.
    """
    (M, N), (r, K) = dy.shape, lora_A.shape
    dx = dy.new_empty(M, K) if need_dx else None
    da = lora_A.new_empty(r, K) if need_dA else None
    db = lora_B.new_empty(N, r) if need_dB else None
    if M == 0:
        return dx, da if da is None else da.zero_(), db if db is None else db.zero_()
    if not (need_dx or need_dA or need_dB):
        return dx, da, db
    dy, lora_A, lora_B = row_major(dy), skinny_rows(lora_A), skinny_rows(lora_B)
    x = row_major(x) if need_dA and x is not None else dy
    s = s.contiguous() if need_dB and s is not None else None
    needs = (need_dx, need_dA, need_dB)
    plan = backward_plan(
        dy, x, weight, lora_A, lora_B, s, seed=seed, adapter_dtype=adapter_dtype, needs=needs, dora=dora, config=config
    )
    tensors = (dy, x, s, weight, lora_A, lora_B, None, dx, da, db)
    plan.launch(tensors, *launch_dropout(seed, dropout_p, scaling), dora=dora)
    return dx, da, db
