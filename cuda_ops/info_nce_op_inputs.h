// What the ops on CPU and GPU have in common: reading and checking their inputs.

#ifndef TFMTSEG_INFO_NCE_OP_INPUTS_H_
#define TFMTSEG_INFO_NCE_OP_INPUTS_H_

#include <cmath>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "op_kernel_shapes.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace tfmtseg {

// Sizes, temperature and where things are; see info_nce_ops.cc. Null: not given.
struct InfoNceInputs {
  int64_t n, m, d;
  float temperature;
  const int32_t* positives;
  const int32_t* key_labels;
  const int32_t* query_ids;
  const int32_t* key_ids;
  const bool* key_mask;
  const float* row_weights;
};

// Reads the inputs of a kernel with the attributes of the op. Looks at no value but that of the
// temperature, which has to be in host memory.
class InfoNceInputReader {
 public:
  absl::Status Construct(tensorflow::OpKernelConstruction* context) {
    TF_RETURN_IF_ERROR(context->GetAttr("by_label", &by_label_));
    TF_RETURN_IF_ERROR(context->GetAttr("has_ids", &has_ids_));
    return context->GetAttr("has_mask", &has_mask_);
  }

  absl::Status Read(tensorflow::OpKernelContext* context, InfoNceInputs* inputs) const {
    const tensorflow::Tensor& queries = context->input(0);
    const tensorflow::Tensor& keys = context->input(1);
    for (const auto& [tensor, name] : {std::pair(&queries, "queries"), std::pair(&keys, "keys")}) {
      if (tensor->dims() != 2) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, ": shape is ", ShapeOf(*tensor), ", must be [rows, features]"));
      }
    }
    if (queries.dim_size(1) != keys.dim_size(1)) {
      return absl::InvalidArgumentError(absl::StrCat("queries, keys: shapes are ",
                                                     ShapeOf(queries), " and ", ShapeOf(keys),
                                                     ", must agree in features"));
    }
    if (queries.dim_size(1) == 0) {
      return absl::InvalidArgumentError("queries, keys: there are 0 features, must be 1 or more");
    }
    *inputs = {};
    inputs->n = queries.dim_size(0);
    inputs->m = keys.dim_size(0);
    inputs->d = queries.dim_size(1);
    const tensorflow::Tensor& temperature = context->input(2);
    if (temperature.dims() != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("temperature: shape is ", ShapeOf(temperature), ", must be []"));
    }
    inputs->temperature = temperature.scalar<float>()();
    if (!(inputs->temperature > 0) || !std::isfinite(inputs->temperature)) {
      return absl::InvalidArgumentError(
          absl::StrCat("temperature: value is ", inputs->temperature, ", must be positive"));
    }
    TF_RETURN_IF_ERROR(Vector(context, 3, "positives", true, inputs->n, &inputs->positives));
    TF_RETURN_IF_ERROR(Vector(context, 4, "key_labels", by_label_, inputs->m, &inputs->key_labels));
    TF_RETURN_IF_ERROR(Vector(context, 5, "query_ids", has_ids_, inputs->n, &inputs->query_ids));
    TF_RETURN_IF_ERROR(Vector(context, 6, "key_ids", has_ids_, inputs->m, &inputs->key_ids));
    TF_RETURN_IF_ERROR(Vector(context, 7, "key_mask", has_mask_, inputs->m, &inputs->key_mask));
    if (context->num_inputs() <= 8) return absl::OkStatus();
    return Vector(context, 8, "row_weights", true, inputs->n, &inputs->row_weights);
  }

  bool by_label() const { return by_label_; }

 private:
  // A vector of `rows` numbers if `given`, else of none.
  template <typename T>
  static absl::Status Vector(tensorflow::OpKernelContext* context, int index, const char* name,
                             bool given, int64_t rows, const T** data) {
    const tensorflow::Tensor& tensor = context->input(index);
    const int64_t expected = given ? rows : 0;
    if (tensor.dims() != 1 || tensor.dim_size(0) != expected) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": shape is ", ShapeOf(tensor), ", must be [", expected, "]"));
    }
    if (given) *data = tensor.flat<T>().data();
    return absl::OkStatus();
  }

  bool by_label_, has_ids_, has_mask_;
};

}  // namespace tfmtseg

#endif  // TFMTSEG_INFO_NCE_OP_INPUTS_H_
