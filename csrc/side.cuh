// The three side warps: they make operands ready, add what slices and parts of jobs have left, and look what is there.
#pragma once
#include "block.cuh"

namespace fusedlora {

// Cycles for which a cluster looks whether all others have begun. On an H200 with nothing else on it that was seen at most
// 5.2 µs after the first block's start.
constexpr int PATIENCE = 8000;

// What others read is made ready.
template <typename Kernel>
__device__ __forceinline__ void prepare_all(const Block<Kernel>& block, int warp, int lane) {
  constexpr int RANKS = Kernel::RANKS, AT_ONCE = Kernel::EIGHTS == 2 && RANKS >= 4 ? 2 : 1;
  const Call<typename Kernel::T>& c = block.c;
  const int thread = warp * 32 + lane, tickets = skinny_tasks(c) + other_tasks(c);
  while (tickets > 0) {
    if (thread == 0) *block.next = claim(c.words + TICKET);
    meet(1, SIDE_THREADS);
    const int ticket = *block.next;
    meet(1, SIDE_THREADS);
    if (ticket >= tickets) return;
    for (int i = 0, task = ticket; i < c.num_preparations; i++) {
      const int count = preparation_tasks(c.preparations[i]);
      if (task >= 0 && task < count) {
        prepare<typename Kernel::T, RANKS, Kernel::TERMS, AT_ONCE>(c.preparations[i], task, c.r, thread);
      }
      task -= count;
    }
    meet(1, SIDE_THREADS);
    const bool skinny = c.prepares_skinny && ticket < preparation_tasks(c.preparations[0]);
    if (thread == 0) publish(c.words + (skinny ? SKINNY_PREPARED : PREPARED));
  }
}

// A warp, of a slice's sums that a warpgroup has left: if all are there it adds them, so that the bits do not depend on who
// was last. Whoever leaves one a second time leaves the same bits.
template <typename Kernel>
__device__ __forceinline__ void add_slices(const Block<Kernel>& block, int row_block, int group, int slice, int lane) {
  constexpr int SUMS = Kernel::SUMS;
  const Call<typename Kernel::T>& c = block.c;
  const uint32_t bit = 1u << slice, all = (2u << (c.shrink.slices - 1)) - 1;
  const uint32_t before = lane == 0 ? arrive_bit(block.slice_words() + 2 * row_block + group, bit) : 0;
  if ((__shfl_sync(0xFFFFFFFFu, before, 0) | bit) != all) return;
  __syncwarp();
  const float* from = c.shrink.template place<SUMS>(row_block, group, 0);
  const int m = row_block * BLOCK_M + 64 * group;
  add_sums<SUMS, Kernel::EIGHTS>(from, c.shrink.slices, lane, [&](int k, int i, const float(&row)[8]) {
    put_small<Kernel>(c, row, m + i, k);
  });
  fence_all_to_tma();  // by which tiles and dA's jobs read it
  __syncwarp();
  if (lane == 0) publish_bit(c.words + PROGRESS + row_block, 1u << group);
}

// Of slices and jobs, in the order in which a warpgroup leaves their sums.
template <typename Kernel>
__device__ __forceinline__ void add_what_is_left(const Block<Kernel>& block, int group, int lane) {
  constexpr bool BACKWARD = Kernel::BACKWARD, IN_TILES = Kernel::IN_TILES;
  const Call<typename Kernel::T>& c = block.c;
  int seen = 0;
  const auto take_sums = [&] {
    barrier_wait(block.sums_left(group), seen++ % 2);
    if (lane == 0) barrier_arrive(block.sums_taken(group));
  };
  const auto take_slice = [&](int pair_m, int slice) {
    take_sums();
    add_slices(block, pair_m * CLUSTER + block.rank, group, slice, lane);
  };
  const auto take_part = [&](bool is_da, int index) {
    const Stripes& p = c.stripes[is_da];
    const bool with_dm = Kernel::DM_WITH_DB && !is_da;
    if (p.parts == 1 && !with_dm) return;
    take_sums();
    const int stripe = block.stripe(p, index, group);
    if (with_dm) {
      add_parts<typename Kernel::T, Kernel::SUMS, Kernel::EIGHTS, true>(p, stripe, c.r, lane, &c.magnitude);
    } else {
      add_parts<typename Kernel::T, Kernel::SUMS, Kernel::EIGHTS>(p, stripe, c.r, lane);
    }
  };
  if (Kernel::CUT && block.slices > 1) block.take_units([] {}, take_slice);
  if (!IN_TILES && lane == 0) barrier_arrive(block.words_left);
  if constexpr (BACKWARD || IN_TILES) {
    block.take_turns(take_part, [&](int n) {
      if (!IN_TILES) return;
      int pair_m, tile_n;
      block.coordinates(n, pair_m, tile_n);
      if (const int slice = block.tiles.slice(pair_m, tile_n); slice >= 0) take_slice(pair_m, slice);
    });
  }
  if (IN_TILES && lane == 0) barrier_arrive(block.words_left);
}

// The third warp tells the TMA thread when all of T is there.
template <typename Kernel>
__device__ __forceinline__ void wait_for_all_of_t(const Block<Kernel>& block, int lane) {
  for (int b = lane; b < block.tiles_m; b += 32) {
    while (published(block.c.words + PROGRESS + b) < 3) __nanosleep(200);
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(block.all_there);
}

// Where slices are in tiles it tells the cluster whether all others have begun.
template <typename Kernel>
__device__ __forceinline__ void look_for_others(const Block<Kernel>& block, int lane) {
  const int* word = block.c.words + PLACE;
  if (block.rank == 0 && lane == 0) {
    int others = published(word);
    for (const int64_t since = clock64(); others < block.tiles.stride && clock64() - since < PATIENCE;) {
      __nanosleep(500);
      others = published(word);
    }
    tell_cluster(shared_address(const_cast<int*>(block.begun)), others, block.told, CLUSTER);
  }
  barrier_wait(block.told, 0);  // or this block could end before it is told
}

// Side warp 0, 1 or 2.
template <typename Kernel>
__device__ __forceinline__ void assist(const Block<Kernel>& block, int warp, int lane) {
  const Call<typename Kernel::T>& c = block.c;
  prepare_all(block, warp, lane);
  if (warp < 2) {
    add_what_is_left(block, warp, lane);
    return;
  }
  if (Kernel::BACKWARD && (c.stripes[1].out || Kernel::DB_WITH_T)) wait_for_all_of_t(block, lane);
  if (Kernel::IN_TILES) look_for_others(block, lane);
  if (lane == 0) barrier_arrive(block.words_left);
  if constexpr (Kernel::DB_WITH_T) add_all_parts<typename Kernel::T, Kernel::L::R, Kernel::EIGHTS>(c.stripes[0], c.r, lane);
}

}  // namespace fusedlora
