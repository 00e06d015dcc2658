"""The real library, compiled for sm_90a by nvcc: what the compilers said, what is in it, and how it acts without a GPU.

Takes a minute or two unless it has been built before; needs nvcc and ninja, no GPU.
"""

import dataclasses
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedlora import cuda, cuda_build
from fusedlora.config import Problem
from fusedlora.cuda_config import CudaConfig, cuda_config, suits
from fusedlora.testing import make_inputs

SEED = torch.tensor([1])


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        cuda_build._tools()
    except cuda_build.BuildError as error:
        pytest.skip(str(error))
    return cuda_build.build(print)


def kernel_of(symbol: str) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and template arguments of a mangled kernel."""
    found = re.search(r"(lora_kernel|decode_kernel)I\d*(__nv_bfloat16|__half)((?:L(?:[ib]|NS_4KindE)\d+E)+)E", symbol)
    assert found, symbol
    return found[1], found[2], tuple(int(number) for number in re.findall(r"L(?:[ib]|NS_4KindE)(\d+)E", found[3]))


def all_kernels() -> set[tuple[str, str, tuple[int, ...]]]:
    # block_n, ranks, backward, dropout, terms, kind: plain, slices in tiles, dB with T, slices of terms, dm with dB
    tiles = [
        *itertools.product((128, 256), (1, 2, 4, 8), (0, 1), (0, 1), (1,), (0,)),
        *itertools.product((256,), (16,), (0, 1), (0, 1), (1,), (0,)),
        *itertools.product((128, 256), (1, 2), (0,), (0,), (1,), (1,)),
        *itertools.product((256,), (1, 2), (0,), (1,), (1,), (1,)),
        *itertools.product((256,), (1,), (1,), (0, 1), (1,), (2,)),
        *itertools.product((128, 256), (1, 2, 4, 8), (1,), (0,), (1,), (4,)),
        *itertools.product((256,), (16,), (1,), (0,), (1,), (4,)),
    ]
    precise = [
        *itertools.product((128, 256), (4,), (0, 1), (0, 1), (3,), (0,)),
        *itertools.product((128, 256), (4,), (0,), (0,), (3,), (3,)),
    ]
    # 8 rows of x, 64 rows of W
    decode = itertools.product((1, 2, 4, 8), (1, 2))
    kernels = [("lora_kernel", *tiles), ("decode_kernel", *decode)]
    dtypes = ("__nv_bfloat16", "__half")
    return {
        (name, dtype, arguments) for name, *all_arguments in kernels for arguments in all_arguments for dtype in dtypes
    } | {("lora_kernel", "__nv_bfloat16", arguments) for arguments in precise}


def instructions_of_a_step(code: str) -> int:
    """Of a tile's step of 64 columns of depth: the shortest loop around four wgmma of the tile's width."""
    width = kernel_of(code.split(None, 1)[0])[2][0]
    wgmma, branches, loops = [], [], []
    for line in code.splitlines():
        if f"HGMMA.64x{width}x16" in line or "BRA " in line:
            found = re.search(r"/\*([0-9a-f]{4,})\*/.*?(HGMMA|BRA [^;]*?0x([0-9a-f]+))", line)
            assert found, line
            at = int(found[1], 16)
            wgmma.append(at) if found[2] == "HGMMA" else branches.append((int(found[3], 16), at))
    for first, at in branches:
        if sum(first <= place <= at for place in wgmma) == 4:
            loops.append((at - first) // 16 + 1)
    return min(loops)


@pytest.mark.slow
def test_no_warnings_and_no_spills(library: Path) -> None:
    log = (library.parent / cuda_build.LOG).read_text()
    assert not [line for line in log.splitlines() if re.search(r"warning|C75\d\d", line)]
    pattern = (
        r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    spills = {kernel_of(symbol): (int(stores), int(loads)) for symbol, stores, loads in re.findall(pattern, log)}
    assert set(spills) == all_kernels()
    assert not {kernel: found for kernel, found in spills.items() if found != (0, 0)}


@pytest.mark.slow
def test_every_kernel_multiplies_by_wgmma(library: Path) -> None:
    disassembler = shutil.which("cuobjdump", path=str(cuda_build.find_nvcc().parent)) or shutil.which("cuobjdump")
    if disassembler is None:
        triton = pytest.importorskip("triton", reason="neither the CUDA toolkit nor triton brings cuobjdump")
        disassembler = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    code = subprocess.run([disassembler, "-sass", library], capture_output=True, text=True, check=True).stdout
    kernels = code.split("Function : ")[1:]
    counts = {kernel_of(text.split(None, 1)[0]): len(re.findall(r"\bHGMMA\.", text)) for text in kernels}
    assert set(counts) == all_kernels()
    assert all(count >= 4 for count in counts.values()), counts  # one for each 16 of a stage's 64 of depth
    decode = [text for text in kernels if "decode_kernel" in text.split(None, 1)[0]]
    # What the compiler does not know to be the same for a warp costs a step of a tile half as many again, and energy.
    steps = {kernel_of(text.split(None, 1)[0]): instructions_of_a_step(text) for text in kernels if text not in decode}
    assert not {kernel: step for kernel, step in steps.items() if not 40 <= step <= 60}
    assert all("UTMALDG" in text for text in kernels), "TMA loads"
    for text in kernels:  # launches may begin early: nothing comes before the wait for the one before
        before, after = text.split("ACQBULK", 1)
        touched = r"\b(LDG|STG|ATOMG?|REDG?|UTMALDG|UTMASTG)\b"
        assert not re.search(touched, before) and re.search(touched, after), kernel_of(text.split(None, 1)[0])
    assert all("UTMASTG" in text for text in kernels if text not in decode), "TMA stores"
    assert all("MOVM" in text and "HMMA" in text for text in decode), "the rank-r step on fragments"


@pytest.mark.slow
def test_the_library_is_asked_and_refuses_without_a_gpu(library: Path, monkeypatch) -> None:
    """Workspace and words are told without a driver; a launch then fails with a message, not with a crash."""
    monkeypatch.setattr(cuda, "found", cuda.found.__wrapped__)
    assert cuda.missing() is None
    monkeypatch.setattr(cuda, "num_sms", lambda device: 132)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    cuda._plan.cache_clear()
    i = make_inputs(1000, 512, 768, 16, torch.bfloat16)
    settings = {"seed": None, "adapter_dtype": torch.bfloat16}
    up = cuda.forward_plan(i.x, i.weight, i.lora_A, i.lora_B, None, save_s=True, **settings)
    assert up.work_size == 1000 * 16 * 2 and up.num_words >= 8 + 8
    s = torch.zeros(1000, 16, dtype=torch.bfloat16)
    whole = {"needs": (True, True, True), "config": CudaConfig(256, 4, 132, 2, parts=1)}
    down = cuda.backward_plan(i.dy, i.x, i.weight, i.lora_A, i.lora_B, s, **whole, **settings)
    assert down.work_size == (1000 + 512) * 16 * 2, "T, and A with its ranks side by side"
    assert down.num_words >= 8 + 8 + 768 // 64 + 512 // 64
    with_t = CudaConfig(256, 4, 132, 2, parts=1, db_with_t=True)
    tensors = (i.dy, i.x, i.weight, i.lora_A, i.lora_B, s)
    down = cuda.backward_plan(*tensors, needs=(True, True, True), config=with_t, **settings)
    assert down.work_size == (1000 + 512) * 16 * 2 + 2 * 2 * 768 * 16 * 4, "and dB's sums of two units, of both blocks"
    uneven = make_inputs(1100, 512, 768, 16, torch.bfloat16)  # of nine row blocks the last unit is one block's
    s_uneven, needs = torch.zeros(1100, 16, dtype=torch.bfloat16), (True, True, True)
    tensors_uneven = (uneven.dy, uneven.x, uneven.weight, uneven.lora_A, uneven.lora_B, s_uneven)
    down = cuda.backward_plan(*tensors_uneven, needs=needs, config=with_t, **settings)
    assert down.work_size == -(-1100 * 16 * 2 // 256) * 256 + 512 * 16 * 2 + (2 * 2 + 1) * 768 * 16 * 4
    with pytest.raises(RuntimeError, match="CUDA kernels could not be launched: db_with_t: error -8"):
        narrow = dataclasses.replace(with_t, block_n=128)
        cuda.backward_plan(*tensors, needs=(True, True, True), config=narrow, **settings)
    per_column = torch.ones(768)
    dora = SimpleNamespace(tensors=(per_column, i.dy, per_column, per_column, None))
    down = cuda.backward_plan(*tensors, dora=dora, **whole, **settings)
    assert down.work_size == (1000 + 512) * 16 * 2 + 768 * (16 + 4) * 4, "and sums of dB, and of dm by four warps"
    with pytest.raises(RuntimeError, match="CUDA kernels could not be launched: dm: error -9"):
        cuda.backward_plan(*tensors, dora=dora, needs=(True, True, True), config=with_t, **settings)
    wide = make_inputs(1000, 512, 768, 16, torch.bfloat16, torch.float32)
    precise = {"seed": None, "adapter_dtype": torch.float32}
    up = cuda.forward_plan(wide.x, wide.weight, wide.lora_A, wide.lora_B, None, save_s=True, **precise)
    assert up.work_size == (512 + 768 + 1000) * 64 * 2, "A, B and S, each in four groups of 16"
    parts = {"needs": (True, True, True), "config": CudaConfig(256, 4, 132, 2, parts=4)}
    tensors = (wide.dy, wide.x, wide.weight, wide.lora_A, wide.lora_B, s.float())
    down = cuda.backward_plan(*tensors, **parts, **precise)
    assert down.work_size == (768 + 1000 + 512 + 1000) * 64 * 2 + 4 * (768 + 512) * 16 * 4, "and sums of 16 ranks"
    for r, dtype in ((16, torch.float16), (17, torch.bfloat16)):
        other = make_inputs(1000, 512, 768, r, dtype, torch.float32)
        with pytest.raises(RuntimeError, match="three terms: error -5"):
            cuda.forward_plan(other.x, other.weight, other.lora_A, other.lora_B, None, save_s=True, **precise)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA kernels could not be launched: cuTensorMapEncodeTiled"):
            cuda.lora_forward(
                i.x, i.weight, i.lora_A, i.lora_B, None, scaling=1.0, adapter_dtype=torch.bfloat16, save_s=True
            )
    few = make_inputs(64, 512, 768, 16, torch.bfloat16)
    tensors = (few.x, few.weight, few.lora_A, few.lora_B, None)
    decode = CudaConfig(128, 4, 132, 1, 1, decode_rows=128, decode_split=4)
    plan = cuda.forward_plan(*tensors, save_s=True, config=decode, **settings)
    assert (plan.work_size, plan.num_words) == (0, 0), "the decode kernel needs none"
    for wrong in ({"decode_split": 3}, {"decode_split": 1}, {"decode_rows": 96}):
        with pytest.raises(RuntimeError, match="CUDA kernels could not be launched: the decode kernel: error -4"):
            cuda.forward_plan(*tensors, save_s=True, config=dataclasses.replace(decode, **wrong), **settings)
    cut = CudaConfig(256, 4, 132, 2, parts=1, slices=4)
    tensors, drops = (i.x, i.weight, i.lora_A, i.lora_B, None), settings | {"seed": SEED}
    up = cuda.forward_plan(*tensors, save_s=True, config=cut, **drops)
    assert up.work_size == 1000 * 16 * 2 + 1024 * 4 * 16 * 4, "S, and sums of its slices"
    assert up.num_words >= 8 + 3 * 8
    refusal = "CUDA kernels could not be launched: slices: error -6"
    for wrong in ({"slices": 7}, {"slices": 0}, {"slices": 2, "in_tiles": True}):  # six wide steps: too few for tiles
        with pytest.raises(RuntimeError, match=refusal):
            cuda.forward_plan(*tensors, save_s=True, config=dataclasses.replace(cut, **wrong), **drops)
    launch: dict[str, Any] = {"scaling": 1.0, "adapter_dtype": torch.bfloat16, "save_s": True}
    with pytest.raises(RuntimeError, match=refusal):  # no mask, so no need
        cuda.lora_forward(*tensors, config=cut, **launch)
    deep = make_inputs(512, 2048, 1024, 16, torch.bfloat16)
    beside_narrow = CudaConfig(128, 8, 132, 0, parts=1, slices=4, in_tiles=True)
    deep_tensors = (deep.x, deep.weight, deep.lora_A, deep.lora_B, None)
    with pytest.raises(RuntimeError, match=refusal):  # a mask takes too long there
        cuda.lora_forward(*deep_tensors, config=beside_narrow, seed=SEED, dropout_p=0.1, **launch)
    # What the table chooses is never refused: its rules for slices say again what the library asks for.
    sliced = dict.fromkeys(("", "masked", "precise"), 0)
    for M, N, K, r, kind in itertools.product(
        (65, 512, 8192), (256, 512, 520, 2048), range(1280, 2112, 64), (16, 32, 64), sliced
    ):
        if kind == "precise" and r > 16:
            continue
        problem = Problem(M, N, K, r, 2, kind == "precise", 90, 132, kind == "masked")
        config = cuda_config(problem, True)
        assert suits(problem, config)
        sliced[kind] += config.slices > 1
        shapes, dtype = ((M, K), (N, K), (r, K), (N, r)), torch.float32 if kind == "precise" else torch.bfloat16
        x, w, a, b = (torch.empty(s, dtype=of) for s, of in zip(shapes, (torch.bfloat16, torch.bfloat16, dtype, dtype)))
        kinds = {"seed": SEED if kind == "masked" else None, "adapter_dtype": dtype}
        chosen = cuda.forward_plan(x, w, a, b, None, save_s=True, **kinds)
        if kind != "precise":  # S and its sums, or S alone
            assert (chosen.work_size > M * r * 2 + 255) == (config.slices > 1), problem
    assert 0 < sliced[""] < 3 * 4 * 13 * 2 and 0 < sliced["precise"] and 3 * 4 * 13 < sliced["masked"], sliced
    # What a tuned table may hold of slices in tiles is what the library takes.
    taken = []
    for programs, M, N, K, r, group, block_n, slices, drops in itertools.product(
        (78, 132),
        (256, 3072, 3328),
        (256, 512, 1024),
        (1280, 1536, 2048),
        (16, 64),
        (8, 16),
        (128, 256),
        (2, 4),
        (None, SEED),
    ):
        x, w, a, b = (torch.empty(s, dtype=torch.bfloat16) for s in ((M, K), (N, K), (r, K), (N, r)))
        config = CudaConfig(block_n, group, programs, 0, 1, slices, in_tiles=True)
        try:
            cuda.forward_plan(x, w, a, b, None, save_s=True, config=config, **settings | {"seed": drops})
            taken.append(True)
        except RuntimeError as error:
            assert re.search(refusal, str(error))
            taken.append(False)
        problem = Problem(M, N, K, r, 2, False, 90, programs, drops is not None)
        refused = drops is not None and block_n == 128  # at the launch, which alone has the seed
        assert suits(problem, config) == (taken[-1] and not refused), (problem, config)
    assert any(taken) and not all(taken)
    for M, N, K, r, drops in itertools.product((65, 577, 8192), (256, 3584), (512, 4096), (65, 128, 256), (None, SEED)):
        shapes = ((M, K), (N, K), (r, K), (N, r), (M, N), (M, r))
        x, w, a, b, dy, s = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
        cuda.forward_plan(x, w, a, b, None, save_s=True, **settings | {"seed": drops})
        cuda.backward_plan(dy, x, w, a, b, s, needs=(True, True, True), **settings | {"seed": drops})
    wide = make_inputs(100, 512, 768, 256, torch.bfloat16)
    tensors = (wide.x, wide.weight, wide.lora_A, wide.lora_B, None)
    up = cuda.forward_plan(*tensors, save_s=True, **settings)
    assert up.work_size == 100 * 256 * 2, "S, and A and B as they are"
    with pytest.raises(RuntimeError, match="CUDA kernels could not be launched: block_n: error -7"):
        cuda.forward_plan(*tensors, save_s=True, config=CudaConfig(128, 4, 132, 2, parts=1), **settings)
    wide = make_inputs(100, 512, 768, 257, torch.bfloat16)
    with pytest.raises(RuntimeError, match="CUDA kernels could not be launched: r: error -3"):
        cuda.forward_plan(wide.x, wide.weight, wide.lora_A, wide.lora_B, None, save_s=True, **settings)
    cuda._plan.cache_clear()
