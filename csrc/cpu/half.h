// SPDX-License-Identifier: Apache-2.0
// Scalar conversions between float and the two 16-bit formats, round to nearest even, for any
// processor, and reading of scales. Vector code has its own conversions; both give the same bits
// for every value but NaN payloads.
#pragma once

#include <cstdint>
#include <cstring>

#include "../problem.h"

namespace pfa::cpu {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t{h} << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
    const float magnitude = static_cast<float>(mantissa) * bits_to_float(0x33800000u);
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline uint16_t float_to_f16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude <
      0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    const uint32_t aligned = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (aligned - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// The scale of a channel, (head, head_dim) flattened.
inline float read_scale(const Scale& scale, int64_t channel) {
  const int64_t i = channel * scale.stride;
  switch (scale.type) {
    case ScaleType::kFloat32:
      return static_cast<const float*>(scale.data)[i];
    case ScaleType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(scale.data)[i]);
    default:
      return bits_to_float(static_cast<uint32_t>(static_cast<const uint64_t*>(scale.data)[i]));
  }
}

}  // namespace pfa::cpu
