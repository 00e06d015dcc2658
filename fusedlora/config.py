"""Tile configurations of the Triton kernels: what is valid, and a heuristic for every shape and GPU.

Nothing here imports triton, torch or a kernel, so configurations can be listed, checked and simulated anywhere.
"""

from __future__ import annotations

import dataclasses
import functools

MAX_RANK = 256
# float32 operands go through three tf32 products each, whose terms leave too few registers for wider ranks.
MAX_RANK_FLOAT32 = 64

# Rows of x up to which the forward is the decode kernel's, and ranks: wider ones have more of A to read than of W.
MAX_DECODE_ROWS, MAX_DECODE_RANK = 64, 64

# Bytes of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications). An unknown capability is treated as the smallest.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes of one kernel, in elements; `num_stages` and `*_STAGES` are buffers of the software pipelines."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    # Ranks that one step of a tile's epilogue takes.
    RANK_K: int
    # Shrink tasks: SHRINK_M rows, SHRINK_K elements of depth a step.
    SHRINK_M: int
    SHRINK_K: int
    SHRINK_STAGES: int
    # One loop over the steps of all of a program's tiles, rather than one for each: the next tile's first loads are on
    # their way while a tile ends. Their buffers are then beside those of the epilogue, not in the same memory.
    FLAT: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def has_tasks(self) -> bool:
        """Whether shrink tasks compute S or T."""
        return True


@dataclasses.dataclass(frozen=True)
class ForwardConfig(TileConfig):
    """Adds whether tiles compute their rows of S, each by itself, beside their own product: no shrink tasks then.

    For a rank that RANK_K holds at once, without dropout, and where adapters are not kept at fp32 precision.
    """

    IN_TILES: bool = False

    @property
    def has_tasks(self) -> bool:
        return not self.IN_TILES


@dataclasses.dataclass(frozen=True)
class BackwardConfig(TileConfig):
    """Adds the jobs of dA and dB: stripes of STRIPE_N columns, STRIPE_M rows a step, about `stripe_rows` rows a job."""

    # dB from the shrink tasks' read of dy (partial sums for each row block) rather than from stripes of its own.
    FUSE_DB: bool
    STRIPE_N: int
    STRIPE_M: int
    STRIPE_STAGES: int
    stripe_rows: int = 2048


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the decode kernel, the forward's for few rows: BLOCK_N columns of y and one of SPLIT parts of the depth.

    With `early` its programs may take their places while the launch before it on the stream ends (sm_90 and later).
    """

    BLOCK_N: int
    BLOCK_K: int
    SPLIT: int
    num_warps: int
    num_stages: int
    early: bool


# What a launcher takes.
Config = ForwardConfig | BackwardConfig | DecodeConfig


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a configuration is chosen by. `out` and `depth` are N and K forward, K and N backward."""

    M: int
    out: int
    depth: int
    r: int
    itemsize: int
    # fp32 adapters kept at fp32 precision over a 16-bit base.
    split: bool
    capability: int
    num_sms: int
    # A mask on the adapter's x: forward on what the shrink tasks read, backward on dA's x and on the second product.
    dropout: bool = False


def block_r(r: int) -> int:
    """The rank as the kernels pad it in registers: a power of two, at least 16 (a tensor core's depth)."""
    return max(16, 1 << (r - 1).bit_length())


def check_config(config: Config) -> None:
    """Raises ValueError where a configuration breaks a rule of the kernels (powers of two, tensor-core minima)."""
    minima = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "RANK_K": 16, "SHRINK_M": 16, "SHRINK_K": 16}
    minima |= {"STRIPE_N": 16, "STRIPE_M": 16, "GROUP_M": 1, "num_warps": 1, "num_stages": 1, "stripe_rows": 1}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            continue
        least = minima.get(field.name, 1)
        if value < least:
            raise ValueError(f"{field.name} is {value}; it must be at least {least}")
        tile_size = field.name.isupper() and field.name != "GROUP_M" and not field.name.endswith("STAGES")
        if tile_size and (value & (value - 1) or value > 256):
            raise ValueError(f"{field.name} is {value}; a tile size must be a power of two up to 256")
    if config.num_warps not in (4, 8):
        raise ValueError(f"num_warps is {config.num_warps}; it must be 4 or 8")


@functools.lru_cache(maxsize=4096)
def forward_config(p: Problem) -> ForwardConfig:
    """The configuration of the forward kernel."""
    # The SMs that a single round leaves free compute S meanwhile; a backward has no time for its stripes then. Sixteen
    # row blocks a group take 0.003 less than eight at one clock, 0.009 in long blocks (an H200, mean of six shapes).
    tile, shrink = _tile(p, busy=0.9), _shrink(p, tall=True, masked=p.dropout)
    in_tiles = _in_tiles(p, tile, shrink)
    if in_tiles:
        shrink |= {"SHRINK_M": 128, "SHRINK_K": 128, "SHRINK_STAGES": 4}  # there are no tasks: one kernel for all M
        if cdiv(p.M, 64) * cdiv(p.out, 64) <= p.num_sms:  # or most SMs would have no tile
            tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    return ForwardConfig(**tile, GROUP_M=16, **shrink, IN_TILES=in_tiles, FLAT=_flat(p, tile))


def check_for(p: Problem, config: TileConfig) -> None:
    """Raises ValueError where a configuration asks for what the kernels don't do for such calls."""
    for name, asked in (("IN_TILES", not config.has_tasks), ("FLAT", config.FLAT)):
        why = None
        if block_r(p.r) != config.RANK_K:
            why = f"r is {p.r}, which takes a RANK_K of {block_r(p.r)}, and RANK_K is {config.RANK_K}"
        elif p.split:
            why = "the adapters keep fp32's precision"
        elif p.dropout and (name == "IN_TILES" or isinstance(config, BackwardConfig)):
            why = "there is a dropout"
        if asked and why:
            raise ValueError(f"config.{name} is True; it must be False where {why}")


def _in_tiles(p: Problem, tile: dict[str, int], shrink: dict[str, int]) -> bool:
    """Whether tiles should compute S: where that costs them less than waiting for tasks does (measured on an H200)."""
    if not _large_shared(p) or p.itemsize != 2 or p.split or p.dropout or block_r(p.r) > 16:
        return False
    tiles, area = cdiv(p.M, tile["BLOCK_M"]) * cdiv(p.out, tile["BLOCK_N"]), tile["BLOCK_M"] * tile["BLOCK_N"]
    if p.M <= 256:  # what tasks cost beside their time, 6 µs, is more than a seventh of up to some 45
        return cdiv(tiles, p.num_sms) * area * p.depth <= 1.4e8
    blocks, idle = cdiv(p.M, shrink["SHRINK_M"]), -tiles % p.num_sms  # SMs that have a tile less than others
    # A row block takes 0.75 of a tile's time where it has 256 rows and the tile is 128×256. What of that the first
    # tiles do not hide delays all; in tiles S takes about a seventh of their time.
    block = 97 * shrink["SHRINK_M"] / area
    late = cdiv(blocks, idle) * block - 1 if idle else cdiv(blocks, p.num_sms) * block
    return late / cdiv(tiles, p.num_sms) > 0.15


def decode_rows(M: int) -> int:
    """Rows of x as the decode kernel pads them."""
    return max(16, 1 << (M - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def decode_config(p: Problem) -> DecodeConfig | None:
    """The configuration of the decode kernel, None for what is left to the forward kernel."""
    if p.M > MAX_DECODE_ROWS or p.r > MAX_DECODE_RANK or p.dropout:
        return None
    rows, wide = decode_rows(p.M), block_r(p.r)
    if wide * rows > (512 if p.itemsize == 4 else 1024 if p.split else 4096):  # three products each: registers
        return None
    # The widest columns with which most SMs have a program, each at least 512 deep (measured on an H200). Few rows
    # split their depth only where nothing else gives enough programs: whoever adds the parts comes last.
    candidates = {16: ((128, 1), (64, 1), (32, 8)), 32: ((64, 4),), 64: ((128, 1), (64, 2), (32, 4))}[rows]
    for columns, most in candidates:
        blocks, split = cdiv(p.out, columns), 1
        while split < most and blocks * split < 0.8 * p.num_sms and p.depth >= 1024 * split:
            split *= 2
        if blocks * split >= 0.8 * p.num_sms:
            break
    # Bytes of a row of W a stage. Wider accumulators of S, and operands that are split into terms, leave fewer
    # registers for operands.
    depth_bytes = 256 if wide * rows <= 1024 and not p.split else 128
    if p.itemsize == 2 and depth_bytes == 256 and columns < 128 and rows == 16 and wide <= 32:
        depth_bytes = 512
    shared = SHARED_MEMORY.get(p.capability, 65_536)  # an unknown GPU has at least that
    while True:
        depth = depth_bytes // p.itemsize
        # What a stage holds: tiles of W, x and A, which may be fp32.
        fit = shared // (depth * (p.itemsize * (columns + rows) + 4 * wide))
        if fit >= 4 or depth_bytes == 128:
            break
        depth_bytes //= 2
    # Few rows: 80 to 96 KB of W on their way, and the stage in use. wgmma, which takes 64 rows, holds on to the stage
    # that it reads, and Triton counts that one for others beside.
    if rows == 64 and p.capability == 90:
        stages = min(fit, 7, max(4, 65_536 // (depth_bytes * columns)))
    else:
        stages = min(fit, 5 if rows == 16 else 4, max(3, 98_304 // (depth_bytes * columns))) + 1
    warps = 8 if wide * rows > 2048 else 4
    early = rows != 32 or split == 1  # measured, not understood
    return DecodeConfig(columns, depth, split, num_warps=warps, num_stages=stages, early=early)


@functools.lru_cache(maxsize=4096)
def backward_config(p: Problem) -> BackwardConfig:
    """As `forward_config`, for the backward kernel."""
    wide = block_r(p.r)
    # One read of dy for T and dB. Wider ranks write partial sums as large as dy itself.
    fuse = p.itemsize == 2 and wide <= 32 and not p.split
    if not _large_shared(p) or p.itemsize == 4:
        narrow = wide > 64 or p.split or p.itemsize == 4
        rows = 16 if wide > 64 and p.itemsize == 2 and not p.dropout else 32 if narrow else 64
        stripe = {"STRIPE_N": 32 if narrow else 64, "STRIPE_M": rows, "STRIPE_STAGES": 3}
    elif p.split and wide > 64:
        stripe = {"STRIPE_N": 64 if wide <= 128 else 32, "STRIPE_M": 32 if wide <= 128 else 16, "STRIPE_STAGES": 3}
    elif wide > 64:
        stripe = {"STRIPE_N": 64, "STRIPE_M": 32, "STRIPE_STAGES": 4}
    else:
        # Each step's terms are summed by truncating hardware: shorter steps keep fp32's precision.
        rows = 64 if wide > 32 or p.split else 128
        # T and S are read once a stripe, and at wide ranks are half as much as 128 columns of x.
        columns = 256 if wide > 32 and not p.split and not p.dropout else 128
        stages = 3 if columns == 256 or (p.split and wide > 32) else 4
        stripe = {"STRIPE_N": columns, "STRIPE_M": rows, "STRIPE_STAGES": stages}
    # Short jobs where few rows would leave most SMs without one, the more so where a mask makes them long.
    long_jobs = p.dropout or p.split
    stripe["stripe_rows"] = 512 if long_jobs and p.M <= 4096 else 2048 if p.M >= 4096 else 1024
    tile, shrink = _tile(p), _shrink(p, tall=not (fuse or p.split))
    # A masked product in the loop over all tiles makes ptxas serialise wgmma (C7515).
    flat = _flat(p, tile) and not p.dropout
    return BackwardConfig(**tile, GROUP_M=16, **shrink, **stripe, FUSE_DB=fuse, FLAT=flat)


def _flat(p: Problem, tile: dict[str, int]) -> bool:
    """Whether one loop takes all of a program's tiles: where they are more than one and its buffers fit (measured)."""
    tiles = cdiv(p.M, tile["BLOCK_M"]) * cdiv(p.out, tile["BLOCK_N"])
    return p.capability == 90 and p.itemsize == 2 and not p.split and block_r(p.r) == 16 and tiles > p.num_sms


def _large_shared(p: Problem) -> bool:
    return SHARED_MEMORY.get(p.capability, 0) > 200_000


def _heavy(p: Problem) -> bool:
    """Whether the skinny accumulators leave too few registers for the large tile."""
    if not _large_shared(p):
        return block_r(p.r) > 128 or p.split
    return block_r(p.r) > (128 if not p.dropout else 16 if p.split else 64)


def _tile(p: Problem, busy: float = 1.0) -> dict[str, int]:
    def tile(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
        return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}

    if p.itemsize == 4:
        return tile(64, 64, 32, warps=8, stages=2)
    if p.split and block_r(p.r) > 128:
        return tile(64, 128, 32, warps=8, stages=3)
    if not _large_shared(p):
        # Shared memory of 99 KB (163 KB on sm_80) and mma.sync.
        if _heavy(p):
            return tile(64, 128, 32, warps=8, stages=3)
        # For sm_120 ptxas stops at 128 registers with eight warps and spills what a small rank needs beyond them.
        few = p.capability == 120 and block_r(p.r) == 16 and not p.split
        return tile(128, 128, 32, warps=4 if few else 8, stages=3)
    # Hopper and later. 128×256 has the best ratio of arithmetic to loads; smaller tiles where it would leave SMs
    # without one.
    tiles_large = cdiv(p.M, 128) * cdiv(p.out, 256)
    if p.M <= 64:
        return tile(64, 64, 128, warps=4, stages=4)
    if p.split and not p.dropout and block_r(p.r) == 128:
        return tile(128, 128, 64, warps=8, stages=3)
    if _heavy(p):
        return tile(64, 256, 64, warps=8, stages=3)
    if tiles_large >= busy * p.num_sms:
        return tile(128, 256, 64, warps=8, stages=3)
    if 4 * tiles_large >= p.num_sms:
        return tile(128, 128, 64, warps=8, stages=4)
    return tile(64, 128, 64, warps=4, stages=4)


def _shrink(p: Problem, *, tall: bool, masked: bool = False) -> dict[str, int]:
    def shrink(rank_k: int, m: int, k: int, stages: int) -> dict[str, int]:
        return {"RANK_K": rank_k, "SHRINK_M": m, "SHRINK_K": k, "SHRINK_STAGES": stages}

    wide = block_r(p.r)
    if p.itemsize == 4:
        return shrink(16, m=64, k=32, stages=2)
    rank_k = 16 if p.split else min(wide, 32)
    if not _large_shared(p):
        # mma.sync takes its operands from registers, which wide ranks need: what ptxas spills in no loop. Not measured.
        rows = 32 if _heavy(p) and wide > 16 else 64 if _heavy(p) or wide > 64 else 128
        rank_k = 16 if wide > 64 and not p.dropout else rank_k
        return shrink(rank_k, m=rows, k=16 if p.split and wide > 32 else 32, stages=3)
    if _heavy(p) or (p.split and wide > 64):
        return shrink(rank_k, m=64, k=16 if p.split and wide > 128 else 32, stages=3)
    if p.M <= 64:
        return shrink(rank_k, m=64, k=128 if wide <= (16 if p.split else 64) else 64, stages=3)
    if p.split and wide > 32:
        return shrink(rank_k, m=128, k=64, stages=3)
    if wide > 64:
        return shrink(rank_k, m=128, k=32, stages=4)
    if masked and not p.split and p.M <= 16384:
        # The mask takes longer than the memory: every SM makes its share.
        if wide > 32:
            return shrink(rank_k, m=64, k=64, stages=4)
        return shrink(rank_k, m=32 if p.M <= 4096 else 64, k=256, stages=3)
    if tall and p.M > 1024:
        return shrink(rank_k, m=256, k=64, stages=4)
    return shrink(rank_k, m=128, k=64 if (p.dropout or p.split) and wide > 16 else 128, stages=4)
