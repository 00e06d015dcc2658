// What the roles of a block share: what kind of kernel it is, where things lie in its shared memory, what its cluster is to
// do and in which order.
#pragma once
#include "call.cuh"

namespace fusedlora {

// A kernel's template arguments, and what follows from them.
template <typename T_, int BLOCK_N_, int RANKS_, bool BACKWARD_, bool DROPOUT_, int TERMS_, Kind KIND>
struct Traits {
  using T = T_;
  using L = Layout<BLOCK_N_, RANKS_>;
  static constexpr int BLOCK_N = BLOCK_N_, RANKS = RANKS_, TERMS = TERMS_;
  static constexpr int SUMS = SUM_RANKS<L::R, TERMS>, ACCS = BLOCK_N / 2;  // the latter of a thread, for a tile
  static constexpr bool BACKWARD = BACKWARD_, DROPOUT = DROPOUT_;
  static constexpr bool IN_TILES = KIND == Kind::SLICES_IN_TILES, DB_WITH_T = KIND == Kind::DB_WITH_T;
  static constexpr bool DM_WITH_DB = KIND == Kind::DM_WITH_DB;
  // The dropout's mask is on x, where S is summed and in dA's jobs, and on what the rank-r step adds to dX.
  static constexpr bool MASK_ON_S = DROPOUT && !BACKWARD, MASK_ON_RANK_STEP = DROPOUT && BACKWARD;
  // There may be more slices than one, as there are in tiles and, for S under a mask or of terms, which takes long.
  static constexpr bool CUT = IN_TILES || MASK_ON_S || KIND == Kind::SLICES_OF_TERMS;
  static constexpr int UNIT_PAIRS = DB_WITH_T ? L::BOXES : 1;  // pairs of row blocks that a unit is of
  static constexpr bool MASK_IN_TILES = IN_TILES && DROPOUT;
  // Of 64512 for 128 and 256 threads: where consumers leave more, side warps load more together. ptxas must spill nothing.
  static constexpr int EIGHTS = BLOCK_N == 128 || (BACKWARD ? !DROPOUT : RANKS == 1 && !MASK_IN_TILES) ? 2 : 1;
  static constexpr int SIDE_REGISTERS = BLOCK_N == 128 ? 136 : EIGHTS == 2 ? 120 : BACKWARD ? 72 : 88;
  static constexpr int CONSUMER_REGISTERS = (64512 - 128 * SIDE_REGISTERS) / CONSUMERS / 8 * 8;
  // Terms are added up box by box, which does not go beside a tile's sums; a mask takes too long beside a narrow tile's.
  // And dA's jobs would have to wait for a T that comes with the tiles.
  static_assert(!IN_TILES || (L::SLICES_IN_TILES && TERMS == 1 && !BACKWARD && !(DROPOUT && BLOCK_N == 128)));
  static_assert(!DB_WITH_T || (L::DB_WITH_T && TERMS == 1 && BACKWARD));
  static_assert(!DM_WITH_DB || (TERMS == 1 && BACKWARD && !DROPOUT));
};

// Where one of the roles is in the ring of stages; `phase` is the parity of its turn.
template <int STAGES>
struct Ring {
  int stage = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }

  // The stage that comes i after this one.
  __device__ int after(int i) const { return stage + i < STAGES ? stage + i : stage + i - STAGES; }
};

template <typename Kernel>
struct Block {
  using T = typename Kernel::T;
  using L = typename Kernel::L;

  const Call<T>& c;
  // Clusters that come early have fewer tiles, as they may have units first. In shared memory, since registers are wanted.
  Tiles& tiles;
  Jobs& jobs;
  Mask& mask;
  // Addresses in shared memory, of mbarriers from `barriers` on.
  const uint32_t stages, out, barriers;
  // out_free: of the tile before; all_there: of T. No kernel has both.
  const uint32_t told, out_free, all_there, words_left;
  volatile int *const next, *const own_place, *const begun;  // a preparation's ticket; its place; how many are claimed
  const int tiles_m, pairs_m, steps, slices, half_steps;
  const uint32_t rank;

  __device__ __forceinline__ Block(const Call<T>& c, uint8_t* raw, Tiles& tiles, Jobs& jobs, Mask& mask)
      : c(c),
        tiles(tiles),
        jobs(jobs),
        mask(mask),
        stages((shared_address(raw) + 1023) & ~1023u),
        out(stages + L::STAGES * L::STAGE),
        barriers(out + L::OUT),
        told(barriers + 16 * L::STAGES),
        out_free(told + 8),
        all_there(out_free),
        words_left(out_free + 8),
        next(reinterpret_cast<int*>(raw + (words_left + 40 - shared_address(raw)))),
        own_place(next + 1),
        begun(next + 2),
        tiles_m((c.M + BLOCK_M - 1) / BLOCK_M),
        pairs_m((tiles_m + CLUSTER - 1) / CLUSTER),
        steps((c.depth + BLOCK_K - 1) / BLOCK_K),
        slices(Kernel::CUT ? c.shrink.slices : 1),
        half_steps(slice_begin(c.depth, slices / 2, slices)),
        rank(cluster_rank()) {}

  __device__ uint32_t stage(int n) const { return stages + n * L::STAGE; }
  __device__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return barriers + 8 * L::STAGES + 8 * stage; }
  // Of each warpgroup, which leaves sums for a side warp.
  __device__ uint32_t sums_left(int group) const { return words_left + 8 + 8 * group; }
  __device__ uint32_t sums_taken(int group) const { return words_left + 24 + 8 * group; }

  // Of 64 rows each, with a bit for each slice.
  __device__ int* slice_words() const { return c.words + PROGRESS + CLUSTER * pairs_m; }

  // Of a pair of row blocks, this block's first row.
  __device__ int row(int pair_m) const { return (pair_m * CLUSTER + rank) * BLOCK_M; }

  // The cluster's tile number n.
  __device__ __forceinline__ void coordinates(int n, int& pair_m, int& tile_n) const {
    tiles.coordinates(tiles.first(jobs.place) + n * tiles.stride, pair_m, tile_n);
  }

  // Of a job of dB or dA, a warpgroup's stripe.
  __device__ int stripe(const Stripes& p, int index, int group) const {
    return index / p.parts * (JOB_COLS / STRIPE) + rank * 2 + group;
  }

  // Where slices are in tiles, these take their steps from LEAD before one half of the depth on, so that by the middle of
  // their time all slices are there, and tiles that share operands still read them together.
  __device__ int first_step(int half) const {
    if (!Kernel::IN_TILES) return 0;
    const int step = (half ? half_steps : 0) - L::LEAD;
    return step < 0 ? step + steps : step;
  }

  // Of a tile's steps, the first of its slice and the first after it.
  __device__ int slice_begins(int slice) const {
    return L::LEAD + slice_begin(c.depth, slice, slices) - (slice >= slices / 2 ? half_steps : 0);
  }
  __device__ int slice_ends(int slice) const {
    return slice_begins(slice) + min(steps, slice_begin(c.depth, slice + 1, slices)) - slice_begin(c.depth, slice, slices);
  }

  // take(pair_m, slice) for what a cluster sums of S or T outside of its tiles: first its own units, then those, or the
  // slices of those tiles, of all places that nobody has by then, so that it never waits for a cluster which may find no
  // SM before this one ends. If that comes after all, it computes the same bits once more.
  template <typename Tell, typename Take>
  __device__ __forceinline__ void take_units(Tell tell, Take take) const {
    const int units_m = (pairs_m + Kernel::UNIT_PAIRS - 1) / Kernel::UNIT_PAIRS;
    const int owners = Kernel::IN_TILES ? tiles.stride : c.shrink.clusters;
    if (jobs.place >= owners || (Kernel::IN_TILES && jobs.tiles == 0)) return;  // who has no tile waits for nobody
    for (int owner = jobs.place; owner < owners;) {
      if (!Kernel::IN_TILES) {
        for (int unit = owner; unit < units_m * slices; unit += c.shrink.clusters) {
          take(unit / slices * Kernel::UNIT_PAIRS, unit % slices);
        }
      } else if (owner != jobs.place) {
        for (int index = tiles.first(owner); index < tiles.count(); index += tiles.stride) {
          int pair_m, tile_n;
          tiles.coordinates(index, pair_m, tile_n);
          if (const int slice = tiles.slice(pair_m, tile_n); slice >= 0) take(pair_m, slice);
        }
      }
      if (owner == jobs.place) {
        tell();
        barrier_wait(told, 0);
        owner = *begun;  // this cluster has, so that is above `place`
      } else {
        owner++;
      }
    }
  }

  // take_job(is_da, index) and take_tile(n) for all jobs and tiles of the cluster, in the order that all roles keep to.
  template <typename TakeJob, typename TakeTile>
  __device__ __forceinline__ void take_turns(TakeJob take_job, TakeTile take_tile) const {
    for (int n = 0, done = 0;; n++) {
      if constexpr (Kernel::BACKWARD) {
        for (; jobs.due(done, n); done++) take_job(jobs.is_da(done), jobs.index(done));
      }
      if (n == jobs.tiles) break;
      take_tile(n);
    }
  }
};

// Sums of S or T for row m, COUNT ranks from k on, go to where they are wanted.
template <typename Kernel, int COUNT>
__device__ __forceinline__ void put_small(const Call<typename Kernel::T>& c, const float (&sums)[COUNT], int m, int k) {
  using T = typename Kernel::T;
  constexpr int R = Kernel::L::R, TERMS = Kernel::TERMS;
  struct alignas(2 * COUNT) Together {
    T values[COUNT];
  };
  if (m >= c.M) return;
  Together these;
#pragma unroll
  for (int j = 0; j < (TERMS == 1 ? 1 : 4); j++) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      these.values[i] = term<T>(sums[i] * c.shrink.scaling, TERMS == 1 ? 1 : SMALL_TERMS >> 4 * j & 15);
    }
    *reinterpret_cast<Together*>(c.shrink.out + int64_t(m) * R + 16 * j + k) = these;
  }
  if (!c.shrink.saved) return;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int64_t at = int64_t(m) * c.r + k + i;
    if (k + i >= c.r) break;
    if constexpr (TERMS == 1) {
      static_cast<T*>(c.shrink.saved)[at] = these.values[i];
    } else {
      static_cast<float*>(c.shrink.saved)[at] = sums[i] * c.shrink.scaling;
    }
  }
}

}  // namespace fusedlora
