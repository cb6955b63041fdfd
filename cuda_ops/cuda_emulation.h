// CUDA kernels on the CPU, for tests on machines without a GPU: the same sources, compiled by a
// C++ compiler with -DTFMTSEG_CUDA_EMULATION.
//
// One block runs at a time; its threads are fibres that run until they have to wait for each
// other. The emulation is stricter than a device where that finds mistakes:
//   - __syncthreads, shuffles and mma abort unless all threads concerned arrive at the same call;
//   - dynamic shared memory starts as NaN in every block and may not be written past its end;
//   - every warp runs as far ahead of the others as barriers let it, and copies in the background
//     land as late as they can. With reversed_order the last warp runs ahead and copies land at
//     once: where a barrier or a wait is missing, the two give different results.
//
// Fibres switch by longjmp: compile with -U_FORTIFY_SOURCE, whose checks forbid that.
#ifndef TFMTSEG_CUDA_OPS_CUDA_EMULATION_H_
#define TFMTSEG_CUDA_OPS_CUDA_EMULATION_H_

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#define TFMTSEG_HAS_TENSOR_CORES 1

struct CUstream_st;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::isinf;
using std::max;
using std::min;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace tfmtseg {
namespace emulation {

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// What a test may set.
inline int compute_capability_major = 8;
inline bool reversed_order = false;
inline int64_t blocks_wanted = 264;  // 1: no sweep is split

[[noreturn]] inline void Fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: block (%u, %u, %u), thread %u: %s\n", blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x, what);
  std::abort();
}

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

// A meeting of a warp or a block: whoever comes last does the work for all.
struct Meeting {
  const void* purpose = nullptr;
  unsigned arrived = 0;
};

struct Copy {
  void* shared;
  const void* global;  // null: zeros
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  State state;
  bool started;
  unsigned thread;
  jmp_buf point;
  ucontext_t start;
  std::vector<Copy> copies;  // begun and not waited for
  void* contribution;  // to the meeting it waits for
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
};
inline Block* block = nullptr;
inline unsigned char* dynamic_shared = nullptr;

inline void ToScheduler() {
  if (_setjmp(block->current->point) == 0) _longjmp(block->scheduler, 1);
}

inline void RunFiber() {
  (*block->kernel)();
  block->current->state = State::kDone;
  _longjmp(block->scheduler, 1);
}

__attribute__((noinline)) inline void Resume(Fiber* fiber) {
  block->current = fiber;
  threadIdx = dim3(fiber->thread);
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->point, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

// Waits until all `count` threads from `first` on have come here for the same `purpose`. The last
// one calls `work(fibers)` before anyone goes on.
template <typename Work>
void Meet(Meeting* meeting, unsigned first, unsigned count, const void* purpose,
          void* contribution, Work work) {
  Fiber* const fibers = block->fibers.data() + first;
  if (meeting->arrived == 0) meeting->purpose = purpose;
  if (meeting->purpose != purpose) Fail("threads wait for each other at different places");
  block->current->contribution = contribution;
  if (++meeting->arrived < count) {
    block->current->state = State::kWaiting;
    ToScheduler();
    return;
  }
  meeting->arrived = 0;
  work(fibers);
  for (unsigned i = 0; i < count; ++i) fibers[i].state = State::kReady;
}

template <typename Work>
void MeetWarp(const void* purpose, void* contribution, Work work) {
  const unsigned warp = block->current->thread / kWarp;
  Meet(&block->warps[warp], warp * kWarp, kWarp, purpose, contribution, work);
}

// One address per purpose.
template <typename T, int kWhich>
const void* Purpose() {
  static const char here = 0;
  return &here;
}

inline void RunBlock(unsigned threads, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() < threads) stacks.emplace_back(new unsigned char[kStackBytes]);
  Block here;
  here.fibers.resize(threads);
  here.warps.resize((threads + kWarp - 1) / kWarp);
  here.kernel = &kernel;
  block = &here;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = here.fibers[i];
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.thread = i;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks[i].get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, RunFiber, 0);
  }
  // Every warp runs ahead of the others as far as barriers let it.
  const unsigned warps = static_cast<unsigned>(here.warps.size());
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = (reversed_order ? warps - 1 - w : w) * kWarp;
      const unsigned count = std::min<unsigned>(kWarp, threads - first);
      for (bool running = true; running;) {
        running = false;
        for (unsigned i = 0; i < count; ++i) {
          Fiber& fiber = here.fibers[first + (reversed_order ? count - 1 - i : i)];
          if (fiber.state != State::kReady) continue;
          running = progress = true;
          Resume(&fiber);
        }
      }
    }
  }
  for (const Fiber& fiber : here.fibers) {
    if (fiber.state != State::kDone) Fail("threads wait for others that are gone");
  }
  block = nullptr;
}

template <typename T>
float Decode(uint16_t bits);

// The 16-bit element at `index` of the pairs in a register array.
template <typename T>
float Element(const uint32_t* registers, int index) {
  return Decode<T>(static_cast<uint16_t>(registers[index / 2] >> (index % 2 * 16)));
}

// Adds `left` [kProducts] times `right` [kProducts, 8] to `sums` [8] as tensor cores do: each term
// is cut, toward zero, to kFractionBits below the leading bit of the largest, and the sum to
// float32. 8 and 24 are Ampere's and Ada's figures; Hopper takes 16 products and 25 bits. Measured
// by Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ Computer
// Science 7:e330, 2021) and Xie et al., "MMA-Sim" (arXiv:2511.10909).
inline void AddProducts(const float* left, const float (*right)[8], float* sums) {
  constexpr int kProducts = 8;
  constexpr int kFractionBits = 24;
  constexpr int kBias = 127;  // of float32's exponents
  float terms[kProducts + 1][8];
  int32_t exponents[8];  // biased, of the largest term
  int infinite = 0;
  for (int column = 0; column < 8; ++column) {
    terms[kProducts][column] = sums[column];
    exponents[column] = kBias - 100;  // what is below 2^-124 is cut: the scale stays finite
  }
  for (int k = 0; k < kProducts; ++k) {
    for (int column = 0; column < 8; ++column) terms[k][column] = left[k] * right[k][column];
  }
  for (const float(&term)[8] : terms) {
    for (int column = 0; column < 8; ++column) {
      const int32_t exponent = static_cast<int32_t>(BitsOf(term[column]) >> 23 & 255);
      exponents[column] = std::max(exponents[column], exponent);
      infinite |= exponent == 255;
    }
  }
  if (infinite) {  // or NaN
    for (int k = 0; k < kProducts; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += terms[k][column];
    }
    return;
  }
  for (int column = 0; column < 8; ++column) {
    const int shift = kBias + kFractionBits - exponents[column];
    const float scale = FloatOf(static_cast<uint32_t>(kBias + shift) << 23);
    int32_t units = 0;  // nine terms below 2^25
    for (const float(&term)[8] : terms) units += static_cast<int32_t>(term[column] * scale);
    const double sum = units;
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof(bits));
    bits &= ~uint64_t{0} << 29;  // the bits that a double has and float32 has not
    double cut;
    std::memcpy(&cut, &bits, sizeof(cut));
    sums[column] = static_cast<float>(cut) / scale;
  }
}

}  // namespace emulation
}  // namespace tfmtseg

// ---- Conversions, to nearest even.

inline float __bfloat162float(__nv_bfloat16 x) {
  return tfmtseg::emulation::FloatOf(static_cast<uint32_t>(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = tfmtseg::emulation::BitsOf(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (x != x) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude == 0.0f) return {sign};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // In units of the last place; nearbyint rounds to nearest even. A carry into the exponent is
  // what the encoding wants.
  const int place = std::max(exponent - 11, -24);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -place)));
  const int biased = place + 24;
  return {static_cast<uint16_t>(sign | (biased * 1024 + units))};
}

template <>
inline float tfmtseg::emulation::Decode<__half>(uint16_t bits) {
  return __half2float({bits});
}
template <>
inline float tfmtseg::emulation::Decode<__nv_bfloat16>(uint16_t bits) {
  return __bfloat162float({bits});
}

// ---- Threads that wait for each other.

inline void SyncThreadsOfLine(uintptr_t line) {
  using namespace tfmtseg::emulation;
  Meet(&block->all, 0, static_cast<unsigned>(block->fibers.size()),
       reinterpret_cast<const void*>(line), nullptr, [](Fiber*) {});
}
// The line tells barriers apart.
#define __syncthreads() SyncThreadsOfLine(__LINE__)

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  using namespace tfmtseg::emulation;
  struct Values {
    T in, out;
  } values = {value, value};
  MeetWarp(Purpose<T, 0>(), &values, [lane_mask](Fiber* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      static_cast<Values*>(lanes[i].contribution)->out =
          static_cast<Values*>(lanes[i ^ lane_mask].contribution)->in;
    }
  });
  return values.out;
}

inline bool __any_sync(unsigned, bool value) {
  using namespace tfmtseg::emulation;
  MeetWarp(Purpose<bool, 1>(), &value, [](Fiber* lanes) {
    bool any = false;
    for (int i = 0; i < kWarp; ++i) any = any || *static_cast<bool*>(lanes[i].contribution);
    for (int i = 0; i < kWarp; ++i) *static_cast<bool*>(lanes[i].contribution) = any;
  });
  return value;
}

// ---- The runtime.

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = tfmtseg::emulation::compute_capability_major;
  return cudaSuccess;
}

constexpr int CUDART_VERSION = 0;

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
};

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"CPU emulation", tfmtseg::emulation::compute_capability_major, 0, 1};
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, CUstream_st*) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "operation not supported";
}

// ---- The functions of cuda_primitives.cuh.

namespace tfmtseg {

inline int64_t BlocksWanted() { return emulation::blocks_wanted; }

template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
           CUstream_st*, const Arguments&... arguments) {
  constexpr size_t kMostSharedBytes = 99 << 10;  // of the smallest device with tensor cores
  constexpr unsigned char kCanary = 0xa5;
  constexpr size_t kCanaries = 64;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || shared_bytes > kMostSharedBytes) {
    return cudaErrorInvalidValue;
  }
  std::vector<unsigned char> memory(shared_bytes + kCanaries + 128);
  emulation::dynamic_shared =
      memory.data() + 128 - reinterpret_cast<uintptr_t>(memory.data()) % 128;
  gridDim = grid;
  blockDim = threads;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(emulation::dynamic_shared, 0xff, shared_bytes);
        unsigned char* const end = emulation::dynamic_shared + shared_bytes;
        std::memset(end, kCanary, kCanaries);
        emulation::RunBlock(threads.x, body);
        if (std::count(end, end + kCanaries, kCanary) != kCanaries) {
          emulation::Fail("wrote past the end of shared memory");
        }
      }
    }
  }
  return cudaSuccess;
}

inline unsigned char* DynamicShared() { return emulation::dynamic_shared; }

inline void WaitForCopies() {
  std::vector<emulation::Copy>& copies = emulation::block->current->copies;
  for (const emulation::Copy& copy : copies) {
    if (copy.global) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
  }
  copies.clear();
}

inline void CopyAsync16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    emulation::Fail("copy of 16 bytes is not aligned");
  }
  emulation::block->current->copies.push_back({shared, valid ? global : nullptr});
  if (emulation::reversed_order) WaitForCopies();
}

template <bool kTransposed>
void EmulatedLoadMatrices(uint32_t (&matrices)[4], const void* shared) {
  using namespace emulation;
  struct Lane {
    const uint16_t* address;
    uint32_t (&matrices)[4];
  } lane = {static_cast<const uint16_t*>(shared), matrices};
  if (reinterpret_cast<uintptr_t>(shared) % 16) Fail("ldmatrix: address is not aligned");
  MeetWarp(Purpose<Lane, kTransposed>(), &lane, [](Fiber* lanes) {
    const auto row_of = [lanes](int i) {
      return static_cast<Lane*>(lanes[i].contribution)->address;
    };
    for (int i = 0; i < kWarp; ++i) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;
        for (int e = 0; e < 2; ++e) {
          const int row = kTransposed ? i % 4 * 2 + e : i / 4;
          const int column = kTransposed ? i / 4 : i % 4 * 2 + e;
          pair |= static_cast<uint32_t>(row_of(8 * matrix + row)[column]) << 16 * e;
        }
        static_cast<Lane*>(lanes[i].contribution)->matrices[matrix] = pair;
      }
    }
  });
}

inline void LoadMatrices(uint32_t (&matrices)[4], const void* shared) {
  EmulatedLoadMatrices<false>(matrices, shared);
}

inline void LoadMatricesTransposed(uint32_t (&matrices)[4], const void* shared) {
  EmulatedLoadMatrices<true>(matrices, shared);
}

// The layout of fragments is that of the PTX manual, "Matrix fragments for mma.m16n8k16".
template <typename T>
void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  struct Lane {
    float (&c)[4];
    const uint32_t (&a)[4];
    uint32_t b[2];
  } lane = {c, a, {b0, b1}};
  MeetWarp(Purpose<Lane, 0>(), &lane, [](Fiber* lanes) {
    float left[16][16];
    float right[16][8];
    float sums[16][8];
    for (int i = 0; i < kWarp; ++i) {
      const Lane& from = *static_cast<Lane*>(lanes[i].contribution);
      const int group = i / 4;
      const int in_group = i % 4;
      for (int e = 0; e < 8; ++e) {
        left[group + e / 2 % 2 * 8][in_group * 2 + e % 2 + e / 4 * 8] = Element<T>(from.a, e);
      }
      for (int e = 0; e < 4; ++e) {
        right[in_group * 2 + e % 2 + e / 2 * 8][group] = Element<T>(from.b, e);
        sums[group + e / 2 * 8][in_group * 2 + e % 2] = from.c[e];
      }
    }
    for (int row = 0; row < 16; ++row) {
      AddProducts(left[row], right, sums[row]);
      AddProducts(left[row] + 8, right + 8, sums[row]);
    }
    for (int i = 0; i < kWarp; ++i) {
      const Lane& to = *static_cast<Lane*>(lanes[i].contribution);
      for (int e = 0; e < 4; ++e) to.c[e] = sums[i / 4 + e / 2 * 8][i % 4 * 2 + e % 2];
    }
  });
}

template <typename T>
uint32_t PackPair(float first, float second);

template <>
inline uint32_t PackPair<__half>(float first, float second) {
  return __float2half_rn(first).bits | static_cast<uint32_t>(__float2half_rn(second).bits) << 16;
}

template <>
inline uint32_t PackPair<__nv_bfloat16>(float first, float second) {
  return __float2bfloat16_rn(first).bits |
         static_cast<uint32_t>(__float2bfloat16_rn(second).bits) << 16;
}

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_CUDA_EMULATION_H_
