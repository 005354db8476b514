// SPDX-License-Identifier: Apache-2.0
#include "check.h"
#include "fragment.cuh"
#include "launch.h"
#include "layout.cuh"
#include "transpose_values.h"

namespace pfa::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kKeys = 16;     // of a thread: a chunk of each of its channels
constexpr int kChannels = 4;  // of a thread
constexpr int kChunks = kTransposedKeys / kKeys;

struct Arguments {
  StridedTensor v;
  char* to;
  TransposedValues plan;
  int64_t seqlen_k;
  int64_t heads, first_item, items;
  int head_dim;
};

// Words of four keys and four channels each -> words of four keys, channel by channel.
__device__ __forceinline__ void transpose(const uint32_t (&in)[4], uint32_t (&out)[4]) {
  const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140),
                 low23 = __byte_perm(in[2], in[3], 0x5140);
  const uint32_t high01 = __byte_perm(in[0], in[1], 0x7362),
                 high23 = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(low01, low23, 0x5410);
  out[1] = __byte_perm(low01, low23, 0x7632);
  out[2] = __byte_perm(high01, high23, 0x5410);
  out[3] = __byte_perm(high01, high23, 0x7632);
}

// A thread reads 4 channels of 16 keys; neighbours take the chunks of a cell, then its channels, so
// that both sides move whole sectors.
__global__ void __launch_bounds__(kThreads) transpose_kernel(const __grid_constant__ Arguments a) {
  const int64_t item = a.first_item + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= a.items) return;
  const int chunk = static_cast<int>(item % kChunks);
  const int groups = a.plan.channels / kChannels;
  const int channel = static_cast<int>(item / kChunks % groups) * kChannels;
  const int64_t cell = item / kChunks / groups % a.plan.cells;
  const int64_t head = item / kChunks / groups / a.plan.cells;
  const int64_t first_key = cell * kTransposedKeys + chunk * kKeys;
  const char* from =
      layout::Strided::rows(a.v, head / a.heads, head % a.heads, first_key) + channel;
  uint32_t rows[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const bool exists = first_key + i < a.seqlen_k && channel < a.head_dim;
    rows[i] = exists ? *reinterpret_cast<const uint32_t*>(from + i * a.v.row) : 0;
  }
  uint32_t words[kKeys / 4][kChannels];
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) {
    const uint32_t keys[4] = {rows[2 * i], rows[2 * i + 1], rows[2 * i + 8], rows[2 * i + 9]};
    transpose(keys, words[i]);
  }
  char* to = a.to + (head * a.plan.cells + cell) * (int64_t{kTransposedKeys} * a.plan.channels);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    *reinterpret_cast<uint4*>(to + chunk_offset<kChunks>(channel + i, chunk)) =
        make_uint4(words[0][i], words[1][i], words[2][i], words[3][i]);
  }
}

}  // namespace

StridedTensor transpose_values(const Params& p, const TransposedValues& plan, void* to,
                               cudaStream_t stream) {
  Arguments a{};
  a.v = p.v;
  a.to = static_cast<char*>(to);
  a.plan = plan;
  a.seqlen_k = p.seqlen_k;
  a.heads = p.num_heads / p.heads_per_group;
  a.head_dim = p.head_dim;
  a.items = plan.bytes(p) / (kKeys * kChannels);
  while (a.first_item < a.items) {
    const int64_t left = (a.items - a.first_item + kThreads - 1) / kThreads;
    const int64_t grid = left < kMaxGrid ? left : kMaxGrid;
    transpose_kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(a);
    check(cudaGetLastError(), "launch transpose_values");
    a.first_item += grid * kThreads;
  }
  StridedTensor v;
  v.data = a.to;
  v.row = int64_t{kTransposedKeys} * plan.channels;
  v.head = plan.cells * v.row;
  v.batch = a.heads * v.head;
  v.vectorised = true;
  return v;
}

}  // namespace pfa::cuda
