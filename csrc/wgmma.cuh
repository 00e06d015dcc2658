// One warpgroup: d [64, N] = a [64, 16] · b [16, N], + d where `accumulate`. a and b are descriptors of shared memory;
// TRANS_A, TRANS_B: the rows of a, of b in memory run along what is summed over.
#pragma once
#include "ptx.cuh"

namespace fusedlora {

// Sums of products that have been waited for: nothing reads them before this place.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <typename T, int N, int TRANS_A, int TRANS_B>
struct Wgmma;

// The same with a in registers, as mma.sync has it, and b's rows along its columns. The registers stay until this is done.
template <typename T, int N>
struct RegisterWgmma;

// The instruction names its type, and each register by itself: one text for each width.
#define FUSEDLORA_REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FUSEDLORA_REGISTERS_8(i) FUSEDLORA_REGISTERS_4(i), FUSEDLORA_REGISTERS_4(i + 4)
#define FUSEDLORA_REGISTERS_16(i) FUSEDLORA_REGISTERS_8(i), FUSEDLORA_REGISTERS_8(i + 8)
#define FUSEDLORA_REGISTERS_32(i) FUSEDLORA_REGISTERS_16(i), FUSEDLORA_REGISTERS_16(i + 16)
#define FUSEDLORA_REGISTERS_64(i) FUSEDLORA_REGISTERS_32(i), FUSEDLORA_REGISTERS_32(i + 32)
#define FUSEDLORA_REGISTERS_128(i) FUSEDLORA_REGISTERS_64(i), FUSEDLORA_REGISTERS_64(i + 64)
#define FUSEDLORA_NAMES_4 "%0, %1, %2, %3"
#define FUSEDLORA_NAMES_8 FUSEDLORA_NAMES_4 ", %4, %5, %6, %7"
#define FUSEDLORA_NAMES_16 FUSEDLORA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FUSEDLORA_NAMES_32 \
  FUSEDLORA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSEDLORA_NAMES_64 FUSEDLORA_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSEDLORA_NAMES_128 FUSEDLORA_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define FUSEDLORA_WGMMA(TYPE, NAME, N, COUNT, A, B, TRANSPOSED_A, TRANSPOSED_B, ACCUMULATE)                            \
template <int TRANS_A, int TRANS_B>                                                                                   \
struct Wgmma<TYPE, N, TRANS_A, TRANS_B> {                                                                             \
  __device__ static void run(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate = 1) {                         \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, " ACCUMULATE ", 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                                               \
        " {" FUSEDLORA_NAMES_##COUNT "}, " A ", " B ", add, 1, 1, " TRANSPOSED_A ", " TRANSPOSED_B ";\n}"             \
        : FUSEDLORA_REGISTERS_##COUNT(0)                                                                              \
        : "l"(a), "l"(b), "n"(TRANS_A), "n"(TRANS_B), "r"(accumulate));                                               \
  }                                                                                                                   \
};
#define FUSEDLORA_WGMMA_REGISTERS(TYPE, NAME, N, COUNT, A, B, ACCUMULATE)                                              \
template <>                                                                                                           \
struct RegisterWgmma<TYPE, N> {                                                                                       \
  __device__ static void run(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, int accumulate) {                 \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, " ACCUMULATE ", 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                                               \
        " {" FUSEDLORA_NAMES_##COUNT "}, {" A "}, " B ", add, 1, 1, 0;\n}"                                            \
        : FUSEDLORA_REGISTERS_##COUNT(0)                                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                       \
  }                                                                                                                   \
};
#define FUSEDLORA_WGMMAS(TYPE, NAME)                                                                                   \
  FUSEDLORA_WGMMA(TYPE, NAME, 8, 4, "%4", "%5", "%6", "%7", "%8")                                                      \
  FUSEDLORA_WGMMA(TYPE, NAME, 16, 8, "%8", "%9", "%10", "%11", "%12")                                                  \
  FUSEDLORA_WGMMA(TYPE, NAME, 32, 16, "%16", "%17", "%18", "%19", "%20")                                               \
  FUSEDLORA_WGMMA(TYPE, NAME, 64, 32, "%32", "%33", "%34", "%35", "%36")                                               \
  FUSEDLORA_WGMMA(TYPE, NAME, 128, 64, "%64", "%65", "%66", "%67", "%68")                                              \
  FUSEDLORA_WGMMA(TYPE, NAME, 256, 128, "%128", "%129", "%130", "%131", "%132")                                        \
  FUSEDLORA_WGMMA_REGISTERS(TYPE, NAME, 16, 8, "%8, %9, %10, %11", "%12", "%13")                                       \
  FUSEDLORA_WGMMA_REGISTERS(TYPE, NAME, 32, 16, "%16, %17, %18, %19", "%20", "%21")                                    \
  FUSEDLORA_WGMMA_REGISTERS(TYPE, NAME, 64, 32, "%32, %33, %34, %35", "%36", "%37")                                    \
  FUSEDLORA_WGMMA_REGISTERS(TYPE, NAME, 128, 64, "%64, %65, %66, %67", "%68", "%69")                                   \
  FUSEDLORA_WGMMA_REGISTERS(TYPE, NAME, 256, 128, "%128, %129, %130, %131", "%132", "%133")

FUSEDLORA_WGMMAS(__nv_bfloat16, "bf16")
FUSEDLORA_WGMMAS(__half, "f16")

#undef FUSEDLORA_WGMMAS
#undef FUSEDLORA_WGMMA_REGISTERS
#undef FUSEDLORA_WGMMA
#undef FUSEDLORA_NAMES_128
#undef FUSEDLORA_NAMES_64
#undef FUSEDLORA_NAMES_32
#undef FUSEDLORA_NAMES_16
#undef FUSEDLORA_NAMES_8
#undef FUSEDLORA_NAMES_4
#undef FUSEDLORA_REGISTERS_128
#undef FUSEDLORA_REGISTERS_64
#undef FUSEDLORA_REGISTERS_32
#undef FUSEDLORA_REGISTERS_16
#undef FUSEDLORA_REGISTERS_8
#undef FUSEDLORA_REGISTERS_4

}  // namespace fusedlora
