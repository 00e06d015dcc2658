"""What the forward and the backward kernel share: tile order, claims and waits, the skinny products and the GEMM tile.

Both kernels multiply a tall matrix by a frozen one and add a product of rank r:

    forward     y  = x Wᵀ + S Bᵀ      S = scaling · x Aᵀ
    backward    dX = dy W + T A       T = scaling · dy B

so both run *shrink tasks* (S or T, memory-bound), then *tiles* whose epilogue takes one more step of depth r.
The backward adds *stripes* (dA, dB): column blocks summed over all rows.

Synchronisation words, int32, zero between launches (`SYNC_WORDS` and one more a stripe):
    TICKET   next shrink task to claim        DONE    shrink tasks published
    EXIT     programs that have left          STRIPE  next stripe job to claim

Why nothing can deadlock: a program claims shrink tasks until none is left before it computes its first tile, and a
shrink task waits for nothing. So whoever waits for DONE knows that every task is held by a program that runs and
will finish it, however few programs are resident at a time.
"""

import triton
import triton.language as tl

INTERPRET: bool = triton.knobs.runtime.interpret

TICKET = tl.constexpr(0)
DONE = tl.constexpr(1)
EXIT = tl.constexpr(2)
STRIPE = tl.constexpr(3)
SYNC_WORDS = tl.constexpr(4)


@triton.jit
def tile_coordinates(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row block, column block), in column-major groups of GROUP_M row blocks so that L2 is reused."""
    group_tiles = GROUP_M * num_tiles_n
    group = tile // group_tiles
    group_rows = min(num_tiles_m - group * GROUP_M, GROUP_M)
    within = tile % group_tiles
    return group * GROUP_M + within % group_rows, within // group_rows


@triton.jit
def publish(sync_ptr, word: tl.constexpr):
    """Counts one finished piece of work; the program's earlier stores are visible to whoever acquires the count."""
    tl.debug_barrier()
    tl.atomic_add(sync_ptr + word, 1, sem="release")


@triton.jit
def wait_for(sync_ptr, word: tl.constexpr, count):
    """Spins until `count` pieces of work are published."""
    while tl.atomic_add(sync_ptr + word, 0, sem="acquire") < count:
        pass


@triton.jit
def leave(sync_ptr):
    """The last program to leave zeroes the words for the next launch. No other program touches them any more."""
    if tl.atomic_add(sync_ptr + EXIT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(sync_ptr + TICKET, 0)
        tl.store(sync_ptr + DONE, 0)
        tl.store(sync_ptr + STRIPE, 0)
        tl.store(sync_ptr + EXIT, 0)


@triton.jit
def load_skinny(ptr, stride_r, stride_d, r_offs, d_offs, r, depth):
    """Tile [R, D] of a matrix with r rows of length depth, zero outside. One of the two strides is 1."""
    mask = (r_offs < r)[:, None] & (d_offs < depth)[None, :]
    return tl.load(ptr + r_offs[:, None] * stride_r + d_offs[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def dot_skinny(skinny, big, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + skinny @ big. With SPLIT the fp32 operand `skinny` keeps its fp32 precision beside the 16-bit `big`.

    bf16: skinny as the sum of three bf16 terms (3 × 8 bits of mantissa cover fp32's 24), small terms first.
    fp16: its exponent range is too small for such terms, so both operands go through three tf32 products;
    an fp16 number is exact in tf32.
    """
    if SPLIT:
        if big.dtype == tl.bfloat16:
            high = skinny.to(tl.bfloat16)
            rest = skinny - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(low, big, acc)
            acc = tl.dot(middle, big, acc)
            return tl.dot(high, big, acc)
        else:
            return tl.dot(skinny, big.to(tl.float32), acc, input_precision="tf32x3")
    else:
        return tl.dot(skinny.to(big.dtype), big, acc, input_precision=PRECISION)


@triton.jit
def shrink_tasks(
    src_desc, skinny_ptr, out_ptr, sync_ptr,
    M, depth, r,
    stride_r, stride_d,
    scaling, num_tasks,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr,
):  # fmt: skip
    """Claims shrink tasks until none is left; returns this program's rank in the order of leaving them.

    out [M, r] = scaling · src [M, depth] @ skinny [r, depth]ᵀ. Task t takes the row blocks t, t + num_tasks, …
    Programs that did no task leave first, so low ranks are early and high ranks are late.
    """
    r_offs = tl.arange(0, BLOCK_R)
    task = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    while task < num_tasks:
        for block in range(task, tl.cdiv(M, SHRINK_M), num_tasks):
            row = block * SHRINK_M
            acc = tl.zeros((BLOCK_R, SHRINK_M), tl.float32)
            for d in tl.range(0, depth, SHRINK_K, num_stages=SHRINK_STAGES):
                src = src_desc.load([row, d])  # [SHRINK_M, SHRINK_K]
                skinny = load_skinny(skinny_ptr, stride_r, stride_d, r_offs, d + tl.arange(0, SHRINK_K), r, depth)
                acc = dot_skinny(skinny, src.T, acc, SPLIT, PRECISION)
            m_offs = tl.arange(0, SHRINK_M)
            mask = (r_offs < r)[:, None] & (row + m_offs < M)[None, :]
            out = (acc * scaling).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + tl.cast(row, tl.int64) * r + m_offs[None, :] * r + r_offs[:, None], out, mask=mask)
        publish(sync_ptr, DONE)
        task = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    return task - num_tasks


@triton.jit
def gemm_tile(
    left_desc, right_desc, row, col, depth,
    TRANS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """left [rows, depth] @ right, one [BLOCK_M, BLOCK_N] tile in fp32; right is [cols, depth] with TRANS_RIGHT."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = left_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        if TRANS_RIGHT:
            right = right_desc.load([col, k]).T  # [BLOCK_K, BLOCK_N]
        else:
            right = right_desc.load([k, col])  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rank_step(
    acc, small_ptr, skinny_ptr, row, col, M, cols, r, stride_r, stride_d,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_K: tl.constexpr,
):  # fmt: skip
    """acc + small [M, r] @ skinny [r, cols] for one tile. Unpipelined: see the register-operand wgmma trap in ptxas."""
    m_offs = tl.arange(0, BLOCK_M)
    n_offs = col + tl.arange(0, BLOCK_N)
    for first in tl.static_range(0, BLOCK_R, RANK_K):
        r_offs = first + tl.arange(0, RANK_K)
        mask = (row + m_offs < M)[:, None] & (r_offs < r)[None, :]
        small = tl.load(small_ptr + tl.cast(row, tl.int64) * r + m_offs[:, None] * r + r_offs[None, :], mask=mask, other=0.0)
        skinny = load_skinny(skinny_ptr, stride_r, stride_d, r_offs, n_offs, r, cols)
        acc = tl.dot(small.to(dtype), skinny.to(dtype), acc, input_precision=PRECISION)
    return acc
