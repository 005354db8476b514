// SPDX-License-Identifier: Apache-2.0
#include "backend.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "../cpu/forward.h"
#include "../cpu/isa.h"
#include "../log.h"
#include "backend_cuda.h"

namespace pfa {
namespace {

std::optional<Backend> forced_backend() {
  const char* text = std::getenv("PFA_FORCE_BACKEND");
  const std::string wanted = text == nullptr ? "" : text;
  if (wanted.empty()) return std::nullopt;
  if (wanted == "cpu") return Backend::kCpu;
  if (wanted == "cuda") return Backend::kCuda;
  throw std::runtime_error("PFA_FORCE_BACKEND must be cpu or cuda, got " + wanted);
}

void run_on_torch_pool(int64_t tasks, cpu::Executor::Body body, void* context) {
  constexpr int64_t kGrain = 1;
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, kGrain, body, context));
}

void run_on_cpu(const Problem& problem) {
  const cpu::Executor executor{run_on_torch_pool,
                               static_cast<int>(torch::stable::get_num_threads())};
  if (logs_debug()) log_once(std::string("cpu ") + cpu::select_isa().name);
  try {
    cpu::forward(problem, executor);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("pfa.forward ran out of memory for its workspace");
  }
}

}  // namespace

Backend choose_backend(const Arguments& args) {
  const std::optional<Backend> forced = forced_backend();
  if (args.query.is_cpu()) {
    if (forced != Backend::kCuda) return Backend::kCpu;
    check_cuda_reads_host_memory();
    return Backend::kCuda;
  }
  if (forced == Backend::kCpu) {
    throw std::runtime_error(
        "PFA_FORCE_BACKEND=cpu needs tensors on the CPU, but query is on a GPU");
  }
  check_cuda_is_built();
  return Backend::kCuda;
}

void run(const Arguments& args, const Call& call) {
  if (call.backend == Backend::kCpu) {
    run_on_cpu(call.problem);
  } else {
    run_on_cuda(args.query, call.problem);
  }
}

std::string choice_of(const Arguments& args, const Call& call) {
  if (call.nothing_to_compute) {
    return call.backend == Backend::kCpu ? "cpu;none;0;0;0;0;0;" : "cuda;none;0;0;0;0;0;";
  }
  if (call.backend == Backend::kCuda) return "cuda;" + choice_of_cuda(args.query, call.problem);
  const cpu::Choice taken = cpu::choose(call.problem);
  return "cpu;" + taken.isa + ";" + std::to_string(taken.block_m) + ";" +
         std::to_string(taken.block_n) + ";1;0;0;";
}

}  // namespace pfa
