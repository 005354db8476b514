// SPDX-License-Identifier: Apache-2.0
#include "operator.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <new>
#include <stdexcept>

#include "../cpu/forward.h"
#include "check.h"
#include "validate.h"

namespace pfa {
namespace {

StableIValue call_unary(const char* name, const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack[0];
}

// The stable ABI has no requires_grad(); but under grad mode a view of a tensor that requires grad
// is never a leaf. Nothing is registered for the Autograd key: a kernel there would cost every call
// a second dispatch, and torch's own fallback warns in the one case not seen here, torch.func.grad.
bool requires_grad(const Tensor& tensor) {
  if (dtype_of(tensor) == torch::headeronly::ScalarType::Char) return false;
  const auto view = torch::stable::detail::to<Tensor>(call_unary("aten::alias", tensor));
  return !torch::stable::detail::to<bool>(call_unary("aten::is_leaf", view));
}

void check_inference(const Arguments& args) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  const auto check = [](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor || !requires_grad(*tensor)) return;
    throw std::runtime_error(
        std::string("pfa.forward is inference-only and has no gradient, but ") + name +
        " requires grad: detach it or call under torch.no_grad()");
  };
  check("query", args.query);
  check("key", args.key);
  check("value", args.value);
  check("pse_shift", args.pse_shift);
  check("deq_scale1", args.deq_scale1);
  check("quant_scale1", args.quant_scale1);
  check("deq_scale2", args.deq_scale2);
  check("quant_scale2", args.quant_scale2);
  check("quant_offset2", args.quant_offset2);
}

void run_on_torch_pool(int64_t tasks, cpu::Executor::Body body, void* context) {
  constexpr int64_t kGrain = 1;
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, kGrain, body, context));
}

void forward_cpu(const Problem& problem) {
  const cpu::Executor executor{run_on_torch_pool,
                               static_cast<int>(torch::stable::get_num_threads())};
  try {
    cpu::forward(problem, executor);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("pfa.forward ran out of memory for its workspace");
  }
}

}  // namespace

Tensor forward(const Arguments& args) {
  check_inference(args);
  const Call call = make_call(args);
  if (!call.nothing_to_compute) forward_cpu(call.problem);  // the branch on the device goes here
  return call.out;
}

}  // namespace pfa
