// SPDX-License-Identifier: Apache-2.0
// The kernels for processors with AVX-512 and VNNI, with and without AVX512_BF16.
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

PFA_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define PFA_ISA avx512
namespace pfa::cpu::PFA_ISA {
// 6 x 4 accumulators, 4 loads and a broadcast fill the 32 vector registers.
// Narrower steps than a panel are not measured here.
constexpr int kRows = 6, kVectors = 4, kColumnStep = kPanel;
}  // namespace pfa::cpu::PFA_ISA

// clang-format off: each builds on those above it
#include "simd_avx512.h"
#include "dot.h"
#include "pack.h"
#include "dots_avx512.h"
#include "dot_fixed.h"
#include "block.h"
#include "softmax.h"
#include "strip_vector.h"
#include "attend.h"
#include "fixed_point.h"
// clang-format on

namespace pfa::cpu::avx512 {
const Kernel kBf16 = make_kernel<DotBf16>();
const Kernel kFp16 = make_kernel<DotI16>();
const Kernel kFp32 = make_kernel<DotF32<false>>();
const Kernel kInt8 = make_kernel<DotI8>();
}  // namespace pfa::cpu::avx512
PFA_TARGET_END

namespace pfa::cpu {

const Kernel* avx512_vnni_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return &avx512::kFp16;
    case DType::kBFloat16:
      return &avx512::kFp32;
    default:
      return &avx512::kInt8;
  }
}

const Kernel* avx512_kernel(DType dtype) {
  return dtype == DType::kBFloat16 ? &avx512::kBf16 : avx512_vnni_kernel(dtype);
}

}  // namespace pfa::cpu

#else

namespace pfa::cpu {
const Kernel* avx512_vnni_kernel(DType) { return nullptr; }
const Kernel* avx512_kernel(DType) { return nullptr; }
}  // namespace pfa::cpu

#endif
