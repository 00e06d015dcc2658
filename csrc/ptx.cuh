// Thin wrappers of the PTX instructions that the kernels use. Shared-memory addresses are 32-bit.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fusedlora {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// mbarriers

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier of another block of the cluster, or of this one.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory");
}

// What all threads of a warp have, where the compiler cannot tell that they do: in a uniform register from here on.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// `count` threads of the block meet at barrier `id`, 1 to 15.
__device__ __forceinline__ void meet(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// thread-block clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Writes a word to the same place in every block of the cluster's shared memory.
__device__ __forceinline__ void tell_cluster(uint32_t address, uint32_t value, uint32_t blocks) {
  for (uint32_t rank = 0; rank < blocks; rank++) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nst.shared::cluster.u32 [there], %2;\n}" ::"r"(
                     address),
                 "r"(rank), "r"(value) : "memory");
  }
}

// The same, told by the barrier at the same address of each block, which expects four bytes.
__device__ __forceinline__ void tell_cluster(uint32_t address, uint32_t value, uint32_t barrier, uint32_t blocks) {
  for (uint32_t rank = 0; rank < blocks; rank++) {
    asm volatile(
        "{\n.reg .b32 there, its;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 its, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [its];\n}" ::"r"(address),
        "r"(barrier), "r"(rank), "r"(value) : "memory");
  }
}

__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The two halves of that, for a block that has other things to do meanwhile and no data to show.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// From the same place of a block of the cluster.
__device__ __forceinline__ float4 load_cluster(uint32_t address, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

// Where a launch may begin before the one before it on its stream has ended: the first call lets the next do so, the
// second waits until all that the one before has written is there.

__device__ __forceinline__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// TMA

__device__ __forceinline__ void tma_load(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t inner, int32_t outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(inner), "r"(outer) : "memory");
}

// For what is read once: L2 lets go of it first.
__device__ __forceinline__ void tma_load_once(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t inner, int32_t outer) {
  asm volatile(
      "{\n.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], policy;\n}" ::"r"(to),
      "l"(map), "r"(barrier), "r"(inner), "r"(outer) : "memory");
}

// To the same address of every block in `blocks`, whose barriers at the same address each count the bytes.
__device__ __forceinline__ void tma_multicast(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t inner, int32_t outer, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(inner), "r"(outer), "h"(blocks) : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int32_t inner, int32_t outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(inner),
      "r"(outer) : "memory");
}

__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all stores but the last PENDING commits have read shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void tma_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Ordinary writes, to global memory too, become visible to TMA.
__device__ __forceinline__ void fence_all_to_tma() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Ordinary writes to shared memory become visible to TMA.
__device__ __forceinline__ void fence_to_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// words that programs of one launch synchronise by

__device__ __forceinline__ int claim(int* word) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(word) : "memory");
  return before;
}

__device__ __forceinline__ int arrive(int* word) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(word) : "memory");
  return before;
}

__device__ __forceinline__ void publish(int* word) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(word) : "memory");
}

// The same by a bit, which may be there already.
__device__ __forceinline__ uint32_t arrive_bit(int* word, uint32_t bit) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.or.b32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(bit) : "memory");
  return before;
}

__device__ __forceinline__ void publish_bit(int* word, uint32_t bit) {
  asm volatile("red.release.gpu.global.or.b32 [%0], %1;" ::"l"(word), "r"(bit) : "memory");
}

__device__ __forceinline__ int published(const int* word) {
  int found;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
  return found;
}

// For a whole warp.
__device__ __forceinline__ int published(const int* word, int lane) {
  const int found = lane == 0 ? published(word) : 0;
  __syncwarp();
  return __shfl_sync(0xFFFFFFFFu, found, 0);
}

__device__ __forceinline__ void wait_for(const int* word, int count) {
  while (published(word) < count) {
  }
}

// shared memory

__device__ __forceinline__ uint2 load_shared_half(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ void store_shared_half(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// matrix instructions

template <typename T>
struct Type;

// As the instructions name the types.
#define FUSEDLORA_TYPE(TYPE, NAME, ROUND)                                                                             \
  template <>                                                                                                         \
  struct Type<TYPE> {                                                                                                 \
    __device__ static uint32_t pack(float low, float high) {                                                          \
      uint32_t out;                                                                                                   \
      asm("cvt.rn." NAME "x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));                                     \
      return out;                                                                                                     \
    }                                                                                                                 \
    __device__ static float2 unpack(uint32_t pair) {                                                                  \
      const TYPE* values = reinterpret_cast<const TYPE*>(&pair);                                                      \
      return {float(values[0]), float(values[1])};                                                                    \
    }                                                                                                                 \
    __device__ static TYPE from(float value) { return ROUND(value); }                                                 \
    /* d += a [16, 16] · b [16, 8] */                                                                                 \
    __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                     \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                             \
                   ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                   \
    }                                                                                                                 \
    /* All bits of each half of `word`, a number of 15 bits, that is at least that of `bound`. As long as bounds are  \
       below 0x7C00, what they are as floating-point numbers compares in the same way; NaNs, unordered, are larger. */\
    __device__ static uint32_t reaches(uint32_t word, uint32_t bound) {                                               \
      uint32_t out;                                                                                                   \
      asm("set.geu.u32." NAME "x2 %0, %1, %2;" : "=r"(out) : "r"(word), "r"(bound));                                  \
      return out;                                                                                                     \
    }                                                                                                                 \
  };

FUSEDLORA_TYPE(__nv_bfloat16, "bf16", __float2bfloat16_rn)
FUSEDLORA_TYPE(__half, "f16", __float2half_rn)

#undef FUSEDLORA_TYPE

// A logic function of three, named by what it makes of 0xF0, 0xCC and 0xAA.
template <int FUNCTION>
__device__ __forceinline__ uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(FUNCTION));
  return out;
}

// The same of the halves of a product, which the compiler would not leave at one multiplication, and a third.
template <int FUNCTION>
__device__ __forceinline__ uint32_t fold(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("{\n.reg .b64 product;\n.reg .b32 low, high;\n"
      "mul.wide.u32 product, %1, %2;\nmov.b64 {low, high}, product;\nlop3.b32 %0, low, high, %3, %4;\n}"
      : "=r"(out)
      : "r"(a), "r"(b), "r"(c), "n"(FUNCTION));
  return out;
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d) : "memory");
}

// An 8 × 8 matrix of 16-bit elements, row lane / 4 and columns 2 (lane % 4) and the next in each thread, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A descriptor of shared memory from `offset` bytes behind `address` on. An address has the block's rank in its highest bits;
// the rest is added up in units of 16 bytes, so that steps which differ by constants take an addition each.
__device__ __forceinline__ uint64_t descriptor(uint32_t swizzle, uint32_t stride, uint32_t leading, uint32_t address, int offset) {
  const uint32_t low = ((address & 0x3FFFF) >> 4) + (leading << 12) + offset / 16, high = (swizzle << 30) + (stride >> 4);
  return uint64_t(high) << 32 | low;
}

// A matrix in rows of 128 bytes, swizzled as TMA's 128B mode does it. `leading` bytes lie between column blocks of 64 where
// columns are not what is summed over; 1024 bytes between groups of eight rows.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int offset, uint32_t leading) {
  return descriptor(1, 1024, leading, address, offset);
}

// A matrix in rows of 2 · R = 32, 64 or 128 bytes, swizzled as TMA does it at that width, its depth in rows or across them.
template <int R>
__device__ __forceinline__ uint64_t narrow_descriptor(uint32_t address, int offset) {
  return descriptor(R == 64 ? 1 : R == 32 ? 2 : 3, 16 * R, 16, address, offset);
}

// Step i, of 16 rows of depth, of an operand in boxes of ROWS rows of depth and up to 64 of its R ranks.
template <int R, int ROWS>
__device__ __forceinline__ uint64_t ranks_descriptor(uint32_t address, int i) {
  if constexpr (R > 64) {
    return matrix_descriptor(address, 2048 * i, 128 * ROWS);
  } else {
    return narrow_descriptor<R>(address, 32 * R * i);
  }
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace fusedlora
