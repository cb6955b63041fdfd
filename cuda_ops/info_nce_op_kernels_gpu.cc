// InfoNCE as TensorFlow OpKernels on GPU: validate, allocate, queue info_nce_cuda on TensorFlow's
// stream. Comparing by label has no kernel here; TensorFlow places such an op on the CPU.

#include "absl/strings/str_cat.h"
#include "info_nce_cuda.h"
#include "info_nce_op_inputs.h"
#include "op_kernel_gpu.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"

namespace tensorflow {
namespace {

absl::Status ToStatus(int error) {
  if (error == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("info_nce: ", tfmtseg::InfoNceErrorString(error)));
}

template <typename T, bool gradients>
class InfoNceGpuOp : public OpKernel {
 public:
  explicit InfoNceGpuOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, reader_.Construct(context));
  }

  void Compute(OpKernelContext* context) override {
    tfmtseg::InfoNceInputs inputs;
    OP_REQUIRES_OK(context, reader_.Read(context, &inputs));
    tfmtseg::InfoNceArguments arguments = {};
    arguments.type = tfmtseg::kDataTypeOf<T>;
    arguments.queries = context->input(0).data();
    arguments.keys = context->input(1).data();
    arguments.positives = inputs.positives;
    arguments.query_ids = inputs.query_ids;
    arguments.key_ids = inputs.key_ids;
    arguments.key_mask = inputs.key_mask;
    arguments.n = inputs.n;
    arguments.m = inputs.m;
    arguments.d = inputs.d;
    arguments.temperature = inputs.temperature;
    arguments.engine = tfmtseg::Engine::kAuto;

    const size_t size = tfmtseg::InfoNceWorkspaceSize(arguments, gradients);
    Tensor workspace, statistics;
    void *work = nullptr, *rows = nullptr;
    OP_REQUIRES_OK(context, tfmtseg::Temporary(context, size, &workspace, &work));
    OP_REQUIRES_OK(context, tfmtseg::Temporary(context, 2 * sizeof(float) * inputs.n, &statistics,
                                               &rows));
    float* log_sum_exp = static_cast<float*>(rows);
    float* positive_similarity = log_sum_exp + inputs.n;

    Tensor* losses = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({inputs.n}), &losses));
    CUstream_st* stream = tfmtseg::StreamOf(context);
    if constexpr (gradients) {
      Tensor *by_queries = nullptr, *by_keys = nullptr, *by_temperature = nullptr;
      OP_REQUIRES_OK(context,
                     context->allocate_output(1, context->input(0).shape(), &by_queries));
      OP_REQUIRES_OK(context, context->allocate_output(2, context->input(1).shape(), &by_keys));
      OP_REQUIRES_OK(context, context->allocate_output(3, TensorShape({}), &by_temperature));
      OP_REQUIRES_OK(context,
                     ToStatus(tfmtseg::InfoNceForwardBackward(
                         stream, arguments, inputs.row_weights, losses->flat<float>().data(),
                         log_sum_exp, positive_similarity, by_queries->data(), by_keys->data(),
                         by_temperature->flat<float>().data(), work, size)));
    } else {
      OP_REQUIRES_OK(context, ToStatus(tfmtseg::InfoNceForward(
                                  stream, arguments, losses->flat<float>().data(), log_sum_exp,
                                  positive_similarity, work, size)));
    }
  }

 private:
  tfmtseg::InfoNceInputReader reader_;
};

#define TFMTSEG_REGISTER(T)                                  \
  REGISTER_KERNEL_BUILDER(Name("TfmtsegInfoNce")             \
                              .Device(DEVICE_GPU)            \
                              .TypeConstraint<T>("T")        \
                              .AttrConstraint("by_label", false) \
                              .HostMemory("temperature"),    \
                          InfoNceGpuOp<T, false>);           \
  REGISTER_KERNEL_BUILDER(Name("TfmtsegInfoNceWithGradients") \
                              .Device(DEVICE_GPU)            \
                              .TypeConstraint<T>("T")        \
                              .AttrConstraint("by_label", false) \
                              .HostMemory("temperature"),    \
                          InfoNceGpuOp<T, true>);
TFMTSEG_REGISTER(float)
TFMTSEG_REGISTER(Eigen::half)
TFMTSEG_REGISTER(bfloat16)
#undef TFMTSEG_REGISTER

}  // namespace
}  // namespace tensorflow
