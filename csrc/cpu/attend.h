// SPDX-License-Identifier: Apache-2.0
// One block of query rows of one head against the packed tiles of its kv head: scores, softmax and
// the product with V strip by strip, the output accumulated in fp32 and written once.
#pragma once

namespace pfa::cpu::PFA_ISA {

template <class Dot>
void pack_queries(const Block& block, const BlockScratch<Dot>& scratch) {
  const SourceRows rows = source_rows(block.problem.q, block.problem, block.b, block.head);
  const int64_t groups = scratch.ldq / Dot::kPlanes;
  alignas(64) uint32_t stage[512];
  prefetch(rows, block.row_begin, block.row_begin + block.rows);
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
    for (int plane = 0; plane < Dot::kPlanes; ++plane) {
      Dot::convert(rows.dtype, row, rows.d, round_up(groups, 16) * Dot::kPack, {plane, scale},
                   reinterpret_cast<typename Dot::Element*>(stage));
      std::memcpy(out + plane * groups, stage, static_cast<size_t>(groups) * 4);
    }
    if constexpr (Dot::kUnsignedA) {
      for (int64_t g = 0; g < groups; ++g) out[g] ^= 0x80808080u;
    }
  }
}

// 0 * NaN would leak a masked value: panels with infinities or NaN take only pairs with p != 0.
template <class Dot>
PFA_NOINLINE void accumulate_nonfinite(const Block& block, const Strip<Dot>& strip,
                                       int64_t tile_begin) {
  const Problem& problem = block.problem;
  const SourceRows values =
      source_rows(problem.v, problem, block.b, block.head / problem.heads_per_group());
  alignas(64) float row[512];
  for (int i = 0; i < strip.view.panels; ++i) {
    if (!strip.has_nonfinite(strip.view.panel[i])) continue;
    const int64_t begin = tile_begin + strip.view.panel[i] * kPanel;
    for (int64_t j = begin; j < std::min(begin + kPanel, block.keys); ++j) {
      DotF32<false>::convert(values.dtype, values.row(j), values.d, round_up(values.d, kLanes), {},
                             row);
      for (int r = 0; r < kRows; ++r) {
        const float weight = Dot::load_p(strip.scratch.p + r * strip.scratch.ldp,
                                         static_cast<int>(i * kPanel + j - begin));
        if (weight == 0.0f) continue;
        float* o = strip.o() + r * strip.scratch.ldo;
        for (int64_t d = 0; d < values.d; ++d) o[d] += weight * row[d];
      }
    }
  }
}

// Calls body(packed tile, its first key) for the tiles that some row of the block may see.
template <class Body>
void for_each_tile(const Block& block, const std::byte* tiles, int64_t first_tile,
                   const Body& body) {
  const Plan& plan = block.plan;
  const Plan::Range range =
      plan.keys_of_rows(block.b, block.row_begin, block.row_begin + block.rows);
  for (int64_t tile = range.begin / plan.block_n; tile * plan.block_n < range.end; ++tile) {
    body(tiles + (tile - first_tile) * plan.tile_bytes, tile * plan.block_n);
  }
}

template <class Dot>
void attend_tile(const Block& block, const BlockScratch<Dot>& scratch, const std::byte* tile,
                 int64_t tile_begin) {
  const TileLayout<Dot> layout(block.plan);
  alignas(64) float alpha[kPaddedRows], unit[kPaddedRows];
  for (int first = 0; first < block.rows; first += kRows) {
    const Strip<Dot> strip{layout, tile,  scratch, view_strip(block, first, tile_begin),
                           first,  alpha, unit};
    if (strip.view.panels == 0) continue;
    score_strip<Dot>(strip);
    if constexpr (Dot::kScaled) {
      const float key_step = layout.header(tile)->key_step;
      for (int r = 0; r < kRows; ++r) unit[r] = scratch.q_step[first + r] * key_step;
    }
    softmax_strip<Dot>(strip, block.softmax);
    accumulate_strip<Dot>(strip);
    if (layout.header(tile)->nonfinite_values) accumulate_nonfinite<Dot>(block, strip, tile_begin);
  }
}

// quant_scale2 and quant_offset2 of one head's channels.
struct OutputScales {
  alignas(64) float scale[512];
  alignas(64) float offset[512];

  OutputScales(const Problem& problem, int64_t head) {
    const Quant& quant = problem.quant;
    for (int64_t i = 0; i < round_up(problem.head_dim, kLanes); ++i) {
      const bool given = i < problem.head_dim && quant.scale_out.data;
      const int64_t channel = head * problem.head_dim + i;
      scale[i] = given ? read_scale(quant.scale_out, channel) : 0.0f;
      offset[i] = given && quant.offset_out.data ? read_scale(quant.offset_out, channel) : 0.0f;
    }
  }
};

// out row <- o * factor in the output's type, int8 through the scales.
inline void store_row(const Problem& problem, const OutputScales& scales, const float* o,
                      float factor, void* out) {
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
        const VF y = add(mul(x, load(scales.scale + i)), load(scales.offset + i));
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
  const OutputScales scales(problem, block.head);
  for (int64_t r = 0; r < rows; ++r) {
    auto* out = static_cast<std::byte*>(problem.out.data) +
                size * (block.b * problem.out.batch + block.head * problem.out.head +
                        (block.row_begin + r) * problem.out.row);
    if (r >= block.rows || scratch.row_sum[r] == 0.0f) {  // no key took part
      std::memset(out, 0, static_cast<size_t>(problem.head_dim * size));
    } else {
      store_row(problem, scales, scratch.o + r * scratch.ldo, unit / scratch.row_sum[r], out);
    }
  }
}

// Natural logarithm of the sum of exp(score) of each row. P was summed before it was rounded.
template <class Dot>
void store_lse(const Block& block, const BlockScratch<Dot>& scratch) {
  const Problem& problem = block.problem;
  float* lse =
      problem.lse + (block.b * problem.num_heads + block.head) * problem.seqlen_q + block.row_begin;
  const int64_t rows = std::min<int64_t>(kBlockM, problem.seqlen_q - block.row_begin);
  for (int64_t r = 0; r < rows; ++r) {
    const bool has_key = r < block.rows && scratch.row_sum[r] != 0.0f;
    const double most = scratch.row_max[r] * block.softmax.nats_per_unit;
    lse[r] = has_key ? static_cast<float>(most + std::log(double{scratch.row_sum[r]})) : -INFINITY;
  }
}

// Of fixed_point.h, for Dot::kScaled.
template <class Dot>
void attend_tiles_fixed(const Block& block, const BlockScratch<Dot>& scratch,
                        const std::byte* tiles, int64_t first_tile);
template <class Dot>
int64_t fixed_scratch_bytes(const Plan& plan);

template <class Dot>
void attend_tiles(const Block& block, const BlockScratch<Dot>& scratch, const std::byte* tiles,
                  int64_t first_tile) {
  pack_queries<Dot>(block, scratch);
  for_each_tile(block, tiles, first_tile, [&](const std::byte* tile, int64_t tile_begin) {
    attend_tile<Dot>(block, scratch, tile, tile_begin);
  });
}

template <class Dot>
void attend(const Plan& plan, int64_t b, int64_t head, int64_t m_block, const std::byte* tiles,
            int64_t first_tile, std::byte* memory) {
  const Block block(plan, b, head, m_block);
  const BlockScratch<Dot> scratch(plan, memory);
  if (block.rows > 0) {
    [[maybe_unused]] const typename Dot::Session session;
    std::fill_n(scratch.row_max, BlockScratch<Dot>::kStateRows, kNoMax);
    std::fill_n(scratch.row_sum, BlockScratch<Dot>::kStateRows, 0.0f);
    std::fill_n(scratch.o, round_up(block.rows, kRows) * scratch.ldo, 0.0f);
    if constexpr (Dot::kScaled) {
      attend_tiles_fixed<Dot>(block, scratch, tiles, first_tile);
    } else {
      attend_tiles<Dot>(block, scratch, tiles, first_tile);
    }
  }
  store_block<Dot>(block, scratch);
  if (block.problem.lse != nullptr) store_lse<Dot>(block, scratch);
}

template <class Dot>
void pack(const Plan& plan, int64_t b, int64_t head_k, int64_t tile, std::byte* out) {
  pack_tile<Dot>(plan, b, head_k, tile * plan.block_n, out);
}

template <class Dot>
void configure(Plan& plan) {
  plan.tile_bytes = round_up(TileLayout<Dot>(plan).bytes(), 64);
  plan.scratch_bytes = BlockScratch<Dot>::bytes(plan);
  if constexpr (Dot::kScaled) plan.scratch_bytes += fixed_scratch_bytes<Dot>(plan);
}

template <class Dot>
constexpr Kernel make_kernel() {
  return {kRows, configure<Dot>, pack<Dot>, attend<Dot>};
}

}  // namespace pfa::cpu::PFA_ISA
