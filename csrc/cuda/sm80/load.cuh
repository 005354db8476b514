// SPDX-License-Identifier: Apache-2.0
// Copies of tiles from global to swizzled shared memory. What lies outside a tensor is never read
// and becomes zeros.
#pragma once

#include "../fragment.cuh"
#include "ptx.cuh"

namespace pfa::cuda::sm80 {

// Where a tile lies in global memory: its first row, and what of it exists.
struct TileSource {
  const char* data;
  int64_t row_stride;  // bytes
  int rows;            // the first of them exist
  int bytes;           // of a row
  bool vectorised;     // every row starts at a multiple of 16 bytes
};

template <int kRows, int kChunks, int kThreads, int kElementBytes>
struct TileCopy {
  // Lanes that copy one row side by side; the swizzle permutes chunks among them.
  static constexpr int kLanes = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRowStep = kThreads / kLanes;
  static_assert(kRowStep % 8 == 0 || kRows <= kRowStep, "rows of a thread must share a swizzle");

  // Enqueues the copy; the caller commits and waits. A tensor that is not vectorised is copied
  // element by element before this returns.
  __device__ __forceinline__ static void start(char* shared, const TileSource& source,
                                               unsigned thread) {
    if (!source.vectorised) {
      copy_elements(shared, source, thread);
    } else if (source.rows >= kRows && source.bytes >= kChunks * kChunkBytes) {
      copy_chunks<true>(ptx::shared_address(shared), source, thread);
    } else {
      copy_chunks<false>(ptx::shared_address(shared), source, thread);
    }
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ static void copy_chunks(uint32_t shared, const TileSource& source,
                                                     unsigned thread) {
    const int row0 = static_cast<int>(thread / kLanes), chunk0 = static_cast<int>(thread % kLanes);
    const char* from = source.data + row0 * source.row_stride + chunk0 * kChunkBytes;
    const uint32_t to = shared + chunk_offset<kChunks>(row0, chunk0);
#pragma unroll
    for (int row = 0; row < kRows; row += kRowStep) {
      if (kRows % kRowStep == 0 || row0 + row < kRows) {
#pragma unroll
        for (int j = 0; j < kChunks; j += kLanes) {
          const int left = source.bytes - (chunk0 + j) * kChunkBytes;
          const bool exists = kWhole || row0 + row < source.rows;
          const int bytes = kWhole ? kChunkBytes : exists ? min(max(left, 0), kChunkBytes) : 0;
          ptx::cp_async_16(to + (row * kChunks + j) * kChunkBytes, from + j * kChunkBytes, bytes);
        }
      }
      from += kRowStep * source.row_stride;
    }
  }

  __device__ __forceinline__ static void copy_elements(char* shared, const TileSource& source,
                                                       unsigned thread) {
#pragma unroll 1
    for (unsigned index = thread; index < kRows * kChunks; index += kThreads) {
      const int row = static_cast<int>(index / kChunks), chunk = static_cast<int>(index % kChunks);
      const char* from = source.data + row * source.row_stride + chunk * kChunkBytes;
      const int bytes = row < source.rows ? source.bytes - chunk * kChunkBytes : 0;
      uint32_t words[kChunkBytes / 4] = {};
#pragma unroll
      for (int at = 0; at < kChunkBytes; at += kElementBytes) {
        if (at >= bytes) continue;
        const uint32_t bits = kElementBytes == 1 ? *reinterpret_cast<const uint8_t*>(from + at)
                                                 : *reinterpret_cast<const uint16_t*>(from + at);
        words[at / 4] |= bits << (at % 4 * 8);
      }
      *reinterpret_cast<uint4*>(shared + chunk_offset<kChunks>(row, chunk)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

}  // namespace pfa::cuda::sm80
