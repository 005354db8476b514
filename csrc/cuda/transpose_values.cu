// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "check.h"
#include "fragment.cuh"
#include "layout.cuh"
#include "transpose_values.h"

namespace pfa::cuda {
namespace {

constexpr int kMostThreads = 128;
constexpr int kKeys = 16;      // of a thread: a chunk of each of its channels
constexpr int kChannels = 16;  // of a thread: a chunk of each of its keys
constexpr int kChunks = kTransposedKeys / kKeys;

struct Arguments {
  StridedTensor v;
  char* to;
  TransposedValues plan;
  int64_t seqlen_k;
  uint32_t heads, first_head;  // the first one counts those of all batch elements before it
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

// Neighbouring threads take the chunks of a cell, then its channels, so that both sides move whole
// sectors. V is read once: the L2 is for the cells.
__global__ void __launch_bounds__(kMostThreads)
    transpose_kernel(const __grid_constant__ Arguments a) {
  const int64_t cell = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (cell >= a.plan.cells) return;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int channel = static_cast<int>(threadIdx.x) / kChunks * kChannels;
  const uint32_t head = a.first_head + blockIdx.y;
  const int64_t first_key = cell * kTransposedKeys + chunk * kKeys;
  const char* from =
      layout::Strided::rows(a.v, head / a.heads, head % a.heads, first_key) + channel;
  uint4 rows[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const bool exists = first_key + i < a.seqlen_k && channel < a.head_dim;
    rows[i] = exists ? __ldcs(reinterpret_cast<const uint4*>(from + i * a.v.row)) : uint4{};
  }
  char* to = a.to + (head * a.plan.cells + cell) * (int64_t{kTransposedKeys} * a.plan.channels);
#pragma unroll
  for (int first = 0; first < kChannels; first += 4) {
    const auto word = [&](int key) {
      const uint4& row = rows[key];
      return first == 0 ? row.x : first == 4 ? row.y : first == 8 ? row.z : row.w;
    };
    uint32_t words[kKeys / 4][4];
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      const uint32_t keys[4] = {word(2 * i), word(2 * i + 1), word(2 * i + 8), word(2 * i + 9)};
      transpose(keys, words[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint4*>(to + chunk_offset<kChunks>(channel + first + i, chunk)) =
          make_uint4(words[0][i], words[1][i], words[2][i], words[3][i]);
    }
  }
}

}  // namespace

StridedTensor transpose_values(const Params& p, const TransposedValues& plan, void* to,
                               cudaStream_t stream) {
  constexpr int64_t kMostHeads = 65535;  // of a grid's second dimension
  Arguments a{};
  a.v = p.v;
  a.to = static_cast<char*>(to);
  a.plan = plan;
  a.seqlen_k = p.seqlen_k;
  a.heads = static_cast<uint32_t>(p.num_heads / p.heads_per_group);
  a.head_dim = p.head_dim;
  const unsigned of_a_cell = plan.channels / kChannels * kChunks;
  const dim3 threads(of_a_cell, kMostThreads / of_a_cell);
  const auto blocks = static_cast<unsigned>((plan.cells + threads.y - 1) / threads.y);
  const int64_t heads = p.batch * a.heads;
  for (int64_t first = 0; first < heads; first += kMostHeads) {
    a.first_head = static_cast<uint32_t>(first);
    const auto left = static_cast<unsigned>(std::min(heads - first, kMostHeads));
    transpose_kernel<<<dim3(blocks, left), threads, 0, stream>>>(a);
    check(cudaGetLastError(), "launch transpose_values");
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
