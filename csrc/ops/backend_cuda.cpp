// SPDX-License-Identifier: Apache-2.0
#include "backend_cuda.h"

#include <stdexcept>
#include <string>
#include <vector>

#ifdef PFA_WITH_CUDA
#include "../cuda/forward.h"

// Only a torch with CUDA has it; weak, so that the same library loads in one without.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

extern "C" int cudaStreamSynchronize(void* stream);
#endif

namespace pfa {

#ifdef PFA_WITH_CUDA

namespace {

constexpr int kDeviceOfHostMemory = 0;

void* current_stream(int device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error(
        "pfa found no CUDA streams in torch: its library has to be linked with -ltorch");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Memory of torch's allocator, which gives it to later work on the same stream only.
struct Workspace {
  const Tensor& beside;
  std::vector<Tensor> blocks;

  static void* allocate(int64_t bytes, void* context) {
    auto& self = *static_cast<Workspace*>(context);
    try {
      self.blocks.push_back(Tensor::empty({bytes}, 1, ScalarType::Byte, self.beside));
    } catch (const std::runtime_error&) {  // the reason does not cross the stable ABI before 2.13
      throw std::runtime_error("pfa.forward ran out of memory for its workspace");
    }
    return self.blocks.back().mutable_data_ptr();
  }
};

int device_of(const Tensor& query) {
  return query.is_cpu() ? kDeviceOfHostMemory : query.device_index();
}

}  // namespace

void check_cuda_is_built() {}

void check_cuda_reads_host_memory() {
  if (cuda::reads_host_memory(kDeviceOfHostMemory)) return;
  throw std::runtime_error(
      "PFA_FORCE_BACKEND=cuda needs tensors on a GPU, or a GPU that reads ordinary host memory, "
      "but "
      "query is on the CPU");
}

void run_on_cuda(const Tensor& query, const Problem& problem) {
  const int device = device_of(query);
  Workspace workspace{query, {}};
  cuda::Resources resources;
  resources.stream = query.is_cpu() ? nullptr : current_stream(device);
  resources.device = device;
  resources.allocate = &Workspace::allocate;
  resources.context = &workspace;
  cuda::forward(problem, resources);
  if (!query.is_cpu()) return;
  const int error = cudaStreamSynchronize(nullptr);
  if (error != 0) {
    throw std::runtime_error("pfa.forward's kernel failed with CUDA error " +
                             std::to_string(error));
  }
}

std::string choice_of_cuda(const Tensor& query, const Problem& problem) {
  const cuda::Choice choice = cuda::choose(problem, device_of(query));
  return choice.kernel + ";" + std::to_string(choice.block_m) + ";" +
         std::to_string(choice.block_n) + ";" + std::to_string(choice.num_splits) + ";" +
         std::to_string(choice.cut_blocks) + ";" + std::to_string(choice.cut_tiles) + ";" +
         choice.why_not_sm90;
}

std::string cuda_contents() { return cuda::architectures() + "\n" + cuda::kernels(); }

#else

namespace {

[[noreturn]] void fail_without_cuda() {
  throw std::runtime_error(
      "pfa was built without CUDA kernels: build it again with FORCE_CUDA=1 where the CUDA "
      "toolkit's "
      "nvcc is found, or call pfa.jit.load() under PFA_LIBRARY=none");
}

}  // namespace

void check_cuda_is_built() { fail_without_cuda(); }
void check_cuda_reads_host_memory() { fail_without_cuda(); }
void run_on_cuda(const Tensor& /*query*/, const Problem& /*problem*/) { fail_without_cuda(); }
std::string choice_of_cuda(const Tensor& /*query*/, const Problem& /*problem*/) {
  fail_without_cuda();
}
std::string cuda_contents() { return "\n"; }

#endif

}  // namespace pfa
