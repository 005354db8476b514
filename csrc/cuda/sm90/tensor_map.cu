// SPDX-License-Identifier: Apache-2.0
// Host code only. The driver's function is asked for at run time: nothing links with libcuda.
#include <cuda_runtime_api.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "../check.h"
#include "tensor_map.h"

namespace pfa::cuda::sm90 {
namespace {

constexpr int64_t kMostStride = int64_t{1} << 40, kMostRows = int64_t{1} << 29;
constexpr int64_t kChunk = 16;  // bytes: any legal stride
constexpr int kWordBytes = 2;

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "ask the driver for cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("pfa.forward found no cuTensorMapEncodeTiled in the driver");
  }
  return reinterpret_cast<Encode>(function);
}

// A (batch, head, row, column) tensor of 16-bit words.
struct Shape {
  int64_t batch, heads, rows, columns;
};

CUtensorMap encode(const char* data, const std::array<int64_t, 3>& strides, const Shape& shape,
                   int box_columns, int box_rows) {
  static const Encode kEncode = find_encode();
  const std::array<int64_t, 3> sizes = {shape.rows, shape.heads, shape.batch};
  std::array<cuuint64_t, 4> dims = {static_cast<cuuint64_t>(shape.columns)};
  std::array<cuuint64_t, 3> steps{};
  for (int i = 0; i < 3; ++i) {  // a broadcast dimension has one element, at coordinate 0
    dims[i + 1] = strides[i] == 0 ? 1 : sizes[i];
    steps[i] = strides[i] == 0 ? kChunk : strides[i];
  }
  const std::array<cuuint32_t, 4> box = {static_cast<cuuint32_t>(box_columns),
                                         static_cast<cuuint32_t>(box_rows), 1, 1};
  const std::array<cuuint32_t, 4> element_steps = {1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result =
      kEncode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<char*>(data), dims.data(),
              steps.data(), box.data(), element_steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
              box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("pfa.forward failed to encode a tensor map: error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

// Text is made for those that cannot be read alone: this runs at every call.
template <class Tensor>
std::string why_not(const char* name, const Tensor& tensor, int64_t rows) {
  const std::array<std::pair<const char*, int64_t>, 3> strides = {
      {{"row", tensor.row}, {"head", tensor.head}, {"batch", tensor.batch}}};
  if (reinterpret_cast<uintptr_t>(tensor.data) % kChunk != 0) {
    return std::string(name) + "'s address is not a multiple of 16";
  }
  for (const auto& [of, bytes] : strides) {
    if (bytes % kChunk == 0 && bytes < kMostStride) continue;
    return std::string(name) + "'s " + of + " stride of " + std::to_string(bytes) + " bytes is " +
           (bytes % kChunk == 0 ? "too large" : "not a multiple of 16");
  }
  if (rows < 1 || rows > kMostRows) {
    return std::string(name) + " has " + std::to_string(rows) + " rows";
  }
  return tensor.row == 0 && rows > 1 ? std::string(name) + "'s rows share their memory" : "";
}

}  // namespace

std::string why_not_mappable(const Params& p, int element_bytes) {
  if (p.head_dim * element_bytes % kChunk != 0) {
    return "head_dim " + std::to_string(p.head_dim) + " is not a multiple of " +
           std::to_string(kChunk / element_bytes);
  }
  std::string why = why_not("query", p.q, p.seqlen_q);
  if (why.empty()) why = why_not("key", p.k, p.seqlen_k);
  if (why.empty()) why = why_not("value", p.v, p.seqlen_k);
  if (why.empty() && p.bias.data != nullptr) why = why_not("pse_shift", p.bias, p.seqlen_q);
  return why;
}

TensorMaps make_tensor_maps(const Params& p, const BoxPlan& boxes) {
  const int64_t heads_k = p.num_heads / p.heads_per_group;
  const int64_t columns = p.head_dim * boxes.element_bytes / kWordBytes;
  const Shape q = {p.batch, p.num_heads, p.seqlen_q, columns};
  const Shape k = {p.batch, heads_k, p.seqlen_k, columns};
  const auto map = [&boxes](const StridedTensor& tensor, const Shape& shape, int rows) {
    return encode(tensor.data, {tensor.row, tensor.head, tensor.batch}, shape, boxes.columns, rows);
  };
  TensorMaps maps{};
  maps.q = map(p.q, q, boxes.rows_q);
  maps.k = map(p.k, k, boxes.rows_k);
  if (boxes.element_bytes == kWordBytes) maps.v = map(p.v, k, boxes.rows_v);
  if (p.bias.data != nullptr) {
    const bool repeats = p.bias.repeated_row != 0;
    const int64_t row = repeats ? p.bias.repeated_row : p.bias.row;
    const Shape bias = {p.batch, p.num_heads, repeats ? boxes.rows_q : p.seqlen_q, p.seqlen_k};
    maps.bias = encode(p.bias.data, {row, p.bias.head, p.bias.batch}, bias, 64, boxes.rows_q);
  }
  return maps;
}

}  // namespace pfa::cuda::sm90
