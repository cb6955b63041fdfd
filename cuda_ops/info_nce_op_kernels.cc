// InfoNCE as TensorFlow OpKernels on CPU: validate, allocate, call info_nce_cpu.

#include "op_kernel_cpu.h"  // first: it sets up Eigen

#include <new>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "info_nce_cpu.h"
#include "info_nce_op_inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"

namespace tensorflow {
namespace {

// TensorFlow's inputs as the CPU code takes them; `queries` and `keys` are set by the kernel.
absl::Status ReadProblem(OpKernelContext* context, const tfmtseg::InfoNceInputReader& reader,
                         tfmtseg::InfoNceInputs* inputs, tfmtseg::InfoNceProblem* problem) {
  TF_RETURN_IF_ERROR(reader.Read(context, inputs));
  *problem = {};
  problem->n = inputs->n;
  problem->m = inputs->m;
  problem->d = inputs->d;
  problem->temperature = inputs->temperature;
  problem->query_ids = inputs->query_ids;
  problem->key_ids = inputs->key_ids;
  problem->key_mask = inputs->key_mask;
  if (reader.by_label()) {
    problem->query_labels = inputs->positives;
    problem->key_labels = inputs->key_labels;
    return absl::OkStatus();
  }
  problem->positives = inputs->positives;
  for (int64_t i = 0; i < inputs->n; ++i) {
    if (inputs->positives[i] < inputs->m) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("positives: value ", i, " is ", inputs->positives[i], ", must be less than ",
                     inputs->m, ", the rows of keys"));
  }
  return absl::OkStatus();
}

template <typename T, bool gradients>
class InfoNceOp : public OpKernel {
 public:
  explicit InfoNceOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, reader_.Construct(context));
  }

  void Compute(OpKernelContext* context) override {
    tfmtseg::InfoNceInputs inputs;
    tfmtseg::InfoNceProblem problem;
    OP_REQUIRES_OK(context, ReadProblem(context, reader_, &inputs, &problem));
    Tensor query_buffer, key_buffer;
    OP_REQUIRES_OK(context, tfmtseg::AsFloat<T>(context, context->input(0), &query_buffer,
                                                &problem.queries));
    OP_REQUIRES_OK(
        context, tfmtseg::AsFloat<T>(context, context->input(1), &key_buffer, &problem.keys));
    problem.is_bfloat16 = std::is_same_v<T, bfloat16>;

    tfmtseg::InfoNceResult result = {};
    result.with_gradients = gradients;
    Tensor *losses = nullptr, *temperature = nullptr;
    tfmtseg::FloatOutput<T> by_queries, by_keys;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({problem.n}), &losses));
    result.losses = losses->flat<float>().data();
    if constexpr (gradients) {
      result.row_weights = inputs.row_weights;
      OP_REQUIRES_OK(context, by_queries.Allocate(context, 1, context->input(0).shape()));
      OP_REQUIRES_OK(context, by_keys.Allocate(context, 2, context->input(1).shape()));
      OP_REQUIRES_OK(context, context->allocate_output(3, TensorShape({}), &temperature));
      result.grad_queries = by_queries.data();
      result.grad_keys = by_keys.data();
      result.grad_temperature = temperature->flat<float>().data();
    }
    tfmtseg::Workspace workspace(context);
    try {
      tfmtseg::InfoNceCpu(problem, tfmtseg::ParallelForOf(context), workspace.allocate(), result);
    } catch (const std::bad_alloc&) {
      context->CtxFailure(absl::ResourceExhaustedError(
          absl::StrCat("info_nce: not enough memory for queries of shape ",
                          tfmtseg::ShapeOf(context->input(0)), " and keys of shape ",
                          tfmtseg::ShapeOf(context->input(1)))));
      return;
    }
    if constexpr (gradients) {
      by_queries.Finish(context);
      by_keys.Finish(context);
    }
  }

 private:
  tfmtseg::InfoNceInputReader reader_;
};

#define TFMTSEG_REGISTER(T)                                                                \
  REGISTER_KERNEL_BUILDER(                                                                 \
      Name("TfmtsegInfoNce").Device(DEVICE_CPU).TypeConstraint<T>("T"), InfoNceOp<T, false>); \
  REGISTER_KERNEL_BUILDER(                                                                 \
      Name("TfmtsegInfoNceWithGradients").Device(DEVICE_CPU).TypeConstraint<T>("T"),       \
      InfoNceOp<T, true>);
TFMTSEG_REGISTER(float)
TFMTSEG_REGISTER(Eigen::half)
TFMTSEG_REGISTER(bfloat16)
#undef TFMTSEG_REGISTER

}  // namespace
}  // namespace tensorflow
