// SPDX-License-Identifier: Apache-2.0
// Merges the splits of a row: each is weighted by what its maximum is worth beside the largest.
#include "check.h"
#include "combine.h"
#include "launch.h"
#include "layout.cuh"
#include "quant.cuh"
#include "seqlen.cuh"
#include "softmax.cuh"

namespace pfa::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kLengthsPerStore = 256;

__device__ float warp_max(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

__device__ float warp_sum(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

__device__ void store_output(const Params& p, char* row, int channel, int head, float value,
                             bool has_key) {
  if (p.dtype_out == DType::kInt8) {
    const float2 scale = output_scale(p.quant, static_cast<int64_t>(head) * p.head_dim + channel);
    row[channel] = static_cast<char>(has_key ? quantise_output(value, scale.x, scale.y) : 0);
  } else if (p.dtype_out == DType::kBFloat16) {
    reinterpret_cast<__nv_bfloat16*>(row)[channel] = __float2bfloat16_rn(value);
  } else {
    reinterpret_cast<__half*>(row)[channel] = __float2half_rn(value);
  }
}

// A warp for each row. Lane i holds the statistics of split i.
__global__ void combine_kernel(const __grid_constant__ Params p) {
  static_assert(kMaxSplits <= kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t index = p.first_block + blockIdx.x;
  const int64_t row = index * kWarpsPerBlock + threadIdx.x / kWarp;  // of (batch, head, seqlen_q)
  if (row >= p.batch * p.num_heads * p.seqlen_q) return;
  const int64_t i = row % p.seqlen_q, b = row / p.seqlen_q / p.num_heads;
  const int head = static_cast<int>(row / p.seqlen_q % p.num_heads);
  const bool valid = i < length_of(p.seqused_q, b, p.seqlen_q);
  float2 stats = make_float2(-kInfinity, 0.0f);
  if (valid && lane < p.split.count) stats = p.split.stats[row * p.split.count + lane];
  const float most = warp_max(stats.x);
  const float base = most == -kInfinity ? 0.0f : most;
  const float weight = ptx::exp2_approx((stats.x - base) * score_unit(p));
  const float sum = warp_sum(weight * stats.y);
  const bool has_key = valid && sum != 0.0f;
  const float share = has_key ? weight / sum : 0.0f;
  if (p.lse != nullptr && lane == 0) store_lse(p, row, valid, base, sum, score_unit(p));
  char* out = layout::Strided::rows(p.out, b, head, i);
  const float* parts = p.split.out + row * p.split.count * p.split.channels;
  for (int first = 0; first < p.head_dim; first += kWarp) {
    const int channel = first + lane;
    float value = 0.0f;
    for (int split = 0; split < p.split.count; ++split) {
      const float factor = __shfl_sync(0xffffffffu, share, split);
      // A split without a visible key has weight 0 and may have seen a NaN in V.
      if (factor != 0.0f && channel < p.head_dim) {
        value =
            fmaf(parts[static_cast<int64_t>(split) * p.split.channels + channel], factor, value);
      }
    }
    if (channel < p.head_dim) store_output(p, out, channel, head, value, has_key);
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
  const int64_t rows = params.batch * params.num_heads * params.seqlen_q;
  const int64_t blocks = (rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  while (part.first_block < blocks) {
    const int64_t left = blocks - part.first_block;
    const auto grid = static_cast<unsigned>(left < kMaxGrid ? left : kMaxGrid);
    combine_kernel<<<grid, kWarpsPerBlock * kWarp, 0, stream>>>(part);
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
