// SPDX-License-Identifier: Apache-2.0
// What a kernel_*.cpp includes before its target region. Everything the standard library defines
// must be seen here, compiled for the baseline: an inline function of the library compiled for a
// newer instruction set could be the copy that the linker keeps for all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "plan.h"

#define PFA_INLINE inline __attribute__((always_inline))
#define PFA_NOINLINE __attribute__((noinline))
#define PFA_INLINE_LAMBDA __attribute__((always_inline))

namespace pfa::cpu {
// Null where this build has no such code (another processor family). dtype is that of q, k and v.
const Kernel* portable_kernel(DType dtype);
const Kernel* avx2_kernel(DType dtype);
const Kernel* avx512_vnni_kernel(DType dtype);
const Kernel* avx512_kernel(DType dtype);
const Kernel* amx_kernel(DType dtype);
}  // namespace pfa::cpu
