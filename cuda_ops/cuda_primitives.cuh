// The few CUDA features the kernels use beyond plain C++, each behind a function of its own, so
// that cuda_emulation.h can replace them where the kernels are compiled for the CPU.
#ifndef TFMTSEG_CUDA_OPS_CUDA_PRIMITIVES_CUH_
#define TFMTSEG_CUDA_OPS_CUDA_PRIMITIVES_CUH_

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef TFMTSEG_CUDA_EMULATION
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Tensor cores with bfloat16, ldmatrix and cp.async came with compute capability 8.0. The host
// side asks the device before it launches a kernel that needs them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TFMTSEG_HAS_TENSOR_CORES 1
#else
#define TFMTSEG_HAS_TENSOR_CORES 0
#endif

namespace tfmtseg {

// Two blocks for each multiprocessor of a large device. A constant, so that the size of the
// workspace and the bits of the results do not depend on the device.
inline int64_t BlocksWanted() { return 264; }

// Queues one kernel; returns a CUDA error code.
template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           CUstream_st* stream, const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // else the next launch would report it again
      return error;
    }
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

__device__ inline unsigned char* DynamicShared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return dynamic_shared;
}

#if TFMTSEG_HAS_TENSOR_CORES

// Copies 16 bytes from global to shared memory in the background; zeros unless `valid`.
__device__ inline void CopyAsync16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}

// Waits for all copies this thread has begun.
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void LoadMatrices(uint32_t (&matrices)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

__device__ inline void LoadMatricesTransposed(uint32_t (&matrices)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// c [16, 8] += a [16, 16] * b [16, 8], in the register layout of mma.sync m16n8k16.
template <typename T>
__device__ inline void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1);

template <>
__device__ inline void MultiplyAccumulate<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void MultiplyAccumulate<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // TFMTSEG_HAS_TENSOR_CORES

// Two numbers, rounded to T, in one register: the first in the low half.
template <typename T>
__device__ inline uint32_t PackPair(float first, float second);

template <>
__device__ inline uint32_t PackPair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ inline uint32_t PackPair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_EMULATION

namespace tfmtseg {

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(__half x) { return __half2float(x); }
__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

constexpr unsigned kFullWarp = 0xffffffffu;

// Sum over the 32 lanes, the same bits in each.
__device__ inline float WarpSum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_CUDA_PRIMITIVES_CUH_
