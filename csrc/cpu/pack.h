// SPDX-License-Identifier: Apache-2.0
// Packed storage of one tile of keys and values, and of a block of queries.
//
//   TileHeader
//   value_step  d_panels x 64 floats                          (Dot::kScaled only)
//   keys        per key panel: [64 int32 initial accumulators (Dot::kUnsignedA only)]
//               then words [kPlanes][groups_k][64 keys]
//   values      per key panel, per channel panel: words [kPlanes][64 / kPack groups][64 channels]
//
// Keys past the valid length and channels past head_dim are zero.
#pragma once

namespace pfa::cpu::PFA_ISA {

struct alignas(64) TileHeader {
  uint32_t nonfinite_values;  // bit i: key panel i holds an infinite or NaN value
  bool inexact;               // fixed point would lose accuracy here: use DotF32 (Dot::kScaled only)
  float key_step;             // real key = key_step * stored key (Dot::kScaled only)
  float key_norm;             // largest norm of a key (Dot::kScaled only)
};

template <class Dot>
struct TileLayout {
  explicit TileLayout(const Plan& plan)
      : d_panels(plan.d_panels),
        padded_d(int64_t{plan.d_panels} * kPanel),
        panels(plan.block_n / kPanel),
        groups_k(round_up(ceil_div(plan.problem->head_dim, Dot::kPack), Dot::kGroupAlign)),
        step_words(Dot::kScaled ? padded_d : 0),
        key_panel_words((Dot::kUnsignedA ? kPanel : 0) + Dot::kPlanes * groups_k * kPanel),
        value_panel_words(Dot::kPlanes * padded_d * kPanel / Dot::kPack) {}

  [[nodiscard]] int64_t bytes() const {
    return static_cast<int64_t>(sizeof(TileHeader)) +
           4 * (step_words + panels * (key_panel_words + value_panel_words));
  }
  [[nodiscard]] static TileHeader* header(std::byte* tile) {
    return reinterpret_cast<TileHeader*>(tile);
  }
  [[nodiscard]] static const TileHeader* header(const std::byte* tile) {
    return reinterpret_cast<const TileHeader*>(tile);
  }
  [[nodiscard]] int64_t steps() const { return sizeof(TileHeader) / 4; }
  [[nodiscard]] int64_t keys(int panel) const {
    return steps() + step_words + panel * key_panel_words;
  }
  [[nodiscard]] int64_t values(int panel, int d_panel) const {
    return keys(panels) + panel * value_panel_words +
           d_panel * (Dot::kPlanes * kPanel * kPanel / Dot::kPack);
  }

  int d_panels;
  int64_t padded_d;
  int panels;
  int64_t groups_k;
  int64_t step_words, key_panel_words, value_panel_words;
};

// One kv head of the call: where its rows are and how many count.
struct SourceRows {
  const std::byte* data;
  int64_t row_bytes;
  DType dtype;
  int64_t d;

  [[nodiscard]] const void* row(int64_t j) const { return data + j * row_bytes; }
};

inline SourceRows source_rows(const InputView& view, const Problem& problem, int64_t b,
                              int64_t head) {
  const int64_t size = problem.dtype == DType::kInt8 ? 1 : 2;
  return {static_cast<const std::byte*>(view.data) + size * (b * view.batch + head * view.head),
          size * view.row, problem.dtype, problem.head_dim};
}

inline bool row_is_finite(const SourceRows& rows, int64_t j) {
  if (rows.dtype == DType::kInt8) return true;
  const uint16_t exponent = rows.dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
  const auto* x = static_cast<const uint16_t*>(rows.row(j));
  bool finite = true;
  for (int64_t i = 0; i < rows.d; ++i) finite &= (x[i] & exponent) != exponent;
  return finite;
}

// Words [groups_k][64 keys] from keys [begin, end) of one panel.
template <class Dot>
void pack_key_panel(const TileLayout<Dot>& layout, const SourceRows& keys, int64_t begin,
                    int64_t end, const Conversion& how, uint32_t* out) {
  constexpr int64_t kWordsPadded = 512;  // room for the longest row of the widest operand
  alignas(64) uint32_t stage[16 * kWordsPadded];
  alignas(64) uint32_t last[16 * 16];
  for (int column = 0; column < kPanel; column += 16) {
    for (int i = 0; i < 16; ++i) {
      uint32_t* row = stage + i * kWordsPadded;
      const int64_t j = begin + column + i;
      if (j < end) {
        Dot::convert(keys.dtype, keys.row(j), keys.d, round_up(layout.groups_k, 16) * Dot::kPack,
                     how, reinterpret_cast<typename Dot::Element*>(row));
      } else {
        std::memset(row, 0, static_cast<size_t>(round_up(layout.groups_k, 16)) * 4);
      }
    }
    int64_t g = 0;
    for (; g + 16 <= layout.groups_k; g += 16) {
      transpose_words(stage + g, kWordsPadded, out + g * kPanel + column, kPanel);
    }
    if (g < layout.groups_k) {
      transpose_words(stage + g, kWordsPadded, last, 16);
      for (int i = 0; g + i < layout.groups_k; ++i) {
        std::memcpy(out + (g + i) * kPanel + column, last + i * 16, 64);
      }
    }
  }
}

// Words [64 / kPack][64 channels] per channel panel from values [begin, end) of one key panel.
template <class Dot>
void pack_value_panel(const TileLayout<Dot>& layout, const SourceRows& values, int64_t begin,
                      int64_t end, const Conversion& how, uint32_t* out) {
  using Element = typename Dot::Element;
  constexpr int kGroups = kPanel / Dot::kPack;
  alignas(64) Element stage[Dot::kPack * 512];
  for (int group = 0; group < kGroups; ++group) {
    for (int i = 0; i < Dot::kPack; ++i) {
      const int64_t j = begin + group * Dot::kPack + i;
      Element* row = stage + i * layout.padded_d;
      if (j < end) {
        Dot::convert(values.dtype, values.row(j), values.d, layout.padded_d, how, row);
      } else {
        std::memset(row, 0, static_cast<size_t>(layout.padded_d) * sizeof(Element));
      }
    }
    for (int64_t d = 0; d < layout.padded_d; d += kLanes) {
      istore(out + (d / kPanel) * (Dot::kPlanes * kGroups * kPanel) + group * kPanel + d % kPanel,
             Dot::interleave(stage + d, layout.padded_d));
    }
  }
}

template <class Dot>
void pack_tile(const Plan& plan, int64_t b, int64_t head_k, int64_t begin, std::byte* tile) {
  const Problem& problem = *plan.problem;
  const TileLayout<Dot> layout(plan);
  const int64_t end = problem.keys_used(b);
  const SourceRows keys = source_rows(problem.k, problem, b, head_k);
  const SourceRows values = source_rows(problem.v, problem, b, head_k);
  auto* words = reinterpret_cast<uint32_t*>(tile);
  TileHeader header{};
  alignas(64) float value_scales[512];
  float key_scale = 1.0f;
  if constexpr (Dot::kScaled) {
    const int64_t last = std::min(end, begin + plan.block_n);
    key_scale = Dot::choose_key_scale(keys, begin, last, header);
    Dot::choose_value_scales(values, begin, last, layout.padded_d, header, value_scales,
                             reinterpret_cast<float*>(words + layout.steps()));
  }
  const int used = static_cast<int>(
      std::clamp<int64_t>(ceil_div(end - begin, kPanel), 0, layout.panels));
  for (int panel = 0; panel < used; ++panel) {
    const int64_t first = begin + panel * kPanel, last = std::min(end, first + kPanel);
    for (int64_t j = first; j < last; ++j) {
      if (!row_is_finite(values, j)) header.nonfinite_values |= 1u << panel;
    }
    if (header.inexact) continue;
    uint32_t* key_words = words + layout.keys(panel) + (Dot::kUnsignedA ? kPanel : 0);
    for (int plane = 0; plane < Dot::kPlanes; ++plane) {
      pack_key_panel<Dot>(layout, keys, first, last, {&key_scale, 0, plane},
                          key_words + plane * layout.groups_k * kPanel);
      pack_value_panel<Dot>(layout, values, first, last, {value_scales, 1, plane},
                            words + layout.values(panel, 0) + plane * kPanel * kPanel / Dot::kPack);
    }
    if constexpr (Dot::kUnsignedA) {
      Dot::initial_accumulators(key_words, layout.groups_k, key_words - kPanel);
    }
  }
  *layout.header(tile) = header;
}

}  // namespace pfa::cpu::PFA_ISA
