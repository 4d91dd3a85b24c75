// The words of PTX that the kernels use, one wrapper each: barriers, asynchronous copies, tensor
// core instructions. No policy. sm_80 words first; those that need sm_90a say so.
//
// Shared memory is named by 32-bit addresses (shared_address), as the instructions want it.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifdef LONGSPAN_CUDA_SPIN_LIMIT
#include <cstdio>
#endif

namespace longspan::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Copies and matrices of sm_80 ----

// 16 bytes from global to shared memory, past L1.
__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source)
               : "memory");
}

// The same, of which only the first `bytes` (0 to 16) are read; the rest is zero.
__device__ __forceinline__ void copy_async_16(uint32_t destination,
                                              const void* source,
                                              uint32_t bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 * i + r gives the address of row r of matrix i.
// Element (row lane / 4, columns 2 * (lane % 4) + {0, 1}) of matrix i arrives in d[i].
__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// d [16][8] += a [16][16] b [16][8], a row by row, b column by column. Rows lane / 4 and
// lane / 4 + 8: d = (row, 2q), (row, 2q + 1), (row + 8, 2q), (row + 8, 2q + 1) with q = lane % 4;
// a = (row, 2q..), (row + 8, 2q..), (row, 2q + 8..), (row + 8, 2q + 8..); b = (2q.., column lane /
// 4), (2q + 8.., column lane / 4).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4],
                                             const uint32_t (&a)[4],
                                             uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4],
                                                            const uint32_t (&a)[4],
                                                            uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4],
                                                     const uint32_t (&a)[4],
                                                     uint32_t b0,
                                                     uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Two floats as two 16-bit elements, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x and log2 x by the special function unit: 2^-inf = 0, a NaN stays NaN.
__device__ __forceinline__ float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float approximate_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A named barrier (1 to 15; 0 is __syncthreads) for `num_threads` threads, whole warps.
__device__ __forceinline__ void named_barrier_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// ---- Barriers in shared memory (sm_90) ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy; then __syncthreads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of asynchronous copies.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// An arrival that happens once this thread's earlier copy_async_16 are done; it is one of the
// arrivals that barrier_init counted.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Whether the phase of this parity is complete; the instruction may wait a while by itself.
__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete != 0;
}

#ifdef LONGSPAN_CUDA_SPIN_LIMIT
// The first wait of this translation unit's kernels that lasted LONGSPAN_CUDA_SPIN_LIMIT clock
// cycles, which is a bug. All waits give up from then on, so that the kernel ends, with a wrong
// result. (No printf and no trap there: a call would serialise wgmma, a trap would end the
// process.)
struct SpinRecord {
  int gave_up;
  int block;
  int thread;
  uint32_t barrier;
  uint32_t parity;
};
static __device__ SpinRecord spin_record;

// After a launch: waits for it, prints the record if there is one and clears it.
static inline void report_spin(const char* kernel) {
  SpinRecord record = {};
  if (cudaDeviceSynchronize() != cudaSuccess ||
      cudaMemcpyFromSymbol(&record, spin_record, sizeof(record)) != cudaSuccess ||
      record.gave_up == 0) {
    return;
  }
  std::printf("%s HANGS: block %d thread %d, barrier at shared address %u, parity %u\n",
              kernel,
              record.block,
              record.thread,
              record.barrier,
              record.parity);
  record = {};
  cudaMemcpyToSymbol(spin_record, &record, sizeof(record));
}
#endif

// Until the phase of this parity is complete. Phases count from 0; a fresh barrier answers parity 1
// at once.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef LONGSPAN_CUDA_SPIN_LIMIT
  const long long start = clock64();
  while (!barrier_try_wait(barrier, parity)) {
    if (*static_cast<volatile int*>(&spin_record.gave_up) != 0) {
      return;
    }
    if (clock64() - start > static_cast<long long>(LONGSPAN_CUDA_SPIN_LIMIT)) {
      if (atomicExch(&spin_record.gave_up, 1) == 0) {
        spin_record.block = static_cast<int>(blockIdx.x);
        spin_record.thread = static_cast<int>(threadIdx.x);
        spin_record.barrier = barrier;
        spin_record.parity = parity;
      }
    }
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

// ---- Asynchronous copies (sm_90) ----

// L2 policies, as createpolicy.fractional encodes them for a fraction of 1.
inline constexpr uint64_t kEvictNormal = 0x1000000000000000;
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000;
inline constexpr uint64_t kEvictLast = 0x14F0000000000000;

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor map at coordinates (c0, c1, c2), innermost first, to shared memory; `barrier`
// counts its bytes. One thread.
__device__ __forceinline__ void copy_tensor_3d(uint32_t destination,
                                               const CUtensorMap* map,
                                               uint32_t barrier,
                                               int32_t c0,
                                               int32_t c1,
                                               int32_t c2,
                                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map),
      "r"(barrier),
      "r"(c0),
      "r"(c1),
      "r"(c2),
      "l"(policy)
      : "memory");
}

__device__ __forceinline__ void copy_tensor_4d(uint32_t destination,
                                               const CUtensorMap* map,
                                               uint32_t barrier,
                                               int32_t c0,
                                               int32_t c1,
                                               int32_t c2,
                                               int32_t c3,
                                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(map),
      "r"(barrier),
      "r"(c0),
      "r"(c1),
      "r"(c2),
      "r"(c3),
      "l"(policy)
      : "memory");
}

// `bytes` contiguous bytes, a multiple of 16 like both addresses; `barrier` counts them. One
// thread.
__device__ __forceinline__ void copy_bulk(
    uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(destination),
      "l"(source),
      "r"(bytes),
      "r"(barrier),
      "l"(policy)
      : "memory");
}

// Orders this thread's ordinary writes to shared memory, and those it has synchronised with,
// before later asynchronous reads (wgmma, bulk stores).
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Dependent launches (sm_90) ----

// Until the kernels that this launch depends on are complete and their writes visible.
__device__ __forceinline__ void wait_for_dependencies() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- Warpgroup matrix instructions (sm_90a) ----

// Moves registers between warpgroups; every warp of the warpgroup runs it.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first wgmma, and after registers of one (accumulators, A) were written otherwise.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across a wgmma_wait.
template <int kCount>
__device__ __forceinline__ void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

// The descriptor of an operand in shared memory with the 128-byte swizzle, in planes of rows of 128
// bytes (64 elements of 16 bits), each plane aligned to 1024 bytes. An instruction of k = 16 reads
//   K-major  (rows are m or n, columns are k): 32 bytes of each row; the next 16 columns are 32
//            bytes on (inside the swizzle's atom), the next 64 in the next plane;
//   MN-major (rows are k, columns are m or n): 16 rows, in planes `plane_bytes` apart; the next 16
//            rows are 2048 bytes on.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t plane_bytes) {
  constexpr uint64_t kEightRows = 1024;
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         (static_cast<uint64_t>((plane_bytes & 0x3FFFF) >> 4) << 16) | ((kEightRows >> 4) << 32) |
         (kSwizzle128 << 62);
}

// A descriptor `bytes` further on.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

#define LONGSPAN_WGMMA_OUT_8(d, i)                                                              \
  "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), \
      "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define LONGSPAN_WGMMA_OUT_32(d, i)                                                                \
  LONGSPAN_WGMMA_OUT_8(d, i), LONGSPAN_WGMMA_OUT_8(d, (i) + 8), LONGSPAN_WGMMA_OUT_8(d, (i) + 16), \
      LONGSPAN_WGMMA_OUT_8(d, (i) + 24)
#define LONGSPAN_WGMMA_OUT_64(d) LONGSPAN_WGMMA_OUT_32(d, 0), LONGSPAN_WGMMA_OUT_32(d, 32)
#define LONGSPAN_WGMMA_REGISTERS_32                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGSPAN_WGMMA_REGISTERS_64                                                         \
  LONGSPAN_WGMMA_REGISTERS_32                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64][N] = a [64][16] b [16][N], plus d if `accumulate`; a and b in shared memory. The columns
// of b are K-major rows of its memory, or with kTransposed b lies as rows of k (MN-major).
// Warp w of the warpgroup has rows 16w + lane / 4 (+ 8): d[4i + 0..3] are
//   (row, 8i + 2q), (row, 8i + 2q + 1), (row + 8, 8i + 2q), (row + 8, 8i + 2q + 1), q = lane % 4.
// The second form has a in registers, four 16 x 16 blocks in the layout of mma_m16n8k16: of two
// neighbouring column blocks i, i + 1 of such a d, pack(d[4i], d[4i+1]), pack(d[4i+2], d[4i+3]),
// pack(d[4i+4], d[4i+5]), pack(d[4i+6], d[4i+7]).
#define LONGSPAN_DEFINE_WGMMA(N, HALF_N, TYPE, PTX_TYPE, P0, P1, P2, P3, P4, P5, P6)           \
  template <bool kTransposed>                                                                  \
  __device__ __forceinline__ void wgmma_m64k16(                                                \
      TYPE, float(&d)[HALF_N], uint64_t a, uint64_t b, bool accumulate) {                      \
    asm volatile(                                                                              \
        "{\n"                                                                                  \
        ".reg .pred p;\n"                                                                      \
        "setp.ne.b32 p, %" P2                                                                  \
        ", 0;\n"                                                                               \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE                \
        " {" LONGSPAN_WGMMA_REGISTERS_##HALF_N "}, %" P0 ", %" P1 ", p, 1, 1, 0, %" P3         \
                                               ";\n"                                           \
                                               "}"                                             \
        : LONGSPAN_WGMMA_OUT_##HALF_N##_ALL(d)                                                 \
        : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)), "n"(kTransposed ? 1 : 0));    \
  }                                                                                            \
  template <bool kTransposed>                                                                  \
  __device__ __forceinline__ void wgmma_m64k16(                                                \
      TYPE, float(&d)[HALF_N], const uint32_t(&a)[4], uint64_t b, bool accumulate) {           \
    asm volatile(                                                                              \
        "{\n"                                                                                  \
        ".reg .pred p;\n"                                                                      \
        "setp.ne.b32 p, %" P5                                                                  \
        ", 0;\n"                                                                               \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE                \
        " {" LONGSPAN_WGMMA_REGISTERS_##HALF_N "}, {%" P0 ", %" P1 ", %" P2 ", %" P3 "}, %" P4 \
                                               ", p, 1, 1, %" P6                               \
                                               ";\n"                                           \
                                               "}"                                             \
        : LONGSPAN_WGMMA_OUT_##HALF_N##_ALL(d)                                                 \
        : "r"(a[0]),                                                                           \
          "r"(a[1]),                                                                           \
          "r"(a[2]),                                                                           \
          "r"(a[3]),                                                                           \
          "l"(b),                                                                              \
          "r"(static_cast<int32_t>(accumulate)),                                               \
          "n"(kTransposed ? 1 : 0));                                                           \
  }
#define LONGSPAN_WGMMA_OUT_32_ALL(d) LONGSPAN_WGMMA_OUT_32(d, 0)
#define LONGSPAN_WGMMA_OUT_64_ALL(d) LONGSPAN_WGMMA_OUT_64(d)

LONGSPAN_DEFINE_WGMMA(64, 32, __nv_bfloat16, "bf16", "32", "33", "34", "35", "36", "37", "38")
LONGSPAN_DEFINE_WGMMA(64, 32, __half, "f16", "32", "33", "34", "35", "36", "37", "38")
LONGSPAN_DEFINE_WGMMA(128, 64, __nv_bfloat16, "bf16", "64", "65", "66", "67", "68", "69", "70")
LONGSPAN_DEFINE_WGMMA(128, 64, __half, "f16", "64", "65", "66", "67", "68", "69", "70")

#undef LONGSPAN_DEFINE_WGMMA
#undef LONGSPAN_WGMMA_OUT_64_ALL
#undef LONGSPAN_WGMMA_OUT_32_ALL
#undef LONGSPAN_WGMMA_REGISTERS_64
#undef LONGSPAN_WGMMA_REGISTERS_32
#undef LONGSPAN_WGMMA_OUT_64
#undef LONGSPAN_WGMMA_OUT_32
#undef LONGSPAN_WGMMA_OUT_8

// ---- Split-KV decode ----

// The 8 x 8 matrix of 16-bit elements of which each lane has (row lane / 4, columns 2 * (lane % 4)
// + {0, 1}), transposed.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t elements) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(elements));
  return transposed;
}

// 8 bytes of shared memory.
__device__ __forceinline__ void load_shared_x2(uint32_t (&d)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(address)
               : "memory");
}

// The barrier of a cluster: each thread of its blocks arrives and later waits for all others. What
// they wrote before they arrived is then visible to it.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Where block `rank` of the cluster has what this block has at a shared address.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, int rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// 8 bytes to a cluster_address.
__device__ __forceinline__ void store_cluster_x2(uint32_t address, float x, float y) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y)
               : "memory");
}

// ---- Search: loads ----

// 16 bytes of global memory that are read once: they take no place in L1.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  uint4 d;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(address)
               : "memory");
  return d;
}

// Brings bytes of global memory to L2: a multiple of 16, like the address (sm_90).
__device__ __forceinline__ void prefetch_bulk(const void* address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

// ---- Sparse decode: clusters ----

// Arrives at the cluster's barrier without making writes visible.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// To a cluster_address, in the background; the barrier, of the block that is written to, counts the
// bytes.
__device__ __forceinline__ void store_cluster_async(uint32_t address,
                                                    uint32_t value,
                                                    uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
      "r"(value),
      "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_cluster_async(uint32_t address,
                                                    uint64_t value,
                                                    uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(address),
      "l"(value),
      "r"(barrier)
      : "memory");
}

// barrier_arrive_expect at the barrier of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_expect_cluster(uint32_t barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

// To a cluster_address.
__device__ __forceinline__ void store_cluster(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

}  // namespace longspan::cuda::ptx
