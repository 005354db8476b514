// SPDX-License-Identifier: Apache-2.0
// Online softmax of one strip: scores of kRows query rows against the visible key panels of a tile.
//
// Running maxima are kept in units of log2: p = 2^(s * scale_log2 - row_max). A row that has seen
// no key has row_max = -FLT_MAX rather than -inf, so that subtracting it never gives NaN.
// NaN scores never become the maximum, but their p is NaN and so is the row's sum.
#pragma once

namespace pfa::cpu::PFA_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNoMax = -3.402823466e38f;

// What a strip sees of one tile.
struct StripView {
  int panels = 0;             // visible key panels
  int panel[kMaxPanels];      // their indices in the tile, ascending
  bool masked = false;        // some pair of a visible panel is not visible
  int begin[kRows];           // row r sees tile columns [begin, end) by band and length
  int end[kRows];
  const uint8_t* mask[kRows];  // dense mask at tile column 0; null: none, or all visible
  const void* bias[kRows];     // bias at tile column 0; null: none
  int columns = 0;             // tile columns that exist: mask and bias hold no more
};

// How scores become probabilities, for a whole call.
struct SoftmaxParams {
  float scale_log2 = 0.0f;  // softmax_scale * log2(e), int8: * descale_s
  bool monotonic = false;   // scale_log2 >= 0: the largest score has the largest exponent
  bool bias_is_bf16 = false;
  float p_scale = 1.0f;  // kQuantised: |quant_scale1|
  float p_limit = 0.0f;  // kQuantised: 127, or 128 where quant_scale1 < 0 (saturation at -128)
};

template <class Dot>
PFA_INLINE VF load_score(const uint32_t* s) {
  if constexpr (Dot::kInt) {
    return to_float(iload(s));
  } else {
    return as_float(iload(s));
  }
}

// Replaces the strip's raw scores by floats in units of log2 with bias added and masked pairs at
// -inf; returns the maximum of the row.
template <class Dot>
float finish_scores(const StripView& view, const SoftmaxParams& params, float scale_log2,
                    int r, uint32_t* s) {
  VF largest = splat(-INFINITY);
  for (int i = 0; i < view.panels; ++i) {
    const int base = view.panel[i] * kPanel;
    const bool partial = view.begin[r] > base || view.end[r] < base + kPanel;
    for (int v = 0; v < kPanel; v += kLanes) {
      const int column = base + v;
      const int count = std::clamp(view.columns - column, 0, kLanes);
      uint32_t* at = s + i * kPanel + v;
      VF x = mul(load_score<Dot>(at), splat(scale_log2));
      if (view.bias[r]) {
        const auto* bias = static_cast<const uint16_t*>(view.bias[r]) + column;
        const VF value = params.bias_is_bf16 ? load_bf16(bias, count) : load_f16(bias, count);
        x = fma(value, splat(kLog2e), x);
      }
      if (partial) x = keep_range(x, view.begin[r] - column, view.end[r] - column);
      if (view.mask[r]) x = drop_masked(x, view.mask[r] + column, count);
      store(reinterpret_cast<float*>(at), x);
      largest = max(x, largest);
    }
  }
  return reduce_max(largest);
}

// Maximum of a row of raw scores, in units of log2.
template <class Dot>
PFA_INLINE float raw_max(const uint32_t* s, int columns, float scale_log2) {
  if constexpr (Dot::kInt) {
    VI m0 = iload(s), m1 = m0;
    for (int i = 0; i < columns; i += 2 * kLanes) {
      m0 = imax(iload(s + i), m0);
      m1 = imax(iload(s + i + kLanes), m1);
    }
    return static_cast<float>(reduce_imax(imax(m0, m1))) * scale_log2;
  } else {
    const auto* x = reinterpret_cast<const float*>(s);
    VF m0 = splat(-INFINITY), m1 = m0;
    for (int i = 0; i < columns; i += 2 * kLanes) {
      m0 = max(load(x + i), m0);
      m1 = max(load(x + i + kLanes), m1);
    }
    return reduce_max(max(m0, m1)) * scale_log2;
  }
}

// s: scores of one row; writes P to p and returns the sum of the unrounded values.
template <class Score, class Dot>
PFA_INLINE float exponentiate(const SoftmaxParams& params, float scale_log2, float row_max,
                              int columns, uint32_t* s, uint32_t* p) {
  const VF scale = splat(scale_log2), offset = splat(-row_max);
  VF sum0 = splat(0.0f), sum1 = sum0;
  for (int i = 0; i < columns; i += 2 * kLanes) {
    const VF e0 = exp2<Dot::kDegree>(fma(load_score<Score>(s + i), scale, offset));
    const VF e1 = exp2<Dot::kDegree>(fma(load_score<Score>(s + i + kLanes), scale, offset));
    sum0 = add(sum0, e0);
    sum1 = add(sum1, e1);
    if constexpr (Dot::kScaled) {
      store(reinterpret_cast<float*>(s + i), e0);
      store(reinterpret_cast<float*>(s + i + kLanes), e1);
    } else if constexpr (Dot::kQuantised) {
      const VF k = splat(params.p_scale), limit = splat(params.p_limit);
      Dot::store_p(p, i, min(mul(e0, k), limit), min(mul(e1, k), limit));
    } else {
      Dot::store_p(p, i, e0, e1);
    }
  }
  return reduce_add(add(sum0, sum1));
}

// Scores s[kRows][kMaxBlockN] -> probabilities p[kRows][ldp words]; updates the running row_max and
// row_sum, and gives the factor alpha[r] for what the row has accumulated so far. row_scale[r]
// multiplies scale_log2 on the way in, and on the way out is the unit of the stored P; both are
// 1 unless Dot::kScaled.
template <class Dot>
PFA_INLINE void softmax_strip(const StripView& view, const SoftmaxParams& params,
                              uint32_t* s, uint32_t* p, int64_t ldp, float* row_max,
                              float* row_sum, float* alpha, float* row_scale) {
  constexpr int kPadded = (kRows + kLanes - 1) / kLanes * kLanes;
  alignas(64) float largest[kPadded], scale[kPadded];
  const int columns = view.panels * kPanel;
  const bool finish = view.masked || view.bias[0] || !params.monotonic;
  for (int r = 0; r < kPadded; ++r) {
    scale[r] = r < kRows ? params.scale_log2 * (Dot::kScaled ? row_scale[r] : 1.0f) : 0.0f;
    if (r >= kRows) {
      largest[r] = kNoMax;
    } else if (finish) {
      largest[r] = finish_scores<Dot>(view, params, scale[r], r, s + r * kMaxBlockN);
    } else {
      largest[r] = raw_max<Dot>(s + r * kMaxBlockN, columns, scale[r]);
    }
  }
  for (int r = 0; r < kPadded; r += kLanes) {  // row_max and alpha have room for kPadded rows
    const VF old = load(row_max + r), updated = max(load(largest + r), old);
    store(alpha + r, exp2<5>(sub(old, updated)));
    store(largest + r, updated);
  }
  for (int r = 0; r < kRows; ++r) {
    uint32_t* row = s + r * kMaxBlockN;
    const float sum = finish ? exponentiate<DotF32<false>, Dot>(params, 1.0f, largest[r], columns,
                                                                row, p + r * ldp)
                             : exponentiate<Dot, Dot>(params, scale[r], largest[r], columns, row,
                                                      p + r * ldp);
    row_max[r] = largest[r];
    row_sum[r] = row_sum[r] * alpha[r] + sum;
    if constexpr (Dot::kScaled) row_scale[r] = Dot::store_fixed(row, sum, columns, p + r * ldp);
  }
}

}  // namespace pfa::cpu::PFA_ISA
