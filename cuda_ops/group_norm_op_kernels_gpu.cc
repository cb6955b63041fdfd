// GroupNorm + ReLU as TensorFlow OpKernels on GPU: validate, allocate, queue group_norm_cuda on
// TensorFlow's stream.

#include "absl/strings/str_cat.h"
#include "group_norm_cuda.h"
#include "group_norm_op_inputs.h"
#include "op_kernel_gpu.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"

namespace tensorflow {
namespace {

absl::Status ToStatus(int error) {
  if (error == 0) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("group_norm_relu: ", tfmtseg::GroupNormErrorString(error)));
}

template <typename T>
tfmtseg::GroupNormArguments ArgumentsOf(const Tensor& x, const tfmtseg::GroupNormInputs& inputs) {
  tfmtseg::GroupNormArguments arguments = {};
  arguments.type = tfmtseg::kDataTypeOf<T>;
  arguments.x = x.data();
  arguments.gamma = inputs.gamma;
  arguments.beta = inputs.beta;
  arguments.n = inputs.n;
  arguments.voxels = inputs.voxels;
  arguments.channels = inputs.channels;
  arguments.groups = inputs.groups;
  return arguments;
}

template <typename T>
class GroupNormReluGpuOp : public OpKernel {
 public:
  explicit GroupNormReluGpuOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("groups", &groups_));
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    tfmtseg::GroupNormInputs inputs;
    OP_REQUIRES_OK(context, tfmtseg::ReadGroupNormInputs(context, 0, groups_, &inputs));
    const tfmtseg::GroupNormArguments arguments = ArgumentsOf<T>(x, inputs);
    Tensor *y = nullptr, *mean = nullptr, *rstd = nullptr;
    const TensorShape statistics({inputs.n, inputs.groups});
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, x.shape(), &y));
    OP_REQUIRES_OK(context, context->allocate_output(1, statistics, &mean));
    OP_REQUIRES_OK(context, context->allocate_output(2, statistics, &rstd));
    const size_t size = tfmtseg::GroupNormWorkspaceSize(arguments);
    Tensor memory;
    void* workspace;
    OP_REQUIRES_OK(context, tfmtseg::Temporary(context, size, &memory, &workspace));
    OP_REQUIRES_OK(context, ToStatus(tfmtseg::GroupNormReluForward(
                                tfmtseg::StreamOf(context), arguments, epsilon_, y->data(),
                                mean->flat<float>().data(), rstd->flat<float>().data(), workspace,
                                size)));
  }

 private:
  int64_t groups_;
  float epsilon_;
};

template <typename T>
class GroupNormReluGradientsGpuOp : public OpKernel {
 public:
  explicit GroupNormReluGradientsGpuOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const Tensor& upstream = context->input(0);
    tfmtseg::GroupNormInputs inputs;
    OP_REQUIRES_OK(context, tfmtseg::ReadGroupNormGradientInputs(context, &inputs));
    const tfmtseg::GroupNormArguments arguments = ArgumentsOf<T>(context->input(1), inputs);
    const void* gradient = upstream.data();
    Tensor *grad_x = nullptr, *grad_gamma = nullptr, *grad_beta = nullptr;
    const TensorShape vector({inputs.channels});
    OP_REQUIRES_OK(context,
                   context->forward_input_or_allocate_output({0}, 0, upstream.shape(), &grad_x));
    OP_REQUIRES_OK(context, context->allocate_output(1, vector, &grad_gamma));
    OP_REQUIRES_OK(context, context->allocate_output(2, vector, &grad_beta));
    const size_t size = tfmtseg::GroupNormWorkspaceSize(arguments);
    Tensor memory;
    void* workspace;
    OP_REQUIRES_OK(context, tfmtseg::Temporary(context, size, &memory, &workspace));
    OP_REQUIRES_OK(context,
                   ToStatus(tfmtseg::GroupNormReluBackward(
                       tfmtseg::StreamOf(context), arguments, gradient,
                       context->input(4).flat<float>().data(),
                       context->input(5).flat<float>().data(), grad_x->data(),
                       grad_gamma->flat<float>().data(), grad_beta->flat<float>().data(),
                       workspace, size)));
  }
};

#define TFMTSEG_REGISTER(T)                                                            \
  REGISTER_KERNEL_BUILDER(                                                             \
      Name("TfmtsegGroupNormRelu").Device(DEVICE_GPU).TypeConstraint<T>("T"),          \
      GroupNormReluGpuOp<T>);                                                          \
  REGISTER_KERNEL_BUILDER(                                                             \
      Name("TfmtsegGroupNormReluGradients").Device(DEVICE_GPU).TypeConstraint<T>("T"), \
      GroupNormReluGradientsGpuOp<T>);
TFMTSEG_REGISTER(float)
TFMTSEG_REGISTER(Eigen::half)
TFMTSEG_REGISTER(bfloat16)
#undef TFMTSEG_REGISTER

}  // namespace
}  // namespace tensorflow
