// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes 64 rows of a block of work, its tiles of keys in ascending order.
//
// Q K^T of the next tile is under way while the softmax of this one waits for it and P V of this
// one runs beside the next softmax: see run().
#pragma once

#include <climits>
#include <type_traits>

#include "accumulators.cuh"
#include "int8_softmax.cuh"
#include "int8_sums.cuh"
#include "int8_wgmma.cuh"
#include "isolation.cuh"
#include "lazy_softmax.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class Consumer {
  using Element = typename T::Element;
  static constexpr int kTilesS = T::kTilesS, kTilesO = T::kTilesO;
  static constexpr bool kIsInteger = T::kIsInteger;

 public:
  // Unnormalised output of the warp's 16 rows and the statistics that go with it. Of int8 it is
  // integers, and floats in the same registers when it is stored.
  typename Element::Sum acc_o[1][kTilesO][4];
  std::conditional_t<kIsInteger, IntegerSoftmax<T>, LazySoftmax> softmax;

  __device__ Consumer(const Arguments& arguments, const Rings<T>& shared)
      : softmax(arguments.params),
        p_(arguments.params),
        shared_(shared),
        scores_(arguments.params) {
    if (T::kTakesTurns && warpgroup() == T::kConsumers - 1) pass_turn();
  }

  // Blocks of work until there is none left; store(work) is called with the sums of each.
  template <class Store>
  __device__ __forceinline__ void run(const Store& store) {
    Carried carried;
    clear();
    for (enter(); !is_over();) {
      skip_to(own().begin);
      bool entered = false;
      if (has_tile()) {
        entered = run_chain(store, carried);
      } else {
        leave_q();
      }
      const Work<T>& done = shared_.work(q_.before());
      if (!entered) skip_to(done.range.end);
      hand_over(store, done);
      if (!entered) enter();
    }
    leave_q();
  }

  // Could a key that some row must not see have reached it through V?
  [[nodiscard]] __device__ bool has_nonfinite_output(const Sequence& sequence) const {
    if constexpr (kIsInteger) {
      return false;  // V is finite, and what a bias brings in stays in its row
    } else {
      return has_nonfinite_sums(acc_o, sequence.rows);
    }
  }

 private:
  using Bits = typename ScoreStep<T>::Bits;
  using Operand = Descriptor<T::kBoxRowBytes>;
  using Carried = std::conditional_t<kIsInteger, CarriedSums<kTilesO, T::kBlockN>, NoCarriedSums>;

  __device__ void clear() {
    softmax.clear();
    sm90::clear(acc_o);
  }

  // The sums of a block, of which storing leaves nothing for the next one to go on with.
  template <class Store>
  __device__ void hand_over(const Store& store, const Work<T>& work) {
    store(work);
    clear();
  }

  // Tiles that a row of this warpgroup may see.
  [[nodiscard]] __device__ const OwnRange& own() const { return shared_.work(q_).own[warpgroup()]; }

  // The tile that is being computed on.
  [[nodiscard]] __device__ int n() const {
    return T::kIsDense ? tile_.n() : static_cast<int>(tile_.word);
  }

  // Is it, at or behind the first one of them, one of them? Most tiles are full, and those ask
  // nothing else up to the one where sums are taken next.
  [[nodiscard]] __device__ bool has_tile(int next = INT_MAX) {
    const OwnRange& range = own();
    if (n() >= range.full_begin) full_end_ = min(range.full_end, next);
    return n() < range.end;
  }
  [[nodiscard]] __device__ bool is_full() const { return n() < full_end_; }
  [[nodiscard]] __device__ bool is_narrow() const { return T::kNarrows && n() == own().narrow; }

  [[nodiscard]] __device__ bool is_over() const {
    return shared_.work(q_).iteration == Work<T>::kNone;
  }

  // Waits for the next block of work and its Q, and goes to its first tile.
  __device__ void enter() {
    ptx::mbarrier_wait(shared_.full_q(q_), q_.parity());
    const Work<T>& work = shared_.work(q_);
    if (work.iteration == Work<T>::kNone) return;
    tile_ = T::kIsDense ? work.first : Visit{static_cast<uint32_t>(work.range.begin)};
    full_end_ = 0;
    q_low_ = Operand::of_chunk(
                 shared_.chunk_q(q_) + warpgroup() * (64 * T::kBoxRowBytes / kChunkBytes), 16)
                 .low;
  }

  // Lets the tiles before end go by.
  __device__ void skip_to(int end) {
    for (; n() < end; advance()) {
      ptx::mbarrier_wait(shared_.full_k(k_), k_.parity());
      __syncwarp();
      release(shared_.empty_k(k_));
      wait_for_turn();
      pass_turn();
      ptx::mbarrier_wait(shared_.full_v(k_), k_.parity());
      __syncwarp();
      release(shared_.empty_v(k_));
      k_.advance();
    }
  }

  // To the next tile of the block. K of this one has been given back.
  __device__ void advance() {
    tile_ = T::kIsDense ? shared_.following(k_.before()) : Visit{recomputed(tile_.word + 1)};
  }

  // From a tile that this warpgroup computes on to the end of its block. Where the next block
  // begins with such a tile too, it goes on with that one: its first Q K^T is under way while the
  // sums of this one are stored. Those of the last block are left to be; returns whether the one
  // after it has been entered.
  template <class Store>
  __device__ __forceinline__ bool run_chain(const Store& store, Carried& carried) {
    Scores<T> s;
    Probabilities<T> p;
    wait_for_keys();
    begin<T>(s);
    start_scores(s);
    ptx::wgmma_wait<0>();
    hold(s[0]);
    for (;;) {
      const int last_keys = multiply(s, p, carried);
      const Turn<T::kStagesQ> done = q_.before();
      const bool skips = n() < shared_.work(done).range.end;
      bool goes_on = false;
      if (T::kStagesQ > 1 && !skips) {
        enter();
        goes_on = !is_over() && n() >= own().begin && has_tile();
      }
      if (goes_on) wait_for_keys();
      const Turn<T::kStages> v = k_.before();
      wait_for_values(v);
      wait_for_turn();
      if (!goes_on) {
        start_last_values(v, p, last_keys);
        pass_turn();
        ptx::wgmma_wait<0>();
        finish_values(v);
        carried.finish(acc_o);
        return T::kStagesQ > 1 && !skips;
      }
      start_last_values(v, p, last_keys);
      begin<T>(s);
      start_scores(s);
      pass_turn();
      ptx::wgmma_wait<1>();
      finish_values(v);
      carried.finish(acc_o);
      hand_over(store, shared_.work(done));
      ptx::wgmma_wait<0>();
      hold(s[0]);
    }
  }

  // The tiles from this one on but for the last P V, whose number of keys it returns. s has the
  // sums of the first one.
  __device__ __forceinline__ int multiply(Scores<T>& s, Probabilities<T>& p, Carried& carried) {
    Bits bits;
    float alpha[1][2];
    carried.begin(n());
    full_end_ = min(full_end_, carried.next());
    const bool has_bits = load_bits(bits);
    finish_scores(s, has_bits, bits);
    exponentiate(s, alpha);
    pack(s, p);
    int last_keys = T::kBlockN;
    for (;;) {
      advance();
      if (!is_full()) {
        if (!has_tile(carried.next())) break;
        carried.take(acc_o, n());
        if (is_narrow()) {
          last_keys = own().narrow_keys;
          break;
        }
      }
      follow(s, p, carried);
    }
    if (last_keys < T::kBlockN) {
      of_keys<32>(last_keys, [&](auto keys) { follow(narrow<T, keys / 8>(s), p, carried); });
      advance();
    }
    leave_q();
    return last_keys;
  }

  // Calls visit with the number of keys of a narrow tile as a constant.
  template <int kKeys, class Visit>
  __device__ __forceinline__ static void of_keys(int keys, const Visit& visit) {
    if constexpr (kKeys < T::kMostNarrow) {
      if (keys != kKeys) return of_keys<2 * kKeys>(keys, visit);
    }
    if constexpr (T::kNarrows) visit(std::integral_constant<int, kKeys>{});
  }

  // A tile after the first one: its scores beside P V of the one before, and their softmax.
  template <int kTiles>
  __device__ __forceinline__ void follow(Scores<T, kTiles>& s, Probabilities<T>& p,
                                         Carried& carried) {
    Bits bits;
    float alpha[1][2];
    const bool has_bits = load_bits(bits);
    wait_for_keys();
    wait_for_turn();
    if (kTiles < kTilesS || !kBeginsAgain<T>) begin<T>(s);
    start_scores(s);
    const Turn<T::kStages> v = k_.before();
    wait_for_values(v);
    start_values(v, p);
    pass_turn();
    ptx::wgmma_wait<1>();
    hold(s[0]);
    finish_scores(s, has_bits, bits);
    const int changed = exponentiate(s, alpha);
    hold(s[0]);
    ptx::wgmma_wait<0>();
    finish_values(v);
    if (changed != 0) {
      rescale(acc_o, alpha);
      carried.rescale(alpha);
    }
    pack(s, p);
  }

  [[nodiscard]] __device__ static int warpgroup() {
    return static_cast<int>(recomputed(threadIdx.x) / kWarpgroup) - 1;
  }

  // Tells the producer that this warp does not read a buffer any more. Its lanes have all waited
  // for products or each other: one that still waited for the buffer might miss that it was full.
  __device__ static void release(uint32_t empty) {
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(empty);
  }

  __device__ void leave_q() {
    __syncwarp();
    release(shared_.empty_q(q_));
    q_.advance();
  }

  __device__ __forceinline__ bool load_bits(Bits& bits) const {
    const bool has_bits = T::kIsDense && tile_.has_bits();
    if (has_bits) scores_.load_bits(bits, shared_.work(q_), n());
    return has_bits;
  }

  __device__ void wait_for_keys() {
    ptx::mbarrier_wait(shared_.full_k(k_), k_.parity());
    if constexpr (!kIsInteger) {
      if (!is_full() && is_careful()) isolate_nonfinite_values(shared_, k_);
    }
  }

  [[nodiscard]] __device__ bool is_careful() const { return shared_.work(q_).careful; }

  template <int kTiles>
  __device__ __forceinline__ int exponentiate(Scores<T, kTiles>& s, float (&alpha)[1][2]) {
    if constexpr (kIsInteger) {
      return softmax.step(s, alpha);
    } else {
      return softmax.template step<ScoreStep<T>::kExact>(
          s, scores_.unit(), [this] { return is_careful(); }, alpha);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void pack(Scores<T, kTiles>& s, Probabilities<T>& p) {
    if constexpr (kIsInteger) {
      softmax.pack(s, p);
    } else {
      sm90::pack<Element>(s, p);
    }
  }

  // Products start in turns, so that the softmax of one warpgroup meets those of another.
  __device__ void wait_for_turn() const {
    if constexpr (T::kTakesTurns) ptx::barrier_sync(kTurnOfConsumer + warpgroup(), 2 * kWarpgroup);
  }
  __device__ void pass_turn() const {
    if constexpr (!T::kTakesTurns) return;
    const int next = T::kConsumers == 2 ? 1 - warpgroup() : (warpgroup() + 1) % T::kConsumers;
    ptx::barrier_arrive(kTurnOfConsumer + next, 2 * kWarpgroup);
  }

  // Q K^T of the tile that k_ points to.
  template <int kTiles>
  __device__ __forceinline__ void start_scores(Scores<T, kTiles>& s) const {
    constexpr int kStepBytes = 32;
    constexpr int kSteps = T::kBoxRowBytes / kStepBytes;  // of a box
    const Operand q{q_low_}, k = Operand::of_chunk(shared_.chunk_k(k_), 16);
    hold(s[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < T::kBoxes * kSteps; ++step) {
      const int box = step / kSteps, bytes = step % kSteps * kStepBytes;
      wgmma_ss<Element>(s[0], q.at(box * T::kBoxQ + bytes), k.at(box * T::kBoxK + bytes),
                        kMagicSums<T> || step > 0);
    }
    ptx::wgmma_commit();
  }

  // From the sums of this tile to its scores; K's buffer is given back.
  template <int kTiles>
  __device__ __forceinline__ void finish_scores(Scores<T, kTiles>& s, bool has_bits,
                                                const Bits& bits) {
    scores_.convert(s);
    if constexpr (T::kHasBias) {
      scores_.add_bias(s, shared_.bias(k_), !kIsInteger && is_careful());
      __syncwarp();
    }
    release(shared_.empty_k(k_));
    k_.advance();
    if (kTiles < kTilesS ? !own().narrow_is_full : !is_full()) {
      scores_.apply_sign(s);
      const OwnRange& range = own();
      scores_.mask_band(s, shared_.work(q_).sequence, n(), n() < range.full_begin,
                        n() >= range.full_end);
    }
    if constexpr (T::kIsDense) {
      if (has_bits) scores_.mask_bits(s, bits, n());
    }
  }

  __device__ void wait_for_values(Turn<T::kStages> v) const {
    ptx::mbarrier_wait(shared_.full_v(v), v.parity());
  }

  // O += P V, of the first keys.
  template <int kKeys = T::kBlockN>
  __device__ __forceinline__ void start_values(Turn<T::kStages> turn, const Probabilities<T>& p) {
    const auto v = Descriptor<T::kRowBytesV>::of_chunk(shared_.chunk_v(turn), T::kBoxK);
    hold(acc_o[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / T::kStepKeys; ++step) {
      wgmma_rs<Element>(acc_o[0], p[step], v.at(step * T::kStepBytesV));
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void start_last_values(Turn<T::kStages> turn,
                                                    const Probabilities<T>& p, int keys) {
    if (keys < T::kBlockN) {
      of_keys<32>(keys, [&](auto narrow) { start_values<narrow>(turn, p); });
    } else {
      start_values(turn, p);
    }
  }

  // After the wait for P V.
  __device__ void finish_values(Turn<T::kStages> v) {
    hold(acc_o[0]);
    release(shared_.empty_v(v));
  }

  const Params& p_;
  Rings<T> shared_;
  ScoreStep<T> scores_;
  Turn<T::kStagesQ> q_;
  Turn<T::kStages> k_;  // the next tile whose K is given back
  // Of the block of work that is being computed.
  Visit tile_;
  int full_end_ = 0;
  uint32_t q_low_;
};

}  // namespace pfa::cuda::sm90
