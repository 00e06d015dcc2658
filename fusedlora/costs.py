"""How long a call takes, roughly, by the kernels and by PyTorch's own products: "auto" takes those where they should be
faster, elsewhere the kernels, of which cuda_config.FASTER chooses; where `tune` has compared them it goes by that.

Microseconds of GPU time on an H200, used for all of Hopper, fitted to 200 shapes of real models whose forwards and
backwards (of all three gradients) were timed apart (bench/results/directions-h200.json; tests/test_costs.py says how
far the choices made by them are from the best ones). Kernels lose where rows are too few to fill the GPU with tiles,
since cuBLAS splits the depth as well, or a little more than whole tiles; and for wide ranks, whose S and T cost them
more than a product of its own. Imports neither torch nor a kernel.
"""

from __future__ import annotations

import functools

from .config import Problem, backward_config, decode_config, forward_config
from .cuda_config import DECODE_UP_TO, cuda_config, end_us
from .schedule import backward_end_us, forward_end_us

# Up to this rank Triton's kernels can be faster. For so few elements of W, and up to 2048 rows, launches decide, of
# which kernels have one.
MAX_RANK_FASTER, SMALL = 64, 5 << 19
FLOP_PER_US_SM, BYTES_PER_US = 743e6 / 132, 3.4e6  # of cuBLAS
# Of a product with S, T, x or dy that only reads and writes; launches in a row.
STREAMED_PER_US, LAUNCH_US = 2.7e6, 2.8
DECODE_FIXED_US = 3.0
# Forward and backward over what `end_us` expects, and what is added; the same above MAX_RANK_FASTER, where power is the
# limit.
CUDA_OVER, CUDA_FIXED_US, CUDA_WIDE_OVER, CUDA_WIDE_FIXED_US = {True: 1.07, False: 1.08}, 2.0, 1.05, 8.4
TRITON_BYTES_PER_US, TRITON_FIXED_US = {True: 2.2e6, False: 1.9e6}, {True: 9.0, False: 5.0}
# Of a forward whose tiles compute S: they wait for nobody. Those of 64 rows, one warpgroup's, take longer than by area.
IN_TILES_FIXED_US, IN_TILES_64_ROWS = 3.0, 1.4


def products_us(M: int, N: int, K: int, r: int, forward: bool, converts: bool, num_sms: int) -> float:
    """Of the reference: three products forward, five backward; where the adapter's parameters are cast, that too."""
    us = max(2 * M * N * K / (FLOP_PER_US_SM * num_sms), 2 * (M * K + N * K + M * N) / BYTES_PER_US) + 3.7
    streamed = 2 * (M * K + 2 * M * N if forward else 2 * M * N + 3 * M * K) / STREAMED_PER_US
    launches = (3 if forward else 5) + converts * (2 if forward else 4)
    unaligned = not forward and r > 1 and r % 8 > 0  # a row of S, T or dB begins at no multiple of 16 bytes
    if unaligned:
        streamed *= 1.8
    few = 40 if unaligned and 1 < M < 8 else 0  # at three of six such shapes dB takes 50 to 140 µs
    return us + streamed + launches * LAUNCH_US + few


def cuda_us(p: Problem, forward: bool) -> float:
    """Of the CUDA C++ kernels."""
    config = cuda_config(p, forward)
    if forward and config.decode_rows:
        return 2 * p.out * p.depth / BYTES_PER_US + DECODE_FIXED_US
    us = end_us(p, config, forward)
    if p.r <= MAX_RANK_FASTER:
        return CUDA_OVER[forward] * us + CUDA_FIXED_US
    a_ready = 0 if forward else 10 if p.r <= 128 else 20  # its ranks side by side
    return CUDA_WIDE_OVER * us + CUDA_WIDE_FIXED_US + a_ready


def triton_us(p: Problem, forward: bool) -> float:
    """Of the Triton kernels, by their schedule, whose microseconds are those of another GPU."""
    weight = 2 * p.out * p.depth
    if forward and decode_config(p) is not None:
        return weight / BYTES_PER_US * (1 + (p.r / MAX_RANK_FASTER) ** 3) + DECODE_FIXED_US
    if forward:
        config = forward_config(p)
        us = 1.13 * forward_end_us(p, config)
        if config.IN_TILES:
            us *= IN_TILES_64_ROWS if config.BLOCK_M == 64 else 1
            return max(us, weight / BYTES_PER_US) + IN_TILES_FIXED_US
    else:
        us = 1.17 * backward_end_us(p, backward_config(p))
    if p.M <= 256:  # memory has less to do than where depths are split
        us = max(us, weight / TRITON_BYTES_PER_US[forward] + (0 if forward else 7))
    return us + TRITON_FIXED_US[forward]


@functools.lru_cache(maxsize=4096)
def why_slower(kernels: str, forward: bool, M: int, N: int, K: int, r: int, converts: bool, num_sms: int) -> str | None:
    """Why these kernels, "cuda" or "triton", should take longer than PyTorch's products; None where they should not.

    x is bf16 or fp16, and there is no dropout; `converts`: lora_A and lora_B are fp32, rounded to x's dtype.
    """
    if r > MAX_RANK_FASTER and (kernels == "triton" or M <= DECODE_UP_TO):
        return f"r is {r}, above {MAX_RANK_FASTER}"
    if N * K <= SMALL and M <= 2048 and r <= MAX_RANK_FASTER:
        return None
    out, depth = (N, K) if forward else (K, N)
    p = Problem(M, out, depth, r, 2, False, 90, num_sms)
    us = cuda_us(p, forward) if kernels == "cuda" else triton_us(p, forward)
    theirs = products_us(M, N, K, r, forward, converts, num_sms)
    return None if us <= theirs else f"about {theirs:.0f} µs, the kernels {us:.0f}"
