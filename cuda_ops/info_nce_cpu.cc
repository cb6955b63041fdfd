// Chooses the instruction set of InfoNCE on CPU.

#include "info_nce_cpu.h"

namespace tfmtseg {

using Run = void (*)(const InfoNceProblem&, const ParallelFor&, const Allocate&,
                     const InfoNceResult&);

namespace info_nce_generic {
extern const Run kRun;
}
#ifdef __x86_64__
namespace info_nce_avx2 {
extern const Run kRun;
}
namespace info_nce_avx512 {
extern const Run kRun;
}
namespace info_nce_avx512bf16 {
extern const Run kRun;
}
#endif

namespace {

struct Runs {
  Run any;       // for any numbers
  Run bfloat16;  // where all are bfloat16 numbers
};

Runs Choose() {
  switch (ChooseInstructionSet()) {
#ifdef __x86_64__
    case InstructionSet::kAvx512BFloat16:
      return {info_nce_avx512::kRun, info_nce_avx512bf16::kRun};
    case InstructionSet::kAvx512:
      return {info_nce_avx512::kRun, info_nce_avx512::kRun};
    case InstructionSet::kAvx2:
      return {info_nce_avx2::kRun, info_nce_avx2::kRun};
#endif
    default:
      return {info_nce_generic::kRun, info_nce_generic::kRun};
  }
}

}  // namespace

void InfoNceCpu(const InfoNceProblem& problem, const ParallelFor& parallel_for,
                const Allocate& allocate, const InfoNceResult& result) {
  static const Runs runs = Choose();
  (problem.is_bfloat16 ? runs.bfloat16 : runs.any)(problem, parallel_for, allocate, result);
}

}  // namespace tfmtseg
