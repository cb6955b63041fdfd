// What the GroupNorm + ReLU ops on CPU and GPU have in common: reading and checking their inputs.

#ifndef TFMTSEG_GROUP_NORM_OP_INPUTS_H_
#define TFMTSEG_GROUP_NORM_OP_INPUTS_H_

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "op_kernel_shapes.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace tfmtseg {

// Sizes, and where the small things are; see group_norm_ops.cc.
struct GroupNormInputs {
  int64_t n, voxels, channels, groups;
  const float* gamma;
  const float* beta;
};

// Reads x, gamma and beta, which are inputs `first` to `first + 2`. Looks at no value.
inline absl::Status ReadGroupNormInputs(tensorflow::OpKernelContext* context, int first,
                                        int64_t groups, GroupNormInputs* inputs) {
  const tensorflow::Tensor& x = context->input(first);
  if (x.dims() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("x: shape is ", ShapeOf(x), ", must be [batch, ..., channels]"));
  }
  inputs->n = x.dim_size(0);
  inputs->channels = x.dim_size(x.dims() - 1);
  inputs->voxels = 1;
  for (int axis = 1; axis < x.dims() - 1; ++axis) inputs->voxels *= x.dim_size(axis);
  inputs->groups = groups;
  if (inputs->channels < 1 || groups < 1 || inputs->channels % groups != 0) {
    return absl::InvalidArgumentError(absl::StrCat("groups: value is ", groups, ", must divide ",
                                                   inputs->channels, ", the channels of x"));
  }
  const char* const names[] = {"gamma", "beta"};
  for (int i = 0; i < 2; ++i) {
    const tensorflow::Tensor& vector = context->input(first + 1 + i);
    if (vector.dims() != 1 || vector.dim_size(0) != inputs->channels) {
      return absl::InvalidArgumentError(absl::StrCat(names[i], ": shape is ", ShapeOf(vector),
                                                     ", must be [", inputs->channels, "]"));
    }
  }
  inputs->gamma = context->input(first + 1).flat<float>().data();
  inputs->beta = context->input(first + 2).flat<float>().data();
  return absl::OkStatus();
}

// Reads the inputs of the gradients: the same, and around them upstream, mean and rstd.
inline absl::Status ReadGroupNormGradientInputs(tensorflow::OpKernelContext* context,
                                                GroupNormInputs* inputs) {
  const tensorflow::Tensor& upstream = context->input(0);
  const tensorflow::Tensor& x = context->input(1);
  const tensorflow::Tensor& mean = context->input(4);
  const tensorflow::Tensor& rstd = context->input(5);
  if (upstream.shape() != x.shape()) {
    return absl::InvalidArgumentError(absl::StrCat("upstream, x: shapes are ", ShapeOf(upstream),
                                                   " and ", ShapeOf(x), ", must be the same"));
  }
  if (mean.dims() != 2 || rstd.shape() != mean.shape()) {
    return absl::InvalidArgumentError(absl::StrCat("mean, rstd: shapes are ", ShapeOf(mean),
                                                   " and ", ShapeOf(rstd),
                                                   ", must be [batch, groups]"));
  }
  TF_RETURN_IF_ERROR(ReadGroupNormInputs(context, 1, mean.dim_size(1), inputs));
  if (mean.dim_size(0) != inputs->n) {
    return absl::InvalidArgumentError(
        absl::StrCat("mean: shape is ", ShapeOf(mean), ", must be [", inputs->n, ", groups]"));
  }
  return absl::OkStatus();
}

}  // namespace tfmtseg

#endif  // TFMTSEG_GROUP_NORM_OP_INPUTS_H_
