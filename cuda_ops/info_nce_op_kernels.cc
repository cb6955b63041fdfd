// InfoNCE as TensorFlow OpKernels on CPU: validate, allocate, call info_nce_cpu.

#define EIGEN_USE_THREADS

#include <cmath>
#include <new>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "info_nce_cpu.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/util/work_sharder.h"

namespace tensorflow {
namespace {

std::string Shape(const Tensor& tensor) { return tensor.shape().DebugString(); }

// `name` has to be a vector of `rows` numbers.
absl::Status CheckVector(const Tensor& tensor, const char* name, int64_t rows, const char* of) {
  if (tensor.dims() == 1 && tensor.dim_size(0) == rows) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": shape is ", Shape(tensor),
                                                    ", must be [", rows, "], the rows of ", of));
}

// Pointers into the inputs; `queries` and `keys` are set by the kernel.
absl::Status ReadProblem(OpKernelContext* context, bool by_label, bool has_ids, bool has_mask,
                         tfmtseg::InfoNceProblem* problem) {
  const Tensor& queries = context->input(0);
  const Tensor& keys = context->input(1);
  for (const auto& [tensor, name] : {std::pair(&queries, "queries"), std::pair(&keys, "keys")}) {
    if (tensor->dims() != 2) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": shape is ", Shape(*tensor), ", must be [rows, features]"));
    }
  }
  if (queries.dim_size(1) != keys.dim_size(1)) {
    return absl::InvalidArgumentError(absl::StrCat("queries, keys: shapes are ", Shape(queries),
                                                      " and ", Shape(keys),
                                                      ", must agree in features"));
  }
  const Tensor& temperature = context->input(2);
  if (temperature.dims() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature: shape is ", Shape(temperature), ", must be []"));
  }
  const float value = temperature.scalar<float>()();
  if (!(value > 0) || !std::isfinite(value)) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature: value is ", value, ", must be positive"));
  }
  const int64_t n = queries.dim_size(0), m = keys.dim_size(0);
  TF_RETURN_IF_ERROR(CheckVector(context->input(3), "positives", n, "queries"));
  const int32_t* positives = context->input(3).flat<int32_t>().data();
  TF_RETURN_IF_ERROR(CheckVector(context->input(4), "key_labels", by_label ? m : 0,
                                 by_label ? "keys" : "nothing"));
  TF_RETURN_IF_ERROR(CheckVector(context->input(5), "query_ids", has_ids ? n : 0,
                                 has_ids ? "queries" : "nothing"));
  TF_RETURN_IF_ERROR(CheckVector(context->input(6), "key_ids", has_ids ? m : 0,
                                 has_ids ? "keys" : "nothing"));
  TF_RETURN_IF_ERROR(CheckVector(context->input(7), "key_mask", has_mask ? m : 0,
                                 has_mask ? "keys" : "nothing"));
  if (!by_label) {
    for (int64_t i = 0; i < n; ++i) {
      if (positives[i] < m) continue;
      return absl::InvalidArgumentError(absl::StrCat("positives: value ", i, " is ",
                                                        positives[i], ", must be less than ", m,
                                                        ", the rows of keys"));
    }
  }
  *problem = {};
  problem->positives = by_label ? nullptr : positives;
  problem->query_labels = by_label ? positives : nullptr;
  problem->key_labels = by_label ? context->input(4).flat<int32_t>().data() : nullptr;
  problem->query_ids = has_ids ? context->input(5).flat<int32_t>().data() : nullptr;
  problem->key_ids = has_ids ? context->input(6).flat<int32_t>().data() : nullptr;
  problem->key_mask = has_mask ? context->input(7).flat<bool>().data() : nullptr;
  problem->n = n;
  problem->m = m;
  problem->d = queries.dim_size(1);
  problem->temperature = value;
  return absl::OkStatus();
}

// The rows as float32: the input itself, or a copy in `buffer`.
template <typename T>
absl::Status AsFloat(OpKernelContext* context, const Tensor& rows, Tensor* buffer,
                     const float** result) {
  if constexpr (std::is_same_v<T, float>) {
    *result = rows.flat<float>().data();
  } else {
    TF_RETURN_IF_ERROR(context->allocate_temp(DT_FLOAT, rows.shape(), buffer));
    buffer->flat<float>().device(context->eigen_device<Eigen::ThreadPoolDevice>()) =
        rows.flat<T>().template cast<float>();
    *result = buffer->flat<float>().data();
  }
  return absl::OkStatus();
}

template <typename T, bool gradients>
class InfoNceOp : public OpKernel {
 public:
  explicit InfoNceOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("by_label", &by_label_));
    OP_REQUIRES_OK(context, context->GetAttr("has_ids", &has_ids_));
    OP_REQUIRES_OK(context, context->GetAttr("has_mask", &has_mask_));
  }

  void Compute(OpKernelContext* context) override {
    tfmtseg::InfoNceProblem problem;
    OP_REQUIRES_OK(context, ReadProblem(context, by_label_, has_ids_, has_mask_, &problem));
    Tensor query_buffer, key_buffer;
    OP_REQUIRES_OK(context,
                   AsFloat<T>(context, context->input(0), &query_buffer, &problem.queries));
    OP_REQUIRES_OK(context, AsFloat<T>(context, context->input(1), &key_buffer, &problem.keys));

    const auto output = [context](int index, const TensorShape& shape, float** data) {
      Tensor* tensor = nullptr;
      TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &tensor));
      *data = tensor->flat<float>().data();
      return absl::OkStatus();
    };
    tfmtseg::InfoNceResult result = {};
    result.with_gradients = gradients;
    OP_REQUIRES_OK(context, output(0, TensorShape({problem.n}), &result.losses));
    if constexpr (gradients) {
      const Tensor& weights = context->input(8);
      OP_REQUIRES_OK(context, CheckVector(weights, "row_weights", problem.n, "queries"));
      OP_REQUIRES_OK(context, output(1, context->input(0).shape(), &result.grad_queries));
      OP_REQUIRES_OK(context, output(2, context->input(1).shape(), &result.grad_keys));
      OP_REQUIRES_OK(context, output(3, TensorShape({}), &result.grad_temperature));
      result.row_weights = weights.flat<float>().data();
    }
    const auto* threads = context->device()->tensorflow_cpu_worker_threads();
    const tfmtseg::ParallelFor parallel_for =
        [threads](int64_t total, int64_t cost, const std::function<void(int64_t, int64_t)>& body) {
          Shard(threads->num_threads, threads->workers, total, cost, body);
        };
    try {
      tfmtseg::InfoNceCpu(problem, parallel_for, result);
    } catch (const std::bad_alloc&) {
      context->CtxFailure(absl::ResourceExhaustedError(
          absl::StrCat("info_nce: not enough memory for queries of shape ",
                          Shape(context->input(0)), " and keys of shape ",
                          Shape(context->input(1)))));
    }
  }

 private:
  bool by_label_, has_ids_, has_mask_;
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
