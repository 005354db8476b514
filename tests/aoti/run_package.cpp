// SPDX-License-Identifier: Apache-2.0
// Runs an AOTInductor package that contains pfa's operators, without Python.
//
//   run_package LIBRARY PACKAGE BATCH ROWS WIDTH OUT
//
// x (BATCH, ROWS, WIDTH) is bfloat16 of sin(0.37 i), lengths (BATCH) are 1, 2, ...; the bytes of
// the result go to OUT.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {  // registers torch.ops.pfa
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const int64_t batch = std::atoll(argv[3]), rows = std::atoll(argv[4]),
                width = std::atoll(argv[5]);
  const at::Tensor index = at::arange(batch * rows * width, at::kFloat);
  const at::Tensor x = (index * 0.37).sin().to(at::kBFloat16).view({batch, rows, width});
  const at::Tensor lengths = at::arange(1, batch + 1, at::kLong);
  torch::inductor::AOTIModelPackageLoader package(argv[2]);
  const at::Tensor out = package.run({x, lengths}).at(0).contiguous();
  std::ofstream(argv[6], std::ios::binary)
      .write(static_cast<const char*>(out.const_data_ptr()), static_cast<long>(out.nbytes()));
  return 0;
}
