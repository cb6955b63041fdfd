// GroupNorm + ReLU as TensorFlow OpKernels on CPU: validate, allocate, call group_norm_cpu.

#include "op_kernel_cpu.h"  // first: it sets up Eigen

#include <new>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "group_norm_cpu.h"
#include "group_norm_op_inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"

namespace tensorflow {
namespace {

tfmtseg::GroupNormProblem ProblemOf(const tfmtseg::GroupNormInputs& inputs) {
  tfmtseg::GroupNormProblem problem = {};
  problem.gamma = inputs.gamma;
  problem.beta = inputs.beta;
  problem.n = inputs.n;
  problem.voxels = inputs.voxels;
  problem.channels = inputs.channels;
  problem.groups = inputs.groups;
  return problem;
}

// The CPU code reads and writes float and bfloat16; half goes through float.
template <typename T>
constexpr bool kAsItIs = !std::is_same_v<T, Eigen::half>;

template <typename T>
absl::Status Input(OpKernelContext* context, int index, Tensor* buffer, const void** data) {
  if constexpr (kAsItIs<T>) {
    *data = context->input(index).data();
    return absl::OkStatus();
  } else {
    const float* values;
    TF_RETURN_IF_ERROR(tfmtseg::AsFloat<T>(context, context->input(index), buffer, &values));
    *data = values;
    return absl::OkStatus();
  }
}

// The first output, which takes the memory of the first input where nobody else needs that.
template <typename T>
class FirstOutput {
 public:
  absl::Status Allocate(OpKernelContext* context) {
    const TensorShape& shape = context->input(0).shape();
    if constexpr (kAsItIs<T>) {
      Tensor* output;
      TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output({0}, 0, shape, &output));
      data_ = output->data();
    } else {
      TF_RETURN_IF_ERROR(as_float_.Allocate(context, 0, shape));
      data_ = as_float_.data();
    }
    return absl::OkStatus();
  }

  void* data() { return data_; }

  void Finish(OpKernelContext* context) {
    if constexpr (!kAsItIs<T>) as_float_.Finish(context);
  }

 private:
  void* data_ = nullptr;
  tfmtseg::FloatOutput<T> as_float_;
};

void NotEnoughMemory(OpKernelContext* context, const Tensor& x) {
  context->CtxFailure(absl::ResourceExhaustedError(absl::StrCat(
      "group_norm_relu: not enough memory for x of shape ", tfmtseg::ShapeOf(x))));
}

template <typename T>
class GroupNormReluOp : public OpKernel {
 public:
  explicit GroupNormReluOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("groups", &groups_));
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
  }

  void Compute(OpKernelContext* context) override {
    tfmtseg::GroupNormInputs inputs;
    OP_REQUIRES_OK(context, tfmtseg::ReadGroupNormInputs(context, 0, groups_, &inputs));
    tfmtseg::GroupNormProblem problem = ProblemOf(inputs);
    problem.is_bfloat16 = std::is_same_v<T, bfloat16>;
    Tensor buffer;
    OP_REQUIRES_OK(context, Input<T>(context, 0, &buffer, &problem.x));
    FirstOutput<T> y;
    Tensor *mean = nullptr, *rstd = nullptr;
    const TensorShape statistics({inputs.n, inputs.groups});
    OP_REQUIRES_OK(context, y.Allocate(context));
    OP_REQUIRES_OK(context, context->allocate_output(1, statistics, &mean));
    OP_REQUIRES_OK(context, context->allocate_output(2, statistics, &rstd));
    tfmtseg::Workspace workspace(context);
    try {
      tfmtseg::GroupNormReluCpu(problem, epsilon_, tfmtseg::ParallelForOf(context),
                                workspace.allocate(), y.data(), mean->flat<float>().data(),
                                rstd->flat<float>().data());
    } catch (const std::bad_alloc&) {
      return NotEnoughMemory(context, context->input(0));
    }
    y.Finish(context);
  }

 private:
  int64_t groups_;
  float epsilon_;
};

template <typename T>
class GroupNormReluGradientsOp : public OpKernel {
 public:
  explicit GroupNormReluGradientsOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    tfmtseg::GroupNormInputs inputs;
    OP_REQUIRES_OK(context, tfmtseg::ReadGroupNormGradientInputs(context, &inputs));
    tfmtseg::GroupNormProblem problem = ProblemOf(inputs);
    problem.is_bfloat16 = std::is_same_v<T, bfloat16>;
    Tensor x_buffer, upstream_buffer;
    const void* upstream;
    OP_REQUIRES_OK(context, Input<T>(context, 0, &upstream_buffer, &upstream));
    OP_REQUIRES_OK(context, Input<T>(context, 1, &x_buffer, &problem.x));
    FirstOutput<T> grad_x;
    Tensor *grad_gamma = nullptr, *grad_beta = nullptr;
    const TensorShape vector({inputs.channels});
    OP_REQUIRES_OK(context, grad_x.Allocate(context));
    OP_REQUIRES_OK(context, context->allocate_output(1, vector, &grad_gamma));
    OP_REQUIRES_OK(context, context->allocate_output(2, vector, &grad_beta));
    tfmtseg::Workspace workspace(context);
    try {
      tfmtseg::GroupNormReluGradientsCpu(
          problem, upstream, context->input(4).flat<float>().data(),
          context->input(5).flat<float>().data(), tfmtseg::ParallelForOf(context),
          workspace.allocate(), grad_x.data(), grad_gamma->flat<float>().data(),
          grad_beta->flat<float>().data());
    } catch (const std::bad_alloc&) {
      return NotEnoughMemory(context, context->input(1));
    }
    grad_x.Finish(context);
  }
};

#define TFMTSEG_REGISTER(T)                                                                 \
  REGISTER_KERNEL_BUILDER(                                                                  \
      Name("TfmtsegGroupNormRelu").Device(DEVICE_CPU).TypeConstraint<T>("T"),               \
      GroupNormReluOp<T>);                                                                  \
  REGISTER_KERNEL_BUILDER(                                                                  \
      Name("TfmtsegGroupNormReluGradients").Device(DEVICE_CPU).TypeConstraint<T>("T"),      \
      GroupNormReluGradientsOp<T>);
TFMTSEG_REGISTER(float)
TFMTSEG_REGISTER(Eigen::half)
TFMTSEG_REGISTER(bfloat16)
#undef TFMTSEG_REGISTER

}  // namespace
}  // namespace tensorflow
