// SPDX-License-Identifier: Apache-2.0
// The whole host path of one call, the same for every device.
#pragma once

#include "arguments.h"

namespace pfa {

// Returns a fresh contiguous tensor. Throws std::runtime_error with one sentence; nothing has been
// computed then.
Tensor forward(const Arguments& args);

}  // namespace pfa
