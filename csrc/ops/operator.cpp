// SPDX-License-Identifier: Apache-2.0
#include "operator.h"

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend.h"
#include "check.h"
#include "validate.h"

namespace pfa {
namespace {

// Nothing is registered for the Autograd key: a kernel there would cost every call a second
// dispatch, and torch's own fallback warns in the one case not seen here, torch.func.grad.
void check_inference(const Arguments& args) {
  if (args.from_front_end || !aoti_torch_grad_mode_is_enabled()) return;
  const auto check = [](const char* name, const Tensor& tensor) {
    if (!tensor.requires_grad()) return;
    throw std::runtime_error(
        std::string("pfa.forward is inference-only and has no gradient, but ") + name +
        " requires grad: detach it or call under torch.no_grad()");
  };
  const auto check_optional = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (tensor) check(name, *tensor);
  };
  check("query", args.query);
  check("key", args.key);
  check("value", args.value);
  check_optional("pse_shift", args.pse_shift);
  check_optional("deq_scale1", args.deq_scale1);
  check_optional("quant_scale1", args.quant_scale1);
  check_optional("deq_scale2", args.deq_scale2);
  check_optional("quant_scale2", args.quant_scale2);
  check_optional("quant_offset2", args.quant_offset2);
}

// Output, workspace and launch all belong to query's device.
std::optional<torch::stable::accelerator::DeviceGuard> device_guard(const Tensor& query) {
  if (query.is_cpu()) return std::nullopt;
  return std::make_optional<torch::stable::accelerator::DeviceGuard>(query.device_index());
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
  Call call = computed(args, true);
  return {std::move(call.out), std::move(*call.lse)};
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
