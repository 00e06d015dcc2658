// Who takes what in the decode kernel. No CUDA in here: a test compiles it for the host.
#pragma once

#ifdef __CUDACC__
#define FUSEDLORA_BOTH __host__ __device__
#else
#define FUSEDLORA_BOTH
#endif

namespace fusedlora {

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
