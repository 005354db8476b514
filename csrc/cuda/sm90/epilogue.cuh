// SPDX-License-Identifier: Apache-2.0
// From unnormalised sums in registers to the output, warp by warp: 16 bits, or int8 with a scale
// and an offset for each channel. Every row of the block that the output has is written; rows
// without a key, or beyond the valid length, are zeros.
#pragma once

#include "consumer.cuh"

namespace pfa::cuda::sm90 {

template <class T, class Consumer>
class Epilogue {
  using Element = Half<typename T::Element>;
  static constexpr bool kIsInteger = quant::Of<typename T::Element>::kIsInteger;

 public:
  // second: only rows whose statistics are numbers are written.
  __device__ static void store(const Params& p, const Work<T>& work, Consumer& consumer,
                               bool second) {
    const Epilogue epilogue(p, work);
    consumer.softmax.finalise();
    if (work.split_row != Work<T>::kNone) {
      for_rows([&](int r) { epilogue.store_split(consumer, r, second); });
    } else if (p.out.vectorised && p.head_dim == T::kHeadDim) {
      epilogue.template store_rows<true>(consumer, second);
    } else {
      epilogue.template store_rows<false>(consumer, second);
    }
  }

 private:
  __device__ Epilogue(const Params& p, const Work<T>& work)
      : p_(p),
        work_(work),
        lane_(static_cast<int>(recomputed(threadIdx.x) % kWarp)),
        row_(first_row() + accumulator_row(lane_, 0)) {}

  template <class Visit>
  __device__ static void for_rows(const Visit& visit) {
#pragma unroll
    for (int r = 0; r < 2; ++r) visit(r);
  }

  // kIsWhole: nothing is to be asked for a channel or a word.
  template <bool kIsWhole>
  __device__ void store_rows(const Consumer& consumer, bool second) const {
    char* out = p_.out.data + work_.b * p_.out.batch + work_.head * p_.out.head +
                (work_.sequence.row_begin + row_) * p_.out.row;
    for_rows([&](int r) {
      if (p_.dtype_out != DType::kInt8) {
        store_row<kIsWhole>(consumer, r, second, out);
      } else if (kIsWhole && has_one_output_scale(p_.quant)) {
        store_int8_row<kIsWhole, false>(consumer, r, second, out);
      } else {
        store_int8_row<kIsWhole, true>(consumer, r, second, out);
      }
      out += 8 * p_.out.row;
    });
  }

  [[nodiscard]] __device__ int row_of(int r) const { return row_ + 8 * r; }

  // What one unit of the sums is worth.
  [[nodiscard]] __device__ float unit() const {
    return kIsInteger ? read_scale(p_.quant.descale_o) : 1.0f;
  }
  // Of a row without a key, none.
  [[nodiscard]] __device__ uint32_t kept_bits(int r, float sum) const {
    return row_of(r) < work_.sequence.rows && sum != 0.0f ? ~0u : 0u;
  }
  [[nodiscard]] __device__ bool is_written(int r, float sum, bool second) const {
    return work_.sequence.row_begin + row_of(r) < static_cast<int>(p_.seqlen_q) &&
           !(second && sum != sum);
  }

  // Of what two lanes hold of two neighbouring units, even lanes get all of the first and odd lanes
  // all of the second, in ascending order.
  __device__ static uint2 swap(uint32_t first, uint32_t second, bool is_odd, int distance) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, is_odd ? first : second, distance);
    return is_odd ? make_uint2(other, second) : make_uint2(first, other);
  }

  __device__ void store_lse(const Consumer& consumer, int r, bool writes) const {
    if (p_.lse == nullptr || !writes || lane_ % 4 != 0 || first_channel<T>() != 0) return;
    const int64_t row = work_.sequence.row_begin + row_of(r);
    pfa::cuda::store_lse(p_, (int64_t{work_.b} * p_.num_heads + work_.head) * p_.seqlen_q + row,
                         row_of(r) < work_.sequence.rows, consumer.softmax.row_max[0][r],
                         consumer.softmax.row_sum[0][r], score_unit(p_));
  }

  // A lane holds 4 bytes of each 8 channels. It swaps with its neighbour: of 16 channels, even
  // lanes then have 8 bytes of the first half and odd ones of the second, a sector for each row.
  template <bool kIsWhole>
  __device__ void store_row(const Consumer& consumer, int r, bool second, char* out) const {
    const float sum = consumer.softmax.row_sum[0][r];
    const bool writes = is_written(r, sum, second);
    const uint32_t kept = kept_bits(r, sum);
    const float factor = unit() / sum;
    const bool is_odd = lane_ % 2 != 0;
    const int channel = first_channel<T>() + (is_odd ? 8 : 0) + lane_ / 2 % 2 * 4;
    store_lse(consumer, r, writes);
    out += channel * Element::kBytes;
#pragma unroll
    for (int n = 0; n < T::kTilesO; n += 2) {
      uint32_t pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* sums = &consumer.acc_o[0][n + i][2 * r];
        pair[i] = Element::pack(get(sums[0]) * factor, get(sums[1]) * factor) & kept;
      }
      const uint2 words = swap(pair[0], pair[1], is_odd, 1);
      if (writes && (kIsWhole || 8 * n + channel < p_.head_dim)) {
        store_words<uint16_t, kIsWhole>(out + 8 * n * Element::kBytes, words);
      }
    }
  }

  // A lane holds 2 bytes of each 8 channels: of 32 channels it gets 8 bytes in two swaps.
  template <bool kIsWhole, bool kPerChannel>
  __device__ void store_int8_row(const Consumer& consumer, int r, bool second, char* out) const {
    const float sum = consumer.softmax.row_sum[0][r];
    const bool writes = is_written(r, sum, second);
    const uint32_t kept = kept_bits(r, sum);
    const float factor = unit() / sum;
    const bool is_odd = lane_ % 2 != 0, is_high = lane_ / 2 % 2 != 0;
    const int channel = first_channel<T>() + (is_high ? 16 : 0) + (is_odd ? 8 : 0);
    store_lse(consumer, r, writes);
    out += channel;
    float2 scales{};
    if constexpr (!kPerChannel) scales = output_scale(p_.quant, 0);
#pragma unroll
    for (int n = 0; n < T::kTilesO; n += 4) {
      if constexpr (kPerChannel) scales = scale_of_lane(first_channel<T>() + 8 * n);
      const auto quantised = [&](int i, int c) {
        const int lane = 8 * i + accumulator_column(lane_, c);
        const float2 scale = kPerChannel ? scale_from(lane, scales) : scales;
        const float out = get(consumer.acc_o[0][n + i][2 * r + c]) * factor;
        return quantise_output(out, scale.x, scale.y);
      };
      uint32_t pairs[2];  // of channels: tiles n and n + 1, then n + 2 and n + 3
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t low = __byte_perm(quantised(2 * i, 0), quantised(2 * i, 1), 0x0040);
        const uint32_t high = __byte_perm(quantised(2 * i + 1, 0), quantised(2 * i + 1, 1), 0x0040);
        pairs[i] = __byte_perm(low, high, 0x5410) & kept;
      }
      // Lanes 0 1 2 3 hold channels 0 2 4 6 and the next of tiles a b c d. First between lanes 2
      // apart: 0 and 1 keep tiles a b, 2 and 3 get c d.
      const uint2 tiles = swap(pairs[0], pairs[1], is_high, 2);
      const uint32_t first = __byte_perm(tiles.x, tiles.y, 0x5410);
      const uint32_t other = __byte_perm(tiles.x, tiles.y, 0x7632);
      const uint2 mine = swap(first, other, is_odd, 1);
      // Channels 0 1 4 5 from the even lane, 2 3 6 7 from the odd one.
      const uint2 words =
          make_uint2(__byte_perm(mine.x, mine.y, 0x5410), __byte_perm(mine.x, mine.y, 0x7632));
      if (writes && (kIsWhole || 8 * n + channel < p_.head_dim)) {
        store_words<uint8_t, kIsWhole>(out + 8 * n, words);
      }
    }
  }

  // Scale and offset of the channel that is the lane's of the 32 from this one on.
  __device__ float2 scale_of_lane(int first) const {
    const int channel = first + lane_;
    if (channel >= p_.head_dim) return make_float2(0.0f, 0.0f);
    return output_scale(p_.quant, static_cast<int64_t>(work_.head) * p_.head_dim + channel);
  }
  __device__ static float2 scale_from(int lane, const float2& scales) {
    return make_float2(__shfl_sync(0xffffffffu, scales.x, lane),
                       __shfl_sync(0xffffffffu, scales.y, lane));
  }

  // head_dim is a multiple of 8, but the output may start anywhere.
  template <class Unit, bool kIsWhole>
  __device__ void store_words(char* to, const uint2& words) const {
    if (kIsWhole || p_.out.vectorised) {
      *reinterpret_cast<uint2*>(to) = words;
      return;
    }
    constexpr int kUnits = 4 / int{sizeof(Unit)};  // of a word
#pragma unroll
    for (int i = 0; i < 2 * kUnits; ++i) {
      const uint32_t word = i < kUnits ? words.x : words.y;
      reinterpret_cast<Unit*>(to)[i] = static_cast<Unit>(word >> i % kUnits * 8 * sizeof(Unit));
    }
  }

  // Rows beyond the valid length are not stored: combine.cu does not read them.
  __device__ void store_split(const Consumer& consumer, int r, bool second) const {
    const float sum = consumer.softmax.row_sum[0][r];
    if (row_of(r) >= work_.sequence.rows || (second && sum != sum)) return;
    const int64_t at = (work_.split_row + row_of(r)) * p_.split.parts + work_.split;
    const int channel = first_channel<T>();
    if (lane_ % 4 == 0 && channel == 0) {
      p_.split.stats[at] = make_float2(consumer.softmax.row_max[0][r], sum);
    }
    float* out = p_.split.out + at * T::kHeadDim + channel + accumulator_column(lane_, 0);
    const float worth = unit();
#pragma unroll
    for (int n = 0; n < T::kTilesO; ++n) {
      const auto* pair = &consumer.acc_o[0][n][2 * r];
      *reinterpret_cast<float2*>(out + 8 * n) =
          make_float2(get(pair[0]) * worth, get(pair[1]) * worth);
    }
  }

  const Params& p_;
  const Work<T>& work_;
  int lane_;
  int row_;  // the lane's first of the block
};

}  // namespace pfa::cuda::sm90
