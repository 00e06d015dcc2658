"""DoRA's launch before the forward kernel: the gain on the columns of y.

    norm = ‖W + scaling · B A‖ per row            gain = magnitude / norm

The norm needs one pass over W in any form. Expanded into ‖W‖² + 2s·ΣB∘(W Aᵀ) + s²·Σ(B A Aᵀ)∘B that pass is W Aᵀ, which
multiplies as often as B A does; so each tile of W + s·BA is formed where it is squared, in registers. That has nothing
to cancel, however the two compare, and no ‖W‖² to be kept and to go stale.
"""

import functools

import torch
import triton
import triton.language as tl

from fusedlora.config import block_r, cdiv
from fusedlora.kernels.common import begin_early, load_skinny, next_term
from fusedlora.kernels.launch import PRECISION, Launcher, alignment, device_facts, early_constants
from fusedlora.memory import device_memory, skinny_rows

# Parts of a row of W, whose squares different programs sum.
MAX_PARTS = 16


@triton.jit
def add_product(left, right, acc, dtype: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left @ right, both cast to dtype; fp32 ones may go in as two or three 16-bit TERMS each."""
    if TERMS > 1:
        left_high, left = next_term(left, dtype)
        left_middle, left = next_term(left, dtype)
        right_high, right = next_term(right, dtype)
        right_middle, right = next_term(right, dtype)
        if TERMS > 2:
            acc = tl.dot(left.to(dtype), right_high, acc)
            acc = tl.dot(left_high, right.to(dtype), acc)
            acc = tl.dot(left_middle, right_middle, acc)
        acc = tl.dot(left_middle, right_high, acc)
        acc = tl.dot(left_high, right_middle, acc)
        return tl.dot(left_high, right_high, acc)
    return tl.dot(left.to(dtype), right.to(dtype), acc, input_precision=PRECISION)


@triton.jit
def sum_of_parts(partial_ptr, parts, N, n_offs, inside):
    """Columns n_offs of partial [parts, N], summed over the parts in index order."""
    total = tl.zeros(n_offs.shape, tl.float32)
    p_offs = tl.arange(0, 16)
    for first in range(0, parts, 16):
        ptrs = partial_ptr + (first + p_offs)[:, None] * N + n_offs[None, :]
        mask = (first + p_offs < parts)[:, None] & inside[None, :]
        total += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 0)
    return total


@triton.jit
def store_gain(squares, magnitude_ptr, gain_ptr, norm_ptr, n_offs, inside):
    """norm and gain of rows whose squares are summed."""
    norm = tl.sqrt_rn(squares).to(magnitude_ptr.dtype.element_ty).to(tl.float32)
    norm = tl.where(inside, norm, 1.0)
    magnitude = tl.load(magnitude_ptr + n_offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(norm_ptr + n_offs, norm, mask=inside)
    tl.store(gain_ptr + n_offs, tl.div_rn(magnitude, norm), mask=inside)


@triton.jit(do_not_specialize=["scaling", "steps", "parts"])
def gain_kernel(
    # W [N, K], A [r, K], B [N, r], magnitude [N]; None or scale []
    w_ptr, a_ptr, b_ptr, magnitude_ptr, scale_ptr,
    # outputs, fp32: gain [N], norm [N]
    gain_ptr, norm_ptr,
    # workspaces: partial sums [parts, N]; a zeroed word for each block of rows
    partial_ptr, arrived_ptr,
    N, K, r, stride_wn,
    scaling, steps, parts,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """norm = ‖W + scaling · scale · B A‖ per row, rounded to the magnitude's dtype; gain = magnitude / norm.

    A program sums the squares of BLOCK_N rows over `steps` steps of BLOCK_K columns, one of `parts` such runs, so that
    several programs share an SM and hide each other's waits. The last of a row block's adds all parts in index order.

    With SPLIT A and B are fp32 beside a 16-bit W. They keep fp32's precision, which shows where B A all but cancels W.
    """
    begin_early(EARLY)
    if scale_ptr is not None:
        scaling *= tl.load(scale_ptr).to(tl.float32)
    block = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    begin = part * steps * BLOCK_K
    n_offs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n_offs < N
    r_offs = tl.arange(0, RANK_K)
    b = load_skinny(b_ptr, 1, r, r_offs, n_offs, r, N).T  # [BLOCK_N, RANK_K]
    rows_ptr = w_ptr + n_offs[:, None].to(tl.int64) * stride_wn
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in tl.range(begin, min(begin + steps * BLOCK_K, K), BLOCK_K, num_stages=STAGES):
        k_offs = k + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k_offs < K)[None, :]
        w = tl.load(rows_ptr + k_offs[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_K]
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first_r in tl.static_range(0, BLOCK_R, RANK_K):
            if BLOCK_R > RANK_K:
                b = load_skinny(b_ptr, 1, r, first_r + r_offs, n_offs, r, N).T
            a = load_skinny(a_ptr, K, 1, first_r + r_offs, k_offs, r, K)  # [RANK_K, BLOCK_K]
            product = add_product(b, a, product, w_ptr.dtype.element_ty, 3 if SPLIT else 1, PRECISION)
        adapted = w.to(tl.float32) + scaling * product
        squares += adapted * adapted
    total = tl.sum(squares, 1)
    if partial_ptr is not None:
        tl.store(partial_ptr + part * N + n_offs, total, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == parts - 1:
            total = sum_of_parts(partial_ptr, parts, N, n_offs, inside)
            store_gain(total, magnitude_ptr, gain_ptr, norm_ptr, n_offs, inside)
            tl.store(arrived_ptr + block, 0)
    else:
        store_gain(total, magnitude_ptr, gain_ptr, norm_ptr, n_offs, inside)


@functools.lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    facts: tuple[int, int],
    sizes: tuple[int, int, int],
    itemsizes: tuple[int, int],
    split: bool,
    specialised: object,
) -> tuple[Launcher, int, int]:
    """The launcher, steps of a part and the number of parts; `itemsizes` are W's and A's.

    `specialised` is what else Triton compiles for: dtypes, strides, alignment, which tensors there are.
    """
    N, K, r = sizes
    wide = block_r(r)
    column = wide * itemsizes[1]  # bytes of A
    if facts[0] == 90 and itemsizes[0] == 2 and not split and column <= 128:
        block_n, block_k, stages, on_each_sm = 64, 128, 3, 2  # measured there alone; some others lack the shared memory
    else:
        # One step of A takes 8 KB, of a wide rank 16 KB.
        block_k = max(16, min(128, (8192 if wide <= 64 else 16384) // column))
        block_n = 16 if split and wide > 64 else 32  # the terms of B stay in registers
        stages, on_each_sm = 3 if wide > 64 else 4, 4
    blocks = cdiv(N, block_n)
    parts = max(1, min(on_each_sm * facts[1] // blocks, cdiv(K, 2 * block_k), MAX_PARTS))
    steps = cdiv(cdiv(K, parts), block_k)
    parts = cdiv(K, steps * block_k)
    constants = {"SPLIT": split, "PRECISION": PRECISION, "BLOCK_N": block_n, "BLOCK_K": block_k}
    constants |= {"BLOCK_R": wide, "RANK_K": wide if wide <= 128 else 64, "STAGES": stages}
    constants |= {"num_stages": 3, "num_warps": 4} | early_constants(facts[0])
    return Launcher(gain_kernel, blocks * parts, device, constants), steps, parts


def dora_gain(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    scaling: float,
    scale: torch.Tensor | None = None,
    adapter_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the gain kernel.

    Args:
        weight: [N, K], bf16, fp16 or fp32, rows as `lora_forward` takes them.
        lora_A, lora_B: [r, K] and [N, r], weight's dtype or fp32.
        magnitude: [N], any floating dtype.
        scaling, scale, adapter_dtype: as given to `lora_forward`.

    Returns:
        gain and norm, [N] fp32 each; the norm rounded to the magnitude's dtype.
    """
    N, K = weight.shape
    r = lora_A.shape[0]
    device = weight.device
    gain = torch.empty(N, dtype=torch.float32, device=device)
    norm = torch.empty(N, dtype=torch.float32, device=device)
    lora_A, lora_B, magnitude = skinny_rows(lora_A), skinny_rows(lora_B), magnitude.contiguous()
    stride_wn = weight.stride(0)
    tensors = (weight, lora_A, lora_B, magnitude, scale, gain, norm)
    specialised = (
        (weight.dtype, lora_A.dtype, magnitude.dtype, stride_wn, None if scale is None else scale.dtype),
        alignment(*tensors),
    )
    sizes = N, K, r
    split = adapter_dtype != weight.dtype
    itemsizes = weight.element_size(), lora_A.element_size()
    launcher, steps, parts = _plan(device, device_facts(device), sizes, itemsizes, split, specialised)
    stream = device_memory(device).of_current_stream()
    partial = stream.work.take(4 * parts * N)[: 4 * parts * N].view(torch.float32) if parts > 1 else None
    words = stream.words(cdiv(N, launcher.constants["BLOCK_N"])) if parts > 1 else None
    launcher(stream, (*tensors, partial, words, *sizes, stride_wn, float(scaling), steps, parts))
    return gain, norm
