// SPDX-License-Identifier: Apache-2.0
// The one matrix product of the kernels: a strip of rows times a packed panel, both made of 32-bit
// words. A word holds kPack operands next to each other along the contracted axis, so fp32, bf16,
// int16 and int8 differ in their Dot policy alone. Needs the vector vocabulary of this namespace.
//
// A Dot policy:
//   Element, kPack    operand type and how many share a word
//   Acc, kInt         accumulator vector; whether it is int32
//   kPlanes           parts that a value is split into, packed one after the other
//   kGroupAlign       packed rows of q and k are padded to a multiple of so many words
//   Session           what a thread sets up while it attends
//   kDegree           of the exponential's polynomial, by what P's own rounding can tell apart
//   kQuantised        P is rounded to int8 steps (int8 attention)
//   kScaled           q, k, v and P are fixed point with scales chosen by pack.h and softmax.h
//   kUnsignedA        the left operand is unsigned: q is stored as q + 128 and every key panel
//                     starts with the accumulators' initial value, -128 * sum(k)
//   mac               acc += a . b, word by word
//   convert           one row of the source tensor to Elements, zero past d up to padded
//   interleave        kPack such rows to one vector of words, lane i = column i
//   store_p           two vectors of P values, rounded to Element, to `column` of a packed P row
//   load_p            one P value back, for the slow path of non-finite values
#pragma once

namespace pfa::cpu::PFA_ISA {

// count <= kLanes source values as floats; lanes past count are 0.
PFA_INLINE VF load_as_float(DType dtype, const void* row, int64_t d, int count) {
  switch (dtype) {
    case DType::kFloat16:
      return load_f16(static_cast<const uint16_t*>(row) + d, count);
    case DType::kBFloat16:
      return load_bf16(static_cast<const uint16_t*>(row) + d, count);
    default:
      return load_s8(static_cast<const int8_t*>(row) + d, count);
  }
}

// How a row becomes Elements: which of the Dot::kPlanes parts of each value is wanted and, if
// Dot::kScaled, what to multiply by, all channels and (unless null) each.
struct Conversion {
  int plane = 0;
  float scale = 1.0f;
  const float* channel_scales = nullptr;
};

struct NoSession {};  // nothing to set up in a thread

PFA_INLINE int lanes_at(int64_t at, int64_t end) {
  return static_cast<int>(std::clamp<int64_t>(end - at, 0, kLanes));
}

// fp32 products of any input: exact for each pair of fp16, bf16 or int8 operands. int8 sums are
// exact too, 512 * 128 * 128 being below 2^24.
template <bool kQuantise>
struct DotF32 {
  using Element = float;
  using Acc = VF;
  using Session = NoSession;
  static constexpr int kPack = 1, kPlanes = 1, kGroupAlign = 1;
  static constexpr bool kInt = false, kScaled = false, kUnsignedA = false;
  static constexpr bool kQuantised = kQuantise;
  static constexpr int kDegree = kQuantise ? 4 : 5;

  static PFA_INLINE Acc zero() { return splat(0.0f); }
  static PFA_INLINE Acc mac(Acc acc, VI a, VI b) { return fma(as_float(a), as_float(b), acc); }

  static PFA_INLINE void convert(DType dtype, const void* row, int64_t d, int64_t padded,
                                 const Conversion&, Element* out) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(out + i, load_as_float(dtype, row, i, lanes_at(i, d)));
    }
  }
  static PFA_INLINE VI interleave(const Element* rows, int64_t) { return iload(rows); }
  static PFA_INLINE void store_p(uint32_t* row, int column, VF p0, VF p1) {
    float* out = reinterpret_cast<float*>(row) + column;
    store(out, kQuantise ? round_even(p0) : p0);
    store(out + kLanes, kQuantise ? round_even(p1) : p1);
  }
  static float load_p(const uint32_t* row, int column) { return bits_to_float(row[column]); }
};

}  // namespace pfa::cpu::PFA_ISA
