// Common parts of the CUDA kernels: number types, 16-byte vectors, sums over threads, launches on the current stream.
//
// The kernels use only CUDA features that tests/lib/emulation/cuda.h has too, so that the tests can run them on a CPU.
#pragma once

#include "../common.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace megamm {

#ifdef __CUDACC__
#define MEGAMM_INLINE __device__ __forceinline__
using BFloat16 = __nv_bfloat16;
using Half = __half;
__device__ __forceinline__ float load(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float load(Half x) { return __half2float(x); }
__device__ __forceinline__ void store(BFloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(Half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(uint8_t x) { return float(x); }
__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(double& to, double x) { to = x; }
__device__ __forceinline__ float inverse_sqrt(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_sqrt(double x) { return rsqrt(x); }
#endif

}  // namespace megamm

// Included after the number types, which it uses.
#include "../dispatch.h"

namespace megamm {

// N numbers that are moved by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T items[N];
};

// Numbers in 16 bytes, the widest memory access.
template <class T>
constexpr int kPerVector = 16 / sizeof(T);

constexpr int kWarp = 32;

// Sum over groups of `kGroup` neighbouring threads of a warp, on every thread of the group. All threads of the warp
// must call it.
template <int kGroup, class C>
__device__ __forceinline__ C sum_in_warp(C value) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over the kThreads threads of a block, on every thread, always in the same order. All threads must call it.
// `scratch` holds kThreads / 32 numbers in shared memory and can be reused after the next __syncthreads.
template <int kThreads, class C>
__device__ __forceinline__ C sum_in_block(C value, C* scratch) {
  value = sum_in_warp<kWarp>(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  C total = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += scratch[warp];
  return total;
}

// Adds partial sums [blocks, width] in order, 32 columns per thread block of 256, eight threads per column.
template <class C, class T>
__global__ void __launch_bounds__(256) add_partial(const C* partial, int64_t blocks, int64_t width, T* to) {
  __shared__ C sums[8][kWarp + 1];
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  C total = 0;
  if (column < width)
    for (int64_t block = part; block < blocks; block += 8) total += partial[block * width + column];
  sums[part][lane] = total;
  __syncthreads();
  if (part > 0 || column >= width) return;
  for (int other = 1; other < 8; ++other) total += sums[other][lane];
  store(to[column], total);
}

#ifdef __CUDACC__
// Launches the kernel on the current stream of the device that the caller's guard has made current.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const Tensor& on,
            Arguments... arguments) {
  if (blocks == 0) return;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Number of blocks of this kernel that run at the same time on the whole device, at least 1.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes, const Tensor& on) {
  int per_processor = 0, processors = 0;
  if (shared_bytes > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, on.get_device_index()));
  return std::max(1, per_processor) * int64_t(processors);
}

using torch::stable::accelerator::DeviceGuard;

// Dynamic shared memory, as an array of C.
template <class C>
__device__ __forceinline__ C* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<C*>(dynamic_shared_bytes);
}
#endif

// Whether rows of this tensor (with one stride) can be read in 16-byte vectors. This depends on the address, not only
// on the shape: a view can start anywhere.
inline bool is_vectorisable(const Tensor& t) {
  const int64_t per_vector = 16 / int64_t(t.element_size());
  return t.size(t.dim() - 1) % per_vector == 0 && row_stride(t) % per_vector == 0 &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

}  // namespace megamm
