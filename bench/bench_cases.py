"""What is measured: shapes, groups, and the arithmetic and memory traffic that each cannot do without."""

from dataclasses import dataclass

import torch

GROUPS = {
    "forward": "forward, as in training (saves what backward needs)",
    "backward": "backward: dX, dA, dB",
    "training": "forward + backward",
    "module": "forward + backward of the module called eagerly, wall time with host overhead",
    "features": "forward + backward of what else a layer does: dropout, a bias, fp32 adapters, DoRA",
    "decode": "forward alone, without gradients, of few rows",
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One shape: x [M, K], W [N, K], A [r, K], B [N, r], base dtype."""

    M: int
    K: int
    N: int
    r: int
    dtype: str = "bf16"
    headline: bool = False

    @property
    def id(self) -> str:
        """Name for -k: headline-M8192-4096to14336-r16-bf16."""
        return f"{'headline-' if self.headline else ''}M{self.M}-{self.K}to{self.N}-r{self.r}-{self.dtype}"

    @property
    def title(self) -> str:
        return f"M={self.M} {self.K}→{self.N} r={self.r} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


HEADLINE = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 4096, 64),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 16),
    (2048, 4096, 4096, 16),
    (512, 4096, 4096, 16),
    (8192, 4096, 1024, 16),
)

# The layers of Llama-3-8B: q and o, k and v, gate and up, down.
LLAMA_LAYERS = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))


def gpu_cases() -> list[Case]:
    """Llama-3-8B's layers over M and r, the headline shapes first."""
    grid = [(M, K, N, r) for M in (512, 2048, 8192) for K, N in LLAMA_LAYERS for r in (8, 16, 64, 128)]
    rest = [shape for shape in grid if shape not in HEADLINE]
    return [Case(*shape, headline=True) for shape in HEADLINE] + [Case(*shape) for shape in rest]


def cpu_cases() -> list[Case]:
    """Shapes of a small encoder and of a small decoder, in fp32 and bf16."""
    shapes = ((512, 384, 384, 8), (512, 384, 1536, 8), (256, 1024, 1024, 64))
    return [Case(*shape, dtype=dtype) for dtype in ("fp32", "bf16") for shape in shapes]


def decode_cases(on_gpu: bool) -> list[Case]:
    """A few tokens through one layer."""
    if not on_gpu:
        return [Case(M, 384, 384, 8, "fp32") for M in (1, 8)]
    return [Case(M, 4096, 4096, 16) for M in (1, 2, 4, 8, 16, 32, 64)]


def cases_of(group: str, on_gpu: bool, measure: bool) -> list[Case]:
    """The shapes of a group's rows."""
    if not measure:
        return tiny_cases(on_gpu)
    if group == "decode":
        return decode_cases(on_gpu)
    cases = gpu_cases() if on_gpu else cpu_cases()
    if group == "features" and on_gpu:
        return [case for case in cases if case.headline]
    return cases


def tiny_cases(on_gpu: bool) -> list[Case]:
    """Shapes that only show that a benchmark runs."""
    return [Case(48, 64, 128, 8, dtype) for dtype in (("bf16",) if on_gpu else ("fp32", "bf16"))]


@dataclass(frozen=True)
class Work:
    """Least arithmetic and least memory traffic of a group."""

    flops: int
    bytes: int


def work(case: Case, group: str, adapter_itemsize: int | None) -> Work:
    """Each input read once, each output written once. adapter_itemsize None: the frozen linear alone.

    forward reads x, W, A, B and writes y, S, decode does not write S; backward reads dy, x, W, A, B, S and writes dX,
    dA, dB. A dropout mask and DoRA's norm and gain are not counted.
    """
    M, K, N, r = case.M, case.K, case.N, case.r
    size = case.torch_dtype.itemsize
    base = 2 * M * K * N
    tensors = {"x": M * K * size, "y": M * N * size, "W": N * K * size}
    forward = Work(base, sum(tensors.values()))
    backward = Work(base, sum(tensors.values()))
    s = M * r * size
    if adapter_itemsize is not None:
        skinny = 2 * M * r * (K + N)
        adapter = r * (K + N) * adapter_itemsize
        forward = Work(base + skinny, forward.bytes + adapter + s)
        # T and T·A, dA, dB: twice forward's skinny products; x is read for dA, A and B come back as gradients.
        backward = Work(base + 2 * skinny, backward.bytes + tensors["x"] + 2 * adapter + s)
    if group == "decode":
        return Work(forward.flops, forward.bytes - (0 if adapter_itemsize is None else s))
    if group == "forward":
        return forward
    if group == "backward":
        return backward
    return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
