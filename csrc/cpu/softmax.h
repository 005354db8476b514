// SPDX-License-Identifier: Apache-2.0
// Online softmax of one strip: scores of kRows query rows against the visible key panels of a tile.
//
// Without a bias scores and running maxima are in units of log2, p = 2^(s * scale - row_max). With
// one they are in natural units, since the lowest finite bias times log2(e) would be -inf, and a
// row that such biases mask from end to end is an even mean, not zeros. A row that has seen no key
// has row_max = -FLT_MAX rather than -inf, so that subtracting it never gives NaN. NaN scores never
// become the maximum, but their p is NaN and so is the row's sum.
#pragma once

namespace pfa::cpu::PFA_ISA {

template <class Dot>
PFA_INLINE VF load_score(const uint32_t* s) {
  if constexpr (Dot::kInt) {
    return to_float(iload(s));
  } else {
    return as_float(iload(s));
  }
}

// Replaces a row's raw scores by scaled floats with bias added and masked pairs at -inf; returns
// their maximum.
template <class Dot>
float finish_scores(const StripView& view, const SoftmaxParams& params, float scale, int r,
                    uint32_t* s) {
  VF largest = splat(-INFINITY);
  for (int i = 0; i < view.panels; ++i) {
    const int base = view.panel[i] * kPanel;
    const bool partial = view.begin[r] > base || view.end[r] < base + kPanel;
    for (int v = 0; v < view.width(i); v += kLanes) {
      const int column = base + v;
      const int count = std::clamp(view.columns - column, 0, kLanes);
      uint32_t* at = s + i * kPanel + v;
      VF x = mul(load_score<Dot>(at), splat(scale));
      if (view.bias[r]) {
        const auto* bias = static_cast<const uint16_t*>(view.bias[r]) + column;
        const VF value = params.bias_is_bf16 ? load_bf16(bias, count) : load_f16(bias, count);
        x = add_bias(x, value);
      }
      if (partial) x = keep_range(x, view.begin[r] - column, view.end[r] - column);
      if (view.mask[r]) x = drop_masked(x, view.mask[r] + column, count);
      store(reinterpret_cast<float*>(at), x);
      largest = max(x, largest);
    }
  }
  return reduce_max(largest);
}

// Maximum of a row of raw scores, scaled.
template <class Dot>
PFA_INLINE float raw_max(const uint32_t* s, int columns, float scale) {
  if constexpr (Dot::kInt) {
    VI m0 = iload(s), m1 = m0;
    for (int i = 0; i < columns; i += 2 * kLanes) {
      m0 = imax(iload(s + i), m0);
      m1 = imax(iload(s + i + kLanes), m1);
    }
    return static_cast<float>(reduce_imax(imax(m0, m1))) * scale;
  } else {
    const auto* x = reinterpret_cast<const float*>(s);
    VF m0 = splat(-INFINITY), m1 = m0;
    for (int i = 0; i < columns; i += 2 * kLanes) {
      m0 = max(load(x + i), m0);
      m1 = max(load(x + i + kLanes), m1);
    }
    return reduce_max(max(m0, m1)) * scale;
  }
}

// log2 of P of scores as the product left them, and of finished ones.
template <class Dot>
struct RawExponent {
  float scale, row_max;
  PFA_INLINE VF operator()(const uint32_t* s) const {
    return fma(load_score<Dot>(s), splat(scale), splat(-row_max));
  }
};
struct FinishedExponent {
  float log2_per_unit, row_max;
  PFA_INLINE VF operator()(const uint32_t* s) const {
    return mul(sub(as_float(iload(s)), splat(row_max)), splat(log2_per_unit));
  }
};

// Writes P of a row and returns the sum of the unrounded values.
template <class Dot, class Exponent>
PFA_INLINE float exponentiate(const Strip<Dot>& strip, const SoftmaxParams& params, int r,
                              const Exponent& exponent) {
  const uint32_t* s = strip.scratch.s + r * kMaxBlockN;
  uint32_t* p = strip.scratch.p + r * strip.scratch.ldp;
  VF sum0 = splat(0.0f), sum1 = sum0;
  for (int i = 0; i < strip.view.computed_columns(); i += 2 * kLanes) {
    const VF e0 = exp2<Dot::kDegree>(exponent(s + i));
    const VF e1 = exp2<Dot::kDegree>(exponent(s + i + kLanes));
    sum0 = add(sum0, e0);
    sum1 = add(sum1, e1);
    if constexpr (Dot::kQuantised) {
      const VF k = splat(params.p_scale), limit = splat(params.p_limit);
      Dot::store_p(p, i, min(mul(e0, k), limit), min(mul(e1, k), limit));
    } else {
      Dot::store_p(p, i, e0, e1);
    }
  }
  return reduce_add(add(sum0, sum1));
}

// The same for a fixed-point Dot: P times the keys' units, in the largest steps (the strip's unit
// for the row) that keep every panel's sum within Dot::kMaxSumP.
template <class Dot, class Exponent>
PFA_INLINE float exponentiate_fixed(const Strip<Dot>& strip, int r, const Exponent& exponent) {
  auto* s = strip.scratch.s + r * kMaxBlockN;
  VF sum = splat(0.0f), largest = sum, largest_panel = sum;
  for (int i = 0; i < strip.view.panels; ++i) {
    const auto* units = reinterpret_cast<const float*>(strip.words() + strip.layout.key_units()) +
                        strip.view.panel[i] * kPanel;
    VF panel = splat(0.0f);
    for (int v = 0; v < strip.view.width(i); v += kLanes) {
      uint32_t* at = s + i * kPanel + v;
      const VF e = exp2<Dot::kDegree>(exponent(at));
      const VF weight = mul(e, load(units + v));
      sum = add(sum, e);
      panel = add(panel, weight);
      largest = max(weight, largest);
      store(reinterpret_cast<float*>(at), weight);
    }
    largest_panel = max(panel, largest_panel);  // lane by lane: not below any panel's sum
  }
  const float peak = reduce_max(largest), panel_sum = reduce_add(largest_panel);
  const float steps =
      peak > 0.0f ? std::min(Dot::kMaxElement / peak, Dot::kMaxSumP / panel_sum) : 1.0f;
  strip.unit[r] = 1.0f / steps;
  const auto* weights = reinterpret_cast<const float*>(s);
  for (int i = 0; i < strip.view.computed_columns(); i += 2 * kLanes) {
    Dot::store_p(strip.scratch.p + r * strip.scratch.ldp, i, mul(load(weights + i), splat(steps)),
                 mul(load(weights + i + kLanes), splat(steps)));
  }
  return reduce_add(sum);
}

template <class Dot, class Exponent>
PFA_INLINE float weigh_row(const Strip<Dot>& strip, const SoftmaxParams& params, int r,
                           const Exponent& exponent) {
  if constexpr (Dot::kScaled) {
    return exponentiate_fixed<Dot>(strip, r, exponent);
  } else {
    return exponentiate<Dot>(strip, params, r, exponent);
  }
}

// Scores -> probabilities in the strip's scratch; updates the running row_max and row_sum, gives
// the factor alpha[r] for what the row has accumulated so far and, if Dot::kScaled, the units: of
// the scores on the way in, of P on the way out.
template <class Dot>
PFA_INLINE void softmax_strip(const Strip<Dot>& strip, const SoftmaxParams& params) {
  const StripView& view = strip.view;
  const int columns = view.computed_columns();
  const bool finish = view.masked || view.bias[0] || !params.monotonic;
  const auto scores = [&](int r) { return strip.scratch.s + r * kMaxBlockN; };
  alignas(64) float largest[kPaddedRows], scale[kPaddedRows];
  std::fill_n(largest, kPaddedRows, kNoMax);
  for (int r = 0; r < kRows; ++r) {
    scale[r] = params.scale * (Dot::kScaled ? strip.unit[r] : 1.0f);
    largest[r] = finish ? finish_scores<Dot>(view, params, scale[r], r, scores(r))
                        : raw_max<Dot>(scores(r), columns, scale[r]);
  }
  float* row_max = strip.scratch.row_max + strip.first;
  float* row_sum = strip.scratch.row_sum + strip.first;
  for (int r = 0; r < kPaddedRows; r += kLanes) {
    const VF old = load(row_max + r), updated = max(load(largest + r), old);
    store(strip.alpha + r, exp2<5>(mul(sub(old, updated), splat(params.log2_per_unit))));
    store(largest + r, updated);
  }
  for (int r = 0; r < kRows; ++r) {
    const float sum =
        finish
            ? weigh_row<Dot>(strip, params, r, FinishedExponent{params.log2_per_unit, largest[r]})
            : weigh_row<Dot>(strip, params, r, RawExponent<Dot>{scale[r], largest[r]});
    row_max[r] = largest[r];
    row_sum[r] = row_sum[r] * strip.alpha[r] + sum;
  }
}

}  // namespace pfa::cpu::PFA_ISA
