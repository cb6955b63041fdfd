// GroupNorm + ReLU on CUDA. Plain C++: needs neither CUDA nor TensorFlow headers.
//
//   y = relu(gamma * (x - mean) * rstd + beta),   rstd = 1 / sqrt(variance + epsilon)
//
// where a volume's group of neighbouring channels shares mean and variance. Statistics and
// arithmetic are float32 at any type of x. The same call on the same device gives the same bits.
// NaN and infinity propagate within their group. n = 0 or voxels = 0 is allowed.
//
// All pointers are device pointers, arrays are contiguous. Work is queued on `stream`; nothing
// waits, nothing is allocated. Every function returns a CUDA error code, 0 for success.
#ifndef TFMTSEG_CUDA_OPS_GROUP_NORM_CUDA_H_
#define TFMTSEG_CUDA_OPS_GROUP_NORM_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "cuda_types.h"

namespace tfmtseg {

struct GroupNormArguments {
  DataType type;       // of x, y and their gradients
  const void* x;       // [n, voxels, channels]
  const float* gamma;  // [channels]
  const float* beta;   // [channels]
  int64_t n;
  int64_t voxels;
  int64_t channels;  // at least 1
  int64_t groups;    // at least 1, divides channels
};

// Bytes of workspace the launchers below need, 256-byte aligned. Asks no device. 0 if the
// arguments are invalid.
size_t GroupNormWorkspaceSize(const GroupNormArguments& arguments);

//   y [n, voxels, channels]: of `type`, and perhaps x itself; mean, rstd: float32 [n, groups].
int GroupNormReluForward(CUstream_st* stream, const GroupNormArguments& arguments, float epsilon,
                         void* y, float* mean, float* rstd, void* workspace,
                         size_t workspace_size);

// Gradients, from what GroupNormReluForward returned.
//   upstream, grad_x [n, voxels, channels]: of `type`, and perhaps the same array;
//   grad_gamma, grad_beta: float32 [channels].
int GroupNormReluBackward(CUstream_st* stream, const GroupNormArguments& arguments,
                          const void* upstream, const float* mean, const float* rstd,
                          void* grad_x, float* grad_gamma, float* grad_beta, void* workspace,
                          size_t workspace_size);

// What a returned error code means; a static string.
const char* GroupNormErrorString(int error);

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_GROUP_NORM_CUDA_H_
