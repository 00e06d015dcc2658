"""Every kind of launch compiled ahead of time, for GPUs that are not here: shared memory, spills, what ptxas warns of.

The default set covers pairs of (GPU, variant); `--slow` compiles all of them.
"""

import contextlib
import itertools
import os
import re
import struct
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
import triton

from fusedlora.config import SHARED_MEMORY
from fusedlora.dropout import launch_dropout
from fusedlora.kernels.backward import lora_backward
from fusedlora.kernels.decode import decode_kernel
from fusedlora.kernels.forward import forward_plan, lora_forward
from fusedlora.kernels.inspection import TYPICAL_SMS, UNKNOWN, Launch, inspect_amd_launch, inspect_launch, record

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

FORWARD = {"need": (False, False, False)}

# name -> M, r, dtype, dtype of lora_A and lora_B, dtype of the adapter's products, other settings
VARIANTS = {
    "r16": (8192, 16, BF16, BF16, BF16, {}),
    "r8-bias": (8192, 8, FP16, FP16, FP16, {"bias": True}),
    "r32": (8192, 32, BF16, BF16, BF16, {}),
    "r64": (8192, 64, BF16, BF16, BF16, {}),
    "r128": (8192, 128, BF16, BF16, BF16, {}),
    "r256": (8192, 256, BF16, BF16, BF16, {}),
    "autocast-r16": (8192, 16, BF16, FP32, BF16, {}),
    "autocast-r64": (8192, 64, BF16, FP32, BF16, {}),
    "fp32-adapters-r16": (8192, 16, BF16, FP32, FP32, {}),
    "fp32-adapters-r64": (8192, 64, BF16, FP32, FP32, {}),
    "fp32-adapters-r256": (8192, 256, BF16, FP32, FP32, {}),
    "fp32-adapters-r32": (8192, 32, BF16, FP32, FP32, {}),
    "fp32-adapters-r128": (8192, 128, BF16, FP32, FP32, {}),
    "fp32-r16": (8192, 16, FP32, FP32, FP32, {}),
    "fp32-r64": (8192, 64, FP32, FP32, FP32, {}),
    "dropout-r16": (8192, 16, BF16, BF16, BF16, {"seed": True}),
    "dropout-r32": (8192, 32, BF16, BF16, BF16, {"seed": True}),
    "dropout-r64": (8192, 64, BF16, BF16, BF16, {"seed": True}),
    "dropout-r128": (8192, 128, BF16, BF16, BF16, {"seed": True}),
    "dropout-fp32-adapters-r16": (8192, 16, BF16, FP32, FP32, {"seed": True}),
    "dropout-fp32-adapters-r64": (8192, 64, BF16, FP32, FP32, {"seed": True}),
    "dropout-fp32-adapters-r128": (8192, 128, BF16, FP32, FP32, {"seed": True}),
    "dropout-512-rows": (512, 16, FP16, FP32, FP16, {"seed": True}),
    "tensors-for-scalars": (512, 16, BF16, BF16, BF16, {"seed": "cuda", "scale": True, "gain": True}),
    "512-rows": (512, 16, BF16, BF16, BF16, {}),
    "200-rows": (200, 16, BF16, BF16, BF16, {}),
    "narrow": (8192, 16, BF16, BF16, BF16, {"N": 1024}),
    "narrow-autocast": (8192, 16, BF16, FP32, BF16, {"N": 1024}),
    "narrow-tensors-for-scalars": (8192, 16, BF16, BF16, BF16, {"N": 1024, "scale": True, "gain": True, "bias": True}),
    "128-rows": (128, 16, BF16, BF16, BF16, FORWARD),
    "200-rows-wide": (200, 16, BF16, BF16, BF16, FORWARD | {"N": 8192}),
    "16-rows": (16, 16, BF16, BF16, BF16, {}),
    "64-rows": (64, 16, BF16, BF16, BF16, FORWARD | {"bias": True}),
    "16-rows-r64": (16, 64, BF16, BF16, BF16, FORWARD),
    "64-rows-r64": (64, 64, BF16, BF16, BF16, FORWARD),
    "16-rows-autocast": (16, 16, BF16, FP32, BF16, FORWARD),
    "16-rows-fp32-adapters": (16, 16, BF16, FP32, FP32, FORWARD),
    "64-rows-fp32-adapters": (64, 16, BF16, FP32, FP32, FORWARD),
    "16-rows-fp32": (16, 16, FP32, FP32, FP32, FORWARD),
    "two-launches": (8192, 16, BF16, BF16, BF16, {"one_launch": False}),
    "dB-only": (8192, 16, BF16, BF16, BF16, {"need": (False, False, True)}),
    "no-dx": (8192, 16, BF16, BF16, BF16, {"need": (False, True, True)}),
    "S-alone": (8192, 16, BF16, BF16, BF16, {"tiles": False}),
    "S-alone-fp32-adapters": (8192, 16, BF16, FP32, FP32, {"tiles": False, "seed": True}),
}
# Bytes that may spill, where fp32 terms or a mask beside a wide rank leave no choice: what ptxas of triton 3.6 and 3.9
# needs. None of it in a loop that multiplies, but for a few registers on sm_120 and one of a tile's end, which FLAT has
# in the loop too.
SPILLS_ALLOWED: dict[str | tuple[int, str], int] = {"fp32-adapters-r256": 128, "fp32-r16": 128, "fp32-r64": 256}
SPILLS_ALLOWED |= {
    "r8-bias": 8,
    "narrow-tensors-for-scalars": 8,
    "dropout-r64": 168,
    "dropout-fp32-adapters-r64": 24,
    "dropout-fp32-adapters-r128": 136,
}
SPILLS_ALLOWED |= {(cc, "dropout-fp32-adapters-r128"): 288 for cc in (80, 86, 89, 120)}
SPILLS_ALLOWED |= {(120, "fp32-adapters-r64"): 52, (120, "dropout-fp32-adapters-r64"): 52, (120, "dropout-r128"): 36}
SPILLS_ALLOWED |= {(100, "no-dx"): 20, (120, "fp32-adapters-r16"): 24}

QUICK = [(90, v) for v in VARIANTS if v not in ("fp32-adapters-r256", "r32", "autocast-r64")]
QUICK += [(cc, v) for cc in (80, 86, 89, 100, 120) for v in ("r16", "fp32-adapters-r16")]
QUICK += [(86, "64-rows-r64"), (86, "64-rows-fp32-adapters"), (120, "16-rows-r64")]
QUICK += [
    (80, "S-alone"),
    (100, "S-alone"),
    (80, "r64"),
    (86, "autocast-r16"),
    (89, "r8-bias"),
    (100, "two-launches"),
    (120, "r64"),
]


def cases():
    for case in itertools.product(TYPICAL_SMS, VARIANTS):
        yield pytest.param(*case, id=f"sm{case[0]}-{case[1]}", marks=() if case in QUICK else pytest.mark.slow)


def launches_of(capability: int, variant: str) -> list[Launch]:
    M, r, dtype, parameter_dtype, adapter_dtype, settings = VARIANTS[variant]
    K, N = 4096, settings.get("N", 4096)
    one_launch = settings.get("one_launch", True)
    need_dx, need_dA, need_dB = settings.get("need", (True, True, True))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, dy, weight = empty(M, K), empty(M, N), empty(N, K)
    lora_A, lora_B = empty(r, K, dtype=parameter_dtype), empty(N, r, dtype=parameter_dtype)
    common = {"scaling": 2.0, "adapter_dtype": adapter_dtype, "one_launch": one_launch}

    if settings.get("seed"):
        common |= {"seed": torch.tensor([2**62]), "dropout_p": 0.1}
    if settings.get("scale"):
        common["scale"] = empty(dtype=FP32)

    def call() -> None:
        if not settings.get("tiles", True):
            seed = common.get("seed")
            kind = {"scale": None, "gain": None, "adapter_dtype": adapter_dtype, "save_s": True, "seed": seed}
            plan = forward_plan(x, weight, lora_A, lora_B, None, **kind, tiles=False, one_launch=one_launch)
            if plan is None:
                assert capability != 90
                pytest.skip("tiles sum S there")
            given = x, weight, lora_A, lora_B, None, None, None, None, empty(M, r, dtype=adapter_dtype)
            plan.launch(given, *launch_dropout(seed, 0.1, 2.0))
            return
        bias = empty(N) if settings.get("bias") else None
        gain = empty(N, dtype=FP32) if settings.get("gain") else None
        _, s = lora_forward(x, weight, lora_A, lora_B, bias, gain=gain, save_s=True, **common)
        needs = {"need_dx": need_dx, "need_dA": need_dA, "need_dB": need_dB}
        lora_backward(dy, x, weight, lora_A, lora_B, s, **needs, **common)

    return record(capability, call)


def publishes(launch: Launch) -> bool:
    """Whether programs of it wait for what others write."""
    a = launch.arguments
    makes, reads = a.get("SHRINK") or a.get("CONVERT"), a.get("TILES") or a.get("REST")
    return bool((makes and reads) or (a.get("CONVERT") and a.get("SHRINK")))


@pytest.mark.parametrize("capability, variant", list(cases()))
def test_compiles_within_limits(capability: int, variant: str) -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if capability == 100 and version < (3, 9):
        pytest.skip("triton 3.6 compiles some to empty kernels; why_not refuses them all")
    if capability == 100 and VARIANTS[variant][-1].get("seed"):
        pytest.skip("triton 3.9 compiles three of these backwards to empty kernels; why_not refuses all with dropout")
    for launch in launches_of(capability, variant):
        report = inspect_launch(launch, capability)
        assert report.registers > 16, "an empty kernel"
        assert report.shared <= SHARED_MEMORY[capability]
        plain = (capability, variant) in QUICK and not variant.startswith("fp32-adapters")
        few = 0 if capability == 90 or plain else 16
        most = SPILLS_ALLOWED.get((capability, variant), SPILLS_ALLOWED.get(variant, 0))
        assert report.spills <= max(few, most)
        assert report.loop_spills <= (5 if capability == 120 else variant == "narrow-tensors-for-scalars")
        assert report.warnings == ()
        assert report.count("ld.global.nc") == 0
        early = launch.arguments.get("EARLY")
        if early is not None and launch.kernel is not decode_kernel:
            assert early == launch.arguments["launch_pdl"] == (capability >= 90)
        assert report.begins_early == bool(early) and report.count("griddepcontrol") == (2 if early else 0)
        if publishes(launch):
            assert re.search(r"\b(ld|atom)\.\S*acquire", report.ptx)
            assert re.search(r"\b(red|atom)\.\S*release", report.ptx)
        if capability == 90 and variant.startswith(("narrow", "128", "200")) and "TILES" in launch.arguments:
            assert launch.arguments["IN_TILES"] and not launch.arguments["SHRINK"]
            assert len(set(re.findall(r"wgmma.mma_async.sync.aligned.m64n\d+k16", report.ptx))) == 2
            depths = {int(n) for n in re.findall(r"wgmma.wait_group.sync.aligned (\d)", report.ptx)}
            assert max(depths) == 2, "both products of a step are under way while the next one's operands come"
        if capability == 90 and (launch.arguments.get("TILES") or launch.arguments.get("NEED_DX")):
            assert report.count("cp.async.bulk.tensor")
            assert report.count("wgmma.mma_async")
            if launch.arguments["FLAT"]:
                assert report.count("cp.async.bulk.tensor.2d.shared") == loads_of(launch.arguments), "loads run ahead"
        if launch.kernel is decode_kernel:
            assert report.count("cp.async.cg") and report.count("griddepcontrol.wait") == (capability >= 90)
            assert bool(re.search(r"\batom\.\S*acq_rel", report.ptx)) == (launch.arguments["SPLIT"] > 1)


def loads_of(arguments: dict) -> int:
    """Loads by TMA in the code of a launch with FLAT: as many for each operand as its loop has stages."""
    tiles = arguments.get("TILES") or arguments.get("REST")
    loads = 2 * arguments["num_stages"] * tiles + arguments["SHRINK"] * arguments["SHRINK_STAGES"]
    if arguments.get("REST"):
        dora = arguments["dm_ptr"] is not None
        loads += (arguments["NEED_DA"] + (not arguments["FUSE_DB"]) * (1 + dora)) * arguments["STRIPE_STAGES"]
    return loads


LDS = 65_536
AMD_QUICK = ("r16", "r64", "fp32-adapters-r16", "autocast-r16", "dropout-r32", "fp32-r16", "16-rows", "two-launches")
# Registers that spill for want of narrower tiles.
AMD_SPILLS = {"fp32-adapters-r64": 7, "fp32-adapters-r128": 217, "dropout-fp32-adapters-r128": 328}


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in AMD_QUICK else pytest.mark.slow) for v in VARIANTS]
)
def test_compiles_for_amd(variant: str) -> None:
    """For gfx942 (MI300): within its LDS, on its matrix cores, with fences between programs."""
    for launch in launches_of(UNKNOWN, variant):
        report = inspect_amd_launch(launch)
        assert report.shared <= LDS
        assert report.spills <= AMD_SPILLS.get(variant, 0)
        tiles = launch.arguments.get("TILES") or (launch.arguments.get("REST") and launch.arguments["NEED_DX"])
        assert not tiles or "v_mfma_" in report.assembly
        if publishes(launch) or launch.kernel is decode_kernel:
            assert "buffer_wbl2 sc1" in report.assembly and "buffer_inv sc1" in report.assembly


def test_launch_counts() -> None:
    assert len(launches_of(90, "r16")) == 2
    assert len(launches_of(90, "two-launches")) == 4


@pytest.mark.parametrize("variant", ["r16", "16-rows"])
@pytest.mark.parametrize("scaling, M", [(3.5, 8192), (2.0, 8191), (2.0, 8193)])
def test_no_recompilation_for_sizes_and_scaling(scaling: float, M: int, variant: str) -> None:
    """What is not specialised: an int of another divisibility, or another float, gives the same source to compile."""
    from triton.backends.compiler import GPUTarget

    from fusedlora.kernels import inspection

    sources = []

    def keep(source, **kwargs):
        sources.append((source.signature, source.constants, source.attrs))
        return mock.Mock()

    with mock.patch.object(inspection, "triton_compile", keep):
        for arguments in ({}, {"scaling": scaling, "M": M}):
            for launch in launches_of(90, variant):
                changed = Launch(launch.kernel, launch.arguments | arguments)
                inspection.compile_launch(changed, GPUTarget("cuda", 90, 32))
    assert sources[0] == sources[2] and sources[1] == sources[3]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("save_s, seed, bias", [(True, True, True), (False, False, False)], ids=["all", "least"])
def test_a_recipe_has_the_kernels_parameters(direction: str, save_s: bool, seed: bool, bias: bool) -> None:
    """As many and as wide as the PTX declares them, each a number that Python passes too or what a call brings."""
    from triton.backends.compiler import GPUTarget

    from fusedlora.kernels import backward, forward, inspection

    M, N, K, r = 512, 256, 384, 16
    sizes = {"x": (M, K), "w": (N, K), "a": (r, K), "b": (N, r), "bias": (N,), "s": (M, r), "y": (M, N)}
    sizes |= {"dy": (M, N), "dx": (M, K), "da": (r, K), "db": (N, r)}
    t: dict = {name: torch.empty(shape, dtype=BF16) for name, shape in sizes.items()}
    t |= {None: None} | ({} if bias else {"bias": None})
    number, threshold = (2**62 + 5, 3) if seed else (None, None)
    settings = {"scale": None, "seed": torch.tensor([2**62]) if seed else None, "adapter_dtype": BF16}
    settings |= {"one_launch": True}
    with inspection.recorded_launches(90) as seen:
        if direction == "forward":
            names = ("x", "w", "a", "b", "bias", None, None, "y", *(("s",) if save_s else ()))
            plan = forward.forward_plan(*(t[n] for n in names[:5]), gain=None, save_s=save_s, **settings)
        else:
            names = ("dy", "x", "s", "w", "a", "b", None, "dx", "da", "db")
            given = ("dy", "x", "w", "a", "b", "s")
            plan = backward.backward_plan(*(t[n] for n in given), needs=(True, True, True), **settings)
        plan.launch(tuple(t[n] for n in names), 0.5, number, threshold)
    (launch,), (launcher,) = seen, plan.launchers
    assert plan.recipe(names, threshold) is None, "nothing is known before the first launch"
    compiled = inspection.compile_launch(launch, GPUTarget("cuda", 90, 32))
    run = mock.Mock(launch_cooperative_grid=False, launch_pdl=False)
    metadata = compiled.metadata.num_warps, compiled.metadata.num_ctas, compiled.metadata.shared
    launcher.compiled = mock.Mock(src=compiled.src, packed_metadata=metadata, run=run, function=5)
    launcher.launch = mock.Mock()
    recipe = plan.recipe(names, threshold)
    assert recipe is not None and recipe.threads == 32 * metadata[0] and recipe.shared == metadata[2]
    assert recipe.work_size == plan.workspace.size and recipe.num_words == plan.num_words

    slots = struct.unpack(f"={len(recipe.slots) // 8}q", recipe.slots)
    holes = {slot: (source, offset) for slot, source, offset in recipe.holes}
    ptx = compiled.asm["ptx"]
    declared = re.findall(r"\.param \.(\w+)", ptx[ptx.index(".entry") :].split(")")[0])
    passed = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    assert len(declared) == len(slots) == len(passed) + 2
    sources = {f"{name}_ptr": name for name in names if name} | {
        "sync_ptr": "words",
        "scaling": "scaling32",
        "seed": "seed",
    }
    for slot, (name, width) in enumerate(zip((*passed, "scratch", "profiler"), declared, strict=True)):
        if slot in holes:
            source, offset = holes[slot]
            assert source == ("scratch" if name == "scratch" else sources.get(name, "workspace"))
            assert width == {"scaling32": "f32"}.get(source, "u64")
            assert source == "workspace" or offset == 0
        else:
            assert width == ("u64" if name == "profiler" else "u32")
            assert slots[slot] == (0 if name == "profiler" else launch.arguments[name])
    assert not recipe.early
    for cooperative, early in ((False, True), (True, False)):
        run = mock.Mock(launch_cooperative_grid=cooperative, launch_pdl=early)
        with mock.patch.object(launcher.compiled, "run", run):
            told = plan.recipe(names, threshold)
        assert told is None if cooperative else told.early


@pytest.mark.parametrize("version", [(3, 6), (3, 9)], ids=str)
def test_a_launcher_is_whole_when_other_threads_see_its_launch(version: tuple[int, int], monkeypatch) -> None:
    from fusedlora.kernels import launch

    class Watched(launch.Launcher):
        def __setattr__(self, name: str, value: object) -> None:
            assert vars(self).get("launch") is None, f"{name} is set after launch"
            written.append(name)
            super().__setattr__(name, value)

    written: list[str] = []
    monkeypatch.setattr(launch, "_VERSION", version)
    monkeypatch.setattr(launch, "_READ", True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    run = mock.Mock(profile_scratch_size=0, gsan_enabled=False, num_ctas=1, global_scratch_size=128)
    kernel = mock.MagicMock(params=())
    kernel.__getitem__.return_value.return_value = mock.Mock(run=run, packed_metadata=(4, 1, 0))
    launcher = Watched(kernel, 7, torch.device("cuda", 0), {})
    written.clear()
    launcher._through_triton(mock.Mock(), ())
    assert sorted(written) == ["compiled", "launch", "scratch_size", "settings", "what"] and written[-1] == "launch"
    assert launcher.scratch_size == 7 * 128 and len(launcher.what) + len(launcher.settings) == (
        7 if version < (3, 7) else 9
    )
