// SPDX-License-Identifier: Apache-2.0
// From unnormalised sums in registers to the output, warp by warp: 16 rows are staged in shared
// memory and written in chunks of 16 bytes. Every row of the block that the output has is written;
// rows without a key, or beyond the valid length, are zeros.
#pragma once

#include "consumer.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class Epilogue {
  using Element = typename T::Element;
  static constexpr int kRowChunks = T::kBoxes * T::kBoxChunks;

 public:
  // second: only rows whose statistics are numbers are written.
  __device__ static void store(const Params& p, const Work<T>& work, Consumer<T>& consumer,
                               const Shared<T>& shared, char* memory, bool has_keys, bool second) {
    const Epilogue epilogue(p, work, consumer.row(), memory);
    consumer.softmax.finalise();
    if (p.split.count > 1) {
      epilogue.store_split(consumer, second);
    } else {
      if (!T::kStagesApart && has_keys) {  // all warps have read the queries
        ptx::barrier_sync(kOneConsumer + consumer.warpgroup(), kWarpgroup);
      }
      if (has_keys) epilogue.stage(consumer);
      __syncwarp();
      epilogue.copy(consumer, has_keys, second);
    }
    if (!T::kStagesApart && has_keys) {
      ptx::fence_async_proxy();
      consumer.release(shared.empty_q());
    } else {
      __syncwarp();  // the next rows may be staged
    }
  }

 private:
  __device__ Epilogue(const Params& p, const Work<T>& work, int row, char* memory)
      : p_(p),
        work_(work),
        row_(row),
        lane_(static_cast<int>(recomputed(threadIdx.x) % kWarp)),
        memory_(memory + T::kOut) {}

  // Of a chunk of a row of the block. Boxes as TMA lays them out: a warp's part of them is its own.
  [[nodiscard]] __device__ char* staged(int row, int chunk) const {
    return memory_ + chunk / T::kBoxChunks * T::kBoxQ +
           chunk_offset<T::kBoxChunks>(row, chunk % T::kBoxChunks);
  }

  __device__ void stage(const Consumer<T>& consumer) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + accumulator_row(lane_, 2 * r);
      const float sum = consumer.softmax.row_sum[0][r];
      const bool has_key = row < work_.sequence.rows && sum != 0.0f;
      const float factor = 1.0f / sum;
#pragma unroll
      for (int n = 0; n < T::kTilesO; ++n) {
        const float* pair = &consumer.acc_o[0][n][2 * r];
        const uint32_t out = Element::pack(pair[0] * factor, pair[1] * factor);
        auto* to = reinterpret_cast<uint32_t*>(staged(row, n));
        to[lane_ % 4] = has_key ? out : 0;
      }
    }
  }

  __device__ void copy(const Consumer<T>& consumer, bool has_keys, bool second) const {
    const float (&sums)[2] = consumer.softmax.row_sum[0];
    const uint32_t numbers[2] = {__ballot_sync(0xffffffffu, sums[0] == sums[0]),
                                 __ballot_sync(0xffffffffu, sums[1] == sums[1])};
    const int64_t first_row = work_.sequence.row_begin + row_;
    char* out = p_.out.data + work_.block.b * p_.out.batch + work_.block.head * p_.out.head +
                first_row * p_.out.row;
    const int rows = static_cast<int>(clamp64(p_.seqlen_q - first_row, 0, 16));
    const int row_bytes = p_.head_dim * Element::kBytes;
#pragma unroll 4
    for (int index = lane_; index < 16 * kRowChunks; index += kWarp) {
      const int row = index / kRowChunks, byte = index % kRowChunks * kChunkBytes;
      const bool is_number = (numbers[row / 8] >> (row % 8 * 4) & 1) != 0;
      if (row >= rows || byte >= row_bytes || (second && !is_number)) continue;
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (has_keys) chunk = *reinterpret_cast<const uint4*>(staged(row_ + row, index % kRowChunks));
      store_chunk(out + row * p_.out.row + byte, chunk);
    }
  }

  // head_dim is a multiple of a chunk, but the output may start anywhere.
  __device__ void store_chunk(char* to, const uint4& chunk) const {
    if (p_.out.vectorised) {
      *reinterpret_cast<uint4*>(to) = chunk;
      return;
    }
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    }
  }

  // Rows beyond the valid length are not stored: combine.cu does not read them.
  __device__ void store_split(const Consumer<T>& consumer, bool second) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + accumulator_row(lane_, 2 * r);
      const float sum = consumer.softmax.row_sum[0][r];
      if (row >= work_.sequence.rows || (second && sum != sum)) continue;
      const int64_t at = ((work_.block.b * p_.num_heads + work_.block.head) * p_.seqlen_q +
                          work_.sequence.row_begin + row) *
                             p_.split.count +
                         work_.block.split;
      if (lane_ % 4 == 0) p_.split.stats[at] = make_float2(consumer.softmax.row_max[0][r], sum);
      float* out = p_.split.out + at * T::kHeadDim + accumulator_column(lane_, 0);
#pragma unroll
      for (int n = 0; n < T::kTilesO; ++n) {
        const float* pair = &consumer.acc_o[0][n][2 * r];
        *reinterpret_cast<float2*>(out + 8 * n) = make_float2(pair[0], pair[1]);
      }
    }
  }

  const Params& p_;
  const Work<T>& work_;
  int row_;  // the warp's first in the block
  int lane_;
  char* memory_;
};

}  // namespace pfa::cuda::sm90
