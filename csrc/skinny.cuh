// Around the tiles: skinny operands made ready, the dropout's mask, and what a stripe of dA or dB is and where it goes.
#pragma once
#include "ptx.cuh"
#include "shares.h"

namespace fusedlora {

constexpr int SIDE_WARPS = 3;
constexpr int SIDE_THREADS = 32 * SIDE_WARPS;

// A number of an array of fp32 or of T.
template <typename T>
__device__ __forceinline__ float load_number(const void* from, bool is_float, int at) {
  return is_float ? static_cast<const float*>(from)[at] : float(static_cast<const T*>(from)[at]);
}

// The dropout's mask: see fusedlora/dropout.py, whose hash this is. Rows m and m + 8 of columns k, k + 1, k + 8 and k + 9
// share one.
struct Mask {
  uint32_t low, high, bound;  // the seed's halves; the threshold in both halves of a word
  const uint64_t* seed;       // where the seed is read from, or null

  // The mask, its seed at hand.
  __device__ Mask read() const {
    Mask mask = *this;
    if (seed) mask.low = uint32_t(*seed), mask.high = uint32_t(*seed >> 32);
    return mask;
  }

  // The number of the eight elements that `row` and `col` of [.., cols] are in; that of column col + 16 is 4 more.
  __device__ static uint32_t eight(uint32_t row, uint32_t col, uint32_t cols) {
    return ((row / 16 * 8 + row % 8) * ((cols + 15) / 16) + col / 16) * 4 + col % 8 / 2;
  }

  // A word for two columns each: of the upper row and the lower one, then of the same rows eight columns on.
  __device__ void hash(uint32_t (&words)[4], uint32_t eight) const {
    constexpr int XOR_XOR = 0xF0 ^ 0xCC ^ 0xAA, XOR_AND = (0xF0 ^ 0xCC) & 0xAA;
    const uint32_t BITS = 0x7FFF7FFFu, h = fold<XOR_XOR>(fold<XOR_XOR>(eight + low, 0x9E3779B9u, high), 0xBB67AE85u, 0);
    words[0] = fold<XOR_AND>(h, 0xD2511F53u, BITS);
    words[1] = logic<XOR_AND>(words[0], __byte_perm(h, 0, 0x1032), BITS);
    words[2] = fold<XOR_AND>(h, 0xA54FF53Bu, BITS);
    words[3] = logic<XOR_AND>(words[2], __byte_perm(h, 0, 0x0321), BITS);
  }

  // The pair of elements that a word is of, as far as it keeps them.
  template <typename T>
  __device__ uint32_t keep(uint32_t pair, uint32_t word) const {
    return pair & Type<T>::reaches(word, bound);
  }

  // What is kept of four eights, their numbers 4 apart, as bits: that of column 8 j + e % 2 and row e / 2 at bit(j, e).
  __device__ static constexpr int bit(int j, int e) { return 2 * j + e / 2 + e % 2 * 16; }

  template <typename T>
  __device__ uint32_t bits(uint32_t eight) const {
    uint32_t kept = 0;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      uint32_t words[4];
      hash(words, eight + 4 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) kept |= Type<T>::reaches(words[i], bound) & 0x00010001u << (4 * n + i);
    }
    return kept;
  }
};

// sum += value where `bit` of `bits` is set: in place, where the compiler would take another register for it.
__device__ __forceinline__ void add_if(float& sum, float value, uint32_t bits, uint32_t bit) {
  asm("{\n.reg .pred is;\n.reg .b32 found;\n"
      "and.b32 found, %2, %3;\nsetp.ne.u32 is, found, 0;\n@is add.f32 %0, %0, %1;\n}"
      : "+f"(sum)
      : "f"(value), "r"(bits), "r"(bit));
}

// Adapters that keep fp32's precision are taken as sums of three 16-bit terms. Their operands have 64 columns for up to 16
// ranks, in groups of 16: which term each group is of, the first group's in the lowest four bits, 0 for none. The rows of
// S or T beside those of `wide` then give first · first + second · first + first · second, for sums that are rounded to 16
// bits. What they leave out is 2⁻¹⁷ of the product or less.
constexpr uint32_t EACH_TERM = 0x0321, SMALL_TERMS = 0x1321, WIDE_TERMS = 0x2011;

// The ranks of sums over operands of R columns.
template <int R, int TERMS>
constexpr int SUM_RANKS = TERMS == 1 ? R : 16;

// Term number n, from 1 on, of a number; zero for n = 0.
template <typename T>
__device__ T term(float value, int n) {
  T found = T(0.0f);
  for (; n > 0; n--) {
    found = Type<T>::from(value);
    value -= float(found);
  }
  return found;
}

// Adds a step's sums over three terms, as wgmma holds them, to those of all. Tensor cores truncate where they add, which
// over many steps costs more than the terms gain: hence a step at a time, and an ordinary, rounding addition.
template <int R>
__device__ __forceinline__ void add_terms(float (&total)[8], const float (&step)[R / 2]) {
#pragma unroll
  for (int i = 0; i < 8; i++) total[i] += step[16 + i] + step[8 + i] + step[i];
}

// A total of steps `depth` deep without what truncation within them took, on average: kernels/triton/common.py measured it.
__device__ __forceinline__ float regained(float total, int depth) {
  return fmaf(total, 2e-8f + 6.25e-10f * depth, total);
}

// A skinny operand as the kernels read it: 16-bit, its rank padded with zeros, made from a parameter of any dtype, any
// rank and any alignment. Element (i, k) of the parameter, i along its long side, k < r, lies at i · long_in + k ·
// rank_in, and goes to i · long_out + k · rank_out; with terms, k is that within each group.
struct Preparation {
  const void* from;
  void* to;
  int length;
  int64_t long_in, rank_in, long_out, rank_out;
  bool is_float;
  uint32_t groups;  // of which terms
};

// A thread takes one i.
constexpr int PREPARE_LENGTH = SIDE_THREADS;

__host__ __device__ inline int preparation_tasks(const Preparation& p) {
  return (p.length + PREPARE_LENGTH - 1) / PREPARE_LENGTH;
}

// Loads wait long beside wgmma, so those of AT_ONCE times 16 ranks are under way together.
template <typename T, typename From, int RANKS, int TERMS, int AT_ONCE>
__device__ void prepare_from(const Preparation& p, int task, int r, int thread) {
  constexpr int READ = TERMS == 1 ? AT_ONCE : 1;  // with terms all groups are of the same 16 ranks
  const int64_t i = int64_t(task) * PREPARE_LENGTH + thread;
  if (i >= p.length) return;
  float read[16 * READ];
#pragma unroll 1  // these threads have few registers
  for (int first = 0; first < 16 * RANKS; first += 16 * READ) {
    if (TERMS == 1 || first == 0) {
#pragma unroll
      for (int k = 0; k < 16 * READ; k++) {
        const From* from = static_cast<const From*>(p.from) + i * p.long_in + (first + k) * p.rank_in;
        read[k] = first + k < r ? float(*from) : 0.0f;
      }
    }
#pragma unroll
    for (int group = 0; group < READ; group++) {
      alignas(16) T values[16];
#pragma unroll
      for (int k = 0; k < 16; k++) values[k] = term<T>(read[16 * group + k], TERMS == 1 ? 1 : p.groups >> first / 4 & 15);
      T* to = static_cast<T*>(p.to) + i * p.long_out + (first + 16 * group) * p.rank_out;
      if (p.rank_out == 1) {
        for (int h = 0; h < 2; h++) reinterpret_cast<uint4*>(to)[h] = reinterpret_cast<const uint4*>(values)[h];
        continue;
      }
#pragma unroll
      for (int k = 0; k < 16; k++) to[k * p.rank_out] = values[k];
    }
  }
}

template <typename T, int RANKS, int TERMS, int AT_ONCE>
__device__ void prepare(const Preparation& p, int task, int r, int thread) {
  if (TERMS > 1 || p.is_float) {
    prepare_from<T, float, RANKS, TERMS, AT_ONCE>(p, task, r, thread);
  } else {
    prepare_from<T, T, RANKS, 1, AT_ONCE>(p, task, r, thread);
  }
}

// Stripes of out [R, cols] = small [M, R]ᵀ · src [M, cols], src under the mask for dA. Each is summed in `parts` runs of
// rows: by jobs or, dB's, by those who read the same dy for T.
struct Stripes {
  CUtensorMap src, small;
  float* partial;  // where they are left, in parts or with dm: for each 64 columns and part, as the threads hold them
  int* arrived;    // a word for each 64 columns
  void* out;       // null: not wanted
  int64_t long_out, rank_out;  // where element (k, column) goes: column · long_out + k · rank_out
  bool out_is_float;
  int cols, parts;
};

__host__ __device__ inline int job_count(const Stripes& p) { return p.out ? job_count(p.cols, p.parts) : 0; }

__host__ __device__ inline int64_t stripe_count(int64_t cols) { return (cols + JOB_COLS - 1) / JOB_COLS * (JOB_COLS / STRIPE); }

// DoRA's: dm [N] = Σ dy ∘ (y - bias) / gain / norm over the rows of dy [M, N], which dB's jobs read, where |gain| is not
// below `least`. dB gets the gain as well.
struct Magnitude {
  CUtensorMap y;             // [M, N]
  const float *gain, *norm;  // [N]
  const void* bias;          // [N] or null
  void* out;                 // dm
  float* partial;            // for each stripe, part and warp of a warpgroup sums of 64 columns
  float least;
  bool bias_is_float, out_is_float;
};

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

// Eight ranks of a column, k and on: in one piece where they lie so.
template <typename T>
__device__ void put_row(const Stripes& p, int k, int col, const float (&row)[8], int r) {
  if (p.rank_out == 1 && r % 8 == 0 && !p.out_is_float) {
    const uint4 packed = {Type<T>::pack(row[0], row[1]), Type<T>::pack(row[2], row[3]), Type<T>::pack(row[4], row[5]),
                          Type<T>::pack(row[6], row[7])};
    if (k < r) *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + col * p.long_out + k) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (k + i < r) put<T>(p, k + i, col, row[i]);
  }
}

// The mask of a warpgroup's [64, 64] elements in shared memory, of row `row` and column `col` on, swizzled as TMA leaves
// them. It may be hashed before they are there.
struct BoxMask {
  uint32_t words[4][4];

  __device__ __forceinline__ void hash(const Mask& mask, int row, int col, int cols, int thread) {
    const uint32_t eight = Mask::eight(row + thread / 32 * 16 + thread / 4 % 8, col + 16 * (thread % 4), cols);
#pragma unroll
    for (int t = 0; t < 4; t++) mask.hash(words[t], eight + t);
  }

  template <typename T>
  __device__ __forceinline__ void put(const Mask& mask, uint32_t box, int thread) const {
    const int upper = thread / 4 % 8, chunk = thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t at = box + (thread / 32 * 16 + i % 2 * 8 + upper) * 128 + ((chunk + i / 2) ^ upper) * 16;
      uint4 a = load_shared(at);
      a.x = mask.keep<T>(a.x, words[0][i]);
      a.y = mask.keep<T>(a.y, words[1][i]);
      a.z = mask.keep<T>(a.z, words[2][i]);
      a.w = mask.keep<T>(a.w, words[3][i]);
      store_shared(at, a);
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
__device__ void leave_sums(float* to, const float (&acc)[R / 2], int thread) {
#pragma unroll
  for (int i = 0; i < R / 2; i++) to[128 * i + thread] = acc[i];
}

// A warp: what warpgroups have left, `parts` times from `from` on, added in their order, of the n-th EIGHTS times eight ranks.
// put(k, i, row) gets eight, k and on, of row i of the warpgroup's 64. Loads wait long beside wgmma, so those of two parts
// are under way together.
template <int R, int EIGHTS, typename Put>
__device__ void add_eights(const float* from, int parts, int n, int lane, Put put) {
  const float4* first = reinterpret_cast<const float4*>(from) + 4 * EIGHTS * 32 * n + lane;
  float4 sums[EIGHTS][4] = {};
#pragma unroll 1
  for (int q = 0; q < parts; q += 2) {
    float4 pair[2][4 * EIGHTS] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (q + h == parts) break;
#pragma unroll
      for (int i = 0; i < 4 * EIGHTS; i++) pair[h][i] = __ldcg(first + ((q + h) * (R / 2) + i) * 32);
    }
#pragma unroll
    for (int i = 0; i < 8 * EIGHTS; i++) {
      const float4 part = pair[i % 2][i / 2];
      float4& sum = sums[i / 8][i / 2 % 4];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
  }
  asm volatile("" : "+r"(lane));  // or what follows from it is kept in registers meanwhile
#pragma unroll
  for (int j = 0; j < EIGHTS; j++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {  // each vector is of four threads' columns, in the order of wgmma's registers
      const float4 even = sums[j][2 * h], odd = sums[j][2 * h + 1];
      const float row[8] = {even.x, odd.x, even.y, odd.y, even.z, odd.z, even.w, odd.w};
      put(8 * (EIGHTS * n + j), 16 * (lane / 8) + lane % 8 + 8 * h, row);
    }
  }
}

// All R ranks of them.
template <int R, int EIGHTS, typename Put>
__device__ void add_sums(const float* from, int parts, int lane, Put put) {
#pragma unroll 1
  for (int n = 0; n < R / (8 * EIGHTS); n++) add_eights<R, EIGHTS>(from, parts, n, lane, put);
}

// Where the part of a stripe leaves its sums.
template <int R>
__device__ float* part_place(const Stripes& p, int stripe, int part) {
  return p.partial + (int64_t(stripe) * p.parts + part) * (64 * R);
}

// Of dm, sums of a stripe's columns: what a warp has of a part.
__device__ inline float* magnitude_place(const Magnitude& m, const Stripes& p, int stripe, int part, int warp) {
  return m.partial + ((int64_t(stripe) * p.parts + part) * 4 + warp) * STRIPE;
}

// A warp: dm of a stripe, from what all have left.
template <typename T>
__device__ void put_magnitude(const Magnitude& m, const Stripes& p, int stripe, int lane) {
  const float2* from = reinterpret_cast<const float2*>(magnitude_place(m, p, stripe, 0, 0)) + lane;
  float sums[2] = {};
#pragma unroll 4
  for (int q = 0; q < 4 * p.parts; q++) {
    const float2 part = __ldcg(from + STRIPE / 2 * q);
    sums[0] += part.x, sums[1] += part.y;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int col = stripe * STRIPE + 2 * lane + i;
    if (col >= p.cols || fabsf(m.gain[col]) < m.least) continue;
    const float dm = sums[i] / m.gain[col] / m.norm[col];
    if (m.out_is_float) {
      static_cast<float*>(m.out)[col] = dm;
    } else {
      static_cast<T*>(m.out)[col] = Type<T>::from(dm);
    }
  }
}

// A warp, of sums that a warpgroup has left: if they are the last of their stripe it adds all parts, so that the bits do
// not depend on who was last. With `magnitude` it finishes dB and dm as DoRA has them.
template <typename T, int R, int EIGHTS, bool MAGNITUDE = false>
__device__ void add_parts(const Stripes& p, int stripe, int r, int lane, const Magnitude* magnitude = nullptr) {
  const int before = lane == 0 ? arrive(p.arrived + stripe) : 0;
  if (__shfl_sync(0xFFFFFFFFu, before, 0) != p.parts - 1) return;
  __syncwarp();
  add_sums<R, EIGHTS>(part_place<R>(p, stripe, 0), p.parts, lane, [&](int k, int i, const float(&row)[8]) {
    const int col = stripe * STRIPE + i;
    if (col >= p.cols) return;
    if constexpr (MAGNITUDE) {
      float scaled[8];
#pragma unroll
      for (int j = 0; j < 8; j++) scaled[j] = row[j] * magnitude->gain[col];
      put_row<T>(p, k, col, scaled, r);
    } else {
      put_row<T>(p, k, col, row, r);
    }
  });
  if constexpr (MAGNITUDE) put_magnitude<T>(*magnitude, p, stripe, lane);
  if (lane == 0) p.arrived[stripe] = 0;
}

// A warp, once all parts are there: what is its of them, by eights of ranks, if each block has one such warp.
template <typename T, int R, int EIGHTS>
__device__ void add_all_parts(const Stripes& p, int r, int lane) {
  constexpr int TASKS = R / (8 * EIGHTS);  // of a stripe
  for (int task = blockIdx.x; task < (p.cols + STRIPE - 1) / STRIPE * TASKS; task += gridDim.x) {
    const int stripe = task / TASKS;
    add_eights<R, EIGHTS>(part_place<R>(p, stripe, 0), p.parts, task % TASKS, lane, [&](int k, int i, const float(&row)[8]) {
      const int col = stripe * STRIPE + i;
      if (col < p.cols) put_row<T>(p, k, col, row, r);
    });
  }
}

}  // namespace fusedlora
