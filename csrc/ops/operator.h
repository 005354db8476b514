// SPDX-License-Identifier: Apache-2.0
// The whole host path of one call, the same for every device.
#pragma once

#include <string>

#include "arguments.h"

namespace pfa {

// Returns a fresh contiguous tensor. Throws std::runtime_error with one sentence; nothing has been
// computed then.
Tensor forward(const Arguments& args);

// What forward would run, as choice_of in backend.h says it: for tests and reports.
std::string choice(const Arguments& args);

}  // namespace pfa
