"""Configurations of the CUDA C++ kernels, and where they are preferred. Imports neither torch nor a kernel."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

from .config import Config, Problem, cdiv, check_config

MAX_RANK = 256
MAX_RANK_NARROW = 128  # where tiles are 128 columns wide
MAX_RANK_IN_TILES = 32  # for more, tiles wait longer for the sums of S's slices in tiles than for S before them
MAX_RANK_PRECISE = 16  # of adapters that keep fp32's precision
RANKS_DB_WITH_T = (8, 16)  # whose S is read as it lies, and for which T does not come too late
DEPTH_DB_WITH_T = 2048  # from here on that is faster
MAX_DECODE, MAX_DECODE_RANK = 64, 64  # rows of x and ranks that the decode kernel takes
# Up to how many rows of x the decode kernel is taken without being named by a configuration: those measured faster.
DECODE_UP_TO = 64
# Up to how many rows fp32 parameters, which are first rounded, cost so much that times without do not speak for them.
FEW_CONVERTED = 256
# Rows of a pair of tiles, one under the other, a cluster's.
_PAIR_M, _CLUSTER = 256, 2
_GROUP = 8  # pairs of rows whose tiles are computed together: fewer reads of DRAM than 4, and so less energy


@dataclasses.dataclass(frozen=True)
class CudaConfig:
    """`programs` blocks work in clusters of two; tiles are 128 × block_n, `group` pairs of rows at a time for L2.

    The depth of S or T is summed in `slices` runs: with `in_tiles` S by the tiles of so many columns beside their own
    sums, else by `shrink_clusters` clusters before their tiles. A stripe of dA or dB is summed in `parts` runs of rows;
    with `db_with_t` dB by those who sum T, from the same read of dy. Place number `first_job` takes the first of them.
    With `decode_rows`, a forward that the decode kernel takes is its: that many rows of W a block, 64 or 128, and
    their depth split over a cluster of `decode_split`, 1 (with 64 rows), 2, 4 or 8. `decode_early`: its blocks may
    take their places while the launch before it on the stream ends, and wait there for what that has written.
    """

    block_n: int
    group: int
    programs: int
    shrink_clusters: int
    parts: int
    slices: int = 1
    in_tiles: bool = False
    db_with_t: bool = False
    first_job: int = 0
    decode_rows: int = 0
    decode_split: int = 1
    decode_early: bool = True

    @property
    def clusters(self) -> int:
        return self.programs // _CLUSTER


AnyConfig = Config | CudaConfig  # of Triton's kernels or these


def check_any_config(config: AnyConfig) -> None:
    """Raises ValueError where kernels of this configuration could not run: they would wait for ever, say."""
    check_cuda_config(config) if isinstance(config, CudaConfig) else check_config(config)


def check_cuda_config(c: CudaConfig) -> None:
    """`check_any_config` for these kernels."""
    clusters = c.clusters
    bounds = {
        "block_n": (c.block_n in (128, 256), "128 or 256"),
        "group": (c.group >= 1, "at least 1"),
        "programs": (c.programs >= _CLUSTER and c.programs % _CLUSTER == 0, "even, and at least 2"),
        "shrink_clusters": (int(not c.in_tiles) <= c.shrink_clusters <= clusters, f"from 1, in tiles 0, to {clusters}"),
        "parts": (1 <= c.parts <= 64, "from 1 to 64"),
        "slices": (1 <= c.slices <= 32, "from 1 to 32"),
        "db_with_t": (not (c.db_with_t and c.block_n == 128), "False beside tiles of 128 columns"),
        "first_job": (0 <= c.first_job < clusters, f"from 0 to {clusters - 1}"),
        "decode_rows": (c.decode_rows in (0, 64, 128), "0, 64 or 128"),
        "decode_split": (
            c.decode_split in (1, 2, 4, 8) and (c.decode_rows, c.decode_split) != (128, 1),
            "2, 4 or 8, beside 64 rows also 1",
        ),
    }
    for name, (holds, rule) in bounds.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(c, name)}; it must be {rule}")


def suits(p: Problem, c: CudaConfig) -> bool:
    """Whether csrc takes the configuration for such calls: what lora.cu's `takes_slices`, `by_width`, `run` ask for."""
    if (c.block_n == 128 and p.r > MAX_RANK_NARROW) or (c.db_with_t and (p.r not in RANKS_DB_WITH_T or p.split)):
        return False
    if not c.in_tiles:
        return c.slices == 1 or p.dropout or p.split
    if p.r > MAX_RANK_IN_TILES or p.split or c.slices % 2:
        return False
    if p.dropout and c.block_n == 128:  # a mask takes too long beside narrow tiles
        return False
    stages, steps, wide_steps = _stages(c.block_n), cdiv(p.depth, 64), cdiv(p.depth, 128)
    half = wide_steps * (c.slices // 2) // c.slices * 2
    columns = _columns_in_a_turn(p, c.block_n, c.group, c.clusters)
    return columns >= c.slices <= wide_steps and 2 * stages + 2 + max(half, steps - half) < steps


class Calls(NamedTuple):
    """Calls of one direction, each bound included; the defaults are all of them. `rows` is M up to a power of two."""

    rows: tuple[int, int] = (1, 1 << 40)
    N: tuple[int, int] = (1, 1 << 40)
    K: tuple[int, int] = (1, 1 << 40)
    r: tuple[int, int] = (1, MAX_RANK)
    dropout: tuple[bool, ...] = (False, True)
    converts: tuple[bool, ...] = (False, True)  # whether the adapter's parameters are fp32
    precise: tuple[bool, ...] = (False,)  # whether they keep that precision: outside autocast

    def hold(self, rows: int, N: int, K: int, r: int, dropout: bool, converts: bool, precise: bool) -> bool:
        bounds = zip((self.rows, self.N, self.K, self.r), (rows, N, K, r))
        within = all(low <= value <= high for (low, high), value in bounds)
        return within and dropout in self.dropout and converts in self.converts and precise in self.precise


# Where these kernels have been measured faster than Triton's on the whole (pytest bench/ --benchmark shows both), on an
# H200; above r = 64 only calls with neither a mask nor a gain, and of all three gradients, and under a mask few of r
# above 16, where Triton's take much longer.
_PRECISE = (
    Calls(rows=(2048, 16384), N=(4096, 14336), K=(4096, 14336), r=(1, MAX_RANK_PRECISE), precise=(True,)),
    Calls(rows=(512, 1024), N=(4096, 4096), K=(4096, 4096), r=(1, MAX_RANK_PRECISE), precise=(True,)),
    Calls(rows=(8192, 8192), N=(1024, 1024), K=(4096, 4096), r=(1, MAX_RANK_PRECISE), precise=(True,)),
)
FASTER: dict[str, tuple[Calls, ...]] = {
    "forward": (
        # the decode kernel
        Calls(
            rows=(1, 64), N=(256, 28672), K=(512, 28672), r=(1, MAX_DECODE_RANK), dropout=(False,), converts=(False,)
        ),
        Calls(rows=(512, 32768), N=(1280, 28672), K=(1536, 14336)),
        Calls(rows=(1024, 32768), N=(3072, 28672), K=(768, 1535)),
        Calls(rows=(4096, 32768), N=(768, 1279), K=(1536, 14336)),
        Calls(rows=(4096, 32768), N=(768, 1279), K=(768, 1535), r=(1, 16)),
        Calls(rows=(2048, 2048), N=(1024, 1279), K=(4096, 14336)),
        Calls(rows=(2048, 2048), N=(768, 1023), K=(768, 4096)),
        Calls(rows=(8192, 32768), N=(512, 767), K=(2048, 8192)),
        # where Triton's tiles can't compute S
        Calls(rows=(2048, 32768), N=(256, 1279), K=(1536, 14336), r=(17, MAX_RANK)),
        Calls(rows=(512, 32768), N=(256, 28672), K=(768, 14336), dropout=(True,)),
        Calls(rows=(256, 256), N=(4096, 14336), K=(4096, 4096), dropout=(False,), converts=(False,)),
        *_PRECISE,
    ),
    "backward": (
        Calls(rows=(512, 32768), N=(512, 8192), K=(2048, 14336)),
        Calls(rows=(1024, 32768), N=(1536, 8192), K=(768, 2047)),
        # Beside the widest dy Triton's were faster in places.
        Calls(rows=(512, 1024), N=(8192, 28672), K=(4096, 8192)),
        Calls(rows=(8192, 16384), N=(8192, 14336), K=(4096, 8192)),
        Calls(rows=(8192, 8192), N=(256, 1536), K=(1536, 1536)),
        Calls(rows=(256, 512), N=(768, 28672), K=(768, 14336), dropout=(False,), converts=(False,)),
        *_PRECISE,
    ),
}


def prefers_cuda(
    direction: str, rows: int, N: int, K: int, r: int, dropout: bool, converts: bool, precise: bool
) -> bool:
    """Whether FASTER has "forward" or "backward" calls, by which "auto" goes where `tune` has not compared the kernels.

    `rows`, M, counts as the power of two that it reaches. A forward may be theirs and its backward Triton's, or the
    other way round: S and the dropout's seed mean the same to both.
    """
    rows = 1 << (rows - 1).bit_length()
    return any(calls.hold(rows, N, K, r, dropout, converts, precise) for calls in FASTER[direction])


def cuda_config(p: Problem, forward: bool, *, tiles: bool = True, dora: bool = False) -> CudaConfig:
    """The configuration of one direction; without `tiles`, of a backward that asks for no dX; `dora`: dm comes with dB.

    One for all M of as many pairs of row blocks, since it takes some milliseconds to find.
    """
    if p.M > DECODE_UP_TO:
        p = dataclasses.replace(p, M=cdiv(p.M, _PAIR_M) * _PAIR_M)
    return _cuda_config(p, forward, tiles, dora)


@functools.lru_cache(maxsize=4096)
def _cuda_config(p: Problem, forward: bool, tiles: bool, dora: bool) -> CudaConfig:
    programs = p.num_sms // _CLUSTER * _CLUSTER
    clusters = programs // _CLUSTER
    pairs_m = cdiv(p.M, _PAIR_M)
    wide_tiles = pairs_m * cdiv(p.out, 256)
    block_n = 256 if wide_tiles >= clusters or p.r > MAX_RANK_NARROW else 128  # unless times say otherwise
    few = forward and not p.dropout and not p.split and p.M <= DECODE_UP_TO and p.r <= MAX_DECODE_RANK
    decodes = decode_config(p) if few else ()

    def config(block_n: int, shrink_clusters: int, slices: int = 1) -> CudaConfig:
        return CudaConfig(block_n, _GROUP, programs, shrink_clusters, 1, slices, False, False, 0, *decodes)

    def slack(block_n: int) -> int:
        """How many clusters have a tile less than the others."""
        return -(pairs_m * cdiv(p.out, block_n)) % clusters if tiles else 0

    def cost(config: CudaConfig) -> float:
        # That jobs begin beside those who shrink is worth it only for more than the model's error.
        return end_us(p, config, forward, tiles=tiles, dora=dora) * (1.02 if config.first_job else 1)

    def best(like: CudaConfig, counts: set[int]) -> CudaConfig:
        """Of any parts, first places of jobs and counts of clusters that shrink."""
        return min(
            (
                dataclasses.replace(like, shrink_clusters=count, first_job=first, parts=parts)
                for count in sorted(counts)
                for first in ([0] if forward else [0, count % clusters])
                for parts in ([1] if forward else range(1, 9))
            ),
            key=cost,
        )

    # Narrow tiles take more than half as long, but fill the last turn of few better.
    widths = (256,) if p.r > MAX_RANK_NARROW or wide_tiles >= 4 * clusters else (256, 128)
    several = in_tiles(p) if forward and not decodes else []
    if forward and (p.dropout or p.split):
        # A mask and terms take so long that few clusters would keep all waiting.
        runs = [n for n in (1, 2, 4, 8, 16) if n <= cdiv(p.depth, 128)]
        several += [config(n, min(pairs_m, slack(n))) for n in widths if slack(n)]
        several += [config(n, min(clusters, pairs_m * slices), slices) for n in widths for slices in runs]
    elif not tiles or p.split:
        # These shrink, unless that makes them late.
        idle = slack(block_n)
        shrink_clusters = min(clusters if idle == 0 or cdiv(pairs_m, idle) > 3 else idle, pairs_m)
        several.append(best(config(block_n, shrink_clusters), {shrink_clusters}))
    else:
        several += [best(config(n, 1), _counts(pairs_m, slack(n), clusters)) for n in widths]
        if not (forward or dora) and p.r in RANKS_DB_WITH_T and p.depth >= DEPTH_DB_WITH_T:
            with_t = dataclasses.replace(config(256, 1), db_with_t=True)
            several.append(best(with_t, _counts(count_units(p, with_t), slack(256), clusters)))
    return min(several, key=cost)


def _counts(units: int, slack: int, clusters: int) -> set[int]:
    """How many clusters may share units of S or T: one or two each, or those with a tile less do all, or two each."""
    counts = {min(clusters, cdiv(units, n)) for n in (1, 2)}
    return counts | {n for n in (min(slack, units), units - slack) if 0 < n <= clusters}


def in_tiles(p: Problem) -> list[CudaConfig]:
    """Forwards whose tiles sum S, where csrc takes them: of narrow outputs, which would wait for S as long as wide
    ones, a quarter of the time of 1024 columns.

    As many pairs of rows are computed together as there are clusters for all of their columns, or some tiles would
    wait for slices that come a turn later.
    """
    pairs_m, clusters, found = cdiv(p.M, _PAIR_M), p.num_sms // _CLUSTER, []
    for block_n in (256, 128) if p.out <= 2048 else ():
        columns = cdiv(p.out, block_n)
        if columns > clusters:
            continue
        group = clusters // columns
        programs = _CLUSTER * (group * columns if group < pairs_m else clusters)
        slices = 4 if columns >= 4 else 2
        found.append(CudaConfig(block_n, min(group, pairs_m), programs, 0, 1, slices, True))
    return [config for config in found if suits(p, config)]


def _stages(block_n: int) -> int:
    return 4 if block_n == 256 else 6  # csrc's Layout


def _columns_in_a_turn(p: Problem, block_n: int, group: int, clusters: int) -> int:
    """Of the tiles that are computed within a turn of all clusters, as csrc/shares.h's Tiles has it."""
    return min(cdiv(p.out, block_n), 1 + (clusters - 1) // min(group, cdiv(p.M, _PAIR_M)))


def _unit_pairs(config: CudaConfig) -> int:
    """How many pairs of row blocks a unit of S or T is, as csrc/block.cuh's Traits has it."""
    return 2 if config.db_with_t else 1


def count_units(p: Problem, config: CudaConfig) -> int:
    """Of S or T in all."""
    return cdiv(cdiv(p.M, _PAIR_M), _unit_pairs(config))


class Share(NamedTuple):
    """What one cluster takes: tiles, units of S or T before them, jobs of dB and of dA."""

    tiles: int
    units: int
    db_jobs: int
    da_jobs: int


def shares(p: Problem, config: CudaConfig, forward: bool, *, tiles: bool = True) -> list[tuple[range, Share]]:
    """Of all places, as csrc/shares.h has it: runs of places that take as much."""
    clusters, units_by, first_job = config.clusters, config.shrink_clusters, config.first_job
    all_tiles = cdiv(p.M, _PAIR_M) * cdiv(p.out, config.block_n) if tiles else 0
    all_units = count_units(p, config) * config.slices
    db_jobs = 0 if forward or config.db_with_t else config.parts * cdiv(p.depth, 256)
    jobs = db_jobs if forward else db_jobs + config.parts * cdiv(p.out, 256)
    # Who takes one less of something than the place before, or, of tiles, one more.
    firsts = {0, clusters, clusters - all_tiles % clusters, first_job, (first_job + db_jobs) % clusters}
    firsts.add((first_job + jobs) % clusters)
    if units_by:
        firsts |= {all_units % units_by, min(units_by, clusters)}
    bounds, runs = sorted(firsts), []
    for first, end in itertools.pairwise(bounds):
        job = (first - first_job) % clusters
        db = (db_jobs - job + clusters - 1) // clusters if job < db_jobs else 0
        da = (jobs - job + clusters - 1) // clusters - db if job < jobs else 0
        units = (all_units - first + units_by - 1) // units_by if first < min(units_by, all_units) else 0
        own_tiles = (all_tiles + first) // clusters  # the first tiles are for the last places
        runs.append((range(first, end), Share(own_tiles, units, db, da)))
    return runs


def end_us(p: Problem, config: CudaConfig, forward: bool, *, tiles: bool = True, dora: bool = False) -> float:
    """Microseconds until the last cluster ends, roughly: as measured on an H200.

    Known are the times of a tile and of a unit of S or T, for each 64 columns of depth, of a tile's further 64 ranks,
    of 128 rows of a job of dA or dB (twice that where dB's brings y, for `dora`), and of a part of a stripe that is
    left and added, which tiles after it hide. For forwards with a mask or fp32 terms these are of a hot GPU, at a lower
    clock, and so not to be held against those without.
    """
    clusters, pairs_m, tiles_n = config.clusters, cdiv(p.M, _PAIR_M), cdiv(p.out, config.block_n)
    wide, steps, parts = config.block_n == 256, cdiv(p.depth, 64), config.parts
    times = (0.26, 0.6, 0.6) if p.r <= 64 else (0.49, 1.05, 6.0) if p.r <= 128 else (0.69, 1.75, 12.0)
    unit_step_us, b_us, part_us = times
    if config.db_with_t:
        unit_step_us = 0.58
    tile_us = (2.3 + 0.66 * steps if wide else 1.5 + 0.364 * steps) + 1.8 * (cdiv(p.r, 64) - 1)
    published_us, sliced_us = 3.0, 0.0
    if forward and (p.dropout or p.split):
        few_ranks = p.r <= 32 and not (p.dropout and p.split)  # masked terms are as many columns as r = 64
        unit_step_us, published_us = 0.36 if few_ranks else max(0.58, unit_step_us), 5.0
        tile_us *= 1.12 if pairs_m * tiles_n > clusters else 1
        sliced_us = (3.0 if p.split else 1.5) if config.slices > 1 else 0.0
    if config.in_tiles:
        return cdiv(pairs_m * tiles_n, clusters) * (tile_us + _slice_us(p, config, tile_us)) + 3
    unit_us = 3 + cdiv(steps, config.slices) * unit_step_us
    rows = job_rows(config.block_n, p.r)
    job_us = b_us * cdiv(cdiv(p.M, parts), rows) * rows / 128
    left = parts > 1 or (dora and not forward)  # for side warps to add
    db_us, da_us = 0.5 + job_us * (2 if dora else 1), 0.5 + job_us * (2 if p.dropout else 1)
    # No tile ends before its rows of S or T are there: how long the tiles of a turn have to wait, of the first two or
    # of that where the last rows begin.
    late, group_tiles, unit_pairs = 0.0, config.group * tiles_n, _unit_pairs(config)
    turns = (0, 1, (pairs_m - 1) // config.group * group_tiles // clusters)
    for turn in turns if tiles and config.shrink_clusters else ():
        last = min((turn + 1) * clusters, pairs_m * tiles_n) - 1
        pairs = min(pairs_m, (last // group_tiles + 1) * config.group)
        units = cdiv(cdiv(pairs, unit_pairs) * config.slices, config.shrink_clusters)
        late = max(late, units * unit_us + published_us - (turn + 1) * tile_us)
    end = 0.0
    for _, (own_tiles, units, db, da) in shares(p, config, forward, tiles=tiles):
        waits = late if own_tiles and not units else 0.0
        seen_us = 2.0 if left and own_tiles == 1 and db + da else 0.0  # the adding, after its only tile
        end = max(end, own_tiles * tile_us + units * unit_us + db * db_us + da * da_us + waits + seen_us)
    return end + sliced_us + (0.8 + part_us * (parts - 1) if left or config.db_with_t else 0)


def _slice_us(p: Problem, config: CudaConfig, tile_us: float) -> float:
    """By how much a tile takes longer that sums a slice of S: where its second half, in which slices are added, is too
    short for that, and for each step of a slice under a mask.
    """
    added_us = (13 if p.r <= 16 else 18) + 3 * p.dropout
    masked_us = 0.15 * cdiv(p.depth, 64) / config.slices if p.dropout else 0.0
    return max(0.0, added_us - tile_us / 2) + masked_us


def job_rows(block_n: int, r: int) -> int:
    """Rows of a stage of a job, as csrc/shares.h has it."""
    return 128 if block_n == 256 and r <= 64 else 64


def decode_config(p: Problem) -> tuple[int, int, bool]:
    """decode_rows, decode_split and decode_early, as measured on an H200.

    Blocks of 128 rows and half the depth where they give nearly every SM one, else of 64 rows, each at least 256 deep.
    """
    enough = p.num_sms * 9 // 10
    rows, split = 128, 2
    if cdiv(p.out, rows) * split < enough or p.depth < 512:
        rows, split = 64, 1
        while split < 4 and cdiv(p.out, rows) * split < enough and p.depth >= 512 * split:
            split *= 2
    # A launch that takes long does not gain by beginning early, it competes with the one before.
    early = p.M <= 32 and p.out * p.depth <= 1 << 24
    return rows, split, early
