// One launch of a LoRA linear's forward for few rows of x, M ≤ 64, as in decoding: W is read once, as fast as memory
// gives it, and all else hides behind that.
//
//     yᵀ = W xᵀ + B Sᵀ     Sᵀ = scaling · A xᵀ         W [N, K], A [r, K], B [N, r], x [M, K]
//
// A block takes 64 or 128 rows of W, which are the rows of wgmma, and a part of their depth; the blocks of a cluster
// share the depth. One thread has TMA fill the stages, 64 columns of A, W and x each; a warpgroup multiplies. Every
// cluster forms all of S from the x that it has anyway, so no block waits for another cluster. What A and x cost is
// bandwidth of L2.
//
// Sums stay in the layout that wgmma and mma.sync share: a *unit* is 16 rows by 8 columns, four floats a thread. In the
// names below g is lane / 4 and t is lane % 4; the four are (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once
#include "decode_units.h"
#include "wgmma.cuh"

namespace fusedlora {

constexpr int DECODE_THREADS = 128 + 32, DECODE_MAX_STAGES = 8;
constexpr int DECODE_BYTES = 112 << 10;  // two blocks fit on an SM: clusters find places, though SMs come in odd numbers
constexpr int DECODE_BARRIERS = 1024;    // bytes before the stages, which start at a multiple of that

template <typename T>
struct DecodeCall {
  CUtensorMap x, w, a;
  const void *b, *bias;  // bias: [N] or null
  const float* gain;     // [N] or null
  T *y, *saved;          // saved: [M, r] or null
  int64_t b_pitch;
  float scaling;
  int M, N, K, r, split;
  bool param_is_float, bias_is_float;
};

// What a thread needs of rows n and n + 8 of the output: B, as the first operand of mma.sync, gain and bias.
struct OutputRows {
  uint32_t b[4][4];
  float gain[2], bias[2];

  template <typename T>
  __device__ OutputRows(const DecodeCall<T>& c, int n, int t) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = n + 8 * (i % 2), rank = 16 * q + 8 * (i / 2) + 2 * t;
        b[q][i] = Type<T>::pack(factor(c, row, rank), factor(c, row, rank + 1));
      }
    }
    for (int h = 0; h < 2; h++) {
      const int row = n + 8 * h;
      gain[h] = c.gain && row < c.N ? c.gain[row] : 1.0f;
      bias[h] = c.bias && row < c.N ? element<T>(c.bias, row, c.bias_is_float) : 0.0f;
    }
  }

  template <typename T>
  __device__ static float element(const void* from, int64_t at, bool is_float) {
    return is_float ? static_cast<const float*>(from)[at] : float(static_cast<const T*>(from)[at]);
  }

  template <typename T>
  __device__ static float factor(const DecodeCall<T>& c, int row, int rank) {
    return row < c.N && rank < c.r ? element<T>(c.b, row * c.b_pitch + rank, c.param_is_float) : 0.0f;
  }
};

// The sum over the cluster of a unit, in the order of the blocks.
__device__ __forceinline__ void sum_unit(float (&d)[4], uint32_t units, int unit, int lane, int split) {
  float4 part[DECODE_MAX_SPLIT];
#pragma unroll
  for (int i = 0; i < DECODE_MAX_SPLIT; i++) {
    if (i < split) part[i] = load_cluster(units + unit_bytes(unit, lane), i);
  }
  d[0] = part[0].x, d[1] = part[0].y, d[2] = part[0].z, d[3] = part[0].w;
#pragma unroll
  for (int i = 1; i < DECODE_MAX_SPLIT; i++) {
    if (i < split) d[0] += part[i].x, d[1] += part[i].y, d[2] += part[i].z, d[3] += part[i].w;
  }
}

template <int COUNT>
__device__ __forceinline__ void keep_units(const float (&acc)[COUNT], uint32_t units, int first, int lane) {
#pragma unroll
  for (int j = 0; j < COUNT / 4; j++) {
    store_shared(units + unit_bytes(first + j, lane), acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  }
}

// TILES: 8 rows of x each. HALVES: 64 rows of W each.
template <typename T, int TILES, int HALVES>
__global__ void __launch_bounds__(DECODE_THREADS, 2) decode_kernel(const __grid_constant__ DecodeCall<T> c) {
  constexpr int ROWS = 64 * HALVES, GROUPS = ROWS / 16;
  static_assert(unit_bytes((GROUPS + 4) * TILES, 0) + 4 * TILES * 256 <= DECODE_BYTES - 2 * DECODE_BARRIERS);
  extern __shared__ uint8_t raw[];
  const uint32_t full = (shared_address(raw) + DECODE_BARRIERS - 1) & ~uint32_t(DECODE_BARRIERS - 1);
  const uint32_t empty = full + 8 * DECODE_MAX_STAGES, memory = full + DECODE_BARRIERS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank = int(cluster_rank()), row = int(blockIdx.x) / c.split * ROWS;
  // A's box comes first: wgmma reads 64 rows from its start on, and those past the box, which are W's, give sums that
  // nobody takes.
  const int ranks = (c.r + 15) / 16, a_bytes = 2048 * ranks;
  const int stage_bytes = a_bytes + 8192 * HALVES + 1024 * TILES;
  const int stages = min((DECODE_BYTES - 2 * DECODE_BARRIERS) / stage_bytes, DECODE_MAX_STAGES);
  const int begin = depth_begin(c.K, rank, c.split), count = depth_begin(c.K, rank + 1, c.split) - begin;

  if (warp == 4) {
    auto load = [&](int i) {
      const int stage = i % stages, k = 64 * (begin + i);
      const uint32_t to = memory + stage * stage_bytes, barrier = full + 8 * stage;
      barrier_expect(barrier, stage_bytes);
      tma_load_once(to + a_bytes, &c.w, barrier, k, row);
      tma_load(to, &c.a, barrier, k, 0);
      tma_load(to + a_bytes + 8192 * HALVES, &c.x, barrier, k, 0);
    };
    if (lane == 0) {
      for (int s = 0; s < stages; s++) {
        barrier_init(full + 8 * s, 1);
        barrier_init(empty + 8 * s, 1);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      fence_to_tma();
      for (int i = 0; i < min(stages, count); i++) load(i);
    }
    __syncwarp();
    __syncthreads();
    if (lane == 0) {
      for (int i = stages; i < count; i++) {
        barrier_wait(empty + 8 * (i % stages), (i / stages - 1) & 1);
        load(i);
      }
    }
    __syncwarp();
    cluster_meet();
    cluster_arrive();
    cluster_wait();
    return;
  }

  __syncthreads();
  const auto [group, first, step] = finisher(rank, warp, c.split, GROUPS);
  const OutputRows rows(c, row + 16 * group + g, t);  // long before they are needed
  float acc[HALVES][4 * TILES] = {}, s[4 * TILES] = {};
  int stage = 0, phase = 0;
  for (int i = 0; i < count; i++) {
    barrier_wait(full + 8 * stage, phase);
    const uint32_t a = memory + stage * stage_bytes, w = a + a_bytes, x = w + 8192 * HALVES;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint64_t right = matrix_descriptor(x + 32 * k, 16);
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        NarrowWgmma<T, 8 * TILES>::run(acc[h], matrix_descriptor(w + 8192 * h + 32 * k, 16), right);
      }
      NarrowWgmma<T, 8 * TILES>::run(s, matrix_descriptor(a + 32 * k, 16), right);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && threadIdx.x == 0) barrier_arrive(empty + 8 * (stage == 0 ? stages - 1 : stage - 1), rank);
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 4 * TILES; i++) {
    asm volatile("" : "+f"(s[i])::"memory");
    for (int h = 0; h < HALVES; h++) asm volatile("" : "+f"(acc[h][i])::"memory");
  }

  // The stages are done with: the block's sums take their place, W's units first.
  meet(1, 128);
  const uint32_t units = memory, small = units + unit_bytes((GROUPS + 4) * TILES, 0);
#pragma unroll
  for (int h = 0; h < HALVES; h++) keep_units(acc[h], units, (4 * h + warp) * TILES, lane);
  if (warp < ranks) keep_units(s, units, (GROUPS + warp) * TILES, lane);
  cluster_meet();

  // S, all of it in every block, rounded once and as the second operand of mma.sync.
  for (int u = warp; u < ranks * TILES; u += 4) {
    float d[4];
    sum_unit(d, units, GROUPS * TILES + u, lane, c.split);
    const int q = u / TILES, m = 8 * (u % TILES) + g;
    uint32_t pair[2];
    for (int h = 0; h < 2; h++) {
      const bool there = 16 * q + 8 * h + g < c.r;  // x may be infinite
      const float low = there ? d[2 * h] * c.scaling : 0.0f, high = there ? d[2 * h + 1] * c.scaling : 0.0f;
      pair[h] = transposed(Type<T>::pack(low, high));
    }
    store_shared_half(small + 256 * u + 8 * lane, pair[0], pair[1]);
    if (c.saved && blockIdx.x == 0 && m < c.M) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int k = 16 * q + 8 * (i / 2) + 2 * t + i % 2;
        const T* halves = reinterpret_cast<const T*>(&pair[i / 2]);
        if (k < c.r) c.saved[int64_t(m) * c.r + k] = halves[i % 2];
      }
    }
  }
  float y[TILES][4];
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    if (first + step * i < TILES) sum_unit(y[i], units, group * TILES + first + step * i, lane, c.split);
  }
  cluster_arrive();
  meet(1, 128);
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int tile = first + step * i, m = 8 * tile + g;
    if (tile >= TILES) break;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (q < ranks) {
        const uint2 few = load_shared_half(small + 256 * (q * TILES + tile) + 8 * lane);
        Type<T>::mma(y[i], rows.b[q], few.x, few.y);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      for (int j = 0; j < 2; j++) y[i][2 * h + j] = y[i][2 * h + j] * rows.gain[h] + rows.bias[h];
      // From columns of yᵀ to rows of y; N is a multiple of 8.
      const uint32_t pair = transposed(Type<T>::pack(y[i][2 * h], y[i][2 * h + 1]));
      const int column = row + 16 * group + 8 * h + 2 * t;
      if (m < c.M && column < c.N) *reinterpret_cast<uint32_t*>(c.y + int64_t(m) * c.N + column) = pair;
    }
  }
  cluster_wait();  // the others may still be reading this block's sums
}

}  // namespace fusedlora
