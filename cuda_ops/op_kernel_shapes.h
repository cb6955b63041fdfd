// What the OpKernels of both devices say about shapes.

#ifndef TFMTSEG_OP_KERNEL_SHAPES_H_
#define TFMTSEG_OP_KERNEL_SHAPES_H_

#include <string>

#include "tensorflow/core/framework/tensor.h"

namespace tfmtseg {

inline std::string ShapeOf(const tensorflow::Tensor& tensor) {
  return tensor.shape().DebugString();
}

}  // namespace tfmtseg

#endif  // TFMTSEG_OP_KERNEL_SHAPES_H_
