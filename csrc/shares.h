// Who takes what. No CUDA in here: a test compiles it for the host.
#pragma once

#ifdef __CUDACC__
#define FUSEDLORA_BOTH __host__ __device__
#else
#define FUSEDLORA_BOTH
#endif

namespace fusedlora {

// dB and dA: a job of a cluster is 256 columns and a part of the rows; its blocks' warpgroups take a stripe of 64 each.
constexpr int JOB_COLS = 256, STRIPE = 64;

// Rows of a stage of a job, with those of S or T beside them; a stage of the tiles holds both.
FUSEDLORA_BOTH constexpr int job_rows(int block_n, int ranks) { return block_n == 256 && ranks <= 64 ? 128 : 64; }

FUSEDLORA_BOTH constexpr int job_count(int cols, int parts) { return (cols + JOB_COLS - 1) / JOB_COLS * parts; }

// Pairs of tiles, two row blocks beside one column block, in column-major groups of `group` pairs of rows, so that L2 is
// reused. A cluster takes every `stride`th; those of the first places begin last, and have one less where they are uneven.
// Of a pair of rows, the tiles of `slices` columns, an even number, also sum a slice of S each. From group to group these
// are the next columns within a window, so that all clusters have as many; in it no tile waits for one that comes a turn
// after it, as its own cluster's may.
struct Tiles {
  int pairs_m, tiles_n, group, stride, slices, window;

  FUSEDLORA_BOTH static constexpr Tiles of(int pairs_m, int tiles_n, int group, int stride, int slices) {
    const int rows = group < pairs_m ? group : pairs_m, most = (stride - 1) / rows + 1, least = tiles_n < most ? tiles_n : most;
    return {pairs_m, tiles_n, group, stride, slices, slices > 0 ? least / slices * slices : 0};
  }

  // Which slice a tile sums, or -1. Slices of the second half of the depth are for odd columns.
  FUSEDLORA_BOTH constexpr int slice(int pair_m, int tile_n) const {
    if (slices == 0) return -1;
    const int number = tile_n - pair_m / group * slices % window;
    return number >= 0 && number < slices ? number % 2 * (slices / 2) + number / 2 : -1;
  }

  FUSEDLORA_BOTH constexpr int count() const { return pairs_m * tiles_n; }
  FUSEDLORA_BOTH constexpr int first(int place) const { return stride - 1 - place; }
  FUSEDLORA_BOTH constexpr int owned(int place) const {
    return first(place) < count() ? (count() - first(place) + stride - 1) / stride : 0;
  }

  FUSEDLORA_BOTH constexpr void coordinates(int index, int& pair_m, int& tile_n) const {
    const int start = index / (group * tiles_n) * group, left = pairs_m - start, rows = left < group ? left : group;
    const int within = index % (group * tiles_n);
    pair_m = start + within % rows;
    tile_n = within / rows;
  }
};

// The depth of S or T is summed in `slices` runs of it, of whole steps of 128 columns: where a run begins, in steps of 64.
FUSEDLORA_BOTH constexpr int slice_begin(int depth, int slice, int slices) {
  return (depth + 127) / 128 * slice / slices * 2;
}

// The jobs of one cluster: of all, dB's and then dA's, every `stride`th, and when it takes them. The first one is for
// `first_place`.
struct Jobs {
  int place, first, stride, tiles, db_jobs, count;

  FUSEDLORA_BOTH static constexpr Jobs of(int db_jobs, int da_jobs, int place, int first_place, int stride, int tiles) {
    const int jobs = db_jobs + da_jobs;
    if (jobs == 0) return {place, 0, stride, tiles, 0, 0};  // as in a forward
    const int first = (place + stride - first_place % stride) % stride;
    return {place, first, stride, tiles, db_jobs, first < jobs ? (jobs - first + stride - 1) / stride : 0};
  }

  // Number n of the cluster's: whether it is dA's, and its index among those.
  FUSEDLORA_BOTH constexpr bool is_da(int n) const { return first + n * stride >= db_jobs; }
  FUSEDLORA_BOTH constexpr int index(int n) const { return first + n * stride - (is_da(n) ? db_jobs : 0); }

  // Whether it comes before the cluster's tile number `tile` at the latest. Other places have other turns, since tiles
  // leave memory idle. As a rule T is there after two tiles, and the last tile hides the adding of parts.
  FUSEDLORA_BOTH constexpr bool due(int n, int tile) const {
    if (n >= count) return false;
    const int wanted = (8 * n + first % 8) * tiles / (8 * count) + 1, least = is_da(n) ? 2 : 1;
    const int most = tiles < 2 ? tiles : tiles - 1, turn = wanted > least ? wanted : least;
    return (turn < most ? turn : most) <= tile;
  }
};

constexpr int DECODE_MAX_SPLIT = 8;

constexpr int DECODE_MAX_STAGES = 8;
constexpr int DECODE_BYTES = 112 << 10;  // two blocks fit on an SM, so that clusters find places everywhere
constexpr int DECODE_BARRIERS = 1024;    // bytes before the stages, which start at a multiple of that

// 64 columns of A, `ranks` times 16 rows, of W, `halves` times 64, and of x, `tiles` times 8.
FUSEDLORA_BOTH constexpr int decode_stage_bytes(int ranks, int halves, int tiles) {
  return 2048 * ranks + 8192 * halves + 1024 * tiles;
}

FUSEDLORA_BOTH constexpr int decode_stages(int stage_bytes) {
  const int fit = (DECODE_BYTES - 2 * DECODE_BARRIERS) / stage_bytes;
  return fit < DECODE_MAX_STAGES ? fit : DECODE_MAX_STAGES;
}

// Where a thread's four floats of a unit lie.
FUSEDLORA_BOTH constexpr int unit_bytes(int unit, int lane) { return (32 * unit + lane) * 16; }

// The first block of 64 columns of depth that the `rank`th of `split` blocks takes.
FUSEDLORA_BOTH constexpr int depth_begin(int K, int rank, int split) { return (K + 63) / 64 * rank / split; }

// Which 16 rows of the block's a warp of the cluster finishes, and which of their units: `first` and each `step` further.
// The cluster has at least as many warps as the block has groups of 16 rows.
struct Finisher {
  int group, first, step;
};

FUSEDLORA_BOTH constexpr Finisher finisher(int rank, int warp, int split, int groups) {
  return {(4 * rank + warp) % groups, (4 * rank + warp) / groups, 4 * split / groups};
}

}  // namespace fusedlora
