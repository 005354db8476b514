// SPDX-License-Identifier: Apache-2.0
// Every compile-time fact of a kernel of this family: its policies, its tile, its shared memory.
#pragma once

#include <string>

#include "../element.cuh"
#include "../fragment.cuh"
#include "../mask.cuh"
#include "../quant.cuh"
#include "../transpose_values.h"

namespace pfa::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr int kSharedLimit = 227 * 1024;

// Of a thread, of a block that has the multiprocessor for itself.
constexpr int launch_registers(int threads) { return (1 << 16) / threads / 8 * 8; }

struct Tile {
  int block_m;  // query rows of a block
  int block_n;  // keys of a tile
  int stages;   // tiles of K and of V in shared memory
  [[nodiscard]] constexpr int consumers() const { return block_m / 64; }  // warpgroups
};

// The tile plan. The packed mask is kept in cells of 64 keys, and classifies tiles that divide 256;
// the bias arrives in boxes of 64 keys. Predicted for an H100, fp16, 16384 tokens, in TFLOP/s at
// 512 and 4096 keys, before softmax did without maxima and blocks ran into each other:
//   D64:  128x128, 4 stages 331 and 430; 192x128, 4 stages 329 and 451
//   D128: 128x128, 2 stages 478 and 605; 3 stages 432 and 597
//   D256: 128x80 500 and 686
// and since:
//   D96:  128x128, 2 stages 492 and 596; 3 stages 496 and 596; 192x96 402 and 585
//   D192: 128x80 534 and 684; 128x64 536 and 680; 128x112 494 and 687
PFA_HOST_DEVICE constexpr Tile tile_of(int head_dim, bool is_dense, bool has_bias) {
  const bool whole_cells = is_dense || has_bias;
  if (head_dim <= 64) return {whole_cells ? 128 : 192, 128, has_bias ? 3 : 4};
  if (head_dim <= 128) return {128, 128, 2};
  return {128, whole_cells ? 64 : 80, 2};
}

// The same of int8: as many keys as registers and, above head_dim 256, shared memory allow beside
// sums of P V, since the instructions that a tile costs besides are many beside the few of its
// products. Predicted at D512 and 4096 keys: 128x64 721 TOP/s, 128x96 756.
PFA_HOST_DEVICE constexpr Tile int8_tile_of(int head_dim, bool is_dense, bool has_bias) {
  const bool whole_cells = is_dense || has_bias;
  if (head_dim <= 64) return {128, whole_cells ? 128 : 256, whole_cells ? 3 : 4};
  if (head_dim <= 128) return {128, whole_cells ? 128 : 224, 2};
  if (head_dim == 384) return {128, has_bias ? 64 : 128, 2};
  return {128, whole_cells ? 64 : head_dim <= 256 ? 128 : 96, 2};
}

template <class Element_, int kHeadDim_, class Mask_, bool kHasBias_>
struct Traits {
  using Element = Element_;
  using Mask = Mask_;
  static constexpr bool kIsInteger = quant::Of<Element>::kIsInteger;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasBias = kHasBias_;
  static constexpr bool kIsDense = Mask::kIsDense;

  static std::string name() {
    return std::string("sm90 ") + Element::kName + " D" + std::to_string(kHeadDim) + " " +
           Mask::kName + (kHasBias ? " bias" : "");
  }

  static constexpr Tile kTile = kIsInteger ? int8_tile_of(kHeadDim, kIsDense, kHasBias)
                                           : tile_of(kHeadDim, kIsDense, kHasBias);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kConsumerThreads = kConsumers * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + kWarpgroup;
  // Of a thread; multiples of 8. All warpgroups together may have as many as the block had at its
  // launch: who asks for more waits forever. Who looks for tiles of a dense mask needs more
  // than 32.
  static constexpr int kLaunchRegisters = launch_registers(kThreads);
  static constexpr int kProducerRegisters = kConsumers == 3           ? 32
                                            : kIsInteger && !kIsDense ? 24
                                                                      : 40;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * (kConsumers + 1) - kProducerRegisters) / kConsumers / 8 * 8;
  // Blocks of threads that share a block of work: above head_dim 256 O does not fit one. Each
  // computes all of S and a slice of O's columns; they exchange nothing.
  static constexpr int kSlices = kHeadDim > 256 ? 2 : 1;
  static constexpr int kCluster = 1;
  static constexpr int kColumns = kHeadDim / kSlices;  // of O, in a block of threads
  // Measured on an H100, int8 gains nothing by it.
  static constexpr bool kTakesTurns = !kIsInteger && kHeadDim <= 128;
  static constexpr int kTilesS = kBlockN / 8;  // 8-key accumulators of a warp
  // A last tile is computed as if it had 32, 64 or 128 keys where those are enough, up to these.
  static constexpr bool kNarrows = kIsInteger && !kIsDense && !kHasBias && kHeadDim <= 128;
  static constexpr int kMostNarrow = 128;
  static constexpr int kTilesO = kColumns / 8;  // 8-channel accumulators of a warp

  // Tiles of q, k and v are boxes of 128 bytes of each row, or 64 where those do not divide it: as
  // wide as a swizzle of TMA, which sees columns of 16 bits.
  static constexpr int kRowBytes = kHeadDim * Element::kBytes;
  static constexpr int kBoxRowBytes = kRowBytes % 128 == 0 ? 128 : 64;
  static constexpr int kBoxColumns = kBoxRowBytes / 2;
  static constexpr int kBoxes = kRowBytes / kBoxRowBytes;
  static constexpr int kBoxChunks = kBoxRowBytes / kChunkBytes;
  static constexpr int kBoxQ = kBlockM * kBoxRowBytes;  // bytes
  static constexpr int kBoxK = kBlockN * kBoxRowBytes;
  static constexpr int kBytesQ = kBoxes * kBoxQ;
  static constexpr int kBytesK = kBoxes * kBoxK;
  static constexpr int kBytesV = kBytesK / kSlices;
  static constexpr int kRowsV = kBlockN;  // of a box
  static_assert(kBoxQ % 1024 == 0 && kBoxK % 1024 == 0, "boxes must start where a swizzle repeats");
  // A step of P V: its keys, and where its part of a tile of V lies; of int8, a cell of transposed
  // V.
  static constexpr int kStepKeys = kIsInteger ? kTransposedKeys : 16;
  static constexpr int kSteps = kBlockN / kStepKeys;
  static constexpr int kRowBytesV = kIsInteger ? kTransposedKeys : kBoxRowBytes;
  static constexpr int kStepBytesV = kStepKeys * (kIsInteger ? kColumns : kBoxRowBytes);

  static constexpr int kBiasColumns = 64;
  static constexpr int kBiasBoxes = kHasBias ? kBlockN / kBiasColumns : 0;
  static constexpr int kBoxBias = kBlockM * kBiasColumns * 2;
  static constexpr int kBytesBias = kBiasBoxes * kBoxBias;

  // Byte offsets into shared memory, which is aligned to 1024 bytes.
  static constexpr int kControlBytes = 512;  // barriers and, from kFollowing on, Visit
  static constexpr int kFollowing = 384;
  // Descriptions of blocks of work. The producer describes one kStagesQ blocks after the one whose
  // Q all consumers have left, which may be the one before that whose sums a consumer stores.
  static constexpr int kWorkSlots = 4;
  static constexpr int kWorkBytes = 1024;
  static constexpr int kBytesRings = kStages * (kBytesK + kBytesV + kBytesBias);
  static constexpr int kBytesBesides =
      kControlBytes + kWorkBytes + 512 + 1024;  // for the alignment
  // Q of the next block of work is fetched during this one where there is room.
  static constexpr int kStagesQ = 2 * kBytesQ + kBytesRings + kBytesBesides <= kSharedLimit ? 2 : 1;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kStagesQ * kBytesQ;
  static constexpr int kV = kK + kStages * kBytesK;
  static constexpr int kBias = kV + kStages * kBytesV;
  static constexpr int kControl = kBias + kStages * kBytesBias;
  static constexpr int kWork = kControl + kControlBytes;
  static constexpr int kSuspects = kWork + kWorkBytes;
  static constexpr int kSharedBytes = kStagesQ * kBytesQ + kBytesRings + kBytesBesides;
  static_assert(kSharedBytes <= kSharedLimit);
};

}  // namespace pfa::cuda::sm90
