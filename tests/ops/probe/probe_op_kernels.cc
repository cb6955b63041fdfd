#include "probe_cpu.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace {

class ProbeOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tensorflow::OpKernelContext* context) override {
    const tensorflow::Tensor& x = context->input(0);
    tensorflow::Tensor* twice = nullptr;
    tensorflow::Tensor* unit = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &twice));
    OP_REQUIRES_OK(context, context->allocate_output(1, {}, &unit));
    unit->scalar<tensorflow::tstring>()() =
        tfmtseg::Twice(x.flat<float>().data(), twice->flat<float>().data(), x.NumElements());
  }
};

REGISTER_KERNEL_BUILDER(Name("TfmtsegProbe").Device(tensorflow::DEVICE_CPU), ProbeOp);

}  // namespace
