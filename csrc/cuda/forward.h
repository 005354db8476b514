// SPDX-License-Identifier: Apache-2.0
// The CUDA backend's door. It includes neither torch nor CUDA headers: the stream is opaque and
// device memory comes in through Resources.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"

namespace pfa::cuda {

// What a launch takes from its caller. The caller has made `device` current.
struct Resources {
  void* stream = nullptr;  // cudaStream_t
  int device = 0;
  // Returns device memory, aligned to 16 bytes, that stays valid until the work submitted to
  // stream during this call is done. Throws when there is none.
  void* (*allocate)(int64_t bytes, void* context) = nullptr;
  void* context = nullptr;
};

// What a call takes: for tests, logs and reports.
struct Choice {
  std::string kernel;  // such as "sm80 float16 D128 band"
  int block_m = 0;     // query rows of a block
  int block_n = 0;     // keys of a tile: the granularity at which an int8 P is rounded
  int num_splits = 1;  // pieces that the keys of a block are cut into
  int cut_blocks = 0;  // of the last blocks alone that are cut, into equal shares of their tiles
  int cut_tiles = 0;   // such a share: it may begin in one block and end in the next
  // On a GPU of compute capability 9.0, such as "int8". Without a semicolon.
  std::string why_not_sm90;
};

// Enqueues everything that writes problem.out and returns; never synchronises. Throws
// std::runtime_error naming the kernel when a launch is refused. Capturable in a CUDA graph.
// PFA_LOG=debug says what is taken. PFA_NUM_SPLITS overrides the number of splits; 1 makes a row's
// bits independent of how many other rows, heads and batch elements the call has, and of its place
// among them.
void forward(const Problem& problem, const Resources& resources);

// What forward would take on the current device.
[[nodiscard]] Choice choose(const Problem& problem, int device);

// What the library was compiled for, such as "sm_80+compute_80+sm_90a".
[[nodiscard]] std::string architectures();

// The kernels inside, and what those left out: "sm80 float16 D128;sm90 float16 D128;no pse_shift".
[[nodiscard]] std::string kernels();

// Can kernels on the device read and write ordinary host memory? No where there is no GPU or
// driver.
[[nodiscard]] bool reads_host_memory(int device);

}  // namespace pfa::cuda
