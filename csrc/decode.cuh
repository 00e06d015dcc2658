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
#include "shares.h"
#include "wgmma.cuh"

namespace fusedlora {

constexpr int DECODE_THREADS = 128 + 32;

template <typename T>
struct DecodeCall {
  CUtensorMap x, w, a;
  const uint16_t* b;     // T's bits
  const void* bias;      // [N] or null
  const float* gain;     // [N] or null
  T* y;
  uint16_t* saved;  // [M, r], T's bits, or null
  int64_t b_pitch;
  float scaling;
  int M, N, K, r, split, stages;
  bool bias_is_float;
};

// What a thread needs of rows n and n + 8 of the output: B, as the first operand of mma.sync, gain and bias. Nothing
// here looks at what it loads, so that all loads are on their way at once.
template <typename T>
struct OutputRows {
  uint32_t b[4][4];
  float gain[2];
  uint32_t bias[2];  // as they lie in memory

  __device__ OutputRows(const DecodeCall<T>& c, int n, int t) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = n + 8 * (i % 2), rank = 16 * q + 8 * (i / 2) + 2 * t;
        const uint16_t* from = c.b + row * c.b_pitch + rank;
        const uint32_t low = row < c.N && rank < c.r ? from[0] : 0, high = row < c.N && rank + 1 < c.r ? from[1] : 0;
        b[q][i] = low | high << 16;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = n + 8 * h;
      gain[h] = c.gain && row < c.N ? c.gain[row] : 1.0f;
      bias[h] = 0;
      if (c.bias && row < c.N) {
        if (c.bias_is_float) {
          bias[h] = static_cast<const uint32_t*>(c.bias)[row];
        } else {
          bias[h] = static_cast<const uint16_t*>(c.bias)[row];
        }
      }
    }
  }

  __device__ float finish(float sum, int h, bool bias_is_float) const {
    const uint16_t half = uint16_t(bias[h]);
    return sum * gain[h] + (bias_is_float ? __uint_as_float(bias[h]) : float(reinterpret_cast<const T&>(half)));
  }
};

// d[i] = the sum over the cluster of unit `first` + i · `step`, for i < `valid`, in the order of the blocks. Sixteen
// loads are on their way at once.
template <int UNITS>
__device__ __forceinline__ void sum_units(
    float (&d)[UNITS][4], uint32_t units, int first, int step, int valid, int lane, int split) {
  constexpr int BLOCKS = 16 / UNITS < DECODE_MAX_SPLIT ? 16 / UNITS : DECODE_MAX_SPLIT;
#pragma unroll
  for (int i = 0; i < UNITS; i++) d[i][0] = d[i][1] = d[i][2] = d[i][3] = 0.0f;
#pragma unroll 1  // once, as a rule
  for (int block = 0; block < split; block += BLOCKS) {
    float4 part[BLOCKS][UNITS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
      for (int i = 0; i < UNITS; i++) {
        part[b][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (block + b < split && i < valid) {
          part[b][i] = load_cluster(units + unit_bytes(first + i * step, lane), block + b);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
      for (int i = 0; i < UNITS; i++) {
        d[i][0] += part[b][i].x, d[i][1] += part[b][i].y, d[i][2] += part[b][i].z, d[i][3] += part[b][i].w;
      }
    }
  }
}

template <int COUNT>
__device__ __forceinline__ void keep_units(const float (&acc)[COUNT], uint32_t units, int first, int lane) {
#pragma unroll
  for (int j = 0; j < COUNT / 4; j++) {
    store_shared(units + unit_bytes(first + j, lane), acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  }
}

// S, all of it in every block, rounded once and as the second operand of mma.sync. `worker` is one of the five warps; the
// first has nothing else to do.
template <typename T, int TILES, int GROUPS>
__device__ __forceinline__ void small_units(
    const DecodeCall<T>& c, uint32_t units, uint32_t small, int ranks, int worker, int lane) {
  constexpr int AT_ONCE = TILES / 4 > 0 ? TILES / 4 : 1, WORKERS = DECODE_THREADS / 32;
  const int g = lane / 4, t = lane % 4, count = ranks * TILES;
#pragma unroll 1
  for (int begin = worker; begin < count; begin += WORKERS * AT_ONCE) {
    float d[AT_ONCE][4];
    sum_units(d, units, GROUPS * TILES + begin, WORKERS, (count - begin + WORKERS - 1) / WORKERS, lane, c.split);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int u = begin + WORKERS * i, q = u / TILES, m = 8 * (u % TILES) + g;
      if (u >= count) break;
      uint32_t pair[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool there = 16 * q + 8 * h + g < c.r;  // x may be infinite
        const float low = there ? d[i][2 * h] * c.scaling : 0.0f, high = there ? d[i][2 * h + 1] * c.scaling : 0.0f;
        pair[h] = transposed(Type<T>::pack(low, high));
      }
      store_shared_half(small + 256 * u + 8 * lane, pair[0], pair[1]);
      if (c.saved && blockIdx.x == 0 && m < c.M) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int k = 16 * q + 8 * (j / 2) + 2 * t + j % 2;
          if (k < c.r) c.saved[int64_t(m) * c.r + k] = uint16_t(pair[j / 2] >> 16 * (j % 2));
        }
      }
    }
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
  const int stage_bytes = decode_stage_bytes(ranks, HALVES, TILES), stages = c.stages;
  const int begin = depth_begin(c.K, rank, c.split), count = depth_begin(c.K, rank + 1, c.split) - begin;

  // Once the stages are done with, the block's sums take their place, W's units first, and then S.
  const uint32_t units = memory, small = units + unit_bytes((GROUPS + 4) * TILES, 0);

  // The fifth warp loads. All warps meet at the same places of the code, each with what it has to do there.
  const bool multiplies = warp < 4;
  let_next_launch_begin();
  auto load = [&](int i, int stage) {
    const int k = 64 * (begin + i);
    const uint32_t to = memory + stage * stage_bytes, barrier = full + 8 * stage;
    barrier_expect(barrier, stage_bytes);
    tma_load_once(to + a_bytes, &c.w, barrier, k, row);
    tma_load(to, &c.a, barrier, k, 0);
    tma_load(to + a_bytes + 8192 * HALVES, &c.x, barrier, k, 0);
  };
  if (!multiplies && lane == 0) {
    for (const CUtensorMap* map : {&c.w, &c.a, &c.x}) tma_prefetch(map);
    for (int s = 0; s < stages; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_to_tma();
    wait_for_launch_before();
#pragma unroll 1
    for (int i = 0; i < min(stages, count); i++) load(i, i);
  }
  __syncwarp();
  meet(2, DECODE_THREADS);

  wait_for_launch_before();
  const Finisher part = finisher(rank, warp, c.split, GROUPS);
  const int group = part.group, step = part.step, first = multiplies ? part.first : TILES;
  const OutputRows<T> rows(c, multiplies ? row + 16 * group + g : c.N, t);  // long before they are needed
  if (!multiplies) {
    if (lane == 0) {
#pragma unroll 1
      for (int i = stages, stage = 0, phase = 0; i < count; i++) {
        barrier_wait(empty + 8 * stage, phase);
        load(i, stage);
        if (++stage == stages) stage = 0, phase ^= 1;
      }
    }
    __syncwarp();
  } else {
    float acc[HALVES][4 * TILES] = {}, s[4 * TILES] = {};
    int stage = 0, phase = 0;
    for (int i = 0; i < count; i++) {
      barrier_wait(full + 8 * stage, phase);
      const uint32_t a = memory + stage * stage_bytes, w = a + a_bytes, x = w + 8192 * HALVES;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint64_t right = matrix_descriptor(x, 32 * k, 16);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          Wgmma<T, 8 * TILES, 0, 0>::run(acc[h], matrix_descriptor(w, 8192 * h + 32 * k, 16), right);
        }
        Wgmma<T, 8 * TILES, 0, 0>::run(s, matrix_descriptor(a, 32 * k, 16), right);
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

    meet(1, 128);  // no warp reads a stage any more
#pragma unroll
    for (int h = 0; h < HALVES; h++) keep_units(acc[h], units, (4 * h + warp) * TILES, lane);
    if (warp < ranks) keep_units(s, units, (GROUPS + warp) * TILES, lane);
  }
  cluster_meet();

  small_units<T, TILES, GROUPS>(c, units, small, ranks, 4 - warp, lane);
  float y[TILES][4];
  sum_units(y, units, group * TILES + first, step, (TILES - first + step - 1) / step, lane, c.split);
  meet(2, DECODE_THREADS);
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int tile = first + step * i;
    if (tile >= TILES) break;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (q < ranks) {
        const uint2 few = load_shared_half(small + 256 * (q * TILES + tile) + 8 * lane);
        Type<T>::mma(y[i], rows.b[q], few.x, few.y);
      }
    }
  }
  cluster_arrive();  // what came from the other blocks has been used
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int tile = first + step * i, m = 8 * tile + g;
    if (tile >= TILES) break;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      for (int j = 0; j < 2; j++) y[i][2 * h + j] = rows.finish(y[i][2 * h + j], h, c.bias_is_float);
      // From columns of yᵀ to rows of y; N is a multiple of 8.
      const uint32_t pair = transposed(Type<T>::pack(y[i][2 * h], y[i][2 * h + 1]));
      const int n = row + 16 * group + 8 * h + 2 * t;
      if (m < c.M && n < c.N) *reinterpret_cast<uint32_t*>(c.y + int64_t(m) * c.N + n) = pair;
    }
  }
  cluster_wait();  // the others may still be reading this block's sums
}

}  // namespace fusedlora
