// SPDX-License-Identifier: Apache-2.0
// The two products of a strip of kRows query rows with a packed tile, on vector registers.
#pragma once

namespace pfa::cpu::PFA_ISA {

// acc[r][v] += sum over g of a[r * lda + g] . b[g * kPanel + v * kLanes ...]
template <class Dot, int kCount>
PFA_INLINE void multiply(typename Dot::Acc (&acc)[kRows][kCount], const uint32_t* a, int64_t lda,
                         const uint32_t* b, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    VI bv[kCount];
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) bv[v] = iload(b + g * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VI av = isplat(static_cast<int32_t>(a[r * lda + g]));
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) acc[r][v] = Dot::mac(acc[r][v], av, bv[v]);
    }
  }
}

// s[r][i * 64 + v ...] = q rows . kCount vectors of keys from column v of visible panel i
template <class Dot, int kCount>
PFA_INLINE void score_columns(const Strip<Dot>& strip, int i, int v) {
  const uint32_t* keys = strip.words() + strip.layout.keys(strip.view.panel[i]);
  const uint32_t* words = keys + (Dot::kUnsignedA ? kPanel : 0);
  typename Dot::Acc acc[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      if constexpr (Dot::kUnsignedA) {
        acc[r][u] = iload(keys + v + u * kLanes);
      } else {
        acc[r][u] = Dot::zero();
      }
    }
  }
  multiply<Dot>(acc, strip.q(), strip.scratch.ldq, words + v, strip.layout.groups_k);
  uint32_t* s = strip.scratch.s + i * kPanel + v;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      istore(s + r * kMaxBlockN + u * kLanes, as_int(acc[r][u]));
    }
  }
}

template <class Dot>
PFA_NOINLINE void score_strip(const Strip<Dot>& strip) {
  constexpr int kStep = kVectors * kLanes, kNarrow = kColumnStep / kLanes;
  for (int i = 0; i < strip.view.panels; ++i) {
    const int width = strip.view.width(i);
    int v = 0;
    for (; v + kStep <= width; v += kStep) score_columns<Dot, kVectors>(strip, i, v);
    for (; v < width; v += kColumnStep) score_columns<Dot, kNarrow>(strip, i, v);
  }
}

// o[r][kCount vectors from channel d] = factor[r] * o + p . values of visible panels [begin, end)
template <class Dot, int kCount>
PFA_NOINLINE void accumulate_panels(const Strip<Dot>& strip, int64_t d, int begin, int end,
                                    const float* factor) {
  typename Dot::Acc acc[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) acc[r][u] = Dot::zero();
  }
  constexpr int kGroups = kPanel / Dot::kPack;
  static_assert(kColumnStep % Dot::kPack == 0);
  const int d_panel = static_cast<int>(d / kPanel);
  for (int i = begin; i < end; ++i) {
    const int panel = strip.view.panel[i];
    if (strip.has_nonfinite(panel)) continue;
    multiply<Dot>(acc, strip.scratch.p + i * kGroups, strip.scratch.ldp,
                  strip.words() + strip.layout.values(panel, d_panel) + d % kPanel,
                  strip.view.width(i) / Dot::kPack);
  }
  const auto* units =
      reinterpret_cast<const float*>(strip.words() + strip.layout.channel_units()) + d;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      float* at = strip.o() + r * strip.scratch.ldo + d + u * kLanes;
      VF sum = to_float(acc[r][u]);
      if constexpr (Dot::kScaled) {
        sum = mul(mul(sum, splat(strip.unit[r])), load(units + u * kLanes));
      }
      store(at, fma(load(at), splat(factor[r]), sum));
    }
  }
}

// The same for all visible panels; in fixed point one at a time, their sums would not fit.
template <class Dot, int kCount>
PFA_INLINE void accumulate_channels(const Strip<Dot>& strip, int64_t d) {
  const int panels = strip.view.panels;
  if constexpr (Dot::kScaled) {
    static constexpr auto kOnes = [] {
      std::array<float, kRows> ones{};
      for (float& x : ones) x = 1.0f;
      return ones;
    }();
    for (int i = 0; i < panels; ++i) {
      accumulate_panels<Dot, kCount>(strip, d, i, i + 1, i == 0 ? strip.alpha : kOnes.data());
    }
  } else {
    accumulate_panels<Dot, kCount>(strip, d, 0, panels, strip.alpha);
  }
}

template <class Dot>
PFA_INLINE void accumulate_strip(const Strip<Dot>& strip) {
  constexpr int kStep = kVectors * kLanes;
  int64_t d = 0;
  for (; d + kStep <= strip.layout.head_dim; d += kStep) {
    accumulate_channels<Dot, kVectors>(strip, d);
  }
  switch (ceil_div(strip.layout.head_dim - d, kLanes)) {  // vectors left
    case 0:
      break;
    case 1:
      accumulate_channels<Dot, 1>(strip, d);
      break;
    case 2:
      accumulate_channels<Dot, std::min(2, kVectors)>(strip, d);
      break;
    case 3:
      accumulate_channels<Dot, std::min(3, kVectors)>(strip, d);
      break;
    default:
      accumulate_channels<Dot, kVectors>(strip, d);
  }
}

}  // namespace pfa::cpu::PFA_ISA
