// SPDX-License-Identifier: Apache-2.0
// The only place where a call is judged: Arguments in, Problem and output out, or one sentence.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <vector>

#include "../problem.h"
#include "arguments.h"

namespace pfa {

// What a backend has to compute and everything its pointers point into.
struct Call {
  Backend backend;
  Problem problem;
  Tensor out;  // fresh and contiguous
  std::optional<Tensor> lse;
  bool nothing_to_compute;  // out is final as it stands
  std::list<Tensor> copies;
  std::vector<int64_t> seqused_q, seqused_k;
};

// Throws std::runtime_error before anything is computed or copied. Reads no memory of a GPU.
[[nodiscard]] Call make_call(const Arguments& args, Backend backend, bool with_lse);

// Throws what make_call would, but allocates nothing.
void check_call(const Arguments& args);

}  // namespace pfa
