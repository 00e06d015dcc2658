"""The backward's jobs: dA and dB in stripes of columns and parts of rows, and the sums of parts."""

import triton
import triton.language as tl

from fusedlora.kernels.common import dot_skinny, load_terms, regained
from fusedlora.kernels.masks import load_seed, masked


@triton.jit
def store_stripe(acc, dm, out_ptr, dm_ptr, gain_ptr, norm_ptr, offs, mask, d_offs, depth, least):
    """Stores what `stripe_job` has summed: acc [D, R], and with DoRA's tensors its dm [D]."""
    if dm_ptr is not None:
        inside = d_offs < depth
        gain = tl.load(gain_ptr + d_offs, mask=inside, other=1.0)
        norm = tl.load(norm_ptr + d_offs, mask=inside, other=1.0)
        acc *= gain[:, None]
        small = tl.abs(gain) < least
        dm = tl.div_rn(dm / tl.where(small, 1.0, gain), norm).to(dm_ptr.dtype.element_ty)
        tl.store(dm_ptr + d_offs, dm, mask=inside & ~small)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def stripe_job(
    big_desc, small_ptr, out_ptr, partial_ptr, arrived_ptr,
    stripe, part, parts, M, depth, r, stride_or, stride_od, seed, threshold,
    # DoRA's, for dB: of y [M, depth]; [depth]; dm [depth] and its partial sums [parts, depth]
    y_desc, gain_ptr, norm_ptr, bias_ptr, dm_ptr, dm_partial_ptr, least,
    DROPOUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_R: tl.constexpr, STRIPE_N: tl.constexpr, STRIPE_M: tl.constexpr, STRIPE_STAGES: tl.constexpr,
):  # fmt: skip
    """out [r, depth] = smallᵀ [r, M] @ big [M, depth] for one column block and one of `parts` equal runs of rows.

    With DROPOUT big lies under the mask. small may be TERMS planes [TERMS, M, r].

    With DoRA's tensors out is multiplied by the gain, and dm is the sum over the rows of big ∘ (y - bias) / gain / norm
    where |gain| is not below `least`.

    With PARTIALS each part stores its sum and the last to arrive adds all parts in index order, so the bits do not
    depend on who came last.
    """
    r_offs = tl.arange(0, BLOCK_R)
    d_offs = stripe * STRIPE_N + tl.arange(0, STRIPE_N)
    m_offs = tl.arange(0, STRIPE_M)
    part_rows = tl.cdiv(tl.cdiv(M, STRIPE_M), parts) * STRIPE_M
    begin = part * part_rows
    RANK_FIRST: tl.constexpr = DROPOUT > 0
    if DROPOUT:
        seed_low, seed_high = load_seed(seed)
    DORA: tl.constexpr = dm_ptr is not None
    if DORA:
        sums = tl.zeros((STRIPE_M, STRIPE_N), tl.float32)
        bias = tl.zeros((STRIPE_N,), tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + d_offs, mask=d_offs < depth, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_R, STRIPE_N) if RANK_FIRST else (STRIPE_N, BLOCK_R), tl.float32)
    for m in tl.range(begin, min(begin + part_rows, M), STRIPE_M, num_stages=STRIPE_STAGES):
        big = big_desc.load([m, stripe * STRIPE_N])  # [STRIPE_M, STRIPE_N]
        if DORA:
            y = y_desc.load([m, stripe * STRIPE_N]).to(tl.float32)
            sums += big.to(tl.float32) * (y - bias[None, :])
        # [BLOCK_R, STRIPE_M]
        high, middle, low = load_terms(
            small_ptr + tl.cast(m, tl.int64) * r, tl.cast(M, tl.int64) * r, 1, r, r_offs, m_offs, r, M - m, TERMS
        )
        if DROPOUT:
            rows = m + m_offs[:, None]
            big = masked(big, seed_low, seed_high, threshold, rows, d_offs[None, :], depth, DROPOUT)
        acc = dot_skinny(big.T, high, middle, low, acc, TERMS, RANK_FIRST, PRECISION)
    if RANK_FIRST:
        acc = acc.T
    if TERMS > 1:
        acc = regained(acc, STRIPE_M)
    mask = (d_offs < depth)[:, None] & (r_offs < r)[None, :]
    offs = d_offs[:, None] * stride_od + r_offs[None, :] * stride_or
    dm = None
    if DORA:
        dm = tl.sum(sums, 0)
    if PARTIALS:
        size = depth * r
        tl.store(partial_ptr + part * size + offs, acc, mask=mask)
        if DORA:
            tl.store(dm_partial_ptr + part * depth + d_offs, dm, mask=d_offs < depth)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == parts - 1:
            acc = tl.zeros((STRIPE_N, BLOCK_R), tl.float32)
            for p in range(parts):
                acc += tl.load(partial_ptr + p * size + offs, mask=mask, other=0.0)
            if DORA:
                dm = tl.zeros((STRIPE_N,), tl.float32)
                for p in range(parts):
                    dm += tl.load(dm_partial_ptr + p * depth + d_offs, mask=d_offs < depth, other=0.0)
            store_stripe(acc, dm, out_ptr, dm_ptr, gain_ptr, norm_ptr, offs, mask, d_offs, depth, least)
            tl.store(arrived_ptr, 0)
    else:
        store_stripe(acc, dm, out_ptr, dm_ptr, gain_ptr, norm_ptr, offs, mask, d_offs, depth, least)


@triton.jit
def reduce_job(
    partial_ptr, out_ptr, first, size, num_blocks, REDUCE_BLOCKS: tl.constexpr, REDUCE_SIZE: tl.constexpr
):  # fmt: skip
    """out[first : first + REDUCE_SIZE] = the sum of partial [num_blocks, size] over its blocks, in a fixed order."""
    offs = first + tl.arange(0, REDUCE_SIZE)
    acc = tl.zeros((REDUCE_SIZE,), tl.float32)
    for block in range(0, num_blocks, REDUCE_BLOCKS):
        rows_ptr = partial_ptr + tl.cast(block, tl.int64) * size
        for i in tl.static_range(REDUCE_BLOCKS):  # all of their loads at once
            there = tl.where(block + i < num_blocks, size, 0)
            acc += tl.load(rows_ptr + i * size + offs, mask=offs < there, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < size)


REDUCE_SIZE = tl.constexpr(512)


@triton.jit
def run_job(
    job, first_da, da_jobs, first_db, db_jobs, parts,
    x_stripes, dy_stripes, y_stripes, planes_ptr, s_ptr, da_ptr, db_ptr,
    da_partial_ptr, db_partial_ptr, arrived_ptr, gain_ptr, norm_ptr, bias_ptr, dm_ptr, dm_partial_ptr,
    M, N, K, r, seed, threshold,
    NEED_DA: tl.constexpr, NEED_DB: tl.constexpr, FUSE_DB: tl.constexpr, LEAST: tl.constexpr,
    DROPOUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_R: tl.constexpr, SHRINK_M: tl.constexpr,
    STRIPE_N: tl.constexpr, STRIPE_M: tl.constexpr, STRIPE_STAGES: tl.constexpr,
):  # fmt: skip
    """A job of dA or dB, or nothing where there is none of this number. The names are the backward kernel's."""
    if NEED_DA:
        if job >= first_da and job < first_da + da_jobs:
            index = job - first_da
            stripe_job(
                x_stripes, planes_ptr, da_ptr, da_partial_ptr, arrived_ptr + job // parts,
                index // parts, index % parts, parts, M, K, r, K, 1, seed, threshold,
                None, None, None, None, None, None, None,
                DROPOUT, TERMS, PRECISION, PARTIALS, BLOCK_R, STRIPE_N, STRIPE_M, STRIPE_STAGES,
            )  # fmt: skip
    if NEED_DB:
        if job >= first_db and job < first_db + db_jobs:
            index = job - first_db
            if FUSE_DB:
                first = index * REDUCE_SIZE
                reduce_job(db_partial_ptr, db_ptr, first, N * r, tl.cdiv(M, SHRINK_M), 16, REDUCE_SIZE)
            else:
                stripe_job(
                    dy_stripes, s_ptr, db_ptr, db_partial_ptr, arrived_ptr + job // parts,
                    index // parts, index % parts, parts, M, N, r, 1, r, None, None,
                    y_stripes, gain_ptr, norm_ptr, bias_ptr, dm_ptr, dm_partial_ptr, LEAST,
                    0, TERMS, PRECISION, PARTIALS, BLOCK_R, STRIPE_N, STRIPE_M, STRIPE_STAGES,
                )  # fmt: skip
