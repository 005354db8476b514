// SPDX-License-Identifier: Apache-2.0
#include "operator.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "backend.h"
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

// Output, workspace and launch all belong to query's device.
std::optional<torch::stable::accelerator::DeviceGuard> device_guard(const Tensor& query) {
  if (query.is_cpu()) return std::nullopt;
  return std::make_optional<torch::stable::accelerator::DeviceGuard>(query.get_device_index());
}

Call computed(const Arguments& args, bool with_lse) {
  check_inference(args);
  const Backend backend = choose_backend(args);
  const auto guard = device_guard(args.query);
  Call call = make_call(args, backend, with_lse);
  if (!call.nothing_to_compute) run(args, call);
  return call;
}

}  // namespace

Tensor forward(const Arguments& args) { return computed(args, false).out; }

OutputAndLse forward_lse(const Arguments& args) {
  const Call call = computed(args, true);
  return {call.out, *call.lse};
}

void check(const Arguments& args) {
  check_inference(args);
  check_call(args);
}

std::string choice(const Arguments& args) {
  const Backend backend = choose_backend(args);
  const auto guard = device_guard(args.query);
  const Call call = make_call(args, backend, false);
  return choice_of(args, call);
}

}  // namespace pfa
