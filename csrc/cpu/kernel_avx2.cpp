// SPDX-License-Identifier: Apache-2.0
// The kernels for processors with AVX2, FMA and F16C: every dtype through fp32. An int8 product
// through 16-bit pairs would take as many instructions as the fp32 FMA, which is exact here.
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

PFA_TARGET_BEGIN("avx2,fma,f16c")
#define PFA_ISA avx2
namespace pfa::cpu::PFA_ISA {
// 6 x 2 accumulators, 2 loads and a broadcast fill the 16 vector registers.
constexpr int kRows = 6, kVectors = 2, kColumnStep = 16;
}  // namespace pfa::cpu::PFA_ISA

// clang-format off: each builds on those above it
#include "simd_avx2.h"
#include "dot.h"
#include "pack.h"
#include "block.h"
#include "softmax.h"
#include "strip_vector.h"
#include "attend.h"
// clang-format on

namespace pfa::cpu::avx2 {
const Kernel kFloat = make_kernel<DotF32<false>>();
const Kernel kInt8 = make_kernel<DotF32<true>>();
}  // namespace pfa::cpu::avx2
PFA_TARGET_END

namespace pfa::cpu {
const Kernel* avx2_kernel(DType dtype) {
  return dtype == DType::kInt8 ? &avx2::kInt8 : &avx2::kFloat;
}
}  // namespace pfa::cpu

#else

namespace pfa::cpu {
const Kernel* avx2_kernel(DType) { return nullptr; }
}  // namespace pfa::cpu

#endif
