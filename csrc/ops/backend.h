// SPDX-License-Identifier: Apache-2.0
// The one branch on the device, and what each backend takes from torch: threads, streams, memory.
#pragma once

#include <string>

#include "arguments.h"
#include "validate.h"

namespace pfa {

// By query's device, unless PFA_FORCE_BACKEND=cpu|cuda, read at every call, says otherwise. Throws
// std::runtime_error with one sentence when that backend cannot serve the call.
[[nodiscard]] Backend choose_backend(const Arguments& args);

// Writes call.out. The CUDA backend has then enqueued it on the current stream of query's device.
void run(const Arguments& args, const Call& call);

// What run would take: "backend;kernel;block_m;block_n;num_splits;cut_blocks;
// cut_tiles;why_not_sm90".
[[nodiscard]] std::string choice_of(const Arguments& args, const Call& call);

}  // namespace pfa
