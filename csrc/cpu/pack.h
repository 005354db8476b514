// SPDX-License-Identifier: Apache-2.0
// Packed storage of one tile of keys and values, and of a block of queries.
//
//   TileHeader
//   units       of the stored values: a float per padded channel, then one per key
//               (Dot::kScaled only; see DotI16)
//   keys        per key panel: [64 int32 initial accumulators (Dot::kUnsignedA only)]
//               then words [kPlanes][groups_k][64 keys]
//   values      per key panel, per channel panel: words [kPlanes][64 / kPack groups][64 channels]
//
// Keys past the valid length and channels past head_dim are zero up to a multiple of kColumnStep;
// what lies beyond in their panels is neither written nor read.
#pragma once

namespace pfa::cpu::PFA_ISA {

// Of the `count` keys or channels from the start of a panel on, how many are packed and computed.
inline int packed_width(int64_t count) {
  return static_cast<int>(std::min<int64_t>(round_up(count, kColumnStep), kPanel));
}

struct alignas(64) TileHeader {
  uint32_t nonfinite_values;  // bit i: key panel i holds an infinite or NaN value
  bool inexact;    // fixed point would lose accuracy here: use DotF32 (Dot::kScaled only)
  float key_step;  // real key = key_step * stored key (Dot::kScaled only)
  float key_norm;  // largest norm of a key (Dot::kScaled only)
};

template <class Dot>
struct TileLayout {
  explicit TileLayout(const Plan& plan)
      : head_dim(plan.problem->head_dim),
        padded_d(int64_t{plan.d_panels} * kPanel),
        packed_d(round_up(plan.problem->head_dim, kColumnStep)),
        panels(plan.block_n / kPanel),
        groups_k(round_up(ceil_div(plan.problem->head_dim, Dot::kPack), Dot::kGroupAlign)),
        unit_words(Dot::kScaled ? padded_d + kMaxBlockN : 0),
        key_panel_words((Dot::kUnsignedA ? kPanel : 0) + Dot::kPlanes * groups_k * kPanel),
        value_panel_words(Dot::kPlanes * padded_d * kPanel / Dot::kPack) {}

  [[nodiscard]] int64_t bytes() const {
    return static_cast<int64_t>(sizeof(TileHeader)) +
           4 * (unit_words + panels * (key_panel_words + value_panel_words));
  }
  [[nodiscard]] static TileHeader* header(std::byte* tile) {
    return reinterpret_cast<TileHeader*>(tile);
  }
  [[nodiscard]] static const TileHeader* header(const std::byte* tile) {
    return reinterpret_cast<const TileHeader*>(tile);
  }
  [[nodiscard]] int64_t channel_units() const { return sizeof(TileHeader) / 4; }
  [[nodiscard]] int64_t key_units() const { return channel_units() + padded_d; }
  [[nodiscard]] int64_t keys(int panel) const {
    return channel_units() + unit_words + panel * key_panel_words;
  }
  [[nodiscard]] int64_t values(int panel, int d_panel) const {
    return keys(panels) + panel * value_panel_words +
           d_panel * (Dot::kPlanes * kPanel * kPanel / Dot::kPack);
  }

  int64_t head_dim;
  int64_t padded_d;
  int64_t packed_d;
  int panels;
  int64_t groups_k;
  int64_t unit_words, key_panel_words, value_panel_words;
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

// Rows of one head lie a whole token apart, where the processor's own prefetching is late.
inline void prefetch(const SourceRows& rows, int64_t begin, int64_t end) {
  const int64_t bytes = rows.d * (rows.dtype == DType::kInt8 ? 1 : 2);
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t at = 0; at < bytes; at += 64) {
      __builtin_prefetch(static_cast<const std::byte*>(rows.row(j)) + at);
    }
  }
}

inline bool all_finite(const SourceRows& rows, int64_t begin, int64_t end) {
  if (rows.dtype == DType::kInt8) return true;
  VF zero = splat(0.0f);  // 0 * infinity and 0 * NaN are NaN, and stay
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t i = 0; i < rows.d; i += kLanes) {
      zero = fma(load_as_float(rows.dtype, rows.row(j), i, lanes_at(i, rows.d)), splat(0.0f), zero);
    }
  }
  return reduce_add(zero) == 0.0f;
}

// Words [groups_k][64 keys] from keys [begin, end) of one panel.
template <class Dot>
void pack_key_panel(const TileLayout<Dot>& layout, const SourceRows& keys, int64_t begin,
                    int64_t end, const Conversion& how, uint32_t* out) {
  constexpr int64_t kWordsPadded = 512;  // room for the longest row of the widest operand
  alignas(64) uint32_t stage[16 * kWordsPadded];
  alignas(64) uint32_t last[16 * 16];
  for (int column = 0; column < packed_width(end - begin); column += 16) {
    if (begin + column >= end) {
      for (int64_t g = 0; g < layout.groups_k; ++g) std::memset(out + g * kPanel + column, 0, 64);
      continue;
    }
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

// Words [64 / kPack][64 channels] per channel panel from values [begin, end) of one key panel;
// row_scales, unless null, multiplies how.scale for each.
template <class Dot>
void pack_value_panel(const TileLayout<Dot>& layout, const SourceRows& values, int64_t begin,
                      int64_t end, Conversion how, const float* row_scales, uint32_t* out) {
  using Element = typename Dot::Element;
  constexpr int kGroups = kPanel / Dot::kPack;
  alignas(64) Element stage[Dot::kPack * 512];
  constexpr int64_t kChannelPanel = Dot::kPlanes * kGroups * kPanel;  // words
  const int groups = packed_width(end - begin) / Dot::kPack;
  for (int group = 0; group < groups; ++group) {
    if (begin + group * Dot::kPack >= end) {
      for (int64_t d = 0; d < layout.packed_d; d += kPanel) {
        std::memset(out + d / kPanel * kChannelPanel + group * kPanel, 0, kPanel * 4);
      }
      continue;
    }
    for (int i = 0; i < Dot::kPack; ++i) {
      const int64_t j = begin + group * Dot::kPack + i;
      Element* row = stage + i * layout.padded_d;
      if (j < end) {
        if (row_scales != nullptr) how.scale = row_scales[j - begin];
        Dot::convert(values.dtype, values.row(j), values.d, layout.packed_d, how, row);
      } else {
        std::memset(row, 0, static_cast<size_t>(layout.packed_d) * sizeof(Element));
      }
    }
    for (int64_t d = 0; d < layout.packed_d; d += kLanes) {
      istore(out + d / kPanel * kChannelPanel + group * kPanel + d % kPanel,
             Dot::interleave(stage + d, layout.padded_d));
    }
  }
}

// The scales of one tile, Dot::kScaled only.
struct TileScales {
  float key = 1.0f;
  alignas(64) float channel[512];
  alignas(64) float row[kMaxBlockN];
};

template <class Dot>
void choose_scales(const TileLayout<Dot>& layout, const SourceRows& keys, const SourceRows& values,
                   int64_t begin, int64_t end, TileScales& scales, std::byte* tile) {
  TileHeader& header = *layout.header(tile);
  scales.key = Dot::choose_key_scale(keys, begin, end, header);
  const bool finite =
      Dot::choose_channel_scales(values, begin, end, layout.padded_d, scales.channel);
  if (!finite || !Dot::choose_row_scales(values, begin, end, scales.channel, scales.row)) {
    header.inexact = true;
    return;
  }
  auto* words = reinterpret_cast<float*>(tile);
  for (int64_t d = 0; d < layout.padded_d; ++d) {
    words[layout.channel_units() + d] = 1.0f / scales.channel[d];
  }
  for (int64_t j = 0; j < kMaxBlockN; ++j) {
    words[layout.key_units() + j] = j < end - begin ? 1.0f / scales.row[j] : 0.0f;
  }
}

template <class Dot>
void pack_panel(const TileLayout<Dot>& layout, const SourceRows& keys, const SourceRows& values,
                int64_t begin, int64_t end, int panel, const TileScales* scales, uint32_t* words) {
  uint32_t* key_words = words + layout.keys(panel) + (Dot::kUnsignedA ? kPanel : 0);
  uint32_t* value_words = words + layout.values(panel, 0);
  for (int plane = 0; plane < Dot::kPlanes; ++plane) {
    Conversion for_keys{plane}, for_values{plane};
    const float* row_scales = nullptr;
    if constexpr (Dot::kScaled) {
      for_keys.scale = scales->key;
      for_values.channel_scales = scales->channel;
      row_scales = scales->row + panel * kPanel;
    }
    pack_key_panel<Dot>(layout, keys, begin, end, for_keys,
                        key_words + plane * layout.groups_k * kPanel);
    pack_value_panel<Dot>(layout, values, begin, end, for_values, row_scales,
                          value_words + plane * kPanel * kPanel / Dot::kPack);
  }
  if constexpr (Dot::kUnsignedA) {
    Dot::initial_accumulators(key_words, layout.groups_k, packed_width(end - begin),
                              key_words - kPanel);
  }
}

template <class Dot>
void pack_tile(const Plan& plan, int64_t b, int64_t head_k, int64_t begin, std::byte* tile) {
  const Problem& problem = *plan.problem;
  const TileLayout<Dot> layout(plan);
  const SourceRows keys = source_rows(problem.k, problem, b, head_k);
  const SourceRows values = source_rows(problem.v, problem, b, head_k);
  const int64_t end = std::min(problem.keys_used(b), begin + plan.block_n);
  TileHeader& header = *layout.header(tile);
  header = TileHeader{};
  [[maybe_unused]] TileScales scales;
  if constexpr (Dot::kScaled) choose_scales<Dot>(layout, keys, values, begin, end, scales, tile);
  for (int panel = 0; begin + panel * kPanel < end; ++panel) {
    const int64_t first = begin + panel * kPanel, last = std::min(end, first + kPanel);
    prefetch(values, first, last);
    prefetch(keys, first, last);
    if (!all_finite(values, first, last)) header.nonfinite_values |= 1u << panel;
    if (header.inexact) continue;
    pack_panel<Dot>(layout, keys, values, first, last, panel, &scales,
                    reinterpret_cast<uint32_t*>(tile));
  }
}

}  // namespace pfa::cpu::PFA_ISA
