// SPDX-License-Identifier: Apache-2.0
// The AMX tile unit: eight registers of 16 rows x 64 bytes. Defining PFA_EMULATE_AMX replaces it by
// a model in plain C++, so that the kernels can be tested on any processor with AVX-512.
#pragma once

namespace pfa::cpu::PFA_ISA {

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;  // 32-bit words in a tile row

#if defined(PFA_EMULATE_AMX)

struct EmulatedTiles {
  alignas(64) uint32_t words[8][kTileRows][kTileWords];
};
inline thread_local EmulatedTiles emulated_tiles;

struct TileSession {
  TileSession() { std::memset(&emulated_tiles, 0, sizeof emulated_tiles); }
};

template <int kTile>
void tile_zero() {
  std::memset(emulated_tiles.words[kTile], 0, sizeof emulated_tiles.words[kTile]);
}
template <int kTile>
void tile_load(const uint32_t* p, int64_t stride_words) {
  for (int r = 0; r < kTileRows; ++r) {
    std::memcpy(emulated_tiles.words[kTile][r], p + r * stride_words, 64);
  }
}
template <int kTile>
void tile_store(uint32_t* p, int64_t stride_words) {
  for (int r = 0; r < kTileRows; ++r) {
    std::memcpy(p + r * stride_words, emulated_tiles.words[kTile][r], 64);
  }
}
// c[m][n] += sum over k of product(word a[m][k], word b[k][n])
template <int kC, int kA, int kB, class Sum, class Product>
void tile_multiply(const Product& product) {
  auto& tiles = emulated_tiles.words;
  for (int m = 0; m < kTileRows; ++m) {
    for (int n = 0; n < kTileWords; ++n) {
      Sum sum;
      std::memcpy(&sum, &tiles[kC][m][n], 4);
      for (int k = 0; k < kTileWords; ++k) sum += product(tiles[kA][m][k], tiles[kB][k][n]);
      std::memcpy(&tiles[kC][m][n], &sum, 4);
    }
  }
}
template <int kC, int kA, int kB>
void tile_dot_bf16() {
  tile_multiply<kC, kA, kB, float>([](uint32_t a, uint32_t b) {
    return bits_to_float(a << 16) * bits_to_float(b << 16) +
           bits_to_float(a & 0xffff0000u) * bits_to_float(b & 0xffff0000u);
  });
}
template <int kC, int kA, int kB, bool kUnsigned>
void tile_dot_int8() {
  tile_multiply<kC, kA, kB, int32_t>([](uint32_t a, uint32_t b) {
    int32_t sum = 0;
    for (int shift = 0; shift < 32; shift += 8) {
      const auto byte = static_cast<uint8_t>(a >> shift);
      sum += (kUnsigned ? int32_t{byte} : int32_t{static_cast<int8_t>(byte)}) *
             static_cast<int8_t>(b >> shift);
    }
    return sum;
  });
}

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the tiles of this thread and frees them at the end: a thread that keeps tile state
// pays for it at every context switch.
struct TileSession {
  TileSession() {
    static constexpr TileConfig kConfig;
    asm volatile("ldtilecfg %0" : : "m"(kConfig));
  }
  ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int kTile>
PFA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
PFA_INLINE void tile_load(const uint32_t* p, int64_t stride_words) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(p), "r"(stride_words * 4), "i"(kTile)
               : "memory");
}
template <int kTile>
PFA_INLINE void tile_store(uint32_t* p, int64_t stride_words) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(p), "r"(stride_words * 4), "i"(kTile)
               : "memory");
}
template <int kC, int kA, int kB>
PFA_INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB, bool kUnsigned>
PFA_INLINE void tile_dot_int8() {
  if constexpr (kUnsigned) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  } else {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
}

#endif

}  // namespace pfa::cpu::PFA_ISA
