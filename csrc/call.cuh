// What host and device know of a launch: what a call hands over, how a block's shared memory is laid out, and which words in
// global memory its clusters synchronise by.
#pragma once
#include "skinny.cuh"

namespace fusedlora {

constexpr int BLOCK_M = 128, BLOCK_K = 64, CLUSTER = 2;
constexpr int CONSUMERS = 256, THREADS = 128 + CONSUMERS;

// Words in global memory, zero between launches. From PROGRESS on: for each row block a bit for each 64 rows of S or T
// that are there, for each 64 rows a bit for each slice that has been left, and for each stripe a count of parts.
enum Word { PLACE, TICKET, SKINNY_PREPARED, PREPARED, EXIT, PROGRESS = 8 };

// What a kernel does that others do not: in a forward's tiles it sums slices of S beside their own sums, with a backward's T
// dB, before a forward's tiles S of terms in slices (under a mask all may), or with a backward's dB DoRA's dm. Kernels of
// their own, since forward and backward in turn find their instructions cold, and few rows pay for each.
enum class Kind { PLAIN, SLICES_IN_TILES, DB_WITH_T, SLICES_OF_TERMS, DM_WITH_DB };

// out [M, R] = scaling · left · skinnyᵀ; skinny is [R, depth] in the forward, in the backward B as it lies, [depth, R].
// With terms, what those of skinny give together, as SMALL_TERMS has it.
template <typename T>
struct Shrink {
  T* out;       // [M, R], or null
  void* saved;  // [M, r], of T or, with terms, fp32; or null
  float scaling;
  int slices;      // up to 32
  float* partial;  // if there are two or more: for each 64 rows and slice its sums, as the threads hold them
  // Of the first places: a slice of a pair of row blocks is a unit, which one of them sums before its tiles. Where tiles sum
  // slices there are none.
  int clusters;

  // Where a warpgroup leaves the sums of a slice, or the first of them.
  template <int R>
  __device__ float* place(int block, int group, int slice) const {
    return partial + (int64_t(2 * block + group) * slices + slice) * (64 * R);
  }
};

template <typename T>
struct Call {
  CUtensorMap left, right, skinny, small, wide, out;  // small [M, R] is S or T, wide [cols, R]
  // The first is of `skinny`, where that needs one; row blocks wait for that alone.
  Preparation preparations[3];
  int num_preparations;
  bool prepares_skinny;
  Shrink<T> shrink;
  Stripes stripes[2];  // dB's, which need no T, then dA's
  const float* gain;  // [cols] or null
  const void* bias;   // [cols] or null
  bool bias_is_float;
  Mask mask;
  bool tiles;
  int M, cols, depth, r, group, first_job;
  int* words;
  Magnitude magnitude;
};

// Of R ranks in rows, those of a box: a swizzled row holds 64.
template <int R>
constexpr int BOX_RANKS = R < 64 ? R : 64;

template <int BLOCK_N, int RANKS>
struct Layout {
  static constexpr int R = 16 * RANKS;
  // More than 64 ranks are GROUPS boxes, and as many stages of depth r.
  static constexpr int GROUPS = (R + 63) / 64, GROUP_STEPS = RANKS / GROUPS, BOX_ROW = 2 * BOX_RANKS<R>;
  static constexpr int LEFT = BLOCK_M * BLOCK_K * 2, RIGHT = BLOCK_N * BLOCK_K * 2, STAGE = LEFT + RIGHT;
  static constexpr int STAGES = BLOCK_N == 256 ? 4 : 6;
  // A warpgroup's output leaves by boxes of [64, 64]; while TMA reads one the next is written.
  static constexpr int OUT_BOX = 64 * 64 * 2, OUT_BOXES = 2, OUT = CONSUMERS / 128 * OUT_BOXES * OUT_BOX;
  // Shrinking takes as many boxes of BLOCK_K columns at a time as a stage holds, up to two.
  static constexpr int SKINNY = R * BLOCK_K * 2, BOXES = 2 * (LEFT + SKINNY) <= STAGE ? 2 : 1;
  static_assert(BOXES * (LEFT + SKINNY) <= STAGE);
  // A stage of a job: rows of 128 columns, of which each warpgroup takes one box of 64, and of small.
  static constexpr int JOB_ROWS = job_rows(BLOCK_N, R), BOX = JOB_ROWS * 128, JOB_STAGE = JOB_ROWS * (256 + 2 * R);
  static_assert(JOB_STAGE <= STAGE);
  // A tile's slice takes skinny from where the output of the tile before was: LEAD steps later, as the TMA thread is up to
  // STAGES steps ahead.
  static constexpr int LEAD = STAGES + 2;
  // The sums of more ranks would take longer than what tiles gain.
  static constexpr bool SLICES_IN_TILES = RANKS <= 2;
  static_assert(!SLICES_IN_TILES || STAGES * SKINNY <= OUT);
  // Beside T, dB: BOXES boxes of rows of dy a stage. Their rows of S wait where later a tile's output is. With more ranks
  // T would come too late.
  static constexpr bool DB_WITH_T = RANKS == 1 && BLOCK_N == 256;
  static constexpr int S_ROWS = BLOCK_M * R * 2;
  static_assert(!DB_WITH_T || BOXES * S_ROWS <= OUT);
  static constexpr int TOTAL = 1024 + STAGES * STAGE + OUT + 16 * STAGES + 80;
};

// How many tasks of preparation SKINNY_PREPARED and PREPARED count.
template <typename T>
__device__ int skinny_tasks(const Call<T>& c) {
  return c.prepares_skinny ? preparation_tasks(c.preparations[0]) : 0;
}

template <typename T>
__device__ int other_tasks(const Call<T>& c) {
  int count = 0;
  for (int i = c.prepares_skinny; i < c.num_preparations; i++) count += preparation_tasks(c.preparations[i]);
  return count;
}

}  // namespace fusedlora
