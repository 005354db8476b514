// SPDX-License-Identifier: Apache-2.0
// Attention calls without Python or torch: the target for profilers, sanitizers and simulators.
//
//   attention --dtype fp16,bf16 --heads 16 --seqlen 1024,8192 --head-dim 128 --repeat 30
//
// Every option takes a list; each combination is a call, and a line of JSON with the quantiles of
// its time, measured by CUDA events. Inputs are random, never zeros: constant data draws less power
// and times better than it should. README.md has what else there is to know.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/check.h"
#include "../../csrc/cuda/forward.h"

namespace {

using pfa::DType;
using pfa::cuda::check;

using Lists = std::map<std::string, std::vector<std::string>>;

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

Lists parse(int argc, char** argv) {
  Lists lists = {{"dtype", {"fp16"}},   {"batch", {"1"}},      {"heads", {"16"}},
                 {"kv-heads", {"0"}},   {"seqlen", {"1024"}},  {"seqlen-k", {"0"}},
                 {"head-dim", {"128"}}, {"pattern", {"full"}}, {"repeat", {"1"}}};
  for (int i = 1; i < argc; i += 2) {
    const std::string name = std::strncmp(argv[i], "--", 2) == 0 ? argv[i] + 2 : "";
    if (lists.count(name) == 0 || i + 1 == argc || split(argv[i + 1]).empty()) {
      throw std::runtime_error(std::string("unknown option or missing value: ") + argv[i]);
    }
    lists[name] = split(argv[i + 1]);
  }
  return lists;
}

struct Options {
  std::map<std::string, std::string> values;

  [[nodiscard]] const std::string& text(const char* name) const { return values.at(name); }
  [[nodiscard]] int64_t number(const std::string& name) const {
    try {
      return std::stoll(values.at(name));
    } catch (const std::logic_error&) {
      throw std::runtime_error("--" + name + " must be a whole number, got " + values.at(name));
    }
  }
};

std::vector<Options> combinations(const Lists& lists) {
  std::vector<Options> all(1);
  for (const auto& [name, values] : lists) {
    std::vector<Options> longer;
    for (const Options& options : all) {
      for (const std::string& value : values) {
        longer.push_back(options);
        longer.back().values[name] = value;
      }
    }
    all = std::move(longer);
  }
  return all;
}

// Device memory of one call; what it allocates is freed with it.
struct Memory {
  std::vector<void*> blocks;

  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* block : blocks) cudaFree(block);
  }
  template <class T>
  T* allocate(int64_t count) {
    void* data = nullptr;
    check(cudaMalloc(&data, static_cast<size_t>(count) * sizeof(T)), "allocate device memory");
    blocks.push_back(data);
    return static_cast<T*>(data);
  }
};

// What calls of one problem allocate: the first one does, and the others find it, as the time of an
// allocation is not theirs.
struct Workspace {
  Memory memory;
  size_t next = 0;
};

void* allocate_workspace(int64_t bytes, void* context) {
  auto& workspace = *static_cast<Workspace*>(context);
  if (workspace.next == workspace.memory.blocks.size()) workspace.memory.allocate<char>(bytes);
  return workspace.memory.blocks[workspace.next++];
}

// A hash of the index: the same data everywhere.
uint32_t scramble(uint64_t x) {
  x = (x + 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 29)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(x >> 32);
}

// About normal: the sum of four uniform bytes, scaled to a deviation of 1.
float normal(uint64_t index) {
  const uint32_t x = scramble(index);
  const uint32_t sum = (x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24);
  return (static_cast<float>(sum) - 510.0f) / 147.8f;
}

void write_element(char* to, float x, DType dtype) {
  if (dtype == DType::kInt8) {
    *to = static_cast<char>(std::clamp(std::lround(x * 40), -127l, 127l));
  } else if (dtype == DType::kBFloat16) {
    const __nv_bfloat16 value(x);
    std::memcpy(to, &value, sizeof(value));
  } else {
    const __half value(x);
    std::memcpy(to, &value, sizeof(value));
  }
}

// Normal values, with a period that no tile size divides: made on the host, where they cost no
// kernel.
void* random_tensor(Memory& memory, int64_t count, DType dtype, uint64_t seed) {
  constexpr int64_t kPeriod = (1 << 20) + 7;
  const int64_t bytes = dtype == DType::kInt8 ? 1 : 2;
  std::vector<char> host(static_cast<size_t>(std::min(kPeriod, count) * bytes));
  for (size_t i = 0; i < host.size() / bytes; ++i) {
    write_element(host.data() + i * bytes, normal(i + (seed << 40)), dtype);
  }
  char* data = memory.allocate<char>(count * bytes);
  for (int64_t at = 0; at < count * bytes; at += static_cast<int64_t>(host.size())) {
    const size_t size = std::min(host.size(), static_cast<size_t>(count * bytes - at));
    check(cudaMemcpy(data + at, host.data(), size, cudaMemcpyHostToDevice), "copy the inputs");
  }
  return data;
}

bool is_masked(const std::string& pattern, int64_t i, int64_t j, int64_t rows, int64_t keys) {
  if (pattern == "random") return scramble(i * keys + j) % 10 == 0;
  if (pattern == "causal-mask") return j > i;
  return i * 8 / rows != j * 8 / keys;  // 8 blocks along the diagonal
}

const uint8_t* dense_mask(Memory& memory, const std::string& pattern, int64_t rows, int64_t keys) {
  std::vector<uint8_t> host(static_cast<size_t>(rows * keys));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < keys; ++j) host[i * keys + j] = is_masked(pattern, i, j, rows, keys);
  }
  auto* data = memory.allocate<uint8_t>(rows * keys);
  check(cudaMemcpy(data, host.data(), host.size(), cudaMemcpyHostToDevice), "copy the mask");
  return data;
}

pfa::Scale scale(float value) {
  pfa::Scale scale;
  scale.given_by_value = true;
  scale.value = value;
  return scale;
}

// What csrc/ops would refuse and csrc/cuda takes for granted.
void check_sizes(const pfa::Problem& p) {
  if (p.head_dim < 1 || p.head_dim > 512) {
    throw std::runtime_error("--head-dim must be in 1..512, got " + std::to_string(p.head_dim));
  }
  if (p.batch < 1 || p.num_heads < 1 || p.seqlen_q < 1 || p.num_heads % p.num_heads_k != 0) {
    throw std::runtime_error("sizes must be positive, and --kv-heads must divide --heads");
  }
}

pfa::Problem make_problem(const Options& options, Memory& memory) {
  const std::map<std::string, DType> dtypes = {
      {"fp16", DType::kFloat16}, {"bf16", DType::kBFloat16}, {"int8", DType::kInt8}};
  pfa::Problem p;
  if (dtypes.count(options.text("dtype")) == 0) {
    throw std::runtime_error("--dtype must be fp16, bf16 or int8, got " + options.text("dtype"));
  }
  p.dtype = dtypes.at(options.text("dtype"));
  p.dtype_out = p.dtype == DType::kInt8 ? DType::kFloat16 : p.dtype;
  p.batch = options.number("batch");
  p.num_heads = options.number("heads");
  p.num_heads_k = options.number("kv-heads") > 0 ? options.number("kv-heads") : p.num_heads;
  p.seqlen_q = options.number("seqlen");
  p.seqlen_k = options.number("seqlen-k") > 0 ? options.number("seqlen-k") : p.seqlen_q;
  p.head_dim = options.number("head-dim");
  check_sizes(p);
  p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  const auto input = [&](int64_t heads, int64_t rows, uint64_t seed) {
    const int64_t count = p.batch * heads * rows * p.head_dim;
    return pfa::InputView{random_tensor(memory, count, p.dtype, seed), heads * rows * p.head_dim,
                          rows * p.head_dim, p.head_dim};
  };
  p.q = input(p.num_heads, p.seqlen_q, 1);
  p.k = input(p.num_heads_k, p.seqlen_k, 2);
  p.v = input(p.num_heads_k, p.seqlen_k, 3);
  const int64_t outputs = p.batch * p.num_heads * p.seqlen_q * p.head_dim;
  p.out = {memory.allocate<char>(outputs * 2), p.q.batch, p.q.head, p.q.row};
  if (p.dtype == DType::kInt8) {
    p.quant.descale_s = scale(1.0f / (40 * 40));
    p.quant.scale_p = scale(127.0f);
    p.quant.descale_o = scale(1.0f / (40 * 127));
  }
  return p;
}

void apply_pattern(const std::string& pattern, pfa::Problem& p, Memory& memory) {
  if (pattern == "causal") {
    p.band.hi = 0;
  } else if (pattern == "bias") {
    const int64_t count = p.num_heads * p.seqlen_q * p.seqlen_k;
    p.bias.dtype = p.dtype == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
    p.bias.data = random_tensor(memory, count, p.bias.dtype, 4);
    p.bias.head = p.seqlen_q * p.seqlen_k;
    p.bias.row = p.seqlen_k;
  } else if (pattern == "random" || pattern == "causal-mask" || pattern == "blocks") {
    p.mask = {dense_mask(memory, pattern, p.seqlen_q, p.seqlen_k), 0, p.seqlen_k};
  } else if (pattern != "full") {
    throw std::runtime_error(
        "--pattern must be full, causal, bias, random, causal-mask or blocks, "
        "got " +
        pattern);
  }
}

// Of `repeat` calls in ascending order. One alone is for profilers and simulators: nothing else
// runs then. Of several the first is not counted, and each begins with an L2 that has none of its
// inputs.
std::vector<float> milliseconds(const pfa::Problem& problem, int64_t repeat) {
  constexpr int64_t kFlushBytes = 256 << 20;  // more than the L2 of any GPU so far
  Memory flushed;
  char* flush = repeat > 1 ? flushed.allocate<char>(kFlushBytes) : nullptr;
  std::vector<float> times;
  Workspace workspace;
  for (int64_t i = repeat > 1 ? 0 : 1; i <= repeat; ++i) {
    workspace.next = 0;
    pfa::cuda::Resources resources;
    resources.allocate = allocate_workspace;
    resources.context = &workspace;
    cudaEvent_t begin{}, end{};
    check(cudaEventCreate(&begin), "create an event");
    check(cudaEventCreate(&end), "create an event");
    if (flush != nullptr) check(cudaMemsetAsync(flush, 1, kFlushBytes), "flush the L2");
    check(cudaEventRecord(begin), "record an event");
    pfa::cuda::forward(problem, resources);
    check(cudaEventRecord(end), "record an event");
    check(cudaEventSynchronize(end), "run the kernels");
    float time = 0;
    check(cudaEventElapsedTime(&time, begin, end), "read an event");
    if (i > 0) times.push_back(time);
    check(cudaEventDestroy(begin), "destroy an event");
    check(cudaEventDestroy(end), "destroy an event");
  }
  std::sort(times.begin(), times.end());
  return times;
}

void run(const Options& options) {
  Memory memory;
  pfa::Problem problem = make_problem(options, memory);
  apply_pattern(options.text("pattern"), problem, memory);
  const pfa::cuda::Choice choice = pfa::cuda::choose(problem, 0);
  const int64_t repeat = options.number("repeat");
  if (repeat < 1) throw std::runtime_error("--repeat must be at least 1");
  const std::vector<float> times = milliseconds(problem, repeat);
  const auto quantile = [&](double share) {
    return times[static_cast<size_t>(std::lround(share * static_cast<double>(times.size() - 1)))];
  };
  std::printf("{");
  for (const auto& [name, value] : options.values) {
    const char* quote = std::isdigit(value[0]) != 0 ? "" : "\"";
    std::printf("\"%s\": %s%s%s, ", name.c_str(), quote, value.c_str(), quote);
  }
  std::printf(
      "\"kernel\": \"%s\", \"block_m\": %d, \"block_n\": %d, \"num_splits\": %d, "
      "\"milliseconds\": %.6g, \"p20\": %.6g, \"p80\": %.6g}\n",
      choice.kernel.c_str(), choice.block_m, choice.block_n, choice.num_splits, quantile(0.5),
      quantile(0.2), quantile(0.8));
  std::fflush(stdout);  // a later call may fail
}

}  // namespace

// A call that fails, for want of memory say, does not end the others.
int main(int argc, char** argv) {
  int status = 0;
  std::vector<Options> all;
  try {
    all = combinations(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention: %s\n", error.what());
    return 1;
  }
  for (const Options& options : all) {
    try {
      run(options);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "attention: %s\n", error.what());
      cudaGetLastError();  // else the next launch would report it again
      status = 1;
    }
  }
  return status;
}
