// SPDX-License-Identifier: Apache-2.0
// Layout policies: where the rows of a (batch, head) lie.
//
// BSH, BSND, BNSD and BNSD_BSND differ in the order of three strides, which
// ops/validate_tensors.cpp reads from the tensors; grouped heads and broadcasts are a division and
// a stride of 0. So one policy serves all, and a layout costs no instantiation. A layout that
// strides cannot express, such as pages of keys, would be another.
#pragma once

#include "fragment.cuh"
#include "params.h"

namespace pfa::cuda::layout {

struct Strided {
  PFA_HOST_DEVICE static char* rows(const StridedTensor& tensor, int64_t b, int64_t head,
                                    int64_t first_row = 0) {
    return tensor.data + b * tensor.batch + head * tensor.head + first_row * tensor.row;
  }
};

}  // namespace pfa::cuda::layout
