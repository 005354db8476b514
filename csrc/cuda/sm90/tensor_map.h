// SPDX-License-Identifier: Apache-2.0
// TMA's descriptions of q, k, v and the bias, made on the host.
#pragma once

#include <cuda.h>

#include <string>

#include "../params.h"

namespace pfa::cuda::sm90 {

struct TensorMaps {
  CUtensorMap q, k, v, bias;
};

// Boxes that TMA copies at once: rows, and columns of 16 bits that are as wide as the swizzle.
struct BoxPlan {
  int columns;  // 64 or 32
  int rows_q, rows_k, rows_v;
  int element_bytes;  // 1: there is no map of V
};

// Why TMA cannot read these tensors, in the caller's names; nothing if it can.
[[nodiscard]] std::string why_not_mappable(const Params& params, int element_bytes);

// Reads addresses and strides alone, no data.
[[nodiscard]] TensorMaps make_tensor_maps(const Params& params, const BoxPlan& boxes);

}  // namespace pfa::cuda::sm90
