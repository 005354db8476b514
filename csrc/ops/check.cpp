// SPDX-License-Identifier: Apache-2.0
#include "check.h"

namespace pfa {

std::string dtype_text(const Tensor& tensor) {
  switch (tensor.dtype()) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another one";
  }
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  const int64_t rank = tensor.dim();
  text << "(";
  for (int64_t i = 0; i < rank; ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << (rank == 1 ? ",)" : ")");
  return text.str();
}

}  // namespace pfa
