// SPDX-License-Identifier: Apache-2.0
// Blocks of a fixed-point Dot: each tile in fixed point, or in fp32 where that would cost accuracy.
#pragma once

namespace pfa::cpu::PFA_ISA {

// Attends tiles in fp32, packed from the source when they come; shares the block's running state.
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
int64_t fixed_scratch_bytes(const Plan& plan) {
  return ExactTiles::bytes(plan);
}

template <class Dot>
void attend_tiles_fixed(const Block& block, const BlockScratch<Dot>& scratch,
                        const std::byte* tiles, int64_t first_tile) {
  pack_queries<Dot>(block, scratch);
  const float q_step = *std::max_element(scratch.q_step, scratch.q_step + block.rows);
  const float q_norm = *std::max_element(scratch.q_norm, scratch.q_norm + block.rows);
  ExactTiles exact(block, scratch);
  for_each_tile(block, tiles, first_tile, [&](const std::byte* tile, int64_t tile_begin) {
    const TileHeader& header = *TileLayout<Dot>::header(tile);
    if (!header.inexact && Dot::accurate(block.problem.softmax_scale, q_norm, q_step, header)) {
      attend_tile<Dot>(block, scratch, tile, tile_begin);
    } else {
      exact.attend(tile_begin);
    }
  });
}

}  // namespace pfa::cpu::PFA_ISA
