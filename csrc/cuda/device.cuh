// The device instructions and runtime calls used by the kernels. Only this file distinguishes between nvcc and, for
// tests, a C++ compiler (CORRECTNET_SHIM), for which model/shim.h models each of them on the host.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "noise/noise.h"

// For mutation tests, which compile the kernels with one deliberate fault at a time and must then fail. n is a fault
// listed in csrc/tests/CMakeLists.txt, or 0 for none.
#if !defined(CORRECTNET_MUTANT)
#define CORRECTNET_MUTANT 0
#endif
#define CN_MUTANT(n) (CORRECTNET_MUTANT == (n))

#if defined(CORRECTNET_SHIM)

#include "cuda/model/shim.h"

#else

#include <cuda_runtime.h>

#define CN_DEVICE __device__ __forceinline__
#define CN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define CN_CONSTANT __device__ const
#define CN_ARGUMENTS(type) const __grid_constant__ type

namespace correctnet {
namespace cuda {

CN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

CN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies kBytes (4, 8 or 16) to shared memory without using registers, zeros where `source` is not valid. The copy is
// visible to this thread after `cp_async_wait` and to others after the next barrier. Copies of 16 bytes bypass the
// first-level cache, which the input does not fit.
template <int kBytes>
CN_DEVICE void cp_async(void* shared, const void* source, bool valid) {
  const int size = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(size)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(source),
                 "n"(kBytes), "r"(size)
                 : "memory");
}

CN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies except the last kPending.
template <int kPending>
CN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lanes 8 i ... 8 i + 7 hold the rows of matrix i, and lane l receives bytes
// 4 (l % 4) ... of row l / 4 of each.
CN_DEVICE void ldmatrix(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a of 16 x 16 and b of 16 x 8 bfloat16, spread over a warp as the PTX ISA's tables for mma.m16n8k16 say.
CN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds two numbers to bfloat16, the first in the low half.
CN_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The maximum, or NaN if either number is NaN, as in torch.
CN_DEVICE float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

template <class T>
CN_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffff, value, lanes);
}

// 16 or 8 bytes at once, from where they are aligned.
template <class Vector>
CN_DEVICE const Vector* vector_at(const void* p) {
  return static_cast<const Vector*>(p);
}
template <class Vector>
CN_DEVICE Vector* vector_at(void* p) {
  return static_cast<Vector*>(p);
}

}  // namespace cuda
}  // namespace correctnet

#endif

namespace correctnet {
namespace cuda {

// Whether the current device has code for a kernel.
template <class Arguments>
cudaError_t probe(void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

// Allows a kernel all the shared memory that a block of the current device may have. Always the same number: with the
// size of one launch, a host thread could lower the limit that another is about to launch with.
template <class Arguments>
cudaError_t allow_shared(void (*kernel)(Arguments), int most) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Returns the error of this launch only; with <<<>>>, an earlier error of other code would be found.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   const Arguments& arguments) {
  void* addresses[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernel(kernel, grid, dim3{unsigned(threads), 1, 1}, addresses, shared, stream);
}

}  // namespace cuda
}  // namespace correctnet
