"""What the forward and the backward kernel share: claims and waits, skinny operands, and the tasks that sum S and T.

Both kernels multiply a tall matrix by a frozen one and add a product of rank r:

    forward     y  = x Wᵀ + S Bᵀ      S = scaling · x Aᵀ
    backward    dX = dy W + T A       T = scaling · dy B

With dropout a mask m(row, k) lies on the adapter's x (masks.py): S = scaling · (m∘x) Aᵀ, dX = dy W + m∘(T A),
dA = Tᵀ (m∘x).

So both run *shrink tasks* (S or T, memory-bound, one row block after another) beside *tiles* (tiles.py), whose epilogue
takes one more step of depth r once their row block is published. The backward ends with the *jobs* of dA and dB
(jobs.py). In a forward tiles may compute their own rows of S instead: then there are no shrink tasks.

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

from fusedlora import schedule
from fusedlora.kernels.masks import load_seed, masked

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
