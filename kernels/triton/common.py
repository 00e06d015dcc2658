"""What the forward and the backward kernel share: tile order, claims and waits, the skinny products and the tile.

Both kernels multiply a tall matrix by a frozen one and add a product of rank r:

    forward     y  = x Wᵀ + S Bᵀ      S = scaling · x Aᵀ
    backward    dX = dy W + T A       T = scaling · dy B

With dropout a mask m(row, k) lies on the adapter's x: S = scaling · (m∘x) Aᵀ, dX = dy W + m∘(T A), dA = Tᵀ (m∘x).

So both run *shrink tasks* (S or T, memory-bound, one row block after another) beside *tiles*, whose epilogue takes one
more step of depth r once their row block is published. The backward ends with the *jobs* of dA and dB. In a forward
tiles may compute their own rows of S instead: then there are no shrink tasks.

Synchronisation words, int32, zero between launches:
    TICKET      next conversion, shrink task or place    DONE    shrink tasks finished
    EXIT        programs that have left                  JOB     next job of dA and dB to claim
    CONVERTED   conversions finished
    PROGRESS    row blocks published, a word for each max(BLOCK_M, SHRINK_M) rows
    then        parts of a stripe of dA or dB that are stored, a word for each stripe

A ticket says what a program does: first come the conversions, then the shrink tasks before the tiles, then
`side_programs` longer ones, which take what is left of the row blocks while others compute tiles, then the places, of
which the first `tile_programs` compute tiles. A program claims tickets until it has a place.

Why nothing can deadlock: a conversion waits for nothing, a shrink task for conversions, a tile or a job, which come
after a place, for shrink tasks or, where there are none, for conversions: all of them for what has a lower ticket, and
so for a program that runs, however few are resident at a time.

fp32 adapters beside a 16-bit base: the first thing that a launch does is to write A and B, and in the backward S, as
sums of 16-bit terms, one where the products run in 16 bits anyway (autocast), else three, whose 3 × 8 bits of mantissa
cover fp32's 24. From there on every operand of a product is 16-bit memory, as it is without fp32 adapters.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlora import dropout, schedule

INTERPRET: bool = triton.knobs.runtime.interpret
TRUNCATES = tl.constexpr(not INTERPRET)

TICKET = tl.constexpr(0)
DONE = tl.constexpr(1)
EXIT = tl.constexpr(2)
JOB = tl.constexpr(3)
CONVERTED = tl.constexpr(4)
PROGRESS = tl.constexpr(schedule.FIXED_WORDS)
# Elements of fp32 that one conversion takes.
CONVERT_SIZE = tl.constexpr(4096)


@triton.jit
def begin_early(EARLY: tl.constexpr):
    """With EARLY a launch may begin before the one before it on the stream has ended: this waits until that has.

    It comes first in a kernel: only then is what either wrote there. The next launch may already begin.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


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
def progress_of(row, M, BLOCK_M: tl.constexpr, SHRINK_M: tl.constexpr):
    """Which PROGRESS word tells of a tile's rows, and the count that says they are there."""
    ROWS: tl.constexpr = max(BLOCK_M, SHRINK_M)
    word = row // ROWS
    return word, tl.cdiv(min(M - word * ROWS, ROWS), SHRINK_M)


@triton.jit
def leave(sync_ptr, M, BLOCK_M: tl.constexpr, SHRINK_M: tl.constexpr, DELAY: tl.constexpr):
    """The last program to leave zeroes the words for the next launch. No other program touches them any more."""
    linger(sync_ptr, DELAY)
    if tl.atomic_add(sync_ptr + EXIT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        count = tl.cdiv(M, max(BLOCK_M, SHRINK_M))
        for first in range(0, count, 256):
            words = first + tl.arange(0, 256)
            tl.store(sync_ptr + PROGRESS + words, tl.zeros((256,), tl.int32), mask=words < count)
        tl.store(sync_ptr + TICKET, 0)
        tl.store(sync_ptr + DONE, 0)
        tl.store(sync_ptr + JOB, 0)
        tl.store(sync_ptr + CONVERTED, 0)
        tl.store(sync_ptr + EXIT, 0)


C0 = tl.constexpr(dropout.C0)
C1 = tl.constexpr(dropout.C1)
C2 = tl.constexpr(dropout.C2)
C3 = tl.constexpr(dropout.C3)


@triton.jit
def load_seed(seed):
    """The lower and the upper half of a seed, which is given as a number or in memory."""
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


# How masks are made. Eight elements share a hash, which plain Triton has to form for each of them, as it does not see
# which elements a thread holds together; PAIRED does it once for two neighbours, in PTX, where sm_90's comparison of
# packed bf16 also gives both factors at once. Either way the mask is that of fusedlora/dropout.py.
PLAIN = tl.constexpr(1)
PAIRED = tl.constexpr(2)

# A pair's word, w, from the counter of its eight, the seed's upper half, its columns' FACTOR and its SELECTOR; the
# registers of the second element hold the same.
_WORD = f"""
    .reg .b32 h, t, w; .reg .b64 z;
    mul.wide.u32 z, COUNTER, {dropout.C0}; mov.b64 {{h, t}}, z; xor.b32 h, h, t; xor.b32 h, h, HIGH;
    mul.wide.u32 z, h, {dropout.C1};       mov.b64 {{h, t}}, z; xor.b32 h, h, t;
    mul.wide.u32 z, h, FACTOR;             mov.b64 {{w, t}}, z; xor.b32 w, w, t;
    prmt.b32 t, h, 0, SELECTOR; xor.b32 w, w, t; and.b32 w, w, 0x7FFF7FFF;
"""
# Which bytes, from the lowest on, then change a word: those of zero for the upper row of an eight, those of h turned by
# 16 bits or right by 8 for the lower one.
UPPER_ROW = tl.constexpr(0x4444)
LOWER_LEFT = tl.constexpr(0x1032)
LOWER_RIGHT = tl.constexpr(0x0321)


def _word(counter: str, high: str, factor: str, selector: str) -> str:
    word = _WORD.replace("COUNTER", counter).replace("HIGH", high)
    return word.replace("FACTOR", factor).replace("SELECTOR", selector)


# As bf16 or fp16 numbers, 15 random bits compare as they do as integers as long as the threshold is none of an infinity
# or a NaN (`dropout.MAX_P`). NaNs are the largest, hence "unordered".
_MASK_16 = tl.constexpr("{" + _word("$2", "$4", "$6", "$8") + "set.geu.TYPE.TYPE t, w, $10; mul.rn.TYPE $0, $1, t; }")
MASK_BF16 = tl.constexpr(_MASK_16.value.replace("TYPE", "bf16x2"))
MASK_FP16 = tl.constexpr(_MASK_16.value.replace("TYPE", "f16x2"))
ADD_KEPT = tl.constexpr(
    "{ .reg .pred p, q;" + _word("$6", "$8", "$10", "$12") + "and.b32 t, w, 0x7FFF; setp.ge.u32 p, t, $14;"
    "shr.u32 t, w, 16; setp.ge.u32 q, t, $14; mov.b32 $0, $2; mov.b32 $1, $3;"
    "@p add.rn.f32 $0, $0, $4; @q add.rn.f32 $1, $1, $5; }"
)


@triton.jit
def counter_of(low, rows, cols, depth):
    """What the hashes of x [M, depth] are of. rows and cols broadcast."""
    rows = rows.to(tl.uint32)
    cols = cols.to(tl.uint32)
    rows = rows // 16 * 8 + rows % 8
    return rows * (tl.cdiv(depth, 16) * 4).to(tl.uint32) + low + (cols // 16 * 4 + cols % 8 // 2)


@triton.jit
def factor_of(cols):
    """The last factor of their words."""
    return tl.where((cols & 8) == 0, C2, C3).to(tl.uint32)


@triton.jit
def selector_of(rows, cols):
    """What of h changes a word."""
    return tl.where((rows & 8) == 0, UPPER_ROW, tl.where((cols & 8) == 0, LOWER_LEFT, LOWER_RIGHT)).to(tl.uint32)


@triton.jit
def kept(counter, high, threshold, rows, cols):
    """Which elements the dropout keeps."""
    h = (counter * C0) ^ tl.umulhi(counter, C0) ^ high
    h = (h * C1) ^ tl.umulhi(h, C1)
    factor = factor_of(cols)
    turned = tl.where((cols & 8) == 0, h >> 16 | h << 16, h >> 8 | h << 24)
    word = (h * factor) ^ tl.umulhi(h, factor) ^ tl.where((rows & 8) == 0, 0, turned)
    return (word >> (cols % 2 * 16).to(tl.uint32) & 0x7FFF) >= threshold.to(tl.uint32)


@triton.jit
def masked(x, low, high, threshold, rows, cols, depth, DROPOUT: tl.constexpr):
    """The tile of x under the dropout's mask; rows [:, None] and cols [None, :]."""
    counter = counter_of(low, rows, cols, depth)
    if DROPOUT == PAIRED and x.dtype.primitive_bitwidth == 16:
        both = threshold.to(tl.uint32) * 0x10001
        assembly: tl.constexpr = MASK_BF16 if x.dtype == tl.bfloat16 else MASK_FP16
        return tl.inline_asm_elementwise(
            assembly,
            "=r,r,r,r,r,r,r,r,r,r,r,r",
            [x, counter, high, factor_of(cols), selector_of(rows, cols), both],
            dtype=x.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.where(kept(counter, high, threshold, rows, cols), x, 0.0)


@triton.jit
def add_kept(acc, product, low, high, threshold, rows, cols, depth, DROPOUT: tl.constexpr):
    """acc + the tile of product under the dropout's mask, both fp32."""
    counter = counter_of(low, rows, cols, depth)
    if DROPOUT == PAIRED:
        return tl.inline_asm_elementwise(
            ADD_KEPT,
            "=&f,=&f,f,f,f,f,r,r,r,r,r,r,r,r,r,r",
            [acc, product, counter, high, factor_of(cols), selector_of(rows, cols), threshold.to(tl.uint32)],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        # A sum chosen, not a summand: that way ptxas keeps everything in registers.
        return tl.where(kept(counter, high, threshold, rows, cols), acc + product, acc)


@triton.jit
def load_skinny(ptr, stride_r, stride_d, r_offs, d_offs, r, depth):
    """Tile [R, D] of a matrix with r rows of length depth, zero outside. One of the two strides is 1."""
    mask = (r_offs < r)[:, None] & (d_offs < depth)[None, :]
    return tl.load(ptr + r_offs[:, None] * stride_r + d_offs[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def load_terms(ptr, plane, stride_r, stride_d, r_offs, d_offs, r, depth, TERMS: tl.constexpr):
    """As load_skinny, TERMS tiles that lie `plane` elements apart; three are returned, the first TERMS count."""
    high = load_skinny(ptr, stride_r, stride_d, r_offs, d_offs, r, depth)
    middle = high
    low = high
    if TERMS > 1:
        middle = load_skinny(ptr + plane, stride_r, stride_d, r_offs, d_offs, r, depth)
    if TERMS > 2:
        low = load_skinny(ptr + 2 * plane, stride_r, stride_d, r_offs, d_offs, r, depth)
    return high, middle, low


@triton.jit
def next_term(rest, dtype: tl.constexpr):
    """The 16-bit term of an fp32 tile, and what is left of it."""
    term = rest.to(dtype)
    return term, rest - term.to(tl.float32)


@triton.jit
def convert(ptr, terms_ptr, index, size, TERMS: tl.constexpr):
    """The 16-bit terms [TERMS, size] of elements index · CONVERT_SIZE … of an fp32 array of `size`."""
    offs = index * CONVERT_SIZE + tl.arange(0, CONVERT_SIZE)
    rest = tl.load(ptr + offs, mask=offs < size, other=0.0)
    for i in tl.static_range(TERMS):
        term, rest = next_term(rest, terms_ptr.dtype.element_ty)
        tl.store(terms_ptr + i * size + offs, term, mask=offs < size)


@triton.jit
def conversions(
    sync_ptr, a_ptr, b_ptr, s_ptr, a_terms_ptr, b_terms_ptr, s_terms_ptr, a_size, b_size, s_size,
    TERMS: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """Claims conversions until none is left.

    Returns a claimed ticket for what comes next, and the ticket that this begins with: the number of conversions, which
    whoever reads terms waits for. Three arrays, of which those with size 0 are left out.
    """
    a_count = tl.cdiv(a_size, CONVERT_SIZE)
    b_count = tl.cdiv(b_size, CONVERT_SIZE)
    count = a_count + b_count + tl.cdiv(s_size, CONVERT_SIZE)
    ticket = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    while ticket < count:
        if ticket < a_count:
            convert(a_ptr, a_terms_ptr, ticket, a_size, TERMS)
        elif ticket < a_count + b_count:
            convert(b_ptr, b_terms_ptr, ticket - a_count, b_size, TERMS)
        elif s_terms_ptr is not None:
            convert(s_ptr, s_terms_ptr, ticket - a_count - b_count, s_size, TERMS)
        linger(sync_ptr, DELAY)
        publish(sync_ptr + CONVERTED)
        ticket = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    return ticket, count


@triton.jit
def dot_skinny(
    big, high, middle, low, acc, TERMS: tl.constexpr, RANK_FIRST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc [D, R] + big [D, K] @ skinny [R, K]ᵀ, with RANK_FIRST acc [R, D] + its transpose.

    skinny is the sum of TERMS terms, and goes in small terms first. Tensor cores truncate where they add, which over a
    long sum costs more than the terms gain: with more than one, each step is summed from zero and added to `acc` by an
    ordinary, rounding addition.

    `big` may have come through registers (a dropout mask). wgmma takes such a first operand, but ptxas before 13.3
    miscompiles that in a pipelined loop: it must be the second then, hence RANK_FIRST.
    """
    step = acc
    if TERMS > 1:
        step = tl.zeros_like(acc)
    if RANK_FIRST:
        if TERMS > 1:
            step = tl.dot(low, big.T, step)
            step = tl.dot(middle, big.T, step)
        step = tl.dot(high.to(big.dtype), big.T, step, input_precision=PRECISION)
    else:
        if TERMS > 1:
            step = tl.dot(big, low.T, step)
            step = tl.dot(big, middle.T, step)
        step = tl.dot(big, high.T.to(big.dtype), step, input_precision=PRECISION)
    return acc + step if TERMS > 1 else step


@triton.jit
def regained(acc, DEPTH: tl.constexpr):
    """A sum of `dot_skinny`'s steps of DEPTH with more than one term, without what truncation took on average.

    Every addition within a step ends nearer to zero. Measured on an H100, whatever the shape: 6.0e-8 of the sum in
    steps of 64, 1.0e-7 in steps of 128. That is as much as all rounding does. The interpreter does not truncate.
    """
    return acc + acc * (2e-8 + 6.25e-10 * DEPTH) if TRUNCATES else acc


@triton.jit
def load_small(ptr, row, first_r, M, r, BLOCK_M: tl.constexpr, RANK_K: tl.constexpr):
    """Tile [BLOCK_M, RANK_K] of S or T [M, r], zero outside."""
    m_offs = tl.arange(0, BLOCK_M)
    r_offs = first_r + tl.arange(0, RANK_K)
    mask = (row + m_offs < M)[:, None] & (r_offs < r)[None, :]
    return tl.load(ptr + tl.cast(row, tl.int64) * r + m_offs[:, None] * r + r_offs[None, :], mask=mask, other=0.0)


@triton.jit
def shrink_tasks(
    ticket, first_ticket, src_desc, skinny_ptr, out_ptr, planes_ptr, sync_ptr,
    # the other product of the same rows, with FUSE: partial [row blocks, depth, r] from small [M, r]
    small_ptr, partial_ptr,
    M, depth, r,
    stride_r, stride_d,
    scaling, num_tasks, shared_blocks, side_programs, seed, threshold,
    FUSE: tl.constexpr, DROPOUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """From its ticket on claims shrink tasks until none is left; returns the place at which the program goes on.

    The tickets before `first_ticket` are those of the launch's conversions. `num_tasks` tasks share the first
    `shared_blocks` row blocks, and `side_programs` more tasks, which run beside the tiles, the others.

    out [M, r] = scaling · src [M, depth] @ skinny [r, depth]ᵀ, src under the mask with DROPOUT. A task takes every so
    manieth row block and publishes each. With FUSE, for one term only, the same read of src also gives
    partial[block] = src[block]ᵀ @ small[block].

    TERMS: of skinny, which lie one after the other in memory. With more than one, planes [TERMS, M, r] gets the terms
    of out, and out itself may be None.
    """
    RANK_FIRST: tl.constexpr = DROPOUT > 0
    r_offs = tl.arange(0, BLOCK_R)
    m_offs = tl.arange(0, SHRINK_M)
    if DROPOUT:
        seed_low, seed_high = load_seed(seed)
    task = ticket - first_ticket
    if TERMS > 0:
        if task < num_tasks + side_programs:
            wait_for(sync_ptr + CONVERTED, first_ticket)
    while task < num_tasks + side_programs:
        side = task >= num_tasks
        begin = tl.where(side, task - num_tasks + shared_blocks, task)
        end = tl.where(side, tl.cdiv(M, SHRINK_M), shared_blocks)
        for block in range(begin, end, tl.where(side, side_programs, num_tasks)):
            row = block * SHRINK_M
            acc = tl.zeros((BLOCK_R, SHRINK_M) if RANK_FIRST else (SHRINK_M, BLOCK_R), tl.float32)
            if FUSE:
                small = load_small(small_ptr, row, 0, M, r, SHRINK_M, BLOCK_R)
                block_ptr = partial_ptr + tl.cast(block, tl.int64) * depth * r
            for d in tl.range(0, depth, SHRINK_K, num_stages=SHRINK_STAGES):
                src = src_desc.load([row, d])  # [SHRINK_M, SHRINK_K]
                d_offs = d + tl.arange(0, SHRINK_K)
                high, middle, low = load_terms(
                    skinny_ptr, depth * r, stride_r, stride_d, r_offs, d_offs, r, depth, TERMS
                )
                if DROPOUT:
                    rows = row + m_offs[:, None]
                    src = masked(src, seed_low, seed_high, threshold, rows, d_offs[None, :], depth, DROPOUT)
                acc = dot_skinny(src, high, middle, low, acc, TERMS, RANK_FIRST, PRECISION)
                if FUSE:
                    other = tl.dot(src.T, small, input_precision=PRECISION)  # [SHRINK_K, BLOCK_R]
                    mask = (d_offs < depth)[:, None] & (r_offs < r)[None, :]
                    tl.store(block_ptr + d_offs[:, None] * r + r_offs[None, :], other, mask=mask)
            if RANK_FIRST:
                acc = acc.T
            if TERMS > 1:
                acc = regained(acc, SHRINK_K)
            acc *= scaling
            mask = (row + m_offs < M)[:, None] & (r_offs < r)[None, :]
            offs = tl.cast(row, tl.int64) * r + m_offs[:, None] * r + r_offs[None, :]
            if out_ptr is not None:
                tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)
            if TERMS > 1:
                for i in tl.static_range(TERMS):
                    term, acc = next_term(acc, planes_ptr.dtype.element_ty)
                    tl.store(planes_ptr + i * tl.cast(M, tl.int64) * r + offs, term, mask=mask)
            linger(sync_ptr, DELAY)
            publish(sync_ptr + PROGRESS + row // max(BLOCK_M, SHRINK_M))
        publish(sync_ptr + DONE)
        task = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed") - first_ticket
    return task - num_tasks - side_programs


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
def dot_rank(
    small, small_rest, skinny, skinny_rest, acc, dtype: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + small @ skinny, one step of depth RANK_K.

    With more than one term, two of each go in: the product of both second terms is below what the 16-bit output can
    show, a single term each would not be.
    """
    if TERMS > 1:
        acc = tl.dot(small_rest, skinny, acc)
        acc = tl.dot(small, skinny_rest, acc)
    return tl.dot(small.to(dtype), skinny.to(dtype), acc, input_precision=PRECISION)


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
    early: tl.constexpr = BLOCK_R == RANK_K
    tl.static_assert(not (OWN or FLAT) or (early and TERMS <= 1 and DROPOUT == 0))
    tl.static_assert(not (OWN and WAIT))
    small_dtype: tl.constexpr = dtype if small_ptr is None else small_ptr.dtype.element_ty
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(cols, BLOCK_N)
    done = tl.full((), 0, tl.int1) | all_done  # a tensor, as it changes
    ready = done | (not WAIT)
    small = tl.zeros((BLOCK_M, RANK_K), small_dtype)
    small_rest = small
    if FLAT and (WAIT or OWN):  # what is there from the start would be a wgmma's operand in registers: C7515
        steps = tl.cdiv(depth, BLOCK_K)
        step = -1
        tile = first - stride
        row = 0
        col = 0
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
            tile_m, tile_n = tile_coordinates(tile, num_tiles_m, num_tiles_n, GROUP_M)
            row = tile_m * BLOCK_M
            col = tile_n * BLOCK_N
            skinny = None
            skinny_rest = None
            if early:
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
    return done
