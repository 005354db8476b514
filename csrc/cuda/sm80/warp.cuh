// SPDX-License-Identifier: Apache-2.0
// A warp's place in the tile of its block, and the shared memory that it reads from there.
#pragma once

#include "config.cuh"

namespace pfa::cuda::sm80 {

template <class T>
struct Warp {
  static constexpr int kMmaM = T::kMmaM, kTilesS = T::kTilesS, kTilesO = T::kTilesO;
  using Scores = float[kMmaM][kTilesS][4];  // of a warp's rows and its share of a tile's keys
  using Output = float[kMmaM][kTilesO][4];  // of a warp's rows and its share of the channels
  using RowValues = float[kMmaM][2];        // one for each row of a thread

  char* shared;

  [[nodiscard]] __device__ int index() const { return static_cast<int>(threadIdx.x / kWarp); }
  [[nodiscard]] __device__ int lane() const { return static_cast<int>(threadIdx.x % kWarp); }
  [[nodiscard]] __device__ int index_n() const {
    return T::kWarpsN > 1 ? static_cast<int>(threadIdx.x / (kWarp * T::kWarpsM)) : 0;
  }
  // First row in the block, first key in the tile.
  [[nodiscard]] __device__ int row() const {
    return static_cast<int>(threadIdx.x / kWarp % T::kWarpsM) * (kMmaM * 16);
  }
  [[nodiscard]] __device__ int key() const { return index_n() * (kTilesS * 8); }

  template <int kChunks>
  [[nodiscard]] __device__ LaneCursor<kChunks> cursor(int tile, int row, LaneAddress lane,
                                                      int chunk = 0) const {
    return {ptx::shared_address(shared + tile) +
            static_cast<uint32_t>(chunk_offset<kChunks>(row + lane.row, chunk + lane.chunk))};
  }
};

}  // namespace pfa::cuda::sm80
