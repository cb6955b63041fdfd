// Fused InfoNCE on CUDA. Plain C++: needs neither CUDA nor TensorFlow headers.
//
// Similarities s_ij = q_i . k_j / temperature. Row i compares its positive p = positives[i] with
// its negatives: all keys j != p that key_mask keeps and whose id differs from the query's.
//
//   l_i    = log sum over negatives of exp(s_ij)       (-inf without negatives)
//   loss_i = softplus(l_i - s_ip) = log(exp(s_ip) + exp(l_i)) - s_ip
//
// The N x M similarities are never in memory, the positive is never part of the running sum (a
// small loss keeps its digits), and no result depends on the order in which blocks run: the same
// call on the same device gives the same bits.
//
// Rules at the edges: a row without a positive (-1, or one that key_mask leaves out) has loss 0
// and gradient 0; so has a row with a positive but without negatives. n = 0 or m = 0 is allowed.
// NaN and infinity propagate, except out of keys that key_mask leaves out.
//
// All pointers are device pointers, rows are contiguous. Work is queued on `stream`; nothing
// waits, nothing is allocated. Every function returns a CUDA error code, 0 for success.
#ifndef TFMTSEG_CUDA_OPS_INFO_NCE_CUDA_H_
#define TFMTSEG_CUDA_OPS_INFO_NCE_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "cuda_types.h"

namespace tfmtseg {

// How the matrix products are computed; everything else is float32 always.
//   kScalar      float32 multiply-add; any d, any device.
//   kTensorCore  one product of the rows as they are (float32 rows are rounded to bfloat16),
//                accumulated in float32. Needs d <= 256 and compute capability 8.0.
//   kSplit       rows and weights as sums of two bfloat16, three products: close to float32.
//                Needs what kTensorCore needs.
//   kAuto        kSplit for float32 and kTensorCore for the others where possible, else kScalar.
// An engine asked for by name that cannot serve is an error (cudaErrorNotSupported).
enum class Engine { kAuto, kScalar, kTensorCore, kSplit };

struct InfoNceArguments {
  DataType type;             // of queries, keys and their gradients
  const void* queries;       // [n, d]
  const void* keys;          // [m, d]
  const int32_t* positives;  // [n], a row of keys; -1: none
  const int32_t* query_ids;  // [n], or null; both ids or neither
  const int32_t* key_ids;    // [m], or null. A pair with equal ids is no negative; the positive
                             // counts whatever its id
  const bool* key_mask;      // [m], or null; false leaves the key out
  int64_t n;
  int64_t m;  // n and m below 2^31 - 64
  int64_t d;  // at least 1
  float temperature;  // positive and finite
  Engine engine;
};

// Bytes of workspace the launchers below need, 256-byte aligned; `with_gradients` is false for
// InfoNceForward only. 0 if the arguments are invalid, or with kAuto where there is no device: that
// one asks the current device, as the launchers do. Depends on the addresses of queries and keys:
// where kTensorCore would read them as they are and one of them is not 16-byte aligned, such as a
// slice of rows, both are copied.
//
// The first int32 of the workspace is the error flag: once the stream has finished it is 0, or 1
// if some positive was neither -1 nor a row of keys. Such a row counts as one without positive.
size_t InfoNceWorkspaceSize(const InfoNceArguments& arguments, bool with_gradients);

// Losses and what the backward pass needs to know about each row.
//   loss, log_sum_exp (l_i), positive_similarity (s_ip; 0 without positive): float32 [n].
int InfoNceForward(CUstream_st* stream, const InfoNceArguments& arguments, float* loss,
                   float* log_sum_exp, float* positive_similarity, void* workspace,
                   size_t workspace_size);

// Gradients of sum_i row_gradients[i] * loss_i, from what InfoNceForward returned.
//   row_gradients, log_sum_exp, positive_similarity: float32 [n];
//   grad_queries [n, d] and grad_keys [m, d]: of `type`; grad_temperature: float32 scalar.
// A gradient that is not wanted may be null; grad_temperature needs grad_queries.
int InfoNceBackward(CUstream_st* stream, const InfoNceArguments& arguments,
                    const float* row_gradients, const float* log_sum_exp,
                    const float* positive_similarity, void* grad_queries, void* grad_keys,
                    float* grad_temperature, void* workspace, size_t workspace_size);

// Losses, and the gradients of sum_i row_weights[i] * loss_i, in two sweeps instead of three: for
// a scalar loss whose weights are known beforehand. Outputs as above; log_sum_exp and
// positive_similarity may be null as well.
int InfoNceForwardBackward(CUstream_st* stream, const InfoNceArguments& arguments,
                           const float* row_weights, float* loss, float* log_sum_exp,
                           float* positive_similarity, void* grad_queries, void* grad_keys,
                           float* grad_temperature, void* workspace, size_t workspace_size);

// Rows scaled to length 1 as by tf.math.l2_normalize: x / sqrt(max(sum(x^2), epsilon)).
//   rows, normalized [n, d]: of `type`; inverse_norms: float32 [n].
int NormalizeRows(CUstream_st* stream, DataType type, const void* rows, int64_t n, int64_t d,
                  float epsilon, void* normalized, float* inverse_norms);

// grad_rows [n, d] from grad_normalized [n, d] (both of `type`), the raw rows and their
// inverse_norms. grad_rows may be grad_normalized.
int NormalizeRowsBackward(CUstream_st* stream, DataType type, const void* rows,
                          const float* inverse_norms, const void* grad_normalized, int64_t n,
                          int64_t d, float epsilon, void* grad_rows);

// What a returned error code means; a static string.
const char* InfoNceErrorString(int error);

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_INFO_NCE_CUDA_H_
