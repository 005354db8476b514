// SPDX-License-Identifier: Apache-2.0
// One block of work: which rows of which head, how long its sequences are, and which tiles of keys
// its band leaves. Everything 64-bit happens here, once per block.
#pragma once

#include <algorithm>

#include "fragment.cuh"
#include "params.h"

namespace pfa::cuda {

PFA_HOST_DEVICE constexpr int64_t clamp64(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ int64_t length_of(const LengthsParams& lengths, int64_t b,
                                             int64_t seqlen) {
  if (lengths.is_inline) return lengths.values[b];
  if (lengths.data == nullptr) return seqlen;
  const int64_t at = b * lengths.stride;
  const int64_t value = lengths.is_int64 ? static_cast<const int64_t*>(lengths.data)[at]
                                         : static_cast<const int32_t*>(lengths.data)[at];
  return clamp64(value, 0, seqlen);
}

// A block is numbered (batch, head, m_block, split), the last running fastest, so that neighbours
// read the same keys; with batch_innermost (head, m_block, batch, split).
struct BlockIndex {
  int64_t b;
  int64_t m_block;
  int head;
  int split;
};

PFA_HOST_DEVICE BlockIndex decode_block(const Params& p, int64_t index) {
  BlockIndex block{};
  if (p.split.count > 1) {  // a division costs some fifty instructions
    block.split = static_cast<int>(index % p.split.count);
    index /= p.split.count;
  }
  if (p.batch_innermost) {
    block.b = index % p.batch;
    index /= p.batch;
  }
  block.m_block = index % p.num_m_blocks;
  index /= p.num_m_blocks;
  if (p.batch_innermost) {
    block.head = static_cast<int>(index);
  } else {
    block.head = static_cast<int>(index % p.num_heads);
    block.b = index / p.num_heads;
  }
  if (p.longest_first) block.m_block = p.num_m_blocks - 1 - block.m_block;
  return block;
}

// Tiles of keys that some row of a block may see by band and length, and those in the middle that
// every row sees whole.
struct TileRange {
  int begin, end;
  int full_begin, full_end;
};

struct Sequence {
  int64_t row_begin;  // first row of the block
  int rows;           // that are valid, 0 if none
  int64_t keys;       // valid keys
  int64_t anchor;     // of the band

  template <int kBlockM>
  __device__ static Sequence of(const Params& p, const BlockIndex& block) {
    const int64_t rows_used = length_of(p.seqused_q, block.b, p.seqlen_q);
    Sequence s{};
    s.row_begin = block.m_block * kBlockM;
    s.rows = static_cast<int>(clamp64(rows_used - s.row_begin, 0, kBlockM));
    s.keys = length_of(p.seqused_k, block.b, p.seqlen_k);
    s.anchor = p.band.bottom_right ? s.keys - rows_used : 0;
    return s;
  }

  // The split's share of the tiles; empty when the block has no valid row.
  template <int kBlockN>
  __device__ TileRange tiles(const Band& band, int split, int num_splits) const {
    const int64_t first_row = row_begin + anchor, last_row = first_row + rows - 1;
    const int64_t begin = clamp64(first_row + band.lo, 0, keys);
    const int64_t end = rows > 0 ? clamp64(last_row + band.hi + 1, begin, keys) : begin;
    const int64_t full_begin = clamp64(last_row + band.lo, 0, keys);
    const int64_t full_end = clamp64(first_row + band.hi + 1, 0, keys);
    TileRange range{};
    range.begin = static_cast<int>(begin / kBlockN);
    range.end = end > begin ? static_cast<int>((end + kBlockN - 1) / kBlockN) : range.begin;
    range.full_begin = static_cast<int>((full_begin + kBlockN - 1) / kBlockN);
    range.full_end = static_cast<int>(full_end / kBlockN);
    if (num_splits == 1) return range;
    const int64_t tiles = range.end - range.begin, first = range.begin;
    range.begin = static_cast<int>(first + tiles * split / num_splits);
    range.end = static_cast<int>(first + tiles * (split + 1) / num_splits);
    return range;
  }
};

}  // namespace pfa::cuda
