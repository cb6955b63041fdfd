// What the launchers of all ops name. Plain C++: needs neither CUDA nor TensorFlow headers.
#ifndef TFMTSEG_CUDA_OPS_CUDA_TYPES_H_
#define TFMTSEG_CUDA_OPS_CUDA_TYPES_H_

struct CUstream_st;  // cudaStream_t is CUstream_st*

namespace tfmtseg {

enum class DataType { kFloat32, kFloat16, kBFloat16 };

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_CUDA_TYPES_H_
