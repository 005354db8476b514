// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes half of the columns of 64 rows of O, and every second tile's scores.
// The other half is that of the same warpgroup of the cluster's other block.
//
// The two take turns: one computes S and P of its tile while the other multiplies the tile before
// with V. Both add each P to their columns of O, the one that made it from registers and the other
// from shared memory, where it comes with the maxima of its rows. So the maxima pass from tile to
// tile, and each sums up the rows of its own P. A block reads K of its tiles and its columns of V:
// half of what its 128 rows need.
#pragma once

#include "accumulators.cuh"
#include "wide_isolation.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class WideConsumer {
  using Element = typename T::Element;
  static constexpr int kTilesS = T::kTilesS, kTilesO = T::kTilesO;

 public:
  // Unnormalised output of the warp's 16 rows and the statistics that go with it.
  float acc_o[1][kTilesO][4];
  Softmax<1> softmax;

  __device__ WideConsumer(const Arguments& arguments, const WideShared<T>& shared)
      : p_(arguments.params),
        shared_(shared),
        scores_(arguments.params),
        isolation_(shared),
        rank_(ptx::cluster_rank()) {}

  // careful: keys that a row does not see cannot reach it, whatever stands in K and V.
  __device__ void run(const Work<T>& work, bool careful) {
    clear();
    Tiles tiles(p_, work.b, work.sequence.row_begin / T::kBlockM, work.range);
    int mine = tiles.first(), before = tiles.end();  // `before`: the other's
    if (mine < tiles.end()) {
      ptx::mbarrier_wait(shared_.full_q(), q_.parity);
      q_.advance();
      if (rank_ != 0) {
        before = mine;
        mine = tiles.after(before);
      }
      if (mine < tiles.end()) before = add_tiles(work, tiles, mine, before, careful);
      release(shared_.empty_q());
      if (before < tiles.end()) {
        add_others(careful);
        finish_values();
      }
    }
    add_sums();
  }

  // Could a key that some row must not see have reached it through V?
  [[nodiscard]] __device__ bool has_nonfinite_output(const Sequence& sequence) const {
    return has_nonfinite_sums(acc_o, sequence.rows);
  }

 private:
  using Tiles = typename T::Mask::template Tiles<T::kBlockN>;
  using Bits = typename ScoreStep<T>::Bits;

  // The warpgroup's tiles from `mine` on, and the other's up to the last of them; returns the tile
  // after that. No branch leaves the loop while products are under way: the compiler would wait for
  // them.
  __device__ int add_tiles(const Work<T>& work, Tiles& tiles, int mine, int before, bool careful) {
    Scores<T> s;
    uint32_t p[kTilesS / 2][4];
    Bits bits;
    float alpha[1][2];
    bool has_bits = load_bits(bits, tiles, work, mine);
    if (careful) flag_nonfinite_values();
    start_scores(s);
    finish_products();
    hold(s[0]);
    if (before < tiles.end()) {
      add_others(careful);
      finish_values();
    }
    finish_scores(s, tiles, work, mine, has_bits, bits, careful);
    exponentiate(s, alpha);
    pack<Element>(s, p);
    for (;;) {
      publish(p);
      rescale(acc_o, alpha);
      before = tiles.after(mine);
      mine = before < tiles.end() ? tiles.after(before) : before;
      if (mine >= tiles.end()) break;
      has_bits = load_bits(bits, tiles, work, mine);
      if (careful) flag_nonfinite_values();
      start_values(p, careful);
      start_scores(s);
      add_others(careful);
      hold(s[0]);
      finish_scores(s, tiles, work, mine, has_bits, bits, careful);
      exponentiate(s, alpha);
      pack<Element>(s, p);
      finish_values();
    }
    start_values(p, careful);
    finish_values();
    return before;
  }

  __device__ void clear() {
    softmax.clear();
    sm90::clear(acc_o);
  }

  [[nodiscard]] __device__ static int warpgroup() {
    return static_cast<int>(recomputed(threadIdx.x) / kWarpgroup) - 1;
  }
  [[nodiscard]] __device__ static bool is_first() {  // thread of its warpgroup
    return recomputed(threadIdx.x) % kWarpgroup == 0;
  }
  [[nodiscard]] __device__ static int lane() {
    return static_cast<int>(recomputed(threadIdx.x) % kWarp);
  }

  // Tells that this warp does not read a buffer any more, or that it has written its part.
  __device__ static void arrive(uint32_t barrier) {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(barrier);
  }
  __device__ static void release(uint32_t empty) { arrive(empty); }

  __device__ bool load_bits(Bits& bits, const Tiles& tiles, const Work<T>& work, int n) const {
    const bool has_bits = tiles.has_bits(n);
    if (has_bits) scores_.load_bits(bits, work, n);
    return has_bits;
  }

  // The ring's next chunk, when it has come.
  [[nodiscard]] __device__ uint32_t chunk() const {
    ptx::mbarrier_wait(shared_.full(ring_.stage), ring_.parity);
    return shared_.slot(ring_.stage);
  }

  // After the products with a chunk are under way: they may still be when the next ones start, then
  // the chunk before goes back to the producer.
  __device__ void pass_chunk() {
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    give_back();
    unreturned_ = shared_.empty(ring_.stage);
    ring_.advance();
  }
  __device__ void finish_products() {
    ptx::wgmma_wait<0>();
    give_back();
    unreturned_ = 0;
  }
  __device__ void finish_values() {
    finish_products();
    hold(acc_o[0]);
  }
  __device__ void give_back() const {
    if (unreturned_ != 0) release(unreturned_);
  }

  // Q K^T of the tile whose K is next in the ring.
  __device__ void start_scores(Scores<T>& s) {
    constexpr int kSteps = T::kBoxColumns / 16;  // of a box
    const auto q =
        Descriptor<T::kBoxRowBytes>::of(shared_.q() + warpgroup() * (64 * T::kBoxRowBytes), 16);
    hold(s[0]);
#pragma unroll
    for (int i = 0; i < T::kChunksK; ++i) {
      const auto k = Descriptor<T::kBoxRowBytes>::of(chunk(), 16);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < T::kBoxesChunkK * kSteps; ++step) {
        const int box = step / kSteps, bytes = step % kSteps * 32;
        const int box_q = i * T::kBoxesChunkK + box;
        wgmma_ss<Element>(s[0], q.at(box_q * T::kBoxQ + bytes), k.at(box * T::kBoxK + bytes),
                          i + step > 0);
      }
      pass_chunk();
    }
  }

  // From the sums of tile n to its scores.
  __device__ void finish_scores(Scores<T>& s, const Tiles& tiles, const Work<T>& work, int n,
                                bool has_bits, const Bits& bits, bool careful) {
    if (careful) isolation_.mark(s);
    if constexpr (T::kHasBias) {
      scores_.add_bias(s, chunk(), careful);
      release(shared_.empty(ring_.stage));
      ring_.advance();
    }
    scores_.apply_sign(s);
    if (tiles.crosses_band(n)) scores_.mask_band(s, work.sequence, n, true, true);
    if (has_bits) scores_.mask_bits(s, bits, n);
  }

  __device__ void exponentiate(Scores<T>& s, float (&alpha)[1][2]) {
    float most[1][2], base[1][2];
    softmax.tile_max(s, most);
    softmax.update_max(most, scores_.unit(), alpha, base);
    softmax.template exponentiate<ScoreStep<T>::kExact>(s, scores_.unit(), base, softmax.row_sum);
  }

  // Sends P and the maxima to the other block, whose buffers are free: what it sent last, and this
  // warpgroup has used, came from there after it had used what was there before.
  __device__ void publish(const uint32_t (&p)[kTilesS / 2][4]) const {
    constexpr int kChunks = T::kBlockN * Element::kBytes / kChunkBytes;
    sync_warpgroup();
    const uint32_t from = shared_.p(warpgroup()), maxima = shared_.maxima(warpgroup());
    const LaneAddress at = lane_address_rows16(lane());
    const LaneCursor<kChunks> cursor{
        from + static_cast<uint32_t>(chunk_offset<kChunks>(first_row() % 64 + at.row, at.chunk))};
#pragma unroll
    for (int step = 0; step < kTilesS / 2; ++step) {
      ptx::stmatrix_x4(cursor.at(0, 2 * step), p[step]);
    }
    if (lane() % 4 == 0) {
      float* to = floats(maxima) + first_row() % 64 + accumulator_row(lane(), 0);
#pragma unroll
      for (int r = 0; r < 2; ++r) to[8 * r] = softmax.row_max[0][r];
    }
    ptx::fence_async_proxy();
    sync_warpgroup();
    if (!is_first()) return;
    const uint32_t full = ptx::address_in(shared_.full_p(warpgroup()), 1 - rank_);
    ptx::copy_to_cluster(ptx::address_in(from, 1 - rank_), from, T::kBytesP, full);
    ptx::copy_to_cluster(ptx::address_in(maxima, 1 - rank_), maxima, T::kBytesMaxima, full);
  }

  // O += P V for this block's P.
  __device__ void start_values(const uint32_t (&p)[kTilesS / 2][4], bool careful) {
    hold(acc_o[0]);
    add_chunks(careful, [&](int step, uint64_t v) { wgmma_rs<Element>(acc_o[0], p[step], v); });
  }

  // O += P V for the other's.
  __device__ void add_others(bool careful) {
    const uint32_t full = shared_.full_p(warpgroup());
    if (is_first()) ptx::mbarrier_arrive_expect(full, T::kBytesP + T::kBytesMaxima);
    ptx::mbarrier_wait(full, others_.parity);
    others_.advance();
    float most[1][2], alpha[1][2], base[1][2];
    const float* maxima =
        floats(shared_.maxima(warpgroup())) + first_row() % 64 + accumulator_row(lane(), 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) most[0][r] = maxima[8 * r];
    softmax.update_max(most, scores_.unit(), alpha, base);
    rescale(acc_o, alpha);
    const auto p = Descriptor<T::kBoxRowBytes>::of(shared_.p(warpgroup()), 16);
    hold(acc_o[0]);
    add_chunks(careful, [&](int step, uint64_t v) {
      wgmma_ss_columns<Element>(acc_o[0], p.at(step * 32), v);
    });
  }

  // Calls multiply(step, v) for each 16 keys of the tile whose V is next in the ring.
  template <class Multiply>
  __device__ void add_chunks(bool careful, const Multiply& multiply) {
    constexpr int kSteps = T::kRowsV / 16;  // of a chunk
#pragma unroll
    for (int i = 0; i < T::kChunksV; ++i) {
      const uint32_t slot = chunk();
      if (careful) isolation_.clear(slot);
      const auto v = Descriptor<T::kBoxRowBytes>::of(slot, T::kBoxV);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply(i * kSteps + step, v.at(step * 16 * T::kBoxRowBytes));
      }
      pass_chunk();
    }
  }

  // Completes row_sum by that of the other block.
  __device__ void add_sums() {
    softmax.finalise();
    const uint32_t sums = shared_.sums(turn_) + (first_row() + accumulator_row(lane(), 0)) * 4;
    const uint32_t full = shared_.full_sums(warpgroup());
    if (lane() % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        ptx::store_in_cluster(ptx::address_in(sums + 32 * r, 1 - rank_), softmax.row_sum[0][r]);
      }
    }
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive_in_cluster(ptx::address_in(full, 1 - rank_));
    ptx::mbarrier_wait_for_cluster(full, sums_.parity);
    sums_.advance();
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // one of the quad has them, as they are to be added up again
      const float others = floats(sums)[8 * r];
      softmax.row_sum[0][r] = lane() % 4 == 0 ? softmax.row_sum[0][r] + others : 0.0f;
    }
    turn_ ^= 1;
  }

  // Only for the rare second run of a block.
  __device__ void flag_nonfinite_values() {
    isolation_.begin();
#pragma unroll 1
    for (int i = 0; i < T::kCluster * T::kChunksV; ++i) {
      isolation_.look_through(chunk(), i % T::kChunksV);
      release(shared_.empty(ring_.stage));
      ring_.advance();
    }
    isolation_.end();
  }

  [[nodiscard]] __device__ static float* floats(uint32_t address) {
    return reinterpret_cast<float*>(Shared<T>::pointer(address));
  }
  __device__ static void sync_warpgroup() {
    ptx::barrier_sync(kOneConsumer + warpgroup(), kWarpgroup);
  }

  const Params& p_;
  WideShared<T> shared_;
  ScoreStep<T> scores_;
  Isolation<T> isolation_;
  int rank_;
  uint32_t unreturned_ = 0;  // barrier of the chunk that the last products read
  int turn_ = 0;
  WideTurn<1> q_, others_, sums_;
  WideTurn<T::kSlots> ring_;
};

}  // namespace pfa::cuda::sm90
