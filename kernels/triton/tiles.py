"""The tiles of y and dX: a plain matrix product, then one more step of depth r, in one fp32 accumulator."""

import triton
import triton.language as tl

from fusedlora.kernels.common import (
    DONE,
    PROGRESS,
    dot_rank,
    linger,
    load_skinny,
    load_small,
    load_terms,
    progress_of,
    published,
    wait_for,
)
from fusedlora.kernels.masks import add_kept, load_seed


@triton.jit
def tile_coordinates(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row block, column block), in column-major groups of GROUP_M row blocks so that L2 is reused."""
    group_tiles = GROUP_M * num_tiles_n
    group = tile // group_tiles
    group_rows = min(num_tiles_m - group * GROUP_M, GROUP_M)
    within = tile % group_tiles
    return group * GROUP_M + within % group_rows, within // group_rows


@triton.jit
def load_small_terms(
    ptr, row, first_r, M, r, ready, BLOCK_M: tl.constexpr, RANK_K: tl.constexpr, TERMS: tl.constexpr
):  # fmt: skip
    """As load_small the first term of [TERMS, M, r] and, where there is one, the second; zero where not ready."""
    rows = tl.where(ready, M, 0)
    high = load_small(ptr, row, first_r, rows, r, BLOCK_M, RANK_K)
    rest = high
    if TERMS > 1:
        rest = load_small(ptr + tl.cast(M, tl.int64) * r, row, first_r, rows, r, BLOCK_M, RANK_K)
    return high, rest


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns, as two tiles."""
    rows: tl.constexpr = tile.shape[0]
    cols: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, cols // 2)), (0, 2, 1)))


@triton.jit
def beside(left, right):
    """One tile of two halves."""
    rows: tl.constexpr = left.shape[0]
    cols: tl.constexpr = left.shape[1]
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (rows, 2 * cols))


@triton.jit
def masked_product(
    acc, low, high, threshold, small_ptr, skinny_ptr, small, small_rest, skinny, skinny_rest, row, col,
    M, cols, r, stride_r, stride_d,
    early: tl.constexpr, dtype: tl.constexpr, DROPOUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_K: tl.constexpr,
):  # fmt: skip
    """acc + mask ∘ (small @ skinny). 64 columns at a time: a product as wide as acc would not fit the registers."""
    width: tl.constexpr = acc.shape[1]
    if width > 64:
        acc_left, acc_right = halves(acc)
        left = skinny
        right = skinny
        left_rest = skinny_rest
        right_rest = skinny_rest
        if early:
            left, right = halves(skinny)
            if TERMS > 1:
                left_rest, right_rest = halves(skinny_rest)
        acc_left = masked_product(
            acc_left, low, high, threshold, small_ptr, skinny_ptr, small, small_rest, left, left_rest,
            row, col, M, cols, r, stride_r, stride_d, early, dtype, DROPOUT, TERMS, PRECISION, BLOCK_R, RANK_K,
        )  # fmt: skip
        acc_right = masked_product(
            acc_right, low, high, threshold, small_ptr, skinny_ptr, small, small_rest, right, right_rest,
            row, col + width // 2, M, cols, r, stride_r, stride_d,
            early, dtype, DROPOUT, TERMS, PRECISION, BLOCK_R, RANK_K,
        )  # fmt: skip
        return beside(acc_left, acc_right)
    n_offs = col + tl.arange(0, width)
    m_offs = row + tl.arange(0, acc.shape[0])
    product = tl.zeros_like(acc)
    for first_r in tl.static_range(0, BLOCK_R, RANK_K):
        if not early:
            skinny, skinny_rest, _ = load_terms(
                skinny_ptr, cols * r, stride_r, stride_d, first_r + tl.arange(0, RANK_K), n_offs, r, cols, min(TERMS, 2)
            )
            small, small_rest = load_small_terms(small_ptr, row, first_r, M, r, True, acc.shape[0], RANK_K, TERMS)
        product = dot_rank(small, small_rest, skinny, skinny_rest, product, dtype, TERMS, PRECISION)
    return add_kept(acc, product, low, high, threshold, m_offs[:, None], n_offs[None, :], cols, DROPOUT)


@triton.jit
def tile_operands(
    small, small_rest, small_ptr, skinny_ptr, row, col, M, cols, r, stride_r, stride_d, ready,
    OWN: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK_K: tl.constexpr,
):  # fmt: skip
    """What `end_tile` multiplies: small and skinny, with their second terms; what is not `ready` is zero."""
    # Shrink tasks wait for the terms of both A and B: where their rows are there, so are those of `skinny`.
    there = r if TERMS == 0 else tl.where(ready, r, 0)
    skinny, skinny_rest, _ = load_terms(
        skinny_ptr, cols * r, stride_r, stride_d, tl.arange(0, RANK_K), col + tl.arange(0, BLOCK_N), there, cols,
        min(TERMS, 2),
    )  # fmt: skip
    if not OWN:
        small, small_rest = load_small_terms(small_ptr, row, 0, M, r, ready, BLOCK_M, RANK_K, TERMS)
    return small, small_rest, skinny, skinny_rest


@triton.jit
def end_tile(
    acc, sums, small, small_rest, skinny, skinny_rest, ready,
    out_desc, small_ptr, skinny_ptr, sync_ptr, scaling, gain_ptr, bias_ptr,
    row, col, M, cols, r, stride_r, stride_d, seed, threshold,
    dtype: tl.constexpr, OWN: tl.constexpr, WAIT: tl.constexpr,
    DROPOUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_K: tl.constexpr,
    SHRINK_M: tl.constexpr, FLAT: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """Stores gain ∘ (acc + small @ skinny) + bias. The names are those of `lora_tiles`, whose tile ends.

    The operands of a rank up to RANK_K are given, small only if it is `ready`; those of others are loaded here. With
    OWN small is what `sums` are rounded to. With FLAT skinny must be made anew here: what a loop only hands on Triton
    writes to shared memory in each of its steps.
    """
    early: tl.constexpr = BLOCK_R == RANK_K
    TWO: tl.constexpr = min(TERMS, 2)
    plane = cols * r
    n_offs = col + tl.arange(0, BLOCK_N)
    linger(sync_ptr, DELAY)
    if OWN:
        r_offs = tl.arange(0, BLOCK_R)
        small = tl.where((r_offs < r)[None, :], sums * scaling, 0.0).to(dtype)  # left may be infinite
        small_rest = small
        if small_ptr is not None and col == 0:
            m_offs = row + tl.arange(0, BLOCK_M)
            mask = (m_offs < M)[:, None] & (r_offs < r)[None, :]
            tl.store(small_ptr + tl.cast(m_offs, tl.int64)[:, None] * r + r_offs[None, :], small, mask=mask)
        if FLAT:
            skinny = tl.where((n_offs < cols)[None, :], skinny, 0.0)
    elif WAIT:
        if not ready:
            word, needed = progress_of(row, M, BLOCK_M, SHRINK_M)
            wait_for(sync_ptr + PROGRESS + word, needed)
            if early:
                if TERMS > 0 or FLAT:
                    skinny, skinny_rest, _ = load_terms(
                        skinny_ptr, plane, stride_r, stride_d, tl.arange(0, BLOCK_R), n_offs, r, cols, TWO
                    )
                small, small_rest = load_small_terms(small_ptr, row, 0, M, r, True, BLOCK_M, RANK_K, TERMS)
    if DROPOUT:
        low, high = load_seed(seed)
        acc = masked_product(
            acc, low, high, threshold, small_ptr, skinny_ptr,
            small if early else None, small_rest if early else None,
            skinny if early else None, skinny_rest if early else None,
            row, col, M, cols, r, stride_r, stride_d, early, dtype, DROPOUT, TERMS, PRECISION, BLOCK_R, RANK_K,
        )  # fmt: skip
    elif early:
        acc = dot_rank(small, small_rest, skinny, skinny_rest, acc, dtype, TERMS, PRECISION)
    else:
        # Unpipelined: pipelined wgmma with a register operand is miscompiled by ptxas before 13.3.
        for first_r in tl.static_range(0, BLOCK_R, RANK_K):
            r_offs = first_r + tl.arange(0, RANK_K)
            skinny, skinny_rest, _ = load_terms(skinny_ptr, plane, stride_r, stride_d, r_offs, n_offs, r, cols, TWO)
            small, small_rest = load_small_terms(small_ptr, row, first_r, M, r, True, BLOCK_M, RANK_K, TERMS)
            acc = dot_rank(small, small_rest, skinny, skinny_rest, acc, dtype, TERMS, PRECISION)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + n_offs, mask=n_offs < cols, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n_offs, mask=n_offs < cols, other=0.0).to(tl.float32)[None, :]
    out_desc.store([row, col], acc.to(dtype))


@triton.jit
def tile_step(
    acc, sums, left_desc, right_desc, own_ptr, own_stride, row, col, k, depth, r,
    TRANS_RIGHT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, RANK_K: tl.constexpr,
):  # fmt: skip
    """acc + left [BLOCK_M, BLOCK_K] @ right and, with `own_ptr`, sums + left @ ownᵀ, from column k of left on."""
    left = left_desc.load([row, k])
    if own_ptr is not None:
        own = load_skinny(own_ptr, own_stride, 1, tl.arange(0, RANK_K), k + tl.arange(0, BLOCK_K), r, depth)
        sums = tl.dot(left, own.T, sums, input_precision=PRECISION)
    if TRANS_RIGHT:
        right = right_desc.load([col, k]).T  # [BLOCK_K, BLOCK_N]
    else:
        right = right_desc.load([k, col])
    return tl.dot(left, right, acc, input_precision=PRECISION), sums


@triton.jit
def lora_tile(
    tile, left_desc, right_desc, out_desc, small_ptr, skinny_ptr, sync_ptr,
    own_ptr, own_stride, scaling, gain_ptr, bias_ptr,
    M, cols, depth, r, stride_r, stride_d, seed, threshold,
    dtype: tl.constexpr, TRANS_RIGHT: tl.constexpr, WAIT: tl.constexpr,
    DROPOUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_K: tl.constexpr, SHRINK_M: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """One of `lora_tiles`, in a loop of its own."""
    OWN: tl.constexpr = own_ptr is not None
    tile_m, tile_n = tile_coordinates(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(cols, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    ready = not WAIT
    small = tl.zeros((BLOCK_M, RANK_K), dtype)
    small_rest = small
    skinny = None
    skinny_rest = None
    if BLOCK_R == RANK_K:
        if WAIT:
            word, needed = progress_of(row, M, BLOCK_M, SHRINK_M)
            ready = published(sync_ptr + PROGRESS + word) >= needed
        small, small_rest, skinny, skinny_rest = tile_operands(
            small, small_rest, small_ptr, skinny_ptr, row, col, M, cols, r, stride_r, stride_d, ready,
            OWN, TERMS, BLOCK_M, BLOCK_N, RANK_K,
        )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M, RANK_K), tl.float32)
    for k in range(0, depth, BLOCK_K):
        acc, sums = tile_step(
            acc, sums, left_desc, right_desc, own_ptr, own_stride, row, col, k, depth, r,
            TRANS_RIGHT, PRECISION, BLOCK_K, RANK_K,
        )  # fmt: skip
    end_tile(
        acc, sums, small, small_rest, skinny, skinny_rest, ready,
        out_desc, small_ptr, skinny_ptr, sync_ptr, scaling, gain_ptr, bias_ptr,
        row, col, M, cols, r, stride_r, stride_d, seed, threshold, dtype, OWN, WAIT,
        DROPOUT, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, RANK_K, SHRINK_M, False, DELAY,
    )  # fmt: skip


@triton.jit
def lora_tiles(
    first, count, stride, all_tasks, all_done,
    left_desc, right_desc, out_desc, small_ptr, skinny_ptr, sync_ptr,
    # None, or what tiles sum small themselves by: [r, depth], its row stride, and what the sums are multiplied by
    own_ptr, own_stride, scaling,
    # each [cols] or None
    gain_ptr, bias_ptr,
    M, cols, depth, r, stride_r, stride_d, seed, threshold,
    dtype: tl.constexpr, TRANS_RIGHT: tl.constexpr, WAIT: tl.constexpr,
    DROPOUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_K: tl.constexpr, SHRINK_M: tl.constexpr, FLAT: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """Tiles first, first + stride, … of gain ∘ (left [M, depth] @ right + small [M, r] @ skinny [r, cols]) + bias.

    Each of the `count` tiles [BLOCK_M, BLOCK_N] has one fp32 accumulator. With DROPOUT the mask lies on the second
    product. right is [depth, cols], or [cols, depth] with TRANS_RIGHT.

    With WAIT small comes from this launch's `all_tasks` shrink tasks, and `all_done` says whether these are known to
    have ended; returned is whether they are by now. SHRINK_M and BLOCK_M are powers of two, so a tile's rows come from
    one row block or a few whole ones. Operands of a rank up to RANK_K are loaded long before they are needed where they
    are ready, which hides their latency; higher ranks would leave the main loop too few registers.

    With `own_ptr` nothing is waited for: beside its product a tile sums left @ ownᵀ, so its rows of small, and the
    tiles of the first columns store it. For a rank that RANK_K holds at once, one term at most and no dropout.

    With FLAT there is one loop over the steps of all tiles, so that the next tile's first loads are on their way while
    a tile ends; without, a loop for each tile. For ranks, terms and a second product as with `own_ptr`.
    """
    OWN: tl.constexpr = own_ptr is not None
    tl.static_assert(not (OWN or FLAT) or (BLOCK_R == RANK_K and TERMS <= 1 and DROPOUT == 0))
    tl.static_assert(not (OWN and WAIT))
    done = tl.full((), 0, tl.int1) | all_done  # a tensor, as it changes
    if FLAT and (WAIT or OWN):  # what is there from the start would be a wgmma's operand in registers: C7515
        num_tiles_m = tl.cdiv(M, BLOCK_M)
        num_tiles_n = tl.cdiv(cols, BLOCK_N)
        steps = tl.cdiv(depth, BLOCK_K)
        step = -1
        tile = first - stride
        row = 0
        col = 0
        ready = done | (not WAIT)
        small = tl.zeros((BLOCK_M, RANK_K), dtype if small_ptr is None else small_ptr.dtype.element_ty)
        small_rest = small
        skinny = tl.zeros((RANK_K, BLOCK_N), skinny_ptr.dtype.element_ty)
        skinny_rest = skinny
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.zeros((BLOCK_M, RANK_K), tl.float32)
        for _ in range(count * steps):
            step = tl.where(step == steps - 1, 0, step + 1)
            if step == 0:
                tile += stride
                tile_m, tile_n = tile_coordinates(tile, num_tiles_m, num_tiles_n, GROUP_M)
                row = tile_m * BLOCK_M
                col = tile_n * BLOCK_N
            acc, sums = tile_step(
                acc, sums, left_desc, right_desc, own_ptr, own_stride, row, col, step * BLOCK_K, depth, r,
                TRANS_RIGHT, PRECISION, BLOCK_K, RANK_K,
            )  # fmt: skip
            if step == 0:
                if WAIT:
                    if not done:
                        word, needed = progress_of(row, M, BLOCK_M, SHRINK_M)
                        ready = published(sync_ptr + PROGRESS + word) >= needed
                        if ready:
                            done = published(sync_ptr + DONE) >= all_tasks
                small, small_rest, skinny, skinny_rest = tile_operands(
                    small, small_rest, small_ptr, skinny_ptr, row, col, M, cols, r, stride_r, stride_d, ready,
                    OWN, TERMS, BLOCK_M, BLOCK_N, RANK_K,
                )  # fmt: skip
            if step == steps - 1:
                end_tile(
                    acc, sums, small, small_rest, skinny, skinny_rest, ready,
                    out_desc, small_ptr, skinny_ptr, sync_ptr, scaling, gain_ptr, bias_ptr,
                    row, col, M, cols, r, stride_r, stride_d, seed, threshold, dtype, OWN, WAIT,
                    DROPOUT, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, RANK_K, SHRINK_M, True, DELAY,
                )  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                sums = tl.zeros((BLOCK_M, RANK_K), tl.float32)
    else:
        for tile in tl.range(first, first + count * stride, stride):
            lora_tile(
                tile, left_desc, right_desc, out_desc, small_ptr, skinny_ptr, sync_ptr,
                own_ptr, own_stride, scaling, gain_ptr, bias_ptr,
                M, cols, depth, r, stride_r, stride_d, seed, threshold, dtype, TRANS_RIGHT, WAIT,
                DROPOUT, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BLOCK_R, RANK_K, SHRINK_M, DELAY,
            )  # fmt: skip
    return done
