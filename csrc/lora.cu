// The C interface: workspaces' layout, tensor maps and the launch. No torch header is needed.
//
// Compiled as it is this file gives everything. To compile it in parallel, it gives with -DFUSEDLORA_UNIT_RANKS=1, 2, 4, 8
// or 16, -DFUSEDLORA_UNIT_BACKWARD=0 or 1 and -DFUSEDLORA_UNIT_TERMS=1, or 3 beside 4, the kernels of so many 16 ranks,
// that direction and so many terms, with -DFUSEDLORA_UNIT_DECODE=0 or 1 those of decoding in fp16 or bf16, with
// -DFUSEDLORA_UNITS what lies above them.
#include <atomic>
#include <cstdio>
#include <type_traits>

#include "arguments.h"
#include "call.cuh"
#include "decode.cuh"
#include "lora.cuh"

namespace fusedlora {

// What went wrong last in this thread.
extern thread_local char problem[256];

namespace {

inline int fail(const char* what, int code) {
  snprintf(problem, sizeof(problem), "%s: error %d", what, code);
  return code ? code : -1;
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode encoder() {
  static Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<Encode>(entry);
  }();
  return found;
}

// A map of [rows, cols] in boxes of [box_rows, box_cols], swizzled over the width of a box: 32, 64 or 128 bytes.
[[maybe_unused]] bool encode(
    CUtensorMap* map, bool is_bf16, const void* from, int64_t rows, int64_t cols, int64_t pitch, int box_rows,
    int box_cols = 64) {
  const cuuint64_t sizes[2] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[1] = {cuuint64_t(pitch) * 2};
  const cuuint32_t box[2] = {cuuint32_t(box_cols), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const auto swizzle = box_cols == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                       : box_cols == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                        : CU_TENSOR_MAP_SWIZZLE_32B;
  const auto type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encoder() != nullptr &&
         encoder()(map, type, 2, const_cast<void*>(from), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Places in a workspace, each at a multiple of 256 bytes.
struct Places {
  char* base;
  int64_t used = 0;
  template <typename P>
  P* take(int64_t count) {
    P* at = reinterpret_cast<P*>(base + used);
    used += (count * int64_t(sizeof(P)) + 255) / 256 * 256;
    return at;
  }
};

// `blocks` blocks in clusters of `cluster`. `allowed` has a bit for each device that lets the kernel have its `bytes`.
// `early`: the kernel itself waits for the launch before it.
template <typename C>
int launch_clusters(void (*kernel)(C), std::atomic<uint64_t>& allowed, int bytes, int64_t blocks, int threads,
                    int64_t cluster, bool early, void* stream, const C& call) {
  int device = 0;
  cudaGetDevice(&device);
  if (!(allowed >> device & 1)) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return fail("cudaFuncSetAttribute", status);
    allowed |= uint64_t(1) << device;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = early ? 2 : 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, call);
  return status == cudaSuccess ? 0 : fail("cudaLaunchKernelEx", status);
}

template <typename T, int BLOCK_N, int RANKS, bool BACKWARD, bool DROPOUT, int TERMS, Kind KIND = Kind::PLAIN>
int launch(const Arguments& a, const Call<T>& call) {
  static std::atomic<uint64_t> allowed{0};
  return launch_clusters(lora_kernel<T, BLOCK_N, RANKS, BACKWARD, DROPOUT, TERMS, KIND>, allowed,
                         Layout<BLOCK_N, RANKS>::TOTAL, a.programs, THREADS, CLUSTER, true, a.stream, call);
}

template <typename T, int TILES, int HALVES>
int launch_decode(const Arguments& a, const DecodeCall<T>& call) {
  static std::atomic<uint64_t> allowed{0};
  const int64_t blocks = (a.N + 64 * HALVES - 1) / (64 * HALVES) * a.decode_split;
  return launch_clusters(decode_kernel<T, TILES, HALVES>, allowed, DECODE_BYTES, blocks, DECODE_THREADS, a.decode_split,
                         a.decode_early != 0, a.stream, call);
}

template <typename T, int TILES>
int run_decode(const Arguments& a) {
  DecodeCall<T> c = {};
  if (!encode(&c.x, a.is_bf16, a.x, a.M, a.K, a.x_pitch, 8 * TILES) ||
      !encode(&c.w, a.is_bf16, a.w, a.N, a.K, a.w_pitch, int(a.decode_rows)) ||
      !encode(&c.a, a.is_bf16, a.a, a.r, a.K, a.a_pitch, int((a.r + 15) / 16 * 16))) {
    return fail("cuTensorMapEncodeTiled", -2);
  }
  c.b = static_cast<const uint16_t*>(a.b), c.bias = a.bias, c.gain = static_cast<const float*>(a.gain);
  c.y = static_cast<T*>(a.y), c.saved = static_cast<uint16_t*>(a.saved_s);
  c.b_pitch = a.b_pitch, c.scaling = float(a.scaling);
  c.M = int(a.M), c.N = int(a.N), c.K = int(a.K), c.r = int(a.r), c.split = int(a.decode_split);
  c.stages = decode_stages(decode_stage_bytes((c.r + 15) / 16, int(a.decode_rows) / 64, TILES));
  c.bias_is_float = a.bias_is_float;
  return a.decode_rows == 128 ? launch_decode<T, TILES, 2>(a, c) : launch_decode<T, TILES, 1>(a, c);
}

// An operand of as many columns or rows as there are ranks, in global memory as the kernel reads it; null where there is
// none.
template <typename T>
struct Operand {
  const T* from;
  int64_t ranks, pitch;  // TMA fills up ranks with zeros
};

template <typename T>
struct Operands {
  Operand<T> skinny, wide, saved_s;
};

[[maybe_unused]] int64_t row_pairs(int64_t M) { return (M + CLUSTER * BLOCK_M - 1) / (CLUSTER * BLOCK_M); }

// Words before those of stripes: three for each row block, of which there are an even number.
[[maybe_unused]] int64_t words_of_rows(int64_t M) { return PROGRESS + 3 * CLUSTER * row_pairs(M); }

// The bytes of workspace it takes.
template <typename T, int BLOCK_N, int RANKS, bool BACKWARD, int TERMS>
int64_t prepare_call(const Arguments& a, Call<T>& c, Operands<T>& operands) {
  using L = Layout<BLOCK_N, RANKS>;
  constexpr int R = L::R;
  [[maybe_unused]] constexpr int SUMS = SUM_RANKS<R, TERMS>;
  Places places{static_cast<char*>(a.workspace)};
  c = {}, operands = {};
  c.M = int(a.M), c.r = int(a.r), c.group = int(a.group), c.first_job = int(a.first_job), c.words = static_cast<int*>(a.words);
  c.cols = int(BACKWARD ? a.K : a.N), c.depth = int(BACKWARD ? a.N : a.K);
  c.mask = {uint32_t(a.seed), uint32_t(uint64_t(a.seed) >> 32), uint32_t(a.bound) * 0x10001u, nullptr};
  if (a.has_seed == 2) c.mask.seed = reinterpret_cast<const uint64_t*>(a.seed);
  [[maybe_unused]] const bool is_float = a.param_is_float;
  const int N = int(a.N), K = int(a.K), M = int(a.M);
  Shrink<T>& shrink = c.shrink;
  shrink.scaling = float(a.scaling), shrink.slices = int(a.slices);
  // Whether TMA can read it as it lies.
  [[maybe_unused]] const auto lies = [](const void* from, int64_t pitch, bool is_float) {
    return TERMS == 1 && !is_float && pitch % 8 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  };
  if constexpr (!BACKWARD) {
    operands.skinny = {static_cast<const T*>(a.a), a.r, a.a_pitch};
    if (!lies(a.a, a.a_pitch, is_float)) {
      T* skinny = places.take<T>(int64_t(R) * K);
      c.preparations[c.num_preparations++] = {a.a, skinny, K, 1, a.a_pitch, 1, K, is_float, EACH_TERM};
      c.prepares_skinny = true;
      operands.skinny = {skinny, R, K};
    }
    c.tiles = a.y != nullptr;
    operands.wide = {static_cast<const T*>(a.b), a.r, a.b_pitch};
    if (c.tiles && !lies(a.b, a.b_pitch, is_float)) {
      T* wide = places.take<T>(int64_t(N) * R);
      c.preparations[c.num_preparations++] = {a.b, wide, N, a.b_pitch, 1, R, 1, is_float, WIDE_TERMS};
      operands.wide = {wide, R, R};
    }
    shrink.out = places.take<T>(int64_t(M) * R);
    shrink.saved = a.saved_s;
    c.gain = static_cast<const float*>(a.gain), c.bias = a.bias, c.bias_is_float = a.bias_is_float;
  } else {
    const bool needs_t = a.dx || a.da;
    if (needs_t) {
      operands.skinny = {static_cast<const T*>(a.b), a.r, a.b_pitch};
      if (!lies(a.b, a.b_pitch, is_float)) {
        T* skinny = places.take<T>(int64_t(R) * N);
        c.preparations[c.num_preparations++] = {a.b, skinny, N, a.b_pitch, 1, R, 1, is_float, EACH_TERM};
        c.prepares_skinny = true;
        operands.skinny = {skinny, R, R};
      }
      shrink.out = places.take<T>(int64_t(M) * R);
    }
    if (a.dx) {
      T* wide = places.take<T>(int64_t(K) * R);
      c.preparations[c.num_preparations++] = {a.a, wide, K, 1, a.a_pitch, R, 1, is_float, WIDE_TERMS};
      operands.wide = {wide, R, R};
      c.tiles = true;
    }
    int* arrived = c.words + words_of_rows(a.M);
    if (a.db) {
      operands.saved_s = {static_cast<const T*>(a.s), a.r, a.r};
      if (!lies(a.s, a.r, false)) {
        T* small = places.take<T>(int64_t(M) * R);
        c.preparations[c.num_preparations++] = {a.s, small, M, a.r, 1, R, 1, TERMS > 1, EACH_TERM};
        operands.saved_s = {small, R, R};
      }
      // With T a part for each unit, of those blocks that have rows of it.
      constexpr int UNIT_BLOCKS = L::BOXES * CLUSTER;
      const int blocks = (M + BLOCK_M - 1) / BLOCK_M, rest = blocks % UNIT_BLOCKS;
      const int64_t with_t = blocks / UNIT_BLOCKS * CLUSTER + (rest < CLUSTER ? rest : CLUSTER);
      const int64_t parts = a.db_with_t ? with_t : a.parts_b;
      const bool leaves = parts > 1 || a.db_with_t || a.dm;
      float* partial = leaves ? places.take<float>(parts * stripe_count(N) * STRIPE * SUMS) : nullptr;
      c.stripes[0] = {{}, {}, partial, arrived, a.db, a.r, 1, is_float, N, int(parts)};
      if (a.dm) {
        float* sums = places.take<float>(parts * stripe_count(N) * STRIPE * 4);
        c.magnitude = {{}, static_cast<const float*>(a.gain), static_cast<const float*>(a.norm), a.bias, a.dm, sums,
                       float(a.least), a.bias_is_float != 0, a.dm_is_float != 0};
      }
    }
    if (a.da) {
      float* partial = a.parts_a > 1 ? places.take<float>(a.parts_a * stripe_count(K) * STRIPE * SUMS) : nullptr;
      c.stripes[1] = {{}, {}, partial, arrived + stripe_count(N), a.da, 1, a.K, is_float, K, int(a.parts_a)};
    }
  }
  const bool shrinks = !BACKWARD || a.dx || a.da;  // pointers say nothing before there is a workspace
  if (shrinks && shrink.slices > 1) {
    shrink.partial = places.take<float>(CLUSTER * row_pairs(a.M) * shrink.slices * BLOCK_M * SUMS);
  }
  return places.used;
}

// Whether slices are as the kernel has them. In tiles: half of a tile's steps, some before and some after them.
template <int BLOCK_N, int RANKS, bool BACKWARD, int TERMS>
bool takes_slices(const Arguments& a, int cols, int depth) {
  using L = Layout<BLOCK_N, RANKS>;
  const int wide_steps = (depth + 127) / 128, slices = int(a.slices);
  if (slices < 2 || slices > 32 || slices > wide_steps || BACKWARD) return slices == 1 && !a.in_tiles;
  if (!a.in_tiles) return true;
  const int pairs_m = int(row_pairs(a.M)), tiles_n = (cols + BLOCK_N - 1) / BLOCK_N;
  const Tiles tiles = Tiles::of(pairs_m, tiles_n, int(a.group), int(a.programs) / CLUSTER, slices);
  const int steps = (depth + BLOCK_K - 1) / BLOCK_K, half = slice_begin(depth, slices / 2, slices);
  return L::SLICES_IN_TILES && TERMS == 1 && slices % 2 == 0 && tiles.window >= slices &&
         L::LEAD + (half > steps - half ? half : steps - half) + L::STAGES < steps;
}

template <typename T, int BLOCK_N, int RANKS, bool BACKWARD, int TERMS>
int run(const Arguments& a, int64_t* sizes) {
  using L = Layout<BLOCK_N, RANKS>;
  [[maybe_unused]] constexpr int R = L::R;
  Call<T> call;
  Operands<T> operands;
  const int64_t used = prepare_call<T, BLOCK_N, RANKS, BACKWARD, TERMS>(a, call, operands);
  if (!takes_slices<BLOCK_N, RANKS, BACKWARD, TERMS>(a, call.tiles ? call.cols : 0, call.depth)) return fail("slices", -6);
  // T is computed, and S can be read as it lies.
  const bool both = BACKWARD && a.db && (a.dx || a.da) && operands.saved_s.from == a.s;
  if (a.db_with_t && !(both && L::DB_WITH_T && TERMS == 1)) return fail("db_with_t", -8);
  if (a.dm && !(BACKWARD && TERMS == 1 && a.db && !a.db_with_t && !a.has_seed)) return fail("dm", -9);
  if (sizes) {
    sizes[0] = used;
    sizes[1] = words_of_rows(a.M);
    if (BACKWARD) sizes[1] += stripe_count(a.N) + stripe_count(a.K);
    return 0;
  }
  const bool masked = a.has_seed != 0;
  // Slices are for what takes long; beside narrow tiles a mask takes too long.
  if (a.in_tiles ? masked && BLOCK_N == 128 : a.slices > 1 && !masked && TERMS == 1) return fail("slices", -6);
  const void* left = BACKWARD ? a.dy : a.x;
  const int64_t left_pitch = BACKWARD ? a.dy_pitch : a.x_pitch;
  // Boxes that both blocks of a cluster want come half by half.
  if (const Operand<T>& skinny = operands.skinny; skinny.from) {
    call.shrink.clusters = int(a.shrink_clusters);
    if (!encode(&call.left, a.is_bf16, left, a.M, call.depth, left_pitch, BLOCK_M) ||
        !(BACKWARD ? encode(&call.skinny, a.is_bf16, skinny.from, call.depth, skinny.ranks, skinny.pitch, BLOCK_K / CLUSTER,
                            BOX_RANKS<R>)
                   : encode(&call.skinny, a.is_bf16, skinny.from, skinny.ranks, call.depth, skinny.pitch,
                            a.in_tiles ? R : R / CLUSTER))) {
      return fail("cuTensorMapEncodeTiled", -2);
    }
  }
  if (call.tiles) {
    void* out = BACKWARD ? a.dx : a.y;
    const Operand<T>& wide = operands.wide;
    if (!encode(&call.right, a.is_bf16, a.w, a.N, a.K, a.w_pitch, BACKWARD ? 64 : BLOCK_N / 2) ||
        !encode(&call.small, a.is_bf16, call.shrink.out, a.M, R, R, BLOCK_M, BOX_RANKS<R>) ||
        !encode(&call.wide, a.is_bf16, wide.from, call.cols, wide.ranks, wide.pitch, BLOCK_N / 2, BOX_RANKS<R>) ||
        !encode(&call.out, a.is_bf16, out, a.M, call.cols, call.cols, 64)) {
      return fail("cuTensorMapEncodeTiled", -2);
    }
  }
  if constexpr (BACKWARD) {
    const auto maps = [&](Stripes& p, const void* src, int64_t pitch, const Operand<T>& small) {
      return !p.out ||
             (encode(&p.src, a.is_bf16, src, a.M, p.cols, pitch, L::JOB_ROWS) &&
              encode(&p.small, a.is_bf16, small.from, a.M, small.ranks, small.pitch, L::JOB_ROWS / CLUSTER, BOX_RANKS<R>));
    };
    if (!maps(call.stripes[0], a.dy, a.dy_pitch, operands.saved_s) ||
        !maps(call.stripes[1], a.x, a.x_pitch, {call.shrink.out, R, R})) {
      return fail("cuTensorMapEncodeTiled", -2);
    }
    if (a.dm && !encode(&call.magnitude.y, a.is_bf16, a.y, a.M, a.N, a.N, L::JOB_ROWS)) {
      return fail("cuTensorMapEncodeTiled", -2);
    }
  }
  if constexpr (L::SLICES_IN_TILES && !BACKWARD && TERMS == 1) {
    if constexpr (BLOCK_N == 256) {
      if (a.in_tiles && masked) return launch<T, BLOCK_N, RANKS, false, true, 1, Kind::SLICES_IN_TILES>(a, call);
    }
    if (a.in_tiles) return launch<T, BLOCK_N, RANKS, false, false, 1, Kind::SLICES_IN_TILES>(a, call);
  }
  if constexpr (!BACKWARD && TERMS > 1) {
    if (a.slices > 1 && !masked) return launch<T, BLOCK_N, RANKS, false, false, TERMS, Kind::SLICES_OF_TERMS>(a, call);
  }
  if constexpr (L::DB_WITH_T && BACKWARD && TERMS == 1) {
    if (a.db_with_t) {
      return masked ? launch<T, BLOCK_N, RANKS, true, true, 1, Kind::DB_WITH_T>(a, call)
                    : launch<T, BLOCK_N, RANKS, true, false, 1, Kind::DB_WITH_T>(a, call);
    }
  }
  if constexpr (BACKWARD && TERMS == 1) {
    if (a.dm) return launch<T, BLOCK_N, RANKS, true, false, 1, Kind::DM_WITH_DB>(a, call);
  }
  return masked ? launch<T, BLOCK_N, RANKS, BACKWARD, true, TERMS>(a, call)
                : launch<T, BLOCK_N, RANKS, BACKWARD, false, TERMS>(a, call);
}

template <typename T, int RANKS, bool BACKWARD, int TERMS>
int by_width(const Arguments& a, int64_t* sizes) {
  if (a.block_n == 256) return run<T, 256, RANKS, BACKWARD, TERMS>(a, sizes);
  if constexpr (RANKS <= 8) {  // more do not fit
    if (a.block_n == 128) return run<T, 128, RANKS, BACKWARD, TERMS>(a, sizes);
  }
  return fail("block_n", -7);
}

}  // namespace

template <int RANKS, bool BACKWARD, int TERMS>
int by_type(const Arguments& a, int64_t* sizes) {
  if constexpr (TERMS == 1) {
    if (!a.is_bf16) return by_width<__half, RANKS, BACKWARD, 1>(a, sizes);
  }
  return by_width<__nv_bfloat16, RANKS, BACKWARD, TERMS>(a, sizes);
}

// A, in x's dtype, is one that a tensor map reads.
template <typename T>
int decode(const Arguments& a) {
  if (a.M <= 16) return a.M <= 8 ? run_decode<T, 1>(a) : run_decode<T, 2>(a);
  return a.M <= 32 ? run_decode<T, 4>(a) : run_decode<T, 8>(a);
}

#if defined(FUSEDLORA_UNIT_DECODE)

template int decode<std::conditional_t<FUSEDLORA_UNIT_DECODE, __nv_bfloat16, __half>>(const Arguments&);
}  // namespace fusedlora

#elif defined(FUSEDLORA_UNIT_RANKS)

template int by_type<FUSEDLORA_UNIT_RANKS, FUSEDLORA_UNIT_BACKWARD, FUSEDLORA_UNIT_TERMS>(const Arguments&, int64_t*);
}  // namespace fusedlora

#else

#ifdef FUSEDLORA_UNITS
#define FUSEDLORA_EXTERN(RANKS, TERMS)                                        \
  extern template int by_type<RANKS, false, TERMS>(const Arguments&, int64_t*); \
  extern template int by_type<RANKS, true, TERMS>(const Arguments&, int64_t*);
FUSEDLORA_EXTERN(1, 1)
FUSEDLORA_EXTERN(2, 1)
FUSEDLORA_EXTERN(4, 1)
FUSEDLORA_EXTERN(4, 3)
FUSEDLORA_EXTERN(8, 1)
FUSEDLORA_EXTERN(16, 1)
#undef FUSEDLORA_EXTERN
extern template int decode<__half>(const Arguments&);
extern template int decode<__nv_bfloat16>(const Arguments&);
#endif
thread_local char problem[256] = "";

template <bool BACKWARD>
int by_rank(const Arguments& a, int64_t* sizes) {
  if (a.terms == 3) {
    const bool taken = a.r <= 16 && a.is_bf16 && a.param_is_float;
    return taken ? by_type<4, BACKWARD, 3>(a, sizes) : fail("three terms", -5);
  }
  if (a.r <= 16) return by_type<1, BACKWARD, 1>(a, sizes);
  if (a.r <= 32) return by_type<2, BACKWARD, 1>(a, sizes);
  if (a.r <= 64) return by_type<4, BACKWARD, 1>(a, sizes);
  if (a.r <= 128) return by_type<8, BACKWARD, 1>(a, sizes);
  if (a.r <= 256) return by_type<16, BACKWARD, 1>(a, sizes);
  return fail("r", -3);
}

int forward(const Arguments& a, int64_t* sizes) {
  if (a.decode_rows == 0) return by_rank<false>(a, sizes);
  const bool split = a.decode_split == 1 || a.decode_split == 2 || a.decode_split == 4 || a.decode_split == 8;
  const bool rows = a.decode_rows == 64 || (a.decode_rows == 128 && a.decode_split > 1);
  const bool in_place = !a.param_is_float && reinterpret_cast<uintptr_t>(a.a) % 16 == 0 && a.a_pitch % 8 == 0;
  if (a.M > 64 || a.r > 64 || a.has_seed || !split || !rows || !in_place) return fail("the decode kernel", -4);
  if (sizes) {
    sizes[0] = sizes[1] = 0;
    return 0;
  }
  return a.is_bf16 ? decode<__nv_bfloat16>(a) : decode<__half>(a);
}

}  // namespace fusedlora

extern "C" {
// 0, or an error of which fusedlora_problem() tells. With `sizes` nothing runs: it gets the bytes of the workspace and
// the number of words, which must be zero and are left so.
int fusedlora_forward(const Arguments* a, int64_t* sizes) { return fusedlora::forward(*a, sizes); }
int fusedlora_backward(const Arguments* a, int64_t* sizes) { return fusedlora::by_rank<true>(*a, sizes); }
const char* fusedlora_problem() { return fusedlora::problem; }
}

#endif
