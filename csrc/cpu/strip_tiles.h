// SPDX-License-Identifier: Apache-2.0
// The two products of a strip of kRows = 32 query rows with a packed tile, on AMX tiles: 2 x 2
// accumulators of 16 x 16, in registers 0..3; left operands in 4 and 5, right ones in 6 and 7.
#pragma once

namespace pfa::cpu::PFA_ISA {

static_assert(kRows == 2 * kTileRows);
constexpr int kTileColumns = 2 * kTileWords;  // of the accumulators together

PFA_INLINE void zero_accumulators() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
PFA_INLINE void store_accumulators(uint32_t* out, int64_t ld) {
  tile_store<0>(out, ld);
  tile_store<1>(out + kTileWords, ld);
  tile_store<2>(out + kTileRows * ld, ld);
  tile_store<3>(out + kTileRows * ld + kTileWords, ld);
}
PFA_INLINE void load_operands(const uint32_t* a, int64_t lda, const uint32_t* b) {
  tile_load<4>(a, lda);
  tile_load<6>(b, kPanel);
  tile_load<7>(b + kTileWords, kPanel);
  tile_load<5>(a + kTileRows * lda, lda);
}

// Which planes of the left and right operand make product number `i` of kPlanes == 2.
struct PlanePair {
  int a, b;
};
template <class Dot>
constexpr int kProducts = Dot::kPlanes == 1 ? 1 : 3;
constexpr PlanePair plane_pair(int product) {
  return {product == 1 ? 1 : 0, product == 2 ? 1 : 0};  // high high, low high, high low
}

// s[r][i * 64 + ...] = q rows . keys of visible panel i
template <class Dot>
PFA_NOINLINE void score_strip(const Strip<Dot>& strip) {
  const int64_t groups = strip.layout.groups_k, ldq = strip.scratch.ldq;
  for (int i = 0; i < strip.view.panels; ++i) {
    const uint32_t* keys = strip.words() + strip.layout.keys(strip.view.panel[i]);
    for (int column = 0; column < kPanel; column += kTileColumns) {
      zero_accumulators();
      for (int product = 0; product < kProducts<Dot>; ++product) {
        const PlanePair planes = plane_pair(product);
        const uint32_t* a = strip.q() + planes.a * groups;
        const uint32_t* b = keys + planes.b * groups * kPanel + column;
        for (int64_t g = 0; g < groups; g += kTileWords) {
          load_operands(a + g, ldq, b + g * kPanel);
          Dot::template score<0, 4, 6>();
          Dot::template score<1, 4, 7>();
          Dot::template score<2, 5, 6>();
          Dot::template score<3, 5, 7>();
        }
      }
      store_accumulators(strip.scratch.s + i * kPanel + column, kMaxBlockN);
    }
  }
}

// Accumulators = p . values, channels [d, d + kTileColumns).
template <class Dot>
PFA_INLINE void weigh_values(const Strip<Dot>& strip, int64_t d) {
  constexpr int kGroups = kPanel / Dot::kPack;  // words of a P row per panel
  const int d_panel = static_cast<int>(d / kPanel);
  zero_accumulators();
  for (int i = 0; i < strip.view.panels; ++i) {
    const int panel = strip.view.panel[i];
    if (strip.has_nonfinite(panel)) continue;
    const uint32_t* values = strip.words() + strip.layout.values(panel, d_panel) + d % kPanel;
    for (int product = 0; product < kProducts<Dot>; ++product) {
      const PlanePair planes = plane_pair(product);
      const uint32_t* a = strip.scratch.p + planes.a * (kMaxBlockN / Dot::kPack) + i * kGroups;
      const uint32_t* b = values + planes.b * kGroups * kPanel;
      for (int g = 0; g < kGroups; g += kTileWords) {
        load_operands(a + g, strip.scratch.ldp, b + g * kPanel);
        Dot::template weigh<0, 4, 6>();
        Dot::template weigh<1, 4, 7>();
        Dot::template weigh<2, 5, 6>();
        Dot::template weigh<3, 5, 7>();
      }
    }
  }
}

// o[r][...] = alpha[r] * o + p . values
template <class Dot>
PFA_NOINLINE void accumulate_strip(const Strip<Dot>& strip) {
  alignas(64) uint32_t sums[kRows * kTileColumns];
  for (int64_t d = 0; d < strip.layout.head_dim; d += kTileColumns) {
    weigh_values<Dot>(strip, d);
    store_accumulators(sums, kTileColumns);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileColumns; v += kLanes) {
        float* at = strip.o() + r * strip.scratch.ldo + d + v;
        const VF sum = load_score<Dot>(sums + r * kTileColumns + v);
        store(at, fma(load(at), splat(strip.alpha[r]), sum));
      }
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
