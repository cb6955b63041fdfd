#include "probe_cuda.h"

namespace tfmtseg {
namespace {

__global__ void TwiceKernel(const float* x, float* twice, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) twice[i] = 2 * x[i];
}

}  // namespace

const char* TwiceOnGpu(void* stream, const float* x, float* twice, int64_t n) {
  if (n == 0) return nullptr;
  TwiceKernel<<<(n + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(x, twice, n);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tfmtseg
