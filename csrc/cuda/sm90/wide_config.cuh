// SPDX-License-Identifier: Apache-2.0
// The compile-time facts of a 16-bit kernel above head_dim 256, where O's columns are cut between
// the two blocks of threads of a cluster: see wide_consumer.cuh.
#pragma once

#include "config.cuh"

namespace pfa::cuda::sm90 {

// A block of work has 128 query rows and tiles have 64 keys. K and V come in chunks through one
// ring: a block of threads loads half of each.
template <class Element_, int kHeadDim_, class Mask_, bool kHasBias_>
struct WideTraits {
  using Element = Element_;
  using Mask = Mask_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasBias = kHasBias_;
  static constexpr bool kIsDense = Mask::kIsDense;
  static_assert(kHeadDim % 128 == 0 && kHeadDim <= 512);

  static std::string name() {
    return std::string("sm90 ") + Element::kName + " D" + std::to_string(kHeadDim) + " " +
           Mask::kName + (kHasBias ? " bias" : "");
  }

  static constexpr int kBlockM = 128;
  static constexpr int kBlockN = 64;
  static constexpr int kSlices = 2;  // blocks of threads that share a block of work
  static constexpr int kCluster = kSlices;
  static constexpr int kConsumers = kBlockM / 64;  // warpgroups of a block of threads
  static constexpr int kConsumerThreads = kConsumers * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + kWarpgroup;
  static constexpr int kStagesQ = 1;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                launch_registers(kThreads) * (kConsumers + 1));
  static constexpr int kColumns = kHeadDim / kSlices;  // of O, in a block of threads
  static constexpr int kTilesS = kBlockN / 8;          // 8-key accumulators of a warp
  static constexpr int kTilesO = kColumns / 8;         // 8-channel accumulators of a warp

  // Boxes of TMA: 64 columns of all rows of Q or keys of K, or of 32 keys of V.
  static constexpr int kBoxColumns = 64;
  static constexpr int kBoxRowBytes = kBoxColumns * Element::kBytes;
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  static constexpr int kRowsV = 32;
  static constexpr int kBoxQ = kBlockM * kBoxRowBytes;  // bytes
  static constexpr int kBoxK = kBlockN * kBoxRowBytes;
  static constexpr int kBoxV = kRowsV * kBoxRowBytes;
  static constexpr int kBytesQ = kBoxes * kBoxQ;

  // A chunk of K is two boxes; one of V the block's columns.
  static constexpr int kBoxesChunkK = 2;
  static constexpr int kBoxesChunkV = kColumns / kBoxColumns;
  static constexpr int kChunksK = kBoxes / kBoxesChunkK;  // of a tile
  static constexpr int kChunksV = kBlockN / kRowsV;       // of a tile's columns
  static constexpr int kSlot = kBoxesChunkK * kBoxK;
  static_assert(kBoxesChunkV * kBoxV <= kSlot);

  static constexpr int kBiasColumns = 64;
  static constexpr int kBoxBias = kBlockM * kBiasColumns * 2;  // a tile
  static_assert(kBiasColumns == kBlockN && kBoxBias <= kSlot);

  // Byte offsets into shared memory, which is aligned to 1024 bytes.
  static constexpr int kBytesP = 64 * kBlockN * Element::kBytes;  // of a warpgroup
  static constexpr int kBytesMaxima = 64 * 4;                     // of its rows
  static constexpr int kControlBytes = 512 + 3 * kBlockM * 4;
  static constexpr int kSlots =
      (kSharedLimit - 1024 - kBytesQ - kConsumers * kBytesP - kControlBytes) / kSlot;
  static constexpr int kQ = 0;
  static constexpr int kRing = kQ + kBytesQ;
  static constexpr int kP = kRing + kSlots * kSlot;
  static constexpr int kControl = kP + kConsumers * kBytesP;  // barriers
  static constexpr int kFlags = kControl + 256;
  static constexpr int kSuspects = kControl + 320;
  static constexpr int kMaxima = kControl + 512;
  static constexpr int kSums = kMaxima + kBlockM * 4;                   // twice
  static constexpr int kSharedBytes = kControl + kControlBytes + 1024;  // for the alignment
  static_assert(kSharedBytes <= kSharedLimit);
};

}  // namespace pfa::cuda::sm90
