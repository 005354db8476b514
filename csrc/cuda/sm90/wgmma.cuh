// SPDX-License-Identifier: Apache-2.0
// The products of a warpgroup: 64 rows, kN columns, 16 terms, sums in float.
//
// An accumulator is float[kN / 8][4]: a warp's 16 of the 64 rows, in the m16n8 layout of
// fragment.cuh. All of this is asynchronous: registers may be read or written again only after
// ptx::wgmma_wait, and hold() keeps the compiler to it.
#pragma once

#include "../element.cuh"
#include "ptx.cuh"

namespace pfa::cuda::sm90 {

// How an operand lies in shared memory: rows of kRowBytes = 128, 64 or 32 bytes, swizzled at
// that width. Only the low word differs between operands: it alone takes a register.
template <int kRowBytes>
struct Descriptor {
  uint32_t low;

  // Of the tile at a multiple of 8 rows. `block_bytes`: from one block of kRowBytes columns to the
  // next, for an operand that is read transposed; otherwise ignored. An address has 18 bits: above
  // them it carries the block's rank in its cluster, which must not reach block_bytes.
  __device__ static Descriptor of(uint32_t shared, int block_bytes) {
    constexpr uint32_t kAddressBits = (1 << 18) - 1;
    return of_chunk((shared & kAddressBits) >> 4, block_bytes);
  }
  __device__ static Descriptor of_chunk(uint32_t shared, int block_bytes) {
    return {shared + (static_cast<uint32_t>(block_bytes >> 4) << 16)};
  }
  // That many bytes further on. Shared memory ends before the addresses' 18 bits do.
  [[nodiscard]] __device__ uint64_t at(int bytes) const {
    constexpr uint32_t kLayout = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
    static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
    return ptx::pair_of_words(low + static_cast<uint32_t>(bytes >> 4),
                              static_cast<uint32_t>(8 * kRowBytes >> 4) | kLayout << 30);
  }
};

// Keeps the compiler from moving reads and writes of these registers across this point.
__device__ __forceinline__ void hold(float& c) { asm volatile("" : "+f"(c)::"memory"); }
__device__ __forceinline__ void hold(int32_t& c) { asm volatile("" : "+r"(c)::"memory"); }
template <class Sum, int kTiles>
__device__ __forceinline__ void hold(Sum (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) hold(c[n][e]);
  }
}

// c = a b^T, or c += a b^T: both operands in shared memory, their terms contiguous.
template <class Element, int kTiles>
__device__ void wgmma_ss(float (&c)[kTiles][4], uint64_t a, uint64_t b, bool accumulate);

// c += a b: both in shared memory, a's terms contiguous and b's columns.
template <class Element, int kTiles>
__device__ void wgmma_ss_columns(float (&c)[kTiles][4], uint64_t a, uint64_t b);

// c += a b: a in registers, as the A operand of mma.m16n8k16; b in shared memory, columns
// contiguous.
template <class Element, int kTiles>
__device__ void wgmma_rs(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b);

// Sixteen columns of an accumulator: 8 registers.
#define PFA_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PFA_REGISTERS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define PFA_REGISTERS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define PFA_REGISTERS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define PFA_REGISTERS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define PFA_REGISTERS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define PFA_REGISTERS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define PFA_REGISTERS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define PFA_REGISTERS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define PFA_REGISTERS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define PFA_REGISTERS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define PFA_REGISTERS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define PFA_REGISTERS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define PFA_REGISTERS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define PFA_REGISTERS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define PFA_REGISTERS_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define PFA_LIST_2 PFA_REGISTERS_0 ", " PFA_REGISTERS_1
#define PFA_LIST_3 PFA_LIST_2 ", " PFA_REGISTERS_2
#define PFA_LIST_4 PFA_LIST_3 ", " PFA_REGISTERS_3
#define PFA_LIST_5 PFA_LIST_4 ", " PFA_REGISTERS_4
#define PFA_LIST_6 PFA_LIST_5 ", " PFA_REGISTERS_5
#define PFA_LIST_7 PFA_LIST_6 ", " PFA_REGISTERS_6
#define PFA_LIST_8 PFA_LIST_7 ", " PFA_REGISTERS_7
#define PFA_LIST_9 PFA_LIST_8 ", " PFA_REGISTERS_8
#define PFA_LIST_10 PFA_LIST_9 ", " PFA_REGISTERS_9
#define PFA_LIST_11 PFA_LIST_10 ", " PFA_REGISTERS_10
#define PFA_LIST_12 PFA_LIST_11 ", " PFA_REGISTERS_11
#define PFA_LIST_13 PFA_LIST_12 ", " PFA_REGISTERS_12
#define PFA_LIST_14 PFA_LIST_13 ", " PFA_REGISTERS_13
#define PFA_LIST_15 PFA_LIST_14 ", " PFA_REGISTERS_14
#define PFA_LIST_16 PFA_LIST_15 ", " PFA_REGISTERS_15
#define PFA_SUMS(i)                                                           \
  "+f"(c[2 * i][0]), "+f"(c[2 * i][1]), "+f"(c[2 * i][2]), "+f"(c[2 * i][3]), \
      "+f"(c[2 * i + 1][0]), "+f"(c[2 * i + 1][1]), "+f"(c[2 * i + 1][2]), "+f"(c[2 * i + 1][3])
#define PFA_SUMS_1 PFA_SUMS(0)
#define PFA_SUMS_2 PFA_SUMS_1, PFA_SUMS(1)
#define PFA_SUMS_3 PFA_SUMS_2, PFA_SUMS(2)
#define PFA_SUMS_4 PFA_SUMS_3, PFA_SUMS(3)
#define PFA_SUMS_5 PFA_SUMS_4, PFA_SUMS(4)
#define PFA_SUMS_6 PFA_SUMS_5, PFA_SUMS(5)
#define PFA_SUMS_7 PFA_SUMS_6, PFA_SUMS(6)
#define PFA_SUMS_8 PFA_SUMS_7, PFA_SUMS(7)
#define PFA_SUMS_9 PFA_SUMS_8, PFA_SUMS(8)
#define PFA_SUMS_10 PFA_SUMS_9, PFA_SUMS(9)
#define PFA_SUMS_11 PFA_SUMS_10, PFA_SUMS(10)
#define PFA_SUMS_12 PFA_SUMS_11, PFA_SUMS(11)
#define PFA_SUMS_13 PFA_SUMS_12, PFA_SUMS(12)
#define PFA_SUMS_14 PFA_SUMS_13, PFA_SUMS(13)
#define PFA_SUMS_15 PFA_SUMS_14, PFA_SUMS(14)
#define PFA_SUMS_16 PFA_SUMS_15, PFA_SUMS(15)

// kPairs: accumulators / 2. i0 and on: the numbers of the operands behind the accumulator.
#define PFA_WGMMA_SS(Element, kType, kN, kPairs, i0, i1, i2)                         \
  template <>                                                                        \
  __device__ __forceinline__ void wgmma_ss<Element, 2 * kPairs>(                     \
      float (&c)[2 * kPairs][4], uint64_t a, uint64_t b, bool accumulate) {          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                            \
                 ", 0;\n"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType  \
                 " {" PFA_LIST_##kPairs "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, 0;\n}\n" \
                 : PFA_SUMS_##kPairs                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));               \
  }
#define PFA_WGMMA_SS_COLUMNS(Element, kType, kN, kPairs, i0, i1)                                   \
  template <>                                                                                      \
  __device__ __forceinline__ void wgmma_ss_columns<Element, 2 * kPairs>(float (&c)[2 * kPairs][4], \
                                                                        uint64_t a, uint64_t b) {  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType                \
                 " {" PFA_LIST_##kPairs "}, %" #i0 ", %" #i1 ", 1, 1, 1, 0, 1;\n"                  \
                 : PFA_SUMS_##kPairs                                                               \
                 : "l"(a), "l"(b));                                                                \
  }
#define PFA_WGMMA_RS(Element, kType, kN, kPairs, i0, i1, i2, i3, i4)                         \
  template <>                                                                                \
  __device__ __forceinline__ void wgmma_rs<Element, 2 * kPairs>(                             \
      float (&c)[2 * kPairs][4], const uint32_t (&a)[4], uint64_t b) {                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType          \
                 " {" PFA_LIST_##kPairs "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 \
                                        ", 1, 1, 1, 1;\n"                                    \
                 : PFA_SUMS_##kPairs                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                      \
  }
#define PFA_WGMMA(kN, kPairs, i0, i1, i2, i3, i4)              \
  PFA_WGMMA_SS(Float16, "f16", kN, kPairs, i0, i1, i2)         \
  PFA_WGMMA_SS(BFloat16, "bf16", kN, kPairs, i0, i1, i2)       \
  PFA_WGMMA_SS_COLUMNS(Float16, "f16", kN, kPairs, i0, i1)     \
  PFA_WGMMA_SS_COLUMNS(BFloat16, "bf16", kN, kPairs, i0, i1)   \
  PFA_WGMMA_RS(Float16, "f16", kN, kPairs, i0, i1, i2, i3, i4) \
  PFA_WGMMA_RS(BFloat16, "bf16", kN, kPairs, i0, i1, i2, i3, i4)

PFA_WGMMA(64, 4, 32, 33, 34, 35, 36)
PFA_WGMMA(80, 5, 40, 41, 42, 43, 44)
PFA_WGMMA(96, 6, 48, 49, 50, 51, 52)
PFA_WGMMA(128, 8, 64, 65, 66, 67, 68)
PFA_WGMMA(192, 12, 96, 97, 98, 99, 100)
PFA_WGMMA(256, 16, 128, 129, 130, 131, 132)

#undef PFA_WGMMA
#undef PFA_WGMMA_RS
#undef PFA_WGMMA_SS_COLUMNS
#undef PFA_WGMMA_SS
#undef PFA_SUMS

}  // namespace pfa::cuda::sm90
