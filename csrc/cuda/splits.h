// SPDX-License-Identifier: Apache-2.0
// Which blocks are cut along their keys, and into how many pieces. Knows numbers of blocks, no
// kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "combine.h"

namespace pfa::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// PFA_NUM_SPLITS, or 0.
inline int forced_splits() {
  const char* text = std::getenv("PFA_NUM_SPLITS");
  if (text == nullptr || *text == '\0') return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*end != '\0' || value < 1 || value > kMaxSplits) {
    throw std::runtime_error("PFA_NUM_SPLITS must be a number from 1 to " +
                             std::to_string(kMaxSplits) + ", got " + text);
  }
  return static_cast<int>(value);
}

// The fewest splits that keep the GPU nearly as busy as the best number would: at `slots` blocks at
// a time, blocks * splits of them fill the last wave to at least 85 % of the best fill.
inline int splits_that_fill(int64_t blocks, int64_t slots, int64_t most) {
  if (5 * blocks >= 4 * slots) return 1;
  std::array<double, kMaxSplits + 1> fill{};
  for (int64_t splits = 1; splits <= most; ++splits) {
    const double waves = static_cast<double>(blocks * splits) / static_cast<double>(slots);
    fill[splits] = waves / static_cast<double>(ceil_div(blocks * splits, slots));
  }
  const double best = *std::max_element(fill.begin(), fill.end());
  const auto enough = [best](double x) { return x >= 0.85 * best; };
  return static_cast<int>(std::find_if(fill.begin() + 1, fill.end(), enough) - fill.begin());
}

// The most pieces that a worker's share leaves of a block: it may begin and end within one.
inline int64_t most_pieces(int64_t tiles, int64_t share) { return ceil_div(tiles - 1, share) + 1; }

// The tail of `blocks` blocks of `tiles` tiles each that `workers` compute in rounds, if it pays to
// cut them: what is saved of the last round has to be worth more than its sums, which are stored
// and merged, and at least 1 % of the whole.
inline TailParams tail_that_pays(int64_t blocks, int64_t workers, int64_t tiles, int block_m,
                                 int head_dim) {
  constexpr int64_t kLeastShare = 2;
  const int64_t left = blocks % workers, rounds = ceil_div(blocks, workers);
  const int64_t share =
      std::max({ceil_div(left * tiles, workers), ceil_div(tiles - 1, kMaxSplits - 1), kLeastShare});
  // In tiles, which take about 2 us in all kernels. Predicted for an H100, 68 blocks of int8 and
  // head_dim 128: a share takes 1 us to 2 us longer than as many tiles of a whole block, and the
  // merge 6 us to 9 us.
  const int64_t cost = 3 + left * head_dim / 4096;
  if (left == 0 || 100 * (tiles - share - cost) < rounds * tiles) return {};
  return {blocks - left, static_cast<uint32_t>(left), static_cast<uint32_t>(tiles),
          static_cast<uint32_t>(share), block_m};
}

}  // namespace pfa::cuda
