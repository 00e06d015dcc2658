// What consumers sum outside of tiles: slices of S or T, dB with T, and stripes of dB and dA.
#pragma once
#include "block.cuh"
#include "wgmma.cuh"

namespace fusedlora {

// One of the consumers' threads, and where its warpgroup is.
template <typename Kernel>
struct Consumer {
  using L = typename Kernel::L;

  const Block<Kernel>& block;
  const int group, warp;
  int lane, thread;  // warp and thread of the warpgroup's
  Ring<L::STAGES> ring = {};
  int left_before = 0;  // how often it has left sums for a side warp
  bool looked = false;  // with slices in tiles: whether all clusters have begun

  // Of 128 rows from `row` on, the upper one of the two that wgmma gives the thread.
  __device__ int own_row(int row) const { return row + 64 * group + 16 * warp + lane / 4; }

  // Where the kernel has no registers left for it, nothing that follows from the thread's number is kept in them.
  __device__ __forceinline__ void forget() {
    if constexpr (Kernel::MASK_IN_TILES) {
      int number;
      asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
      lane = number % 32, thread = number % 128;
    }
  }

  __device__ __forceinline__ void meet_group() const { meet(3 + group, 128); }

  __device__ __forceinline__ void wait_for_stage() const { barrier_wait(block.full(ring.stage), ring.phase); }

  // A stage is free again once both blocks have said so to both.
  __device__ __forceinline__ void release(int stage) const {
    if (thread < CLUSTER) barrier_arrive(block.empty(stage), thread);
  }

  // The warpgroup has left sums: a side warp is told of them, once it has taken those before.
  __device__ __forceinline__ void tell_side() {
    // by all, or the compiler takes threads for diverged ever after
    if (left_before > 0) barrier_wait(block.sums_taken(group), (left_before - 1) % 2);
    meet_group();
    if (thread == 0) barrier_arrive(block.sums_left(group));
    left_before++;
  }
};

// What a warpgroup has summed of the row block from `row` on, all of the depth, is there for all.
template <typename Kernel, int COUNT>
__device__ __forceinline__ void publish_rows(const Consumer<Kernel>& me, const float (&sums)[COUNT], int row) {
  const Call<typename Kernel::T>& c = me.block.c;
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) {
    const float pair[2] = {sums[i], sums[i + 1]};
    put_small<Kernel>(c, pair, me.own_row(row) + i / 2 % 2 * 8, i / 4 * 8 + 2 * (me.lane % 4));
  }
  fence_all_to_tma();  // by which tiles and dA's jobs read it
  me.meet_group();
  if (me.warp == 0 && me.lane == 0) publish_bit(c.words + PROGRESS + row / BLOCK_M, 1u << me.group);
}

// Of a box of the left operand in shared memory, a warp's 16 rows of columns 16 i and on, as far as the mask keeps them.
template <typename T>
__device__ __forceinline__ void load_kept(
    uint32_t (&a)[4], const Mask& mask, uint32_t eight, uint32_t box, int warp, int lane, int i) {
  uint32_t words[4];
  mask.hash(words, eight);
  load_matrices(a, box + (16 * warp + lane % 16) * 128 + (((2 * i + lane / 16) ^ (lane % 8)) * 16));
#pragma unroll
  for (int j = 0; j < 4; j++) a[j] = mask.keep<T>(a[j], words[j]);
}

// A slice of S or T for the row block from `row` on, left for side warps or, if there is but one, published.
template <typename Kernel>
__device__ __forceinline__ void sum_slice(Consumer<Kernel>& me, int row, int slice) {
  using T = typename Kernel::T;
  using L = typename Kernel::L;
  constexpr bool BACKWARD = Kernel::BACKWARD, MASKED = Kernel::MASK_ON_S;
  constexpr int R = L::R, SUMS = Kernel::SUMS, TERMS = Kernel::TERMS, STEPS = BLOCK_K / 16, SLOTS = TERMS > 1 ? L::BOXES : 1;
  // The mask is put on registers, which wgmma keeps until it is done: while it has one half of a box the other is made.
  // For few ranks mma.sync, which does not keep them, is faster; but tiles, whose bits these would be, use wgmma.
  constexpr bool SYNC = MASKED && Kernel::RANKS < 4 && !Kernel::IN_TILES;
  constexpr int PORTIONS = MASKED && !SYNC ? 2 : 1, PORTION_STEPS = STEPS / PORTIONS, HELD = Kernel::MASK_IN_TILES ? 1 : PORTIONS;
  const Block<Kernel>& block = me.block;
  const Call<T>& c = block.c;
  const Mask mask = block.mask;
  const int warp = me.warp, slices = block.slices;
  me.forget();
  const int lane = me.lane;
  const uint32_t eight = Mask::eight(me.own_row(row), 2 * (lane % 4), c.depth);
  float acc[SLOTS][R / 2] = {}, total[8] = {};  // with terms a slot is of a box, and total of those before
  [[maybe_unused]] uint32_t held[HELD][PORTION_STEPS][4];
  const auto release = [&](int stage) {
    if (MASKED) me.meet_group();  // other warps' loads
    me.release(stage);
  };
  const auto take = [&](int slot) {
    settle(acc[slot]);
    if constexpr (TERMS > 1) add_terms<R>(total, acc[slot]);
  };
  const int begin = slice_begin(c.depth, slice, slices) * BLOCK_K;
  const int end = min(c.depth, slice_begin(c.depth, slice + 1, slices) * BLOCK_K);
  int before = 0;
  for (int k = begin; k < end; k += L::BOXES * BLOCK_K) {
    const uint32_t lefts = block.stage(me.ring.stage), rights = lefts + L::BOXES * L::LEFT;
    me.wait_for_stage();
#pragma unroll
    for (int box = 0; box < L::BOXES; box++) {
      const uint32_t left = lefts + box * L::LEFT + me.group * (L::LEFT / 2), right = rights + box * L::SKINNY;
      const int slot = box % SLOTS;
#pragma unroll
      for (int q = 0; q < PORTIONS; q++) {
        [[maybe_unused]] auto& a = held[q % HELD];
        if constexpr (MASKED) {
          if (!SYNC) wgmma_wait<HELD - 1>();  // that of this half of the box before
#pragma unroll
          for (int n = 0; n < PORTION_STEPS; n++) {
            const int i = q * PORTION_STEPS + n;
            load_kept<T>(a[n], mask, eight + (k + box * BLOCK_K) / 4 + 4 * i, left, warp, lane, i);
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
                Type<T>::mma(*reinterpret_cast<float(*)[4]>(acc[0] + n / 2 + 4 * h), a[i], b[2 * h], b[2 * h + 1]);
              }
            }
          }
        } else {
          wgmma_fence();
#pragma unroll
          for (int n = 0; n < PORTION_STEPS; n++) {
            const int i = q * PORTION_STEPS + n, accumulate = TERMS == 1 || i > 0;
            const uint64_t b = BACKWARD ? ranks_descriptor<R, BLOCK_K>(right, i) : matrix_descriptor(right, 32 * i, 16);
            if constexpr (MASKED) {
              RegisterWgmma<T, R>::run(acc[slot], a[n], b, accumulate);
            } else {
              Wgmma<T, R, 0, BACKWARD>::run(acc[slot], matrix_descriptor(left, 32 * i, 16), b, accumulate);
            }
          }
          wgmma_commit();
        }
      }
      if (TERMS == 1 && !MASKED) wgmma_wait<1>();
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
    if (TERMS > 1 || SYNC) release(me.ring.stage);
    before = me.ring.stage;
    me.ring.advance();
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
    leave_sums<SUMS>(c.shrink.template place<SUMS>(row / BLOCK_M, me.group, slice), sums, me.thread);
    me.tell_side();
    return;
  }
  publish_rows(me, sums, row);
}

// T for BOXES row blocks of this block's, every other from `row` on, and what dB is of their dy and S: each warpgroup leaves
// the sums of every other stripe of 64 columns, as part `part`. One takes its stripes when they come, the other a stage
// later, since ptxas makes every wgmma wait where warpgroups branch apart; the number of stages is odd.
template <typename Kernel>
__device__ __forceinline__ void sum_rows_with_db(Consumer<Kernel>& me, int row, int part) {
  using T = typename Kernel::T;
  using L = typename Kernel::L;
  constexpr int R = L::R;
  const Block<Kernel>& block = me.block;
  const Call<T>& c = block.c;
  const int group = me.group, stripes = (c.depth + STRIPE - 1) / STRIPE;
  float acc[L::BOXES][R / 2] = {};
  const auto multiply = [&] {
    const uint32_t lefts = block.stage(me.ring.stage), right = lefts + L::BOXES * L::LEFT;
    me.wait_for_stage();
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
    const int multiplied = me.ring.stage;
    me.ring.advance();
    return multiplied;
  };
  int before = -1;
#pragma unroll 1
  for (int n = 0;; n += 2) {
    const int now = multiply();
    const uint32_t own = block.stage(group == 0 || before < 0 ? now : before);
    float sums[R / 2];
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < L::BOXES; box++) {
#pragma unroll
      for (int i = 0; i < BLOCK_M / 16; i++) {
        const uint64_t a = matrix_descriptor(own, box * L::LEFT + 2048 * i, 16);
        Wgmma<T, R, 1, 1>::run(sums, a, ranks_descriptor<R, BLOCK_M>(block.out + box * L::S_ROWS, i), box + i > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    settle(sums);
    if (before >= 0) me.release(before);
    me.release(now);
    const int stripe = n - group;
    if (row < c.M && stripe >= 0 && stripe < stripes) {
      leave_sums<R>(part_place<R>(c.stripes[0], stripe, part), sums, me.thread);
    }
    if (n + 1 >= stripes) break;
    before = multiply();
  }
#pragma unroll
  for (int box = 0; box < L::BOXES; box++) {
    settle(acc[box]);
    const int own = row + box * CLUSTER * BLOCK_M;
    if (own < c.M) publish_rows(me, acc[box], own);
  }
}

// A cluster's units of S or T, or the slices of those tiles whose clusters have not begun.
template <typename Kernel>
__device__ __forceinline__ void sum_units(Consumer<Kernel>& me) {
  const Block<Kernel>& block = me.block;
  block.take_units([] {}, [&](int pair_m, int slice) {
    if constexpr (Kernel::DB_WITH_T) {
      sum_rows_with_db(me, block.row(pair_m), pair_m / Kernel::UNIT_PAIRS * CLUSTER + block.rank);
    } else {
      sum_slice(me, block.row(pair_m), slice);
    }
  });
}

// What a thread sums of dm: of eight columns of the warpgroup's stripe, every 16th row.
template <typename T>
struct MagnitudeSums {
  float sums[8] = {}, bias[8] = {};

  __device__ __forceinline__ MagnitudeSums(bool wanted, const Magnitude& m, const Stripes& p, int stripe, int thread) {
    if (!wanted || !m.bias) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int col = min(stripe * STRIPE + thread % 8 * 8 + i, p.cols - 1);
      bias[i] = load_number<T>(m.bias, m.bias_is_float, col);
    }
  }

  // Boxes of dy and y, ROWS of 64 columns.
  template <int ROWS>
  __device__ __forceinline__ void add(uint32_t dy, uint32_t y, int thread) {
    const int upper = thread / 8, at = upper * 128 + ((thread % 8) ^ (upper % 8)) * 16;
#pragma unroll
    for (int i = 0; i < ROWS / 16; i++) {
      const uint4 a = load_shared(dy + at + 2048 * i), b = load_shared(y + at + 2048 * i);
      const uint32_t lefts[4] = {a.x, a.y, a.z, a.w}, rights[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 left = Type<T>::unpack(lefts[j]), right = Type<T>::unpack(rights[j]);
        sums[2 * j] = fmaf(left.x, right.x - bias[2 * j], sums[2 * j]);
        sums[2 * j + 1] = fmaf(left.y, right.y - bias[2 * j + 1], sums[2 * j + 1]);
      }
    }
  }

  // A warp's, to its place.
  __device__ __forceinline__ void leave(float* to, int lane) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], 8);
      sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], 16);
    }
    if (lane >= 8) return;
    reinterpret_cast<float4*>(to)[2 * lane] = {sums[0], sums[1], sums[2], sums[3]};
    reinterpret_cast<float4*>(to)[2 * lane + 1] = {sums[4], sums[5], sums[6], sums[7]};
  }
};

// A job of dB or dA: the warpgroup's stripe over the rows of the job's part. Parts, and dB with dm, are left for a side
// warp.
template <typename Kernel>
__device__ __forceinline__ void sum_stripe(Consumer<Kernel>& me, bool is_da, int index) {
  using T = typename Kernel::T;
  using L = typename Kernel::L;
  constexpr int SUMS = Kernel::SUMS, TERMS = Kernel::TERMS;
  const Block<Kernel>& block = me.block;
  const Call<T>& c = block.c;
  const Stripes& p = c.stripes[is_da];
  const Mask mask = block.mask;
  const bool masked = Kernel::DROPOUT && is_da;
  const int stripe = block.stripe(p, index, me.group), part = index % p.parts, thread = me.thread;
  float acc[L::R / 2] = {}, total[8] = {};  // with terms acc is of a stage
  const bool with_dm = Kernel::DM_WITH_DB && !is_da;
  [[maybe_unused]] MagnitudeSums<T> magnitude(with_dm, c.magnitude, p, stripe, thread);
  const int rows = part_rows<L::JOB_ROWS>(c.M, p.parts), end = min((part + 1) * rows, c.M);
#pragma unroll 1
  for (int m = part * rows; m < end; m += L::JOB_ROWS) {
    const uint32_t to = block.stage(me.ring.stage), small = to + 2 * L::BOX, src = to + me.group * L::BOX;
    BoxMask box;
    if (masked) box.hash(mask, m, stripe * STRIPE, p.cols, thread);
    me.wait_for_stage();
    if (masked) {
      box.put<T>(mask, src, thread);
      if constexpr (L::JOB_ROWS == 128) {
        box.hash(mask, m + 64, stripe * STRIPE, p.cols, thread);
        box.put<T>(mask, src + L::BOX / 2, thread);
      }
      fence_to_tma();  // and so to wgmma
      me.meet_group();
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
    if (with_dm) {
      const int stage = me.ring.stage;
      me.ring.advance();
      me.wait_for_stage();
      magnitude.template add<L::JOB_ROWS>(src, block.stage(me.ring.stage) + me.group * L::BOX, thread);
      me.meet_group();  // all have loaded it
      me.release(stage);
    }
    me.release(me.ring.stage);
    me.ring.advance();
  }
  float sums[SUMS / 2];
  if constexpr (TERMS == 1) {
    settle(acc);
    for (int i = 0; i < SUMS / 2; i++) sums[i] = acc[i];
  } else {
#pragma unroll
    for (int i = 0; i < SUMS / 2; i++) sums[i] = regained(total[i], L::JOB_ROWS);
  }
  if (p.parts == 1 && !with_dm) {
    put_sums<T, SUMS>(p, sums, stripe, c.r, thread);
    return;
  }
  if (with_dm) magnitude.leave(magnitude_place(c.magnitude, p, stripe, part, me.warp), me.lane);
  leave_sums<SUMS>(part_place<SUMS>(p, stripe, part), sums, thread);
  me.tell_side();
}

}  // namespace fusedlora
