// SPDX-License-Identifier: Apache-2.0
// The kernels for processors with AMX (bf16 and int8 tiles) beside AVX-512.
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

PFA_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define PFA_ISA amx
namespace pfa::cpu::PFA_ISA {
constexpr int kRows = 32, kColumnStep = kPanel;
}  // namespace pfa::cpu::PFA_ISA

// clang-format off: each builds on those above it
#include "simd_avx512.h"
#include "dot.h"
#include "pack.h"
#include "dots_avx512.h"
#include "amx_tiles.h"
#include "dots_amx.h"
#include "block.h"
#include "softmax.h"
#include "strip_tiles.h"
#include "attend.h"
// clang-format on

namespace pfa::cpu::amx {
const Kernel kBf16 = make_kernel<TileBf16>();
const Kernel kFp16 = make_kernel<TileSplit>();
const Kernel kInt8 = make_kernel<TileI8>();
}  // namespace pfa::cpu::amx
PFA_TARGET_END

namespace pfa::cpu {

const Kernel* amx_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return &amx::kFp16;
    case DType::kBFloat16:
      return &amx::kBf16;
    default:
      return &amx::kInt8;
  }
}

}  // namespace pfa::cpu

#else

namespace pfa::cpu {
const Kernel* amx_kernel(DType) { return nullptr; }
}  // namespace pfa::cpu

#endif
