// SPDX-License-Identifier: Apache-2.0
// From unnormalised sums in registers to the output, warp by warp. Every row of the block that the
// output has is written; rows without a key, or beyond the valid length, are zeros.
#pragma once

#include "consumer.cuh"

namespace pfa::cuda::sm90 {

template <class T, class Consumer>
class Epilogue {
  using Element = typename T::Element;

 public:
  // second: only rows whose statistics are numbers are written.
  __device__ static void store(const Params& p, const Work<T>& work, Consumer& consumer,
                               bool second) {
    const Epilogue epilogue(p, work);
    consumer.softmax.finalise();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (p.split.count > 1) {
        epilogue.store_split(consumer, r, second);
      } else {
        epilogue.store_row(consumer, r, second);
      }
    }
  }

 private:
  __device__ Epilogue(const Params& p, const Work<T>& work)
      : p_(p), work_(work), lane_(static_cast<int>(recomputed(threadIdx.x) % kWarp)) {}

  [[nodiscard]] __device__ int row_of(int r) const {
    return first_row() + accumulator_row(lane_, 2 * r);
  }

  // A lane holds 4 bytes of each 8 channels. It swaps with its neighbour: of 16 channels, even
  // lanes then have 8 bytes of the first half and odd ones of the second, a sector for each row.
  __device__ void store_row(const Consumer& consumer, int r, bool second) const {
    const float sum = consumer.softmax.row_sum[0][r];
    const bool has_key = row_of(r) < work_.sequence.rows && sum != 0.0f;
    const float factor = 1.0f / sum;
    const int64_t row = work_.sequence.row_begin + row_of(r);
    const bool is_written = row < p_.seqlen_q && !(second && sum != sum);
    const bool is_odd = lane_ % 2 != 0;
    const int channel = first_channel<T>() + (is_odd ? 8 : 0) + lane_ / 2 % 2 * 4;
    if (p_.lse != nullptr && is_written && lane_ % 4 == 0 && first_channel<T>() == 0) {
      store_lse(p_, (int64_t{work_.b} * p_.num_heads + work_.head) * p_.seqlen_q + row,
                row_of(r) < work_.sequence.rows, consumer.softmax.row_max[0][r], sum,
                p_.score_unit);
    }
    char* out = p_.out.data + work_.b * p_.out.batch + work_.head * p_.out.head + row * p_.out.row +
                channel * Element::kBytes;
#pragma unroll
    for (int n = 0; n < T::kTilesO; n += 2) {
      uint32_t pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* sums = &consumer.acc_o[0][n + i][2 * r];
        pair[i] = has_key ? Element::pack(sums[0] * factor, sums[1] * factor) : 0;
      }
      const uint32_t other = __shfl_xor_sync(0xffffffffu, is_odd ? pair[0] : pair[1], 1);
      const uint2 words = is_odd ? make_uint2(other, pair[1]) : make_uint2(pair[0], other);
      if (is_written && 8 * n + channel < p_.head_dim) {
        store_words(out + 8 * n * Element::kBytes, words);
      }
    }
  }

  // head_dim is a multiple of 8, but the output may start anywhere.
  __device__ void store_words(char* to, const uint2& words) const {
    if (p_.out.vectorised) {
      *reinterpret_cast<uint2*>(to) = words;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i < 2 ? words.x : words.y;
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(word >> i % 2 * 16);
    }
  }

  // Rows beyond the valid length are not stored: combine.cu does not read them.
  __device__ void store_split(const Consumer& consumer, int r, bool second) const {
    const float sum = consumer.softmax.row_sum[0][r];
    if (row_of(r) >= work_.sequence.rows || (second && sum != sum)) return;
    const int64_t at = ((work_.b * p_.num_heads + work_.head) * p_.seqlen_q +
                        work_.sequence.row_begin + row_of(r)) *
                           p_.split.count +
                       work_.split;
    const int channel = first_channel<T>();
    if (lane_ % 4 == 0 && channel == 0) {
      p_.split.stats[at] = make_float2(consumer.softmax.row_max[0][r], sum);
    }
    float* out = p_.split.out + at * T::kHeadDim + channel + accumulator_column(lane_, 0);
#pragma unroll
    for (int n = 0; n < T::kTilesO; ++n) {
      const float* pair = &consumer.acc_o[0][n][2 * r];
      *reinterpret_cast<float2*>(out + 8 * n) = make_float2(pair[0], pair[1]);
    }
  }

  const Params& p_;
  const Work<T>& work_;
  int lane_;
};

}  // namespace pfa::cuda::sm90
