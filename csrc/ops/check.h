// SPDX-License-Identifier: Apache-2.0
// How a call is refused: one sentence that names the caller's argument, what is required and what
// came. STD_TORCH_CHECK would put function, file and line in front of it.
//
// The Python front end picks the exception type from the wording: "must have dtype" is a TypeError,
// "is not implemented" a NotImplementedError, any other "pfa.forward: " text a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace pfa {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "pfa.forward: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The parts are evaluated only when the check fails.
#define PFA_CHECK(condition, ...)             \
  do {                                        \
    if (!(condition)) pfa::fail(__VA_ARGS__); \
  } while (false)

// As Python prints them: "float16" and "(2, 3)".
[[nodiscard]] std::string dtype_text(const Tensor& tensor);
[[nodiscard]] std::string shape_text(const Tensor& tensor);

}  // namespace pfa
