// InfoNCE as TensorFlow OpKernels on CPU: validate, allocate, call info_nce_cpu.

#define EIGEN_USE_THREADS

#include <algorithm>
#include <atomic>
#include <functional>
#include <new>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "info_nce_cpu.h"
#include "info_nce_op_inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/util/work_sharder.h"

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

// As tfmtseg::ParallelFor. Threads take the next part when they are done with one: parts dealt out
// beforehand, as Shard does it, leave threads waiting at the end of each of the op's few steps.
void ShareOut(const DeviceBase::CpuWorkerThreads& threads, int64_t total, int64_t cost,
              const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kWorthwhile = 50'000;  // operations, about 1 microsecond
  const int64_t part = std::max<int64_t>(1, kWorthwhile / std::max<int64_t>(cost, 1));
  const int64_t parts = (total + part - 1) / part;
  const int64_t takers = std::min<int64_t>(threads.num_threads, parts);
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < parts; i = next++) {
      body(i * part, std::min(total, (i + 1) * part));
    }
  };
  constexpr int64_t kLarge = int64_t{1} << 40;  // so that each taker is scheduled by itself
  Shard(threads.num_threads, threads.workers, takers, kLarge, take);
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
    OP_REQUIRES_OK(context,
                   AsFloat<T>(context, context->input(0), &query_buffer, &problem.queries));
    OP_REQUIRES_OK(context, AsFloat<T>(context, context->input(1), &key_buffer, &problem.keys));
    problem.is_bfloat16 = std::is_same_v<T, bfloat16>;

    tfmtseg::InfoNceResult result = {};
    result.with_gradients = gradients;
    Tensor *losses = nullptr, *temperature = nullptr;
    Gradient by_queries, by_keys;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({problem.n}), &losses));
    result.losses = losses->flat<float>().data();
    if constexpr (gradients) {
      result.row_weights = inputs.row_weights;
      OP_REQUIRES_OK(context, by_queries.Allocate(context, 1, context->input(0).shape()));
      OP_REQUIRES_OK(context, by_keys.Allocate(context, 2, context->input(1).shape()));
      OP_REQUIRES_OK(context, context->allocate_output(3, TensorShape({}), &temperature));
      result.grad_queries = by_queries.values.template flat<float>().data();
      result.grad_keys = by_keys.values.template flat<float>().data();
      result.grad_temperature = temperature->flat<float>().data();
    }
    const tfmtseg::ParallelFor parallel_for = [context](
                                                  int64_t total, int64_t cost,
                                                  const std::function<void(int64_t, int64_t)>& body) {
      ShareOut(*context->device()->tensorflow_cpu_worker_threads(), total, cost, body);
    };
    std::vector<Tensor> workspace;
    const tfmtseg::Allocate allocate = [context, &workspace](int64_t bytes) -> void* {
      Tensor& memory = workspace.emplace_back();
      if (!context->allocate_temp(DT_INT8, TensorShape({bytes}), &memory).ok()) {
        throw std::bad_alloc();
      }
      return memory.flat<int8_t>().data();
    };
    try {
      tfmtseg::InfoNceCpu(problem, parallel_for, allocate, result);
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
  // An output of type T, made as float32.
  struct Gradient {
    Tensor* output = nullptr;
    Tensor values;

    absl::Status Allocate(OpKernelContext* context, int index, const TensorShape& shape) {
      TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &output));
      if constexpr (std::is_same_v<T, float>) {
        values = *output;
        return absl::OkStatus();
      }
      return context->allocate_temp(DT_FLOAT, shape, &values);
    }

    void Finish(OpKernelContext* context) {
      if constexpr (!std::is_same_v<T, float>) {
        output->flat<T>().device(context->eigen_device<Eigen::ThreadPoolDevice>()) =
            values.flat<float>().template cast<T>();
      }
    }
  };

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
