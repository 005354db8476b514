// SPDX-License-Identifier: Apache-2.0
// How one call is cut into work: what forward.cpp and the kernels of every instruction set share.
//
// Keys and values are packed once per kv head into tiles of block_n keys, in the order the dot
// products read them; then blocks of kBlockM query rows run over the tiles. Both are independent
// tasks, so neither results nor their bits depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace pfa::cpu {

constexpr int kBlockM = 96;    // query rows of a task: whole strips of 6 (AVX) and of 32 (AMX) rows
constexpr int kPanel = 64;     // keys, or output channels, side by side in packed storage
constexpr int kMaxPanels = 4;  // panels of keys in a tile
constexpr int kMaxBlockN = kMaxPanels * kPanel;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a dense mask does to a piece of the score matrix: one strip of rows by kPanel keys.
enum class Visibility : uint8_t { kNone, kSome, kAll };

struct Plan {
  const Problem* problem = nullptr;
  int block_n = kMaxBlockN;                // keys per tile
  int d_panels = 0;                        // ceil(head_dim / kPanel)
  int64_t tile_bytes = 0;                  // one packed tile of keys and values
  int64_t scratch_bytes = 0;               // working memory of one thread
  const Visibility* visibility = nullptr;  // (mask batch, strip, key panel); null: no mask
  int64_t visibility_batch = 0;            // its strides
  int64_t visibility_row = 0;

  // Keys of batch element b that a row in [row_begin, row_end) may see by band and length.
  struct Range {
    int64_t begin = 0, end = 0;
  };
  [[nodiscard]] Range keys_of_rows(int64_t b, int64_t row_begin, int64_t row_end) const {
    const int64_t keys = problem->keys_used(b), anchor = band_anchor(b);
    const int64_t begin = std::max<int64_t>(0, row_begin + anchor + problem->band.lo);
    const int64_t end = std::min(keys, row_end + anchor + problem->band.hi);
    return {std::min(begin, keys), std::max(begin, end)};
  }
  [[nodiscard]] int64_t band_anchor(int64_t b) const {
    return problem->band.bottom_right ? problem->keys_used(b) - problem->rows_used(b) : 0;
  }
};

// One (instruction set, input dtype) implementation.
struct Kernel {
  int strip_rows;                 // query rows that share one pass over a tile; divides kBlockM
  void (*configure)(Plan& plan);  // fills tile_bytes and scratch_bytes
  // Packs keys [tile * block_n, ...) of one kv head into out (tile_bytes, 64-byte aligned).
  void (*pack)(const Plan& plan, int64_t b, int64_t head_k, int64_t tile, std::byte* out);
  // Computes output rows [m_block * kBlockM, ...) of one head. tiles starts with first_tile.
  void (*attend)(const Plan& plan, int64_t b, int64_t head, int64_t m_block, const std::byte* tiles,
                 int64_t first_tile, std::byte* scratch);
};

}  // namespace pfa::cpu
