// Chooses the instruction set of GroupNorm and ReLU on CPU.

#include "group_norm_cpu.h"

namespace tfmtseg {

namespace group_norm_generic {
extern const GroupNormCode kCode;
}
#ifdef __x86_64__
namespace group_norm_avx2 {
extern const GroupNormCode kCode;
}
namespace group_norm_avx512 {
extern const GroupNormCode kCode;
}
#endif

namespace {

const GroupNormCode& Code() {
  static const GroupNormCode& code = []() -> const GroupNormCode& {
    switch (ChooseInstructionSet()) {
#ifdef __x86_64__
      case InstructionSet::kAvx512BFloat16:
      case InstructionSet::kAvx512:
        return group_norm_avx512::kCode;
      case InstructionSet::kAvx2:
        return group_norm_avx2::kCode;
#endif
      default:
        return group_norm_generic::kCode;
    }
  }();
  return code;
}

}  // namespace

void GroupNormReluCpu(const GroupNormProblem& problem, float epsilon,
                      const ParallelFor& parallel_for, const Allocate& allocate, void* y,
                      float* mean, float* rstd) {
  Code().forward(problem, epsilon, parallel_for, allocate, y, mean, rstd);
}

void GroupNormReluGradientsCpu(const GroupNormProblem& problem, const void* upstream,
                               const float* mean, const float* rstd,
                               const ParallelFor& parallel_for, const Allocate& allocate,
                               void* grad_x, float* grad_gamma, float* grad_beta) {
  Code().gradients(problem, upstream, mean, rstd, parallel_for, allocate, grad_x, grad_gamma,
                   grad_beta);
}

}  // namespace tfmtseg
