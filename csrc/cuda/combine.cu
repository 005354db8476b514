// SPDX-License-Identifier: Apache-2.0
// Merges the pieces of a row: each is weighted by what its maximum is worth beside the largest.
#include "check.h"
#include "combine.h"
#include "launch.h"
#include "layout.cuh"
#include "quant.cuh"
#include "seqlen.cuh"
#include "softmax.cuh"

namespace pfa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes =
    8;  // of a row: a warp merges four, whose statistics wait for memory together
constexpr int kChannels = 4;  // neighbours, of a lane
constexpr int kStep = kLanes * kChannels;
constexpr int kGroups = 4;  // of kStep channels, at a time
constexpr int kLengthsPerStore = 256;

// Neighbouring channels of a row, one lane's.
template <class Unit>
struct alignas(kChannels * sizeof(Unit)) Channels {
  Unit of[kChannels];
};

// Those that the row has. Aligned rows end with a whole group.
template <class Unit, class Convert>
__device__ void store_channels(const Params& p, char* row, int channel, const Convert& convert) {
  Unit* to = reinterpret_cast<Unit*>(row) + channel;
  Channels<Unit> channels;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) channels.of[c] = convert(c);
  if (p.out.vectorised) {
    *reinterpret_cast<Channels<Unit>*>(to) = channels;
    return;
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (channel + c < p.head_dim) to[c] = channels.of[c];
  }
}

__device__ void store_output(const Params& p, char* row, int channel, int head,
                             const float (&values)[kChannels], float share, bool has_key) {
  if (p.dtype_out == DType::kInt8) {
    const bool is_one = has_one_output_scale(p.quant);
    float2 scale = is_one ? output_scale(p.quant, 0) : float2{};
    store_channels<char>(p, row, channel, [&](int c) {
      const int last = min(channel + c, p.head_dim - 1);
      if (!is_one) scale = output_scale(p.quant, int64_t{head} * p.head_dim + last);
      const uint32_t value = quantise_output(values[c] * share, scale.x, scale.y);
      return static_cast<char>(has_key ? value : 0);
    });
  } else if (p.dtype_out == DType::kBFloat16) {
    store_channels<__nv_bfloat16>(p, row, channel,
                                  [&](int c) { return __float2bfloat16_rn(values[c] * share); });
  } else {
    store_channels<__half>(p, row, channel,
                           [&](int c) { return __float2half_rn(values[c] * share); });
  }
}

// What a row of the workspace is in the output, and how many pieces it has.
struct CutRow {
  int64_t b, i;
  int head, pieces;
};

__device__ CutRow cut_row(const Params& p, int64_t row) {
  const TailParams& tail = p.split.tail;
  if (tail.blocks == 0) {
    const int64_t head = row / p.seqlen_q;
    return {head / p.num_heads, row % p.seqlen_q, static_cast<int>(head % p.num_heads),
            p.split.count};
  }
  const uint32_t block_m = tail.block_m, cut = static_cast<uint32_t>(row) / block_m;
  const auto block = decode_block(p, static_cast<uint32_t>(tail.first) + cut);
  return {block.b, row + (int64_t{block.m_block} - cut) * block_m, block.head, tail.pieces(cut)};
}

// What the pieces of a row add up to so far, in a lane's channels.
struct RunningSums {
  float most = -kInfinity, sum = 0.0f;
  float values[kGroups][kChannels] = {};

  [[nodiscard]] __device__ float base() const { return most == -kInfinity ? 0.0f : most; }

  // stats: of the piece. part: its sums from the lane's first channel on, of which `channels`
  // count.
  __device__ void add(const float2& stats, const float* part, int channels, float unit) {
    Channels<float> sums[kGroups] = {};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group * kStep < channels) {
        sums[group] = *reinterpret_cast<const Channels<float>*>(part + group * kStep);
      }
    }
    const float before = most;
    most = fmaxf(before, stats.x);
    const float alpha = ptx::exp2_approx((before - base()) * unit);
    const float weight = ptx::exp2_approx((stats.x - base()) * unit);
    sum = fmaf(sum, alpha, weight * stats.y);
    // A piece without a visible key has weight 0 and may have seen a NaN in V.
    const bool counts = weight != 0.0f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float& value = values[group][c];
        value = fmaf(value, alpha, counts ? sums[group].of[c] * weight : 0.0f);
      }
    }
  }
};

__global__ void combine_kernel(const __grid_constant__ Params p) {
  const int64_t thread = (p.first_block + blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = thread / kLanes;
  if (row >= p.split.rows) return;
  const auto [b, i, head, cut] = cut_row(p, row);
  if (i >= p.seqlen_q) return;
  const bool valid = i < length_of(p.seqused_q, b, p.seqlen_q);
  const int pieces = valid ? cut : 0;
  const float2* stats = p.split.stats + row * p.split.parts;
  const float* parts = p.split.out + row * p.split.parts * p.split.channels;
  const float unit = score_unit(p);
  char* out = layout::Strided::rows(p.out, b, head, i);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int first = lane * kChannels; first < p.head_dim; first += kGroups * kStep) {
    RunningSums sums;
    for (int piece = 0; piece < pieces; ++piece) {
      sums.add(stats[piece], parts + piece * p.split.channels + first, p.head_dim - first, unit);
    }
    const bool has_key = sums.sum != 0.0f;
    const float share = has_key ? 1.0f / sums.sum : 0.0f;
    if (p.lse != nullptr && first == 0) {
      const int64_t at = (b * p.num_heads + head) * p.seqlen_q + i;
      store_lse(p, at, valid, sums.base(), sums.sum, unit);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int channel = first + group * kStep;
      if (channel < p.head_dim) {
        store_output(p, out, channel, head, sums.values[group], share, has_key);
      }
    }
  }
}

struct LengthValues {
  int64_t values[kLengthsPerStore];
};

__global__ void store_lengths_kernel(const __grid_constant__ LengthValues lengths, int count,
                                     int64_t* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = lengths.values[i];
}

}  // namespace

void combine_splits(const Params& params, cudaStream_t stream) {
  Params part = params;
  part.first_block = 0;
  const int64_t blocks = (params.split.rows * kLanes + kThreads - 1) / kThreads;
  while (part.first_block < blocks) {
    const int64_t left = blocks - part.first_block;
    const auto grid = static_cast<unsigned>(left < kMaxGrid ? left : kMaxGrid);
    combine_kernel<<<grid, kThreads, 0, stream>>>(part);
    check(cudaGetLastError(), "launch combine");
    part.first_block += grid;
  }
}

void store_lengths(const int64_t* values, int64_t count, int64_t* device_values,
                   cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kLengthsPerStore) {
    LengthValues part{};
    const int64_t left = count - first;
    const auto here = static_cast<int>(left < kLengthsPerStore ? left : kLengthsPerStore);
    for (int i = 0; i < here; ++i) part.values[i] = values[first + i];
    store_lengths_kernel<<<1, kLengthsPerStore, 0, stream>>>(part, here, device_values + first);
    check(cudaGetLastError(), "launch store_lengths");
  }
}

}  // namespace pfa::cuda
