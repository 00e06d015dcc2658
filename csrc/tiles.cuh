// The consumers: what they do in turn, and their tiles of the output.
#pragma once
#include "sums.cuh"

namespace fusedlora {

// One stage, BLOCK_K columns of depth, is multiplied. `k` is the tile's steps so far, `before` the stage of the last one.
// beside(i, a) is another product of a, the left operand's next 16 columns; then(box), once all of the step before is done,
// more of them with that operand, whose box is here.
template <typename Kernel, typename Beside, typename Then>
__device__ __forceinline__ void multiply(
    Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], int k, int& before, Beside beside, Then then) {
  using T = typename Kernel::T;
  using L = typename Kernel::L;
  constexpr int BLOCK_N = Kernel::BLOCK_N;
  const uint32_t left = me.block.stage(me.ring.stage) + me.group * (L::LEFT / 2);
  const uint32_t right = me.block.stage(me.ring.stage) + L::LEFT;
  me.wait_for_stage();
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < BLOCK_K / 16; i++) {
    const uint64_t a = matrix_descriptor(left, 32 * i, 16);
    if constexpr (Kernel::BACKWARD) {
      Wgmma<T, BLOCK_N, 0, 1>::run(acc, a, matrix_descriptor(right, 2048 * i, 8192), k + i > 0);
    } else {
      Wgmma<T, BLOCK_N, 0, 0>::run(acc, a, matrix_descriptor(right, 32 * i, 16), k + i > 0);
    }
    beside(i, a);
  }
  wgmma_commit();
  wgmma_wait<1>();
  then(left);
  if (k > 0) me.release(before);
  before = me.ring.stage;
  me.ring.advance();
}

template <typename Kernel>
__device__ __forceinline__ void multiply(Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], int k, int& before) {
  multiply(me, acc, k, before, [](int, uint64_t) {}, [](uint32_t) {});
}

// Where slices are in tiles, a tile's first LEAD steps. After those of its first one a cluster knows whether all others have
// begun. If not it sums the slices of their tiles and begins this one again.
template <typename Kernel>
__device__ __forceinline__ void begin_tile(Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], int slice, int& before) {
  const Block<Kernel>& block = me.block;
  for (;;) {
    for (int k = 0; k < Kernel::L::LEAD; k++) {
      multiply(me, acc, k, before);
      if (k == 1 && me.thread == 0) {  // as early as that, since the TMA thread is steps ahead
        tma_wait_read<0>();
        if (slice >= 0) barrier_arrive(block.out_free);
      }
    }
    if (me.looked) return;
    barrier_wait(block.told, 0);
    me.looked = true;
    if (*block.begun >= block.tiles.stride) return;
    wgmma_wait<0>();
    me.release(before);
    sum_units(me);
#pragma unroll
    for (int i = 0; i < Kernel::ACCS; i++) acc[i] = 0.0f;  // or these registers are kept for them meanwhile
  }
}

// Where slices are in tiles, a tile's steps to the end of its slice, which is summed beside them, or the first ones where
// it has none. Gives their number.
template <typename Kernel>
__device__ __forceinline__ int multiply_with_slice(
    Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], int row, int slice, int& before) {
  using T = typename Kernel::T;
  using L = typename Kernel::L;
  const Block<Kernel>& block = me.block;
  float sums[L::R / 2] = {};
  settle(sums);
  begin_tile(me, acc, slice, before);
  int k = L::LEAD;
  if (slice < 0) return k;
  const int begin = block.slice_begins(slice), end = block.slice_ends(slice);
  for (; k < begin; k++) multiply(me, acc, k, before);
  if constexpr (Kernel::DROPOUT) {
    // Registers under the mask are wgmma's until it is done, which the next step waits for as it does for its own.
    const Mask mask = block.mask;
    const int begins = slice_begin(block.c.depth, slice, block.slices) * BLOCK_K;
    uint32_t eight = Mask::eight(me.own_row(row), begins + 2 * (me.lane % 4), block.c.depth);
    uint32_t a[BLOCK_K / 16][4];
#pragma unroll 1
    for (; k < end; k++) {
      const uint32_t skinny = block.out + me.ring.stage * L::SKINNY;
      multiply(me, acc, k, before, [](int, uint64_t) {}, [&](uint32_t left) {
        me.meet_group();  // all have loaded what they want of the stage before
        me.forget();
#pragma unroll
        for (int i = 0; i < BLOCK_K / 16; i++) {
          load_kept<T>(a[i], mask, eight, left, me.warp, me.lane, i);
          eight += 4;
          asm volatile("" : "+r"(eight), "+r"(a[i][3]));  // one after the other, for want of registers
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BLOCK_K / 16; i++) {
          RegisterWgmma<T, L::R>::run(sums, a[i], matrix_descriptor(skinny, 32 * i, 16), k > begin || i > 0);
        }
        wgmma_commit();
      });
    }
  } else {
    for (; k < end; k++) {
      const uint32_t skinny = block.out + me.ring.stage * L::SKINNY;
      multiply(me, acc, k, before, [&](int i, uint64_t a) {
        Wgmma<T, L::R, 0, 0>::run(sums, a, matrix_descriptor(skinny, 32 * i, 16), k > begin || i > 0);
      }, [](uint32_t) {});
    }
  }
  wgmma_wait<0>();
  settle(sums);
  leave_sums<L::R>(block.c.shrink.template place<L::R>(row / BLOCK_M, me.group, slice), sums, me.thread);
  me.tell_side();
  return k;
}

// 64 ranks, or all if there are fewer, of a rank-r step: sums [64, COLS] of the columns from `col` on of the tile's, from
// nothing if `first`.
template <typename Kernel, int COLS>
__device__ __forceinline__ void multiply_ranks(
    const Consumer<Kernel>& me, float (&sums)[COLS / 2], int stage, int col, bool first) {
  using L = typename Kernel::L;
  constexpr int BOX_R = BOX_RANKS<L::R>;
  const uint32_t left = me.block.stage(stage) + me.group * 64 * L::BOX_ROW;
  const uint32_t right = me.block.stage(stage) + L::LEFT + col * L::BOX_ROW;
  wgmma_fence();
#pragma unroll
  for (int q = 0; q < L::GROUP_STEPS; q++) {
    const uint64_t a = narrow_descriptor<BOX_R>(left, 32 * q);
    Wgmma<typename Kernel::T, COLS, 0, 0>::run(sums, a, narrow_descriptor<BOX_R>(right, 32 * q), !first || q > 0);
  }
  wgmma_commit();
}

// The steps of depth r, and all of the tile's sums are there.
template <typename Kernel>
__device__ __forceinline__ void add_rank_steps(Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], int before) {
  constexpr int GROUPS = Kernel::L::GROUPS;
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    me.wait_for_stage();
    multiply_ranks<Kernel, Kernel::BLOCK_N>(me, acc, me.ring.stage, 0, false);
    if (i < GROUPS - 1) {
      wgmma_wait<1>();
      me.release(before);
      before = me.ring.stage;
      me.ring.advance();
    }
  }
  wgmma_wait<0>();
  settle(acc);
  me.release(before);
  me.release(me.ring.stage);
  me.ring.advance();
}

// The dropout's mask is on the products of depth r alone. They are formed by themselves, 64 columns at a time: those of
// columns 64 i and on.
template <typename Kernel>
__device__ __forceinline__ void form_product(
    const Consumer<Kernel>& me, float (&product)[32], const Ring<Kernel::L::STAGES>& first, int i) {
#pragma unroll 1  // registers are few
  for (int j = 0; j < Kernel::L::GROUPS; j++) multiply_ranks<Kernel, 64>(me, product, first.after(j), 64 * i, j == 0);
}

// The first of them, beside the last of the tile's other sums, which then are there.
template <typename Kernel>
__device__ __forceinline__ void begin_products(
    Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], float (&product)[32], const Ring<Kernel::L::STAGES>& first, int before) {
  constexpr int GROUPS = Kernel::L::GROUPS;
  if (GROUPS > 1) {  // of all stages the last products' may be one that these want
    wgmma_wait<0>();
    me.release(before);
  }
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    me.wait_for_stage();
    me.ring.advance();
  }
  form_product(me, product, first, 0);
  wgmma_wait<1>();
  settle(acc);
  if (GROUPS == 1) me.release(before);
}

// Columns 64 i and on of the last products are there and added as far as the mask keeps them. The next ones are formed while
// these leave.
template <typename Kernel>
__device__ __forceinline__ void add_product(
    const Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], float (&product)[32], const uint32_t (&kept)[Kernel::ACCS / 32],
    const Ring<Kernel::L::STAGES>& first, int i) {
  wgmma_wait<0>();
  settle(product);
#pragma unroll
  for (int j = 0; j < 32; j++) add_if(acc[32 * i + j], product[j], kept[i], 1u << Mask::bit(j / 4, j % 4));
  if (i < Kernel::BLOCK_N / 64 - 1) {
    form_product(me, product, first, i + 1);
  } else {
    for (int j = 0; j < Kernel::L::GROUPS; j++) me.release(first.after(j));
  }
}

// put(sum, value) for the tile's columns, from `col` on: load(column) gives the value. A lane loads every 32nd, since memory
// is far, and shows them the others.
template <typename Kernel, typename Load, typename Put>
__device__ __forceinline__ void put_on_columns(
    const Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], int col, Load load, Put put) {
  float own[Kernel::BLOCK_N / 32];
#pragma unroll
  for (int i = 0; i < Kernel::BLOCK_N / 32; i++) own[i] = load(min(col + 32 * i + me.lane, me.block.c.cols - 1));
#pragma unroll
  for (int i = 0; i < Kernel::ACCS; i += 4) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float value = __shfl_sync(0xFFFFFFFFu, own[i / 16], i / 4 % 4 * 8 + 2 * (me.lane % 4) + j);
      put(acc[i + j], value);
      put(acc[i + j + 2], value);
    }
  }
}

// Gain and bias of the forward's columns.
template <typename Kernel>
__device__ __forceinline__ void put_gain_and_bias(const Consumer<Kernel>& me, float (&acc)[Kernel::ACCS], int col) {
  const Call<typename Kernel::T>& c = me.block.c;
  if (c.gain) {
    put_on_columns(me, acc, col, [&](int at) { return c.gain[at]; }, [](float& sum, float gain) { sum *= gain; });
  }
  if (!c.bias) return;
  const auto bias = [&](int at) { return load_number<typename Kernel::T>(c.bias, c.bias_is_float, at); };
  put_on_columns(me, acc, col, bias, [](float& sum, float bias) { sum += bias; });
}

// A warpgroup's columns 64 i and on leave by one of its boxes: 16 bits, swizzled as the store wants them.
template <typename Kernel>
__device__ __forceinline__ void store_columns(
    const Consumer<Kernel>& me, const float (&acc)[Kernel::ACCS], int row, int col, int i) {
  using T = typename Kernel::T;
  using L = typename Kernel::L;
  const Call<T>& c = me.block.c;
  const int r = 16 * me.warp + me.lane % 16;
  const uint32_t own = me.block.out + (me.group * L::OUT_BOXES + i % L::OUT_BOXES) * L::OUT_BOX;
  if (me.thread == 0) tma_wait_read<L::OUT_BOXES - 1>();
  me.meet_group();
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    const float* from = acc + 32 * i + 4 * n;
    store_matrices(own + r * 128 + (((n + me.lane / 16) ^ (r % 8)) * 16), Type<T>::pack(from[0], from[1]),
                   Type<T>::pack(from[2], from[3]), Type<T>::pack(from[4], from[5]), Type<T>::pack(from[6], from[7]));
  }
  fence_to_tma();
  me.meet_group();
  if (me.thread == 0) {
    if (row + 64 * me.group < c.M && col + 64 * i < c.cols) tma_store(&c.out, own, col + 64 * i, row + 64 * me.group);
    tma_commit();
  }
}

// The cluster's tile number n.
template <typename Kernel>
__device__ __forceinline__ void compute_tile(Consumer<Kernel>& me, int n) {
  constexpr int ACCS = Kernel::ACCS;
  const Block<Kernel>& block = me.block;
  me.forget();
  int pair_m, tile_n;
  block.coordinates(n, pair_m, tile_n);
  const int row = block.row(pair_m), col = tile_n * Kernel::BLOCK_N;
  float acc[ACCS] = {};      // or its registers are kept for it during jobs, which want them
  uint32_t kept[ACCS / 32];  // of the products' registers, those that the dropout keeps
  if constexpr (Kernel::MASK_ON_RANK_STEP) {
    const uint32_t eight = Mask::eight(me.own_row(row), col + 2 * (me.lane % 4), block.c.cols);
    const Mask own = block.mask;
#pragma unroll
    for (int i = 0; i < ACCS / 32; i++) {
      kept[i] = own.bits<typename Kernel::T>(eight + 16 * i);
      asm volatile("" : "+r"(kept[i])::"memory");
    }
  }
  int k = 0, before = 0;
  if constexpr (Kernel::IN_TILES) {
    k = multiply_with_slice(me, acc, row, block.tiles.slice(pair_m, tile_n), before);
  }
  int end = block.steps;
  asm volatile("" : "+r"(end));  // or every step would count its depth's steps anew
#pragma unroll 1
  for (; k < end; k++) multiply(me, acc, k, before);
  const Ring<Kernel::L::STAGES> first = me.ring;  // of the steps of depth r
  float product[32];                              // of 64 columns, under the dropout
  if constexpr (Kernel::MASK_ON_RANK_STEP) {
    begin_products(me, acc, product, first, before);
  } else {
    add_rank_steps(me, acc, before);
  }
  me.forget();
  if (!Kernel::BACKWARD && (block.c.gain || block.c.bias)) put_gain_and_bias(me, acc, col);
#pragma unroll
  for (int i = 0; i < Kernel::BLOCK_N / 64; i++) {
    if constexpr (Kernel::MASK_ON_RANK_STEP) add_product(me, acc, product, kept, first, i);
    store_columns(me, acc, row, col, i);
  }
}

// Warp 0 to 7 of the consumers'.
template <typename Kernel>
__device__ __forceinline__ void consume(const Block<Kernel>& block, int warp, int lane) {
  Consumer<Kernel> me{block, warp / 4, warp % 4, lane, int(threadIdx.x) % 128};
  if constexpr (!Kernel::IN_TILES) sum_units(me);
  if (me.thread == 0) barrier_arrive(block.words_left);  // in tiles side warps alone write to them
  block.take_turns([&](bool is_da, int index) { sum_stripe(me, is_da, index); }, [&](int n) { compute_tile(me, n); });
  if (me.thread == 0) tma_wait();
}

}  // namespace fusedlora
