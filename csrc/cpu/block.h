// SPDX-License-Identifier: Apache-2.0
// What one attend() works on: a block of query rows, its working memory, and what its strips see.
#pragma once

namespace pfa::cpu::PFA_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kNoMax = -3.402823466e38f;  // row_max of a row that has seen no key: see softmax.h
constexpr int kPaddedRows = (kRows + kLanes - 1) / kLanes * kLanes;
static_assert(kColumnStep % (2 * kLanes) == 0 && kPanel % kColumnStep == 0);

// How scores become probabilities, for a whole call.
struct SoftmaxParams {
  float scale = 0.0f;          // of raw scores to units of row_max; int8: with descale_s
  float log2_per_unit = 1.0f;  // of row_max: 1, or log2(e) where there is a bias
  bool monotonic = false;      // scale >= 0: the largest raw score has the largest exponent
  bool bias_is_bf16 = false;
  double nats_per_unit = 1.0;  // of row_max, as accurately as log2_per_unit stands for it
  float p_scale = 1.0f;        // kQuantised: |quant_scale1|
  float p_limit = 0.0f;  // kQuantised: 127, or 128 where quant_scale1 < 0 (saturation at -128)
};

// Working memory of one block; carved out of the thread's scratch.
template <class Dot>
struct BlockScratch {
  static constexpr int kStateRows = kBlockM + kPaddedRows;  // whole vectors at the last strip

  BlockScratch(const Plan& plan, std::byte* memory)
      : ldq(Dot::kPlanes * TileLayout<Dot>(plan).groups_k), ldo(int64_t{plan.d_panels} * kPanel) {
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
  static int64_t bytes(const Plan& plan) {
    alignas(64) std::byte anchor[64];  // only distances from it count
    return BlockScratch(plan, anchor).end - anchor;
  }

  static constexpr int64_t ldp = Dot::kPlanes * kMaxBlockN / Dot::kPack;
  int64_t ldq, ldo;  // words, floats
  uint32_t* q;       // (kBlockM, ldq) packed
  uint32_t* s;       // (kRows, kMaxBlockN) scores of a strip
  uint32_t* p;       // (kRows, ldp) packed P of a strip
  float* o;          // (kBlockM, ldo)
  float* row_max;    // (kBlockM)
  float* row_sum;    // (kBlockM)
  float* q_step;     // (kBlockM) Dot::kScaled: real q = q_step * stored q
  float* q_norm;     // (kBlockM) Dot::kScaled: of the real rows
  std::byte* end;
};

// The part of a call that one attend() handles.
struct Block {
  const Plan& plan;
  const Problem& problem;
  int64_t b, head, m_block;
  int64_t row_begin;  // first query row
  int rows;           // rows inside the valid length
  int64_t keys;       // valid keys of this batch element
  SoftmaxParams softmax;

  Block(const Plan& plan_, int64_t b_, int64_t head_, int64_t m_block_)
      : plan(plan_),
        problem(*plan_.problem),
        b(b_),
        head(head_),
        m_block(m_block_),
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
    softmax.scale = problem.bias.data ? scale : scale * kLog2e;
    softmax.log2_per_unit = problem.bias.data ? kLog2e : 1.0f;
    softmax.nats_per_unit = problem.bias.data ? 1.0 : kLn2;
    softmax.monotonic = scale >= 0.0f;
    softmax.bias_is_bf16 = problem.bias.dtype == DType::kBFloat16;
  }
};

// What a strip sees of one tile.
struct StripView {
  int panels = 0;         // visible key panels
  int panel[kMaxPanels];  // their indices in the tile, ascending
  bool masked = false;    // some pair of a visible panel is not visible
  int begin[kRows];       // row r sees tile columns [begin, end) by band and length
  int end[kRows];
  const uint8_t* mask[kRows];  // dense mask at tile column 0; null: none, or all visible
  const void* bias[kRows];     // bias at tile column 0; null: none
  int columns = 0;             // tile columns that exist: mask and bias hold no more
  int last_width = 0;          // columns of the last visible panel that are computed

  [[nodiscard]] int width(int i) const { return i + 1 < panels ? kPanel : last_width; }
  // Of the visible panels, one after the other.
  [[nodiscard]] int computed_columns() const { return (panels - 1) * kPanel + last_width; }
};

// One pass of kRows rows of the block over a tile.
template <class Dot>
struct Strip {
  const TileLayout<Dot>& layout;
  const std::byte* tile;
  const BlockScratch<Dot>& scratch;
  StripView view;
  int first;     // row of the block
  float* alpha;  // (kPaddedRows) what softmax multiplies the rows' past by
  float* unit;   // (kRows) Dot::kScaled: of the scores, then of P

  [[nodiscard]] const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(tile); }
  [[nodiscard]] const uint32_t* q() const { return scratch.q + first * scratch.ldq; }
  [[nodiscard]] float* o() const { return scratch.o + first * scratch.ldo; }
  [[nodiscard]] bool has_nonfinite(int panel) const {
    return (layout.header(tile)->nonfinite_values >> panel & 1u) != 0;
  }
};

// What strip rows [first, first + kRows) of the block see of the tile whose first key is
// tile_begin.
inline StripView view_strip(const Block& block, int first, int64_t tile_begin) {
  const Problem& problem = block.problem;
  StripView view;
  view.columns = static_cast<int>(std::min<int64_t>(block.keys - tile_begin, block.plan.block_n));
  int begin_min = kMaxBlockN, end_max = 0, begin_max = 0, end_min = kMaxBlockN;
  const int64_t anchor = block.plan.band_anchor(block.b);
  for (int r = 0; r < kRows; ++r) {
    const int row_in_block = std::min(first + r, block.rows - 1);  // padding repeats the last row
    const int64_t row = block.row_begin + row_in_block;
    const int64_t diagonal = row + anchor - tile_begin;
    view.begin[r] =
        static_cast<int>(std::clamp<int64_t>(diagonal + problem.band.lo, 0, kMaxBlockN));
    view.end[r] =
        static_cast<int>(std::clamp<int64_t>(diagonal + problem.band.hi + 1, 0, view.columns));
    begin_min = std::min(begin_min, view.begin[r]);
    end_max = std::max(end_max, view.end[r]);
    begin_max = std::max(begin_max, view.begin[r]);
    end_min = std::min(end_min, view.end[r]);
    view.mask[r] = nullptr;
    view.bias[r] = nullptr;
    if (problem.bias.data) {
      view.bias[r] = static_cast<const uint16_t*>(problem.bias.data) +
                     block.b * problem.bias.batch + block.head * problem.bias.head +
                     row * problem.bias.row + tile_begin;
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
  if (view.panels > 0) {
    view.last_width = packed_width(view.columns - int64_t{view.panel[view.panels - 1]} * kPanel);
  }
  if (dense) {
    view.masked = true;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = block.row_begin + std::min(first + r, block.rows - 1);
      view.mask[r] =
          problem.mask.data + block.b * problem.mask.batch + row * problem.mask.row + tile_begin;
    }
  }
  return view;
}

}  // namespace pfa::cpu::PFA_ISA
