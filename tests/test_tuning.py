"""Tuned tables and the tuner, with stand-ins for the GPU: what is tried, what may win, what a launch then takes."""

import dataclasses
import functools
import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch

from fusedlora import __main__ as cli
from fusedlora import backends, costs, cuda, tune, tuning, why_not
from fusedlora.calls import Call
from fusedlora.config import SHARED_MEMORY, DecodeConfig, Problem, backward_config, check_config, forward_config
from fusedlora.cuda_config import CudaConfig, check_cuda_config, suits
from fusedlora.timing import Spread
from fusedlora.tune_check import Shape
from fusedlora.tuning_candidates import STEPS, shared_bytes, variants

GPU = tuning.Gpu("Some GPU 80GB/x", 90, 132)
P = Problem(8192, 4096, 4096, 16, 2, False, GPU.capability, GPU.num_sms)
SHAPE = Shape(8192, 4096, 4096, 16)
DEVICE = torch.device("cpu")
TABLES = tuning.tables.__wrapped__  # which conftest.py puts out of the way
HEURISTICS = {"forward": forward_config, "backward": backward_config}
TRITON, CSRC = tuning.KERNELS[:2], tuning.KERNELS[2:]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of GPU's table in a cache directory of its own; launches on the CPU take GPU's tables."""
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(tuning, "tables", functools.cache(TABLES))
    return tuning.user_path(GPU)


def entry(M: int = 8192, kernel: str = "forward", **changes) -> tuning.Entry:
    p = dataclasses.replace(P, M=M)
    changes = {"GROUP_M": 4} | changes if kernel in TRITON else changes
    config = dataclasses.replace(tuning.heuristic(kernel, p), **changes)
    return tuning.Entry(kernel, p, config, 90.0, 100.0)


class TestCandidates:
    @pytest.mark.parametrize("capability", SHARED_MEMORY)
    @pytest.mark.parametrize("kernel", TRITON)
    def test_valid_and_within_shared_memory(self, kernel: str, capability: int) -> None:
        for M in (1, 17, 512, 8192):
            for r, itemsize, split in ((1, 2, False), (64, 2, False), (256, 2, False), (64, 2, True), (16, 4, False)):
                p = Problem(M, 4096, 4096, r, itemsize, split, capability, 100)
                base = HEURISTICS[kernel](p)
                assert shared_bytes(base, p) <= SHARED_MEMORY[capability]
                for step in STEPS[kernel]:
                    found = variants(base, p, step)
                    assert base not in found and len(set(found)) == len(found) <= 64
                    for config in found:
                        check_config(config)
                        assert shared_bytes(config, p) <= SHARED_MEMORY[capability]

    @pytest.mark.parametrize("kernel", TRITON)
    def test_there_is_a_choice_in_every_step(self, kernel: str) -> None:
        for M in (1, 512, 8192):
            p = dataclasses.replace(P, M=M)
            config = HEURISTICS[kernel](p)
            for step in STEPS[kernel]:
                found = variants(config, p, step)
                if step == "shrink" and not config.has_tasks:
                    assert found == [dataclasses.replace(config, IN_TILES=False)], "there are no shrink tasks to vary"
                else:
                    assert len(found) >= 3

    @pytest.mark.parametrize("num_sms", [132, 78])
    @pytest.mark.parametrize("kernel", CSRC)
    def test_those_of_csrc_are_such_as_it_takes(self, kernel: str, num_sms: int) -> None:
        fixed, varied = ("slices", "in_tiles"), dict.fromkeys(STEPS[kernel], 0)
        for M, out, depth, r, split, drops in itertools.product(
            (1, 64, 65, 577, 8192), (256, 1024, 5120), (1536, 4096), (8, 16, 64, 256), (False, True), (False, True)
        ):
            p = Problem(M, out, depth, r, 2, split, 90, num_sms, drops)
            base = tuning.heuristic(kernel, p)
            check_cuda_config(base)
            assert suits(p, base)
            decodes = base.decode_rows > 0
            may_lack_choice = {"order", "shrink"} if decodes else {"tile", "shrink"}
            if base.in_tiles:
                may_lack_choice.add("order")
            assert decodes == (kernel == "cuda_forward" and M <= 64 and r <= 64 and not split and not drops)
            for step in STEPS[kernel]:
                found = variants(base, p, step)
                varied[step] += len(found)
                assert base not in found and len(set(found)) == len(found) <= 32
                assert found or step in may_lack_choice, (p, step)
                for config in found:
                    check_cuda_config(config)
                    assert suits(p, config)
                    assert all(getattr(config, name) == getattr(base, name) for name in fixed)
                    assert config.programs == base.programs or (config.in_tiles and config.block_n != base.block_n)
                    assert (config.decode_rows > 0) == decodes and config.parts <= 8
                    assert kernel == "cuda_backward" or (config.parts == 1 and not config.db_with_t)
        assert all(varied.values())
        p = dataclasses.replace(P, num_sms=132)
        counts = [len(variants(tuning.heuristic(kernel, p), p, step)) for step in STEPS[kernel]]
        assert counts == ([1, 3, 7] if kernel == "cuda_forward" else [1, 3, 5, 31])

    def test_what_csrc_refuses_does_not_suit_it(self) -> None:
        wide = CudaConfig(256, 8, 132, 16, 1)
        tiles = dataclasses.replace(wide, shrink_clusters=0, slices=4, in_tiles=True)
        narrow, with_t = dataclasses.replace(wide, block_n=128), dataclasses.replace(wide, db_with_t=True)
        for config in (wide, narrow, with_t):
            assert suits(P, config) and suits(dataclasses.replace(P, M=1), config)
        assert suits(dataclasses.replace(P, r=256), wide) and not suits(dataclasses.replace(P, r=129), narrow)
        for change in ({"r": 32}, {"split": True}):
            assert not suits(dataclasses.replace(P, **change), with_t)
        assert suits(dataclasses.replace(P, out=1024), tiles)
        for change in ({"out": 768}, {"depth": 1280}, {"num_sms": 132, "out": 256}):
            assert not suits(dataclasses.replace(P, **change), tiles), change
        masked, beside_narrow = dataclasses.replace(P, out=1024, dropout=True), dataclasses.replace(tiles, block_n=128)
        assert suits(masked, tiles) and not suits(masked, beside_narrow)
        assert suits(dataclasses.replace(masked, dropout=False), beside_narrow)
        assert not suits(dataclasses.replace(masked, out=2048), dataclasses.replace(tiles, slices=3))
        cut = dataclasses.replace(wide, slices=2)
        for change, takes in (({}, False), ({"dropout": True}, True), ({"split": True}, True)):
            assert suits(dataclasses.replace(P, **change), cut) is takes, change
        few = dataclasses.replace(tiles, programs=78, group=16)
        assert suits(dataclasses.replace(P, M=3072, out=1024), few)
        assert not suits(dataclasses.replace(P, M=3328, out=1024), few), "a turn has no four columns of thirteen pairs"

    @pytest.mark.parametrize("capability", SHARED_MEMORY)
    def test_few_rows_have_a_choice_of_tiles_alone(self, capability: int) -> None:
        for M, r, out, split in itertools.product((1, 17, 64), (8, 64), (1024, 14336), (False, True)):
            p = Problem(M, out, 4096, r, 2, split, capability, 100)
            base = tuning.heuristic("forward", p)
            if not isinstance(base, DecodeConfig):
                assert split
                continue
            assert shared_bytes(base, p) <= SHARED_MEMORY[capability]
            found = variants(base, p, "tile")
            assert base not in found and 3 <= len(set(found)) == len(found) <= 64
            for config in found:
                check_config(config)
                assert shared_bytes(config, p) <= SHARED_MEMORY[capability]
                assert not split or config.BLOCK_K <= base.BLOCK_K
            assert not any(variants(base, p, step) for step in STEPS["forward"] if step != "tile")

    def test_fp32_adapters_keep_their_precision(self) -> None:
        """Longer steps lose it, to tensor cores that truncate."""
        p = dataclasses.replace(P, split=True)
        base = backward_config(p)
        assert all(c.STRIPE_M <= base.STRIPE_M and not c.FUSE_DB for c in variants(base, p, "stripe"))
        assert all(c.SHRINK_K <= base.SHRINK_K for c in variants(base, p, "shrink"))


class FakeGpu:
    """Tools whose GPU takes `us(config)`, and finds those wrong for which `wrong(config)` is true."""

    def __init__(self, us, wrong=lambda config: False, differs=lambda config: False, products=200.0) -> None:
        self.us, self.wrong, self.differs, self.products = us, wrong, differs, products
        self.timed: list = []

    def reasons(self, kernel, shape, configs):
        return ["off by one" if self.wrong(c) else None for c in configs]

    def times(self, direction, shape, ways, rounds):
        self.timed += ways
        us = [self.products if way is None else self.us(way) for way in ways]
        shares = [each / us[0] for each in us]
        wrong = [way is not None and self.differs(way) for way in ways]
        return [None if bad else (each, Spread(share, share, share)) for bad, each, share in zip(wrong, us, shares)]


def tuned(kernel: str, gpu: FakeGpu) -> tune.Outcome:
    return tune.tune_kernel(kernel, SHAPE, P, gpu, lambda text: None)


class TestSearch:
    @pytest.mark.parametrize("kernel", TRITON)
    def test_it_finds_the_best_of_each_group(self, kernel: str) -> None:
        base = HEURISTICS[kernel](P)

        def us(c) -> float:
            gains = (c.BLOCK_M, c.BLOCK_N) == (256, 128), c.GROUP_M == 4, c.SHRINK_K == 32
            return 100.0 - 5 * sum(gains) - 5 * (getattr(c, "stripe_rows", 0) == 1024)

        outcome = tuned(kernel, FakeGpu(us))
        found = outcome.entry.config
        assert ((found.BLOCK_M, found.BLOCK_N), found.GROUP_M, found.SHRINK_K) == ((256, 128), 4, 32)
        assert outcome.us == us(found) < outcome.heuristic_us == us(base) == 100.0
        assert outcome.entry.problem == P and kernel in tune.report(kernel, SHAPE, outcome)

    @pytest.mark.parametrize("kind", ["wrong", "differs"])
    def test_a_wrong_one_never_wins(self, kind: str) -> None:
        """However fast: neither what the child found wrong nor what gives other numbers where it is timed."""
        gpu = FakeGpu(lambda c: 1.0 if c.GROUP_M == 4 else 100.0, **{kind: lambda c: c.GROUP_M == 4})
        outcome = tuned("forward", gpu)
        assert outcome.entry is None and outcome.us == outcome.heuristic_us == 100.0
        if kind == "wrong":
            assert not any(way.GROUP_M == 4 for way in gpu.timed)
            assert all(reason == "off by one" for _, reason in outcome.wrong) and outcome.wrong

    @pytest.mark.parametrize("kernel", CSRC)
    def test_it_finds_the_best_of_csrc(self, kernel: str) -> None:
        def us(c) -> float:
            gains = c.block_n == 128, c.group == 4, c.shrink_clusters == 8, kernel == "cuda_backward" and c.parts == 7
            return 100.0 - 5 * sum(gains)

        outcome = tuned(kernel, FakeGpu(us, wrong=lambda c: c.group == 16))
        found = outcome.config
        assert (found.block_n, found.group, found.shrink_clusters) == (128, 4, 8)
        assert found.parts == (7 if kernel == "cuda_backward" else 1)
        assert outcome.entry == tuning.Entry(kernel, P, found, us(found), us(tuning.heuristic(kernel, P)))
        assert outcome.wrong and f" {kernel} " in tune.report(kernel, SHAPE, outcome)

    def test_the_best_are_timed_beside_each_other(self) -> None:
        """With csrc's where it was tuned too, and PyTorch's products where "auto" may take them."""

        def us(c) -> float:
            return 70.0 if isinstance(c, CudaConfig) else 90.0 if c.GROUP_M == 4 else 100.0

        gpu = FakeGpu(us, products=80.0)
        outcome, cuda = tuned("forward", gpu), tuned("cuda_forward", gpu)
        tune.compare("forward", SHAPE, outcome, cuda, gpu)
        assert gpu.timed[-3:] == [outcome.entry.config, cuda.config, None]
        assert (outcome.us, outcome.cuda_us, outcome.products_us) == (90.0, pytest.approx(70.0), pytest.approx(80.0))
        told = "; the CUDA kernels take 70.0 µs: auto takes those; PyTorch's products take 80.0 µs"
        assert tune.report("forward", SHAPE, outcome).endswith(told)
        tune.compare("forward", SHAPE, outcome, None, gpu)
        assert gpu.timed[-2:] == [outcome.entry.config, None]
        assert (outcome.cuda_us, outcome.products_us) == (None, pytest.approx(80.0))
        assert tune.report("forward", SHAPE, outcome).endswith("; PyTorch's products take 80.0 µs: auto takes those")
        slower = FakeGpu(lambda c: 210.0 if isinstance(c, CudaConfig) else 100.0)
        fastest = tuned("forward", slower)
        tune.compare("forward", SHAPE, fastest, tuned("cuda_forward", slower), slower)
        told = "; the CUDA kernels take 210.0 µs; PyTorch's products take 200.0 µs"
        assert tune.report("forward", SHAPE, fastest).endswith(told), "auto takes Triton's"
        for change in ({"adapter": "fp32"}, {"dropout": 0.1}, {"dtype": "fp32", "adapter": "fp32"}):
            other = dataclasses.replace(SHAPE, **change)
            tune.compare("forward", other, outcome, cuda, gpu)
            assert (outcome.cuda_us, outcome.products_us) == (pytest.approx(70.0), None), (
                "what auto never takes them for"
            )
            timed = len(gpu.timed)
            tune.compare("forward", other, outcome, None, gpu)
            assert (outcome.cuda_us, outcome.products_us, len(gpu.timed)) == (None, None, timed)
        gpu.differs = lambda c: isinstance(c, CudaConfig)
        tune.compare("forward", SHAPE, outcome, cuda, gpu)
        assert (outcome.cuda_us, outcome.products_us) == (None, pytest.approx(80.0)), "other numbers are no time"

    def test_noise_is_no_gain(self) -> None:
        outcome = tuned("forward", FakeGpu(lambda c: 99.5 if c.GROUP_M == 4 else 100.0))
        assert outcome.entry is None and "stays" in tune.report("forward", SHAPE, outcome)

    def test_a_gain_that_comes_and_goes_is_none(self) -> None:
        class Unsteady(FakeGpu):
            def times(self, *arguments):
                return [(us, Spread(s.median, s.p10, 1.2)) for us, s in super().times(*arguments)]

        assert tuned("forward", Unsteady(lambda c: 90.0 if c.GROUP_M == 4 else 100.0)).entry is None


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Call:
    """A call on GPU, where both kinds of kernels are; choices that are made of it are forgotten."""
    monkeypatch.setattr(cuda, "num_sms", lambda device: GPU.num_sms)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(why_not, "_capability", lambda device: (GPU.capability // 10, 0))
    monkeypatch.setattr(why_not, "_triton_missing", lambda: None)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "last_used", None)
    bf16, layout = torch.bfloat16, (4096, 1, 0)
    return Call(False, torch.device("cuda", 0), bf16, bf16, bf16, 4096, 4096, 16, "", layout, "", rows=8192)


class TestTable:
    def test_round_trip(self, cache: Path) -> None:
        compared = [tuning.Compared("backward", P, 90.0, 70.0, 80.0), tuning.Compared("forward", P, 90.0, None, None)]
        entries = [entry(), entry(kernel="backward"), entry(512), *(entry(kernel=kernel, group=2) for kernel in CSRC)]
        table = tuning.Table(GPU, entries, compared=compared)
        tuning.write(table, cache)
        again = tuning.read(cache, GPU)
        assert again.entries.items == table.entries.items and again.path == cache
        assert again.compared.items == table.compared.items
        assert cache.name.startswith("Some-GPU-80GB-x-sm90-triton")
        assert [path.name for path in cache.parent.iterdir()] == [cache.name]

    def test_launches_prefer_it(self, cache: Path) -> None:
        tuning.write(tuning.Table(GPU, [entry(), entry(M=2048, GROUP_M=2)]), cache)

        def group(M: int, **changes) -> tuple[int, str]:
            config, source = tuning.choose("forward", dataclasses.replace(P, M=M, **changes), DEVICE, tuned=True)
            return config.GROUP_M, source

        base = forward_config(P).GROUP_M
        assert group(8192) == (4, f"measured at M = 8192, {cache}")
        assert group(6000)[0] == group(11000)[0] == 4 and group(2500)[0] == 2
        assert group(12000) == group(5000) == group(100) == (base, "heuristic")
        assert group(8192, r=8)[0] == group(8192, dropout=True)[0] == group(8192, out=4104)[0] == base
        assert tuning.choose("backward", P, DEVICE, tuned=True)[1] == "heuristic"

    def test_few_rows_take_the_decode_kernel_of_a_table_or_the_heuristic(self, cache: Path) -> None:
        p = dataclasses.replace(P, M=16)
        base = tuning.heuristic("forward", p)
        assert isinstance(base, DecodeConfig)
        assert tuning.choose("forward", p, DEVICE, tuned=True) == (base, "heuristic")
        other = dataclasses.replace(base, SPLIT=4)
        tuning.write(tuning.Table(GPU, [tuning.Entry("forward", p, other, 9.0, 10.0)]), cache)
        assert tuning.choose("forward", p, DEVICE, tuned=True) == (other, f"measured at M = 16, {cache}")
        # 17 rows are near, but are padded to 32, which nobody has tried
        p = dataclasses.replace(p, M=17)
        assert tuning.choose("forward", p, DEVICE, tuned=True) == (tuning.heuristic("forward", p), "heuristic")

    def test_launches_of_csrc_prefer_it(self, cache: Path, monkeypatch) -> None:
        """Where S is summed as it was there: in tiles of a narrow output or before them."""
        narrow = dataclasses.replace(P, out=1024)
        mine = dataclasses.replace(tuning.heuristic("cuda_forward", narrow), group=2)
        assert mine.in_tiles
        entries = [entry(kernel=kernel, group=2) for kernel in CSRC]
        tuning.write(tuning.Table(GPU, [*entries, tuning.Entry("cuda_forward", narrow, mine, 9.0, 10.0)]), cache)
        for kernel in CSRC:

            def chosen(p: Problem, tuned: bool = True, kernel: str = kernel) -> tuple[int, str]:
                config, source = tuning.choose(kernel, p, DEVICE, tuned)
                return config.group, source

            assert chosen(P) == (2, f"measured at M = 8192, {cache}")
            assert chosen(dataclasses.replace(P, M=6000))[0] == 2
            for change in ({"M": 5000}, {"r": 8}, {"dropout": True}, {"split": True}):
                assert chosen(dataclasses.replace(P, **change)) == (8, "heuristic"), change
            assert chosen(P, tuned=False) == (8, "heuristic")
        assert tuning.choose("cuda_forward", narrow, DEVICE, True)[0] == mine
        before = dataclasses.replace(mine, in_tiles=False, slices=1, shrink_clusters=16)
        tuning.write(tuning.Table(GPU, [tuning.Entry("cuda_forward", narrow, before, 9.0, 10.0)]), cache)
        assert tuning.choose("cuda_forward", narrow, DEVICE, True) == (
            tuning.heuristic("cuda_forward", narrow), "heuristic",
        )  # fmt: skip
        other = dataclasses.replace(narrow, M=7000)
        found = tuning.Entry("cuda_forward", other, dataclasses.replace(mine, group=4), 9.0, 10.0)
        tuning.write(tuning.Table(GPU, [tuning.Entry("cuda_forward", narrow, before, 9.0, 10.0), found]), cache)
        assert tuning.choose("cuda_forward", narrow, DEVICE, True)[0] == found.config, "the nearest of those that fit"
        monkeypatch.setattr(tuning, "sources_hash", lambda: "other kernels")
        tuning.tables.cache_clear()
        assert tuning.read(cache, GPU).entries.items == {}

    def test_not_under_deterministic_algorithms(self, cache: Path) -> None:
        tuning.write(tuning.Table(GPU, [entry()]), cache)
        assert tuning.in_use()
        torch.use_deterministic_algorithms(True)
        try:
            assert tuning.choose("forward", P, DEVICE, tuning.in_use()) == (forward_config(P), "heuristic")
        finally:
            torch.use_deterministic_algorithms(False)

    def test_what_was_compared_decides(self, cache: Path, on_gpu, monkeypatch) -> None:
        """On any GPU, and against what the cost model expects of one that it knows."""
        compared = [tuning.Compared("backward", P, 90.0, None, 80.0), tuning.Compared("forward", P, 90.0, None, 100.0)]
        tuning.write(tuning.Table(GPU, compared=compared), cache)
        call = on_gpu._replace(plain=True)
        back = call._replace(direction="backward")
        expected = "PyTorch's own products are expected to take less time: measured 80 µs, the kernels 90"
        assert backends.TRITON.why_not(back) == backends.TRITON.why_not(back._replace(rows=6000)) == expected
        assert backends.TRITON.why_not(call) is None
        for other in ({"rows": 5000}, {"N": 4104}, {"dropout": "seed"}, {"named": True}):
            assert backends.TRITON.why_not(back._replace(**other)) is None, other
        monkeypatch.setattr(costs, "why_slower", lambda *about: "so it seems")
        assert backends.TRITON.why_not(call) is None and backends.TRITON.why_not(call._replace(rows=5000)) is not None
        torch.use_deterministic_algorithms(True)
        try:
            assert "so it seems" in (backends.TRITON.why_not(call) or "")
        finally:
            torch.use_deterministic_algorithms(False)

    def test_what_was_compared_decides_between_the_kernels(self, cache: Path, on_gpu, monkeypatch) -> None:
        """Against what was measured elsewhere, as long as csrc is the same."""
        faster = tuning.Compared("forward", P, 90.0, 80.0, None), tuning.Compared("backward", P, 90.0, 100.0, 95.0)
        tuning.write(tuning.Table(GPU, compared=faster), cache)
        elsewhere = [False]
        monkeypatch.setattr(why_not, "prefers_cuda", lambda *about: elsewhere[0])
        call, back = on_gpu, on_gpu._replace(direction="backward")
        assert backends.select("auto", call) is backends.CUDA
        assert backends.select("auto", call._replace(param_dtype=torch.float32)) is backends.CUDA, "under autocast"
        assert backends.select("auto", call._replace(rows=2048)) is backends.TRITON, "as nobody compared them there"
        elsewhere[0] = True
        told = "Triton's kernels take less time: measured 90 µs, these 100"
        assert backends.CUDA.why_not(back) == told and backends.CUDA.why_not(back._replace(named=True)) is None
        assert backends.select("auto", back) is backends.TRITON
        assert backends.select("auto", back._replace(rows=2048)) is backends.CUDA
        monkeypatch.setattr(tuning, "sources_hash", lambda: "other kernels")
        tuning.tables.cache_clear()
        elsewhere[0] = False
        assert "not been measured faster" in (backends.CUDA.why_not(call) or "")
        assert tuning.compared("backward", P, DEVICE) == dataclasses.replace(faster[1], cuda_us=None)

    def test_few_rows_are_compared_for_themselves(self, cache: Path, on_gpu, monkeypatch) -> None:
        """The decode kernels take up to 64, by how they are padded, and csrc's no parameters that are to be rounded."""
        tables = [tuning.Compared("forward", dataclasses.replace(P, M=M), 20.0, 14.0, None) for M in (64, 200)]
        tables += [tuning.Compared("backward", dataclasses.replace(P, M=64), 20.0, 14.0, None)]
        tuning.write(tuning.Table(GPU, compared=tables), cache)
        monkeypatch.setattr(why_not, "prefers_cuda", lambda *about: False)

        def taken(rows: int, **changes) -> str:
            return backends.select("auto", on_gpu._replace(rows=rows, **changes)).name

        assert [taken(rows) for rows in (32, 46, 64, 65, 80, 150, 200)] == [
            *("triton", "cuda", "cuda", "triton", "triton", "cuda", "cuda")
        ]
        assert taken(46, direction="backward") == taken(80, direction="backward") == "cuda"
        for rows in (64, 200):
            assert taken(rows, param_dtype=torch.float32) == "triton"

    def test_products_are_weighed_against_the_kernels_that_auto_takes(self, cache: Path, on_gpu) -> None:
        times = {2048: (100.0, 80.0, 90.0), 4096: (100.0, 80.0, 70.0)}
        times |= {8192: (80.0, 100.0, 90.0), 16384: (95.0, 100.0, 90.0)}
        compared = [tuning.Compared("forward", dataclasses.replace(P, M=M), *us) for M, us in times.items()]
        tuning.write(tuning.Table(GPU, compared=compared), cache)
        taken = {M: backends.select("auto", on_gpu._replace(rows=M, plain=True)).name for M in times}
        assert taken == {2048: "cuda", 4096: "reference", 8192: "triton", 16384: "reference"}

    @pytest.mark.parametrize(
        "change, reason",
        [
            (lambda d: d["gpu"].update(name="Another"), "gpu is .*Another"),
            (lambda d: d["versions"].update(triton="1.0"), "versions is .*1.0"),
            (lambda d: d.update(format=99), "format is 99"),
            (lambda d: d.pop("entries"), "KeyError: 'entries'"),
            (lambda d: d.pop("compared"), "KeyError: 'compared'"),
            (lambda d: d.pop("csrc"), "KeyError: 'csrc'"),
            (lambda d: d["compared"][0].pop("products_us"), "KeyError: 'products_us'"),
            (lambda d: d["compared"][0].update(kernel="sideways"), "sideways"),
            (lambda d: d["entries"][0]["config"].update(BLOCK_M=48), "BLOCK_M is 48"),
            (lambda d: d["entries"][0]["config"].update(BLOCK_M="64"), "BLOCK_M is '64'"),
            (lambda d: d["entries"][0]["config"].update(BLOCK_Q=64), "BLOCK_Q"),
            (lambda d: d["entries"][0]["problem"].update(M=0), "M is 0"),
            (lambda d: d["entries"][0].update(kernel="sideways"), "sideways"),
            (
                lambda d: d["entries"][1]["config"].update(shrink_clusters=0),
                "shrink_clusters is 0; .* from 1, in tiles 0",
            ),
            (lambda d: d["entries"][1]["config"].update(block_n=192), "block_n is 192; it must be 128 or 256"),
            (lambda d: d["entries"][1]["config"].update(decode_rows=128), "decode_split is 1; it must be 2, 4 or 8"),
        ],
    )
    def test_a_table_that_does_not_fit_is_named_once_and_ignored(self, cache: Path, change, reason: str) -> None:
        compared = [tuning.Compared("forward", P, 2.0, None, 1.0)]
        tuning.write(tuning.Table(GPU, [entry(), entry(kernel="cuda_backward")], compared=compared), cache)
        data = json.loads(cache.read_text())
        change(data)
        cache.write_text(json.dumps(data))
        tuning.tables.cache_clear()
        with pytest.warns(UserWarning, match=f"ignores the tuned table {cache}.*{reason}"):
            assert tuning.choose("forward", P, DEVICE, tuned=True) == (forward_config(P), "heuristic")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tuning.choose("backward", P, DEVICE, tuned=True)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\0"])
    def test_no_table_at_all(self, cache: Path, text: str) -> None:
        cache.parent.mkdir(parents=True)
        cache.write_text(text)
        with pytest.warns(UserWarning, match="ignores the tuned table"):
            assert tuning.choose("forward", P, DEVICE, tuned=True)[1] == "heuristic"

    def test_an_entry_that_no_longer_wins_is_dropped(self) -> None:
        table = tuning.Table(GPU, [entry(), entry(GROUP_M=2)])
        assert table.entries.find("forward", P).config.GROUP_M == 2 and len(table.entries.items) == 1
        table.entries.drop("forward", P)
        table.entries.drop("forward", P)
        assert table.entries.find("forward", P) is None

    def test_without_a_gpu_nothing_is_read(self) -> None:
        assert tuning.gpu_of(DEVICE) is None
        assert tuning.choose("forward", P, DEVICE, tuned=True) == (forward_config(P), "heuristic")


class TestCommand:
    def test_needs_a_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["tune", "--device", "cpu"]) == 1
        assert "needs a GPU" in capsys.readouterr().err
        assert cli.main(["tune", "--device", "cuda:99"]) == 1
        assert "needs a GPU that torch can use; there is no cuda:99" in capsys.readouterr().err

    def test_lists_are_said_to_have_commas(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["tune", "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "several with commas between (8192)" in said and "several with commas between (16)" in said

    def test_shapes_of_a_models_config(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        config = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
        path.write_text(json.dumps(config))
        shapes = tune.shapes_of(path, [512, 8192], [16], {"dtype": "fp16", "adapter": "fp16", "dropout": 0.0})
        layers = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
        expected = [(M, *layer) for M in (512, 8192) for layer in layers]
        assert [(s.M, s.in_features, s.out_features) for s in shapes] == expected
        assert {(s.r, s.dtype) for s in shapes} == {(16, "fp16")}

    def test_a_list_of_shapes(self, tmp_path: Path) -> None:
        path = tmp_path / "shapes.json"
        path.write_text('[{"M": 64, "in_features": 512, "out_features": 768, "r": 4, "dropout": 0.1}]')
        (shape,) = tune.shapes_of(path, [1], [1], {"dtype": "bf16", "adapter": "fp32", "dropout": 0.0})
        assert shape == Shape(64, 512, 768, 4, "bf16", "fp32", 0.1)
        p = shape.problem("backward", 90, 132)
        assert (p.out, p.depth, p.split, p.dropout) == (512, 768, True, True)

    @pytest.mark.parametrize(
        "text, reason", [("{}", "'hidden_size' is missing"), ('[{"M": 1}]', "takes M, in_f"), ("", "Expecting")]
    )
    def test_no_shapes(self, tmp_path: Path, text: str, reason: str) -> None:
        path = tmp_path / "shapes.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            tune.shapes_of(path, [1], [1], {})

    @pytest.mark.parametrize(
        "change, reason",
        [
            ({"r": 300}, "r is 300"),
            ({"in_features": 4100}, "in_features 4100"),
            ({"M": 0}, "M is 0"),
            ({"dropout": 0.97}, "above a rate of 0.96"),
            ({"dropout": 1.5}, "dropout is 1.5"),
        ],
    )
    def test_what_the_kernels_do_not_take(self, change: dict, reason: str, monkeypatch) -> None:
        monkeypatch.setattr(why_not, "_capability", lambda device: (9, 0))
        monkeypatch.setattr(why_not, "_triton_missing", lambda: None)
        tune.refuse([SHAPE], torch.device("cuda:0"))
        with pytest.raises(ValueError, match=reason):
            tune.refuse([dataclasses.replace(SHAPE, **change)], torch.device("cuda:0"))


def test_importing_the_tables_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fusedlora.tuning, fusedlora.tuning_candidates, fusedlora.tune; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
