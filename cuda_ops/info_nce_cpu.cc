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

struct InstructionSet {
  const char* name;
  Run run;
};

InstructionSet Choose() {
#ifdef __x86_64__
  const char* asked = std::getenv("TFMTSEG_INSTRUCTION_SET");
  const auto allowed = [asked](const char* name) {
    return asked == nullptr || std::strcmp(asked, name) == 0;
  };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return {"avx512", info_nce_avx512::kRun};
  }
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return {"avx2", info_nce_avx2::kRun};
  }
#endif
  return {"generic", info_nce_generic::kRun};
}

const InstructionSet& Chosen() {
  static const InstructionSet chosen = Choose();
  return chosen;
}

}  // namespace

void InfoNceCpu(const InfoNceProblem& problem, const ParallelFor& parallel_for,
                const InfoNceResult& result) {
  Chosen().run(problem, parallel_for, result);
}

const char* InfoNceCpuInstructionSet() { return Chosen().name; }

}  // namespace tfmtseg
