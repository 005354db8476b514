// SPDX-License-Identifier: Apache-2.0
// From a Problem to launches: picks the kernel, cuts the work into blocks and splits, asks for
// workspace, and enqueues the passes. Host code only.
#include <algorithm>
#include <array>
#include <string>

#include "../log.h"
#include "base_params.h"
#include "bias_copy.h"
#include "check.h"
#include "combine.h"
#include "device.h"
#include "element.cuh"
#include "forward.h"
#include "launch.h"
#include "mask_pack.h"
#include "splits.h"
#include "transpose_values.h"
#ifdef PFA_WITH_SM90A
#include "sm90/tensor_map.h"
#endif

namespace pfa::cuda {
namespace {

// A split shorter than this costs more in partial results than it saves. A guess, not measured.
constexpr int64_t kLeastKeysPerSplit = 256;

// The kernels of one (family, element, head_dim bucket).
struct Kernels {
  const char* family;
  const char* element;
  int head_dim;
  KernelInfo (*info)(const Variant&);
  int (*blocks_per_sm)(const Variant&, int device);
  void (*launch)(const Variant&, const Params&, int64_t blocks, int device, cudaStream_t);
  bool transposes_values = false;  // takes V as transpose_values.h leaves it

  // volatile, since g++ believes that no function template is absent, weak or not.
  [[nodiscard]] bool built() const {
    KernelInfo (*const volatile linked)(const Variant&) = info;
    return linked != nullptr;
  }
};

// The smallest that is built, if there is one.
template <size_t kCount>
Kernels smallest_bucket(const std::array<Kernels, kCount>& buckets, int64_t head_dim) {
  const auto fits = [&](const Kernels& kernels) {
    return head_dim <= kernels.head_dim && kernels.built();
  };
  const auto* found = std::find_if(buckets.begin(), buckets.end(), fits);
  return found == buckets.end() ? Kernels{} : *found;
}

template <class Element, int... kHeadDims>
Kernels sm80_bucket(int64_t head_dim) {
  return smallest_bucket<sizeof...(kHeadDims)>(
      {Kernels{"sm80", Element::kName, kHeadDims, sm80::info<Element, kHeadDims>,
               sm80::blocks_per_sm<Element, kHeadDims>, sm80::launch<Element, kHeadDims>}...},
      head_dim);
}

template <class Element>
Kernels sm80_kernels(int64_t head_dim) {
  return sm80_bucket<Element, 64, 96, 128, 192, 256, 384, 512>(head_dim);
}

Kernels sm80_kernels(const Problem& problem) {
  if (problem.dtype == DType::kInt8) return sm80_kernels<Int8>(problem.head_dim);
  if (problem.dtype == DType::kBFloat16) return sm80_kernels<BFloat16>(problem.head_dim);
  return sm80_kernels<Float16>(problem.head_dim);
}

#ifdef PFA_WITH_SM90A
template <class Element, int... kHeadDims>
Kernels sm90_bucket(int64_t head_dim) {
  return smallest_bucket<sizeof...(kHeadDims)>(
      {Kernels{"sm90", Element::kName, kHeadDims, sm90::info<Element, kHeadDims>,
               sm90::blocks_per_sm<Element, kHeadDims>, sm90::launch<Element, kHeadDims>,
               quant::Of<Element>::kIsInteger}...},
      head_dim);
}

template <class Element>
Kernels sm90_kernels(int64_t head_dim) {
  return sm90_bucket<Element, 64, 96, 128, 192, 256, 384, 512>(head_dim);
}

Kernels sm90_kernels(const Problem& problem) {
  if (problem.dtype == DType::kInt8) {
    return sm90_bucket<Int8, 64, 128, 256, 384, 512>(problem.head_dim);
  }
  if (problem.dtype == DType::kBFloat16) return sm90_kernels<BFloat16>(problem.head_dim);
  return sm90_kernels<Float16>(problem.head_dim);
}
#endif

// Why a call on a GPU of compute capability 9.0 does not take the kernels for it, or nothing.
std::string why_not_sm90([[maybe_unused]] const Problem& p) {
#ifdef PFA_WITH_SM90A
  // They count blocks and splits in 31 bits; a block has 64 rows or more.
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) / kMaxSplits;
  if (p.batch * p.num_heads * ceil_div(p.seqlen_q, 64) >= kMostBlocks) return "too many blocks";
  if (!sm90_kernels(p).built()) return "built without it for this type and head_dim";
  Params params = base_params(p);
  if (is_copied(params.bias, p.seqlen_q)) params.bias = {};
  return sm90::why_not_mappable(params, p.dtype == DType::kInt8 ? 1 : 2);
#else
  return "built without 9.0a";
#endif
}

Kernels kernels_of(const Problem& problem, [[maybe_unused]] bool is_sm90) {
#ifdef PFA_WITH_SM90A
  if (is_sm90) return sm90_kernels(problem);
#endif
  return sm80_kernels(problem);
}

// The only calls that a library lacks kernels for are those that whoever built it left out.
void check_is_built(const Problem& problem, const Kernels& found) {
  std::string lacks;
  if (!found.built()) {
    constexpr std::array kNames{"float16", "bfloat16", "int8"};
    lacks = std::string(kNames[static_cast<size_t>(problem.dtype)]) + " of head_dim " +
            std::to_string(problem.head_dim);
  } else if (!kBuiltWithDense && problem.mask.data != nullptr) {
    lacks = "atten_mask";
  } else if (!kBuiltWithBias && problem.bias.data != nullptr) {
    lacks = "pse_shift";
  } else {
    return;
  }
  throw std::runtime_error("pfa was built without CUDA kernels for " + lacks +
                           ": python -m pfa.info shows those it has");
}

struct Plan {
  Kernels kernels;
  std::string why_not_sm90;
  bool copies_bias;
  Variant variant;
  KernelInfo info;
  int num_splits;
  TailParams tail;
  int64_t num_m_blocks;

  [[nodiscard]] std::string name() const {
    return std::string(kernels.family) + " " + kernels.element + " D" +
           std::to_string(kernels.head_dim) + (variant.dense ? " dense" : " band") +
           (variant.bias ? " bias" : "") + (variant.compact ? " compact" : "");
  }

  [[nodiscard]] std::string describe() const {
    return name() + ", " + std::to_string(info.block_m) + " x " + std::to_string(info.block_n) +
           ", " + std::to_string(num_splits) + (num_splits == 1 ? " split" : " splits") +
           (tail.blocks > 0 ? ", last round cut" : "") + (copies_bias ? ", copies pse_shift" : "") +
           (why_not_sm90.empty() ? "" : ", not sm90: " + why_not_sm90);
  }
};

// Keys that a block of rows may see at most.
int64_t most_keys(const Problem& problem, int block_m) {
  const Band& band = problem.band;
  if (band.lo <= -Band::kUnbounded || band.hi >= Band::kUnbounded) return problem.seqlen_k;
  return std::min(problem.seqlen_k, band.hi - band.lo + block_m);
}

int choose_splits(const Problem& problem, const Plan& plan, int device, const Device& gpu) {
  if (const int forced = forced_splits(); forced > 0) return forced;
  const int64_t blocks = problem.batch * problem.num_heads * plan.num_m_blocks;
  // An SM holds at least one block: only a call that might split asks how many.
  if (5 * blocks >= 4 * int64_t{gpu.multiprocessors} * 8) return 1;
  const int64_t slots = int64_t{gpu.multiprocessors / plan.info.multiprocessors} *
                        plan.kernels.blocks_per_sm(plan.variant, device);
  const int64_t most = most_keys(problem, plan.info.block_m) / kLeastKeysPerSplit;
  return splits_that_fill(blocks, slots, std::clamp<int64_t>(most, 1, kMaxSplits));
}

// Of kernels whose blocks of threads stay: see sm90/launch.cuh.
TailParams choose_tail(const Problem& problem, const Plan& plan, const Device& gpu) {
  const bool has_lengths = problem.seqused_q != nullptr || problem.seqused_k != nullptr ||
                           problem.device_seqused_q.data != nullptr ||
                           problem.device_seqused_k.data != nullptr;
  const bool sees_all = problem.band.lo <= -Band::kUnbounded &&
                        problem.band.hi >= Band::kUnbounded && problem.mask.data == nullptr;
  if (has_lengths || !sees_all || plan.num_splits > 1 || forced_splits() > 0) return {};
  return tail_that_pays(problem.batch * problem.num_heads * plan.num_m_blocks,
                        gpu.multiprocessors / plan.info.multiprocessors,
                        ceil_div(problem.seqlen_k, plan.info.block_n), plan.info.block_m,
                        plan.kernels.head_dim);
}

Plan make_plan(const Problem& problem, int device) {
  const Device& gpu = Device::of(device);
  if (gpu.compute_capability < 80) {
    throw std::runtime_error("pfa.forward needs a GPU of compute capability 8.0 or higher, got " +
                             std::to_string(gpu.compute_capability / 10) + "." +
                             std::to_string(gpu.compute_capability % 10));
  }
  Plan plan{};
  const bool is_hopper = gpu.compute_capability / 10 == 9;
  if (is_hopper) plan.why_not_sm90 = why_not_sm90(problem);
  const bool is_sm90 = is_hopper && plan.why_not_sm90.empty();
  plan.kernels = kernels_of(problem, is_sm90);
  plan.copies_bias = is_sm90 && is_copied(bias_params(problem), problem.seqlen_q);
  check_is_built(problem, plan.kernels);
  plan.variant.dense = problem.mask.data != nullptr;
  plan.variant.bias = problem.bias.data != nullptr;
  plan.variant.compact = plan.kernels.info(plan.variant).shared_bytes > gpu.shared_bytes;
  plan.info = plan.kernels.info(plan.variant);
  plan.num_m_blocks = ceil_div(problem.seqlen_q, plan.info.block_m);
  plan.num_splits = choose_splits(problem, plan, device, gpu);
  if (is_sm90) plan.tail = choose_tail(problem, plan, gpu);
  return plan;
}

class Launcher {
 public:
  Launcher(const Problem& problem, const Resources& resources)
      : problem_(problem),
        resources_(resources),
        stream_(static_cast<cudaStream_t>(resources.stream)),
        plan_(make_plan(problem, resources.device)) {
    if (logs_debug()) log_once(plan_.describe());
  }

  void run() {
    Params params = base_params(problem_);
    params.num_m_blocks = plan_.num_m_blocks;
    params.seqused_q = lengths(problem_.seqused_q, problem_.device_seqused_q);
    params.seqused_k = lengths(problem_.seqused_k, problem_.device_seqused_k);
    if (plan_.variant.dense) params.mask = packed_mask();
    if (plan_.copies_bias) params.bias = copied_bias();
    params.split = split_params();
    if (plan_.kernels.transposes_values) params.v = transposed_values(params);
    const int64_t blocks =
        problem_.batch * problem_.num_heads * plan_.num_m_blocks * plan_.num_splits;
    plan_.kernels.launch(plan_.variant, params, blocks, resources_.device, stream_);
    if (params.split.rows > 0) combine_splits(params, stream_);
  }

 private:
  [[nodiscard]] void* allocate(int64_t bytes) const {
    return resources_.allocate(bytes, resources_.context);
  }

  [[nodiscard]] LengthsParams lengths(const int64_t* host, const DeviceLengths& device) const {
    LengthsParams lengths;
    if (host != nullptr && problem_.batch <= kInlineLengths) {
      lengths.is_inline = true;
      std::copy_n(host, problem_.batch, lengths.values);
    } else if (host != nullptr) {
      auto* values = static_cast<int64_t*>(allocate(problem_.batch * int64_t{sizeof(int64_t)}));
      store_lengths(host, problem_.batch, values, stream_);
      lengths.data = values;
      lengths.stride = 1;
      lengths.is_int64 = true;
    } else if (device.data != nullptr) {
      lengths.data = device.data;
      lengths.stride = device.stride;
      lengths.is_int64 = device.is_int64;
    }
    return lengths;
  }

  [[nodiscard]] PackedMaskParams packed_mask() const {
    const int block_m = plan_.info.block_m, block_n = plan_.info.block_n;
    const PackedMaskPlan plan(problem_, block_m, block_n);
    auto* bits = static_cast<char*>(allocate(plan.bits_bytes() + plan.classes_bytes()));
    const PackedMaskParams packed = plan.params(bits, bits + plan.bits_bytes());
    pack_mask(problem_, plan, packed, block_m, block_n, stream_);
    return packed;
  }

  [[nodiscard]] StridedTensor transposed_values(const Params& params) const {
    const int64_t tiles = ceil_div(params.seqlen_k, plan_.info.block_n);
    const TransposedValues plan{tiles * (plan_.info.block_n / kTransposedKeys),
                                plan_.kernels.head_dim};
    return transpose_values(params, plan, allocate(plan.bytes(params)), stream_);
  }

  [[nodiscard]] BiasParams copied_bias() const {
    const BiasCopyPlan plan(problem_, plan_.info.block_m);
    void* copy = allocate(plan.bytes());
    copy_bias(problem_, plan, copy, stream_);
    return plan.params(copy);
  }

  [[nodiscard]] SplitParams split_params() const {
    SplitParams split;
    split.count = plan_.num_splits;
    split.parts = plan_.num_splits;
    split.channels = plan_.kernels.head_dim;
    split.tail = plan_.tail;
    if (split.tail.blocks > 0) {
      split.parts = static_cast<int>(most_pieces(split.tail.tiles, split.tail.share));
      split.rows = int64_t{split.tail.blocks} * split.tail.block_m;
    } else if (split.count > 1) {
      split.rows = problem_.batch * problem_.num_heads * problem_.seqlen_q;
    } else {
      return split;
    }
    const int64_t parts = split.rows * split.parts;
    const int64_t sums = parts * split.channels;  // floats
    constexpr int64_t kStatsBytes = sizeof(float2), kSumBytes = sizeof(float);
    split.out = static_cast<float*>(allocate(sums * kSumBytes + parts * kStatsBytes));
    split.stats = reinterpret_cast<float2*>(split.out + sums);
    return split;
  }

  const Problem& problem_;
  const Resources& resources_;
  cudaStream_t stream_;
  Plan plan_;
};

}  // namespace

void forward(const Problem& problem, const Resources& resources) {
  Launcher(problem, resources).run();
}

Choice choose(const Problem& problem, int device) {
  const Plan plan = make_plan(problem, device);
  return {plan.name(),
          plan.info.block_m,
          plan.info.block_n,
          plan.num_splits,
          static_cast<int>(plan.tail.blocks),
          static_cast<int>(plan.tail.share),
          plan.why_not_sm90};
}

std::string architectures() {
#define PFA_TEXT_OF(x) #x
#define PFA_TEXT(x) PFA_TEXT_OF(x)
  return PFA_TEXT(PFA_CUDA_ARCHS);
}

std::string kernels() {
  std::string text;
  const auto add = [&text](const Kernels& found) {
    if (!found.built()) return;
    const std::string name = std::string(found.family) + " " + found.element + " D" +
                             std::to_string(found.head_dim) + ";";
    if (text.find(name) == std::string::npos) text += name;
  };
  for (const bool is_sm90 : {false, true}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kInt8}) {
      for (int64_t head_dim = 32; head_dim <= 512; head_dim += 32) {
        Problem problem;
        problem.dtype = dtype;
        problem.head_dim = head_dim;
        add(kernels_of(problem, is_sm90));
      }
    }
  }
  if (!kBuiltWithDense) text += "no atten_mask;";
  if (!kBuiltWithBias) text += "no pse_shift;";
  return text.substr(0, text.rfind(';'));
}

bool reads_host_memory(int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrPageableMemoryAccess, device);
  if (error != cudaSuccess) cudaGetLastError();  // nobody is to find it later
  return error == cudaSuccess && value != 0;
}

}  // namespace pfa::cuda
