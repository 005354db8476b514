// SPDX-License-Identifier: Apache-2.0
// The warp that asks TMA for the tiles of a block of work, in the order in which they are needed.
#pragma once

#include "block.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class Producer {
 public:
  __device__ Producer(const Arguments& arguments, const Shared<T>& shared)
      : a_(arguments), shared_(shared), elected_(threadIdx.x % kWarp == 0) {}

  // All lanes of a warp call it together.
  __device__ void run(const Work<T>& work) {
    typename T::Mask::template Tiles<T::kBlockN> tiles(a_.params, work.block, work.range);
    int n = tiles.first();
    if (n >= tiles.end()) return;
    row_ = static_cast<int>(work.sequence.row_begin);
    head_ = work.block.head;
    head_k_ = work.block.head / a_.params.heads_per_group;
    batch_ = static_cast<int>(work.block.b);
    load_q();
    load_k(n);
    for (int next = tiles.after(n); next < tiles.end(); next = tiles.after(n)) {
      load_k(next);
      load_v(n);
      n = next;
    }
    load_v(n);
  }

 private:
  // Coordinates of a broadcast dimension are 0.
  __device__ static int at(int coordinate, int64_t stride) { return stride == 0 ? 0 : coordinate; }

  __device__ void load_q() {
    ptx::mbarrier_wait(shared_.empty_q(), q_.parity ^ 1);
    if (elected_) {
      const StridedTensor& q = a_.params.q;
      ptx::mbarrier_arrive_expect(shared_.full_q(), T::kBytesQ);
#pragma unroll
      for (int box = 0; box < T::kBoxes; ++box) {
        ptx::tma_load(shared_.q() + box * T::kBoxQ, &a_.maps.q, shared_.full_q(),
                      box * T::kBoxColumns, at(row_, q.row), at(head_, q.head),
                      at(batch_, q.batch));
      }
    }
    q_.advance();
  }

  // The bias travels with K.
  __device__ void load_k(int n) {
    const uint32_t full = shared_.full_k(k_.stage);
    ptx::mbarrier_wait(shared_.empty_k(k_.stage), k_.parity ^ 1);
    if (elected_) {
      ptx::mbarrier_arrive_expect(full, T::kBytesK + T::kBytesBias);
      load_boxes(n, shared_.k(k_.stage), &a_.maps.k, full, a_.params.k);
      if constexpr (T::kHasBias) {
        const BiasParams& bias = a_.params.bias;
#pragma unroll
        for (int box = 0; box < T::kBiasBoxes; ++box) {
          ptx::tma_load(shared_.bias(k_.stage) + box * T::kBoxBias, &a_.maps.bias, full,
                        n * T::kBlockN + box * T::kBiasColumns, at(row_, bias.row),
                        at(head_, bias.head), at(batch_, bias.batch));
        }
      }
    }
    k_.advance();
  }

  __device__ void load_v(int n) {
    const uint32_t full = shared_.full_v(v_.stage);
    ptx::mbarrier_wait(shared_.empty_v(v_.stage), v_.parity ^ 1);
    if (elected_) {
      ptx::mbarrier_arrive_expect(full, T::kBytesK);
      load_boxes(n, shared_.v(v_.stage), &a_.maps.v, full, a_.params.v);
    }
    v_.advance();
  }

  __device__ void load_boxes(int n, uint32_t to, const CUtensorMap* map, uint32_t full,
                             const StridedTensor& tensor) const {
#pragma unroll
    for (int box = 0; box < T::kBoxes; ++box) {
      ptx::tma_load(to + box * T::kBoxK, map, full, box * T::kBoxColumns,
                    at(n * T::kBlockN, tensor.row), at(head_k_, tensor.head),
                    at(batch_, tensor.batch));
    }
  }

  const Arguments& a_;
  Shared<T> shared_;
  bool elected_;
  int row_ = 0, head_ = 0, head_k_ = 0, batch_ = 0;  // coordinates of the block of work
  Turn<1> q_;
  Turn<T::kStages> k_, v_;
};

}  // namespace pfa::cuda::sm90
