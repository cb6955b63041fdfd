// Chooses the instruction set of InfoNCE on CPU.

#include "info_nce_cpu.h"

#include <cstdlib>
#include <cstring>

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
#ifdef __x86_64__
  const char* const names[] = {"generic", "avx2", "avx512", "avx512bf16"};
  const char* asked = std::getenv("TFMTSEG_INSTRUCTION_SET");
  int highest = 3;
  for (int i = 0; i < 4; ++i) {
    if (asked != nullptr && std::strcmp(asked, names[i]) == 0) highest = i;
  }
  __builtin_cpu_init();
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (highest >= 2 && has_avx512) {
    const Run any = info_nce_avx512::kRun;
    const bool has_bfloat16 = highest >= 3 && __builtin_cpu_supports("avx512bf16");
    return {any, has_bfloat16 ? info_nce_avx512bf16::kRun : any};
  }
  if (highest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {info_nce_avx2::kRun, info_nce_avx2::kRun};
  }
#endif
  return {info_nce_generic::kRun, info_nce_generic::kRun};
}

}  // namespace

void InfoNceCpu(const InfoNceProblem& problem, const ParallelFor& parallel_for,
                const Allocate& allocate, const InfoNceResult& result) {
  static const Runs runs = Choose();
  (problem.is_bfloat16 ? runs.bfloat16 : runs.any)(problem, parallel_for, allocate, result);
}

}  // namespace tfmtseg
