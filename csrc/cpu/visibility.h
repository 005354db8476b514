// SPDX-License-Identifier: Apache-2.0
// Which pieces of the score matrix a dense mask leaves, read once per call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace pfa::cpu {

// What a dense mask leaves of each strip_rows x kPanel piece.
class VisibilityMap {
 public:
  VisibilityMap(const Problem& problem, int strip_rows)
      : problem_(problem),
        strip_rows_(strip_rows),
        masks_(problem.mask.batch == 0 ? 1 : problem.batch),
        strips_(ceil_div(problem.seqlen_q, strip_rows)),
        panels_(ceil_div(problem.seqlen_k, kPanel)),
        map_(static_cast<size_t>(masks_ * strips_ * panels_), Visibility::kNone) {}

  [[nodiscard]] int64_t tasks() const { return masks_ * strips_; }
  [[nodiscard]] int64_t bytes() const { return tasks() * strip_rows_ * problem_.seqlen_k; }
  void run(int64_t task) { classify(task / strips_, task % strips_); }

  void attach(Plan& plan) const {
    plan.visibility = map_.data();
    plan.visibility_batch = masks_ == 1 ? 0 : strips_ * panels_;
    plan.visibility_row = panels_;
  }

 private:
  // A mask that several batch elements share is classified over its whole extent: what lies past a
  // shorter element's lengths exists, and calling a piece kSome is always right.
  void classify(int64_t b, int64_t strip) {
    const bool shared = masks_ == 1;
    const int64_t rows = shared ? problem_.seqlen_q : problem_.rows_used(b);
    const int64_t keys = shared ? problem_.seqlen_k : problem_.keys_used(b);
    const int64_t begin = strip * strip_rows_, end = std::min(rows, begin + strip_rows_);
    Visibility* out = map_.data() + (b * strips_ + strip) * panels_;
    for (int64_t panel = 0; panel * kPanel < keys; ++panel) {
      const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, keys - first);
      bool any_kept = false, any_masked = false;
      for (int64_t row = begin; row < end && !(any_kept && any_masked); ++row) {
        const uint8_t* mask =
            problem_.mask.data + b * problem_.mask.batch + row * problem_.mask.row + first;
        int64_t masked = 0;
        for (int64_t j = 0; j < count; ++j) masked += mask[j] != 0;
        any_masked |= masked > 0;
        any_kept |= masked < count;
      }
      if (any_kept) out[panel] = any_masked ? Visibility::kSome : Visibility::kAll;
    }
  }

  const Problem& problem_;
  int64_t strip_rows_, masks_, strips_, panels_;
  std::vector<Visibility> map_;
};

}  // namespace pfa::cpu
