"""The forward for few rows of x, M ≤ 64, as in decoding: W is read once, and all else hides behind that.

A program takes BLOCK_N rows of W, the *columns* of y, and one of SPLIT parts of the depth. From the x that it has for
them anyway it also forms that part of S. Sums of parts go through memory: whoever comes last at its columns adds them
in a fixed order, so that bits do not depend on the run, and finishes the tile. No program waits for another, so none
has to be there at the same time. What A and x cost is bandwidth of L2.
"""

import torch
import triton
import triton.language as tl

from fusedlora.config import DecodeConfig, Problem, block_r, cdiv, decode_rows
from fusedlora.kernels.common import (
    begin_early,
    dot_rank,
    dot_skinny,
    load_skinny,
    next_term,
    regained,
)
from fusedlora.kernels.launch import PRECISION, Launcher, LaunchPlan, early_constants, rank_alignment
from fusedlora.memory import Workspace, device_memory


@triton.jit
def terms_of(tile, dtype: tl.constexpr, TERMS: tl.constexpr):
    """The sum of 16-bit terms that an fp32 tile is; three are returned, the first TERMS count, one where it is 0."""
    high, rest = next_term(tile, dtype)
    middle = high
    low = high
    if TERMS > 1:
        middle, rest = next_term(rest, dtype)
        low = rest.to(dtype)
    return high, middle, low


@triton.jit
def load_parts(ptr, M, size, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """[SPLIT, BLOCK_M, WIDTH], all at once: parts of rows that begin `size` elements apart, zero from row M on."""
    m_offs = tl.arange(0, BLOCK_M)[None, :, None]
    offs = tl.arange(0, SPLIT)[:, None, None] * size + m_offs * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return tl.load(ptr + offs, mask=m_offs < M, other=0.0)


@triton.jit
def finish(
    acc, small, skinny, bias, gain, y_ptr, s_ptr, col, M, N, r, scaling,
    dtype: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores y = gain ∘ (acc + S Bᵀ) + bias of one column block, and from the first one S = scaling · small.

    skinny is the block's tile of Bᵀ; bias and gain are its own or None.
    """
    m_offs = tl.arange(0, acc.shape[0])
    n_offs = col + tl.arange(0, acc.shape[1])
    r_offs = tl.arange(0, small.shape[1])
    small = tl.where((r_offs < r)[None, :], small * scaling, 0.0)  # x may be infinite
    high, rest, _ = terms_of(small, dtype, TERMS)
    # Not needed for its zeros: without it Triton waits for the tile where it is loaded, to put it in shared memory.
    skinny = tl.where((r_offs < r)[:, None], skinny, 0.0)
    skinny, skinny_rest, _ = terms_of(skinny, dtype, TERMS)
    acc = dot_rank(high, rest, skinny, skinny_rest, acc, dtype, TERMS, PRECISION)
    if s_ptr is not None:
        if col == 0:
            s = small if TERMS > 1 else high
            mask = (m_offs < M)[:, None] & (r_offs < r)[None, :]
            tl.store(s_ptr + m_offs[:, None] * r + r_offs[None, :], s, mask=mask)
    if gain is not None:
        acc *= gain[None, :]
    if bias is not None:
        acc += bias.to(tl.float32)[None, :]
    mask = (m_offs < M)[:, None] & (n_offs < N)[None, :]
    tl.store(y_ptr + m_offs[:, None] * N + n_offs[None, :], acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M", "scaling"])
def decode_kernel(
    # x [M, K], W [N, K], A [r, K], B [N, r]; each None or: bias [N], gain [N] fp32, scale []
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, gain_ptr, scale_ptr,
    # outputs: y [M, N], and S [M, r] or None
    y_ptr, s_ptr,
    # with SPLIT > 1: parts of acc and of S, fp32, for each program; a word for each column block
    parts_ptr, sync_ptr,
    M, N, K, r,
    stride_xm, stride_wn, stride_ar, stride_bn,
    scaling,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, R_ALIGN: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """S = scaling · scale · x Aᵀ, rounded once to S's dtype; y = gain ∘ (x Wᵀ + S Bᵀ) + bias, as `forward_kernel`.

    TERMS: A and B are fp32 beside a 16-bit x, which their tiles become in registers. ALIGN, elements of 16 bytes,
    divides K and the strides of x, W and A, and R_ALIGN r and stride_bn.
    """
    begin_early(EARLY)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    K = K // ALIGN * ALIGN
    stride_xm = stride_xm // ALIGN * ALIGN
    stride_wn = stride_wn // ALIGN * ALIGN
    stride_ar = stride_ar // ALIGN * ALIGN
    r = r // R_ALIGN * R_ALIGN
    stride_bn = stride_bn // R_ALIGN * R_ALIGN
    if scale_ptr is not None:
        scaling *= tl.load(scale_ptr).to(tl.float32)
    block = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    col = block * BLOCK_N
    m_offs = tl.arange(0, BLOCK_M)
    r_offs = tl.arange(0, BLOCK_R)
    # Rows past the last are the last once more: their columns of y are not stored.
    w_rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - col)
    w_ptrs = w_ptr + tl.cast(col, tl.int64) * stride_wn + w_rows[:, None] * stride_wn
    # What the end takes beside sums comes from memory meanwhile.
    n_offs = col + tl.arange(0, BLOCK_N)
    skinny = load_skinny(b_ptr, 1, stride_bn, r_offs, n_offs, r, N)
    bias = None
    gain = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n_offs, mask=n_offs < N, other=0.0)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + n_offs, mask=n_offs < N, other=0.0)
    steps = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    small = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(steps * part // SPLIT * BLOCK_K, steps * (part + 1) // SPLIT * BLOCK_K, BLOCK_K):
        k_offs = k + tl.arange(0, BLOCK_K)
        there = (k_offs < K)[None, :]
        w = tl.load(w_ptrs + k_offs[None, :], mask=there, other=0.0)
        x = tl.load(
            x_ptr + m_offs[:, None] * stride_xm + k_offs[None, :], mask=(m_offs < M)[:, None] & there, other=0.0
        )
        a = load_skinny(a_ptr, stride_ar, 1, r_offs, k_offs, r, K)
        high, middle, low = terms_of(a, dtype, TERMS)
        # The product of W comes last, or Triton would lay out the warps for the narrower one.
        small = dot_skinny(x, high, middle, low, small, TERMS, False, PRECISION)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    if TERMS > 1:
        small = regained(small, BLOCK_K)
    if SPLIT == 1:
        finish(acc, small, skinny, bias, gain, y_ptr, s_ptr, col, M, N, r, scaling, dtype, TERMS, PRECISION)
    else:
        SIZE: tl.constexpr = BLOCK_M * (BLOCK_N + BLOCK_R)
        first_ptr = parts_ptr + tl.cast(block, tl.int64) * SPLIT * SIZE
        own_ptr = first_ptr + part * SIZE
        tl.store(own_ptr + m_offs[:, None] * BLOCK_N + (n_offs - col)[None, :], acc, mask=(m_offs < M)[:, None])
        own_ptr += BLOCK_M * BLOCK_N
        tl.store(own_ptr + m_offs[:, None] * BLOCK_R + r_offs[None, :], small, mask=(m_offs < M)[:, None])
        tl.debug_barrier()
        if tl.atomic_add(sync_ptr + block, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(sync_ptr + block, 0)  # for the next launch; no other program touches it any more
            acc_parts = load_parts(first_ptr, M, SIZE, SPLIT, BLOCK_M, BLOCK_N)
            small_parts = load_parts(first_ptr + BLOCK_M * BLOCK_N, M, SIZE, SPLIT, BLOCK_M, BLOCK_R)
            acc = tl.sum(acc_parts, 0)
            small = tl.sum(small_parts, 0)
            finish(acc, small, skinny, bias, gain, y_ptr, s_ptr, col, M, N, r, scaling, dtype, TERMS, PRECISION)


def decode_plan(
    device: torch.device,
    problem: Problem,
    config: DecodeConfig,
    strides: tuple[int, int],
    terms: int,
    save_s: bool,
) -> LaunchPlan:
    """The launch of `forward_plan` for a DecodeConfig; strides are those of the rows of x and W."""
    p = problem
    tile_rows, wide = decode_rows(p.M), block_r(p.r)
    constants = early_constants(p.capability, config.early) | {
        "TERMS": terms,
        "PRECISION": PRECISION,
        "ALIGN": 16 // p.itemsize,
        "R_ALIGN": rank_alignment(p.r),
        "BLOCK_M": tile_rows,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "BLOCK_R": wide,
        "SPLIT": config.SPLIT,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    blocks = cdiv(p.out, config.BLOCK_N)
    programs = blocks * config.SPLIT
    parts = (torch.float32, programs * tile_rows * (config.BLOCK_N + wide)) if config.SPLIT > 1 else None
    return LaunchPlan(
        (Launcher(decode_kernel, programs, device, constants),),
        device_memory(device),
        Workspace(parts) if save_s else Workspace(None, parts),
        blocks if config.SPLIT > 1 else 1,
        (p.M, p.out, p.depth, p.r, *strides, p.depth, p.r),
        (),
        drops=False,
    )
