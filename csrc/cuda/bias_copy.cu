// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "bias_copy.h"
#include "check.h"
#include "launch.h"

namespace pfa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLoads = 8;  // of a thread that are under way together

struct CopyParams {
  const uint16_t* from;
  int64_t batch, head, row;  // strides in elements
  uint16_t* to;
  int64_t to_row;
  int64_t heads, rows, columns, all_rows;
};

// A block copies a row at a time, two bytes at a time: there is no other unit in which both sides
// are aligned.
__global__ void copy_bias_kernel(const __grid_constant__ CopyParams p) {
  for (int64_t index = blockIdx.x; index < p.all_rows; index += gridDim.x) {
    const int64_t slice = index / p.rows, row = index - slice * p.rows;
    const int64_t b = slice / p.heads, head = slice - b * p.heads;
    const uint16_t* from = p.from + b * p.batch + head * p.head + row * p.row;
    uint16_t* to = p.to + index * p.to_row;
    for (int64_t first = threadIdx.x; first < p.columns; first += kLoads * kThreads) {
      uint16_t words[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * kThreads < p.columns) words[i] = from[first + i * kThreads];
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * kThreads < p.columns) to[first + i * kThreads] = words[i];
      }
    }
  }
}

}  // namespace

BiasCopyPlan::BiasCopyPlan(const Problem& problem, int block_m)
    : batches(problem.bias.batch == 0 ? 1 : problem.batch),
      heads(problem.bias.head == 0 ? 1 : problem.num_heads),
      rows(problem.bias.row == 0 ? block_m : problem.seqlen_q),
      row_bytes((problem.seqlen_k * 2 + 15) / 16 * 16),
      repeats(problem.bias.row == 0) {}

BiasParams BiasCopyPlan::params(const void* data) const {
  BiasParams bias;
  bias.data = static_cast<const char*>(data);
  (repeats ? bias.repeated_row : bias.row) = row_bytes;
  bias.head = heads == 1 ? 0 : rows * row_bytes;
  bias.batch = batches == 1 ? 0 : heads * rows * row_bytes;
  bias.vectorised = true;
  return bias;
}

bool is_copied(const BiasParams& bias, int64_t seqlen_q) {
  return bias.data != nullptr && (!bias.vectorised || (bias.row == 0 && seqlen_q > 1));
}

void copy_bias(const Problem& problem, const BiasCopyPlan& plan, void* to, cudaStream_t stream) {
  CopyParams p{};
  p.from = static_cast<const uint16_t*>(problem.bias.data);
  p.batch = problem.bias.batch;
  p.head = problem.bias.head;
  p.row = problem.bias.row;
  p.to = static_cast<uint16_t*>(to);
  p.to_row = plan.row_bytes / 2;
  p.heads = plan.heads;
  p.rows = plan.rows;
  p.columns = problem.seqlen_k;
  p.all_rows = plan.batches * plan.heads * plan.rows;
  const auto grid = static_cast<unsigned>(std::min(p.all_rows, kMaxGrid));
  copy_bias_kernel<<<grid, kThreads, 0, stream>>>(p);
  check(cudaGetLastError(), "launch copy_bias");
}

}  // namespace pfa::cuda
