// GroupNorm and ReLU on CPU for one instruction set. Included once by each
// group_norm_cpu_<set>.cc, which defines TFMTSEG_SET (a namespace).
//
// The numbers of a volume are worked on in rows: some whole voxels, so that a row is long enough
// for vectors at any number of channels. What belongs to a channel is kept once for each place of
// a row, and the compiler makes vectors of plain loops over a row. Rows are worked on in blocks
// that fit into the cache; each block leaves sums for each channel, which are put together in one
// order, whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "group_norm_cpu.h"

namespace tfmtseg {
namespace TFMTSEG_SET {

constexpr int64_t kShortestRow = 128;  // numbers
constexpr int64_t kBlock = 1 << 14;    // numbers, about

struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }

inline float ToFloat(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T FromFloat(float x);

template <>
inline float FromFloat<float>(float x) {
  return x;
}

// The nearest, ties to even.
template <>
inline BFloat16 FromFloat<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// What a row's place needs to know of its channel: arrays of a row's length.
struct Channels {
  const float* mean;
  const float* scale;  // rstd * gamma
  const float* beta;
  const float* slope;  // of the gradient in x, and its part that is the same for all voxels
  const float* constant;
};

inline float BeforeRelu(float x, float mean, float scale, float beta) {
  return (x - mean) * scale + beta;
}

// In the loops below, the results lie over an input at the same place or nowhere near it.

template <typename T>
void AddRow(const T* x, int64_t count, float* sums) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) sums[i] += ToFloat(x[i]);
}

template <typename T>
void AddSquares(const T* x, int64_t count, const float* mean, float* sums) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float centred = ToFloat(x[i]) - mean[i];
    sums[i] += centred * centred;
  }
}

template <typename T>
void Normalize(const T* x, int64_t count, const Channels& channels, T* y) {
  const float *mean = channels.mean, *scale = channels.scale, *beta = channels.beta;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float value = BeforeRelu(ToFloat(x[i]), mean[i], scale[i], beta[i]);
    y[i] = FromFloat<T>(value < 0 ? 0 : value);  // NaN stays NaN
  }
}

template <typename T>
void AddGradients(const T* x, const T* upstream, int64_t count, const Channels& channels,
                  float* sums, float* centred_sums) {
  const float *mean = channels.mean, *scale = channels.scale, *beta = channels.beta;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float value = ToFloat(x[i]), up = ToFloat(upstream[i]);
    const float d = BeforeRelu(value, mean[i], scale[i], beta[i]) > 0 ? up : 0;
    sums[i] += d;
    centred_sums[i] += d * (value - mean[i]);
  }
}

template <typename T>
void Gradients(const T* x, const T* upstream, int64_t count, const Channels& channels, T* grad_x) {
  const float *mean = channels.mean, *scale = channels.scale, *beta = channels.beta;
  const float *slope = channels.slope, *constant = channels.constant;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float value = ToFloat(x[i]), up = ToFloat(upstream[i]);
    const float d = BeforeRelu(value, mean[i], scale[i], beta[i]) > 0 ? up : 0;
    grad_x[i] = FromFloat<T>(d * scale[i] - (value - mean[i]) * slope[i] - constant[i]);
  }
}

template <typename T>
class Runner {
 public:
  Runner(const GroupNormProblem& problem, const ParallelFor& parallel_for,
         const Allocate& allocate)
      : p_(problem),
        x_(static_cast<const T*>(problem.x)),
        parallel_for_(parallel_for),
        allocate_(allocate),
        per_group_(problem.channels / problem.groups) {
    const int64_t voxels_per_row = (kShortestRow + p_.channels - 1) / p_.channels;
    row_ = voxels_per_row * p_.channels;
    block_voxels_ = std::max<int64_t>(1, kBlock / row_) * voxels_per_row;
    blocks_ = (p_.voxels + block_voxels_ - 1) / block_voxels_;
    parts_ = New<float>(p_.n * blocks_ * 2 * row_);
    tables_ = New<float>(p_.n * kTables * row_);
  }

  void Forward(float epsilon, T* y, float* mean, float* rstd) {
    // Of each channel of a block the mean, and the sum of the squared differences from it: squares
    // of the numbers themselves would cancel where the mean is large.
    ForBlocks([&](int64_t volume, int64_t block, int64_t first, int64_t count) {
      float* means = Part(volume, block);
      float* squares = means + row_;
      std::fill(means, means + 2 * row_, 0.0f);
      ForRows(first, count, [&](int64_t i, int64_t n) { AddRow(x_ + i, n, means); });
      Fold(means);
      const float voxels = static_cast<float>(Voxels(block));
      for (int64_t c = 0; c < p_.channels; ++c) Spread(c, means[c] / voxels, means);
      ForRows(first, count, [&](int64_t i, int64_t n) { AddSquares(x_ + i, n, means, squares); });
      Fold(squares);
    });
    ForGroups([&](int64_t volume, int64_t group) {
      const double count = Count();
      double sum = 0, squares = 0;
      ForParts(volume, group, [&](double voxels, int64_t, float average, float) {
        sum += voxels * average;
      });
      const double centre = sum / count;
      ForParts(volume, group, [&](double voxels, int64_t, float average, float square) {
        squares += square + voxels * (average - centre) * (average - centre);
      });
      const int64_t i = volume * p_.groups + group;
      mean[i] = static_cast<float>(centre);
      rstd[i] = static_cast<float>(1 / std::sqrt(squares / count + epsilon));
      Tabulate(volume, group, mean[i], rstd[i]);
    });
    ForBlocks([&](int64_t volume, int64_t, int64_t first, int64_t count) {
      const Channels channels = ChannelsOf(volume);
      ForRows(first, count, [&](int64_t i, int64_t n) { Normalize(x_ + i, n, channels, y + i); });
    });
  }

  // With d the gradient before the ReLU, and averages over the group:
  // grad_x = rstd (gamma d - average(gamma d) - normalized x average(gamma d normalized x)).
  void Backward(const T* upstream, const float* mean, const float* rstd, T* grad_x,
                float* grad_gamma, float* grad_beta) {
    ForGroups([&](int64_t volume, int64_t group) {
      const int64_t i = volume * p_.groups + group;
      Tabulate(volume, group, mean[i], rstd[i]);
    });
    // Of each channel of a block the sums of d and of d (x - mean).
    ForBlocks([&](int64_t volume, int64_t block, int64_t first, int64_t count) {
      float* sums = Part(volume, block);
      const Channels channels = ChannelsOf(volume);
      std::fill(sums, sums + 2 * row_, 0.0f);
      ForRows(first, count, [&](int64_t i, int64_t n) {
        AddGradients(x_ + i, upstream + i, n, channels, sums, sums + row_);
      });
      Fold(sums);
      Fold(sums + row_);
    });
    double* by_beta = New<double>(p_.n * p_.channels);
    double* by_gamma = New<double>(p_.n * p_.channels);
    ForGroups([&](int64_t volume, int64_t group) {
      const int64_t first = group * per_group_;
      double* sums = by_beta + volume * p_.channels + first;
      double* centred_sums = by_gamma + volume * p_.channels + first;
      std::fill(sums, sums + per_group_, 0.0);
      std::fill(centred_sums, centred_sums + per_group_, 0.0);
      ForParts(volume, group, [&](double, int64_t c, float sum, float centred_sum) {
        sums[c] += sum;
        centred_sums[c] += centred_sum;
      });
      const double inverse = rstd[volume * p_.groups + group];
      double average = 0, centred_average = 0;
      for (int64_t c = 0; c < per_group_; ++c) {
        average += sums[c] * p_.gamma[first + c] / Count();
        centred_average += centred_sums[c] * p_.gamma[first + c] / Count();
        centred_sums[c] *= inverse;
      }
      const double slope = inverse * inverse * inverse * centred_average;
      for (int64_t c = 0; c < per_group_; ++c) {
        Spread(first + c, static_cast<float>(slope), Table(volume, 3));
        Spread(first + c, static_cast<float>(inverse * average), Table(volume, 4));
      }
    });
    for (int64_t c = 0; c < p_.channels; ++c) {
      double gamma = 0, beta = 0;
      for (int64_t volume = 0; volume < p_.n; ++volume) {
        gamma += by_gamma[volume * p_.channels + c];
        beta += by_beta[volume * p_.channels + c];
      }
      grad_gamma[c] = static_cast<float>(gamma);
      grad_beta[c] = static_cast<float>(beta);
    }
    ForBlocks([&](int64_t volume, int64_t, int64_t first, int64_t count) {
      const Channels channels = ChannelsOf(volume);
      ForRows(first, count, [&](int64_t i, int64_t n) {
        Gradients(x_ + i, upstream + i, n, channels, grad_x + i);
      });
    });
  }

 private:
  static constexpr int64_t kTables = 5;

  template <typename U>
  U* New(int64_t count) const {
    return static_cast<U*>(allocate_(std::max<int64_t>(count, 1) * sizeof(U)));
  }

  float* Part(int64_t volume, int64_t block) const {
    return parts_ + (volume * blocks_ + block) * 2 * row_;
  }
  float* Table(int64_t volume, int64_t which) const {
    return tables_ + (volume * kTables + which) * row_;
  }
  Channels ChannelsOf(int64_t volume) const {
    return {Table(volume, 0), Table(volume, 1), Table(volume, 2), Table(volume, 3),
            Table(volume, 4)};
  }

  // Numbers of a group; where there are none, sums are 0 and may be divided by anything.
  double Count() const {
    return static_cast<double>(std::max<int64_t>(1, p_.voxels * per_group_));
  }

  int64_t Voxels(int64_t block) const {
    return std::min(block_voxels_, p_.voxels - block * block_voxels_);
  }

  // Calls body(volume, block, first number, numbers) for all blocks, side by side.
  template <typename Body>
  void ForBlocks(const Body& body) const {
    parallel_for_(p_.n * blocks_, block_voxels_ * p_.channels * 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t volume = i / blocks_, block = i % blocks_;
        body(volume, block, (volume * p_.voxels + block * block_voxels_) * p_.channels,
             Voxels(block) * p_.channels);
      }
    });
  }

  // Calls body(first number, numbers) for the rows of a block; the last may be shorter.
  template <typename Body>
  void ForRows(int64_t first, int64_t count, const Body& body) const {
    for (int64_t i = 0; i < count; i += row_) body(first + i, std::min(row_, count - i));
  }

  // Calls body(volume, group) for all groups, side by side.
  template <typename Body>
  void ForGroups(const Body& body) const {
    const int64_t cost = per_group_ * (blocks_ * 10 + row_ / p_.channels * kTables);
    parallel_for_(p_.n * p_.groups, cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / p_.groups, i % p_.groups);
    });
  }

  // Calls body(voxels, channel of the group, its two numbers) for each block of a volume.
  template <typename Body>
  void ForParts(int64_t volume, int64_t group, const Body& body) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      const float* part = Part(volume, block) + group * per_group_;
      const double voxels = static_cast<double>(Voxels(block));
      for (int64_t c = 0; c < per_group_; ++c) body(voxels, c, part[c], part[row_ + c]);
    }
  }

  // Adds up, for each channel, what its places of a row hold; the sums are in the first voxel's.
  void Fold(float* places) const {
    for (int64_t i = p_.channels; i < row_; i += p_.channels) {
      for (int64_t c = 0; c < p_.channels; ++c) places[c] += places[i + c];
    }
  }

  // Puts a channel's number into all its places of a row.
  void Spread(int64_t channel, float value, float* places) const {
    for (int64_t i = channel; i < row_; i += p_.channels) places[i] = value;
  }

  void Tabulate(int64_t volume, int64_t group, float mean, float rstd) const {
    for (int64_t c = group * per_group_; c < (group + 1) * per_group_; ++c) {
      Spread(c, mean, Table(volume, 0));
      Spread(c, rstd * p_.gamma[c], Table(volume, 1));
      Spread(c, p_.beta[c], Table(volume, 2));
    }
  }

  const GroupNormProblem& p_;
  const T* const x_;
  const ParallelFor& parallel_for_;
  const Allocate& allocate_;
  const int64_t per_group_;
  int64_t row_;           // numbers
  int64_t block_voxels_;  // of all blocks but a volume's last
  int64_t blocks_;        // of a volume
  float* parts_;   // [n, blocks, 2, row]: what a block leaves for each channel
  float* tables_;  // [n, kTables, row]: see Channels
};

extern const GroupNormCode kCode;
const GroupNormCode kCode = {
    [](const GroupNormProblem& problem, float epsilon, const ParallelFor& parallel_for,
       const Allocate& allocate, void* y, float* mean, float* rstd) {
      const auto run = [&](auto type) {
        using T = decltype(type);
        Runner<T>(problem, parallel_for, allocate)
            .Forward(epsilon, static_cast<T*>(y), mean, rstd);
      };
      problem.is_bfloat16 ? run(BFloat16()) : run(float());
    },
    [](const GroupNormProblem& problem, const void* upstream, const float* mean, const float* rstd,
       const ParallelFor& parallel_for, const Allocate& allocate, void* grad_x, float* grad_gamma,
       float* grad_beta) {
      const auto run = [&](auto type) {
        using T = decltype(type);
        Runner<T>(problem, parallel_for, allocate)
            .Backward(static_cast<const T*>(upstream), mean, rstd, static_cast<T*>(grad_x),
                      grad_gamma, grad_beta);
      };
      problem.is_bfloat16 ? run(BFloat16()) : run(float());
    }};

}  // namespace TFMTSEG_SET
}  // namespace tfmtseg
