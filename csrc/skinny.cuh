// The skinny products, by warps that load their operands from global memory straight into the registers of mma.sync.
//
// A product does not depend on the order of what it sums over, nor a matrix on the order in which its columns are
// computed. So each thread loads 16 contiguous bytes and takes them for whatever elements the instruction wants there,
// as long as both operands agree: no shared memory, no shuffles. In the names below g is lane / 4 and t is lane % 4.
#pragma once
#include "ptx.cuh"

namespace fusedlora {

constexpr int SIDE_WARPS = 3;
constexpr int SIDE_THREADS = 32 * SIDE_WARPS;
// The dropout's mask: see fusedlora/dropout.py, whose hash this is. Rows m and m + 8 of two columns share one.
struct Mask {
  uint32_t low, high, bound;  // the seed's halves; the threshold in both halves of a word
  const uint64_t* seed;       // where the seed is read from, or null

  // The mask, its seed at hand.
  __device__ Mask read() const {
    Mask mask = *this;
    if (seed) mask.low = uint32_t(*seed), mask.high = uint32_t(*seed >> 32);
    return mask;
  }

  // The number of the four elements that `row` and a pair of columns are in.
  __device__ static uint32_t four(uint32_t row, uint32_t pair, uint32_t pairs) {
    return (row / 16 * 8 + row % 8) * pairs + pair;
  }

  // Of the upper row and of the lower one.
  __device__ void hash(uint32_t (&words)[2], uint32_t four) const {
    uint64_t z = uint64_t(four + low) * 0x9E3779B9u;
    uint32_t h = uint32_t(z) ^ uint32_t(z >> 32) ^ high;
    z = uint64_t(h) * 0xBB67AE85u;
    h = uint32_t(z) ^ uint32_t(z >> 32);
    z = uint64_t(h) * 0xD2511F53u;
    words[0] = (uint32_t(z) ^ uint32_t(z >> 32)) & 0x7FFF7FFFu;
    words[1] = (words[0] ^ __byte_perm(h, 0, 0x1032)) & 0x7FFF7FFFu;
  }

  // The elements of a four, two of each row, as far as they are kept.
  template <typename T>
  __device__ void keep(uint32_t& upper, uint32_t& lower, uint32_t four) const {
    uint32_t words[2];
    hash(words, four);
    upper = Type<T>::keep(upper, words[0], bound);
    lower = Type<T>::keep(lower, words[1], bound);
  }
};

// A skinny operand as the kernels read it: 16-bit, its rank padded with zeros, made from a parameter of any dtype, any
// rank and any alignment. Element (i, k) of the parameter, i along its long side, k < r, lies at i · long_in + k ·
// rank_in, and goes to i · long_out + k · rank_out; from i = `length` up to `padded_length` zeros go there.
struct Preparation {
  const void* from;
  void* to;
  int length, padded_length;
  int64_t long_in, rank_in, long_out, rank_out;
  bool is_float;
};

// A thread takes one i.
constexpr int PREPARE_LENGTH = SIDE_THREADS;

__host__ __device__ inline int preparation_tasks(const Preparation& p) {
  return (p.padded_length + PREPARE_LENGTH - 1) / PREPARE_LENGTH;
}

template <typename T, typename From, int RANKS>
__device__ void prepare_from(const Preparation& p, int task, int r, int thread) {
  const int64_t i = task * PREPARE_LENGTH + thread;
  if (i >= p.padded_length) return;
  const int count = i < p.length ? r : 0;
#pragma unroll
  for (int first = 0; first < 16 * RANKS; first += 16) {
    alignas(16) T values[16];
#pragma unroll
    for (int k = 0; k < 16; k++) {
      const From* from = static_cast<const From*>(p.from) + i * p.long_in + (first + k) * p.rank_in;
      values[k] = first + k < count ? Type<T>::from(float(*from)) : T(0.0f);
    }
    T* to = static_cast<T*>(p.to) + i * p.long_out + first * p.rank_out;
    if (p.rank_out == 1) {
      for (int h = 0; h < 2; h++) reinterpret_cast<uint4*>(to)[h] = reinterpret_cast<const uint4*>(values)[h];
      continue;
    }
#pragma unroll
    for (int k = 0; k < 16; k++) to[k * p.rank_out] = values[k];
  }
}

template <typename T, int RANKS>
__device__ void prepare(const Preparation& p, int task, int r, int thread) {
  if (p.is_float) {
    prepare_from<T, float, RANKS>(p, task, r, thread);
  } else {
    prepare_from<T, T, RANKS>(p, task, r, thread);
  }
}

// A stripe of out [R, cols] = small [R, M] · src [M, cols], 8 · WIDTH columns of it, for one of `parts` runs of rows,
// which the side warps share. `small` is transposed: rows lie side by side, in rows of `pitch` elements.
template <typename T>
struct Stripes {
  const T* src;
  int64_t src_pitch;
  const T* small;
  int64_t pitch;
  float* partial;  // where there are parts: for each stripe and part a block's sums, as its threads hold them
  int* arrived;    // a word for each stripe
  void* out;
  int64_t long_out, rank_out;  // where element (k, column) goes: column · long_out + k · rank_out
  bool out_is_float;
  int M, cols, r, parts;
};

template <typename T>
__device__ void put(const Stripes<T>& p, int k, int col, float value) {
  const int64_t at = col * p.long_out + k * p.rank_out;
  if (p.out_is_float) {
    static_cast<float*>(p.out)[at] = value;
  } else {
    static_cast<T*>(p.out)[at] = Type<T>::from(value);
  }
}

// Columns that one thread loads of a row.
template <int RANKS>
constexpr int WIDTH = RANKS == 1 ? 8 : 4;

__host__ __device__ inline int part_rows(int M, int parts) { return (M + 16 * parts - 1) / (16 * parts) * 16; }

// Floats that the side warps need to add their sums.
template <int RANKS>
constexpr int STRIPE_SUMS = (SIDE_WARPS - 1) * 8 * WIDTH<RANKS> * 16 * RANKS;

template <typename T, int RANKS, bool DROPOUT>
__device__ void stripe_job(const Stripes<T>& p, const Mask& mask, int stripe, int part, float* sums, int warp, int lane) {
  constexpr int TILES = 2 * RANKS, W = WIDTH<RANKS>, PAIRS = W / 2, STEPS = RANKS > 1 ? 1 : DROPOUT ? 2 : 4;
  const int g = lane / 4, t = lane % 4;
  const int col = stripe * 8 * W + W * g;
  const bool inside = col < p.cols;
  const int rows = part_rows(p.M, p.parts), last = min((part + 1) * rows, p.M);
  const int own_rows = part_rows(last - part * rows, SIDE_WARPS);
  const int begin = part * rows + warp * own_rows, end = min(begin + own_rows, last);
  const T* src = p.src + col;
  // Of 16 rows a thread takes four: neighbours, or two of each half, which share hashes.
  constexpr int STEP = DROPOUT ? 8 : 2;
  const int first_row = (DROPOUT ? 2 : 4) * t;
  const T* small = p.small + int64_t(g) * p.pitch + first_row;
  float acc[PAIRS][TILES][4] = {};
  for (int m = begin; m < end; m += 16 * STEPS) {
    uint32_t big[STEPS][4][PAIRS];
    uint2 few[STEPS][TILES];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      for (int i = 0; i < 4; i++) {
        const int row = m + 16 * s + first_row + i / 2 * STEP + i % 2;
        const bool there = inside && row < end;
        if constexpr (W == 8) {
          uint4 v = load_streamed(src + row * p.src_pitch, there);
          big[s][i][0] = v.x, big[s][i][1] = v.y, big[s][i][2] = v.z, big[s][i][3] = v.w;
        } else {
          uint2 v = load_streamed_half(src + row * p.src_pitch, there);
          big[s][i][0] = v.x, big[s][i][1] = v.y;
        }
      }
      for (int n = 0; n < TILES; n++) {
        // `small` is padded with zeros up to a multiple of 16 rows
        const T* from = small + int64_t(8 * n) * p.pitch + m + 16 * s;
        few[s][n] = make_uint2(0, 0);
        if (m + 16 * s < end) {
          if constexpr (DROPOUT) {
            few[s][n] = make_uint2(load_fresh_quarter(from), load_fresh_quarter(from + STEP));
          } else {
            few[s][n] = load_fresh_half(from);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      if constexpr (DROPOUT) {
        for (int i = 0; i < 2; i++) {
          const uint32_t four = mask.four(m + 16 * s + first_row + i, col / 2, p.cols / 2);
          for (int c = 0; c < PAIRS; c++) mask.keep<T>(big[s][i][c], big[s][i + 2][c], four + c);
        }
      }
      for (int c = 0; c < PAIRS; c++) {
        // Columns 2c and 2c + 1 of the thread are rows g and g + 8 of the instruction, its rows of src are the depth.
        const uint32_t a[4] = {
            __byte_perm(big[s][0][c], big[s][1][c], 0x5410), __byte_perm(big[s][0][c], big[s][1][c], 0x7632),
            __byte_perm(big[s][2][c], big[s][3][c], 0x5410), __byte_perm(big[s][2][c], big[s][3][c], 0x7632)};
        for (int n = 0; n < TILES; n++) Type<T>::mma(acc[c][n], a, few[s][n].x, few[s][n].y);
      }
    }
  }
  // Each thread's sums lie together, at the same place for every warp.
  constexpr int COUNT = PAIRS * TILES * 4;
  float* flat = &acc[0][0][0];
  if (warp > 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[((warp - 1) * COUNT + i) * 32 + lane] = flat[i];
  }
  meet(1, SIDE_THREADS);
  if (warp > 0) return;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    for (int w = 0; w < SIDE_WARPS - 1; w++) flat[i] += sums[(w * COUNT + i) * 32 + lane];
  }
  if (p.parts > 1) {
    float* own = p.partial + (int64_t(stripe) * p.parts + part) * COUNT * 32 + lane;
#pragma unroll
    for (int i = 0; i < COUNT; i++) own[32 * i] = flat[i];
    __threadfence();
    __syncwarp();
    const int before = lane == 0 ? arrive(p.arrived + stripe) : 0;
    if (__shfl_sync(0xFFFFFFFFu, before, 0) != p.parts - 1) return;
    // The last to arrive adds all parts, in their order, so that the bits do not depend on who that was.
    __threadfence();
    const float* from = p.partial + int64_t(stripe) * p.parts * COUNT * 32 + lane;
#pragma unroll
    for (int i = 0; i < COUNT; i++) flat[i] = __ldcg(from + 32 * i);
    for (int q = 1; q < p.parts; q++) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) flat[i] += __ldcg(from + (q * COUNT + i) * 32);
    }
    if (lane == 0) p.arrived[stripe] = 0;
  }
#pragma unroll
  for (int c = 0; c < PAIRS; c++) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int k = 8 * n + 2 * t + i % 2;
        if (inside && k < p.r) put(p, k, col + 2 * c + i / 2, acc[c][n][i]);
      }
    }
  }
}

}  // namespace fusedlora
