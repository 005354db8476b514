// SPDX-License-Identifier: Apache-2.0
// Every compile-time fact of a kernel of this family: its policies, its tile, its shared memory.
#pragma once

#include <string>

#include "../element.cuh"
#include "../fragment.cuh"
#include "../layout.cuh"
#include "../mask.cuh"
#include "../quant.cuh"

namespace pfa::cuda::sm80 {

struct Tile {
  int block_m;        // query rows of a block
  int block_n;        // keys of a tile
  int warps_m;        // warps along the rows
  int warps_n;        // 2: a pair of warps shares rows, halving keys of S and columns of O
  int blocks_per_sm;  // that registers are budgeted for
  [[nodiscard]] constexpr int threads() const { return warps_m * warps_n * kWarp; }
};

// The tile plan. Warps of 16 rows leave registers for three or four blocks on an SM, whose softmax
// and products fill each other's gaps; with a bias in shared memory beside them two larger blocks
// do better. Predicted for an A100 at 8192 keys, full attention, in TFLOP/s or TOPS, with two
// rounds of blocks replayed (four rounds predict 226 where 232 stands):
//   fp16 D64:  64x64 x4 blocks 197, 128x64 x3 189      int8 D64:  64x128 x4 281, 64x64 x4 246
//   fp16 D128: 64x64 x3 232, 64x128 x2 213, 128x64 x2 216; int8 D128: 64x128 x3 369, 64x64 x3 331
//   fp16 D128 with a bias: 128x64 x2 205, 64x32 x3 193, 64x64 x2 167
//   fp16 D192: 64x64 x2 207, 128x64 x1 199
//   fp16 D256: 64x32 x2 200, 128x32 x1 188             int8 D256: 64x128 x2 396, 64x64 x2 327
// Above 256, O no longer fits a warp's registers and a pair of warps shares it. Shared memory stays
// within the 99 KiB of sm_86 and sm_89, but for 16-bit head_dim above 256, where `compact` plans
// for those.
PFA_HOST_DEVICE constexpr Tile tile_of(int element_bytes, int head_dim, bool has_bias,
                                       bool compact) {
  if (element_bytes == 1) {
    if (head_dim <= 64) return {64, 128, 4, 1, 4};
    if (head_dim <= 128) return {64, has_bias ? 64 : 128, 4, 1, 3};
    if (head_dim <= 256) return {64, has_bias ? 64 : 128, 4, 1, 2};
    return {64, 32, 4, 2, 1};
  }
  if (head_dim <= 64) return {64, 64, 4, 1, 4};
  if (head_dim <= 128) return has_bias ? Tile{128, 64, 4, 1, 2} : Tile{64, 64, 4, 1, 3};
  if (head_dim <= 192) return {64, has_bias ? 32 : 64, 4, 1, 2};
  if (head_dim <= 256) return {64, 32, 4, 1, 2};
  if (!compact) return {64, 32, 4, 2, 1};
  return has_bias && head_dim > 384 ? Tile{16, 32, 1, 2, 1} : Tile{32, 32, 2, 2, 1};
}

template <class Element_, int kHeadDim_, class Mask_, bool kHasBias_, bool kCompact_>
struct Traits {
  using Element = Element_;
  using Mask = Mask_;
  using Layout = layout::Strided;
  using Quant = quant::Of<Element>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasBias = kHasBias_;
  static constexpr bool kCompact = kCompact_;

  static std::string name() {
    return std::string("sm80 ") + Element::kName + " D" + std::to_string(kHeadDim) + " " +
           Mask::kName + (kHasBias ? " bias" : "") + (kCompact ? " compact" : "");
  }

  static constexpr Tile kTile = tile_of(Element::kBytes, kHeadDim, kHasBias, kCompact);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kWarpsM = kTile.warps_m;
  static constexpr int kWarpsN = kTile.warps_n;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kMmaM = kBlockM / (16 * kWarpsM);    // 16-row fragments of a warp
  static constexpr int kTilesS = kBlockN / (8 * kWarpsN);   // 8-key accumulators of a warp
  static constexpr int kTilesO = kHeadDim / (8 * kWarpsN);  // 8-channel accumulators of a warp

  static constexpr int kRowChunks = kHeadDim * Element::kBytes / kChunkBytes;  // of q, k and v
  static constexpr int kProbabilityChunks = kBlockN * Element::kBytes / kChunkBytes;
  static constexpr int kBiasChunks = kBlockN * 2 / kChunkBytes;

  // Byte offsets into shared memory.
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kBlockM * kRowChunks * kChunkBytes;
  static constexpr int kV = kK + kBlockN * kRowChunks * kChunkBytes;
  static constexpr int kBias = kV + kBlockN * kRowChunks * kChunkBytes;
  static constexpr int kP = kBias + (kHasBias ? kBlockM * kBiasChunks * kChunkBytes : 0);
  static constexpr int kStats = kP + (kWarpsN > 1 ? kBlockM * kProbabilityChunks * kChunkBytes : 0);
  static constexpr int kSharedBytes = kStats + kWarpsN * kBlockM * int{sizeof(float)};
  // The epilogue stages 16-bit output rows where q, k and v were.
  static_assert(kBlockM * kHeadDim * 2 <= kBias);
  static_assert(kMmaM * 16 * kWarpsM == kBlockM && kTilesS % 2 == 0 && kTilesO % 2 == 0);
};

}  // namespace pfa::cuda::sm80
