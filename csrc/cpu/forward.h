// SPDX-License-Identifier: Apache-2.0
// The CPU backend's door. It includes no torch: threads come in through Executor.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"

namespace pfa::cpu {

// The caller's thread pool. run(tasks, body, context) calls body(begin, end, context) over disjoint
// ranges that cover [0, tasks), possibly in parallel, and returns when all are done.
struct Executor {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t tasks, Body body, void* context) = nullptr;
  int num_threads = 1;
};

// Writes problem.out. Throws std::runtime_error when PFA_CPU_ISA names an instruction set that is
// unknown or that this processor lacks, std::bad_alloc when the workspace does not fit; nothing is
// written then. The result does not depend on num_threads.
void forward(const Problem& problem, const Executor& executor);

// Name of the instruction set that forward uses: amx, avx512, avx512_vnni, avx2 or portable.
// PFA_CPU_ISA overrides the choice; it is read at every call. Throws like forward.
std::string isa();

// Names of all of them, best first, each followed by whether this process can use it: "amx 0;...".
std::string isas();

// What forward takes for a call: for tests and reports. Throws like forward.
struct Choice {
  std::string isa;
  int block_m = 0;  // query rows of a task
  int block_n = 0;  // keys of a tile: the granularity at which an int8 P is rounded
};
[[nodiscard]] Choice choose(const Problem& problem);

}  // namespace pfa::cpu
