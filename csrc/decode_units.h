// Who takes what in the decode kernel. No CUDA in here: a test compiles it for the host.
#pragma once

#ifdef __CUDACC__
#define FUSEDLORA_BOTH __host__ __device__
#else
#define FUSEDLORA_BOTH
#endif

namespace fusedlora {

constexpr int DECODE_MAX_SPLIT = 8;

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
