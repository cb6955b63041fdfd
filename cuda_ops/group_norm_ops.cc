// Registration of the GroupNorm + ReLU ops: names, shapes, documentation.

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tensorflow {
namespace {

using shape_inference::DimensionHandle;
using shape_inference::InferenceContext;
using shape_inference::ShapeHandle;

// Checks gamma and beta, inputs `first` and the next, against the channels of x.
absl::Status CheckChannels(InferenceContext* c, ShapeHandle x, int first) {
  DimensionHandle channels = c->Dim(x, -1);
  for (int i = first; i < first + 2; ++i) {
    ShapeHandle vector;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &vector));
    TF_RETURN_IF_ERROR(c->Merge(channels, c->Dim(vector, 0), &channels));
  }
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("TfmtsegGroupNormRelu")
    .Input("x: T")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("y: T")
    .Output("mean: float")
    .Output("rstd: float")
    .Attr("T: {float, half, bfloat16}")
    .Attr("groups: int >= 1")
    .Attr("epsilon: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle x;
      TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 2, &x));
      TF_RETURN_IF_ERROR(CheckChannels(c, x, 1));
      int64_t groups;
      TF_RETURN_IF_ERROR(c->GetAttr("groups", &groups));
      c->set_output(0, x);
      c->set_output(1, c->Matrix(c->Dim(x, 0), groups));
      c->set_output(2, c->Matrix(c->Dim(x, 0), groups));
      return absl::OkStatus();
    })
    .Doc(R"doc(
ReLU of GroupNorm: relu(gamma * (x - mean) * rstd + beta).

x: `[batch, ..., channels]`.
gamma: `[channels]`.
beta: `[channels]`.
y: Of the shape of `x`.
mean: `[batch, groups]`, over the group's channels and all voxels.
rstd: `[batch, groups]`, 1 / sqrt(variance + epsilon).
groups: A divisor of the number of channels.
epsilon: Not negative.
)doc");

REGISTER_OP("TfmtsegGroupNormReluGradients")
    .Input("upstream: T")
    .Input("x: T")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("mean: float")
    .Input("rstd: float")
    .Output("grad_x: T")
    .Output("grad_gamma: float")
    .Output("grad_beta: float")
    .Attr("T: {float, half, bfloat16}")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle x, statistics;
      TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(1), 2, &x));
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), x, &x));
      TF_RETURN_IF_ERROR(CheckChannels(c, x, 2));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(4), 2, &statistics));
      TF_RETURN_IF_ERROR(c->Merge(c->input(5), statistics, &statistics));
      DimensionHandle batch;
      TF_RETURN_IF_ERROR(c->Merge(c->Dim(x, 0), c->Dim(statistics, 0), &batch));
      c->set_output(0, x);
      c->set_output(1, c->Vector(c->Dim(x, -1)));
      c->set_output(2, c->Vector(c->Dim(x, -1)));
      return absl::OkStatus();
    })
    .Doc(R"doc(
The gradients of `TfmtsegGroupNormRelu`.

upstream: The gradient of `y`, of the shape of `x`.
x: As for `TfmtsegGroupNormRelu`, like `gamma` and `beta`.
gamma: See `x`.
beta: See `x`.
mean: What `TfmtsegGroupNormRelu` returned, like `rstd`.
rstd: See `mean`.
grad_x: Of the shape of `x`.
grad_gamma: `[channels]`.
grad_beta: `[channels]`.
)doc");

}  // namespace tensorflow
