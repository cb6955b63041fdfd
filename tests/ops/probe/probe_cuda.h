#ifndef TFMTSEG_PROBE_CUDA_H_
#define TFMTSEG_PROBE_CUDA_H_

#include <cstdint>

namespace tfmtseg {

// Writes 2 * x[0..n) on a cudaStream_t; returns what went wrong, or null.
const char* TwiceOnGpu(void* stream, const float* x, float* twice, int64_t n);

}  // namespace tfmtseg

#endif  // TFMTSEG_PROBE_CUDA_H_
