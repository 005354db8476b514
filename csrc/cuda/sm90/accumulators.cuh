// SPDX-License-Identifier: Apache-2.0
// What all consumers do with the accumulators of a warp's 16 rows, of S and of O.
#pragma once

#include "scores.cuh"

namespace pfa::cuda::sm90 {

template <int kTiles>
__device__ __forceinline__ void clear(float (&acc)[1][kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][n][e] = 0.0f;
  }
}

// Skipped where no maximum of the warp's rows has grown: multiplying by 1 changes nothing.
template <int kTiles>
__device__ __forceinline__ void rescale(float (&acc)[1][kTiles][4], const float (&alpha)[1][2]) {
  const bool grown = alpha[0][0] != 1.0f || alpha[0][1] != 1.0f;
  if (!__any_sync(0xffffffffu, grown)) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][n][e] *= alpha[0][e / 2];
  }
}

// Accumulators of S are the A operand of P V once they are packed.
template <class Element, int kTiles>
__device__ __forceinline__ void pack(const float (&s)[1][kTiles][4], uint32_t (&p)[kTiles / 2][4]) {
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &s[0][2 * step + i / 2][i % 2 * 2];
      p[step][i] = Element::pack(pair[0], pair[1]);
    }
  }
}

// Is there an infinity or a NaN in the first `rows` rows of the block?
template <int kTiles>
[[nodiscard]] __device__ __forceinline__ bool has_nonfinite_sums(const float (&acc)[1][kTiles][4],
                                                                 int rows) {
  const int lane = static_cast<int>(recomputed(threadIdx.x) % kWarp);
  bool found = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float zeros[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) zeros[c] = fmaf(acc[0][n][2 * r + c], 0.0f, zeros[c]);
    }
    const bool is_valid = first_row() + accumulator_row(lane, 2 * r) < rows;
    found |= is_valid && zeros[0] + zeros[1] != 0.0f;
  }
  return found;
}

}  // namespace pfa::cuda::sm90
