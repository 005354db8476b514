// SPDX-License-Identifier: Apache-2.0
// Checks on the host, without a GPU, that the kernels' own layouts agree with CuTe's: which element
// of an operand each register holds after ldmatrix, which element of an accumulator, and where the
// swizzle puts a chunk; and that no access to shared memory conflicts. `make test-layouts` builds
// it.
//
// ldmatrix itself is modelled here: lane i addresses row i % 8 of matrix i / 8, and receives the
// 16-bit words 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of each matrix, or of its transpose.
#include <cstdio>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/swizzle.hpp>
#include <set>

#include "../../csrc/cuda/sm80/config.cuh"
#include "../../csrc/cuda/sm80/load.cuh"

namespace {

using namespace pfa::cuda;
using MmaF16 = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>;
using MmaS8 = cute::MMA_Traits<cute::SM80_16x8x32_S32S8S8S32_TN>;

int checks = 0, failures = 0;

void expect_equal(int got, int wanted, const char* what, int lane, int value) {
  ++checks;
  if (got == wanted) return;
  if (++failures <= 20) {
    std::printf("%s: lane %d, value %d: %d, but CuTe has %d\n", what, lane, value, got, wanted);
  }
}

struct Element {
  int row, column;
};

// What a lane's 16-bit word `half` of register `matrix` holds after ldmatrix, in 16-bit words.
Element loaded(LaneAddress (*address)(int), int lane, int matrix, int half, bool transposed) {
  const int row = transposed ? 2 * (lane % 4) + half : lane / 4;
  const int word = transposed ? lane / 4 : 2 * (lane % 4) + half;
  const LaneAddress from = address(8 * matrix + row);
  return {from.row, from.chunk * 8 + word};
}

// Both accumulators of the 16-bit and the 8-bit instruction.
template <class Mma>
void check_accumulator(const char* what) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int at = accumulator_row(lane, e) + 16 * accumulator_column(lane, e);
      expect_equal(at, typename Mma::CLayout{}(lane, e), what, lane, e);
    }
  }
}

// A: 16 rows x 2 chunks. Values of kBytes bytes; CuTe numbers them along the registers.
template <class Mma, int kBytes>
void check_a(const char* what) {
  constexpr int kPerRegister = 4 / kBytes;
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int value = 0; value < 4 * kPerRegister; ++value) {
      const int byte = value % kPerRegister * kBytes;
      const Element word = loaded(lane_address_rows16, lane, value / kPerRegister, byte / 2, false);
      const int k = (word.column * 2 + byte % 2) / kBytes;
      expect_equal(word.row + 16 * k, typename Mma::ALayout{}(lane, value), what, lane, value);
    }
  }
}

// B of two n-tiles, n as rows: registers 0 and 1 are the first, 2 and 3 the second.
template <class Mma, int kBytes>
void check_b(const char* what) {
  constexpr int kPerRegister = 4 / kBytes;
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int tile = 0; tile < 2; ++tile) {
      for (int value = 0; value < 2 * kPerRegister; ++value) {
        const int byte = value % kPerRegister * kBytes;
        const int matrix = 2 * tile + value / kPerRegister;
        const Element word = loaded(lane_address_pair, lane, matrix, byte / 2, false);
        const int n = word.row - 8 * tile, k = (word.column * 2 + byte % 2) / kBytes;
        expect_equal(n + 8 * k, typename Mma::BLayout{}(lane, value), what, lane, value);
      }
    }
  }
}

// 16-bit B stored with k as rows (V), read transposed: 16 rows x 2 chunks, one n-tile per chunk.
void check_v16() {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int tile = 0; tile < 2; ++tile) {
      for (int value = 0; value < 4; ++value) {
        const int matrix = 2 * tile + value / 2;
        const Element word = loaded(lane_address_rows16, lane, matrix, value % 2, true);
        const int n = word.column - 8 * tile, k = word.row;
        expect_equal(n + 8 * k, MmaF16::BLayout{}(lane, value), "V, 16 bits", lane, value);
      }
    }
  }
}

// 16-bit P: the accumulators of 16 keys, two by two, are an A operand as they are.
void check_p16() {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int value = 0; value < 8; ++value) {
      const int tile = value / 4, element = value % 4;
      const int k = 8 * tile + accumulator_column(lane, element);
      const int at = accumulator_row(lane, element) + 16 * k;
      expect_equal(at, MmaF16::ALayout{}(lane, value), "P, 16 bits", lane, value);
    }
  }
}

// 8 bits: A's k-th column of P is a key, and B's k-th row of V must be the same one. Byte b of
// register r of P comes from accumulator 2 (r / 2) + b / 2; of V, after __byte_perm has separated
// the even from the odd channels, from register 2 r + b / 2 of ldmatrix.
void check_p_and_v8() {
  int key_of_k[32];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int value = 0; value < 16; ++value) {
      const int r = value / 4, b = value % 4;
      const int element = 2 * (r % 2) + b % 2;
      const int key = 8 * (2 * (r / 2) + b / 2) + accumulator_column(lane, element);
      const int at = MmaS8::ALayout{}(lane, value);
      expect_equal(accumulator_row(lane, element), at % 16, "rows of P, 8 bits", lane, value);
      if (lane < 4) key_of_k[at / 16] = key;
      expect_equal(key, key_of_k[at / 16], "keys of P, 8 bits", lane, value);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int value = 0; value < 8; ++value) {
      const int r = value / 4, b = value % 4;
      const Element word = loaded(lane_address_rows32, lane, 2 * r + b / 2, b % 2, true);
      const int at = MmaS8::BLayout{}(lane, value);
      expect_equal(word.row, key_of_k[at / 8], "keys of V, 8 bits", lane, value);
      expect_equal(word.column, at % 8, "pairs of channels of V, 8 bits", lane, value);
    }
  }
}

// Rows of a power of two of chunks: the swizzle is one of CuTe's.
template <int kChunks>
void check_swizzle() {
  constexpr int kBits = kChunks >= 8 ? 3 : kChunks == 4 ? 2 : 1;
  // Bits of a byte address: 4 of a chunk, then the chunk, then the row.
  constexpr int kRowBits = kChunks == 64 ? 6 : kChunks == 32 ? 5 : kChunks == 16 ? 4 : 3;
  const cute::Swizzle<kBits, 4, kRowBits> swizzle{};
  for (int row = 0; row < 64; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int plain = (row * kChunks + chunk) * kChunkBytes;
      expect_equal(chunk_offset<kChunks>(row, chunk), swizzle(plain), "swizzle", row, chunk);
    }
  }
}

// A wavefront of 16-byte accesses is 8 lanes: they must touch all 32 banks.
template <class Offset>
void check_banks(const char* what, int chunks, const Offset& offset) {
  for (int phase = 0; phase < 4; ++phase) {
    std::set<int> touched;
    for (int lane = 8 * phase; lane < 8 * phase + 8; ++lane) touched.insert(offset(lane) / 16 % 8);
    expect_equal(static_cast<int>(touched.size()), 8, what, chunks, phase);
  }
}

template <int kChunks>
void check_tile(int rows) {
  std::set<int> offsets;
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) offsets.insert(chunk_offset<kChunks>(row, chunk));
  }
  expect_equal(static_cast<int>(offsets.size()), rows * kChunks, "chunks in one place", kChunks, 0);
  expect_equal(*offsets.rbegin(), (rows * kChunks - 1) * kChunkBytes, "tile size", kChunks, 0);

  for (const auto address : {lane_address_rows16, lane_address_pair, lane_address_rows32}) {
    const int chunk_step = address == lane_address_rows32 ? 1 : 2;
    for (int row = 0; row + address(31).row < rows; row += 8) {
      for (int chunk = 0; chunk + chunk_step <= kChunks; chunk += chunk_step) {
        const auto offset = [&](int lane) {
          const LaneAddress own = address(lane);
          const LaneCursor<kChunks> cursor{
              static_cast<uint32_t>(chunk_offset<kChunks>(own.row, own.chunk))};
          const int moved = static_cast<int>(cursor.at(row, chunk));
          expect_equal(moved, chunk_offset<kChunks>(row + own.row, chunk + own.chunk), "cursor",
                       lane, chunk);
          return moved;
        };
        check_banks("bank conflicts of ldmatrix", kChunks, offset);
      }
    }
  }
}

template <class Copy, int kChunks>
void check_copy() {
  const auto offset = [](int lane) {
    return chunk_offset<kChunks>(lane / Copy::kLanes, lane % Copy::kLanes);
  };
  check_banks("bank conflicts of cp.async", kChunks, offset);
}

// Everything that one kernel keeps in shared memory.
template <class Element, int kHeadDim, bool kHasBias, bool kCompact>
void check_kernel() {
  using T = sm80::Traits<Element, kHeadDim, mask::Band, kHasBias, kCompact>;
  check_tile<T::kRowChunks>(T::kBlockM);
  check_copy<sm80::TileCopy<T::kBlockN, T::kRowChunks, T::kThreads, Element::kBytes>,
             T::kRowChunks>();
  if constexpr (kHasBias) check_tile<T::kBiasChunks>(T::kBlockM);
  if constexpr (T::kWarpsN > 1) check_tile<T::kProbabilityChunks>(T::kBlockM);
}

template <class Element, int... kHeadDims>
void check_kernels() {
  (check_kernel<Element, kHeadDims, false, false>(), ...);
  (check_kernel<Element, kHeadDims, true, false>(), ...);
  (check_kernel<Element, kHeadDims, true, true>(), ...);
}

}  // namespace

int main() {
  check_accumulator<MmaF16>("accumulator, 16 bits");
  check_accumulator<MmaS8>("accumulator, 8 bits");
  check_a<MmaF16, 2>("Q, 16 bits");
  check_a<MmaS8, 1>("Q, 8 bits");
  check_b<MmaF16, 2>("K, 16 bits");
  check_b<MmaS8, 1>("K, 8 bits");
  check_v16();
  check_p16();
  check_p_and_v8();
  check_swizzle<4>();
  check_swizzle<8>();
  check_swizzle<16>();
  check_swizzle<32>();
  check_swizzle<64>();
  check_kernels<Float16, 64, 96, 128, 192, 256, 384, 512>();
  check_kernels<Int8, 64, 96, 128, 192, 256, 384, 512>();
  std::printf("layouts: %d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
