// SPDX-License-Identifier: Apache-2.0
// One block of work: which rows of which head, how long its sequences are, and which tiles of keys
// its band leaves. All divisions happen here, once per block.
#pragma once

#include <algorithm>

#include "fragment.cuh"
#include "params.h"

namespace pfa::cuda {

template <class Int>
PFA_HOST_DEVICE constexpr Int clamp(Int value, Int low, Int high) {
  return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ int64_t length_of(const LengthsParams& lengths, int64_t b,
                                             int64_t seqlen) {
  if (lengths.is_inline) return lengths.values[b];
  if (lengths.data == nullptr) return seqlen;
  const int64_t at = b * lengths.stride;
  const int64_t value = lengths.is_int64 ? static_cast<const int64_t*>(lengths.data)[at]
                                         : static_cast<const int32_t*>(lengths.data)[at];
  return clamp<int64_t>(value, 0, seqlen);
}

// A block is numbered (batch, head, m_block, split), the last running fastest, so that neighbours
// read the same keys; with batch_innermost (head, m_block, batch, split).
template <class Index>
struct BlockIndexOf {
  Index b;
  Index m_block;
  int head;
  int split;
};
using BlockIndex = BlockIndexOf<int64_t>;

// Index: int64_t, or uint32_t where all numbers fit. A division costs some fifty instructions, or
// twenty.
template <class Index>
PFA_HOST_DEVICE BlockIndexOf<Index> decode_block(const Params& p, Index index) {
  BlockIndexOf<Index> block{};
  const auto take = [&index](int64_t size) {  // the part of the index that runs fastest
    const Index rest = index / static_cast<Index>(size);
    const Index part = index - rest * static_cast<Index>(size);
    index = rest;
    return part;
  };
  if (p.split.count > 1) block.split = static_cast<int>(take(p.split.count));
  if (p.batch_innermost) block.b = take(p.batch);
  block.m_block = take(p.num_m_blocks);
  if (p.batch_innermost) {
    block.head = static_cast<int>(index);
  } else {
    block.head = static_cast<int>(take(p.num_heads));
    block.b = index;
  }
  if (p.longest_first) block.m_block = static_cast<Index>(p.num_m_blocks) - 1 - block.m_block;
  return block;
}

// Tiles of keys that some row of a block may see by band and length, and those in the middle that
// every row sees whole.
struct alignas(16) TileRange {
  int begin, end;
  int full_begin, full_end;
};

// Int: int64_t, or int where all rows, keys and limits of the band have room to be added up.
template <class Int>
struct SequenceOf {
  Int row_begin;  // first row of the block
  int rows;       // that are valid, 0 if none
  Int keys;       // valid keys
  Int anchor;     // of the band
  Int lo, hi;     // the band

  template <int kBlockM, class Index>
  __device__ static SequenceOf of(const Params& p, const BlockIndexOf<Index>& block) {
    const Int rows_used = static_cast<Int>(length_of(p.seqused_q, block.b, p.seqlen_q));
    SequenceOf s{};
    s.row_begin = static_cast<Int>(block.m_block) * kBlockM;
    s.rows = static_cast<int>(clamp<Int>(rows_used - s.row_begin, 0, kBlockM));
    s.keys = static_cast<Int>(length_of(p.seqused_k, block.b, p.seqlen_k));
    s.anchor = p.band.bottom_right ? s.keys - rows_used : 0;
    s.lo = static_cast<Int>(p.band.lo);
    s.hi = static_cast<Int>(p.band.hi);
    return s;
  }

  // Keys that some row sees, none when the block has no valid row; and the first keys from which
  // and up to which every row sees all.
  [[nodiscard]] __device__ Int keys_begin() const {
    return clamp<Int>(row_begin + anchor + lo, 0, keys);
  }
  [[nodiscard]] __device__ Int keys_end() const {
    const Int begin = keys_begin();
    return rows > 0 ? clamp<Int>(row_begin + anchor + rows + hi, begin, keys) : begin;
  }
  [[nodiscard]] __device__ Int full_begin() const {
    return clamp<Int>(row_begin + anchor + rows - 1 + lo, 0, keys);
  }
  [[nodiscard]] __device__ Int full_end() const {
    return clamp<Int>(row_begin + anchor + hi + 1, 0, keys);
  }

  // The split's share of the tiles; empty when the block has no valid row.
  template <int kBlockN>
  __device__ TileRange tiles(int split = 0, int num_splits = 1) const {
    const Int begin = keys_begin(), end = keys_end();
    TileRange range{};
    range.begin = static_cast<int>(begin / kBlockN);
    range.end = end > begin ? static_cast<int>((end + kBlockN - 1) / kBlockN) : range.begin;
    range.full_begin = static_cast<int>((full_begin() + kBlockN - 1) / kBlockN);
    range.full_end = static_cast<int>(full_end() / kBlockN);
    if (num_splits == 1) return range;
    const auto tiles = static_cast<unsigned>(range.end - range.begin);
    const auto splits = static_cast<unsigned>(num_splits);
    const auto before = [=](int parts) {  // fits: 32 splits of tiles of 64 keys
      return static_cast<int>(tiles * static_cast<unsigned>(parts) / splits);
    };
    range.end = range.begin + before(split + 1);
    range.begin += before(split);
    return range;
  }
};

using Sequence = SequenceOf<int64_t>;

}  // namespace pfa::cuda
