// SPDX-License-Identifier: Apache-2.0
// Every compile-time fact of an int8 kernel of this family.
#pragma once

#include "../transpose_values.h"
#include "config.cuh"

namespace pfa::cuda::sm90 {

// The tile plan, as tile_of(): as many keys as registers allow beside sums of P V, since the
// instructions that a tile costs besides are many beside the few of its products.
PFA_HOST_DEVICE constexpr Tile int8_tile_of(int head_dim, bool is_dense, bool has_bias) {
  const bool whole_cells = is_dense || has_bias;
  if (head_dim <= 64) return {128, whole_cells ? 128 : 256, 3};
  if (head_dim <= 128) return {128, whole_cells ? 128 : 192, 2};
  return {128, whole_cells ? 64 : 96, 2};
}

template <int kHeadDim_, class Mask_, bool kHasBias_>
struct Int8Traits {
  using Element = Int8;
  using Mask = Mask_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasBias = kHasBias_;
  static constexpr bool kIsDense = Mask::kIsDense;

  static std::string name() {
    return "sm90 int8 D" + std::to_string(kHeadDim) + " " + Mask::kName + (kHasBias ? " bias" : "");
  }

  static constexpr Tile kTile = int8_tile_of(kHeadDim, kIsDense, kHasBias);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kConsumerThreads = kConsumers * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + kWarpgroup;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kCluster = 1;
  static constexpr bool kTakesTurns = true;
  // When its Q K^T is done: products are so short beside the softmax that warpgroups which have
  // theirs at the same time fall into step. Predicted 14 % faster at D128.
  static constexpr bool kEndsTurnLate = true;
  static constexpr int kTilesS = kBlockN / 8;   // 8-key accumulators of a warp
  static constexpr int kTilesO = kHeadDim / 8;  // 8-channel accumulators of a warp

  // Tiles of q and k are boxes of 128 columns, or 64 where those do not divide head_dim; TMA sees
  // columns of 16 bits.
  static constexpr int kBoxRowBytes = kHeadDim % 128 == 0 ? 128 : 64;
  static constexpr int kBoxColumns = kBoxRowBytes / 2;
  static constexpr int kBoxes = kHeadDim / kBoxRowBytes;
  static constexpr int kBoxQ = kBlockM * kBoxRowBytes;  // bytes
  static constexpr int kBoxK = kBlockN * kBoxRowBytes;
  static constexpr int kBytesQ = kBoxes * kBoxQ;
  static constexpr int kBytesK = kBoxes * kBoxK;  // and of a tile of V
  static constexpr int kRowsV = kBlockN;
  static_assert(kBoxQ % 1024 == 0 && kBoxK % 1024 == 0, "boxes must start where a swizzle repeats");
  // A step of P V takes a cell of transposed V.
  static constexpr int kStepKeys = kTransposedKeys;
  static constexpr int kSteps = kBlockN / kStepKeys;
  static constexpr int kRowBytesV = kStepKeys;
  static constexpr int kStepBytesV = kStepKeys * kHeadDim;

  static constexpr int kBiasColumns = 64;
  static constexpr int kBiasBoxes = kHasBias ? kBlockN / kBiasColumns : 0;
  static constexpr int kBoxBias = kBlockM * kBiasColumns * 2;
  static constexpr int kBytesBias = kBiasBoxes * kBoxBias;

  // Byte offsets into shared memory, which is aligned to 1024 bytes.
  static constexpr int kControlBytes = 512;  // these three as in config.cuh
  static constexpr int kFollowing = 384;
  static constexpr int kWorkSlots = 4;
  static constexpr int kWorkBytes = 1024;
  static constexpr int kSuspectsBytes = 512;
  static constexpr int kBytesRings = kStages * (2 * kBytesK + kBytesBias);
  static constexpr int kBytesBesides =
      kControlBytes + kWorkBytes + kSuspectsBytes + 1024;  // for the alignment
  static constexpr int kStagesQ = 2 * kBytesQ + kBytesRings + kBytesBesides <= kSharedLimit ? 2 : 1;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kStagesQ * kBytesQ;
  static constexpr int kV = kK + kStages * kBytesK;
  static constexpr int kBias = kV + kStages * kBytesK;
  static constexpr int kControl = kBias + kStages * kBytesBias;
  static constexpr int kWork = kControl + kControlBytes;
  static constexpr int kSuspects = kWork + kWorkBytes;
  static constexpr int kSharedBytes = kStagesQ * kBytesQ + kBytesRings + kBytesBesides;
  static_assert(kSharedBytes <= kSharedLimit);
};

}  // namespace pfa::cuda::sm90
