// Registration of the InfoNCE ops: names, shapes, documentation.

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tensorflow {
namespace {

using shape_inference::DimensionHandle;
using shape_inference::InferenceContext;
using shape_inference::ShapeHandle;

// Checks what both ops take, up to key_mask, and gives n, m and d.
absl::Status Common(InferenceContext* c, DimensionHandle* n, DimensionHandle* m,
                    DimensionHandle* d) {
  ShapeHandle queries, keys, rows;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &queries));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 2, &keys));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 0, &rows));
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(queries, 1), c->Dim(keys, 1), d));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 1, &rows));
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(queries, 0), c->Dim(rows, 0), n));
  *m = c->Dim(keys, 0);
  for (int i = 4; i < 8; ++i) TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &rows));
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("TfmtsegInfoNce")
    .Input("queries: T")
    .Input("keys: T")
    .Input("temperature: float")
    .Input("positives: int32")
    .Input("key_labels: int32")
    .Input("query_ids: int32")
    .Input("key_ids: int32")
    .Input("key_mask: bool")
    .Output("losses: float")
    .Attr("T: {float, half, bfloat16}")
    .Attr("by_label: bool")
    .Attr("has_ids: bool")
    .Attr("has_mask: bool")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle n, m, d;
      TF_RETURN_IF_ERROR(Common(c, &n, &m, &d));
      c->set_output(0, c->Vector(n));
      return absl::OkStatus();
    })
    .Doc(R"doc(
InfoNCE loss of every query, without the matrix of similarities in memory.

queries: `[n, d]`, compared as they are.
keys: `[m, d]`.
temperature: Positive, a scalar.
positives: `[n]`. The row of `keys` that each query has to find, a negative number for none; with
  `by_label`, the query's label. A row beyond `keys` is an error on CPU; on GPU, where nothing waits
  for the device to report it, it counts as none.
key_labels: `[m]` with `by_label`: keys of the query's label are its positives. Else empty.
query_ids: `[n]` with `has_ids`: pairs of equal ids are left out, explicit positives excepted. Else
  empty.
key_ids: `[m]` with `has_ids`, else empty.
key_mask: `[m]` with `has_mask`: false leaves a key out. Else empty.
losses: `[n]`, in nats; 0 for a query without a positive.
)doc");

REGISTER_OP("TfmtsegInfoNceWithGradients")
    .Input("queries: T")
    .Input("keys: T")
    .Input("temperature: float")
    .Input("positives: int32")
    .Input("key_labels: int32")
    .Input("query_ids: int32")
    .Input("key_ids: int32")
    .Input("key_mask: bool")
    .Input("row_weights: float")
    .Output("losses: float")
    .Output("grad_queries: T")
    .Output("grad_keys: T")
    .Output("grad_temperature: float")
    .Attr("T: {float, half, bfloat16}")
    .Attr("by_label: bool")
    .Attr("has_ids: bool")
    .Attr("has_mask: bool")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle n, m, d;
      TF_RETURN_IF_ERROR(Common(c, &n, &m, &d));
      ShapeHandle weights;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(8), 1, &weights));
      TF_RETURN_IF_ERROR(c->Merge(n, c->Dim(weights, 0), &n));
      c->set_output(0, c->Vector(n));
      c->set_output(1, c->Matrix(n, d));
      c->set_output(2, c->Matrix(m, d));
      c->set_output(3, c->Scalar());
      return absl::OkStatus();
    })
    .Doc(R"doc(
InfoNCE loss of every query, and the gradients of their weighted sum, from one set of logits.

The first inputs are those of `TfmtsegInfoNce`.

row_weights: `[n]`.
losses: `[n]`, not weighted.
grad_queries: `[n, d]`, of the sum of `row_weights * losses`, like the following.
grad_keys: `[m, d]`.
grad_temperature: A scalar.
)doc");

}  // namespace tensorflow
