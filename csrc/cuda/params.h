// SPDX-License-Identifier: Apache-2.0
// What the kernels get: a Problem with everything that depends on the tile plan decided. Plain data
// of fixed size, passed by value. All strides count bytes and may be 0.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "../problem.h"
#include "fragment.cuh"

namespace pfa::cuda {

// Lengths of up to this many batch elements travel in the launch itself; more are first written to
// device memory (combine.h: store_lengths).
constexpr int kInlineLengths = 64;

// (batch, head, row, head_dim), head_dim contiguous.
struct StridedTensor {
  char* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  bool vectorised = false;  // every row starts at a multiple of 16 bytes and is as long
};

// Valid lengths of the batch elements, in the first form that is given.
struct LengthsParams {
  const void* data = nullptr;  // (batch) integers on the device, clamped to the sequence when read
  int64_t stride = 0;
  bool is_int64 = false;
  bool is_inline = false;
  int64_t values[kInlineLengths] = {};
};

// What mask_pack.cu leaves of a dense mask. Rows are padded to whole blocks, keys to whole tiles.
struct PackedMaskParams {
  const uint32_t* bits = nullptr;    // (mask batch, row / 16, key / 64, lane): see fragment.cuh
  const uint8_t* classes = nullptr;  // (mask batch, m_block, n_tile): a TileClass
  int64_t bits_batch = 0;            // strides in elements
  int64_t bits_row_group = 0;
  int64_t classes_batch = 0;
  int64_t classes_m_block = 0;
};

struct BiasParams {
  const char* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  int64_t repeated_row = 0;  // row is 0, yet a block's rows lie that far apart, all of them alike
  bool vectorised = false;
};

// The last blocks of work, when they would leave some of the GPU idle: their tiles of keys,
// numbered from the first block's to the last one's, are handed out in equal shares, each to one
// worker.
struct TailParams {
  int64_t first = 0;    // block of work that is cut
  uint32_t blocks = 0;  // from there on, all that are left; 0: none is cut
  uint32_t tiles = 0;   // of each of them
  uint32_t share = 0;   // tiles of a worker, fewer than those of a block
  int block_m = 0;

  // The worker that has the first tile of a block of the tail. Its other pieces are those of the
  // workers that follow.
  [[nodiscard]] PFA_HOST_DEVICE uint32_t first_worker(uint32_t block) const {
    return block * tiles / share;
  }
  [[nodiscard]] PFA_HOST_DEVICE int pieces(uint32_t block) const {
    return static_cast<int>((block * tiles + tiles - 1) / share - first_worker(block)) + 1;
  }
};

// A block writes its unnormalised output here when its keys are cut. Rows are those of (batch,
// num_heads, seqlen_q), or of the blocks of the tail.
struct SplitParams {
  int count = 1;     // splits of every block
  int parts = 1;     // that a row has room for: count, or the most pieces of a block
  int channels = 0;  // of a row of out: the kernel's head_dim, whole vectors
  int64_t rows = 0;
  float* out = nullptr;     // (row, part, channels)
  float2* stats = nullptr;  // (row, part): maximum of the scores, and sum
  TailParams tail;          // where count is 1
};

struct Params {
  StridedTensor q, k, v;  // the data of k and v is never written
  StridedTensor out;
  float* lse = nullptr;  // (batch, num_heads, seqlen_q), or null: not wanted
  DType dtype_out = DType::kFloat16;
  int64_t batch = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int num_heads = 0;
  int heads_per_group = 0;
  int head_dim = 0;
  float score_unit = 0.0f;  // see quant.cuh; where no scale lies in device memory
  float softmax_scale = 1.0f;
  Band band;
  PackedMaskParams mask;
  BiasParams bias;
  Quant quant;
  LengthsParams seqused_q, seqused_k;
  SplitParams split;
  int64_t num_m_blocks = 0;
  int64_t first_block = 0;       // added to blockIdx.x: a grid has at most 2^31 - 1 blocks
  bool longest_first = false;    // the last rows see most keys
  bool batch_innermost = false;  // neighbours share the bias of a head instead of its keys
};

}  // namespace pfa::cuda
