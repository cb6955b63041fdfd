// GroupNorm and ReLU on CPU. No TensorFlow header here or in the files that include this one.

#ifndef TFMTSEG_GROUP_NORM_CPU_H_
#define TFMTSEG_GROUP_NORM_CPU_H_

#include <cstdint>

#include "cpu_runtime.h"

namespace tfmtseg {

// y = relu(gamma * (x - mean) * rstd + beta), where a volume's group of neighbouring channels
// shares mean and rstd = 1 / sqrt(variance + epsilon).
struct GroupNormProblem {
  const void* x;  // [n, voxels, channels], float or, with is_bfloat16, bfloat16
  bool is_bfloat16;
  const float* gamma;  // [channels]
  const float* beta;   // [channels]
  int64_t n, voxels, channels;
  int64_t groups;  // at least 1, divides channels
};

// Both functions: the same bits at any number of threads. Throw std::bad_alloc. The instruction
// set is chosen at run time, see cpu_runtime.h.

// y: of the shape and type of x, and perhaps x itself. mean, rstd: [n, groups].
void GroupNormReluCpu(const GroupNormProblem& problem, float epsilon,
                      const ParallelFor& parallel_for, const Allocate& allocate, void* y,
                      float* mean, float* rstd);

// Gradients of what the forward pass made, with its mean and rstd.
//   upstream: of the shape and type of x; grad_x: the same, and perhaps `upstream` itself;
//   grad_gamma, grad_beta: [channels].
void GroupNormReluGradientsCpu(const GroupNormProblem& problem, const void* upstream,
                               const float* mean, const float* rstd,
                               const ParallelFor& parallel_for, const Allocate& allocate,
                               void* grad_x, float* grad_gamma, float* grad_beta);

// What one instruction set gives.
struct GroupNormCode {
  decltype(&GroupNormReluCpu) forward;
  decltype(&GroupNormReluGradientsCpu) gradients;
};

}  // namespace tfmtseg

#endif  // TFMTSEG_GROUP_NORM_CPU_H_
