"""The sweep's 200 shapes: layers of real models over M, r and dtype, and two lines through them for the pictures."""

import random
from collections.abc import Iterator

from bench_cases import Case

# in → out of the linears of a block: attention's q, k and v, o, then the MLP's; what an earlier model has is left out.
LAYERS = {
    "Llama-3.2-1B": ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)),
    "Llama-3.2-3B": ((3072, 3072), (3072, 1024), (3072, 8192), (8192, 3072)),
    "Llama-2-7B": ((4096, 11008), (11008, 4096)),
    "Llama-3-8B, Mistral-7B": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "Llama-2-13B": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "Llama-3-70B": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "Qwen2.5-0.5B": ((896, 896), (896, 128), (896, 4864), (4864, 896)),
    "Qwen2.5-1.5B": ((1536, 1536), (1536, 256), (1536, 8960), (8960, 1536)),
    "Qwen2.5-7B": ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)),
    "Qwen2.5-32B": ((5120, 27648), (27648, 5120)),
    "Mistral-Nemo-12B": ((5120, 4096), (5120, 1024), (4096, 5120), (5120, 14336), (14336, 5120)),
    "Gemma-2-2B": ((2304, 2048), (2304, 1024), (2048, 2304), (2304, 9216), (9216, 2304)),
    "Gemma-2-9B": ((3584, 4096), (3584, 2048), (4096, 3584), (3584, 14336), (14336, 3584)),
    "Gemma-3-27B": ((5376, 4096), (5376, 2048), (4096, 5376), (5376, 21504), (21504, 5376)),
    "ViT-B": ((768, 768), (768, 3072), (3072, 768)),
    "ViT-L": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "ViT-H": ((1280, 1280), (1280, 5120), (5120, 1280)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 197, 256, 500, 512, 577, 1024, 2048, 3000, 4096, 8192, 16384, 32768)
RANKS = (1, 2, 4, 8, 12, 16, 32, 64, 96, 128, 256)
DTYPES = ("bf16", "bf16", "fp16")

LINE = (4096, 4096)  # in → out of both lines
LINE_ROWS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LINE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LINE_M, LINE_R = 8192, 16

COUNT = 200


def sweep_cases() -> list[Case]:
    """The lines' shapes first, then a random choice in which every layer, M, r and dtype is drawn equally often."""
    cases = [Case(M, *LINE, LINE_R) for M in LINE_ROWS] + [Case(LINE_M, *LINE, r) for r in LINE_RANKS]
    found = dict.fromkeys(cases)
    layers = list(dict.fromkeys(layer for group in LAYERS.values() for layer in group))
    generator = random.Random(2024)  # only random() repeats across Python versions, so nothing else of it is used

    def shuffled(values: tuple) -> Iterator:
        while True:
            yield from sorted(values, key=lambda _: generator.random())

    draws = zip(shuffled(tuple(layers)), shuffled(ROWS), shuffled(RANKS), shuffled(DTYPES))
    while len(found) < COUNT:
        (K, N), M, r, dtype = next(draws)
        found[Case(M, K, N, r, dtype)] = None
    return list(found)


def compiled(cases: list[Case]) -> list[Case]:
    """The 20 of 200 that torch.compile is tried at too: every other one of the lines', and as many of the rest."""
    return cases[:20:2] + cases[20::18]


def small_sweep_cases() -> list[Case]:
    """For a CPU: that a sweep runs, goes on and draws."""
    shapes = [(M, 64, 64, 4) for M in (1, 16, 48)] + [(48, 64, 64, r) for r in (1, 16)] + [(16, 64, 96, 4)]
    return [Case(*shape, "fp32") for shape in shapes]


def sweep_cases_of(on_gpu: bool, measure: bool) -> list[Case]:
    """The shapes of a session."""
    if not measure:
        return small_sweep_cases()[:1]
    return sweep_cases() if on_gpu else small_sweep_cases()
