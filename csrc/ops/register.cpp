// SPDX-License-Identifier: Apache-2.0
// The operator's schema and its kernels, through LibTorch's stable ABI.
//
// The kernels are boxed by hand: TORCH_BOX leaks every string argument with headers before 2.14
// (pytorch#191340). Each stack slot owns its value and must be taken exactly once, so a kernel
// takes all of them before anything can fail.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/forward.h"
#include "backend_cuda.h"
#include "operator.h"

#define PFA_SCHEMA_WITH(name, star, lengths, result)                                            \
  name "(Tensor query, Tensor key, Tensor value, " star                                         \
       "Tensor? pse_shift=None, Tensor? padding_mask=None, Tensor? atten_mask=None, " lengths   \
       " actual_seq_lengths=None, Tensor? deq_scale1=None, Tensor? quant_scale1=None, "         \
       "Tensor? deq_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "       \
       "int num_heads=1, float scale_value=1.0, int pre_tokens=2147483647, int next_tokens=0, " \
       "str input_layout=\"BSH\", int num_key_value_heads=0, " lengths                          \
       " actual_seq_lengths_kv=None, int sparse_mode=0) -> " result
#define PFA_SCHEMA(name, lengths, result) PFA_SCHEMA_WITH(name, "*, ", lengths, result)

#define PFA_OUT_AND_LSE "(Tensor out, Tensor softmax_lse)"

namespace pfa {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

std::string take_string(StableIValue value) {
  auto* handle = to<StringHandle>(value);
  const char* data = nullptr;
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &size));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, size);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

Tensor take_tensor(StableIValue value) { return Tensor(to<AtenTensorHandle>(value)); }

std::optional<Tensor> take_optional(StableIValue value) {
  const auto handle = to<std::optional<AtenTensorHandle>>(value);
  return handle ? std::make_optional<Tensor>(*handle) : std::nullopt;
}

StableIValue give(Tensor&& tensor) { return torch::stable::detail::from(tensor.release()); }

Lengths take_list(StableIValue value) {
  return {to<std::optional<std::vector<int64_t>>>(value), std::nullopt};
}

Lengths take_lengths_tensor(StableIValue value) { return {std::nullopt, take_optional(value)}; }

// The order is the schema's.
template <Lengths (*kTakeLengths)(StableIValue)>
Arguments take_arguments(const StableIValue* stack) {
  return Arguments{take_tensor(stack[0]),   take_tensor(stack[1]),    take_tensor(stack[2]),
                   take_optional(stack[3]), take_optional(stack[4]),  take_optional(stack[5]),
                   kTakeLengths(stack[6]),  take_optional(stack[7]),  take_optional(stack[8]),
                   take_optional(stack[9]), take_optional(stack[10]), take_optional(stack[11]),
                   to<int64_t>(stack[12]),  to<double>(stack[13]),    to<int64_t>(stack[14]),
                   to<int64_t>(stack[15]),  take_string(stack[16]),   to<int64_t>(stack[17]),
                   kTakeLengths(stack[18]), to<int64_t>(stack[19])};
}

template <Lengths (*kTakeLengths)(StableIValue)>
void boxed_forward(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  const Arguments args = take_arguments<kTakeLengths>(stack);
  stack[0] = give(forward(args));
}

template <Lengths (*kTakeLengths)(StableIValue)>
void boxed_eager(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  Arguments args = take_arguments<kTakeLengths>(stack);
  args.from_front_end = true;
  stack[0] = give(forward(args));
}

// What torch takes for a call of this signature, for benchmarks/launch.py.
void boxed_nothing(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  take_arguments<take_list>(stack);
}

template <Lengths (*kTakeLengths)(StableIValue)>
void boxed_forward_lse(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  const Arguments args = take_arguments<kTakeLengths>(stack);
  OutputAndLse results = forward_lse(args);
  stack[0] = give(std::move(results.out));
  stack[1] = give(std::move(results.lse));
}

void boxed_check(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  check(take_arguments<take_list>(stack));
}

// Text as the bytes of a tensor: a returned str leaks 48 bytes a call (torch 2.13).
torch::stable::Tensor bytes_of(const std::string& text) {
  const std::vector<int64_t> size{static_cast<int64_t>(text.size())};
  const auto bytes = torch::stable::empty(size, ScalarType::Byte);
  std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  return bytes;
}

void boxed_cpu_isa(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  stack[0] = from(bytes_of(cpu::isa()));
}

// Three lines: instruction sets, architectures, CUDA kernels.
void boxed_contents(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  stack[0] = from(bytes_of(cpu::isas() + "\n" + cuda_contents()));
}

template <Lengths (*kTakeLengths)(StableIValue)>
void boxed_choice(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  const Arguments args = take_arguments<kTakeLengths>(stack);
  stack[0] = from(bytes_of(choice(args)));
}

}  // namespace

STABLE_TORCH_LIBRARY(pfa, m) {
  m.def(PFA_SCHEMA("forward", "SymInt[]?", "Tensor"));
  m.def(PFA_SCHEMA("forward.tensor_lens", "Tensor?", "Tensor"));
  m.def(PFA_SCHEMA("forward_lse", "SymInt[]?", PFA_OUT_AND_LSE));
  m.def(PFA_SCHEMA("forward_lse.tensor_lens", "Tensor?", PFA_OUT_AND_LSE));
  // pfa.prompt_flash_attention's, by position: torch finds arguments by name in twice the time.
  m.def(PFA_SCHEMA_WITH("_eager", "", "int[]?", "Tensor"));
  m.def(PFA_SCHEMA_WITH("_eager.tensor_lens", "", "Tensor?", "Tensor"));
  m.def(PFA_SCHEMA("_nothing", "SymInt[]?", "()"));
  m.def(PFA_SCHEMA("_check", "SymInt[]?", "()"));
  m.def("_cpu_isa() -> Tensor");
  m.def("_contents() -> Tensor");
  m.def(PFA_SCHEMA("_choice", "SymInt[]?", "Tensor"));
  m.def(PFA_SCHEMA("_choice.tensor_lens", "Tensor?", "Tensor"));
}

STABLE_TORCH_LIBRARY_IMPL(pfa, CPU, m) {
  m.impl("forward", &boxed_forward<take_list>);
  m.impl("forward.tensor_lens", &boxed_forward<take_lengths_tensor>);
  m.impl("_eager", &boxed_eager<take_list>);
  m.impl("_eager.tensor_lens", &boxed_eager<take_lengths_tensor>);
  m.impl("forward_lse", &boxed_forward_lse<take_list>);
  m.impl("forward_lse.tensor_lens", &boxed_forward_lse<take_lengths_tensor>);
}

// Without CUDA kernels it says so, where torch would list its dispatch keys.
STABLE_TORCH_LIBRARY_IMPL(pfa, CUDA, m) {
  m.impl("forward", &boxed_forward<take_list>);
  m.impl("forward.tensor_lens", &boxed_forward<take_lengths_tensor>);
  m.impl("_eager", &boxed_eager<take_list>);
  m.impl("_eager.tensor_lens", &boxed_eager<take_lengths_tensor>);
  m.impl("forward_lse", &boxed_forward_lse<take_list>);
  m.impl("forward_lse.tensor_lens", &boxed_forward_lse<take_lengths_tensor>);
}

STABLE_TORCH_LIBRARY_IMPL(pfa, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", &boxed_cpu_isa);
  m.impl("_check", &boxed_check);
  m.impl("_nothing", &boxed_nothing);
  m.impl("_contents", &boxed_contents);
  m.impl("_choice", &boxed_choice<take_list>);
  m.impl("_choice.tensor_lens", &boxed_choice<take_lengths_tensor>);
}

}  // namespace pfa
