// Kernels that visit every row once: what comes before a sweep and what comes after it.
#ifndef TFMTSEG_CUDA_OPS_INFO_NCE_ROWS_CUH_
#define TFMTSEG_CUDA_OPS_INFO_NCE_ROWS_CUH_

#include "info_nce_sweep.cuh"

namespace tfmtseg {

constexpr int kRowThreads = 128;  // one warp per row
constexpr int kRowsPerBlock = kRowThreads / 32;

inline dim3 RowBlocks(int64_t rows) {
  return dim3(static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock));
}

__device__ inline int64_t RowOfThisWarp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
}

// log(1 + exp(x)).
__device__ inline float Softplus(float x) {
  return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x)));
}

// Purpose: rows in the type and width an engine wants. With kSplit row = high + low.
// Shapes: rows [count, d] -> packed [count, kSplit ? 2 : 1, width], zeros from column d on.
template <typename T, typename Packed, bool kSplit>
__global__ void __launch_bounds__(kRowThreads)
    PackRowsKernel(const T* rows, int count, int d, int width, Packed* packed) {
  const int64_t row = RowOfThisWarp();
  if (row >= count) return;
  Packed* const high = packed + row * width * (kSplit ? 2 : 1);
  for (int c = threadIdx.x % 32; c < width; c += 32) {
    const float x = c < d ? ToFloat(rows[row * d + c]) : 0.0f;
    high[c] = FromFloat<Packed>(x);
    if constexpr (kSplit) {
      // inf - inf would be NaN; an infinity needs no second part.
      const float rest = x - ToFloat(high[c]);
      high[width + c] = FromFloat<Packed>(isinf(x) ? 0.0f : rest);
    }
  }
}

template <typename T, typename Packed, bool kSplit>
int PackRows(CUstream_st* stream, const void* rows, int count, int d, int width, void* packed) {
  if (count == 0) return 0;
  return Launch(PackRowsKernel<T, Packed, kSplit>, RowBlocks(count), dim3(kRowThreads), 0, stream,
                static_cast<const T*>(rows), count, d, width, static_cast<Packed*>(packed));
}

// A query's part in the gradients of the keys. `difference` is l - s_p, in nats.
__device__ inline RowWeight MakeRowWeight(bool has_positive, float weight,
                                          float inverse_temperature, float difference,
                                          float positive_similarity) {
  if (!has_positive) return {-INFINITY, -INFINITY, 1.0f};
  const float magnitude = log2f(fabsf(weight) * inverse_temperature);
  // log(exp(l) + exp(s_p)) = s_p + loss, and the positive's share 1 - exp(s_p - that) is
  // exp(l - that) = exp(-softplus(s_p - l)): no difference of nearly equal numbers.
  RowWeight result;
  result.bias = magnitude - kLog2E * (positive_similarity + Softplus(difference));
  result.positive_bias = magnitude - kLog2E * Softplus(-difference);
  result.sign = weight < 0.0f ? -1.0f : 1.0f;
  return result;
}

struct Queries {
  const int32_t* positives;  // [n]
  const bool* key_mask;      // [m] or null
  int n;
  int m;
  int d;
  float scale;  // log2(e) / temperature
  float inverse_temperature;
};

// The row of the query's positive key; -1 if it has none. Raises the flag on a bad index.
__device__ inline int PositiveOf(const Queries& queries, int64_t row, int32_t* error_flag) {
  const int positive = queries.positives[row];
  if (positive < 0 || positive >= queries.m) {
    // All who write here write the same.
    if (positive != -1) *error_flag = 1;
    return -1;
  }
  return queries.key_mask && !queries.key_mask[positive] ? -1 : positive;
}

// Purpose: RowWeights from the statistics of an earlier forward pass.
// Shapes: all [n].
__global__ void __launch_bounds__(kRowThreads)
    RowWeightsKernel(Queries queries, const float* row_gradients, const float* log_sum_exp,
                     const float* positive_similarity, RowWeight* weights, int32_t* error_flag) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= queries.n) return;
  weights[row] = MakeRowWeight(PositiveOf(queries, row, error_flag) >= 0, row_gradients[row],
                               queries.inverse_temperature,
                               log_sum_exp[row] - positive_similarity[row],
                               positive_similarity[row]);
}

// What the query sweep left behind, and what is to be made of it. Null: not wanted.
template <typename T>
struct QueryResults {
  const T* queries;  // [n, d]
  const T* keys;     // [m, d]
  const float* maxima;   // [splits, n]
  const float* sums;     // [splits, n]
  const float* outputs;  // [splits, n, output_pitch]; only read for gradients
  int splits;
  int output_pitch;
  const float* row_weights;  // [n]; only read for gradients
  float* loss;                  // [n]
  float* log_sum_exp;           // [n]
  float* positive_similarity;   // [n]
  RowWeight* key_sweep_weights;   // [n]
  T* gradients;                   // [n, d]
  float* temperature_gradients;   // [n]
};

// Purpose: merges the parts of the query sweep in a fixed order; losses, statistics, gradients.
// Shapes: in QueryResults. One warp per query.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    FinishQueriesKernel(Queries queries, QueryResults<T> results, int32_t* error_flag) {
  const int64_t row = RowOfThisWarp();
  if (row >= queries.n) return;
  const int lane = threadIdx.x % 32;
  const int positive = PositiveOf(queries, row, error_flag);
  const T* const query = results.queries + row * queries.d;
  const T* const key = results.keys + (positive >= 0 ? positive : 0) * int64_t{queries.d};

  float maximum = -INFINITY;
  for (int s = 0; s < results.splits; ++s) {
    maximum = fmaxf(maximum, results.maxima[int64_t{s} * queries.n + row]);
  }
  const float shift = Shift(maximum);
  float sum = 0.0f;
  for (int s = 0; s < results.splits; ++s) {
    const int64_t part = int64_t{s} * queries.n + row;
    sum += results.sums[part] * exp2f(results.maxima[part] - shift);
  }

  float dot = 0.0f;
  if (positive >= 0) {
    for (int c = lane; c < queries.d; c += 32) dot = fmaf(ToFloat(query[c]), ToFloat(key[c]), dot);
  }
  dot = WarpSum(dot);
  // Scaled as the exponents are, so that the rounding of `scale` cancels in the difference.
  const float positive_exponent = dot * queries.scale;
  const float difference = kLn2 * ((shift - positive_exponent) + log2f(sum));
  const float loss = positive >= 0 ? Softplus(difference) : 0.0f;
  const float positive_similarity = kLn2 * positive_exponent;

  if (lane == 0) {
    if (results.loss) results.loss[row] = loss;
    if (results.log_sum_exp) results.log_sum_exp[row] = kLn2 * (shift + log2f(sum));
    if (results.positive_similarity) results.positive_similarity[row] = positive_similarity;
    if (results.key_sweep_weights) {
      results.key_sweep_weights[row] =
          MakeRowWeight(positive >= 0, results.row_weights[row], queries.inverse_temperature,
                        difference, positive_similarity);
    }
  }

  if (!results.gradients) return;
  // dQ_i = w_i / temperature * sum over negatives of exp(s_ij - lse_i) (k_j - k_p); the true
  // maximum, so that a row without negatives gets 0 whatever its s_p.
  const float factor = positive >= 0 ? results.row_weights[row] * queries.inverse_temperature *
                                           exp2f(maximum - positive_exponent - kLog2E * loss)
                                     : 0.0f;
  float projection = 0.0f;
  for (int c = lane; c < queries.d; c += 32) {
    float gradient = 0.0f;
    if (positive >= 0) {
      float output = 0.0f;
      for (int s = 0; s < results.splits; ++s) {
        const int64_t part = int64_t{s} * queries.n + row;
        output = fmaf(results.outputs[part * results.output_pitch + c],
                      exp2f(results.maxima[part] - shift), output);
      }
      gradient = factor * (output - sum * ToFloat(key[c]));
      projection = fmaf(ToFloat(query[c]), gradient, projection);
    }
    results.gradients[row * queries.d + c] = FromFloat<T>(gradient);
  }
  // s_ij depends on q_i / temperature only.
  projection = WarpSum(projection);
  if (lane == 0 && results.temperature_gradients) {
    results.temperature_gradients[row] = -projection * queries.inverse_temperature;
  }
}

// Purpose: merges the parts of the key sweep in a fixed order into the gradients of the keys.
// Shapes: maxima [splits, m], outputs [splits, m, output_pitch] -> gradients [m, d].
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    FinishKeysKernel(const float* maxima, const float* outputs, const bool* key_mask, int splits,
                     int output_pitch, int m, int d, T* gradients) {
  const int64_t row = RowOfThisWarp();
  if (row >= m) return;
  const bool kept = !key_mask || key_mask[row];
  for (int c = threadIdx.x % 32; c < d; c += 32) {
    float gradient = 0.0f;
    for (int s = 0; kept && s < splits; ++s) {
      const int64_t part = int64_t{s} * m + row;
      gradient = fmaf(outputs[part * output_pitch + c], exp2f(maxima[part]), gradient);
    }
    gradients[row * d + c] = FromFloat<T>(gradient);
  }
}

// Purpose: total[0] = sum of values [count], in an order that depends on nothing. One block.
__global__ void __launch_bounds__(kRowThreads)
    SumKernel(const float* values, int count, float* total) {
  __shared__ float warp_sums[kRowsPerBlock];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += kRowThreads) sum += values[i];
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0f;
  for (int w = 0; w < kRowsPerBlock; ++w) sum += warp_sums[w];
  *total = sum;
}

// Purpose: rows of length 1. A comparison, not fmaxf, so that NaN stays NaN.
// Shapes: rows, normalized [n, d]; inverse_norms [n].
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    NormalizeRowsKernel(const T* rows, int64_t n, int64_t d, float epsilon, T* normalized,
                        float* inverse_norms) {
  const int64_t row = RowOfThisWarp();
  if (row >= n) return;
  const int lane = threadIdx.x % 32;
  float squares = 0.0f;
  for (int64_t c = lane; c < d; c += 32) {
    const float x = ToFloat(rows[row * d + c]);
    squares = fmaf(x, x, squares);
  }
  squares = WarpSum(squares);
  const float inverse_norm = 1.0f / sqrtf(squares < epsilon ? epsilon : squares);
  for (int64_t c = lane; c < d; c += 32) {
    normalized[row * d + c] = FromFloat<T>(ToFloat(rows[row * d + c]) * inverse_norm);
  }
  if (lane == 0) inverse_norms[row] = inverse_norm;
}

// Purpose: gradient of NormalizeRowsKernel: (g - y <y, g>) / norm with y = row / norm; where
// epsilon took the place of the norm, it is a constant: g / sqrt(epsilon).
// Shapes: rows, grad_normalized, grad_rows [n, d]; inverse_norms [n].
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    NormalizeRowsBackwardKernel(const T* rows, const float* inverse_norms,
                                const T* grad_normalized, int64_t n, int64_t d, float epsilon,
                                T* grad_rows) {
  const int64_t row = RowOfThisWarp();
  if (row >= n) return;
  const int lane = threadIdx.x % 32;
  const float inverse_norm = inverse_norms[row];
  const bool constant_norm = inverse_norm >= 1.0f / sqrtf(epsilon);
  float projection = 0.0f;
  for (int64_t c = lane; c < d; c += 32) {
    projection = fmaf(ToFloat(rows[row * d + c]) * inverse_norm,
                      ToFloat(grad_normalized[row * d + c]), projection);
  }
  projection = WarpSum(projection);
  if (constant_norm) projection = 0.0f;
  for (int64_t c = lane; c < d; c += 32) {
    const float y = ToFloat(rows[row * d + c]) * inverse_norm;
    const float gradient = ToFloat(grad_normalized[row * d + c]) - y * projection;
    grad_rows[row * d + c] = FromFloat<T>(gradient * inverse_norm);
  }
}

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_INFO_NCE_ROWS_CUH_
