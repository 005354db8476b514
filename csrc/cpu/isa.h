// SPDX-License-Identifier: Apache-2.0
// Which kernels this process uses: the best that the processor and the operating system support,
// or the one PFA_CPU_ISA names.
#pragma once

#include "plan.h"

namespace pfa::cpu {

struct Isa {
  const char* name;
  bool (*supported)();  // by this processor, and enabled for this process
  const Kernel* (*kernel)(DType dtype);
};

// Throws std::runtime_error when PFA_CPU_ISA names no instruction set, or one that is not there.
const Isa& select_isa();

}  // namespace pfa::cpu
