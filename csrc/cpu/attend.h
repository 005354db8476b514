// SPDX-License-Identifier: Apache-2.0
// One block of query rows of one head against the packed tiles of its kv head: scores, softmax and
// the product with V strip by strip, the output accumulated in fp32 and written once.
#pragma once

namespace pfa::cpu::PFA_ISA {

// Working memory of one block; carved out of the thread's scratch.
template <class Dot>
struct BlockScratch {
  static constexpr int kStateRows = kBlockM + 16;  // a vector load at the last strip stays inside

  BlockScratch(const Plan& plan, std::byte* memory)
      : ldq(TileLayout<Dot>(plan).groups_k), ldo(int64_t{plan.d_panels} * kPanel) {
    std::byte* at = memory;
    const auto take = [&at](int64_t words) {
      auto* p = reinterpret_cast<uint32_t*>(at);
      at += round_up(words * 4, 64);
      return p;
    };
    q = take(kBlockM * ldq + 16);
    s = take(int64_t{kRows} * kMaxBlockN);
    p = take(int64_t{kRows} * ldp);
    o = reinterpret_cast<float*>(take(kBlockM * ldo));
    row_max = reinterpret_cast<float*>(take(kStateRows));
    row_sum = reinterpret_cast<float*>(take(kStateRows));
    q_step = reinterpret_cast<float*>(take(kStateRows));
    q_norm = reinterpret_cast<float*>(take(kStateRows));
    end = at;
  }
  static int64_t bytes(const Plan& plan) { return BlockScratch(plan, nullptr).end - static_cast<std::byte*>(nullptr); }

  static constexpr int64_t ldp = kMaxBlockN / Dot::kPack;
  int64_t ldq, ldo;   // words, floats
  uint32_t* q;        // (kBlockM, ldq) packed
  uint32_t* s;        // (kRows, kMaxBlockN) scores of a strip
  uint32_t* p;        // (kRows, ldp) packed P of a strip
  float* o;           // (kBlockM, ldo)
  float* row_max;     // (kBlockM)
  float* row_sum;     // (kBlockM)
  float* q_step;      // (kBlockM) Dot::kScaled: real q = q_step * stored q
  float* q_norm;      // (kBlockM) Dot::kScaled: of the real rows
  std::byte* end;
};

// The part of a call that one attend() handles.
struct Block {
  const Plan& plan;
  const Problem& problem;
  int64_t b, head, m_block;
  int64_t row_begin;   // first query row
  int rows;            // rows inside the valid length
  int64_t keys;        // valid keys of this batch element
  SoftmaxParams softmax;

  Block(const Plan& plan_, int64_t b_, int64_t head_, int64_t m_block_)
      : plan(plan_), problem(*plan_.problem), b(b_), head(head_), m_block(m_block_),
        row_begin(m_block_ * kBlockM),
        rows(static_cast<int>(std::clamp<int64_t>(problem.rows_used(b_) - row_begin, 0, kBlockM))),
        keys(problem.keys_used(b_)) {
    float scale = problem.softmax_scale;
    if (problem.dtype == DType::kInt8) {
      scale *= read_scale(problem.quant.descale_s, 0);
      const float scale_p = read_scale(problem.quant.scale_p, 0);
      softmax.p_scale = std::fabs(scale_p);
      softmax.p_limit = scale_p < 0.0f ? 128.0f : 127.0f;
    }
    softmax.scale_log2 = scale * kLog2e;
    softmax.monotonic = softmax.scale_log2 >= 0.0f;
    softmax.bias_is_bf16 = problem.bias.dtype == DType::kBFloat16;
  }
};

template <class Dot>
void pack_queries(const Block& block, const BlockScratch<Dot>& scratch) {
  const SourceRows rows = source_rows(block.problem.q, block.problem, block.b, block.head);
  const int64_t padded = round_up(scratch.ldq * Dot::kPack, kLanes * Dot::kPack);
  alignas(64) uint32_t stage[512 + 64];
  for (int r = 0; r < static_cast<int>(round_up(block.rows, kRows)); ++r) {
    uint32_t* out = scratch.q + r * scratch.ldq;
    if (r >= block.rows) {
      std::memset(out, 0, static_cast<size_t>(scratch.ldq) * 4);
      scratch.q_step[r] = scratch.q_norm[r] = 0.0f;
      continue;
    }
    const void* row = rows.row(block.row_begin + r);
    float scale = 1.0f;
    if constexpr (Dot::kScaled) {
      scale = Dot::choose_query_scale(rows, row, &scratch.q_step[r], &scratch.q_norm[r]);
    }
    Dot::convert(rows.dtype, row, rows.d, padded, ChannelScale{&scale, 0},
                 reinterpret_cast<typename Dot::Element*>(stage));
    if constexpr (Dot::kUnsignedA) {
      for (int64_t g = 0; g < scratch.ldq; ++g) stage[g] ^= 0x80808080u;
    }
    std::memcpy(out, stage, static_cast<size_t>(scratch.ldq) * 4);
  }
}

// What strip rows [first, first + kRows) of the block see of the tile whose first key is tile_begin.
inline StripView<kRows> view_strip(const Block& block, int first, int64_t tile_begin) {
  const Problem& problem = block.problem;
  StripView<kRows> view;
  view.columns = static_cast<int>(std::min<int64_t>(block.keys - tile_begin, block.plan.block_n));
  int begin_min = kMaxBlockN, end_max = 0, begin_max = 0, end_min = kMaxBlockN;
  const int64_t anchor = block.plan.band_anchor(block.b);
  for (int r = 0; r < kRows; ++r) {
    const int row_in_block = std::min(first + r, block.rows - 1);  // padding repeats the last row
    const int64_t row = block.row_begin + row_in_block;
    const int64_t diagonal = row + anchor - tile_begin;
    view.begin[r] = static_cast<int>(std::clamp<int64_t>(diagonal + problem.band.lo, 0, kMaxBlockN));
    view.end[r] = static_cast<int>(std::clamp<int64_t>(diagonal + problem.band.hi + 1, 0, view.columns));
    begin_min = std::min(begin_min, view.begin[r]);
    end_max = std::max(end_max, view.end[r]);
    begin_max = std::max(begin_max, view.begin[r]);
    end_min = std::min(end_min, view.end[r]);
    view.mask[r] = nullptr;
    view.bias[r] = nullptr;
    if (problem.bias.data) {
      view.bias[r] = static_cast<const uint16_t*>(problem.bias.data) + block.b * problem.bias.batch +
                     block.head * problem.bias.head + row * problem.bias.row + tile_begin;
    }
  }
  const Visibility* visibility = nullptr;
  if (block.plan.visibility) {
    visibility = block.plan.visibility + block.b * block.plan.visibility_batch +
                 (block.row_begin + first) / kRows * block.plan.visibility_row +
                 tile_begin / kPanel;
  }
  bool dense = false;
  for (int panel = 0; panel * kPanel < view.columns; ++panel) {
    const int base = panel * kPanel;
    if (begin_min >= base + kPanel || end_max <= base) continue;
    if (visibility && visibility[panel] == Visibility::kNone) continue;
    view.panel[view.panels++] = panel;
    if (begin_max > base || end_min < base + kPanel) view.masked = true;
    if (visibility && visibility[panel] == Visibility::kSome) dense = true;
  }
  if (dense) {
    view.masked = true;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = block.row_begin + std::min(first + r, block.rows - 1);
      view.mask[r] = problem.mask.data + block.b * problem.mask.batch + row * problem.mask.row +
                     tile_begin;
    }
  }
  return view;
}

// s[r][i * 64 + ...] = q rows . keys of visible panel i
template <class Dot>
PFA_NOINLINE void score_strip(const TileLayout<Dot>& layout, const uint32_t* tile,
                            const StripView<kRows>& view, const uint32_t* q, int64_t ldq,
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
                                    const StripView<kRows>& view, const uint32_t* p, int64_t ldp,
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
                                 const StripView<kRows>& view, const uint32_t* p, int64_t ldp,
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

// 0 * NaN would leak a masked value: panels with infinities or NaN take only pairs with p != 0.
template <class Dot>
void accumulate_nonfinite(const Block& block, const StripView<kRows>& view, uint32_t panels,
                          int64_t tile_begin, const uint32_t* p, int64_t ldp, float* o,
                          int64_t ldo) {
  const Problem& problem = block.problem;
  const SourceRows values =
      source_rows(problem.v, problem, block.b, block.head / problem.heads_per_group());
  alignas(64) float row[512];
  for (int i = 0; i < view.panels; ++i) {
    if (!(panels >> view.panel[i] & 1u)) continue;
    for (int column = 0; column < kPanel; ++column) {
      const int64_t j = tile_begin + view.panel[i] * kPanel + column;
      if (j >= block.keys) break;
      DotF32<false>::convert(values.dtype, values.row(j), values.d,
                             round_up(values.d, kLanes), ChannelScale{nullptr, 0}, row);
      for (int r = 0; r < kRows; ++r) {
        const float weight = Dot::load_p(p + r * ldp, i * kPanel + column);
        if (weight == 0.0f) continue;
        for (int64_t d = 0; d < values.d; ++d) o[r * ldo + d] += weight * row[d];
      }
    }
  }
}

template <class Dot>
void attend_tile(const Block& block, const BlockScratch<Dot>& scratch, const std::byte* tile_bytes,
                 int64_t tile_begin) {
  const TileLayout<Dot> layout(block.plan);
  const auto* tile = reinterpret_cast<const uint32_t*>(tile_bytes);
  const TileHeader& header = *layout.header(tile_bytes);
  constexpr int kPadded = (kRows + kLanes - 1) / kLanes * kLanes;
  alignas(64) float alpha[kPadded], step[kPadded];
  for (int first = 0; first < block.rows; first += kRows) {
    const StripView<kRows> view = view_strip(block, first, tile_begin);
    if (view.panels == 0) continue;
    float* o = scratch.o + first * scratch.ldo;
    score_strip<Dot>(layout, tile, view, scratch.q + first * scratch.ldq, scratch.ldq, scratch.s);
    if constexpr (Dot::kScaled) {
      for (int r = 0; r < kRows; ++r) step[r] = scratch.q_step[first + r] * header.key_step;
    }
    softmax_strip<Dot>(view, block.softmax, scratch.s, scratch.p, scratch.ldp,
                       scratch.row_max + first, scratch.row_sum + first, alpha, step);
    accumulate_strip<Dot>(layout, tile, view, scratch.p, scratch.ldp, alpha, step,
                          block.problem.head_dim, o, scratch.ldo);
    if (header.nonfinite_values) {
      accumulate_nonfinite<Dot>(block, view, header.nonfinite_values, tile_begin, scratch.p,
                                scratch.ldp, o, scratch.ldo);
    }
  }
}

// out row <- o * factor in the output's type, int8 through scale and offset.
inline void store_row(const Problem& problem, int64_t head, const float* o, float factor,
                      void* out) {
  const int64_t d = problem.head_dim;
  for (int64_t i = 0; i < d; i += kLanes) {
    const int count = lanes_at(i, d);
    const VF x = mul(load(o + i), splat(factor));
    switch (problem.dtype_out) {
      case DType::kFloat16:
        store_f16(static_cast<uint16_t*>(out) + i, x, count);
        break;
      case DType::kBFloat16:
        store_bf16(static_cast<uint16_t*>(out) + i, x, count);
        break;
      case DType::kInt8: {
        alignas(64) float scale[kLanes] = {}, offset[kLanes] = {};
        for (int lane = 0; lane < count; ++lane) {
          const int64_t channel = head * d + i + lane;
          scale[lane] = read_scale(problem.quant.scale_out, channel);
          if (problem.quant.offset_out.data) {
            offset[lane] = read_scale(problem.quant.offset_out, channel);
          }
        }
        const VF y = add(mul(x, load(scale)), load(offset));
        store_s8(static_cast<int8_t*>(out) + i, to_int(min(max(y, splat(-128.0f)), splat(127.0f))),
                 count);
      }
    }
  }
}

template <class Dot>
void store_block(const Block& block, const BlockScratch<Dot>& scratch) {
  const Problem& problem = block.problem;
  const int64_t size = problem.dtype_out == DType::kInt8 ? 1 : 2;
  const int64_t rows = std::min<int64_t>(kBlockM, problem.seqlen_q - block.row_begin);
  float unit = 1.0f;  // of p . v; P is stored as a magnitude
  if (problem.dtype == DType::kInt8) {
    unit = read_scale(problem.quant.descale_o, 0);
    if (read_scale(problem.quant.scale_p, 0) < 0.0f) unit = -unit;
  }
  for (int64_t r = 0; r < rows; ++r) {
    auto* out = static_cast<std::byte*>(problem.out.data) +
                size * (block.b * problem.out.batch + block.head * problem.out.head +
                        (block.row_begin + r) * problem.out.row);
    if (r >= block.rows || scratch.row_sum[r] == 0.0f) {  // no key took part
      std::memset(out, 0, static_cast<size_t>(problem.head_dim * size));
    } else {
      store_row(problem, block.head, scratch.o + r * scratch.ldo, unit / scratch.row_sum[r], out);
    }
  }
}

// Attends tiles that fixed point would not serve well in fp32, packed here from the source; made
// when the first such tile comes. Shares the running state of the block.
class ExactTiles {
 public:
  using Dot = DotF32<false>;

  template <class Other>
  ExactTiles(const Block& block, const BlockScratch<Other>& scratch)
      : block_(block), scratch_(block.plan, scratch.end) {
    scratch_.o = scratch.o;
    scratch_.row_max = scratch.row_max;
    scratch_.row_sum = scratch.row_sum;
  }
  static int64_t bytes(const Plan& plan) {
    return BlockScratch<Dot>::bytes(plan) + round_up(TileLayout<Dot>(plan).bytes(), 64);
  }
  void attend(int64_t tile_begin) {
    if (!queries_packed_) pack_queries<Dot>(block_, scratch_);
    queries_packed_ = true;
    const int64_t head_k = block_.head / block_.problem.heads_per_group();
    pack_tile<Dot>(block_.plan, block_.b, head_k, tile_begin, scratch_.end);
    attend_tile<Dot>(block_, scratch_, scratch_.end, tile_begin);
  }

 private:
  const Block& block_;
  BlockScratch<Dot> scratch_;
  bool queries_packed_ = false;
};

template <class Dot>
void attend_tiles(const Block& block, const BlockScratch<Dot>& scratch, const std::byte* tiles,
                  int64_t first_tile) {
  const Plan& plan = block.plan;
  pack_queries<Dot>(block, scratch);
  [[maybe_unused]] ExactTiles exact(block, scratch);
  [[maybe_unused]] float q_step = 0.0f, q_norm = 0.0f;
  if constexpr (Dot::kScaled) {
    q_step = *std::max_element(scratch.q_step, scratch.q_step + block.rows);
    q_norm = *std::max_element(scratch.q_norm, scratch.q_norm + block.rows);
  }
  const Plan::Range range =
      plan.keys_of_rows(block.b, block.row_begin, block.row_begin + block.rows);
  for (int64_t tile = range.begin / plan.block_n; tile * plan.block_n < range.end; ++tile) {
    const std::byte* packed = tiles + (tile - first_tile) * plan.tile_bytes;
    if constexpr (Dot::kScaled) {
      const TileHeader& header = *TileLayout<Dot>::header(packed);
      if (header.inexact ||
          !Dot::accurate(block.problem.softmax_scale, q_norm, q_step, header)) {
        exact.attend(tile * plan.block_n);
        continue;
      }
    }
    attend_tile<Dot>(block, scratch, packed, tile * plan.block_n);
  }
}

template <class Dot>
void attend(const Plan& plan, int64_t b, int64_t head, int64_t m_block, const std::byte* tiles,
            int64_t first_tile, std::byte* memory) {
  const Block block(plan, b, head, m_block);
  const BlockScratch<Dot> scratch(plan, memory);
  if (block.rows > 0) {
    std::fill_n(scratch.row_max, BlockScratch<Dot>::kStateRows, kNoMax);
    std::fill_n(scratch.row_sum, BlockScratch<Dot>::kStateRows, 0.0f);
    std::fill_n(scratch.o, kBlockM * scratch.ldo, 0.0f);
    attend_tiles<Dot>(block, scratch, tiles, first_tile);
  }
  store_block<Dot>(block, scratch);
}

template <class Dot>
void pack(const Plan& plan, int64_t b, int64_t head_k, int64_t tile, std::byte* out) {
  pack_tile<Dot>(plan, b, head_k, tile * plan.block_n, out);
}

template <class Dot>
void configure(Plan& plan) {
  plan.groups_k = TileLayout<Dot>(plan).groups_k;
  plan.tile_bytes = round_up(TileLayout<Dot>(plan).bytes(), 64);
  plan.scratch_bytes =
      BlockScratch<Dot>::bytes(plan) + (Dot::kScaled ? ExactTiles::bytes(plan) : 0);
}

template <class Dot>
constexpr Kernel make_kernel() {
  return {kRows, configure<Dot>, pack<Dot>, attend<Dot>};
}

}  // namespace pfa::cpu::PFA_ISA
