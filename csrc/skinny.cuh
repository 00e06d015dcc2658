// Around the tiles: skinny operands made ready, the dropout's mask, and what a stripe of dA or dB is and where it goes.
#pragma once
#include "ptx.cuh"
#include "shares.h"

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

  // The elements of a four, two of each row, as far as its hash keeps them.
  template <typename T>
  __device__ void keep(uint32_t& upper, uint32_t& lower, const uint32_t (&words)[2]) const {
    upper = Type<T>::keep(upper, words[0], bound);
    lower = Type<T>::keep(lower, words[1], bound);
  }

  // The elements of a four, two of each row, as far as they are kept.
  template <typename T>
  __device__ void keep(uint32_t& upper, uint32_t& lower, uint32_t four) const {
    uint32_t words[2];
    hash(words, four);
    keep<T>(upper, lower, words);
  }

  // The same as bits of a word into which bits() goes for eight fours, shifted right by two before each: where the bit
  // of element e of four number n is, e = 0, 1 in the upper row and 2, 3 in the lower one.
  __device__ static constexpr int bit(int n, int e) { return (e % 2 ? 31 : 15) - e / 2 - 2 * (7 - n); }

  __device__ uint32_t bits(uint32_t four) const {
    uint32_t words[2];
    hash(words, four);
    const uint32_t TOP = 0x80008000u;  // no half borrows from the other
    return (((words[0] | TOP) - bound) & TOP) | (((words[1] | TOP) - bound) >> 1 & TOP >> 1);
  }
};

// A skinny operand as the kernels read it: 16-bit, its rank padded with zeros, made from a parameter of any dtype, any
// rank and any alignment. Element (i, k) of the parameter, i along its long side, k < r, lies at i · long_in + k ·
// rank_in, and goes to i · long_out + k · rank_out.
struct Preparation {
  const void* from;
  void* to;
  int length;
  int64_t long_in, rank_in, long_out, rank_out;
  bool is_float;
};

// A thread takes one i.
constexpr int PREPARE_LENGTH = SIDE_THREADS;

__host__ __device__ inline int preparation_tasks(const Preparation& p) {
  return (p.length + PREPARE_LENGTH - 1) / PREPARE_LENGTH;
}

template <typename T, typename From, int RANKS>
__device__ void prepare_from(const Preparation& p, int task, int r, int thread) {
  const int64_t i = int64_t(task) * PREPARE_LENGTH + thread;
  if (i >= p.length) return;
#pragma unroll 1  // these threads have few registers
  for (int first = 0; first < 16 * RANKS; first += 16) {
    alignas(16) T values[16];
#pragma unroll
    for (int k = 0; k < 16; k++) {
      const From* from = static_cast<const From*>(p.from) + i * p.long_in + (first + k) * p.rank_in;
      values[k] = first + k < r ? Type<T>::from(float(*from)) : T(0.0f);
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

// Stripes of out [R, cols] = small [M, R]ᵀ · src [M, cols], src under the mask for dA. Each is summed in `parts` runs of
// rows.
struct Stripes {
  CUtensorMap src, small;
  float* partial;  // where there are parts: for each 64 columns and part the sums, as the threads hold them
  int* arrived;    // a word for each 64 columns
  void* out;       // null: not wanted
  int64_t long_out, rank_out;  // where element (k, column) goes: column · long_out + k · rank_out
  bool out_is_float;
  int cols, parts;
};

__host__ __device__ inline int job_count(const Stripes& p) { return p.out ? job_count(p.cols, p.parts) : 0; }

__host__ __device__ inline int64_t stripe_count(int64_t cols) { return (cols + JOB_COLS - 1) / JOB_COLS * (JOB_COLS / STRIPE); }

// Rows of a part, whole stages of ROWS.
template <int ROWS>
__host__ __device__ inline int part_rows(int M, int parts) {
  return (M + ROWS * parts - 1) / (ROWS * parts) * ROWS;
}

template <typename T>
__device__ void put(const Stripes& p, int k, int col, float value) {
  const int64_t at = col * p.long_out + k * p.rank_out;
  if (p.out_is_float) {
    static_cast<float*>(p.out)[at] = value;
  } else {
    static_cast<T*>(p.out)[at] = Type<T>::from(value);
  }
}

// The mask of a warpgroup's [64, 64] elements in shared memory, of row `row` and column `col` on, swizzled as TMA leaves
// them. It may be hashed before they are there.
struct BoxMask {
  uint32_t words[2][4][2];

  __device__ __forceinline__ void hash(const Mask& mask, int row, int col, int cols, int thread) {
    const int upper = thread / 64 * 16 + thread / 8 % 8;
    const uint32_t four = Mask::four(row + upper, (col + 8 * (thread % 8)) / 2, cols / 2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) mask.hash(words[i][j], four + i * 16 * (cols / 2) + j);
    }
  }

  template <typename T>
  __device__ __forceinline__ void put(const Mask& mask, uint32_t box, int thread) const {
    const int chunk = thread % 8, upper = thread / 8 % 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t at = box + (thread / 64 * 16 + 32 * i + upper) * 128 + (chunk ^ upper) * 16;
      uint4 a = load_shared(at), b = load_shared(at + 1024);
      mask.keep<T>(a.x, b.x, words[i][0]);
      mask.keep<T>(a.y, b.y, words[i][1]);
      mask.keep<T>(a.z, b.z, words[i][2]);
      mask.keep<T>(a.w, b.w, words[i][3]);
      store_shared(at, a);
      store_shared(at + 1024, b);
    }
  }
};

// What a warpgroup has summed of 64 columns, acc [64, R] as wgmma has it, goes to `out` ...
template <typename T, int R>
__device__ void put_sums(const Stripes& p, const float (&acc)[R / 2], int stripe, int r, int thread) {
#pragma unroll
  for (int i = 0; i < R / 2; i++) {
    const int col = stripe * STRIPE + 16 * (thread / 32) + thread % 32 / 4 + i / 2 % 2 * 8;
    const int k = i / 4 * 8 + thread % 4 * 2 + i % 2;
    if (col < p.cols && k < r) put<T>(p, k, col, acc[i]);
  }
}

// ... or to its part's place.
template <int R>
__device__ void leave_sums(const Stripes& p, const float (&acc)[R / 2], int stripe, int part, int thread) {
  float* own = p.partial + (int64_t(stripe) * p.parts + part) * (64 * R) + thread;
#pragma unroll
  for (int i = 0; i < R / 2; i++) own[128 * i] = acc[i];
}

// A warp, of sums that a warpgroup has left: if they are the last of their stripe it adds all parts, in their order, so
// that the bits do not depend on who was last.
template <typename T, int R>
__device__ void add_parts(const Stripes& p, int stripe, int r, int lane) {
  constexpr int TOGETHER = R == 16 ? 2 : 1;
  __threadfence();
  const int before = lane == 0 ? arrive(p.arrived + stripe) : 0;
  if (__shfl_sync(0xFFFFFFFFu, before, 0) != p.parts - 1) return;
  __threadfence();
  const float* from = p.partial + int64_t(stripe) * p.parts * (64 * R);
#pragma unroll 1
  for (int thread = lane; thread < 128; thread += 32 * TOGETHER) {
    float acc[TOGETHER][R / 2] = {};
#pragma unroll 1
    for (int q = 0; q < p.parts; q++) {
      for (int j = 0; j < TOGETHER; j++) {
#pragma unroll
        for (int i = 0; i < R / 2; i++) acc[j][i] += __ldcg(from + (q * (R / 2) + i) * 128 + thread + 32 * j);
      }
    }
    for (int j = 0; j < TOGETHER; j++) put_sums<T, R>(p, acc[j], stripe, r, thread + 32 * j);
  }
  if (lane == 0) p.arrived[stripe] = 0;
}

}  // namespace fusedlora
