// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes 64 rows of a block of work, its tiles of keys in ascending order.
//
// Q K^T of the next tile is under way while the softmax of this one waits for it and P V of this
// one runs beside the next softmax: see run().
#pragma once

#include "scores.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class Consumer {
  using Element = typename T::Element;
  static constexpr int kTilesS = T::kTilesS, kTilesO = T::kTilesO;

 public:
  // Unnormalised output of the warp's 16 rows and the statistics that go with it.
  float acc_o[1][kTilesO][4];
  Softmax<1> softmax;

  __device__ Consumer(const Arguments& arguments, const Shared<T>& shared)
      : p_(arguments.params), shared_(shared), scores_(arguments.params) {
    if (T::kTakesTurns && warpgroup() == T::kConsumers - 1) pass_turn();
  }

  // careful: keys that a row does not see cannot reach it, whatever stands in K and V.
  __device__ void run(const Work<T>& work, bool careful) {
    clear();
    Tiles tiles(p_, work.block, work.range);
    int n = tiles.first();
    if (n >= tiles.end()) return;
    Scores<T> s;
    uint32_t p[kTilesS / 2][4];
    Bits bits;
    float alpha[1][2];
    ptx::mbarrier_wait(shared_.full_q(), q_.parity);
    q_.advance();
    bool has_bits = load_bits(bits, tiles, work, n);
    wait_for_keys(careful);
    start_scores(s);
    ptx::wgmma_wait<0>();
    hold(s[0]);
    finish_scores(s, tiles, work, n, has_bits, bits, careful);
    exponentiate(s, alpha);
    pack(s, p);
    for (int next = tiles.after(n); next < tiles.end(); next = tiles.after(n)) {
      has_bits = load_bits(bits, tiles, work, next);
      wait_for_keys(careful);
      wait_for_turn();
      start_scores(s);
      ptx::mbarrier_wait(shared_.full_v(v_.stage), v_.parity);
      start_values(p);
      pass_turn();
      ptx::wgmma_wait<1>();
      hold(s[0]);
      finish_scores(s, tiles, work, next, has_bits, bits, careful);
      exponentiate(s, alpha);
      hold(s[0]);
      finish_values();
      rescale(alpha);
      pack(s, p);
      n = next;
    }
    release(shared_.empty_q());
    ptx::mbarrier_wait(shared_.full_v(v_.stage), v_.parity);
    start_values(p);
    finish_values();
  }

  // Could a key that some row must not see have reached it through V?
  [[nodiscard]] __device__ bool has_nonfinite_output(const Sequence& sequence) const {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    bool found = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float zeros[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) zeros[c] = fmaf(acc_o[0][n][2 * r + c], 0.0f, zeros[c]);
      }
      const bool is_valid = first_row() + accumulator_row(lane, 2 * r) < sequence.rows;
      found |= is_valid && zeros[0] + zeros[1] != 0.0f;
    }
    return found;
  }

 private:
  using Tiles = typename T::Mask::template Tiles<T::kBlockN>;
  using Bits = typename ScoreStep<T>::Bits;

  __device__ void clear() {
    softmax.clear();
#pragma unroll
    for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_o[0][n][e] = 0.0f;
    }
  }

  [[nodiscard]] __device__ static int warpgroup() {
    return static_cast<int>(threadIdx.x / kWarpgroup) - 1;
  }

  // Tells the producer that this warp does not read a buffer any more.
  __device__ static void release(uint32_t empty) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(empty);
  }

  __device__ bool load_bits(Bits& bits, const Tiles& tiles, const Work<T>& work, int n) const {
    const bool has_bits = tiles.has_bits(n);
    if (has_bits) scores_.load_bits(bits, work, n);
    return has_bits;
  }

  __device__ void wait_for_keys(bool careful) {
    ptx::mbarrier_wait(shared_.full_k(k_.stage), k_.parity);
    if (careful) isolate_nonfinite_values();
  }

  // Warpgroups start their products in turns, so that the softmax of one meets the products of
  // another.
  __device__ void wait_for_turn() const {
    if constexpr (T::kTakesTurns) ptx::barrier_sync(kTurnOfConsumer + warpgroup(), 2 * kWarpgroup);
  }
  __device__ void pass_turn() const {
    if constexpr (!T::kTakesTurns) return;
    const int next = warpgroup() == T::kConsumers - 1 ? 0 : warpgroup() + 1;
    ptx::barrier_arrive(kTurnOfConsumer + next, 2 * kWarpgroup);
  }

  // Q K^T of the tile that k_ points to.
  __device__ void start_scores(Scores<T>& s) const {
    constexpr int kSteps = T::kBoxColumns / 16;  // of a box
    const uint64_t q =
        Descriptor<T::kBoxRowBytes>::of(shared_.q() + warpgroup() * (64 * T::kBoxRowBytes), 16);
    const uint64_t k = Descriptor<T::kBoxRowBytes>::of(shared_.k(k_.stage), 16);
    hold(s[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < T::kHeadDim / 16; ++step) {
      const int box = step / kSteps, bytes = step % kSteps * 32;
      wgmma_ss<Element>(s[0], q + ((box * T::kBoxQ + bytes) >> 4),
                        k + ((box * T::kBoxK + bytes) >> 4), step > 0);
    }
    ptx::wgmma_commit();
  }

  // From the sums of tile n to its scores; K's buffer is given back.
  __device__ void finish_scores(Scores<T>& s, const Tiles& tiles, const Work<T>& work, int n,
                                bool has_bits, const Bits& bits, bool careful) {
    if constexpr (T::kHasBias) scores_.add_bias(s, shared_.bias(k_.stage), careful);
    release(shared_.empty_k(k_.stage));
    k_.advance();
    scores_.apply_sign(s);
    if (tiles.crosses_band(n)) scores_.mask_band(s, work.sequence, n);
    if (has_bits) scores_.mask_bits(s, bits);
  }

  __device__ void exponentiate(Scores<T>& s, float (&alpha)[1][2]) {
    float most[1][2], base[1][2];
    softmax.tile_max(s, most);
    softmax.update_max(most, scores_.unit(), alpha, base);
    softmax.template exponentiate<ScoreStep<T>::kExact>(s, scores_.unit(), base);
  }

  // Accumulators of S are the A operand of P V once they are packed.
  __device__ static void pack(const Scores<T>& s, uint32_t (&p)[kTilesS / 2][4]) {
#pragma unroll
    for (int step = 0; step < kTilesS / 2; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s[0][2 * step + i / 2][i % 2 * 2];
        p[step][i] = Element::pack(pair[0], pair[1]);
      }
    }
  }

  // O += P V of the tile that v_ points to.
  __device__ void start_values(const uint32_t (&p)[kTilesS / 2][4]) {
    const uint64_t v = Descriptor<T::kBoxRowBytes>::of(shared_.v(v_.stage), T::kBoxK);
    hold(acc_o[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTilesS / 2; ++step) {
      wgmma_rs<Element>(acc_o[0], p[step], v + ((step * 16 * T::kBoxRowBytes) >> 4));
    }
    ptx::wgmma_commit();
  }

  __device__ void finish_values() {
    ptx::wgmma_wait<0>();
    hold(acc_o[0]);
    release(shared_.empty_v(v_.stage));
    v_.advance();
  }

  // Skipped where no maximum of the warp's rows has grown: multiplying by 1 changes nothing.
  __device__ void rescale(const float (&alpha)[1][2]) {
    const bool grown = alpha[0][0] != 1.0f || alpha[0][1] != 1.0f;
    if (!__any_sync(0xffffffffu, grown)) return;
#pragma unroll
    for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_o[0][n][e] *= alpha[0][e / 2];
    }
  }

  // 0 * NaN is NaN: a key that a row does not see must not enter P V with an infinity or a NaN. So
  // the rows of V that have one become zeros and those keys NaN, which scores carry to the rows
  // that see them. Only for the rare second run of a block.
  __device__ void isolate_nonfinite_values() {
    ptx::mbarrier_wait(shared_.full_v(k_.stage), k_.parity);  // V's ring turns like K's
    const int first = static_cast<int>(threadIdx.x) - kWarpgroup;
    char* v = Shared<T>::pointer(shared_.v(k_.stage));
    char* k = Shared<T>::pointer(shared_.k(k_.stage));
#pragma unroll 1
    for (int key = first; key < T::kBlockN; key += T::kConsumerThreads) {
      bool found = false;
#pragma unroll 1
      for (int i = 0; i < T::kBoxes * T::kBoxChunks; ++i) {
        const uint4 x = *reinterpret_cast<const uint4*>(v + chunk_of(key, i));
        found |= has_nonfinite<Element>(x.x) || has_nonfinite<Element>(x.y) ||
                 has_nonfinite<Element>(x.z) || has_nonfinite<Element>(x.w);
      }
#pragma unroll 1
      for (int i = 0; found && i < T::kBoxes * T::kBoxChunks; ++i) {
        *reinterpret_cast<uint4*>(v + chunk_of(key, i)) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(k + chunk_of(key, i)) = make_uint4(~0u, ~0u, ~0u, ~0u);
      }
    }
    ptx::fence_async_proxy();
    ptx::barrier_sync(kAllConsumers, T::kConsumerThreads);
  }

  // A key's chunk i, in the order in which they lie there.
  __device__ static int chunk_of(int key, int i) {
    return i / T::kBoxChunks * T::kBoxK + key * T::kBoxRowBytes + i % T::kBoxChunks * kChunkBytes;
  }

  const Params& p_;
  Shared<T> shared_;
  ScoreStep<T> scores_;
  Turn<1> q_;
  Turn<T::kStages> k_, v_;
};

}  // namespace pfa::cuda::sm90
