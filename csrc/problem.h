// SPDX-License-Identifier: Apache-2.0
// What one call asks of a backend: plain data, no torch. ops/validate.cpp is the only writer; every
// backend may rely on the ranges stated here. All strides count elements and may be 0 (broadcast).
#pragma once

#include <cstdint>

namespace pfa {

enum class DType : uint8_t { kFloat16, kBFloat16, kInt8 };

// A (batch, head, row, head_dim) tensor; head_dim is contiguous.
template <class T>
struct TensorView {
  T* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};
using InputView = TensorView<const void>;
using OutputView = TensorView<void>;

// Query i may see key j only if lo <= j - i - anchor <= hi, where anchor is 0, or
// seqused_k[b] - seqused_q[b] when the band hangs at the bottom right corner.
struct Band {
  static constexpr int64_t kUnbounded = int64_t{1} << 60;  // i + anchor + kUnbounded fits in int64
  int64_t lo = -kUnbounded;
  int64_t hi = kUnbounded;
  bool bottom_right = false;
};

// (batch, seqlen_q, seqlen_k), one byte per pair, nonzero = masked OUT; keys contiguous.
// It is applied on top of the band. data is null when there is no mask.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
};

// (batch, head, seqlen_q, seqlen_k), added to the scaled scores; keys contiguous.
// Float16, or BFloat16 when q is BFloat16. data is null when there is no bias.
struct Bias {
  const void* data = nullptr;
  DType dtype = DType::kFloat16;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};

// One scale for all channels (stride 0) or one per (head, head_dim) channel (stride 1), in the
// memory of the call's device. kPacked64 keeps the float's bits in the low half of a 64-bit word.
enum class ScaleType : uint8_t { kFloat32, kBFloat16, kPacked64 };
struct Scale {
  const void* data = nullptr;  // null: not given, or given by value
  ScaleType type = ScaleType::kFloat32;
  int64_t stride = 0;
  bool given_by_value = false;  // CUDA backend only: one scale, in value instead of in data
  float value = 0.0f;

  [[nodiscard]] constexpr bool given() const { return data != nullptr || given_by_value; }
};

// Lengths that only the device knows: one integer per batch element, of any value. Whoever reads
// them clamps them to [0, seqlen].
struct DeviceLengths {
  const void* data = nullptr;  // (batch), int64 or int32; null: not given
  int64_t stride = 0;
  bool is_int64 = false;
};

// S = Q K^T and P = softmax(S). The first three are given exactly when q, k, v are int8; scale_out
// exactly when the output is int8; offset_out only with scale_out, 0 where not given.
struct Quant {
  Scale descale_s;   // deq_scale1: S of int8 inputs -> real
  Scale scale_p;     // quant_scale1: P -> int8
  Scale descale_o;   // deq_scale2: int8 P times int8 V -> real
  Scale scale_out;   // quant_scale2: O -> int8
  Scale offset_out;  // quant_offset2
};

struct Problem {
  int64_t batch = 0;                  // >= 1
  int64_t num_heads = 0;              // >= 1
  int64_t num_heads_k = 0;            // divides num_heads
  int64_t seqlen_q = 0;               // >= 1
  int64_t seqlen_k = 0;               // >= 0
  int64_t head_dim = 0;               // 1..512
  DType dtype = DType::kFloat16;      // of q, k and v
  DType dtype_out = DType::kFloat16;  // of out
  float softmax_scale = 1.0f;
  InputView q;     // (batch, num_heads, seqlen_q, head_dim)
  InputView k, v;  // (batch, num_heads_k, seqlen_k, head_dim)
  OutputView out;  // (batch, num_heads, seqlen_q, head_dim), every element is written
  // (batch, num_heads, seqlen_q) dense, every element is written: the natural logarithm of the sum
  // of exp(score) over a row's keys, -inf for a row without one. Null: not wanted.
  float* lse = nullptr;
  Band band;
  Mask mask;
  Bias bias;
  Quant quant;
  const int64_t* seqused_q = nullptr;  // (batch) on the host, each in [0, seqlen_q]; null: all rows
  const int64_t* seqused_k = nullptr;  // (batch) on the host, each in [0, seqlen_k]; null: all keys
  DeviceLengths device_seqused_q;      // CUDA backend only, instead of seqused_q
  DeviceLengths device_seqused_k;

  [[nodiscard]] int64_t rows_used(int64_t b) const { return seqused_q ? seqused_q[b] : seqlen_q; }
  [[nodiscard]] int64_t keys_used(int64_t b) const { return seqused_k ? seqused_k[b] : seqlen_k; }
  [[nodiscard]] int64_t heads_per_group() const { return num_heads / num_heads_k; }
};

}  // namespace pfa
