// What the ops on CPU have in common. No TensorFlow header here.

#ifndef TFMTSEG_CPU_RUNTIME_H_
#define TFMTSEG_CPU_RUNTIME_H_

#include <cstdint>
#include <functional>

namespace tfmtseg {

// Runs body(begin, end) over parts of [0, total), perhaps side by side. `cost` is about
// the number of arithmetic operations of one unit. Throws what `body` throws.
using ParallelFor = std::function<void(int64_t total, int64_t cost,
                                       const std::function<void(int64_t, int64_t)>& body)>;

// Gives memory, aligned to 64 bytes, that stays until the op returns. A caller that keeps it
// for the next call spares the system giving out and clearing pages, a tenth of a small call's
// time. Throws std::bad_alloc.
using Allocate = std::function<void*(int64_t bytes)>;

enum class InstructionSet { kGeneric, kAvx2, kAvx512, kAvx512BFloat16 };

// The highest one that the processor has. The environment variable TFMTSEG_INSTRUCTION_SET
// (generic, avx2, avx512, avx512bf16) chooses a lower one.
InstructionSet ChooseInstructionSet();

}  // namespace tfmtseg

#endif  // TFMTSEG_CPU_RUNTIME_H_
