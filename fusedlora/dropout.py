"""The dropout masks of the adapter's input: drawn as a tensor on a CPU, made from a seed on a GPU.

A seeded mask is a function of the seed and of the element's place alone, so that the kernels make it where they need
it and store nothing. Eight elements of x [M, K] share a chain of products: rows m and m + 8, m % 16 < 8, of columns k,
k + 1, k + 8 and k + 9, k even and k % 16 < 8, which tensor cores take from one thread. With i = ((⌊m / 16⌋ · 8 +
m % 8) · ⌈K / 16⌉ + ⌊k / 16⌋) · 4 + k % 16 / 2,

    h = fold((fold((i + low) · C0) ^ high) · C1)        fold(z) = (z ^ z >> 32) mod 2³²
    columns k, k + 1:        row m: u = fold(h · C2)    row m + 8: u ^ (h turned by 16 bits)
    columns k + 8, k + 9:    row m: v = fold(h · C3)    row m + 8: v ^ (h turned right by 8 bits)

where i + low is taken mod 2³² and the products have 64 bits; low and high are the seed's halves. Bits 0 to 14 of a
word belong to its even column, 16 to 30 to the odd one, and an element is kept where its bits are at least round(p ·
2¹⁵): the rate is p to 1.5e-5.

Folding a double-width product is the round of Wang Yi's "wyhash" (2019). The seed's upper half comes in between the
rounds: two seeds, which are drawn at random, give shifted copies of one mask only where these halves are equal.

The lower row's words need more than the last products' halves: an upper half is below C2 or C3, and the lower bits of a
lower half depend on those of h alone; both show. The bytes that decide, the upper ones of a word's halves, are two of
u, two of v, and four of either of them with a byte of h each, all of which are different ones. Over every third of the
2³² values that the second round can start from, the 256 outcomes of an eight come as often as those of independent
elements do (χ² of 247 to 327 with 255 degrees of freedom, at p = 0.05, 0.1, 0.25 and 0.5).
"""

import threading

import torch
from torch import Tensor

from .memory import capturing

# Odd, with bits of no pattern: of the golden ratio, the square root of 3, a multiplier of Philox, the square root of 7.
C0, C1, C2, C3 = 0x9E3779B9, 0xBB67AE85, 0xD2511F53, 0xA54FF53B
# The kernels compare 15 bits as 16-bit floating-point numbers, whose order is that of integers up to infinity, 0x7C00.
MAX_P = 0.96
# Hashes that torch forms at a time, those of 16 rows at least: a few int64 tensors of this size are alive.
_CHUNK = 1 << 21
# Two threads would else read one offset, and draw one seed.
_drawing = threading.Lock()


def threshold(dropout_p: float) -> int:
    """What an element's 15 bits must reach for it to be kept."""
    return min(round(dropout_p * 2**15), 2**15 - 1)


def draw(x: Tensor, dropout_p: float, backend: str) -> Tensor:
    """What the dropout of one call needs, from torch's generator of x's device.

    On a GPU a seed in [2⁶², 2⁶³), int64 [1], on the CPU, or on x's device inside a graph capture or torch.compile,
    where every replay must draw anew. Elsewhere, unless the kernels are asked for by name, a bool mask [M, K] for x
    flattened, True with probability 1 - dropout_p: that is faster there than the hash. Above MAX_P it is a mask always.
    """
    if seeded(x, dropout_p, backend):
        if x.device.type != "cuda":
            return torch.randint(2**62, 2**63 - 1, (1,), dtype=torch.int64, device="cpu")
        if drawn_on_device(x):
            return torch.randint(2**62, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        return torch.tensor([_next_seed(x.device)], device="cpu")  # whatever the default device is
    shape = (x.numel() // x.shape[-1], x.shape[-1])
    if x.device.type == "cpu":  # half the time of bernoulli_ there, for a passing float32 of the mask's shape
        return torch.rand(shape, dtype=torch.float32) >= dropout_p
    return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout_p)


def seeded(x: Tensor, dropout_p: float, backend: str) -> bool:
    """Whether `draw` gives a seed, not a mask."""
    return dropout_p <= MAX_P and (x.device.type == "cuda" or backend == "triton")


def drawn_on_device(x: Tensor) -> bool:
    """Whether `draw` would draw a seed there."""
    return x.device.type == "cuda" and (torch.compiler.is_compiling() or capturing(x.device.index))


def _next_seed(device: torch.device) -> int:
    """The next seed of the CUDA generator, which moves on as after any other draw; nothing runs on the GPU."""
    generator = torch.cuda.default_generators[device.index]
    with _drawing:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
    return _mix(_mix(generator.initial_seed()) + offset) >> 1 | 1 << 62


def _mix(z: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ z >> 31


def launch_dropout(
    seed: Tensor | None, dropout_p: float, scaling: float
) -> tuple[float, Tensor | int | None, int | None]:
    """The kernels' scaling, seed and threshold: what dropout keeps is scaled up along with S and T.

    A seed on the CPU goes along as a number; being 2⁶² or more it is always typed alike.

    Raises:
        ValueError: a rate above MAX_P, with a seed.
    """
    scaling = float(scaling)  # a launch is typed for a float
    if seed is None:
        return scaling, None, None
    if dropout_p > MAX_P:
        raise ValueError(f"dropout_p is {dropout_p}, with a seed it must be at most {MAX_P}")
    number = seed if seed.is_cuda else int(seed.item())
    return scaling / (1.0 - dropout_p), number, threshold(dropout_p)


def as_mask(drawn: Tensor, M: int, K: int, dropout_p: float, device: torch.device) -> Tensor:
    """The bool mask [M, K] of what `draw` gave: itself, or the kernels' mask of that seed."""
    if drawn.dtype is torch.bool:
        return drawn
    seed = drawn.to(device)
    low, high = seed & _WORD, seed >> 32
    bound = threshold(dropout_p)
    across = (K + 15) // 16
    mask = torch.empty(((M + 15) // 16, 2, 8, across, 2, 4, 2), dtype=torch.bool, device=device)
    runs = max(_CHUNK // (32 * across), 1)  # of 16 rows
    for first in range(0, len(mask), runs):
        part = mask[first : first + runs]
        h = torch.arange(32 * across * first, 32 * across * (first + len(part)), device=device).view(-1, 8, across, 4)
        h = _fold(h.add_(low).bitwise_and_(_WORD).mul_(C0)).bitwise_xor_(high)
        h = _fold(h.mul_(C1))
        for right, (factor, turn) in enumerate(((C2, 16), (C3, 8))):
            word = _fold(h * factor)
            for lower in range(2):
                part[:, lower, :, :, right, :, 0] = (word & 0x7FFF) >= bound
                part[:, lower, :, :, right, :, 1] = (word >> 16 & 0x7FFF) >= bound
                word ^= h >> turn | h << 32 - turn
    return mask.view(-1, 16 * across)[:M, :K]


_WORD = 2**32 - 1


def _fold(product: Tensor) -> Tensor:
    """The halves of 64-bit products, which are right in int64 though their sign is not, exclusively or-ed."""
    return product.bitwise_xor_(product >> 32).bitwise_and_(_WORD)
