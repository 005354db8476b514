// SPDX-License-Identifier: Apache-2.0
// The warp that describes blocks of work and asks TMA for their tiles, in the order in which they
// are needed.
#pragma once

#include "scores.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class Producer {
 public:
  __device__ Producer(const Arguments& arguments, const Rings<T>& shared,
                      const Suspects<T>& suspects)
      : a_(arguments), shared_(shared), suspects_(suspects) {}

  // All blocks of work of this block of threads, or those that are suspect. All lanes of a warp
  // call it together.
  //
  // K runs a tile ahead of V, over the ends of blocks too: consumers multiply Q and K of the next
  // block before they are done with V of this one.
  __device__ void run() {
    const Schedule<T::kSlices> schedule(a_);
    int owed = kNone;  // the tile of V that comes next
    BlockIndex block{};
    for (int iteration = 0; schedule.find(iteration, block); ++iteration) {
      if (suspects_.has_begun() && !suspects_.has(iteration)) continue;
      if (T::kStagesQ == 1 && owed != kNone) {  // V is needed before the buffer of Q is free
        load_v(k_.before(), owed, keys_);
        owed = kNone;
      }
      wait_for_slot();
      describe(iteration, block);
      typename T::Mask::template Tiles<T::kBlockN> tiles(a_.params, block.b, block.m_block,
                                                         shared_.work(q_).range);
      int n = tiles.first();
      if (T::kIsDense && is_elected()) shared_.work(q_).first = Visit::of(n, tiles.has_bits(n));
      if (n >= tiles.end()) {
        arrive_q();
        continue;
      }
      const KeysPlace before = keys_;
      keys_ = {block.head / a_.params.heads_per_group, static_cast<int>(block.b)};
      rows_ = {static_cast<int>(block.m_block) * T::kBlockM, block.head};
      const Turn<T::kStages> last = k_.before();
      load_q();
      int next = tiles.after(n);
      load_k(n, Visit::of(next, tiles.has_bits(next)));
      if (owed != kNone) load_v(last, owed, before);
#pragma unroll 1
      for (owed = n; next < tiles.end(); owed = n) {
        n = next;
        next = tiles.after(n);
        load_k(n, Visit::of(next, tiles.has_bits(next)));
        load_v(k_.before().before(), owed, keys_);
      }
    }
    if (owed != kNone) load_v(k_.before(), owed, keys_);
    wait_for_slot();
    if (is_elected()) shared_.work(q_).iteration = Work<T>::kNone;
    arrive_q();
  }

 private:
  static constexpr int kNone = -1;

  // Coordinates of a block of work.
  struct RowsPlace {
    int row = 0, head = 0;
  };
  struct KeysPlace {
    int head = 0, batch = 0;
  };

  [[nodiscard]] __device__ static bool is_elected() { return recomputed(threadIdx.x) % kWarp == 0; }

  // A slot is free when the buffer of Q is that goes with it.
  __device__ void wait_for_slot() { ptx::mbarrier_wait(shared_.empty_q(q_), q_.parity() ^ 1); }

  // Tells the consumers of a block of work. Lanes take the warpgroups' shares of it; the second
  // time all warpgroups look at all tiles together.
  __device__ void describe(int iteration, const BlockIndex& block) const {
    Work<T>& work = shared_.work(q_);
    Sequence rows = Sequence::of<T::kBlockM>(a_.params, block);
    if (is_elected()) {
      work.iteration = iteration;
      work.b = static_cast<int>(block.b);
      work.head = block.head;
      work.careful = suspects_.has_begun();
      work.sequence = rows;
      Schedule<T::kSlices>::share(a_.params, block, work);
    }
    __syncwarp();
    const int warpgroup = static_cast<int>(threadIdx.x % kWarp);
    if (warpgroup < T::kConsumers) {
      rows.row_begin += 64 * warpgroup;
      rows.rows = min(max(rows.rows - 64 * warpgroup, 0), 64);
      OwnRange own{rows.template tiles<T::kBlockN>()};
      if (work.careful) static_cast<TileRange&>(own) = work.range;
      own.begin = min(max(own.begin, work.range.begin), work.range.end);
      own.end = min(own.end, work.range.end);
      own.full_end = min(own.full_end, own.end);
      own.narrow = OwnRange::kNone;
      if constexpr (T::kNarrows) {
        const int first = (own.end - 1) * T::kBlockN, keys = rows.keys_end() - first;
        if (keys <= T::kMostNarrow) own.narrow = own.end - 1;
        own.narrow_keys = keys > 64 ? 128 : keys > 32 ? 64 : 32;
        own.narrow_is_full =
            rows.full_begin() <= first && rows.full_end() >= first + own.narrow_keys;
      }
      if (work.careful || ScoreStep<T>::moves_sign(a_.params)) {
        own.full_end = 0;
        own.narrow_is_full = false;
      }
      work.own[warpgroup] = own;
    }
    __syncwarp();
  }

  __device__ void arrive_q() {
    if (is_elected()) ptx::mbarrier_arrive(shared_.full_q(q_));
    q_.advance();
  }

  // Coordinates of a broadcast dimension are 0. Each load finds out for itself: registers are few.
  __device__ static int at(int coordinate, int64_t stride) {
    return stride == 0 ? 0 : static_cast<int>(recomputed(static_cast<unsigned>(coordinate)));
  }

  __device__ void load_q() {
    if (is_elected()) {
      const StridedTensor& q = a_.params.q;
      const uint32_t full = shared_.full_q(q_);
      ptx::mbarrier_arrive_expect(full, T::kBytesQ);
#pragma unroll
      for (int box = 0; box < T::kBoxes; ++box) {
        ptx::tma_load(shared_.q(q_) + box * T::kBoxQ, &a_.maps.q, full, box * T::kBoxColumns,
                      at(rows_.row, q.row), at(rows_.head, q.head), at(keys_.batch, q.batch));
      }
    }
    q_.advance();
  }

  // The bias travels with K.
  __device__ void load_k(int n, Visit following) {
    const uint32_t full = shared_.full_k(k_);
    ptx::mbarrier_wait(shared_.empty_k(k_), k_.parity() ^ 1);
    if (is_elected()) {
      if constexpr (T::kIsDense) shared_.following(k_) = following;
      ptx::mbarrier_arrive_expect(full, T::kBytesK + T::kBytesBias);
      load_boxes(n, keys_, shared_.k(k_), &a_.maps.k, full, a_.params.k);
      if constexpr (T::kHasBias) {
        const BiasParams& bias = a_.params.bias;
#pragma unroll
        for (int box = 0; box < T::kBiasBoxes; ++box) {
          ptx::tma_load(shared_.bias(k_) + box * T::kBoxBias, &a_.maps.bias, full,
                        n * T::kBlockN + box * T::kBiasColumns, at(rows_.row, bias.row),
                        at(rows_.head, bias.head), at(keys_.batch, bias.batch));
        }
      }
    }
    k_.advance();
  }

  __device__ void load_v(Turn<T::kStages> turn, int n, const KeysPlace& place) const {
    const uint32_t full = shared_.full_v(turn);
    ptx::mbarrier_wait(shared_.empty_v(turn), turn.parity() ^ 1);
    if (is_elected()) {
      ptx::mbarrier_arrive_expect(full, T::kBytesV);
      const StridedTensor& v = a_.params.v;
      if constexpr (T::kIsInteger) {  // see transpose_values.h
        constexpr int kCopies = T::kSlices == 1 ? 1 : T::kSteps, kBytes = T::kBytesV / kCopies;
        const char* from = v.data + place.batch * v.batch + place.head * v.head +
                           int64_t{n} * (T::kBytesV * T::kSlices) +
                           first_channel<T>() * T::kRowBytesV;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          ptx::bulk_load(shared_.v(turn) + i * kBytes, from + i * (kBytes * T::kSlices), kBytes,
                         full);
        }
      } else {
        load_boxes(n, place, shared_.v(turn), &a_.maps.v, full, v);
      }
    }
  }

  __device__ void load_boxes(int n, const KeysPlace& place, uint32_t to, const CUtensorMap* map,
                             uint32_t full, const StridedTensor& tensor) const {
#pragma unroll
    for (int box = 0; box < T::kBoxes; ++box) {
      ptx::tma_load(to + box * T::kBoxK, map, full, box * T::kBoxColumns,
                    at(n * T::kBlockN, tensor.row), at(place.head, tensor.head),
                    at(place.batch, tensor.batch));
    }
  }

  const Arguments& a_;
  Rings<T> shared_;
  Suspects<T> suspects_;
  RowsPlace rows_;
  KeysPlace keys_;
  Turn<T::kStagesQ> q_;
  Turn<T::kStages> k_;  // of the next tile of K
};

}  // namespace pfa::cuda::sm90
