// SPDX-License-Identifier: Apache-2.0
// How many pieces the keys of a block are cut into. Knows numbers of blocks, no kernels.
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

}  // namespace pfa::cuda
