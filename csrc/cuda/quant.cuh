// SPDX-License-Identifier: Apache-2.0
// Scales, and the int8 arithmetic of scores, probabilities and outputs.
//
// Integers become floats by adding them to the bits of kMagic = 1.5 * 2^23, where neighbouring
// floats are 1 apart: exact for magnitudes below 2^22, and a plain addition on every GPU, where
// sm_80 converts integers at an eighth of that rate. The same constant rounds a float to the
// nearest integer, ties to even, into the low bits of a sum.
#pragma once

#include <cuda_bf16.h>

#include "element.cuh"
#include "fragment.cuh"
#include "params.h"

namespace pfa::cuda {

constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;

__device__ __forceinline__ float read_scale(const Scale& scale, int64_t channel = 0) {
  if (scale.given_by_value) return scale.value;
  const int64_t at = channel * scale.stride;
  switch (scale.type) {
    case ScaleType::kFloat32:
      return static_cast<const float*>(scale.data)[at];
    case ScaleType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(scale.data)[at]);
    default:
      return __uint_as_float(static_cast<uint32_t>(static_cast<const uint64_t*>(scale.data)[at]));
  }
}

// Factor of a sum of products in q k^T.
__device__ __forceinline__ float real_scale(const Params& p) {
  return p.quant.descale_s.given() ? p.softmax_scale * read_scale(p.quant.descale_s)
                                   : p.softmax_scale;
}

// What one unit of a score is worth in powers of two: scores with a bias are real, others are sums
// of positive scale. A scale of zero becomes the smallest float, with which -inf remains -inf; one
// so large that the product overflowed would make NaN of the difference of equal scores.
PFA_HOST_DEVICE float score_unit(float scale, bool has_bias) {
  constexpr float kLog2e = 1.4426950408889634f, kSmallest = 1.4e-45f, kLargest = 1e30f;
  if (has_bias) return kLog2e;
  return fminf(fmaxf(fabsf(scale) * kLog2e, kSmallest), kLargest);
}
__device__ __forceinline__ float score_unit(const Params& p) {
  return p.quant.descale_s.given() ? score_unit(real_scale(p), p.bias.data != nullptr)
                                   : p.score_unit;
}

// Scale and offset of an int8 output's channel.
__device__ __forceinline__ float2 output_scale(const Quant& quant, int64_t channel) {
  const float offset = quant.offset_out.given() ? read_scale(quant.offset_out, channel) : 0.0f;
  return make_float2(read_scale(quant.scale_out, channel), offset);
}

// Do all channels have the same?
__device__ __forceinline__ bool has_one_output_scale(const Quant& quant) {
  const auto is_one = [](const Scale& scale) { return scale.given_by_value || scale.stride == 0; };
  return is_one(quant.scale_out) && (!quant.offset_out.given() || is_one(quant.offset_out));
}

// An int8 in the lowest byte, above which there is something: half to even, saturated; NaN is -128.
__device__ __forceinline__ uint32_t quantise_output(float out, float scale, float offset) {
  return __float_as_uint(fminf(fmaxf(fmaf(out, scale, offset), -128.0f), 127.0f) + kMagic);
}

namespace quant {

// q, k and v are floats: a score is the sum itself, and P is rounded to their type.
struct None {
  static constexpr bool kIsInteger = false;
};

// q, k and v are int8: S is exact in int32, P is rounded to quant.scale_p steps.
struct PerTensor {
  static constexpr bool kIsInteger = true;
};

template <class Element>
struct PolicyOf {
  using Type = None;
};
template <>
struct PolicyOf<Int8> {
  using Type = PerTensor;
};
template <class Element>
using Of = typename PolicyOf<Element>::Type;

// Four probabilities times scale, as int8 in ascending bytes.
template <bool kSaturate>
__device__ __forceinline__ uint32_t pack4(float a, float b, float c, float d, float scale) {
  const auto rounded = [scale](float p) {
    if (!kSaturate) return __float_as_uint(fmaf(p, scale, kMagic));
    return __float_as_uint(fminf(fmaxf(p * scale, -128.0f), 127.0f) + kMagic);
  };
  const uint32_t low = __byte_perm(rounded(a), rounded(b), 0x0040);
  const uint32_t high = __byte_perm(rounded(c), rounded(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

}  // namespace quant
}  // namespace pfa::cuda
