// Chooses the instruction set of InfoNCE on CPU.

#include "info_nce_cpu.h"

#include <cstdlib>
#include <cstring>

namespace tfmtseg {

using Run = void (*)(const InfoNceProblem&, const ParallelFor&, const InfoNceResult&);

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
#endif

namespace {

Run Choose() {
#ifdef __x86_64__
  const char* asked = std::getenv("TFMTSEG_INSTRUCTION_SET");
  const auto allowed = [asked](const char* name) {
    return asked == nullptr || std::strcmp(asked, name) == 0;
  };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return info_nce_avx512::kRun;
  }
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return info_nce_avx2::kRun;
  }
#endif
  return info_nce_generic::kRun;
}

}  // namespace

void InfoNceCpu(const InfoNceProblem& problem, const ParallelFor& parallel_for,
                const InfoNceResult& result) {
  static const Run run = Choose();
  run(problem, parallel_for, result);
}

}  // namespace tfmtseg
