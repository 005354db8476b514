// SPDX-License-Identifier: Apache-2.0
// The whole host path of one call, the same for every device.
#pragma once

#include <string>

#include "arguments.h"

namespace pfa {

// Returns a fresh contiguous tensor. Throws std::runtime_error with one sentence; nothing has been
// computed then.
Tensor forward(const Arguments& args);

// The same and, (B, N, Sq) float32, each row's log of the sum of exp(score).
struct OutputAndLse {
  Tensor out, lse;
};
OutputAndLse forward_lse(const Arguments& args);

// Only judges the call, by the rules of forward.
void check(const Arguments& args);

// What forward would run, as choice_of in backend.h says it: for tests and reports.
std::string choice(const Arguments& args);

}  // namespace pfa
