"""The kernels' dropout mask against torch's, element by element: see test_kernels.py for where it runs."""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fusedlora import dropout
from fusedlora.kernels.common import INTERPRET
from fusedlora.kernels.masks import PAIRED, PLAIN, add_kept, load_seed, masked

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)
DEVICE = "cpu" if INTERPRET else "cuda"


@triton.jit
def both_kernel(
    x_ptr, masked_ptr, added_ptr, M, K, seed, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """masked = mask∘x and added = x + mask∘x, of x [M, K]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < M) & (cols < K)
    x = tl.load(x_ptr + rows * K + cols, mask=inside, other=0.0)
    low, high = load_seed(seed)
    tl.store(masked_ptr + rows * K + cols, masked(x, low, high, threshold, rows, cols, K, DROPOUT), mask=inside)
    wide = x.to(tl.float32)
    tl.store(
        added_ptr + rows * K + cols, add_kept(wide, wide, low, high, threshold, rows, cols, K, DROPOUT), mask=inside
    )


@pytest.mark.parametrize("method", [PLAIN, PAIRED], ids=["plain", "paired"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("M", [1, 16, 40, 100])
def test_the_kernels_mask_is_torchs(M: int, dtype: torch.dtype, method) -> None:
    if method == PAIRED and (INTERPRET or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("in PTX of sm_90")
    # K a multiple of 16 where pairs are taken: then, as in the kernels' own tiles, neighbours of a row are one thread's
    K, p, seed = 72 if method == PLAIN else 80, 0.3, 2**62 + 0x123456789ABCDEF
    x = torch.ones(M, K, dtype=dtype, device=DEVICE)
    out, added = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan, dtype=torch.float32)
    grid = (triton.cdiv(M, 32), triton.cdiv(K, 32))
    both_kernel[grid](x, out, added, M, K, seed, dropout.threshold(p), method.value, 32, 32)
    mask = dropout.as_mask(torch.tensor([seed]), M, K, p, x.device)
    assert 0.5 < mask.double().mean() < 0.9
    assert torch.equal(out, mask.to(dtype))
    assert torch.equal(added, 1.0 + mask.float())
