// SPDX-License-Identifier: Apache-2.0
// The kernels for any processor: every dtype through fp32.
#include "target.h"

#define PFA_ISA portable
namespace pfa::cpu::PFA_ISA {
// As for AVX2: SSE2 and NEON have at least 16 vector registers.
constexpr int kRows = 6, kVectors = 2, kColumnStep = 8;
}  // namespace pfa::cpu::PFA_ISA

// clang-format off: each builds on those above it
#include "simd_portable.h"
#include "dot.h"
#include "pack.h"
#include "block.h"
#include "softmax.h"
#include "strip_vector.h"
#include "attend.h"
// clang-format on

namespace pfa::cpu {
namespace portable {
const Kernel kFloat = make_kernel<DotF32<false>>();
const Kernel kInt8 = make_kernel<DotF32<true>>();
}  // namespace portable

const Kernel* portable_kernel(DType dtype) {
  return dtype == DType::kInt8 ? &portable::kInt8 : &portable::kFloat;
}

}  // namespace pfa::cpu
