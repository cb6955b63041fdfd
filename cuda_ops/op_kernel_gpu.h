// What the OpKernels on GPU have in common: TensorFlow's stream, memory and types as the launchers
// take them.

#ifndef TFMTSEG_OP_KERNEL_GPU_H_
#define TFMTSEG_OP_KERNEL_GPU_H_

#include <cstdint>
#include <type_traits>

#include "cuda_types.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/stream_executor/stream.h"

namespace tfmtseg {

template <typename T>
constexpr DataType kDataTypeOf = std::is_same_v<T, float>         ? DataType::kFloat32
                                 : std::is_same_v<T, Eigen::half> ? DataType::kFloat16
                                                                  : DataType::kBFloat16;

inline CUstream_st* StreamOf(tensorflow::OpKernelContext* context) {
  return static_cast<CUstream_st*>(
      context->op_device_context()->stream()->platform_specific_handle().stream);
}

// Memory on the device for the time of one call.
inline absl::Status Temporary(tensorflow::OpKernelContext* context, int64_t bytes,
                              tensorflow::Tensor* tensor, void** data) {
  TF_RETURN_IF_ERROR(
      context->allocate_temp(tensorflow::DT_INT8, tensorflow::TensorShape({bytes}), tensor));
  *data = tensor->data();
  return absl::OkStatus();
}

}  // namespace tfmtseg

#endif  // TFMTSEG_OP_KERNEL_GPU_H_
