// SPDX-License-Identifier: Apache-2.0
// Where a thread's registers lie in a tile, and where a tile lies in shared memory.
//
// An accumulator of the m16n8 instructions is 16 rows x 8 columns over the 32 lanes of a warp:
// element e of lane l has row l / 4 + 8 (e / 2) and column 2 (l % 4) + e % 2. The packed mask keeps
// the bits of 16 rows x 64 keys in that order, one word per lane: see bit_of.
// tests/cuda/layout_test.cu checks all of it against CuTe.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PFA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PFA_HOST_DEVICE inline
#endif

namespace pfa::cuda {

constexpr int kWarp = 32;
constexpr int kChunkBytes = 16;  // unit of shared memory addressing
constexpr int kMaskRows = 16;    // rows and keys of one cell of the packed mask
constexpr int kMaskKeys = 64;

PFA_HOST_DEVICE constexpr int accumulator_row(int lane, int element) {
  return lane / 4 + 8 * (element / 2);
}
PFA_HOST_DEVICE constexpr int accumulator_column(int lane, int element) {
  return 2 * (lane % 4) + element % 2;
}

// Bit of a mask word that stands for the element of the lane's accumulator n_tile (0..7).
PFA_HOST_DEVICE constexpr int bit_of(int n_tile, int element) { return 4 * n_tile + element; }

// Bits of a chunk index that the swizzle of a row of kChunks chunks changes.
template <int kChunks>
constexpr int kSwizzleMask = kChunks % 8 == 0   ? 7
                             : kChunks % 4 == 0 ? 3
                                                : 1;

// XOR of the chunk index, so that ldmatrix, which reads one chunk of eight consecutive rows,
// touches all banks once. Rows of 8 chunks cover the banks by themselves; shorter and odd multiples
// start at alternating banks, which leaves fewer bits to permute.
template <int kChunks>
PFA_HOST_DEVICE constexpr int swizzle_of_row(int row) {
  static_assert(kChunks % 2 == 0, "a row must have an even number of chunks");
  return (kSwizzleMask<kChunks> == 7   ? row
          : kSwizzleMask<kChunks> == 3 ? row >> 1
                                       : row >> 2) &
         kSwizzleMask<kChunks>;
}

// Byte offset of a chunk in a tile of rows of kChunks chunks.
template <int kChunks>
PFA_HOST_DEVICE constexpr int chunk_offset(int row, int chunk) {
  return (row * kChunks + (chunk ^ swizzle_of_row<kChunks>(row))) * kChunkBytes;
}

// chunk_offset of a lane's row and chunk, moved by compile-time distances: one XOR at most, and
// none that would have to be kept in a register.
template <int kChunks>
struct LaneCursor {
  uint32_t corner;  // the tile's address, a multiple of 128, plus the lane's chunk_offset

  // `row` is a multiple of 8 and `chunk` has no bit in common with the lane's chunk.
  PFA_HOST_DEVICE constexpr uint32_t at(int row, int chunk) const {
    constexpr int kMask = kSwizzleMask<kChunks>;
    return (corner ^ ((chunk & kMask) * kChunkBytes)) +
           (row * kChunks + (chunk & ~kMask)) * kChunkBytes;
  }
};

// The order of ldmatrix.x4's matrices for the operands of one mma: the row and chunk, relative to
// the fragment's corner, that a lane addresses.
struct LaneAddress {
  int row, chunk;
};
// A operand, 16 rows x 2 chunks; also two 8-column tiles of a 16-bit B operand read transposed.
PFA_HOST_DEVICE constexpr LaneAddress lane_address_rows16(int lane) {
  return {lane & 15, lane >> 4};
}
// B operands of two n-tiles stored with n as rows: 16 rows x 2 chunks.
PFA_HOST_DEVICE constexpr LaneAddress lane_address_pair(int lane) {
  return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
}
// 8-bit B operand read transposed: 32 rows x 1 chunk, see quant.cuh.
PFA_HOST_DEVICE constexpr LaneAddress lane_address_rows32(int lane) { return {lane, 0}; }

#ifdef __CUDACC__
// The same value, but the compiler cannot tell: what is computed from it inside a loop stays there
// instead of occupying registers throughout.
__device__ __forceinline__ unsigned recomputed(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
#endif

}  // namespace pfa::cuda
