// SPDX-License-Identifier: Apache-2.0
// One block of query rows against its tiles of keys, in ascending order: cp.async, ldmatrix and
// mma.sync. K and V have one buffer each; a tile of V arrives while Q K^T runs, the next tile of K
// while P V runs, and two blocks on an SM fill each other's gaps.
//
// Products accumulate in the m16n8 layout (fragment.cuh). A warp owns kMmaM x 16 rows. With
// kWarpsN == 2 a pair of warps owns the same rows: each computes S for half of a tile's keys, they
// exchange maxima and P through shared memory, and each keeps every other 16 columns of O.
#pragma once

#include "load.cuh"
#include "scores.cuh"
#include "values.cuh"

namespace pfa::cuda::sm80 {

template <class T>
class Mainloop {
  using Element = typename T::Element;
  using Layout = typename T::Layout;
  using Scores = typename Warp<T>::Scores;
  using RowValues = typename Warp<T>::RowValues;
  static constexpr bool kIsInteger = T::Quant::kIsInteger;
  static constexpr bool kSharesRows = T::kWarpsN > 1;
  static constexpr int kMmaM = T::kMmaM, kTilesO = T::kTilesO;
  static constexpr int kRowChunks = T::kRowChunks, kBlockN = T::kBlockN, kThreads = T::kThreads;

  using CopyQ = TileCopy<T::kBlockM, kRowChunks, kThreads, Element::kBytes>;
  using CopyK = TileCopy<kBlockN, kRowChunks, kThreads, Element::kBytes>;
  using CopyBias = TileCopy<T::kBlockM, T::kBiasChunks, kThreads, 2>;

 public:
  using Tiles = typename T::Mask::template Tiles<kBlockN>;

  // Unnormalised output and the statistics that go with it.
  typename Warp<T>::Output acc_o;
  Softmax<kMmaM> softmax;

  __device__ Mainloop(const Params& params, const BlockIndex& block, const Sequence& sequence,
                      char* shared)
      : p_(params),
        block_(block),
        sequence_(sequence),
        warp_{shared},
        scores_(params, warp_),
        values_(params, warp_) {
    const int head_k = block.head / params.heads_per_group;
    k_ = Layout::rows(params.k, block.b, head_k);
    v_ = Layout::rows(params.v, block.b, head_k);
  }

  // Could a key that some row must not see have reached it through V?
  [[nodiscard]] __device__ bool has_nonfinite_output() const {
    float zeros = 0.0f;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) zeros = fmaf(acc_o[m][n][e], 0.0f, zeros);
      }
    }
    return zeros != 0.0f;
  }

  // careful: keys that a row does not see cannot reach it, whatever stands in K and V.
  __device__ void run(Tiles& tiles, bool careful) {
    clear();
    int n = tiles.first();
    if (n >= tiles.end()) return;
    load_q();
    load_k(n);
    ptx::cp_async_commit();
    typename ScoreStep<T>::Bits bits;  // of the tile that comes next, so that nobody waits for them
    bool has_bits = tiles.has_bits(n);
    if (has_bits) scores_.load_bits(bits, p_.mask, block_.b, sequence_, n);
    while (n < tiles.end()) {
      const bool crosses_band = tiles.crosses_band(n);
      const int next = tiles.after(n);
      ptx::cp_async_wait<0>();
      __syncthreads();  // K has landed; nobody reads the last tile's V and P any more
      load_v(n);
      ptx::cp_async_commit();
      if (careful) isolate_nonfinite_values();

      Scores s;
      scores_.multiply(s);
      if constexpr (T::kHasBias) scores_.add_bias(s, careful);
      if (crosses_band) scores_.mask_band(s, sequence_, n);
      if (has_bits) scores_.mask_bits(s, bits);
      has_bits = tiles.has_bits(next);
      if (has_bits) scores_.load_bits(bits, p_.mask, block_.b, sequence_, next);
      RowValues most;
      softmax.tile_max(s, most);
      if constexpr (kSharesRows) publish_max(most);

      ptx::cp_async_wait<0>();
      __syncthreads();  // V has landed; nobody reads K and the bias any more
      if (next < tiles.end()) {
        load_k(next);
        ptx::cp_async_commit();
      }
      if constexpr (kSharesRows) merge_max(most);
      RowValues alpha, base;
      softmax.update_max(most, scores_.unit(), alpha, base);
      softmax.template exponentiate<ScoreStep<T>::kExact>(s, scores_.unit(), base, softmax.row_sum);
      values_.multiply(acc_o, s, alpha);
      n = next;
    }
  }

 private:
  [[nodiscard]] __device__ static int thread() { return recomputed(static_cast<int>(threadIdx.x)); }

  __device__ void clear() {
    softmax.clear();
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_o[m][n][e] = 0.0f;
      }
    }
  }

  __device__ void load_q() {
    const char* data = Layout::rows(p_.q, block_.b, block_.head, sequence_.row_begin);
    const int bytes = p_.head_dim * Element::kBytes;
    CopyQ::start(warp_.shared + T::kQ, {data, p_.q.row, sequence_.rows, bytes, p_.q.vectorised},
                 thread());
  }

  // Tile n of k or v, whose rows of this head start at data.
  __device__ TileSource keys_source(const StridedTensor& tensor, const char* data, int n) const {
    return {data + n * (kBlockN * tensor.row), tensor.row, keys_left(n),
            p_.head_dim * Element::kBytes, tensor.vectorised};
  }

  [[nodiscard]] __device__ int keys_left(int n) const {
    const int64_t left = sequence_.keys - static_cast<int64_t>(n) * kBlockN;
    return left < kBlockN ? static_cast<int>(left) : kBlockN;
  }

  // The bias travels with K.
  __device__ void load_k(int n) {
    CopyK::start(warp_.shared + T::kK, keys_source(p_.k, k_, n), thread());
    if constexpr (T::kHasBias) {
      const char* data = p_.bias.data + block_.b * p_.bias.batch + block_.head * p_.bias.head +
                         sequence_.row_begin * p_.bias.row + static_cast<int64_t>(n) * kBlockN * 2;
      CopyBias::start(warp_.shared + T::kBias,
                      {data, p_.bias.row, sequence_.rows, keys_left(n) * 2, p_.bias.vectorised},
                      thread());
    }
  }

  __device__ void load_v(int n) {
    CopyK::start(warp_.shared + T::kV, keys_source(p_.v, v_, n), thread());
  }

  __device__ float* stats_of(int warp_n) const {
    return reinterpret_cast<float*>(warp_.shared + T::kStats) + warp_n * T::kBlockM;
  }

  __device__ void publish_max(const RowValues& most) const {
    if (warp_.lane() % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        stats_of(warp_.index_n())[warp_.row() + m * 16 + accumulator_row(warp_.lane(), 2 * r)] =
            most[m][r];
      }
    }
  }

  __device__ void merge_max(RowValues& most) const {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_.row() + m * 16 + accumulator_row(warp_.lane(), 2 * r);
        most[m][r] = fmaxf(most[m][r], stats_of(1 - warp_.index_n())[row]);
      }
    }
  }

  // 0 * NaN is NaN: a key that a row does not see must not enter P V with an infinity or a NaN. So
  // the rows of V that have one become zeros and those keys NaN, which scores carry to the rows
  // that see them. Only for the rare second run of a block.
  __device__ void isolate_nonfinite_values() {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (!kIsInteger) {
      for (int key = static_cast<int>(threadIdx.x); key < kBlockN; key += kThreads) {
        auto* v = reinterpret_cast<uint4*>(warp_.shared + T::kV) + key * kRowChunks;
        auto* k = reinterpret_cast<uint4*>(warp_.shared + T::kK) + key * kRowChunks;
        bool found = false;
#pragma unroll 1
        for (int i = 0; i < kRowChunks; ++i) {
          const uint4 x = v[i];
          found |= has_nonfinite<Element>(x.x) || has_nonfinite<Element>(x.y) ||
                   has_nonfinite<Element>(x.z) || has_nonfinite<Element>(x.w);
        }
#pragma unroll 1
        for (int i = 0; found && i < kRowChunks; ++i) {
          v[i] = make_uint4(0, 0, 0, 0);
          k[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
        }
      }
      __syncthreads();
    }
  }

  const Params& p_;
  const BlockIndex& block_;
  const Sequence& sequence_;
  const char* k_;
  const char* v_;
  Warp<T> warp_;
  ScoreStep<T> scores_;
  ValueStep<T> values_;
};

}  // namespace pfa::cuda::sm80
