// SPDX-License-Identifier: Apache-2.0
// What a kernel_*.cpp includes before its target region. Everything the standard library defines
// must be seen here, compiled for the baseline: an inline function of the library compiled for a
// newer instruction set could be the copy that the linker keeps for all.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "plan.h"

// Code between these may use the instruction sets in `features`, a string of target names.
#define PFA_PRAGMA(tokens) _Pragma(#tokens)
#if defined(__clang__)
#define PFA_TARGET_BEGIN(features) \
  PFA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PFA_TARGET_END PFA_PRAGMA(clang attribute pop)
#else
#define PFA_TARGET_BEGIN(features) PFA_PRAGMA(GCC push_options) PFA_PRAGMA(GCC target(features))
#define PFA_TARGET_END PFA_PRAGMA(GCC pop_options)
#endif

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
