// SPDX-License-Identifier: Apache-2.0
// The warp that fills the ring of a block above head_dim 256, in the order of wide_block.cuh.
#pragma once

#include "wide_block.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class WideProducer {
 public:
  __device__ WideProducer(const Arguments& arguments, const WideShared<T>& shared)
      : a_(arguments), shared_(shared) {}

  // All lanes of a warp call it together.
  __device__ void run(const Work<T>& work, bool careful) {
    if (threadIdx.x >= kWarp) return;
    typename T::Mask::template Tiles<T::kBlockN> tiles(
        a_.params, work.b, work.sequence.row_begin / T::kBlockM, work.range);
    int n = tiles.first();
    if (n >= tiles.end()) return;
    row_ = static_cast<int>(work.sequence.row_begin);
    head_ = work.head;
    head_k_ = work.head / a_.params.heads_per_group;
    batch_ = static_cast<int>(work.b);
    load_q();
    int mine = -1, before = -1;  // the last tiles whose scores are the block's, and of all
    bool is_mine = ptx::cluster_rank() == 0;
    while (n < tiles.end()) {
      if (is_mine) {
        if (careful) look_through(n);
        load_v(mine);
        load_k(n);
        load_v(before);
        if constexpr (T::kHasBias) load_bias(n);
        mine = n;
      }
      before = n;
      is_mine = !is_mine;
      n = tiles.after(n);
    }
    load_v(mine);
    if (before != mine) load_v(before);
  }

 private:
  [[nodiscard]] __device__ static bool is_elected() { return recomputed(threadIdx.x) % kWarp == 0; }

  // Coordinates of a broadcast dimension are 0.
  __device__ static int at(int coordinate, int64_t stride) {
    return stride == 0 ? 0 : static_cast<int>(recomputed(static_cast<unsigned>(coordinate)));
  }

  __device__ void load_q() {
    ptx::mbarrier_wait(shared_.empty_q(), q_.parity ^ 1);
    if (is_elected()) {
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

  // Waits for the next slot of the ring and calls load(slot, full) on one lane.
  template <class Load>
  __device__ void fill(int bytes, const Load& load) {
    const uint32_t full = shared_.full(ring_.stage);
    ptx::mbarrier_wait(shared_.empty(ring_.stage), ring_.parity ^ 1);
    if (is_elected()) {
      ptx::mbarrier_arrive_expect(full, bytes);
      load(shared_.slot(ring_.stage), full);
    }
    ring_.advance();
  }

  __device__ void load_k(int n) {
    const StridedTensor& k = a_.params.k;
#pragma unroll
    for (int chunk = 0; chunk < T::kChunksK; ++chunk) {
      fill(T::kBoxesChunkK * T::kBoxK, [&](uint32_t slot, uint32_t full) {
#pragma unroll
        for (int box = 0; box < T::kBoxesChunkK; ++box) {
          ptx::tma_load(slot + box * T::kBoxK, &a_.maps.k, full,
                        (chunk * T::kBoxesChunkK + box) * T::kBoxColumns, at(n * T::kBlockN, k.row),
                        at(head_k_, k.head), at(batch_, k.batch));
        }
      });
    }
  }

  // The block's columns of V, of no tile if n < 0; all columns, beforehand.
  __device__ void load_v(int n) {
    if (n >= 0) load_v(n, ptx::cluster_rank());
  }
  __device__ void look_through(int n) {
    for (int half = 0; half < T::kCluster; ++half) load_v(n, half);
  }
  __device__ void load_v(int n, int half) {
    const StridedTensor& v = a_.params.v;
#pragma unroll
    for (int chunk = 0; chunk < T::kChunksV; ++chunk) {
      fill(T::kBoxesChunkV * T::kBoxV, [&](uint32_t slot, uint32_t full) {
#pragma unroll
        for (int box = 0; box < T::kBoxesChunkV; ++box) {
          ptx::tma_load(slot + box * T::kBoxV, &a_.maps.v, full,
                        half * T::kColumns + box * T::kBoxColumns,
                        at(n * T::kBlockN + chunk * T::kRowsV, v.row), at(head_k_, v.head),
                        at(batch_, v.batch));
        }
      });
    }
  }

  __device__ void load_bias(int n) {
    const BiasParams& bias = a_.params.bias;
    fill(T::kBoxBias, [&](uint32_t slot, uint32_t full) {
      ptx::tma_load(slot, &a_.maps.bias, full, n * T::kBlockN, at(row_, bias.row),
                    at(head_, bias.head), at(batch_, bias.batch));
    });
  }

  const Arguments& a_;
  WideShared<T> shared_;
  int row_ = 0, head_ = 0, head_k_ = 0, batch_ = 0;  // coordinates of the block of work
  WideTurn<1> q_;
  WideTurn<T::kSlots> ring_;
};

}  // namespace pfa::cuda::sm90
