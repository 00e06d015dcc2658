// One warpgroup: d [64, N] = a [64, 16] · b [16, N], + d where `accumulate`. a and b are descriptors of shared memory;
// TRANS: b's rows in memory run along what is summed over.
#pragma once
#include "ptx.cuh"

namespace fusedlora {

// Sums of products that have been waited for: nothing reads them before this place.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <typename T, int N, int TRANS>
struct Wgmma;

// The instruction names its type, and each register by itself: one text for each width.
#define FUSEDLORA_WGMMA_128(TYPE, NAME)                                                                               \
template <int TRANS>                                                                                                  \
struct Wgmma<TYPE, 128, TRANS> {                                                                                      \
  __device__ static void run(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {                                \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %67, 0;\n"                                                              \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"                                             \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                              \
        "}, %64, %65, add, 1, 1, 0, %66;\n}"                                                                          \
        :                                                                                                             \
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),             \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),       \
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),     \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),     \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),     \
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),     \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),     \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])      \
        : "l"(a), "l"(b), "n"(TRANS), "r"(accumulate));                                                               \
  }                                                                                                                   \
};

#define FUSEDLORA_WGMMA_256(TYPE, NAME)                                                                               \
template <int TRANS>                                                                                                  \
struct Wgmma<TYPE, 256, TRANS> {                                                                                      \
  __device__ static void run(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {                               \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %131, 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {"                                             \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                            \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                            \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                            \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"              \
        "}, %128, %129, add, 1, 1, 0, %130;\n}"                                                                       \
        :                                                                                                             \
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),             \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),       \
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),     \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),     \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),     \
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),     \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),     \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),     \
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),     \
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),     \
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),     \
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),     \
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]) \
        : "l"(a), "l"(b), "n"(TRANS), "r"(accumulate));                                                               \
  }                                                                                                                   \
};

FUSEDLORA_WGMMA_128(__nv_bfloat16, "bf16")
FUSEDLORA_WGMMA_128(__half, "f16")
FUSEDLORA_WGMMA_256(__nv_bfloat16, "bf16")
FUSEDLORA_WGMMA_256(__half, "f16")

#undef FUSEDLORA_WGMMA_128
#undef FUSEDLORA_WGMMA_256

// The same for few columns. TRANS_A, TRANS_B: the rows of a, of b in memory run along what is summed over.
template <typename T, int N, int TRANS_A, int TRANS_B>
struct NarrowWgmma;

#define FUSEDLORA_REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FUSEDLORA_REGISTERS_8(i) FUSEDLORA_REGISTERS_4(i), FUSEDLORA_REGISTERS_4(i + 4)
#define FUSEDLORA_REGISTERS_16(i) FUSEDLORA_REGISTERS_8(i), FUSEDLORA_REGISTERS_8(i + 8)
#define FUSEDLORA_REGISTERS_32(i) FUSEDLORA_REGISTERS_16(i), FUSEDLORA_REGISTERS_16(i + 16)
#define FUSEDLORA_NAMES_4 "%0, %1, %2, %3"
#define FUSEDLORA_NAMES_8 FUSEDLORA_NAMES_4 ", %4, %5, %6, %7"
#define FUSEDLORA_NAMES_16 FUSEDLORA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FUSEDLORA_NAMES_32 \
  FUSEDLORA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define FUSEDLORA_WGMMA_NARROW(TYPE, NAME, N, COUNT, A, B, TRANSPOSED_A, TRANSPOSED_B, ACCUMULATE)                     \
template <int TRANS_A, int TRANS_B>                                                                                   \
struct NarrowWgmma<TYPE, N, TRANS_A, TRANS_B> {                                                                       \
  __device__ static void run(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate = 1) {                         \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, " ACCUMULATE ", 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                                               \
        " {" FUSEDLORA_NAMES_##COUNT "}, " A ", " B ", add, 1, 1, " TRANSPOSED_A ", " TRANSPOSED_B ";\n}"             \
        : FUSEDLORA_REGISTERS_##COUNT(0)                                                                              \
        : "l"(a), "l"(b), "n"(TRANS_A), "n"(TRANS_B), "r"(accumulate));                                               \
  }                                                                                                                   \
};
#define FUSEDLORA_WGMMAS_NARROW(TYPE, NAME)                                      \
  FUSEDLORA_WGMMA_NARROW(TYPE, NAME, 8, 4, "%4", "%5", "%6", "%7", "%8")         \
  FUSEDLORA_WGMMA_NARROW(TYPE, NAME, 16, 8, "%8", "%9", "%10", "%11", "%12")     \
  FUSEDLORA_WGMMA_NARROW(TYPE, NAME, 32, 16, "%16", "%17", "%18", "%19", "%20")  \
  FUSEDLORA_WGMMA_NARROW(TYPE, NAME, 64, 32, "%32", "%33", "%34", "%35", "%36")

FUSEDLORA_WGMMAS_NARROW(__nv_bfloat16, "bf16")
FUSEDLORA_WGMMAS_NARROW(__half, "f16")

// d [64, 64] with a in registers, as mma.sync has it; b's rows run along its columns. The registers stay until this is done.
template <typename T>
struct RegisterWgmma;

#define FUSEDLORA_WGMMA_REGISTERS(TYPE, NAME)                                                                          \
template <>                                                                                                           \
struct RegisterWgmma<TYPE> {                                                                                          \
  __device__ static void run(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {                    \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                              \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                                                   \
        " {" FUSEDLORA_NAMES_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"                                      \
        : FUSEDLORA_REGISTERS_32(0)                                                                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                       \
  }                                                                                                                   \
};

FUSEDLORA_WGMMA_REGISTERS(__nv_bfloat16, "bf16")
FUSEDLORA_WGMMA_REGISTERS(__half, "f16")

#undef FUSEDLORA_WGMMA_REGISTERS
#undef FUSEDLORA_WGMMAS_NARROW
#undef FUSEDLORA_WGMMA_NARROW

}  // namespace fusedlora
