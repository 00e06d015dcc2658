"""The dropout's mask on the adapter's x, made from a seed wherever it is needed: that of fusedlora/dropout.py."""

import triton
import triton.language as tl

from fusedlora import dropout

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
# packed bf16 also gives both factors at once.
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
