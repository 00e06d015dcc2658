"""What the forward and the backward kernel share: tile order, claims and waits, the skinny products and the tile.

Both kernels multiply a tall matrix by a frozen one and add a product of rank r:

    forward     y  = x Wᵀ + S Bᵀ      S = scaling · x Aᵀ
    backward    dX = dy W + T A       T = scaling · dy B

With dropout a mask m(row, k) lies on the adapter's x: S = scaling · (m∘x) Aᵀ, dX = dy W + m∘(T A), dA = Tᵀ (m∘x).

So both run *shrink tasks* (S or T, memory-bound, one row block after another) beside *tiles*, whose epilogue takes one
more step of depth r once their row block is published. The backward ends with the *jobs* of dA and dB.

Synchronisation words, int32, zero between launches:
    TICKET      next shrink task to claim         DONE    shrink tasks finished
    EXIT        programs that have left           JOB     next job of dA and dB to claim
    PROGRESS    row blocks published, MAX_TASKS words: one for each shrink task where a row block holds whole tiles'
                rows, else one for each BLOCK_M rows
    ARRIVED     parts of a stripe of dA or dB that are stored, a word for each stripe

Why nothing can deadlock: a program claims shrink tasks until none is left before it computes its first tile, and a
shrink task waits for nothing. So whoever waits for a row block knows that it is held by a program that runs and will
publish it, however few programs are resident at a time.
"""

import triton
import triton.language as tl

from fusedlora import dropout, schedule

INTERPRET: bool = triton.knobs.runtime.interpret

TICKET = tl.constexpr(0)
DONE = tl.constexpr(1)
EXIT = tl.constexpr(2)
JOB = tl.constexpr(3)
PROGRESS = tl.constexpr(4)
MAX_TASKS = tl.constexpr(schedule.MAX_TASKS)
ARRIVED = tl.constexpr(4 + schedule.MAX_TASKS)


@triton.jit
def tile_coordinates(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row block, column block), in column-major groups of GROUP_M row blocks so that L2 is reused."""
    group_tiles = GROUP_M * num_tiles_n
    group = tile // group_tiles
    group_rows = min(num_tiles_m - group * GROUP_M, GROUP_M)
    within = tile % group_tiles
    return group * GROUP_M + within % group_rows, within // group_rows


@triton.jit
def linger(sync_ptr, DELAY: tl.constexpr):
    """Nothing, or in tests a pseudo-random pause of up to DELAY polls, to shake out orders that rarely happen."""
    if DELAY > 0:
        seed = tl.program_id(0) * 40503 + tl.atomic_add(sync_ptr + TICKET, 0, sem="relaxed") * 9973
        for _ in range((seed * 69069 >> 8) % DELAY):
            tl.atomic_add(sync_ptr + EXIT, 0, sem="relaxed")


@triton.jit
def publish(word_ptr):
    """Counts one finished piece of work; the program's earlier stores are visible to whoever acquires the count."""
    tl.debug_barrier()
    tl.atomic_add(word_ptr, 1, sem="release")


@triton.jit
def published(word_ptr):
    """How many pieces of work are published; their stores may be read by ordinary loads from here on."""
    return tl.atomic_add(word_ptr, 0, sem="acquire")


@triton.jit
def wait_for(word_ptr, count):
    """Spins until `count` pieces of work are published."""
    while published(word_ptr) < count:
        pass


@triton.jit
def progress_of(row, M, num_tasks, BLOCK_M: tl.constexpr, SHRINK_M: tl.constexpr):
    """Which PROGRESS word tells of a tile's rows, and the count that says they are there."""
    block = row // SHRINK_M
    if SHRINK_M >= BLOCK_M:
        return block % num_tasks, block // num_tasks + 1
    else:
        return row // BLOCK_M, tl.cdiv(min(M - row, BLOCK_M), SHRINK_M)


@triton.jit
def leave(sync_ptr, DELAY: tl.constexpr):
    """The last program to leave zeroes the words for the next launch. No other program touches them any more."""
    linger(sync_ptr, DELAY)
    if tl.atomic_add(sync_ptr + EXIT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(sync_ptr + PROGRESS + tl.arange(0, MAX_TASKS), tl.zeros((MAX_TASKS,), tl.int32))
        tl.store(sync_ptr + TICKET, 0)
        tl.store(sync_ptr + DONE, 0)
        tl.store(sync_ptr + JOB, 0)
        tl.store(sync_ptr + EXIT, 0)


C0 = tl.constexpr(dropout.C0)
C1 = tl.constexpr(dropout.C1)
C2 = tl.constexpr(dropout.C2)


@triton.jit
def load_seed(seed):
    """The halves of a seed, which is given as a number or in memory."""
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


# How masks are made. Two neighbours share a hash, which plain Triton has to form for each of them, as it does not see
# which elements a thread holds together; PAIRED does it once, in PTX, where sm_90's comparison of packed bf16 also
# gives both factors at once. Either way the mask is that of fusedlora/dropout.py.
PLAIN = tl.constexpr(1)
PAIRED = tl.constexpr(2)

# $h from the start of a pair's hash; the registers of the second element hold the same.
_FINISH_HASH = f"""
    shr.u32 t, BASE, 16;    xor.b32 h, BASE, t;     xor.b32 h, h, HIGH;     mul.lo.u32 h, h, {dropout.C1};
    shr.u32 t, h, 15;       xor.b32 h, h, t;        mul.lo.u32 h, h, {dropout.C2};
    shr.u32 t, h, 16;       xor.b32 h, h, t;        and.b32 h, h, 0x7FFF7FFF;
"""


def _finish_hash(base: str, high: str) -> str:
    return _FINISH_HASH.replace("BASE", base).replace("HIGH", high)


# As bf16 or fp16 numbers, 15 random bits compare as they do as integers. NaNs are the largest, hence "unordered".
_MASK_16 = tl.constexpr(
    "{ .reg .b32 h, t;" + _finish_hash("$2", "$4") + "set.geu.TYPE.TYPE t, h, $6; mul.rn.TYPE $0, $1, t; }"
)
MASK_BF16 = tl.constexpr(_MASK_16.value.replace("TYPE", "bf16x2"))
MASK_FP16 = tl.constexpr(_MASK_16.value.replace("TYPE", "f16x2"))
ADD_KEPT = tl.constexpr(
    "{ .reg .b32 h, t; .reg .pred p, q;" + _finish_hash("$6", "$8") + "and.b32 t, h, 0x7FFF; setp.ge.u32 p, t, $10;"
    "shr.u32 t, h, 16; setp.ge.u32 q, t, $10; mov.b32 $0, $2; mov.b32 $1, $3;"
    "@p add.rn.f32 $0, $0, $4; @q add.rn.f32 $1, $1, $5; }"
)


@triton.jit
def hash_base(low, rows, cols, depth):
    """Where the hashes of x [M, depth] start. rows and cols broadcast."""
    # The first multiplication is done for rows and columns apart: what is left of it for a pair is an addition.
    return (rows.to(tl.uint32) * (depth // 2).to(tl.uint32) + low) * C0 + (cols // 2).to(tl.uint32) * C0


@triton.jit
def kept(base, high, threshold, cols):
    """Which elements the dropout keeps."""
    h = (base ^ (base >> 16) ^ high) * C1
    h = (h ^ (h >> 15)) * C2
    h = h ^ (h >> 16)
    return (h >> (cols % 2 * 16).to(tl.uint32) & 0x7FFF) >= threshold.to(tl.uint32)


@triton.jit
def masked(x, low, high, threshold, rows, cols, depth, DROPOUT: tl.constexpr):
    """The tile of x under the dropout's mask; rows [:, None] and cols [None, :]."""
    base = hash_base(low, rows, cols, depth)
    if DROPOUT == PAIRED and x.dtype.primitive_bitwidth == 16:
        both = threshold.to(tl.uint32) * 0x10001
        assembly: tl.constexpr = MASK_BF16 if x.dtype == tl.bfloat16 else MASK_FP16
        return tl.inline_asm_elementwise(
            assembly, "=r,r,r,r,r,r,r,r", [x, base, high, both], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return tl.where(kept(base, high, threshold, cols), x, 0.0)


@triton.jit
def add_kept(acc, product, low, high, threshold, rows, cols, depth, DROPOUT: tl.constexpr):
    """acc + the tile of product under the dropout's mask, both fp32."""
    base = hash_base(low, rows, cols, depth)
    if DROPOUT == PAIRED:
        return tl.inline_asm_elementwise(
            ADD_KEPT,
            "=&f,=&f,f,f,f,f,r,r,r,r,r,r",
            [acc, product, base, high, threshold.to(tl.uint32)],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        # A sum chosen, not a summand: that way ptxas keeps everything in registers.
        return tl.where(kept(base, high, threshold, cols), acc + product, acc)


@triton.jit
def load_skinny(ptr, stride_r, stride_d, r_offs, d_offs, r, depth):
    """Tile [R, D] of a matrix with r rows of length depth, zero outside. One of the two strides is 1."""
    mask = (r_offs < r)[:, None] & (d_offs < depth)[None, :]
    return tl.load(ptr + r_offs[:, None] * stride_r + d_offs[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def dot_skinny(big, skinny, acc, SPLIT: tl.constexpr, RANK_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc [D, R] + big [D, K] @ skinny [K, R], with RANK_FIRST acc [R, D] + its transpose.

    `big` may have come through registers (a dropout mask). wgmma takes such a first operand, but ptxas before 13.3
    miscompiles that in a pipelined loop: it must be the second then, hence RANK_FIRST.

    With SPLIT the fp32 `skinny` keeps its precision beside the bf16 `big`: it goes in as the sum of three bf16 terms
    (3 × 8 bits of mantissa cover fp32's 24), small terms first. Tensor cores truncate where they add, which over a
    long sum costs more than the split gains: each step is summed from zero and added to `acc` by an ordinary,
    rounding addition. The terms are made in registers, where only mma.sync takes them as they are. That is what a
    small rank gets as the dot's M, being below wgmma's 64.
    """
    if SPLIT:
        step = tl.zeros_like(acc)
        high = skinny.to(big.dtype)
        rest = skinny - high.to(tl.float32)
        middle = rest.to(big.dtype)
        low = (rest - middle.to(tl.float32)).to(big.dtype)
        if RANK_FIRST:
            step = tl.dot(low.T, big.T, step)
            step = tl.dot(middle.T, big.T, step)
            step = tl.dot(high.T, big.T, step)
        else:
            step = tl.dot(big, low, step)
            step = tl.dot(big, middle, step)
            step = tl.dot(big, high, step)
        return acc + step
    elif RANK_FIRST:
        return tl.dot(skinny.to(big.dtype).T, big.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(big, skinny.to(big.dtype), acc, input_precision=PRECISION)


@triton.jit
def load_small(ptr, row, first_r, M, r, BLOCK_M: tl.constexpr, RANK_K: tl.constexpr):
    """Tile [BLOCK_M, RANK_K] of S or T [M, r], zero outside."""
    m_offs = tl.arange(0, BLOCK_M)
    r_offs = first_r + tl.arange(0, RANK_K)
    mask = (row + m_offs < M)[:, None] & (r_offs < r)[None, :]
    return tl.load(ptr + tl.cast(row, tl.int64) * r + m_offs[:, None] * r + r_offs[None, :], mask=mask, other=0.0)


@triton.jit
def shrink_tasks(
    src_desc, skinny_ptr, out_ptr, sync_ptr,
    # the other product of the same rows, with FUSE: partial [row blocks, depth, r] from small [M, r]
    small_ptr, partial_ptr,
    M, depth, r,
    stride_r, stride_d,
    scaling, num_tasks, seed, threshold,
    FUSE: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """Claims shrink tasks until none is left; returns this program's place in the order of finding none.

    out [M, r] = scaling · src [M, depth] @ skinny [r, depth]ᵀ, src under the mask with DROPOUT. Task t takes the row
    blocks t, t + num_tasks, … and publishes each. With FUSE the same read of src also gives
    partial[block] = src[block]ᵀ @ small[block].
    """
    RANK_FIRST: tl.constexpr = DROPOUT > 0 or (SPLIT and BLOCK_R <= 32)
    r_offs = tl.arange(0, BLOCK_R)
    m_offs = tl.arange(0, SHRINK_M)
    if DROPOUT:
        low, high = load_seed(seed)
    task = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    while task < num_tasks:
        for block in range(task, tl.cdiv(M, SHRINK_M), num_tasks):
            row = block * SHRINK_M
            acc = tl.zeros((BLOCK_R, SHRINK_M) if RANK_FIRST else (SHRINK_M, BLOCK_R), tl.float32)
            if FUSE:
                small = load_small(small_ptr, row, 0, M, r, SHRINK_M, BLOCK_R)
                block_ptr = partial_ptr + tl.cast(block, tl.int64) * depth * r
            for d in tl.range(0, depth, SHRINK_K, num_stages=SHRINK_STAGES):
                src = src_desc.load([row, d])  # [SHRINK_M, SHRINK_K]
                d_offs = d + tl.arange(0, SHRINK_K)
                skinny = load_skinny(skinny_ptr, stride_r, stride_d, r_offs, d_offs, r, depth)
                if DROPOUT:
                    src = masked(src, low, high, threshold, row + m_offs[:, None], d_offs[None, :], depth, DROPOUT)
                acc = dot_skinny(src, skinny.T, acc, SPLIT, RANK_FIRST, PRECISION)
                if FUSE:
                    other = tl.dot(src.T, small, input_precision=PRECISION)  # [SHRINK_K, BLOCK_R]
                    mask = (d_offs < depth)[:, None] & (r_offs < r)[None, :]
                    tl.store(block_ptr + d_offs[:, None] * r + r_offs[None, :], other, mask=mask)
            if RANK_FIRST:
                acc = acc.T
            out = (acc * scaling).to(out_ptr.dtype.element_ty)
            mask = (row + m_offs < M)[:, None] & (r_offs < r)[None, :]
            tl.store(out_ptr + tl.cast(row, tl.int64) * r + m_offs[:, None] * r + r_offs[None, :], out, mask=mask)
            linger(sync_ptr, DELAY)
            publish(sync_ptr + PROGRESS + (task if SHRINK_M >= BLOCK_M else row // BLOCK_M))
        publish(sync_ptr + DONE)
        task = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    return task - num_tasks


@triton.jit
def dot_rank(small, skinny, acc, dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + small @ skinny, one step of depth RANK_K.

    With SPLIT both are fp32 and go in as two 16-bit terms each: the product of the low terms is below what the
    16-bit output can show, a single term each would not be.
    """
    small_high = small.to(dtype)
    skinny_high = skinny.to(dtype)
    if SPLIT:
        small_low = (small - small_high.to(tl.float32)).to(dtype)
        skinny_low = (skinny - skinny_high.to(tl.float32)).to(dtype)
        acc = tl.dot(small_low, skinny_high, acc)
        acc = tl.dot(small_high, skinny_low, acc)
    return tl.dot(small_high, skinny_high, acc, input_precision=PRECISION)


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
    acc, low, high, threshold, small_ptr, skinny_ptr, small, skinny, row, col, M, cols, r, stride_r, stride_d,
    early: tl.constexpr, dtype: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_K: tl.constexpr,
):  # fmt: skip
    """acc + mask ∘ (small @ skinny). 64 columns at a time: a product as wide as acc would not fit the registers."""
    width: tl.constexpr = acc.shape[1]
    if width > 64:
        acc_left, acc_right = halves(acc)
        if early:
            left, right = halves(skinny)
        else:
            left = skinny
            right = skinny
        acc_left = masked_product(
            acc_left, low, high, threshold, small_ptr, skinny_ptr, small, left, row, col,
            M, cols, r, stride_r, stride_d, early, dtype, DROPOUT, SPLIT, PRECISION, BLOCK_R, RANK_K,
        )  # fmt: skip
        acc_right = masked_product(
            acc_right, low, high, threshold, small_ptr, skinny_ptr, small, right, row, col + width // 2,
            M, cols, r, stride_r, stride_d, early, dtype, DROPOUT, SPLIT, PRECISION, BLOCK_R, RANK_K,
        )  # fmt: skip
        return beside(acc_left, acc_right)
    n_offs = col + tl.arange(0, width)
    m_offs = row + tl.arange(0, acc.shape[0])
    product = tl.zeros_like(acc)
    for first_r in tl.static_range(0, BLOCK_R, RANK_K):
        if not early:
            r_offs = first_r + tl.arange(0, RANK_K)
            skinny = load_skinny(skinny_ptr, stride_r, stride_d, r_offs, n_offs, r, cols)
            small = load_small(small_ptr, row, first_r, M, r, acc.shape[0], RANK_K)
        product = dot_rank(small, skinny, product, dtype, SPLIT, PRECISION)
    return add_kept(acc, product, low, high, threshold, m_offs[:, None], n_offs[None, :], cols, DROPOUT)


@triton.jit
def lora_tile(
    left_desc, right_desc, small_ptr, skinny_ptr, sync_ptr,
    row, col, M, cols, depth, r, stride_r, stride_d, num_tasks, seed, threshold,
    dtype: tl.constexpr, TRANS_RIGHT: tl.constexpr, WAIT: tl.constexpr,
    DROPOUT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_K: tl.constexpr,
    SHRINK_M: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """left [M, depth] @ right + small [M, r] @ skinny [r, cols]: one [BLOCK_M, BLOCK_N] tile in one fp32 accumulator.

    With DROPOUT the mask lies on the second product.

    right is [depth, cols], or [cols, depth] with TRANS_RIGHT. With WAIT, small comes from this launch's shrink tasks;
    SHRINK_M and BLOCK_M are powers of two, so from one row block or a few whole ones. Operands of a rank up to RANK_K
    are loaded before the main loop where they are ready, which hides their latency; higher ranks would leave it too few
    registers.
    """
    n_offs = col + tl.arange(0, BLOCK_N)
    early: tl.constexpr = BLOCK_R == RANK_K
    ready = True
    if WAIT:
        word, needed = progress_of(row, M, num_tasks, BLOCK_M, SHRINK_M)
        progress_ptr = sync_ptr + PROGRESS + word
    if early:
        skinny = load_skinny(skinny_ptr, stride_r, stride_d, tl.arange(0, BLOCK_R), n_offs, r, cols)
        if WAIT:
            ready = published(progress_ptr) >= needed
            small = load_small(small_ptr, row, 0, tl.where(ready, M, 0), r, BLOCK_M, RANK_K)
        else:
            small = load_small(small_ptr, row, 0, M, r, BLOCK_M, RANK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = left_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        if TRANS_RIGHT:
            right = right_desc.load([col, k]).T  # [BLOCK_K, BLOCK_N]
        else:
            right = right_desc.load([k, col])  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    linger(sync_ptr, DELAY)
    if early:
        if WAIT:
            if not ready:
                wait_for(progress_ptr, needed)
                small = load_small(small_ptr, row, 0, M, r, BLOCK_M, RANK_K)
    elif WAIT:
        wait_for(progress_ptr, needed)
    if DROPOUT:
        low, high = load_seed(seed)
        return masked_product(
            acc, low, high, threshold, small_ptr, skinny_ptr, small if early else None, skinny if early else None,
            row, col, M, cols, r, stride_r, stride_d, early, dtype, DROPOUT, SPLIT, PRECISION, BLOCK_R, RANK_K,
        )  # fmt: skip
    if early:
        acc = dot_rank(small, skinny, acc, dtype, SPLIT, PRECISION)
    else:
        # Unpipelined: pipelined wgmma with a register operand is miscompiled by ptxas before 13.3.
        for first_r in tl.static_range(0, BLOCK_R, RANK_K):
            r_offs = first_r + tl.arange(0, RANK_K)
            skinny = load_skinny(skinny_ptr, stride_r, stride_d, r_offs, n_offs, r, cols)
            small = load_small(small_ptr, row, first_r, M, r, BLOCK_M, RANK_K)
            acc = dot_rank(small, skinny, acc, dtype, SPLIT, PRECISION)
    return acc
