// SPDX-License-Identifier: Apache-2.0
// From unnormalised sums in registers to the output: rows are staged in shared memory, where q, k
// and v were, and written in chunks of 16 bytes. Every row of the block that the output has is
// written; rows without a key, or beyond the valid length, are zeros.
#pragma once

#include "mainloop.cuh"

namespace pfa::cuda::sm80 {

template <class T>
class Epilogue {
  using Element = typename T::Element;
  static constexpr bool kIsInteger = T::Quant::kIsInteger;
  // Neighbouring channels that a thread holds of a row: two of an accumulator, or the four that two
  // accumulators of int8 interleave (Mainloop::multiply_integers).
  static constexpr int kRun = kIsInteger ? 4 : 2;
  static constexpr int kRuns = T::kTilesO * 2 / kRun;

 public:
  // second: only rows whose statistics are numbers are written.
  __device__ static void store(const Params& p, const BlockIndex& block, const Sequence& sequence,
                               Mainloop<T>& mainloop, char* shared, bool second) {
    const Epilogue epilogue(p, block, sequence, shared);
    float (&sums)[T::kMmaM][2] = mainloop.softmax.row_sum;
    mainloop.softmax.finalise();
    __syncthreads();  // nobody reads shared memory any more
    epilogue.exchange(sums);
    if (p.split.count > 1) {
      epilogue.store_split(mainloop, second);
      return;
    }
    if (p.lse != nullptr) {
      epilogue.keep_maxima(mainloop);
      __syncthreads();
      epilogue.store_lse(second);
    }
    if (p.dtype_out == DType::kInt8) {
      epilogue.load_output_scales();
      __syncthreads();
      epilogue.template stage<1>(mainloop);
      __syncthreads();
      epilogue.template copy<1>(second);
    } else {
      epilogue.template stage<2>(mainloop);
      __syncthreads();
      epilogue.template copy<2>(second);
    }
  }

 private:
  __device__ Epilogue(const Params& p, const BlockIndex& block, const Sequence& sequence,
                      char* shared)
      : p_(p),
        block_(block),
        sequence_(sequence),
        shared_(shared),
        thread_(static_cast<int>(recomputed(threadIdx.x))) {}

  [[nodiscard]] __device__ int lane() const { return thread_ % kWarp; }
  [[nodiscard]] __device__ int warp_m() const { return thread_ / kWarp % T::kWarpsM; }
  [[nodiscard]] __device__ int warp_n() const { return thread_ / (kWarp * T::kWarpsM); }
  [[nodiscard]] __device__ int row_of(int m, int r) const {
    return (warp_m() * T::kMmaM + m) * 16 + accumulator_row(lane(), 2 * r);
  }
  [[nodiscard]] __device__ int channel_of(int run) const {
    const int column = run * (kRun * 4) + lane() % 4 * kRun;  // among the warp's own
    return column / 16 * (16 * T::kWarpsN) + warp_n() * 16 + column % 16;
  }
  // Element i of a run of row r.
  __device__ static float value_of(const Mainloop<T>& mainloop, int m, int r, int run, int i) {
    if constexpr (kIsInteger) return mainloop.acc_o[m][2 * run + i % 2][2 * r + i / 2];
    return mainloop.acc_o[m][run][2 * r + i];
  }

  // Leaves each row's sum in shared memory; warps that share rows add theirs up.
  __device__ void exchange(float (&sums)[T::kMmaM][2]) const {
    auto* stats = reinterpret_cast<float*>(shared_ + T::kStats);
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (lane() % 4 == 0) stats[warp_n() * T::kBlockM + row_of(m, r)] = sums[m][r];
      }
    }
    if constexpr (T::kWarpsN == 1) return;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // in the same order in both warps: the same bits
        sums[m][r] = stats[row_of(m, r)] + stats[T::kBlockM + row_of(m, r)];
      }
    }
  }

  // As exchange left it.
  [[nodiscard]] __device__ float sum_of(int row) const {
    const auto* stats = reinterpret_cast<const float*>(shared_ + T::kStats);
    return T::kWarpsN == 1 ? stats[row] : stats[row] + stats[T::kBlockM + row];
  }
  [[nodiscard]] __device__ bool is_number(int row) const {
    const float sum = sum_of(row);
    return sum == sum;
  }

  [[nodiscard]] __device__ float row_max(const Mainloop<T>& mainloop, int m, int r) const {
    return mainloop.softmax.row_max[m][r] - ScoreStep<T>::offset(p_);
  }

  // Beyond staged rows and scales: where P was, or V ended.
  [[nodiscard]] __device__ float* maxima() const {
    constexpr int kBytes = T::kBlockM * int{sizeof(float)};
    constexpr int kAt = T::kWarpsN > 1 ? T::kP : T::kBias - kBytes;
    static_assert(T::kBlockM * T::kHeadDim * 2 <= kAt && kAt + kBytes <= T::kStats);
    return reinterpret_cast<float*>(shared_ + kAt);
  }

  __device__ void keep_maxima(const Mainloop<T>& mainloop) const {
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (lane() % 4 == 0 && warp_n() == 0) maxima()[row_of(m, r)] = row_max(mainloop, m, r);
      }
    }
  }

  // From what lies in shared memory: the accumulators leave no registers for it.
  __device__ void store_lse(bool second) const {
    static_assert(T::kThreads >= T::kBlockM);
    const int row = thread_;
    const int64_t at = sequence_.row_begin + row;
    if (row >= T::kBlockM || at >= p_.seqlen_q) return;
    const float sum = sum_of(row);
    if (second && sum != sum) return;
    const int64_t first = (block_.b * p_.num_heads + block_.head) * p_.seqlen_q;
    pfa::cuda::store_lse(p_, first + at, row < sequence_.rows, maxima()[row], sum, score_unit(p_));
  }

  template <int kOutBytes>
  __device__ void stage(const Mainloop<T>& mainloop) const {
    const float unit = kIsInteger ? read_scale(p_.quant.descale_o) : 1.0f;
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = mainloop.softmax.row_sum[m][r];
        const bool has_key = row_of(m, r) < sequence_.rows && sum != 0.0f;
        const float factor = unit / sum;
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          float values[kRun];
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            values[i] = has_key ? value_of(mainloop, m, r, run, i) * factor : 0.0f;
          }
          stage_run<kOutBytes>(row_of(m, r), channel_of(run), values, has_key);
        }
      }
    }
  }

  template <int kOutBytes>
  __device__ void stage_run(int row, int channel, const float (&values)[kRun], bool has_key) const {
    constexpr int kChunks = T::kHeadDim * kOutBytes / kChunkBytes;
    const int byte = channel * kOutBytes;
    char* to = shared_ + chunk_offset<kChunks>(row, byte / kChunkBytes) + byte % kChunkBytes;
    if constexpr (kOutBytes == 2) {
      using Out = Half<Element>;
#pragma unroll
      for (int i = 0; i < kRun; i += 2) {
        reinterpret_cast<uint32_t*>(to)[i / 2] = Out::pack(values[i], values[i + 1]);
      }
    } else {
      const float2* scales = output_scales() + channel;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const uint32_t out = quantise_output(values[i], scales[i].x, scales[i].y);
        to[i] = static_cast<char>(has_key ? out : 0);
      }
    }
  }

  // Scale and offset of the head's channels, behind the staged rows.
  [[nodiscard]] __device__ float2* output_scales() const {
    static_assert(T::kBlockM * T::kHeadDim + T::kHeadDim * int{sizeof(float2)} <= T::kBias);
    return reinterpret_cast<float2*>(shared_ + T::kBlockM * T::kHeadDim);
  }

  __device__ void load_output_scales() const {
    const int64_t first = static_cast<int64_t>(block_.head) * p_.head_dim;
    for (int channel = thread_; channel < T::kHeadDim; channel += T::kThreads) {
      const bool exists = channel < p_.head_dim;
      output_scales()[channel] =
          exists ? output_scale(p_.quant, first + channel) : make_float2(0.0f, 0.0f);
    }
  }

  template <int kOutBytes>
  __device__ void copy(bool second) const {
    constexpr int kChunks = T::kHeadDim * kOutBytes / kChunkBytes;
    char* out = T::Layout::rows(p_.out, block_.b, block_.head, sequence_.row_begin);
    const int rows =
        static_cast<int>(clamp<int64_t>(p_.seqlen_q - sequence_.row_begin, 0, T::kBlockM));
    const int row_bytes = p_.head_dim * kOutBytes;
#pragma unroll 1
    for (int index = thread_; index < rows * kChunks; index += T::kThreads) {
      const int row = index / kChunks, byte = index % kChunks * kChunkBytes;
      if (byte >= row_bytes || (second && !is_number(row))) continue;
      const char* from = shared_ + chunk_offset<kChunks>(row, index % kChunks);
      char* to = out + row * p_.out.row + byte;
      if (p_.out.vectorised) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        continue;
      }
#pragma unroll 1
      for (int i = 0; i < min(kChunkBytes, row_bytes - byte); i += kOutBytes) {
        if constexpr (kOutBytes == 2) {
          *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
        } else {
          to[i] = from[i];
        }
      }
    }
  }

  // Rows beyond the valid length are not stored: combine.cu does not read them.
  __device__ void store_split(const Mainloop<T>& mainloop, bool second) const {
    const float unit = kIsInteger ? read_scale(p_.quant.descale_o) : 1.0f;
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_of(m, r);
        const float sum = mainloop.softmax.row_sum[m][r];
        if (row >= sequence_.rows || (second && sum != sum)) continue;
        const int64_t at =
            ((block_.b * p_.num_heads + block_.head) * p_.seqlen_q + sequence_.row_begin + row) *
                p_.split.count +
            block_.split;
        if (lane() % 4 == 0) p_.split.stats[at] = make_float2(row_max(mainloop, m, r), sum);
        float* out = p_.split.out + at * T::kHeadDim;
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
#pragma unroll
          for (int i = 0; i < kRun; i += 2) {
            *reinterpret_cast<float2*>(out + channel_of(run) + i) =
                make_float2(value_of(mainloop, m, r, run, i) * unit,
                            value_of(mainloop, m, r, run, i + 1) * unit);
          }
        }
      }
    }
  }

  const Params& p_;
  const BlockIndex& block_;
  const Sequence& sequence_;
  char* shared_;
  int thread_;
};

}  // namespace pfa::cuda::sm80
