// One launch of a LoRA linear, forward or backward:
//
//     forward     out = left · rightᵀ + small · wideᵀ     x, W [N, K], S, B       S = scaling · x Aᵀ
//     backward    out = left · right + small · wideᵀ      dy, W [N, K], T, Aᵀ     T = scaling · dy B, and dA, dB
//
// Two consumer warpgroups multiply tiles of 128 rows, fed by one TMA thread; two blocks of a cluster take two row
// blocks beside the same columns and share what they load of `right`, and of all that both need else. S or T is summed in
// slices of its depth: before all tiles by some clusters, or, S alone, by some tiles beside their own sums. Between tiles,
// which leave memory idle, clusters take jobs of dB and dA. The three other warps of the first warpgroup, the side warps,
// make operands ready and add up what slices and jobs leave.
#pragma once
#include "feed.cuh"
#include "side.cuh"
#include "tiles.cuh"

namespace fusedlora {

// By one thread: barriers, how tiles are shared out, and TMA's descriptors on their way.
template <typename Kernel>
__device__ __forceinline__ void set_up(const Block<Kernel>& block) {
  using L = typename Kernel::L;
  constexpr bool BACKWARD = Kernel::BACKWARD;
  const Call<typename Kernel::T>& c = block.c;
  for (int s = 0; s < L::STAGES; s++) {
    barrier_init(block.full(s), 1);
    barrier_init(block.empty(s), CLUSTER * CONSUMERS / 128);
  }
  barrier_init(block.told, 1);
  for (int g = 0; g < CONSUMERS / 128; g++) {
    barrier_init(block.sums_left(g), 1);
    barrier_init(block.sums_taken(g), 1);
  }
  barrier_init(block.out_free, BACKWARD ? 1 : CONSUMERS / 128);
  barrier_init(block.words_left, SIDE_WARPS + CONSUMERS / 128);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  barrier_expect(block.told, sizeof(int));
  const int tiles_n = c.tiles ? (c.cols + Kernel::BLOCK_N - 1) / Kernel::BLOCK_N : 0, clusters = int(gridDim.x) / CLUSTER;
  block.tiles = Tiles::of(block.pairs_m, tiles_n, c.group, clusters, Kernel::IN_TILES ? c.shrink.slices : 0);
  if (c.tiles || c.shrink.out) tma_prefetch(&c.left);
  if (c.shrink.out) tma_prefetch(&c.skinny);
  if (c.tiles) {
    tma_prefetch(&c.right);
    tma_prefetch(&c.out);
  }
  for (const Stripes& p : c.stripes) {
    if (BACKWARD && p.out) tma_prefetch(&p.src), tma_prefetch(&p.small);
  }
  if (Kernel::DM_WITH_DB) tma_prefetch(&c.magnitude.y);
}

template <typename T, int BLOCK_N, int RANKS, bool BACKWARD, bool DROPOUT, int TERMS, Kind KIND>
__global__ void __launch_bounds__(THREADS, 1) lora_kernel(const __grid_constant__ Call<T> c) {
  using Kernel = Traits<T, BLOCK_N, RANKS, BACKWARD, DROPOUT, TERMS, KIND>;
  extern __shared__ uint8_t raw[];
  __shared__ Tiles tiles;
  __shared__ Jobs jobs;
  __shared__ Mask mask;
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const Block<Kernel> block(c, raw, tiles, jobs, mask);
  const bool claims = threadIdx.x == 32 && block.rank == 0;
  cluster_arrive();  // before anything is written to another block of the cluster, that has begun
  let_next_launch_begin();  // on each SM as soon as this one's block has left it
  if (threadIdx.x == 0) set_up(block);
  __syncwarp();
  wait_for_launch_before();  // nothing before reads or writes global memory
  // By warps that have had nothing to do so far.
  int claimed = 0;
  if (claims) claimed = claim(c.words + PLACE);
  if (DROPOUT && threadIdx.x == 64) mask = c.mask.read();
  __syncwarp();
  cluster_wait();
  if (claims) tell_cluster(shared_address(const_cast<int*>(block.own_place)), claimed, CLUSTER);
  __syncwarp();
  cluster_meet();

  if (threadIdx.x == 0) {
    const int db_jobs = BACKWARD && !Kernel::DB_WITH_T ? job_count(c.stripes[0]) : 0;
    const int da_jobs = BACKWARD ? job_count(c.stripes[1]) : 0, place = *block.own_place;
    jobs = Jobs::of(db_jobs, da_jobs, place, c.first_job, tiles.stride, tiles.owned(place));
  }
  __syncthreads();

  if (warp < 4) {
    give_registers<Kernel::SIDE_REGISTERS>();
    if (warp == 0) {
      feed(block, lane);
    } else {
      assist(block, warp - 1, lane);
    }
  } else {
    take_registers<Kernel::CONSUMER_REGISTERS>();
    consume(block, warp - 4, lane);
  }
  __syncwarp();
  cluster_meet();
}

}  // namespace fusedlora
