// A trivial op, for the tests of the builder: twice the input, and which unit worked it out.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"

REGISTER_OP("TfmtsegProbe")
    .Input("x: float")
    .Output("twice: float")
    .Output("unit: string")
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* context) {
      context->set_output(0, context->input(0));
      context->set_output(1, context->Scalar());
      return absl::OkStatus();
    });
