// Chooses the instruction set of the ops on CPU.

#include <cstdlib>
#include <cstring>

#include "cpu_runtime.h"

namespace tfmtseg {

InstructionSet ChooseInstructionSet() {
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
    return highest >= 3 && __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512BFloat16
                                                                : InstructionSet::kAvx512;
  }
  if (highest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kGeneric;
}

}  // namespace tfmtseg
