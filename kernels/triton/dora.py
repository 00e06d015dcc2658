"""DoRA's launch before the backward kernel: what puts the gain into its products, and the magnitude's gradient.

    dy' = gain ∘ dy                     dm = Σ_m dy ∘ u / norm
    or, where W has fewer elements than dy, W' = gain ∘ W on its rows and B' = gain ∘ B: then the backward kernel, this
    package's or csrc's, forms dm

u = x Wᵀ + S Bᵀ is the output before gain and bias. Formulas: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation"
(2024), the norm taken as a constant in backward, as their section 4.3 has it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fusedlora.config import block_r, cdiv
from fusedlora.kernels.backward import Dora
from fusedlora.kernels.common import begin_early, load_skinny, load_small
from fusedlora.kernels.dora_gain import add_product, sum_of_parts
from fusedlora.kernels.launch import PRECISION, Launcher, alignment, device_facts, early_constants
from fusedlora.memory import device_memory, row_major, skinny_rows

# Where |gain| is below this, u is computed again rather than taken as (y - bias) / gain: y's rounding, divided by a
# small gain, would be large beside u where the bias is what y mostly holds, or where y has left its dtype's range.
LEAST_GAIN = 2.0**-6
LEAST_GAIN_BESIDE_BIAS = 0.5


@triton.jit
def unscaled_tile(
    x_ptr, w_ptr, s_ptr, b_ptr, row, n_offs, M, N, K, r, stride_xm, stride_xk, stride_wn,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK_K: tl.constexpr,
):  # fmt: skip
    """x Wᵀ + S Bᵀ for one tile [BLOCK_M, BLOCK_N], in fp32."""
    m_offs = tl.arange(0, BLOCK_M)
    k_offs = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.cast(row, tl.int64) * stride_xm + m_offs[:, None] * stride_xm + k_offs[None, :] * stride_xk
    w_ptrs = w_ptr + n_offs[None, :].to(tl.int64) * stride_wn + k_offs[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=1):
        x = tl.load(x_ptrs + k * stride_xk, mask=(row + m_offs < M)[:, None] & (k + k_offs < K)[None, :], other=0.0)
        w = tl.load(w_ptrs + k, mask=(n_offs < N)[None, :] & (k + k_offs < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    for first_r in tl.range(0, r, RANK_K, num_stages=1):
        small = load_small(s_ptr, row, first_r, M, r, BLOCK_M, RANK_K)
        skinny = load_skinny(b_ptr, 1, r, first_r + tl.arange(0, RANK_K), n_offs, r, N)
        acc = add_product(small, skinny, acc, x_ptr.dtype.element_ty, 2 if SPLIT else 1, PRECISION)
    return acc


@triton.jit
def finish_magnitude(partial_ptr, arrived_ptr, norm_ptr, dm_ptr, block, parts, N, n_offs, mask):
    """Counts one part of a column block; the last one's program adds all of them, and stores dm where `mask` says."""
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == parts - 1:
        total = sum_of_parts(partial_ptr, parts, N, n_offs, mask)
        norm = tl.load(norm_ptr + n_offs, mask=mask, other=1.0)
        tl.store(dm_ptr + n_offs, tl.div_rn(total, norm).to(dm_ptr.dtype.element_ty), mask=mask)
        tl.store(arrived_ptr + block, 0)


@triton.jit
def magnitude_program(
    pid, dy_ptr, y_ptr, gain_ptr, norm_ptr, bias_ptr, x_ptr, w_ptr, s_ptr, b_ptr, out_ptr, dm_ptr,
    partial_ptr, arrived_ptr, M, N, K, r, stride_ym, stride_yn, stride_xm, stride_xk, stride_wn, rows, parts, least,
    NEED_DY: tl.constexpr, NEED_DM: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    AGAIN_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK_K: tl.constexpr,
):  # fmt: skip
    """dy' = gain ∘ dy and dm = Σ_m dy ∘ u / norm, for one column block and one of `parts` runs of `rows` rows.

    u is (y - bias) / gain, and x Wᵀ + S Bᵀ again, AGAIN_N columns at a time, where a |gain| is below `least`. Each part
    stores its sum of dm and the last to arrive adds all parts in index order, so the bits do not depend on who came
    last. Without y only those columns get their dm.
    """
    ALL: tl.constexpr = NEED_DY or y_ptr is not None
    num_blocks = tl.cdiv(N, BLOCK_N)
    block = pid % num_blocks
    part = pid // num_blocks
    m_offs = tl.arange(0, BLOCK_M)
    n_offs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n_offs < N
    begin = part * rows
    end = min(begin + rows, M)
    gain = tl.load(gain_ptr + n_offs, mask=inside, other=1.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n_offs, mask=inside, other=0.0).to(tl.float32)
    if ALL:
        offs = m_offs[:, None] * N + n_offs[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
            start = tl.cast(row, tl.int64)
            mask = (row + m_offs < M)[:, None] & inside[None, :]
            dy_ptrs = dy_ptr + start * stride_ym + m_offs[:, None] * stride_ym + n_offs[None, :] * stride_yn
            dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
            if NEED_DM:
                y = tl.load(y_ptr + start * N + offs, mask=mask, other=0.0).to(tl.float32)
                if bias_ptr is not None:
                    y -= bias[None, :]
                sums += dy * y
            if NEED_DY:
                tl.store(out_ptr + start * N + offs, (dy * gain[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    if NEED_DM:
        small = tl.abs(gain) < least
        if ALL:
            partial_ptrs = partial_ptr + part * N + n_offs
            tl.store(partial_ptrs, tl.sum(sums, 0) / tl.where(small, 1.0, gain), mask=inside)
        some = tl.max(small.to(tl.int32), 0) > 0
        if some:
            tl.debug_barrier()
            for first in range(0, BLOCK_N, AGAIN_N):
                a_offs = block * BLOCK_N + first + tl.arange(0, AGAIN_N)
                bad = tl.abs(tl.load(gain_ptr + a_offs, mask=a_offs < N, other=1.0)) < least
                if tl.max(bad.to(tl.int32), 0) > 0:
                    again = tl.zeros((BLOCK_M, AGAIN_N), tl.float32)
                    for row in range(begin, end, BLOCK_M):
                        u = unscaled_tile(
                            x_ptr, w_ptr, s_ptr, b_ptr, row, a_offs, M, N, K, r, stride_xm, stride_xk, stride_wn,
                            SPLIT, PRECISION, BLOCK_M, AGAIN_N, BLOCK_K, RANK_K,
                        )  # fmt: skip
                        row_ptr = dy_ptr + tl.cast(row, tl.int64) * stride_ym
                        ptrs = row_ptr + m_offs[:, None] * stride_ym + a_offs[None, :] * stride_yn
                        a_mask = (row + m_offs < M)[:, None] & bad[None, :]
                        again += tl.load(ptrs, mask=a_mask, other=0.0).to(tl.float32) * u
                    tl.store(partial_ptr + part * N + a_offs, tl.sum(again, 0), mask=bad)
        if ALL:
            finish_magnitude(partial_ptr, arrived_ptr, norm_ptr, dm_ptr, block, parts, N, n_offs, inside)
        elif some:
            finish_magnitude(partial_ptr, arrived_ptr, norm_ptr, dm_ptr, block, parts, N, n_offs, small)


@triton.jit
def scale_rows(
    w_ptr, b_ptr, gain_ptr, out_w_ptr, out_b_ptr, pid, N, K, r, stride_wn,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """gain ∘ W for SCALE_N rows and SCALE_K columns, and for the first columns' programs gain ∘ B of those rows."""
    num_blocks = tl.cdiv(N, SCALE_N)
    n_offs = pid % num_blocks * SCALE_N + tl.arange(0, SCALE_N)
    rows = n_offs[:, None].to(tl.int64)
    inside = (n_offs < N)[:, None]
    gain = tl.load(gain_ptr + n_offs[:, None], mask=inside, other=0.0)
    k_offs = pid // num_blocks * SCALE_K + tl.arange(0, SCALE_K)[None, :]
    mask = inside & (k_offs < K)
    w = tl.load(w_ptr + rows * stride_wn + k_offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_w_ptr + rows * K + k_offs, (w * gain).to(out_w_ptr.dtype.element_ty), mask=mask)
    if pid < num_blocks:
        r_offs = tl.arange(0, BLOCK_R)[None, :]
        b_mask = inside & (r_offs < r)
        b = tl.load(b_ptr + rows * r + r_offs, mask=b_mask, other=0.0).to(tl.float32)
        tl.store(out_b_ptr + rows * r + r_offs, (b * gain).to(out_b_ptr.dtype.element_ty), mask=b_mask)


@triton.jit(do_not_specialize=["M", "rows", "parts", "weight_programs", "least"])
def scale_kernel(
    # gradient of the output: dy [M, N]; saved from forward: y [M, N], gain [N], norm [N]; None or bias [N]
    dy_ptr, y_ptr, gain_ptr, norm_ptr, bias_ptr,
    # what u is made of: x [M, K], W [N, K], S [M, r], B [N, r]
    x_ptr, w_ptr, s_ptr, b_ptr,
    # outputs: dy' [M, N], dm [N]; or in place of dy' W' [N, K] and B' [N, r]
    out_ptr, dm_ptr, out_w_ptr, out_b_ptr,
    # workspaces: partial sums [parts, N]; a zeroed word for each column block
    partial_ptr, arrived_ptr,
    M, N, K, r,
    stride_ym, stride_yn, stride_xm, stride_xk, stride_wn,
    rows, parts, weight_programs, least,
    NEED_DY: tl.constexpr, NEED_DM: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    AGAIN_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK_K: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dy' = gain ∘ dy and dm; or W' = gain ∘ W and B' = gain ∘ B by `weight_programs`, and by the others dm only where
    |gain| is below `least`: the backward kernel forms the rest from its own read of dy.
    """
    begin_early(EARLY)
    pid = tl.program_id(0)
    if out_w_ptr is None:
        magnitude_program(
            pid, dy_ptr, y_ptr, gain_ptr, norm_ptr, bias_ptr,
            x_ptr, w_ptr, s_ptr, b_ptr, out_ptr, dm_ptr, partial_ptr, arrived_ptr,
            M, N, K, r, stride_ym, stride_yn, stride_xm, stride_xk, stride_wn, rows, parts, least,
            NEED_DY, NEED_DM, SPLIT, PRECISION, BLOCK_M, BLOCK_N, STAGES, AGAIN_N, BLOCK_K, RANK_K,
        )  # fmt: skip
    elif pid < weight_programs:
        scale_rows(w_ptr, b_ptr, gain_ptr, out_w_ptr, out_b_ptr, pid, N, K, r, stride_wn, SCALE_N, SCALE_K, BLOCK_R)
    else:
        magnitude_program(
            pid - weight_programs, dy_ptr, None, gain_ptr, norm_ptr, None,
            x_ptr, w_ptr, s_ptr, b_ptr, None, dm_ptr, partial_ptr, arrived_ptr,
            M, N, K, r, stride_ym, stride_yn, stride_xm, stride_xk, stride_wn, rows, parts, least,
            False, True, SPLIT, PRECISION, BLOCK_M, BLOCK_N, STAGES, AGAIN_N, BLOCK_K, RANK_K,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan(
    by_weight: bool,
    device: torch.device,
    facts: tuple[int, int],
    sizes: tuple[int, ...],
    itemsize: int,
    split: bool,
    needs: tuple[bool, bool],
    specialised: object,
) -> tuple[Launcher, tuple[int, ...]]:
    """The launcher, and the rows of a part, the number of parts, and of programs that scale W.

    `specialised` is what else Triton compiles for: other dtypes, strides, alignment, which tensors there are.
    """
    M, N, K, r = sizes
    block_m, block_n = 32 if itemsize == 2 else 16, 128
    blocks = cdiv(N, block_n)
    # As many programs as run at a time, two on each SM, or with more rows so many that the last ones are short.
    rows = cdiv(max(block_m, min(512, cdiv(M * blocks, 2 * facts[1]))), block_m) * block_m
    weight_programs = 0
    if by_weight:
        rows = max(rows, cdiv(cdiv(M, 8), block_m) * block_m)  # for most of them there is nothing to do
        weight_programs = cdiv(N, 16) * cdiv(K, 1024)
    parts = cdiv(M, rows)
    constants = {"SPLIT": split, "PRECISION": PRECISION, "NEED_DY": needs[0], "NEED_DM": needs[1]}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": 4}
    constants |= {"AGAIN_N": 16 if split else 32, "BLOCK_K": 64 if itemsize == 2 else 16, "RANK_K": 16}
    constants |= {"SCALE_N": 16, "SCALE_K": 1024, "BLOCK_R": block_r(r) if by_weight else 16}
    constants |= {"num_stages": 1, "num_warps": 8} | early_constants(facts[0])
    num_programs = weight_programs + blocks * parts
    return Launcher(scale_kernel, num_programs, device, constants), (rows, parts, weight_programs)


def _least_gain(bias: torch.Tensor | None) -> float:
    return LEAST_GAIN if bias is None else LEAST_GAIN_BESIDE_BIAS


def dora_scale(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    gain: torch.Tensor,
    norm: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    s: torch.Tensor | None,
    lora_B: torch.Tensor,
    *,
    adapter_dtype: torch.dtype,
    magnitude_dtype: torch.dtype,
    need_dy: bool,
    need_dm: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Launches the pass over dy and y.

    Args:
        dy: [M, N]; as x, copied where the elements of a row are neither adjacent nor one and the same.
        y: [M, N] of dy's dtype, what the forward kernel gave; as bias, x, weight and s only for dm.
        gain, norm: as `dora_gain` returned them.
        bias, x, weight, s, lora_B, adapter_dtype: as `lora_forward` took and returned them.
        magnitude_dtype: the dtype of dm.
        need_dy, need_dm: which of the two to compute.

    Returns:
        dy' [M, N] of dy's dtype and dm [N], None where not needed.
    """
    M, N = dy.shape
    device, dtype = dy.device, dy.dtype
    out = torch.empty((M, N), dtype=dtype, device=device) if need_dy else None
    dm = torch.empty(N, dtype=magnitude_dtype, device=device) if need_dm else None
    if M == 0 or not (need_dy or need_dm):
        return out, dm if dm is None else dm.zero_()
    r = lora_B.shape[1]
    dy = dy if dy.stride(1) <= 1 else dy.contiguous()
    if need_dm:
        assert y is not None and x is not None and weight is not None and s is not None
        y, s, lora_B = y.contiguous(), s.contiguous(), skinny_rows(lora_B)
        bias = None if bias is None else bias.contiguous()
        x = x if x.stride(1) <= 1 else x.contiguous()
        K, strides = x.shape[1], (*x.stride(), weight.stride(0))
    else:
        y = bias = x = weight = s = None
        K, strides = 0, (0, 0, 0)
    strides = (*dy.stride(), *strides)
    tensors = (dy, y, gain, norm, bias, x, weight, s, lora_B)
    dtypes = (dtype, lora_B.dtype, adapter_dtype, magnitude_dtype)
    launcher, counts = _plan(
        False,
        device,
        device_facts(device),
        (M, N, K, r),
        dy.element_size(),
        adapter_dtype != dtype,
        (need_dy, need_dm),
        (dtypes, strides, bias is None, alignment(*tensors)),
    )
    _launch(launcher, counts, tensors, (out, dm, None, None), (M, N, K, r, *strides), _least_gain(bias))
    return out, dm


def _launch(
    launcher: Launcher,
    counts: tuple[int, ...],
    given: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    least: float,
) -> None:
    """Launches the scale kernel."""
    dy, dm = given[0], outputs[1]
    assert dy is not None
    N = sizes[1]
    stream = device_memory(dy.device).of_current_stream()
    partial = words = None
    if dm is not None:
        size = 4 * counts[1] * N
        partial = stream.work.take(size)[:size].view(torch.float32)
        words = stream.words(cdiv(N, launcher.constants["BLOCK_N"]))
    launcher(stream, (*given, *outputs, partial, words, *sizes, *counts, least))


def dora_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    gain: torch.Tensor,
    norm: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_backward: Callable[..., tuple[torch.Tensor | None, ...]],
    *,
    adapter_dtype: torch.dtype,
    magnitude_dtype: torch.dtype,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All gradients with the gain on the rows of W and B in place of the columns of dy, whose bytes it saves.

    Launches the scale kernel for W' and B', then the backward kernel.

    Args:
        dy, y, gain, norm, bias, x, weight, s, lora_A, lora_B, magnitude_dtype: as `dora_scale` takes them.
        lora_backward: the launcher of the backward kernel, that of kernels.backward or of fusedlora.cuda.
        adapter_dtype, settings: as that takes them.

    Returns:
        dX [M, K] of dy's dtype, dA [r, K] and dB [N, r] of their parameters' dtypes, dm [N].
    """
    (M, N), K, r, device = dy.shape, weight.shape[1], lora_A.shape[0], dy.device
    dm = torch.empty(N, dtype=magnitude_dtype, device=device)
    scaled_w, scaled_b = weight.new_empty(N, K), lora_B.new_empty(N, r)
    least = _least_gain(bias)
    if M > 0:
        dy, x, y = row_major(dy), row_major(x), row_major(y.contiguous())
        s, lora_B = s.contiguous(), skinny_rows(lora_B)
        bias = None if bias is None else bias.contiguous()
        given = (dy, None, gain, norm, None, x, weight, s, lora_B)
        strides = (*dy.stride(), *x.stride(), weight.stride(0))
        dtypes = (dy.dtype, lora_B.dtype, adapter_dtype, magnitude_dtype)
        launcher, counts = _plan(
            True,
            device,
            device_facts(device),
            (M, N, K, r),
            dy.element_size(),
            adapter_dtype != dy.dtype,
            (False, True),
            (dtypes, strides, alignment(*given)),
        )
        _launch(launcher, counts, given, (None, dm, scaled_w, scaled_b), (M, N, K, r, *strides), least)
    else:
        dm.zero_()
    dx, dA, dB = lora_backward(
        dy,
        x,
        scaled_w,
        lora_A,
        scaled_b,
        s,
        adapter_dtype=adapter_dtype,
        need_dx=True,
        need_dA=True,
        need_dB=True,
        dora=Dora(dm, y, gain, norm, bias, least),
        **settings,
    )
    assert dx is not None and dA is not None and dB is not None
    return dx, dA, dB, dm
