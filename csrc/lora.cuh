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
#include "skinny.cuh"
#include "wgmma.cuh"

namespace fusedlora {

constexpr int BLOCK_M = 128, BLOCK_K = 64, CLUSTER = 2;
constexpr int CONSUMERS = 256, THREADS = 128 + CONSUMERS;

// Words in global memory, zero between launches. From PROGRESS on: for each row block a bit for each 64 rows of S or T
// that are there, for each 64 rows a bit for each slice that has been left, and for each stripe a count of parts.
enum Word { PLACE, TICKET, SKINNY_PREPARED, PREPARED, EXIT, PROGRESS = 8 };

// Cycles for which a cluster looks whether all others have begun. On an H200 with nothing else on it that was seen at most
// 5.2 µs after the first block's start.
constexpr int PATIENCE = 8000;

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

// TMA thread: ROWS rows from `row` on of a matrix of R ranks to both blocks of the cluster, each of which asks for half of
// them.
template <int R, int ROWS>
__device__ __forceinline__ void load_ranks(uint32_t to, const CUtensorMap* map, uint32_t barrier, int row, uint32_t rank) {
#pragma unroll
  for (int k = 0; k < R; k += 64) {
    tma_multicast(to + ROWS * (2 * k + rank * BOX_RANKS<R>), map, barrier, k, row + rank * (ROWS / 2), 3);
  }
}

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

// Side warps: what others read is made ready.
template <typename T, int RANKS, int TERMS, int AT_ONCE>
__device__ void prepare_all(const Call<T>& c, volatile int* next, int warp, int lane) {
  const int thread = warp * 32 + lane, tickets = skinny_tasks(c) + other_tasks(c);
  while (tickets > 0) {
    if (thread == 0) *next = claim(c.words + TICKET);
    meet(1, SIDE_THREADS);
    const int ticket = *next;
    meet(1, SIDE_THREADS);
    if (ticket >= tickets) return;
    for (int i = 0, task = ticket; i < c.num_preparations; i++) {
      const int count = preparation_tasks(c.preparations[i]);
      if (task >= 0 && task < count) prepare<T, RANKS, TERMS, AT_ONCE>(c.preparations[i], task, c.r, thread);
      task -= count;
    }
    meet(1, SIDE_THREADS);
    const bool skinny = c.prepares_skinny && ticket < preparation_tasks(c.preparations[0]);
    if (thread == 0) publish(c.words + (skinny ? SKINNY_PREPARED : PREPARED));
  }
}

// Sums of S or T for row m, COUNT ranks from k on, go to where they are wanted.
template <typename T, int R, int TERMS, int COUNT>
__device__ __forceinline__ void put_small(const Call<T>& c, const float (&sums)[COUNT], int m, int k) {
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

// A warpgroup has left sums: a side warp is told of them, once it has taken those before.
__device__ __forceinline__ void tell_side(uint32_t told, int& before, int group, int thread) {
  if (before > 0) barrier_wait(told + 16, (before - 1) % 2);  // by all, or the compiler takes threads for diverged ever after
  meet(3 + group, 128);
  if (thread == 0) barrier_arrive(told);
  before++;
}

// A warp, of a slice's sums that a warpgroup has left: if all are there it adds them, so that the bits do not depend on who
// was last. Whoever leaves one a second time leaves the same bits.
template <typename T, int R, int TERMS, int EIGHTS>
__device__ void add_slices(const Call<T>& c, int* words, int block, int group, int slice, int lane) {
  constexpr int SUMS = SUM_RANKS<R, TERMS>;
  const uint32_t bit = 1u << slice, all = (2u << (c.shrink.slices - 1)) - 1;
  const uint32_t before = lane == 0 ? arrive_bit(words + 2 * block + group, bit) : 0;
  if ((__shfl_sync(0xFFFFFFFFu, before, 0) | bit) != all) return;
  __syncwarp();
  const float* from = c.shrink.template place<SUMS>(block, group, 0);
  const int m = block * BLOCK_M + 64 * group;
  add_sums<SUMS, EIGHTS>(from, c.shrink.slices, lane, [&](int k, int i, const float(&row)[8]) {
    put_small<T, R, TERMS>(c, row, m + i, k);
  });
  fence_all_to_tma();  // by which tiles and dA's jobs read it
  __syncwarp();
  if (lane == 0) publish_bit(c.words + PROGRESS + block, 1u << group);
}

// Consumers: what a warpgroup has summed of the row block from `row` on, all of the depth, is there for all.
template <typename T, int R, int TERMS, int COUNT>
__device__ __forceinline__ void publish_rows(const Call<T>& c, const float (&sums)[COUNT], int row, int warp, int lane) {
  const int g = lane / 4, t = lane % 4, group = warp / 4;
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) {
    const float pair[2] = {sums[i], sums[i + 1]};
    put_small<T, R, TERMS>(c, pair, row + 16 * warp + g + i / 2 % 2 * 8, i / 4 * 8 + 2 * t);
  }
  fence_all_to_tma();  // by which tiles and dA's jobs read it
  meet(3 + group, 128);
  if (warp % 4 == 0 && lane == 0) publish_bit(c.words + PROGRESS + row / BLOCK_M, 1u << group);
}

// Consumers: a slice of S or T for the row block from `row` on, left for side warps or, if there is but one, published.
template <typename T, int BLOCK_N, int RANKS, bool BACKWARD, bool DROPOUT, int TERMS>
__device__ void slice_rows(
    const Call<T>& c, const Mask mask, int row, int slice, int slices, uint32_t stages, uint32_t full, uint32_t empty,
    int& stage, int& phase, int warp, int lane, uint32_t told, int& left_before) {
  using L = Layout<BLOCK_N, RANKS>;
  constexpr int R = L::R, SUMS = SUM_RANKS<R, TERMS>, STEPS = BLOCK_K / 16, SLOTS = TERMS > 1 ? L::BOXES : 1;
  // The mask is put on registers, which wgmma keeps until it is done: while it has one half of a box the other is made.
  // For few ranks mma.sync, which does not keep them, is faster.
  constexpr bool SYNC = DROPOUT && RANKS < 4;
  constexpr int PORTIONS = DROPOUT && !SYNC ? 2 : 1, PORTION_STEPS = STEPS / PORTIONS;
  const int g = lane / 4, t = lane % 4, group = warp / 4, thread = warp % 4 * 32 + lane;
  const uint32_t eight = Mask::eight(row + 16 * warp + g, 2 * t, c.depth);
  float acc[SLOTS][R / 2] = {}, total[8] = {};  // with terms a slot is of a box, and total of those before
  [[maybe_unused]] uint32_t a[PORTIONS][PORTION_STEPS][4];
  const auto release = [&](int stage) {
    if (DROPOUT) meet(3 + group, 128);  // other warps' loads
    if (thread < CLUSTER) barrier_arrive(empty + 8 * stage, thread);
  };
  const auto take = [&](int slot) {
    settle(acc[slot]);
    if constexpr (TERMS > 1) add_terms<R>(total, acc[slot]);
  };
  const int begin = slice_begin(c.depth, slice, slices) * BLOCK_K;
  const int end = min(c.depth, slice_begin(c.depth, slice + 1, slices) * BLOCK_K);
  int before = 0;
  for (int k = begin; k < end; k += L::BOXES * BLOCK_K) {
    const uint32_t lefts = stages + stage * L::STAGE, rights = lefts + L::BOXES * L::LEFT;
    barrier_wait(full + 8 * stage, phase);
#pragma unroll
    for (int box = 0; box < L::BOXES; box++) {
      const uint32_t left = lefts + box * L::LEFT + group * (L::LEFT / 2), right = rights + box * L::SKINNY;
      const int slot = box % SLOTS;
#pragma unroll
      for (int q = 0; q < PORTIONS; q++) {
        if constexpr (DROPOUT) {
          static_assert(!BACKWARD);
          if (!SYNC) wgmma_wait<1>();  // that of this half of the box before
#pragma unroll
          for (int n = 0; n < PORTION_STEPS; n++) {
            const int i = q * PORTION_STEPS + n;
            uint32_t words[4];
            mask.hash(words, eight + (k + box * BLOCK_K) / 4 + 4 * i);
            load_matrices(a[q][n], left + (16 * (warp % 4) + lane % 16) * 128 + (((2 * i + lane / 16) ^ (lane % 8)) * 16));
#pragma unroll
            for (int j = 0; j < 4; j++) a[q][n][j] = mask.keep<T>(a[q][n][j], words[j]);
          }
        }
        if constexpr (SYNC) {
#pragma unroll
          for (int i = 0; i < STEPS; i++) {
#pragma unroll
            for (int n = 0; n < R; n += 16) {
              uint32_t b[4];
              load_matrices(b, right + (n + lane / 16 * 8 + lane % 8) * 128 + (((2 * i + lane / 8 % 2) ^ (lane % 8)) * 16));
              for (int h = 0; h < 2; h++) {
                Type<T>::mma(*reinterpret_cast<float(*)[4]>(acc[0] + n / 2 + 4 * h), a[0][i], b[2 * h], b[2 * h + 1]);
              }
            }
          }
        } else {
          wgmma_fence();
#pragma unroll
          for (int n = 0; n < PORTION_STEPS; n++) {
            const int i = q * PORTION_STEPS + n, accumulate = TERMS == 1 || i > 0;
            const uint64_t b = BACKWARD ? ranks_descriptor<R, BLOCK_K>(right, i) : matrix_descriptor(right, 32 * i, 16);
            if constexpr (DROPOUT) {
              RegisterWgmma<T, R>::run(acc[slot], a[q][n], b, accumulate);
            } else {
              Wgmma<T, R, 0, BACKWARD>::run(acc[slot], matrix_descriptor(left, 32 * i, 16), b, accumulate);
            }
          }
          wgmma_commit();
        }
      }
      if (TERMS == 1 && !DROPOUT) wgmma_wait<1>();
      if (TERMS == 1 && !SYNC && box == 0 && k > begin) release(before);  // all of that is done
    }
    if constexpr (TERMS > 1) {
      if (SLOTS > 1) {
        wgmma_wait<PORTIONS>();
        take(0);
      }
      wgmma_wait<0>();
      take(SLOTS - 1);
    }
    if (TERMS > 1 || SYNC) release(stage);
    before = stage;
    if (++stage == L::STAGES) stage = 0, phase ^= 1;
  }
  if constexpr (TERMS == 1) {
    wgmma_wait<0>();
    if (!SYNC) release(before);
    take(0);
  }
  float sums[SUMS / 2];
#pragma unroll
  for (int i = 0; i < SUMS / 2; i++) sums[i] = TERMS == 1 ? acc[0][i] : regained(total[i % 8], BLOCK_K);
  if (slices > 1) {
    leave_sums<SUMS>(c.shrink.template place<SUMS>(row / BLOCK_M, group, slice), sums, thread);
    tell_side(told, left_before, group, thread);
    return;
  }
  publish_rows<T, R, TERMS>(c, sums, row, warp, lane);
}

// Consumers: T for BOXES row blocks of this block's, every other from `row` on, and what dB is of their dy and S: each
// warpgroup leaves the sums of every other stripe of 64 columns, as part `part`. One takes its stripes when they come, the
// other a stage later, since ptxas makes every wgmma wait where warpgroups branch apart; the number of stages is odd.
template <typename T, int BLOCK_N, int RANKS>
__device__ void rows_with_db(
    const Call<T>& c, int row, int part, uint32_t stages, uint32_t s_rows, uint32_t full, uint32_t empty, int& stage, int& phase,
    int warp, int lane) {
  using L = Layout<BLOCK_N, RANKS>;
  constexpr int R = L::R;
  const int group = warp / 4, thread = warp % 4 * 32 + lane, stripes = (c.depth + STRIPE - 1) / STRIPE;
  float acc[L::BOXES][R / 2] = {};
  const auto multiply = [&] {
    const uint32_t lefts = stages + stage * L::STAGE, right = lefts + L::BOXES * L::LEFT;
    barrier_wait(full + 8 * stage, phase);
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < L::BOXES; box++) {
#pragma unroll
      for (int i = 0; i < BLOCK_K / 16; i++) {
        const uint64_t a = matrix_descriptor(lefts + group * (L::LEFT / 2), box * L::LEFT + 32 * i, 16);
        Wgmma<T, R, 0, 1>::run(acc[box], a, ranks_descriptor<R, BLOCK_K>(right, i));
      }
    }
    wgmma_commit();
    const int multiplied = stage;
    if (++stage == L::STAGES) stage = 0, phase ^= 1;
    return multiplied;
  };
  int before = -1;
#pragma unroll 1
  for (int n = 0;; n += 2) {
    const int now = multiply(), own = stages + (group == 0 || before < 0 ? now : before) * L::STAGE;
    float sums[R / 2];
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < L::BOXES; box++) {
#pragma unroll
      for (int i = 0; i < BLOCK_M / 16; i++) {
        const uint64_t a = matrix_descriptor(own, box * L::LEFT + 2048 * i, 16);
        Wgmma<T, R, 1, 1>::run(sums, a, ranks_descriptor<R, BLOCK_M>(s_rows + box * L::S_ROWS, i), box + i > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    settle(sums);
    if (thread < CLUSTER) {
      if (before >= 0) barrier_arrive(empty + 8 * before, thread);
      barrier_arrive(empty + 8 * now, thread);
    }
    const int stripe = n - group;
    if (row < c.M && stripe >= 0 && stripe < stripes) leave_sums<R>(part_place<R>(c.stripes[0], stripe, part), sums, thread);
    if (n + 1 >= stripes) break;
    before = multiply();
  }
#pragma unroll
  for (int box = 0; box < L::BOXES; box++) {
    settle(acc[box]);
    const int own = row + box * CLUSTER * BLOCK_M;
    if (own < c.M) publish_rows<T, R, 1>(c, acc[box], own, warp, lane);
  }
}

// A warpgroup: the sums of `stripe` over the rows of `part`. Parts are left for a side warp.
template <typename T, int BLOCK_N, int RANKS, bool DROPOUT, int TERMS>
__device__ __forceinline__ void stripe_job(
    const Call<T>& c, const Stripes& p, const Mask mask, bool masked, int stripe, int part, uint32_t stages, uint32_t full,
    uint32_t empty, int& stage, int& phase, int group, int thread, uint32_t told, int& before) {
  using L = Layout<BLOCK_N, RANKS>;
  constexpr int SUMS = SUM_RANKS<L::R, TERMS>;
  float acc[L::R / 2] = {}, total[8] = {};  // with terms acc is of a stage
  const int rows = part_rows<L::JOB_ROWS>(c.M, p.parts), end = min((part + 1) * rows, c.M);
#pragma unroll 1
  for (int m = part * rows; m < end; m += L::JOB_ROWS) {
    const uint32_t small = stages + stage * L::STAGE + 2 * L::BOX, src = stages + stage * L::STAGE + group * L::BOX;
    BoxMask box;
    if (DROPOUT && masked) box.hash(mask, m, stripe * STRIPE, p.cols, thread);
    barrier_wait(full + 8 * stage, phase);
    if constexpr (DROPOUT) {
      if (masked) {
        box.put<T>(mask, src, thread);
        if constexpr (L::JOB_ROWS == 128) {
          box.hash(mask, m + 64, stripe * STRIPE, p.cols, thread);
          box.put<T>(mask, src + L::BOX / 2, thread);
        }
        fence_to_tma();  // and so to wgmma
        meet(3 + group, 128);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < L::JOB_ROWS / 16; i++) {
      const uint64_t b = ranks_descriptor<L::R, L::JOB_ROWS>(small, i);
      Wgmma<T, L::R, 1, 1>::run(acc, matrix_descriptor(src, 2048 * i, 16), b, TERMS == 1 || i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if constexpr (TERMS > 1) {
      settle(acc);
      add_terms<L::R>(total, acc);
    }
    if (thread < CLUSTER) barrier_arrive(empty + 8 * stage, thread);
    if (++stage == L::STAGES) stage = 0, phase ^= 1;
  }
  float sums[SUMS / 2];
  if constexpr (TERMS == 1) {
    settle(acc);
    for (int i = 0; i < SUMS / 2; i++) sums[i] = acc[i];
  } else {
#pragma unroll
    for (int i = 0; i < SUMS / 2; i++) sums[i] = regained(total[i], L::JOB_ROWS);
  }
  if (p.parts == 1) {
    put_sums<T, SUMS>(p, sums, stripe, c.r, thread);
    return;
  }
  leave_sums<SUMS>(part_place<SUMS>(p, stripe, part), sums, thread);
  tell_side(told, before, group, thread);
}

// What a kernel does that others do not: in a forward's tiles it sums slices of S beside their own sums, with a backward's T
// dB. Kernels of their own, since forward and backward in turn find their instructions cold, and few rows pay for each.
enum class Kind { PLAIN, SLICES_IN_TILES, DB_WITH_T };

// CUT: there may be more slices than one, as there are in tiles and, for few rows, under a mask on x, which takes long.
template <typename T, int BLOCK_N, int RANKS, bool BACKWARD, bool DROPOUT, int TERMS, Kind KIND>
__global__ void __launch_bounds__(THREADS, 1) lora_kernel(const __grid_constant__ Call<T> c) {
  using L = Layout<BLOCK_N, RANKS>;
  constexpr int STAGES = L::STAGES, ACCS = BLOCK_N / 2;
  constexpr bool IN_TILES = KIND == Kind::SLICES_IN_TILES, DB_WITH_T = KIND == Kind::DB_WITH_T;
  constexpr bool CUT = IN_TILES || (DROPOUT && !BACKWARD);
  // Of 64512 for 128 and 256 threads: where consumers leave more, side warps load more together. ptxas must spill nothing.
  constexpr int EIGHTS = BLOCK_N == 128 || (BACKWARD ? !DROPOUT : RANKS == 1) ? 2 : 1;
  constexpr int SIDE_REGISTERS = BLOCK_N == 128 ? 136 : EIGHTS == 2 ? 120 : BACKWARD ? 72 : 88;
  constexpr int CONSUMER_REGISTERS = (64512 - 128 * SIDE_REGISTERS) / CONSUMERS / 8 * 8;
  // Terms are added up box by box, and a mask on x is put on registers: neither goes beside a tile's sums. And dA's jobs
  // would have to wait for a T that comes with the tiles.
  static_assert(!IN_TILES || (L::SLICES_IN_TILES && TERMS == 1 && !DROPOUT && !BACKWARD));
  static_assert(!DB_WITH_T || (L::DB_WITH_T && TERMS == 1 && BACKWARD));
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
  uint8_t* memory = raw + (base - shared_address(raw));
  const uint32_t stages = base, out = base + STAGES * L::STAGE;
  const uint32_t full = out + L::OUT, empty = full + 8 * STAGES, told = empty + 8 * STAGES;
  // out_free: of the tile before; all_there: of T. No kernel has both.
  const uint32_t out_free = told + 8, all_there = out_free, words_left = out_free + 8;
  const uint32_t sums_left = words_left + 8, sums_taken = sums_left + 16;  // of each warpgroup
  volatile int* next = reinterpret_cast<int*>(memory + STAGES * L::STAGE + L::OUT + 16 * STAGES + 56);
  volatile int *own_place = next + 1, *begun = next + 2;

  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int tiles_m = (c.M + BLOCK_M - 1) / BLOCK_M, pairs_m = (tiles_m + CLUSTER - 1) / CLUSTER;
  const int steps = (c.depth + BLOCK_K - 1) / BLOCK_K;
  const int db_jobs = BACKWARD && !DB_WITH_T ? job_count(c.stripes[0]) : 0, da_jobs = BACKWARD ? job_count(c.stripes[1]) : 0;
  // Clusters that come early have fewer tiles, as they may have units first. In shared memory, since registers are wanted.
  __shared__ Tiles tiles;
  __shared__ Jobs jobs;
  __shared__ Mask mask;
  const uint32_t rank = cluster_rank();
  cluster_arrive();  // before anything is written to another block of the cluster, that has begun
  let_next_launch_begin();  // on each SM as soon as this one's block has left it
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, CLUSTER * CONSUMERS / 128);
    }
    barrier_init(told, 1);
    for (int g = 0; g < 4; g++) barrier_init(sums_left + 8 * g, 1);
    barrier_init(out_free, BACKWARD ? 1 : CONSUMERS / 128);
    barrier_init(words_left, SIDE_WARPS + CONSUMERS / 128);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    barrier_expect(told, sizeof(int));
    const int tiles_n = c.tiles ? (c.cols + BLOCK_N - 1) / BLOCK_N : 0;
    tiles = Tiles::of(pairs_m, tiles_n, c.group, int(gridDim.x) / CLUSTER, IN_TILES ? c.shrink.slices : 0);
    if (c.tiles || c.shrink.out) tma_prefetch(&c.left);
    if (c.shrink.out) tma_prefetch(&c.skinny);
    if (c.tiles) {
      tma_prefetch(&c.right);
      tma_prefetch(&c.out);
    }
    for (const Stripes& p : c.stripes) {
      if (BACKWARD && p.out) tma_prefetch(&p.src), tma_prefetch(&p.small);
    }
  }
  __syncwarp();
  wait_for_launch_before();  // nothing before reads or writes global memory
  // By warps that have had nothing to do so far.
  int claimed = 0;
  if (threadIdx.x == 32 && rank == 0) claimed = claim(c.words + PLACE);
  if (DROPOUT && threadIdx.x == 64) mask = c.mask.read();
  __syncwarp();
  cluster_wait();
  if (threadIdx.x == 32 && rank == 0) tell_cluster(shared_address(const_cast<int*>(own_place)), claimed, CLUSTER);
  __syncwarp();
  cluster_meet();

  if (threadIdx.x == 0) jobs = Jobs::of(db_jobs, da_jobs, *own_place, c.first_job, tiles.stride, tiles.owned(*own_place));
  __syncthreads();
  const int &place = jobs.place, &stride = tiles.stride, &own_tiles = jobs.tiles;
  const int slices = CUT ? c.shrink.slices : 1, half_steps = slice_begin(c.depth, slices / 2, slices);
  int* slice_words = c.words + PROGRESS + CLUSTER * pairs_m;

  constexpr int UNIT_PAIRS = DB_WITH_T ? L::BOXES : 1;  // pairs of row blocks that a unit is of
  const int units_m = (pairs_m + UNIT_PAIRS - 1) / UNIT_PAIRS;
  // take(pair_m, slice) for what a cluster sums of S or T outside of its tiles: first its own units, then those, or the
  // slices of those tiles, of all places that nobody has by then, so that it never waits for a cluster which may find no
  // SM before this one ends. If that comes after all, it computes the same bits once more.
  const auto take_units = [&](auto tell, auto take) {
    const int owners = IN_TILES ? stride : c.shrink.clusters;
    if (place >= owners || (IN_TILES && own_tiles == 0)) return;  // who has no tile waits for nobody
    for (int owner = place; owner < owners;) {
      if (!IN_TILES) {
        for (int unit = owner; unit < units_m * slices; unit += c.shrink.clusters) {
          take(unit / slices * UNIT_PAIRS, unit % slices);
        }
      } else if (owner != place) {
        for (int index = tiles.first(owner); index < tiles.count(); index += stride) {
          int pair_m, tile_n;
          tiles.coordinates(index, pair_m, tile_n);
          if (const int slice = tiles.slice(pair_m, tile_n); slice >= 0) take(pair_m, slice);
        }
      }
      if (owner == place) {
        tell();
        barrier_wait(told, 0);
        owner = *begun;  // this cluster has, so that is above `place`
      } else {
        owner++;
      }
    }
  };
  // Where slices are in tiles, these take their steps from LEAD before one half of the depth on, so that by the middle of
  // their time all slices are there, and tiles that share operands still read them together.
  const auto first_step = [&](int half) {
    if (!IN_TILES) return 0;
    const int step = (half ? half_steps : 0) - L::LEAD;
    return step < 0 ? step + steps : step;
  };
  // Of a tile's steps, the first of its slice and the first after it.
  const auto slice_begins = [&](int slice) {
    return L::LEAD + slice_begin(c.depth, slice, slices) - (slice >= slices / 2 ? half_steps : 0);
  };
  const auto slice_ends = [&](int slice) {
    return slice_begins(slice) + min(steps, slice_begin(c.depth, slice + 1, slices)) - slice_begin(c.depth, slice, slices);
  };

  if (warp < 4) {
    give_registers<SIDE_REGISTERS>();
    if (warp == 0) {
      if (lane == 0) {
        int stage = 0, phase = 0;
        const auto advance = [&] {
          if (++stage == STAGES) stage = 0, phase ^= 1;
        };
        bool prepared = other_tasks(c) == 0, skinny_prepared = false;
        const auto wait_for_prepared = [&] {
          if (!prepared) wait_for(c.words + PREPARED, other_tasks(c));
          prepared = true;
        };
        const auto load_skinny = [&](uint32_t to, uint32_t barrier, int k) {
          if (!skinny_prepared) {
            wait_for(c.words + SKINNY_PREPARED, skinny_tasks(c));
            fence_all_to_tma();
            skinny_prepared = true;
          }
          if constexpr (BACKWARD) {
            load_ranks<L::R, BLOCK_K>(to, &c.skinny, barrier, k, rank);
          } else if constexpr (IN_TILES) {
            tma_load(to, &c.skinny, barrier, k, 0);  // to a place that the other block may still need
          } else {
            tma_multicast(to + rank * (L::SKINNY / 2), &c.skinny, barrier, k, rank * (L::R / 2), 3);
          }
        };
        const auto load_step = [&](int row, int col, int k, bool with_skinny) {
          const uint32_t left = stages + stage * L::STAGE, right = left + L::LEFT, barrier = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(barrier, with_skinny ? L::STAGE + L::SKINNY : L::STAGE);
          tma_load(left, &c.left, barrier, k * BLOCK_K, row);
          if constexpr (BACKWARD) {
            for (int i = rank * (BLOCK_N / 128); i < int(rank + 1) * (BLOCK_N / 128); i++) {
              tma_multicast(right + i * 8192, &c.right, barrier, col + 64 * i, k * BLOCK_K, 3);
            }
          } else {
            tma_multicast(right + rank * (L::RIGHT / 2), &c.right, barrier, k * BLOCK_K, col + rank * (BLOCK_N / 2), 3);
          }
          if (IN_TILES && with_skinny) load_skinny(out + stage * L::SKINNY, barrier, k * BLOCK_K);
          advance();
        };

        [[maybe_unused]] const auto load_with_db = [&](int row) {
          // S's rows take the place of those of the unit before, once all of that has been multiplied.
          barrier_wait(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1), stage == 0 ? phase ^ 1 : phase);
          const int columns = (c.depth + BLOCK_K - 1) / BLOCK_K | 1;  // past the depth come zeros
          for (int k = 0; k < columns * BLOCK_K; k += BLOCK_K) {
            const uint32_t left = stages + stage * L::STAGE, barrier = full + 8 * stage;
            barrier_wait(empty + 8 * stage, phase ^ 1);
            barrier_expect(barrier, L::BOXES * L::LEFT + L::SKINNY + (k == 0 ? L::BOXES * L::S_ROWS : 0));
            for (int b = 0; b < L::BOXES; b++) {
              const int own = row + b * CLUSTER * BLOCK_M;
              tma_load(left + b * L::LEFT, &c.left, barrier, k, own);
              for (int m = 0; k == 0 && m < BLOCK_M; m += L::JOB_ROWS / CLUSTER) {
                tma_load(out + b * L::S_ROWS + m * L::R * 2, &c.stripes[0].small, barrier, 0, own + m);
              }
            }
            load_skinny(left + L::BOXES * L::LEFT, barrier, k);
            advance();
          }
        };
        const auto load_units = [&] {
          take_units(
              [&] {
                if (!IN_TILES && rank == 0) {
                  tell_cluster(shared_address(const_cast<int*>(begun)), published(c.words + PLACE), told, CLUSTER);
                }
              },
              [&](int pair_m, int slice) {
                if constexpr (DB_WITH_T) {
                  load_with_db((pair_m * CLUSTER + rank) * BLOCK_M);
                  return;
                }
                const int end = min(c.depth, slice_begin(c.depth, slice + 1, slices) * BLOCK_K);
                for (int k = slice_begin(c.depth, slice, slices) * BLOCK_K; k < end; k += L::BOXES * BLOCK_K) {
                  const uint32_t left = stages + stage * L::STAGE, right = left + L::BOXES * L::LEFT, barrier = full + 8 * stage;
                  barrier_wait(empty + 8 * stage, phase ^ 1);
                  barrier_expect(barrier, L::BOXES * (L::LEFT + L::SKINNY));
                  for (int b = 0; b < L::BOXES; b++) {
                    const int at = k + b * BLOCK_K;
                    tma_load(left + b * L::LEFT, &c.left, barrier, at, (pair_m * CLUSTER + rank) * BLOCK_M);
                    load_skinny(right + b * L::SKINNY, barrier, at);
                  }
                  advance();
                }
              });
        };
        if constexpr (!IN_TILES) load_units();
        // With slices in tiles these are of clusters that have not begun. For them it looks after the first steps of its first
        // tile, which it begins again if there are any.
        [[maybe_unused]] bool units = false, looked = false, all = false;
        [[maybe_unused]] int sliced = 0;
        for (int n = 0, done = 0;; n++) {
          if (IN_TILES && units) {
            load_units();
            units = false;
          }
          if constexpr (BACKWARD) {
            for (; jobs.due(done, n); done++) {
              const bool is_da = jobs.is_da(done);
              const Stripes& p = c.stripes[is_da];
              const int index = jobs.index(done);
              if (is_da && !all) {
                barrier_wait(all_there, 0);
                all = true;
                fence_all_to_tma();
              } else if (!is_da) {
                wait_for_prepared();
                fence_all_to_tma();
              }
              const int col = index / p.parts * JOB_COLS + rank * 128;
              const int rows = part_rows<L::JOB_ROWS>(c.M, p.parts), begin = index % p.parts * rows;
              const int end = min(begin + rows, c.M);
#pragma unroll 1
              for (int m = begin; m < end; m += L::JOB_ROWS) {
                const uint32_t to = stages + stage * L::STAGE, barrier = full + 8 * stage;
                barrier_wait(empty + 8 * stage, phase ^ 1);
                barrier_expect(barrier, L::JOB_STAGE);
                tma_load(to, &p.src, barrier, col, m);
                tma_load(to + L::BOX, &p.src, barrier, col + 64, m);
                load_ranks<L::R, L::JOB_ROWS>(to + 2 * L::BOX, &p.small, barrier, m, rank);
                advance();
              }
            }
          }
          if (n == own_tiles) break;
          int pair_m, tile_n;
          tiles.coordinates(tiles.first(place) + n * stride, pair_m, tile_n);
          const int row = (pair_m * CLUSTER + rank) * BLOCK_M, col = tile_n * BLOCK_N;
          const int slice = tiles.slice(pair_m, tile_n);
          const int slice_at = slice < 0 ? steps : slice_begins(slice), slice_end = slice < 0 ? steps : slice_ends(slice);
          int k = first_step(tile_n % 2);
#pragma unroll 1
          for (int step = 0; step < steps; step++) {
            if (IN_TILES && !looked && step == L::LEAD) {
              barrier_wait(told, 0);
              looked = true;
              units = *begun < stride;
              if (units) {
                if (slice >= 0) barrier_wait(out_free, sliced++ % 2);  // it will be told once more
                break;
              }
            }
            const bool with_skinny = IN_TILES && step >= slice_at && step < slice_end;
            if (with_skinny && step == slice_at) barrier_wait(out_free, sliced++ % 2);
            load_step(row, col, k, with_skinny);
            if (++k == steps) k = 0;
          }
          if (IN_TILES && units) {
            n--;
            continue;
          }
          // The steps of depth r.
          wait_for_prepared();
          if (row < c.M) wait_for(c.words + PROGRESS + row / BLOCK_M, 3);
          fence_all_to_tma();
          for (int k = 0; k < L::R; k += 64) {
            const uint32_t left = stages + stage * L::STAGE, right = left + L::LEFT, barrier = full + 8 * stage;
            barrier_wait(empty + 8 * stage, phase ^ 1);
            barrier_expect(barrier, (BLOCK_M + BLOCK_N) * L::BOX_ROW);
            tma_load(left, &c.small, barrier, k, row);
            tma_multicast(right + rank * (BLOCK_N / 2) * L::BOX_ROW, &c.wide, barrier, k, col + rank * (BLOCK_N / 2), 3);
            advance();
          }
        }
      }
      // The last block to need no words any more zeroes them, while others store their last tiles.
      if (lane == 0) barrier_wait(words_left, 0);
      __syncwarp();
      const int before = lane == 0 ? arrive(c.words + EXIT) : 0;
      if (__shfl_sync(0xFFFFFFFFu, before, 0) == int(gridDim.x) - 1) {
        __syncwarp();
        for (int i = lane; i < 3 * CLUSTER * pairs_m; i += 32) c.words[PROGRESS + i] = 0;
        if (lane < PROGRESS) c.words[lane] = 0;
      }
    } else {
      prepare_all<T, RANKS, TERMS, EIGHTS == 2 && RANKS >= 4 ? 2 : 1>(c, next, warp - 1, lane);
      if (warp == 3) {
        if (BACKWARD && (c.stripes[1].out || DB_WITH_T)) {
          for (int b = lane; b < tiles_m; b += 32) {
            while (published(c.words + PROGRESS + b) < 3) __nanosleep(200);
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(all_there);
        }
        if (IN_TILES) {
          if (rank == 0 && lane == 0) {
            int others = published(c.words + PLACE);
            for (const int64_t since = clock64(); others < stride && clock64() - since < PATIENCE;) {
              __nanosleep(500);
              others = published(c.words + PLACE);
            }
            tell_cluster(shared_address(const_cast<int*>(begun)), others, told, CLUSTER);
          }
          barrier_wait(told, 0);  // or this block could end before it is told
        }
        if (lane == 0) barrier_arrive(words_left);
        if constexpr (DB_WITH_T) add_all_parts<T, L::R, EIGHTS>(c.stripes[0], c.r, lane);
      } else {
        const int group = warp - 1;
        int seen = 0;
        const auto take_sums = [&] {
          barrier_wait(sums_left + 8 * group, seen++ % 2);
          if (lane == 0) barrier_arrive(sums_taken + 8 * group);
        };
        const auto take_slice = [&](int pair_m, int slice) {
          take_sums();
          add_slices<T, L::R, TERMS, EIGHTS>(c, slice_words, pair_m * CLUSTER + rank, group, slice, lane);
        };
        if (CUT && slices > 1) take_units([] {}, take_slice);
        if (!IN_TILES && lane == 0) barrier_arrive(words_left);
        for (int n = 0, done = 0; BACKWARD || IN_TILES; n++) {
          if constexpr (BACKWARD) {
            for (; jobs.due(done, n); done++) {
              const Stripes& p = c.stripes[jobs.is_da(done)];
              if (p.parts == 1) continue;
              take_sums();
              const int stripe = jobs.index(done) / p.parts * (JOB_COLS / STRIPE) + rank * 2 + group;
              add_parts<T, SUM_RANKS<L::R, TERMS>, EIGHTS>(p, stripe, c.r, lane);
            }
          }
          if (n == own_tiles) break;
          if (IN_TILES) {
            int pair_m, tile_n;
            tiles.coordinates(tiles.first(place) + n * stride, pair_m, tile_n);
            if (const int slice = tiles.slice(pair_m, tile_n); slice >= 0) take_slice(pair_m, slice);
          }
        }
        if (IN_TILES && lane == 0) barrier_arrive(words_left);
      }
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int group = warp / 4 - 1, thread = threadIdx.x - 128, in_group = thread % 128;
    const int g = lane / 4, t = lane % 4;
    int stage = 0, phase = 0;
    int before = 0;  // the stage before
    const auto advance = [&] {
      before = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    const auto release = [&](int stage) {
      if (in_group < CLUSTER) barrier_arrive(empty + 8 * stage, in_group);
    };
    int left_before = 0;
    const auto sum_units = [&] {
      take_units([] {}, [&](int pair_m, int slice) {
        const int row = (pair_m * CLUSTER + int(rank)) * BLOCK_M;
        if constexpr (DB_WITH_T) {
          rows_with_db<T, BLOCK_N, RANKS>(
              c, row, pair_m / L::BOXES * CLUSTER + rank, stages, out, full, empty, stage, phase, warp - 4, lane);
          return;
        }
        slice_rows<T, BLOCK_N, RANKS, BACKWARD, DROPOUT && !BACKWARD, TERMS>(
            c, mask, row, slice, slices, stages, full, empty, stage, phase, warp - 4, lane,
            sums_left + 8 * group, left_before);
      });
    };
    if constexpr (!IN_TILES) sum_units();
    if (in_group == 0) barrier_arrive(words_left);  // in tiles side warps alone write to them
    [[maybe_unused]] bool units = false, looked = false;
    for (int n = 0, done = 0;; n++) {
      if constexpr (IN_TILES) {
        if (units) sum_units();
        units = false;
      }
      if constexpr (BACKWARD) {
        for (; jobs.due(done, n); done++) {
          const bool is_da = jobs.is_da(done);
          const Stripes& p = c.stripes[is_da];
          const int index = jobs.index(done), stripe = index / p.parts * (JOB_COLS / STRIPE) + rank * 2 + group;
          stripe_job<T, BLOCK_N, RANKS, DROPOUT, TERMS>(
              c, p, mask, is_da, stripe, index % p.parts, stages, full, empty, stage, phase, group, in_group,
              sums_left + 8 * group, left_before);
        }
      }
      if (n == own_tiles) break;
      int pair_m, tile_n;
      tiles.coordinates(tiles.first(place) + n * stride, pair_m, tile_n);
      const int row = (pair_m * CLUSTER + rank) * BLOCK_M, col = tile_n * BLOCK_N;
      const int own_row = row + 64 * group + 16 * (warp % 4) + g;
      float acc[ACCS] = {};  // or its registers are kept for it during jobs, which want them
      uint32_t kept[ACCS / 32];  // of the products' registers, those that the dropout keeps
      if constexpr (DROPOUT && BACKWARD) {
        const uint32_t eight = Mask::eight(own_row, col + 2 * t, c.cols);
        const Mask own = mask;
#pragma unroll
        for (int i = 0; i < ACCS / 32; i++) {
          kept[i] = own.bits<T>(eight + 16 * i);
          asm volatile("" : "+r"(kept[i])::"memory");
        }
      }
      const auto multiply = [&](int k, auto beside) {
        const uint32_t left = stages + stage * L::STAGE + group * (L::LEFT / 2);
        const uint32_t right = stages + stage * L::STAGE + L::LEFT;
        barrier_wait(full + 8 * stage, phase);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BLOCK_K / 16; i++) {
          const uint64_t a = matrix_descriptor(left, 32 * i, 16);
          if constexpr (BACKWARD) {
            Wgmma<T, BLOCK_N, 0, 1>::run(acc, a, matrix_descriptor(right, 2048 * i, 8192), k + i > 0);
          } else {
            Wgmma<T, BLOCK_N, 0, 0>::run(acc, a, matrix_descriptor(right, 32 * i, 16), k + i > 0);
          }
          beside(i, a);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (k > 0) release(before);
        advance();
      };
      const auto nothing = [](int, uint64_t) {};
      int k = 0;
      if constexpr (IN_TILES) {
        const int slice = tiles.slice(pair_m, tile_n);
        float sums[L::R / 2] = {};
        settle(sums);
        for (; k < L::LEAD; k++) {
          multiply(k, nothing);
          if (k == 1 && in_group == 0) {  // as early as that, since the TMA thread is steps ahead
            tma_wait_read<0>();
            if (slice >= 0) barrier_arrive(out_free);
          }
        }
        if (!looked) {
          barrier_wait(told, 0);
          looked = true;
          if (*begun < stride) {
            wgmma_wait<0>();
            release(before);
            units = true;
            n--;
            continue;
          }
        }
        if (slice >= 0) {
          const int begin = slice_begins(slice), end = slice_ends(slice);
          for (; k < begin; k++) multiply(k, nothing);
          for (; k < end; k++) {
            const uint32_t skinny = out + stage * L::SKINNY;
            multiply(k, [&](int i, uint64_t a) {
              Wgmma<T, L::R, 0, 0>::run(sums, a, matrix_descriptor(skinny, 32 * i, 16), k > begin || i > 0);
            });
          }
          wgmma_wait<0>();
          settle(sums);
          leave_sums<L::R>(c.shrink.template place<L::R>(row / BLOCK_M, group, slice), sums, in_group);
          tell_side(sums_left + 8 * group, left_before, group, in_group);
        }
      }
      int end = steps;
      asm volatile("" : "+r"(end));  // or every step would count its depth's steps anew
#pragma unroll 1
      for (; k < end; k++) multiply(k, nothing);
      // The steps of depth r. The dropout's mask is on their products alone, so there these are formed beside the others
      // below.
      const int first = stage;
      const auto stage_of = [&](int i) { return first + i < STAGES ? first + i : first + i - STAGES; };
      float product[32];  // of 64 columns, under the dropout
      const auto form_product = [&](int i) {
#pragma unroll 1  // registers are few
        for (int j = 0; j < L::GROUPS; j++) {
          const uint32_t left = stages + stage_of(j) * L::STAGE + group * 64 * L::BOX_ROW;
          const uint32_t right = stages + stage_of(j) * L::STAGE + L::LEFT + i * 64 * L::BOX_ROW;
          wgmma_fence();
#pragma unroll
          for (int q = 0; q < L::GROUP_STEPS; q++) {
            const uint64_t a = narrow_descriptor<BOX_RANKS<L::R>>(left, 32 * q);
            Wgmma<T, 64, 0, 0>::run(product, a, narrow_descriptor<BOX_RANKS<L::R>>(right, 32 * q), j + q > 0);
          }
          wgmma_commit();
        }
      };
      if constexpr (DROPOUT && BACKWARD) {
        if (L::GROUPS > 1) {  // of all stages the last products' may be one that these want
          wgmma_wait<0>();
          release(before);
        }
#pragma unroll
        for (int i = 0; i < L::GROUPS; i++) {
          barrier_wait(full + 8 * stage, phase);
          if (i < L::GROUPS - 1) advance();
        }
        form_product(0);
        wgmma_wait<1>();
        settle(acc);
        if (L::GROUPS == 1) release(before);
      } else {
#pragma unroll
        for (int i = 0; i < L::GROUPS; i++) {
          const uint32_t left = stages + stage * L::STAGE + group * 64 * L::BOX_ROW;
          const uint32_t right = stages + stage * L::STAGE + L::LEFT;
          barrier_wait(full + 8 * stage, phase);
          wgmma_fence();
#pragma unroll
          for (int q = 0; q < L::GROUP_STEPS; q++) {
            const uint64_t a = narrow_descriptor<BOX_RANKS<L::R>>(left, 32 * q);
            Wgmma<T, BLOCK_N, 0, 0>::run(acc, a, narrow_descriptor<BOX_RANKS<L::R>>(right, 32 * q), 1);
          }
          wgmma_commit();
          if (i < L::GROUPS - 1) {
            wgmma_wait<1>();
            release(before);
            advance();
          }
        }
        wgmma_wait<0>();
        settle(acc);
        release(before);
        release(stage);
      }
      if constexpr (!BACKWARD) {
        if (c.gain) {
#pragma unroll
          for (int i = 0; i < ACCS; i++) acc[i] *= c.gain[min(col + i / 4 * 8 + 2 * t + i % 2, c.cols - 1)];
        }
        if (c.bias) {
#pragma unroll
          for (int i = 0; i < ACCS; i++) {
            const int at = min(col + i / 4 * 8 + 2 * t + i % 2, c.cols - 1);
            acc[i] += c.bias_is_float ? static_cast<const float*>(c.bias)[at] : float(static_cast<const T*>(c.bias)[at]);
          }
        }
      }
      // 16 bits, swizzled as the store wants them
      const int r = 16 * (warp % 4) + lane % 16;
#pragma unroll
      for (int i = 0; i < BLOCK_N / 64; i++) {
        if constexpr (DROPOUT && BACKWARD) {
          wgmma_wait<0>();
          settle(product);
#pragma unroll
          for (int j = 0; j < 32; j++) {
            add_if(acc[32 * i + j], product[j], kept[i], 1u << Mask::bit(j / 4, j % 4));
          }
          // The next one is formed while these leave.
          if (i < BLOCK_N / 64 - 1) {
            form_product(i + 1);
          } else {
            for (int j = 0; j < L::GROUPS; j++) release(stage_of(j));
          }
        }
        const uint32_t own = out + (group * L::OUT_BOXES + i % L::OUT_BOXES) * L::OUT_BOX;
        if (in_group == 0) tma_wait_read<L::OUT_BOXES - 1>();
        meet(3 + group, 128);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          const float* from = acc + 32 * i + 4 * n;
          store_matrices(own + r * 128 + (((n + lane / 16) ^ (r % 8)) * 16), Type<T>::pack(from[0], from[1]),
                         Type<T>::pack(from[2], from[3]), Type<T>::pack(from[4], from[5]), Type<T>::pack(from[6], from[7]));
        }
        fence_to_tma();
        meet(3 + group, 128);
        if (in_group == 0) {
          if (row + 64 * group < c.M && col + 64 * i < c.cols) tma_store(&c.out, own, col + 64 * i, row + 64 * group);
          tma_commit();
        }
      }
      advance();
    }
    if (in_group == 0) tma_wait();
  }
  __syncwarp();
  cluster_meet();
}

}  // namespace fusedlora
