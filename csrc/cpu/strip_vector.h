// SPDX-License-Identifier: Apache-2.0
// The two products of a strip of kRows query rows with a packed tile, on vector registers.
#pragma once

namespace pfa::cpu::PFA_ISA {

// acc[r][v] += sum over g of a[r * lda + g] . b[g * kPanel + v * kLanes ...]
template <class Dot, int kRows, int kVectors>
PFA_INLINE void multiply(typename Dot::Acc (&acc)[kRows][kVectors], const uint32_t* a, int64_t lda,
                         const uint32_t* b, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    VI bv[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) bv[v] = iload(b + g * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VI av = isplat(static_cast<int32_t>(a[r * lda + g]));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Dot::mac(acc[r][v], av, bv[v]);
    }
  }
}

// s[r][i * 64 + ...] = q rows . keys of visible panel i
template <class Dot>
PFA_NOINLINE void score_strip(const TileLayout<Dot>& layout, const uint32_t* tile,
                            const StripView& view, const uint32_t* q, int64_t ldq,
                            uint32_t* s) {
  for (int i = 0; i < view.panels; ++i) {
    const uint32_t* keys = tile + layout.keys(view.panel[i]);
    const uint32_t* words = keys + (Dot::kUnsignedA ? kPanel : 0);
    for (int v = 0; v < kPanel; v += kVectors * kLanes) {
      typename Dot::Acc acc[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int u = 0; u < kVectors; ++u) {
          if constexpr (Dot::kUnsignedA) {
            acc[r][u] = iload(keys + v + u * kLanes);
          } else {
            acc[r][u] = Dot::zero();
          }
        }
      }
      multiply<Dot>(acc, q, ldq, words + v, layout.groups_k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int u = 0; u < kVectors; ++u) {
          istore(s + r * kMaxBlockN + i * kPanel + v + u * kLanes, as_int(acc[r][u]));
        }
      }
    }
  }
}

// o[r][channels of kCount vectors] = alpha[r] * o + p . values
template <class Dot, int kCount>
PFA_NOINLINE void accumulate_channels(const TileLayout<Dot>& layout, const uint32_t* tile,
                                    const StripView& view, const uint32_t* p, int64_t ldp,
                                    const float* alpha, const float* p_step, int d_panel, int v,
                                    float* o, int64_t ldo) {
  typename Dot::Acc acc[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) acc[r][u] = Dot::zero();
  }
  constexpr int kGroups = kPanel / Dot::kPack;
  const uint32_t skip = TileLayout<Dot>::header(reinterpret_cast<const std::byte*>(tile))->nonfinite_values;
  for (int i = 0; i < view.panels; ++i) {
    if (skip >> view.panel[i] & 1u) continue;
    multiply<Dot>(acc, p + i * kGroups, ldp, tile + layout.values(view.panel[i], d_panel) + v,
                  kGroups);
  }
  const float* steps = reinterpret_cast<const float*>(tile + layout.steps()) + d_panel * kPanel + v;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      float* at = o + r * ldo + d_panel * kPanel + v + u * kLanes;
      VF sum;
      if constexpr (Dot::kInt) {
        sum = to_float(acc[r][u]);
      } else {
        sum = acc[r][u];
      }
      if constexpr (Dot::kScaled) sum = mul(mul(sum, splat(p_step[r])), load(steps + u * kLanes));
      store(at, fma(load(at), splat(alpha[r]), sum));
    }
  }
}

template <class Dot>
PFA_INLINE void accumulate_strip(const TileLayout<Dot>& layout, const uint32_t* tile,
                                 const StripView& view, const uint32_t* p, int64_t ldp,
                                 const float* alpha, const float* p_step, int64_t head_dim,
                                 float* o, int64_t ldo) {
  for (int64_t d = 0; d < head_dim; d += kVectors * kLanes) {
    const int d_panel = static_cast<int>(d / kPanel), v = static_cast<int>(d % kPanel);
    const auto run = [&](auto count) PFA_INLINE_LAMBDA {
      accumulate_channels<Dot, decltype(count)::value>(layout, tile, view, p, ldp, alpha, p_step,
                                                       d_panel, v, o, ldo);
    };
    switch (std::min<int64_t>(ceil_div(head_dim - d, kLanes), kVectors)) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, std::min(2, kVectors)>{}); break;
      case 3: run(std::integral_constant<int, std::min(3, kVectors)>{}); break;
      default: run(std::integral_constant<int, kVectors>{});
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
