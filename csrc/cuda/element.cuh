// SPDX-License-Identifier: Apache-2.0
// Element policies: what q, k and v hold, and the instruction that multiplies them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../problem.h"
#include "sm80/ptx.cuh"

namespace pfa::cuda {

struct Float16 {
  static constexpr const char* kName = "float16";
  static constexpr int kBytes = 2;
  using Sum = float;  // of products
  static constexpr uint32_t kExponent = 0x7c007c00, kExponentStep = 0x04000400;

  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_f16(c, a, b0, b1);
  }
  __device__ static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float2 unpack(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
};

struct BFloat16 {
  static constexpr const char* kName = "bfloat16";
  static constexpr int kBytes = 2;
  using Sum = float;
  static constexpr uint32_t kExponent = 0x7f807f80, kExponentStep = 0x00800080;

  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(c, a, b0, b1);
  }
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float2 unpack(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};

struct Int8 {
  static constexpr const char* kName = "int8";
  static constexpr int kBytes = 1;
  using Sum = int32_t;

  __device__ static void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_s8(c, a, b0, b1);
  }
};

// The 16-bit type of the bias beside an element, and of the output where that is not int8.
template <class Element>
struct HalfOf {
  using Type = Element;
};
template <>
struct HalfOf<Int8> {
  using Type = Float16;
};
template <class Element>
using Half = typename HalfOf<Element>::Type;

// Is either half of the pair an infinity or a NaN? An exponent of ones carries into the sign bit.
template <class Element>
__device__ __forceinline__ bool has_nonfinite(uint32_t pair) {
  return (((pair & Element::kExponent) + Element::kExponentStep) & 0x80008000u) != 0;
}

}  // namespace pfa::cuda
