// SPDX-License-Identifier: Apache-2.0
// Mask policies: which tiles a block visits, and which elements of a visited tile take part.
//
// Every sparse_mode is a band with a length (Band), with a packed dense mask on top in modes 0 and
// 1 (Dense). A tile inside the band whose class is kFull costs nothing; an empty one is skipped.
#pragma once

#include "seqlen.cuh"

namespace pfa::cuda {

enum TileClass : uint8_t { kEmpty = 0, kPartial = 1, kFull = 2 };

namespace mask {

// Keys [first, last) of a row in a tile take part, counted from the tile's first key.
struct Columns {
  int first, last;
};

template <class Int>
__device__ __forceinline__ Columns columns_of_row(const SequenceOf<Int>& sequence, int row,
                                                  Int tile_begin, int block_n) {
  const Int diagonal = sequence.row_begin + row + sequence.anchor - tile_begin;
  const Int last = diagonal + sequence.hi + 1, keys = sequence.keys - tile_begin;
  return {static_cast<int>(clamp<Int>(diagonal + sequence.lo, 0, block_n)),
          static_cast<int>(clamp<Int>(last < keys ? last : keys, 0, block_n))};
}

struct Band {
  static constexpr const char* kName = "band";
  static constexpr bool kIsDense = false;

  template <int kBlockN>
  class Tiles {
   public:
    Tiles() = default;
    __device__ Tiles(const Params&, int64_t, int64_t, const TileRange& range) : range_(range) {}

    __device__ int first() { return range_.begin; }
    __device__ int after(int n) { return n + 1; }
    [[nodiscard]] __device__ int end() const { return range_.end; }
    [[nodiscard]] __device__ bool crosses_band(int n) const {
      return n < range_.full_begin || n >= range_.full_end;
    }
    [[nodiscard]] __device__ bool has_bits(int) const { return false; }

   private:
    TileRange range_{};
  };
};

struct Dense {
  static constexpr const char* kName = "dense";
  static constexpr bool kIsDense = true;

  // Walks the classes 32 tiles at a time; all lanes of a warp call it together.
  template <int kBlockN>
  class Tiles {
   public:
    Tiles() = default;
    __device__ Tiles(const Params& p, int64_t b, int64_t m_block, const TileRange& range)
        : range_(range),
          classes_(p.mask.classes + b * p.mask.classes_batch + m_block * p.mask.classes_m_block) {
      read(range.begin);
    }

    __device__ int first() { return seek(range_.begin); }
    __device__ int after(int n) { return seek(n + 1); }
    [[nodiscard]] __device__ int end() const { return range_.end; }
    [[nodiscard]] __device__ bool crosses_band(int n) const {
      return n < range_.full_begin || n >= range_.full_end;
    }
    // Of the tile that first or after returned last.
    [[nodiscard]] __device__ bool has_bits(int n) const {
      return n < range_.end && (partial_ >> (n - window_) & 1) != 0;
    }

   private:
    // The first tile from n on that is not empty.
    __device__ int seek(int n) {
      while (n < range_.end) {
        if (n - window_ >= kWarp) read(n);
        const uint32_t rest = visited_ >> (n - window_);
        if (rest != 0) return n + __ffs(static_cast<int>(rest)) - 1;
        n = window_ + kWarp;
      }
      return range_.end;
    }

    __device__ void read(int n) {
      window_ = n;
      const int mine = n + static_cast<int>(threadIdx.x % kWarp);
      const uint8_t of_mine = mine < range_.end ? classes_[mine] : kEmpty;
      visited_ = __ballot_sync(0xffffffffu, of_mine != kEmpty);
      partial_ = __ballot_sync(0xffffffffu, of_mine == kPartial);
    }

    TileRange range_{};
    const uint8_t* classes_ = nullptr;
    int window_ = 0;
    uint32_t visited_ = 0, partial_ = 0;  // a bit per tile from window_ on
  };
};

}  // namespace mask
}  // namespace pfa::cuda
