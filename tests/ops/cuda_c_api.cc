// The launchers of the emulated library as C functions, for ctypes.
#include "cuda_emulation.h"
#include "group_norm_cuda.h"
#include "info_nce_cuda.h"

using tfmtseg::GroupNormArguments;
using tfmtseg::InfoNceArguments;

extern "C" {

void emulation_settings(int compute_capability_major, bool reversed_order, int blocks_wanted) {
  tfmtseg::emulation::compute_capability_major = compute_capability_major;
  tfmtseg::emulation::reversed_order = reversed_order;
  tfmtseg::emulation::blocks_wanted = blocks_wanted;
}

// Through float16 (0) or bfloat16 (1) and back.
void round_trip(int bfloat16, const float* values, int64_t count, uint16_t* bits, float* back) {
  for (int64_t i = 0; i < count; ++i) {
    if (bfloat16) {
      const __nv_bfloat16 x = __float2bfloat16_rn(values[i]);
      bits[i] = x.bits;
      back[i] = __bfloat162float(x);
    } else {
      const __half x = __float2half_rn(values[i]);
      bits[i] = x.bits;
      back[i] = __half2float(x);
    }
  }
}

// The sums [8] of one row, more `left` [8] times `right` [8, 8].
void add_products(const float* left, const float (*right)[8], float* sums) {
  tfmtseg::emulation::AddProducts(left, right, sums);
}

size_t workspace_size(const InfoNceArguments* arguments, bool with_gradients) {
  return tfmtseg::InfoNceWorkspaceSize(*arguments, with_gradients);
}

int forward(const InfoNceArguments* arguments, float* loss, float* log_sum_exp,
            float* positive_similarity, void* workspace, size_t workspace_size) {
  return tfmtseg::InfoNceForward(nullptr, *arguments, loss, log_sum_exp, positive_similarity,
                                 workspace, workspace_size);
}

int backward(const InfoNceArguments* arguments, const float* row_gradients,
             const float* log_sum_exp, const float* positive_similarity, void* grad_queries,
             void* grad_keys, float* grad_temperature, void* workspace, size_t workspace_size) {
  return tfmtseg::InfoNceBackward(nullptr, *arguments, row_gradients, log_sum_exp,
                                  positive_similarity, grad_queries, grad_keys, grad_temperature,
                                  workspace, workspace_size);
}

int forward_backward(const InfoNceArguments* arguments, const float* row_weights, float* loss,
                     float* log_sum_exp, float* positive_similarity, void* grad_queries,
                     void* grad_keys, float* grad_temperature, void* workspace,
                     size_t workspace_size) {
  return tfmtseg::InfoNceForwardBackward(nullptr, *arguments, row_weights, loss, log_sum_exp,
                                         positive_similarity, grad_queries, grad_keys,
                                         grad_temperature, workspace, workspace_size);
}

int normalize_rows(int type, const void* rows, int64_t n, int64_t d, float epsilon,
                   void* normalized, float* inverse_norms) {
  return tfmtseg::NormalizeRows(nullptr, static_cast<tfmtseg::DataType>(type), rows, n, d, epsilon,
                                normalized, inverse_norms);
}

int normalize_rows_backward(int type, const void* rows, const float* inverse_norms,
                            const void* grad_normalized, int64_t n, int64_t d, float epsilon,
                            void* grad_rows) {
  return tfmtseg::NormalizeRowsBackward(nullptr, static_cast<tfmtseg::DataType>(type), rows,
                                        inverse_norms, grad_normalized, n, d, epsilon, grad_rows);
}

const char* error_string(int error) { return tfmtseg::InfoNceErrorString(error); }

size_t group_norm_workspace_size(const GroupNormArguments* arguments) {
  return tfmtseg::GroupNormWorkspaceSize(*arguments);
}

int group_norm_forward(const GroupNormArguments* arguments, float epsilon, void* y, float* mean,
                       float* rstd, void* workspace, size_t workspace_size) {
  return tfmtseg::GroupNormReluForward(nullptr, *arguments, epsilon, y, mean, rstd, workspace,
                                       workspace_size);
}

int group_norm_backward(const GroupNormArguments* arguments, const void* upstream,
                        const float* mean, const float* rstd, void* grad_x, float* grad_gamma,
                        float* grad_beta, void* workspace, size_t workspace_size) {
  return tfmtseg::GroupNormReluBackward(nullptr, *arguments, upstream, mean, rstd, grad_x,
                                        grad_gamma, grad_beta, workspace, workspace_size);
}

}  // extern "C"
