#include "probe_cuda.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/stream_executor/stream.h"

namespace {

class ProbeGpuOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tensorflow::OpKernelContext* context) override {
    const tensorflow::Tensor& x = context->input(0);
    tensorflow::Tensor* twice = nullptr;
    tensorflow::Tensor* unit = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &twice));
    OP_REQUIRES_OK(context, context->allocate_output(1, {}, &unit));
    void* stream = context->op_device_context()->stream()->platform_specific_handle().stream;
    const char* problem = tfmtseg::TwiceOnGpu(stream, x.flat<float>().data(),
                                              twice->flat<float>().data(), x.NumElements());
    OP_REQUIRES(context, problem == nullptr, absl::InternalError(problem));
    unit->scalar<tensorflow::tstring>()() = "cuda";
  }
};

REGISTER_KERNEL_BUILDER(
    Name("TfmtsegProbe").Device(tensorflow::DEVICE_GPU).HostMemory("unit"), ProbeGpuOp);

}  // namespace
