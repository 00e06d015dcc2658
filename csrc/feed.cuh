// The TMA thread: it fills the stages of the ring with what the consumers multiply, in the order in which these take it, and
// waits until what others make, S, T and operands made ready, is there.
#pragma once
#include "block.cuh"

namespace fusedlora {

// ROWS rows from `row` on of a matrix of R ranks to both blocks of the cluster, each of which asks for half of them.
template <int R, int ROWS>
__device__ __forceinline__ void load_ranks(uint32_t to, const CUtensorMap* map, uint32_t barrier, int row, uint32_t rank) {
#pragma unroll
  for (int k = 0; k < R; k += 64) {
    tma_multicast(to + ROWS * (2 * k + rank * BOX_RANKS<R>), map, barrier, k, row + rank * (ROWS / 2), 3);
  }
}

template <typename Kernel>
struct Feed {
  using L = typename Kernel::L;
  static constexpr int BLOCK_N = Kernel::BLOCK_N;

  const Block<Kernel>& block;
  const Call<typename Kernel::T>& c = block.c;
  Ring<L::STAGES> ring = {};
  bool prepared = other_tasks(c) == 0, skinny_prepared = false, all_there = false;
  bool looked = false;  // with slices in tiles: for clusters that have not begun
  int sliced = 0;       // how often the boxes of the output have been free for skinny

  __device__ __forceinline__ void wait_for_prepared() {
    if (!prepared) wait_for(c.words + PREPARED, other_tasks(c));
    prepared = true;
  }

  // load(to, barrier) brings the next stage, `bytes` in all.
  template <typename Load>
  __device__ __forceinline__ void fill_stage(int bytes, Load load) {
    const uint32_t barrier = block.full(ring.stage);
    barrier_wait(block.empty(ring.stage), ring.phase ^ 1);
    barrier_expect(barrier, bytes);
    load(block.stage(ring.stage), barrier);
    ring.advance();
  }

  __device__ __forceinline__ void load_skinny(uint32_t to, uint32_t barrier, int k) {
    if (!skinny_prepared) {
      wait_for(c.words + SKINNY_PREPARED, skinny_tasks(c));
      fence_all_to_tma();
      skinny_prepared = true;
    }
    if constexpr (Kernel::BACKWARD) {
      load_ranks<L::R, BLOCK_K>(to, &c.skinny, barrier, k, block.rank);
    } else if constexpr (Kernel::IN_TILES) {
      tma_load(to, &c.skinny, barrier, k, 0);  // to a place that the other block may still need
    } else {
      tma_multicast(to + block.rank * (L::SKINNY / 2), &c.skinny, barrier, k, block.rank * (L::R / 2), 3);
    }
  }

  // A slice of S or T for the row block from `row` on.
  __device__ __forceinline__ void load_slice(int row, int slice) {
    const int end = min(c.depth, slice_begin(c.depth, slice + 1, block.slices) * BLOCK_K);
    for (int k = slice_begin(c.depth, slice, block.slices) * BLOCK_K; k < end; k += L::BOXES * BLOCK_K) {
      fill_stage(L::BOXES * (L::LEFT + L::SKINNY), [&](uint32_t left, uint32_t barrier) {
        for (int b = 0; b < L::BOXES; b++) {
          const int at = k + b * BLOCK_K;
          tma_load(left + b * L::LEFT, &c.left, barrier, at, row);
          load_skinny(left + L::BOXES * L::LEFT + b * L::SKINNY, barrier, at);
        }
      });
    }
  }

  // T and dB of BOXES row blocks, every other from `row` on.
  __device__ __forceinline__ void load_with_db(int row) {
    // S's rows take the place of those of the unit before, once all of that has been multiplied.
    const bool turned = ring.stage == 0;
    barrier_wait(block.empty(turned ? L::STAGES - 1 : ring.stage - 1), turned ? ring.phase ^ 1 : ring.phase);
    const int columns = (c.depth + BLOCK_K - 1) / BLOCK_K | 1;  // past the depth come zeros
    for (int k = 0; k < columns * BLOCK_K; k += BLOCK_K) {
      const int bytes = L::BOXES * L::LEFT + L::SKINNY + (k == 0 ? L::BOXES * L::S_ROWS : 0);
      fill_stage(bytes, [&](uint32_t left, uint32_t barrier) {
        for (int b = 0; b < L::BOXES; b++) {
          const int own = row + b * CLUSTER * BLOCK_M;
          tma_load(left + b * L::LEFT, &c.left, barrier, k, own);
          for (int m = 0; k == 0 && m < BLOCK_M; m += L::JOB_ROWS / CLUSTER) {
            tma_load(block.out + b * L::S_ROWS + m * L::R * 2, &c.stripes[0].small, barrier, 0, own + m);
          }
        }
        load_skinny(left + L::BOXES * L::LEFT, barrier, k);
      });
    }
  }

  __device__ __forceinline__ void load_units() {
    const auto tell = [&] {
      if (Kernel::IN_TILES || block.rank > 0) return;
      tell_cluster(shared_address(const_cast<int*>(block.begun)), published(c.words + PLACE), block.told, CLUSTER);
    };
    block.take_units(tell, [&](int pair_m, int slice) {
      if constexpr (Kernel::DB_WITH_T) {
        load_with_db(block.row(pair_m));
      } else {
        load_slice(block.row(pair_m), slice);
      }
    });
  }

  // A job of dB, or of dA, which needs all of T. With dm a stage of y's boxes comes after each of dy's.
  __device__ __forceinline__ void load_job(bool is_da, int index) {
    const Stripes& p = c.stripes[is_da];
    if (is_da && !all_there) {
      barrier_wait(block.all_there, 0);
      all_there = true;
      fence_all_to_tma();
    } else if (!is_da) {
      wait_for_prepared();
      fence_all_to_tma();
    }
    const int col = index / p.parts * JOB_COLS + block.rank * 128;
    const int rows = part_rows<L::JOB_ROWS>(c.M, p.parts), begin = index % p.parts * rows;
    const int end = min(begin + rows, c.M);
#pragma unroll 1
    for (int m = begin; m < end; m += L::JOB_ROWS) {
      fill_stage(L::JOB_STAGE, [&](uint32_t to, uint32_t barrier) {
        tma_load(to, &p.src, barrier, col, m);
        tma_load(to + L::BOX, &p.src, barrier, col + 64, m);
        load_ranks<L::R, L::JOB_ROWS>(to + 2 * L::BOX, &p.small, barrier, m, block.rank);
      });
      if (!Kernel::DM_WITH_DB || is_da) continue;
      fill_stage(2 * L::BOX, [&](uint32_t to, uint32_t barrier) {
        tma_load(to, &c.magnitude.y, barrier, col, m);
        tma_load(to + L::BOX, &c.magnitude.y, barrier, col + 64, m);
      });
    }
  }

  // A tile's step of 64 columns of depth, with those of skinny where it belongs to a slice.
  __device__ __forceinline__ void load_step(int row, int col, int k, bool with_skinny) {
    const int rank = block.rank;
    fill_stage(with_skinny ? L::STAGE + L::SKINNY : L::STAGE, [&](uint32_t left, uint32_t barrier) {
      const uint32_t right = left + L::LEFT;
      tma_load(left, &c.left, barrier, k * BLOCK_K, row);
      if constexpr (Kernel::BACKWARD) {
        for (int i = rank * (BLOCK_N / 128); i < (rank + 1) * (BLOCK_N / 128); i++) {
          tma_multicast(right + i * 8192, &c.right, barrier, col + 64 * i, k * BLOCK_K, 3);
        }
      } else {
        tma_multicast(right + rank * (L::RIGHT / 2), &c.right, barrier, k * BLOCK_K, col + rank * (BLOCK_N / 2), 3);
      }
      if (Kernel::IN_TILES && with_skinny) load_skinny(block.out + ring.stage * L::SKINNY, barrier, k * BLOCK_K);
    });
  }

  // The steps of depth r.
  __device__ __forceinline__ void load_rank_steps(int row, int col) {
    wait_for_prepared();
    if (row < c.M) wait_for(c.words + PROGRESS + row / BLOCK_M, 3);
    fence_all_to_tma();
    const int half = block.rank * (BLOCK_N / 2);
    for (int k = 0; k < L::R; k += 64) {
      fill_stage((BLOCK_M + BLOCK_N) * L::BOX_ROW, [&](uint32_t left, uint32_t barrier) {
        tma_load(left, &c.small, barrier, k, row);
        tma_multicast(left + L::LEFT + half * L::BOX_ROW, &c.wide, barrier, k, col + half, 3);
      });
    }
  }

  // The cluster's tile number n. With slices in tiles it looks after the first steps of its first one for clusters that have
  // not begun. False: there are some, whose slices come first, as units, and then it begins this tile again.
  __device__ __forceinline__ bool load_tile(int n) {
    int pair_m, tile_n;
    block.coordinates(n, pair_m, tile_n);
    const int row = block.row(pair_m), col = tile_n * BLOCK_N, steps = block.steps;
    const int slice = block.tiles.slice(pair_m, tile_n);
    const int slice_at = slice < 0 ? steps : block.slice_begins(slice);
    const int slice_end = slice < 0 ? steps : block.slice_ends(slice);
    int k = block.first_step(tile_n % 2);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      if (Kernel::IN_TILES && !looked && step == L::LEAD) {
        barrier_wait(block.told, 0);
        looked = true;
        if (*block.begun < block.tiles.stride) {
          if (slice >= 0) barrier_wait(block.out_free, sliced++ % 2);  // it will be told once more
          return false;
        }
      }
      const bool with_skinny = Kernel::IN_TILES && step >= slice_at && step < slice_end;
      if (with_skinny && step == slice_at) barrier_wait(block.out_free, sliced++ % 2);
      load_step(row, col, k, with_skinny);
      if (++k == steps) k = 0;
    }
    load_rank_steps(row, col);
    return true;
  }

  __device__ __forceinline__ void run() {
    if constexpr (!Kernel::IN_TILES) load_units();
    block.take_turns([&](bool is_da, int index) { load_job(is_da, index); }, [&](int n) {
      while (!load_tile(n)) load_units();
    });
  }
};

// A warp, its first lane the TMA thread.
template <typename Kernel>
__device__ __forceinline__ void feed(const Block<Kernel>& block, int lane) {
  const Call<typename Kernel::T>& c = block.c;
  if (lane == 0) Feed<Kernel>{block}.run();
  // The last block to need no words any more zeroes them, while others store their last tiles.
  if (lane == 0) barrier_wait(block.words_left, 0);
  __syncwarp();
  const int before = lane == 0 ? arrive(c.words + EXIT) : 0;
  if (__shfl_sync(0xFFFFFFFFu, before, 0) == int(gridDim.x) - 1) {
    __syncwarp();
    for (int i = lane; i < 3 * CLUSTER * block.pairs_m; i += 32) c.words[PROGRESS + i] = 0;
    if (lane < PROGRESS) c.words[lane] = 0;
  }
}

}  // namespace fusedlora
