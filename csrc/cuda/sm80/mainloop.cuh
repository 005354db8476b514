// SPDX-License-Identifier: Apache-2.0
// One block of query rows against its tiles of keys, in ascending order: cp.async, ldmatrix and
// mma.sync. K and V have one buffer each; a tile of V arrives while Q K^T runs, the next tile of K
// while P V runs, and two blocks on an SM fill each other's gaps.
//
// Products accumulate in the m16n8 layout (fragment.cuh). A warp owns kMmaM x 16 rows. With
// kWarpsN == 2 a pair of warps owns the same rows: each computes S for half of a tile's keys, they
// exchange maxima and P through shared memory, and each keeps every other 16 columns of O.
#pragma once

#include "../softmax.cuh"
#include "config.cuh"
#include "load.cuh"

namespace pfa::cuda::sm80 {

template <class T>
class Mainloop {
  using Element = typename T::Element;
  using BiasElement = Half<Element>;
  static constexpr bool kIsInteger = T::Quant::kIsInteger;
  static constexpr int kMmaM = T::kMmaM, kTilesS = T::kTilesS, kTilesO = T::kTilesO;
  static constexpr int kRowChunks = T::kRowChunks, kBlockN = T::kBlockN, kThreads = T::kThreads;
  static constexpr bool kSharesRows = T::kWarpsN > 1;
  // Sums below 2^22 start from kMagicBits and so are floats when they end (quant.cuh).
  static constexpr bool kMagicScores = kIsInteger && T::kHeadDim <= 256;

  using CopyQ = TileCopy<T::kBlockM, kRowChunks, kThreads, Element::kBytes>;
  using CopyK = TileCopy<kBlockN, kRowChunks, kThreads, Element::kBytes>;
  using CopyBias = TileCopy<T::kBlockM, T::kBiasChunks, kThreads, 2>;

 public:
  using Tiles = typename T::Mask::template Tiles<kBlockN>;

  // Unnormalised output and the statistics that go with it. For integers O counts in units of
  // quant.descale_o.
  float acc_o[kMmaM][kTilesO][4];
  Softmax<kMmaM> softmax;

  __device__ Mainloop(const Params& params, const BlockIndex& block, const Sequence& sequence,
                      char* shared)
      : p_(params), block_(block), sequence_(sequence), shared_(shared) {
    // Scores are compared before they are scaled, so the scale must be positive: its sign moves to
    // the scores, and zero becomes the smallest float, which still makes -inf of -inf.
    float scale = p_.softmax_scale * kLog2e;
    if constexpr (kIsInteger) scale *= read_scale(p_.quant.descale_s);
    sign_ = scale < 0.0f ? -1.0f : 1.0f;
    scale_ = fmaxf(fabsf(scale), 1.4e-45f);
    if constexpr (kIsInteger) {
      scale_p_ = read_scale(p_.quant.scale_p);
      saturate_p_ = !(fabsf(scale_p_) <= 127.0f);
    }
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

  // careful: keys with an infinity or a NaN in V make rows that see them NaN and no other.
  __device__ void run(Tiles& tiles, bool careful) {
    clear();
    int n = tiles.first();
    if (n >= tiles.end()) return;
    load_q();
    load_k(n);
    ptx::cp_async_commit();
    while (n < tiles.end()) {
      const bool crosses_band = tiles.crosses_band(n), has_bits = tiles.has_bits(n);
      uint32_t bits[kMmaM];
      if (has_bits) load_bits(n, bits);
      const int next = tiles.after(n);
      ptx::cp_async_wait<0>();
      __syncthreads();  // K has landed; nobody reads the last tile's V and P any more
      load_v(n);
      ptx::cp_async_commit();
      if (careful) isolate_nonfinite_values();

      float s[kMmaM][kTilesS][4];
      multiply_q_k(s);
      if constexpr (T::kHasBias) add_bias(s);
      if (crosses_band) mask_band(s, n);
      if (has_bits) mask_bits(s, bits);
      float most[kMmaM][2];
      softmax.tile_max(s, most);
      if constexpr (kSharesRows) publish_max(most);

      ptx::cp_async_wait<0>();
      __syncthreads();  // V has landed; nobody reads K and the bias any more
      if (next < tiles.end()) {
        load_k(next);
        ptx::cp_async_commit();
      }
      if constexpr (kSharesRows) merge_max(most);
      float alpha[kMmaM][2], base[kMmaM][2];
      softmax.update_max(most, score_unit(), alpha, base);
      softmax.exponentiate(s, score_unit(), base);
      multiply_p_v(s, alpha);
      n = next;
    }
  }

 private:
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ int thread() const { return recomputed(static_cast<int>(threadIdx.x)); }

  template <int kChunks>
  __device__ LaneCursor<kChunks> cursor(int tile, int row, LaneAddress lane, int chunk = 0) const {
    return {ptx::shared_address(shared_ + tile) +
            static_cast<uint32_t>(chunk_offset<kChunks>(row + lane.row, chunk + lane.chunk))};
  }
  __device__ int warp_m() const { return warp() % T::kWarpsM; }
  __device__ int warp_n() const { return kSharesRows ? warp() / T::kWarpsM : 0; }
  __device__ int warp_row() const { return warp_m() * kMmaM * 16; }
  __device__ int warp_key() const { return warp_n() * kTilesS * 8; }

  // What one unit of s is worth in powers of two. The bias was added in that unit already.
  __device__ float score_unit() const { return T::kHasBias ? 1.0f : scale_; }

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
    const char* data = p_.q.data + block_.b * p_.q.batch + block_.head * p_.q.head +
                       sequence_.row_begin * p_.q.row;
    const int bytes = p_.head_dim * Element::kBytes;
    CopyQ::start(shared_ + T::kQ, {data, p_.q.row, sequence_.rows, bytes, p_.q.vectorised},
                 thread());
  }

  __device__ TileSource keys_source(const StridedTensor& tensor, int n) const {
    const int64_t key = static_cast<int64_t>(n) * kBlockN;
    const char* data = tensor.data + block_.b * tensor.batch +
                       (block_.head / p_.heads_per_group) * tensor.head + key * tensor.row;
    const int keys = static_cast<int>(clamp64(sequence_.keys - key, 0, kBlockN));
    return {data, tensor.row, keys, p_.head_dim * Element::kBytes, tensor.vectorised};
  }

  // The bias travels with K.
  __device__ void load_k(int n) {
    CopyK::start(shared_ + T::kK, keys_source(p_.k, n), thread());
    if constexpr (T::kHasBias) {
      const int64_t key = static_cast<int64_t>(n) * kBlockN;
      const char* data = p_.bias.data + block_.b * p_.bias.batch + block_.head * p_.bias.head +
                         sequence_.row_begin * p_.bias.row + key * 2;
      const int keys = static_cast<int>(clamp64(sequence_.keys - key, 0, kBlockN));
      CopyBias::start(shared_ + T::kBias,
                      {data, p_.bias.row, sequence_.rows, keys * 2, p_.bias.vectorised},
                      thread());
    }
  }

  __device__ void load_v(int n) {
    CopyK::start(shared_ + T::kV, keys_source(p_.v, n), thread());
  }

  // The words of the packed mask for this warp's rows, the tile's keys in the low bits.
  __device__ void load_bits(int n, uint32_t (&bits)[kMmaM]) const {
    const int64_t key = static_cast<int64_t>(n) * kBlockN + warp_key();
    const int64_t row_group = (sequence_.row_begin + warp_row()) / kMaskRows;
    const uint32_t* words = p_.mask.bits + block_.b * p_.mask.bits_batch +
                            row_group * p_.mask.bits_row_group + key / kMaskKeys * kWarp + lane();
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
      bits[m] = words[m * p_.mask.bits_row_group] >> bit_of(static_cast<int>(key % kMaskKeys) / 8, 0);
    }
  }

  __device__ void multiply_q_k(float (&s)[kMmaM][kTilesS][4]) const {
    typename Element::Sum acc[kMmaM][kTilesS][4];
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] = kMagicScores ? kMagicBits : 0;
      }
    }
    const auto q = cursor<kRowChunks>(T::kQ, warp_row(), lane_address_rows16(lane()));
    const auto k = cursor<kRowChunks>(T::kK, warp_key(), lane_address_pair(lane()));
#pragma unroll
    for (int step = 0; step < kRowChunks / 2; ++step) {
      uint32_t a[kMmaM][4];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) ptx::ldmatrix_x4(a[m], q.at(m * 16, 2 * step));
#pragma unroll
      for (int n = 0; n < kTilesS; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, k.at(n * 8, 2 * step));
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) {
          Element::mma(acc[m][n], a[m], b[0], b[1]);
          Element::mma(acc[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    scores_of(acc, s);
  }

  // Sums -> scores of positive scale.
  template <class Sum>
  __device__ void scores_of(const Sum (&acc)[kMmaM][kTilesS][4],
                            float (&s)[kMmaM][kTilesS][4]) const {
    const bool negate = !kIsInteger && sign_ < 0.0f;
    const float zero = -kMagic * sign_;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (kMagicScores) {
            s[m][n][e] = fmaf(__int_as_float(acc[m][n][e]), sign_, zero);
          } else if constexpr (kIsInteger) {
            s[m][n][e] = static_cast<float>(acc[m][n][e]) * sign_;
          } else {
            s[m][n][e] = acc[m][n][e];
          }
        }
      }
    }
    if (negate) {
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][n][e] = -s[m][n][e];
        }
      }
    }
  }

  __device__ void add_bias(float (&s)[kMmaM][kTilesS][4]) const {
    constexpr int kChunks = T::kBiasChunks;
    const auto bias =
        cursor<kChunks>(T::kBias, warp_row(), lane_address_rows16(lane()), warp_key() / 8);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; n += 2) {
        uint32_t r[4];  // rows 0..7 and 8..15 of tile n, then of tile n + 1
        ptx::ldmatrix_x4(r, bias.at(m * 16, n));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = BiasElement::unpack(r[i]);
          float* pair_s = &s[m][n + i / 2][i % 2 * 2];
          pair_s[0] = fmaf(pair_s[0], scale_, pair.x * kLog2e);
          pair_s[1] = fmaf(pair_s[1], scale_, pair.y * kLog2e);
        }
      }
    }
  }

  __device__ void mask_band(float (&s)[kMmaM][kTilesS][4], int n) const {
    const int64_t tile_begin = static_cast<int64_t>(n) * kBlockN;
    const int lane = thread() % kWarp;
    const int first_column = warp_key() + accumulator_column(lane, 0);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_row() + m * 16 + accumulator_row(lane, 2 * r);
        const mask::Columns columns =
            mask::columns_of_row(sequence_, p_.band, row, tile_begin, kBlockN);
        const int skipped = columns.first - first_column;
        const auto width = static_cast<unsigned>(columns.last - columns.first);
        const bool empty = columns.last <= columns.first;
#pragma unroll
        for (int i = 0; i < kTilesS; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const bool keep = static_cast<unsigned>(8 * i + c - skipped) < width && !empty;
            if (!keep) s[m][i][2 * r + c] = -kInfinity;
          }
        }
      }
    }
  }

  __device__ void mask_bits(float (&s)[kMmaM][kTilesS][4], const uint32_t (&bits)[kMmaM]) const {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if ((bits[m] & (1u << bit_of(n, e))) != 0) s[m][n][e] = -kInfinity;
        }
      }
    }
  }

  __device__ float* stats_of(int warp_n) const {
    return reinterpret_cast<float*>(shared_ + T::kStats) + warp_n * T::kBlockM;
  }

  __device__ void publish_max(const float (&most)[kMmaM][2]) const {
    if (lane() % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        stats_of(warp_n())[warp_row() + m * 16 + accumulator_row(lane(), 2 * r)] = most[m][r];
      }
    }
  }

  __device__ void merge_max(float (&most)[kMmaM][2]) const {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_row() + m * 16 + accumulator_row(lane(), 2 * r);
        most[m][r] = fmaxf(most[m][r], stats_of(1 - warp_n())[row]);
      }
    }
  }

  // Skipped where no maximum of the warp's rows has grown: multiplying by 1 changes nothing.
  __device__ void rescale_o(const float (&alpha)[kMmaM][2]) {
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) grown |= alpha[m][0] != 1.0f || alpha[m][1] != 1.0f;
    if (!__any_sync(0xffffffffu, grown)) return;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_o[m][n][e] *= alpha[m][e / 2];
      }
    }
  }

  __device__ void multiply_p_v(const float (&s)[kMmaM][kTilesS][4], const float (&alpha)[kMmaM][2]) {
    if constexpr (kIsInteger) {
      multiply_integers(s, alpha);
    } else {
      multiply_floats(s, alpha);
    }
  }

  __device__ void multiply_floats(const float (&s)[kMmaM][kTilesS][4],
                                  const float (&alpha)[kMmaM][2]) {
    constexpr int kSteps = kBlockN / 16;
    if constexpr (kSharesRows) {
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            store_p(m, r, n, Element::pack(s[m][n][2 * r], s[m][n][2 * r + 1]));
          }
        }
      }
      __syncthreads();
    }
    rescale_o(alpha);
    const auto v = cursor<kRowChunks>(T::kV, 0, lane_address_rows16(lane()), 2 * warp_n());
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t p[kMmaM][4];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
        if constexpr (kSharesRows) {
          load_p(p[m], m, step);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = &s[m][2 * step + i / 2][i % 2 * 2];
            p[m][i] = Element::pack(pair[0], pair[1]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesO; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v.at(step * 16, n * T::kWarpsN));
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) {
          Element::mma(acc_o[m][n], p[m], b[0], b[1]);
          Element::mma(acc_o[m][n + 1], p[m], b[2], b[3]);
        }
      }
    }
  }

  // A chunk of P is one accumulator of S, or two of int8.
  __device__ void store_p(int m, int r, int n, uint32_t pair) const {
    const int row = warp_row() + m * 16 + accumulator_row(lane(), 2 * r);
    const int chunk = warp_n() * (kTilesS * 8 * Element::kBytes / kChunkBytes) + n;
    char* to = shared_ + T::kP + chunk_offset<T::kProbabilityChunks>(row, chunk) + lane() % 4 * 4;
    *reinterpret_cast<uint32_t*>(to) = pair;
  }

  __device__ void load_p(uint32_t (&p)[4], int m, int step) const {
    const auto from =
        cursor<T::kProbabilityChunks>(T::kP, warp_row(), lane_address_rows16(lane()));
    ptx::ldmatrix_x4(p, from.at(m * 16, 2 * step));
  }

  // Four accumulators of S hold 32 keys, the length of an int8 fragment. Its byte 4 i + {0, 1, 2,
  // 3} of lane i of a quad is key 2 i + {0, 1, 8, 9}; V's fragments below have the same order.
  template <bool kSaturate>
  __device__ void quantise_p(const float (&s)[kMmaM][kTilesS][4],
                             uint32_t (&p)[kMmaM][kTilesS / 2][2]) const {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; n += 2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* low = &s[m][n][2 * r];
          const float* high = &s[m][n + 1][2 * r];
          p[m][n / 2][r] = quant::pack4<kSaturate>(low[0], low[1], high[0], high[1], scale_p_);
        }
      }
    }
  }

  // O = alpha O + P V in float, the product of a tile being exact. ldmatrix transposes pairs of
  // bytes: after separating the even from the odd channels of a chunk, an accumulator's columns
  // are every other channel (see Mainloop::channel_of).
  __device__ void multiply_integers(const float (&s)[kMmaM][kTilesS][4],
                                    const float (&alpha)[kMmaM][2]) {
    constexpr int kSteps = kBlockN / 32;
    uint32_t halves[kMmaM][kTilesS / 2][2];  // 16 keys each: two of the four words of a fragment
    if (saturate_p_) {
      quantise_p<true>(s, halves);
    } else {
      quantise_p<false>(s, halves);
    }
    uint32_t p[kMmaM][kSteps][4];
    if constexpr (kSharesRows) {
      static_assert(kTilesS == 2 && kSteps == 1);
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
        store_p(m, 0, 0, halves[m][0][0]);
        store_p(m, 1, 0, halves[m][0][1]);
      }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) load_p(p[m][0], m, 0);
    } else {
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int i = 0; i < 4 * kSteps; ++i) p[m][i / 4][i % 4] = halves[m][i / 2][i % 2];
      }
    }
    const auto v = cursor<kRowChunks>(T::kV, 0, lane_address_rows32(lane()), warp_n());
#pragma unroll
    for (int c = 0; c < kTilesO / 2; ++c) {
      int32_t acc[kMmaM][2][4];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[m][e / 4][e % 4] = kMagicBits;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t r[4];
        ptx::ldmatrix_x4_trans(r, v.at(step * 32, c * T::kWarpsN));
        const uint32_t even0 = __byte_perm(r[0], r[1], 0x6420), even1 = __byte_perm(r[2], r[3], 0x6420);
        const uint32_t odd0 = __byte_perm(r[0], r[1], 0x7531), odd1 = __byte_perm(r[2], r[3], 0x7531);
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) {
          Element::mma(acc[m][0], p[m][step], even0, even1);
          Element::mma(acc[m][1], p[m][step], odd0, odd1);
        }
      }
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& o = acc_o[m][2 * c + e / 4][e % 4];
          o = fmaf(o, alpha[m][e % 4 / 2], __int_as_float(acc[m][e / 4][e % 4]) - kMagic);
        }
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
        auto* v = reinterpret_cast<uint4*>(shared_ + T::kV) + key * kRowChunks;
        auto* k = reinterpret_cast<uint4*>(shared_ + T::kK) + key * kRowChunks;
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
  char* shared_;
  float sign_, scale_;
  float scale_p_ = 0.0f;
  bool saturate_p_ = false;
};

}  // namespace pfa::cuda::sm80
