// SPDX-License-Identifier: Apache-2.0
// The integer products of a warpgroup: 64 rows, kN columns, 32 terms, sums in int32; otherwise as
// wgmma.cuh. Both operands have their terms contiguous: there is no transposed form for 8 bits.
#pragma once

#include "wgmma.cuh"

namespace pfa::cuda::sm90 {

// c = a b^T, or c += a b^T: both operands in shared memory.
template <class Element, int kTiles>
__device__ void wgmma_ss(int32_t (&c)[kTiles][4], uint64_t a, uint64_t b, bool accumulate);

// c += a b^T with a in registers, as the A operand of mma.m16n8k32.
template <class Element, int kTiles>
__device__ void wgmma_rs(int32_t (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b);

#define PFA_SUM4(x) "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
#define PFA_SUMS(i) PFA_SUM4(c[2 * i]), PFA_SUM4(c[2 * i + 1])

// kPairs: accumulators / 2. i0 and on: the numbers of the operands behind the accumulator.
#define PFA_WGMMA_SS(kN, kPairs, i0, i1, i2)                                                 \
  template <>                                                                                \
  __device__ __forceinline__ void wgmma_ss<Int8, 2 * kPairs>(                                \
      int32_t (&c)[2 * kPairs][4], uint64_t a, uint64_t b, bool accumulate) {                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                    \
                 ", 0;\n"                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #kN "k32.s32.s8.s8 {" PFA_LIST_##kPairs \
                 "}, %" #i0 ", %" #i1 ", p;\n}\n"                                            \
                 : PFA_SUMS_##kPairs                                                         \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                       \
  }
#define PFA_WGMMA_RS(kN, kPairs, i0, i1, i2, i3, i4)                                               \
  template <>                                                                                      \
  __device__ __forceinline__ void wgmma_rs<Int8, 2 * kPairs>(int32_t (&c)[2 * kPairs][4],          \
                                                             const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k32.s32.s8.s8 {" PFA_LIST_##kPairs       \
                 "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", 1;\n"                     \
                 : PFA_SUMS_##kPairs                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
  }
#define PFA_WGMMA(kN, kPairs, i0, i1, i2, i3, i4) \
  PFA_WGMMA_SS(kN, kPairs, i0, i1, i2)            \
  PFA_WGMMA_RS(kN, kPairs, i0, i1, i2, i3, i4)

PFA_WGMMA(32, 2, 16, 17, 18, 19, 20)
PFA_WGMMA(64, 4, 32, 33, 34, 35, 36)
PFA_WGMMA(96, 6, 48, 49, 50, 51, 52)
PFA_WGMMA(128, 8, 64, 65, 66, 67, 68)
PFA_WGMMA(160, 10, 80, 81, 82, 83, 84)
PFA_WGMMA(192, 12, 96, 97, 98, 99, 100)
PFA_WGMMA(224, 14, 112, 113, 114, 115, 116)
PFA_WGMMA(256, 16, 128, 129, 130, 131, 132)

#undef PFA_WGMMA
#undef PFA_WGMMA_RS
#undef PFA_WGMMA_SS
#undef PFA_SUMS
#undef PFA_SUM4

}  // namespace pfa::cuda::sm90
