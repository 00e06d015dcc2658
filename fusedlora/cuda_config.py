"""Configurations of the CUDA C++ kernels, and where they are preferred. Imports neither torch nor a kernel."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

from .config import Problem

MAX_RANK = 256
MAX_RANK_NARROW = 128  # where tiles are 128 columns wide
MAX_RANK_IN_TILES = 32  # for more, tiles wait longer for the sums of S's slices in tiles than for S before them
MAX_RANK_PRECISE = 16  # of adapters that keep fp32's precision
MAX_DECODE, MAX_DECODE_RANK = 64, 64  # rows of x and ranks that the decode kernel takes
# Up to how many rows of x the decode kernel is taken without being named by a configuration: those measured faster.
DECODE_UP_TO = 64
# Rows of a tile; two tiles of a pair, one under the other, are a cluster's.
_BLOCK_M, _CLUSTER = 128, 2
_GROUP = 4  # pairs of rows whose tiles are computed together


@dataclasses.dataclass(frozen=True)
class CudaConfig:
    """`programs` blocks work in clusters of two; tiles are 128 × block_n, `group` pairs of rows at a time for L2.

    The depth of S or T is summed in `slices` runs: with `in_tiles` S by the tiles of so many columns beside their own
    sums, else by `shrink_clusters` clusters before their tiles. A stripe of dA or dB is summed in `parts` runs of rows.
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
    decode_rows: int = 0
    decode_split: int = 1
    decode_early: bool = True


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
# H200; above r = 64 only calls with neither a mask nor a gain, and of all three gradients.
_PRECISE = (
    Calls(rows=(2048, 16384), N=(4096, 14336), K=(4096, 14336), r=(1, MAX_RANK_PRECISE), precise=(True,)),
    Calls(rows=(8192, 8192), N=(1024, 1024), K=(4096, 4096), r=(1, MAX_RANK_PRECISE), precise=(True,)),
)
FASTER: dict[str, tuple[Calls, ...]] = {
    "forward": (
        # the decode kernel
        Calls(
            rows=(1, 64), N=(256, 28672), K=(512, 28672), r=(1, MAX_DECODE_RANK), dropout=(False,), converts=(False,)
        ),
        Calls(rows=(512, 32768), N=(3072, 28672), K=(2048, 14336)),
        Calls(rows=(2048, 32768), N=(256, 1024), K=(1536, 8192)),
        Calls(rows=(512, 1024), N=(1024, 1024), K=(4096, 8192), dropout=(True,)),
        Calls(rows=(2048, 16384), N=(2048, 2048), K=(2048, 4096), dropout=(False,)),
        Calls(rows=(8192, 16384), N=(2048, 2048), K=(4096, 4096)),
        Calls(rows=(1024, 2048), N=(2048, 2048), K=(8192, 8192), dropout=(False,)),
        Calls(rows=(256, 256), N=(4096, 14336), K=(4096, 4096), dropout=(False,), converts=(False,)),
        *_PRECISE,
    ),
    "backward": (
        Calls(rows=(512, 32768), N=(512, 8192), K=(2048, 14336)),
        # Triton's has dB from one read of dy with T, which the widest dy gain most from.
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
    """Whether "auto" takes these kernels for "forward" or "backward" calls that they take: where FASTER has them.

    `rows`, M, counts as the power of two that it reaches. A forward may be theirs and its backward Triton's, or the
    other way round: S and the dropout's seed mean the same to both.
    """
    rows = 1 << (rows - 1).bit_length()
    return any(calls.hold(rows, N, K, r, dropout, converts, precise) for calls in FASTER[direction])


@functools.lru_cache(maxsize=4096)
def cuda_config(p: Problem, forward: bool, *, tiles: bool = True, precise: bool = False) -> CudaConfig:
    """The configuration of one direction; without `tiles`, of a backward that asks for no dX."""
    programs = p.num_sms // _CLUSTER * _CLUSTER
    clusters = programs // _CLUSTER
    pairs_m = _cdiv(p.M, _BLOCK_M * _CLUSTER)
    block_n = 256 if pairs_m * _cdiv(p.out, 256) >= clusters or p.r > MAX_RANK_NARROW else 128
    # Clusters that have a tile less than the others do the shrinking, unless that makes them late.
    slack = -(pairs_m * _cdiv(p.out, block_n)) % clusters if tiles else 0
    late = slack == 0 or _cdiv(pairs_m, slack) > 3
    slices, shrink_clusters = 1, min(clusters if late else slack, pairs_m)
    # Narrow outputs would wait for S, which takes as long as for wide ones, a quarter of the time of 1024 columns.
    in_tiles = forward and not p.dropout and not precise and p.out <= 2048
    in_tile_slices = _in_tile_slices(p, clusters, block_n) if in_tiles else 0
    if in_tile_slices:
        slices, shrink_clusters = in_tile_slices, 0
    elif forward and p.dropout and not precise and pairs_m <= 4:
        # The mask takes so long that few clusters would keep all waiting.
        slices = max(1, min(16, clusters // pairs_m, _cdiv(p.depth, 128)))
        shrink_clusters = pairs_m * slices
    config = CudaConfig(
        block_n,
        _GROUP,
        programs,
        shrink_clusters,
        1,
        slices,
        in_tile_slices > 0,
        *(decode_config(p) if p.M <= DECODE_UP_TO and p.r <= MAX_DECODE_RANK else ()),
    )
    several = [config] if forward else [dataclasses.replace(config, parts=parts) for parts in range(1, 9)]
    if p.r > 64 and slices == 1:  # S and T take long: one to three of their units a cluster
        among = {shrink_clusters, *(min(clusters, _cdiv(pairs_m, units)) for units in (1, 2, 3))}
        several = [dataclasses.replace(config, shrink_clusters=n) for n in sorted(among) for config in several]
    return min(several, key=lambda config: end_us(p, config, forward, tiles=tiles))


def _in_tile_slices(p: Problem, clusters: int, block_n: int) -> int:
    """Into how many slices S is cut where tiles sum it; 0 where tiles are too short for that or sums take too long."""
    stages = 4 if block_n == 256 else 6  # csrc/lora.cuh's Layout
    if _cdiv(p.depth, 64) <= 2 * (2 * stages + 2) + 2 or p.r > MAX_RANK_IN_TILES:
        return 0
    # All within the columns whose tiles are computed within a turn.
    columns = min(_cdiv(p.out, block_n), 1 + (clusters - 1) // min(_GROUP, _cdiv(p.M, 256)))
    return 4 if columns >= 4 else 2 if columns >= 2 else 0


class Share(NamedTuple):
    """What one cluster takes: tiles, pairs of row blocks of S or T before them, jobs of dB and of dA."""

    tiles: int
    units: int
    db_jobs: int
    da_jobs: int


def shares(p: Problem, config: CudaConfig, forward: bool, *, tiles: bool = True) -> list[tuple[range, Share]]:
    """Of all places, as csrc/shares.h has it: runs of places that take as much. Slices of S are not looked at."""
    clusters, pairs_m = config.programs // _CLUSTER, _cdiv(p.M, _BLOCK_M * _CLUSTER)
    all_tiles = pairs_m * _cdiv(p.out, config.block_n) if tiles else 0
    db_jobs, da_jobs = (0 if forward else config.parts * _cdiv(columns, 256) for columns in (p.depth, p.out))

    def mine(place: int, count: int, among: int = clusters) -> int:
        return max(0, _cdiv(count - place, among)) if place < among else 0

    def of(place: int) -> Share:
        db = mine(place, db_jobs)
        units = mine(place, pairs_m, config.shrink_clusters)
        # the first tiles are for the last places
        return Share(mine(clusters - 1 - place, all_tiles), units, db, mine(place, db_jobs + da_jobs) - db)

    # Who takes one less of something than the place before, or, of tiles, one more.
    firsts = {0, clusters - all_tiles % clusters, *(jobs % clusters for jobs in (db_jobs, db_jobs + da_jobs))}
    if config.shrink_clusters:
        firsts |= {pairs_m % config.shrink_clusters, config.shrink_clusters}
    bounds = [*sorted(first for first in firsts if first < clusters), clusters]
    return [(range(first, end), of(first)) for first, end in itertools.pairwise(bounds)]


def end_us(p: Problem, config: CudaConfig, forward: bool, *, tiles: bool = True) -> float:
    """Microseconds until the last cluster ends, roughly: as measured on an H200.

    Known are the times of a tile and of two row blocks of S or T, for each 64 columns of depth, of a tile's further 64
    ranks, of 128 rows of a job of dA or dB, and of a part of a stripe that is left and added.
    """
    wide, steps = config.block_n == 256, _cdiv(p.depth, 64)
    times = (0.26, 0.55, 0.8) if p.r <= 64 else (0.49, 1.05, 6.0) if p.r <= 128 else (0.69, 1.75, 12.0)
    unit_step_us, b_us, part_us = times
    a_us = 2 * b_us if p.dropout else b_us
    tile_us, unit_us = 2 + steps * (0.66 if wide else 0.33) + 1.8 * (_cdiv(p.r, 64) - 1), 2 + steps * unit_step_us
    rows = job_rows(config.block_n, p.r)
    part = _cdiv(_cdiv(p.M, config.parts), rows) * rows / 128

    def end(share: Share) -> float:
        jobs = 0.5 * (share.db_jobs + share.da_jobs) + (b_us * share.db_jobs + a_us * share.da_jobs) * part
        return share.tiles * tile_us + share.units * unit_us + jobs

    all_shares = [share for _, share in shares(p, config, forward, tiles=tiles)]
    # No tile ends before its rows of S or T are there.
    ready = max(share.units for share in all_shares) * unit_us + 3 if tiles else 0.0
    return max(ready, *map(end, all_shares)) + (0.8 + part_us * (config.parts - 1) if config.parts > 1 else 0)


def job_rows(block_n: int, r: int) -> int:
    """Rows of a stage of a job, as csrc/shares.h has it."""
    return 128 if block_n == 256 and r <= 64 else 64


def decode_config(p: Problem) -> tuple[int, int, bool]:
    """decode_rows, decode_split and decode_early, as measured on an H200.

    Blocks of 128 rows and half the depth where they give nearly every SM one, else of 64 rows, each at least 256 deep.
    """
    enough = p.num_sms * 9 // 10
    rows, split = 128, 2
    if _cdiv(p.out, rows) * split < enough or p.depth < 512:
        rows, split = 64, 1
        while split < 4 and _cdiv(p.out, rows) * split < enough and p.depth >= 512 * split:
            split *= 2
    # A launch that takes long does not gain by beginning early, it competes with the one before.
    early = p.M <= 32 and p.out * p.depth <= 1 << 24
    return rows, split, early


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
