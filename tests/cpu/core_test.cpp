// SPDX-License-Identifier: Apache-2.0
// The CPU backend without torch or Python, against a naive loop in double: small shapes on buffers
// of exactly their size, for sanitizers. Every instruction set of this processor is run; with
// -DPFA_EMULATE_AMX also AMX. Prints one line per instruction set; exits with 1 on a wrong result.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/forward.h"
#include "../../csrc/cpu/half.h"

namespace {

using namespace pfa;
using namespace pfa::cpu;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Case {
  const char* name;
  DType dtype = DType::kFloat16;
  DType dtype_out = DType::kFloat16;
  int64_t batch = 1, num_heads = 2, num_heads_k = 1, seqlen_q = 70, seqlen_k = 130, head_dim = 64;
  int64_t lo = -Band::kUnbounded, hi = Band::kUnbounded;
  bool bottom_right = false, mask = false, bias = false, lengths = false, poison = false;
  float scale_p = 127.0f;
  float magnitude = 1.0f;  // of q and k
};

// Heap memory of exactly the needed size, so that AddressSanitizer sees the first byte past it.
template <class T>
struct Exact {
  explicit Exact(int64_t n) : data(new T[static_cast<size_t>(n)]()) {}
  std::unique_ptr<T[]> data;
};

int64_t size_of(DType dtype) { return dtype == DType::kInt8 ? 1 : 2; }

double get(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      return f16_to_float(static_cast<const uint16_t*>(p)[i]);
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    default:
      return static_cast<const int8_t*>(p)[i];
  }
}

void put(DType dtype, void* p, int64_t i, double x) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(p)[i] = float_to_f16(static_cast<float>(x));
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(p)[i] = float_to_bf16(static_cast<float>(x));
      break;
    default:
      static_cast<int8_t*>(p)[i] =
          static_cast<int8_t>(std::lrint(std::fmin(127, std::fmax(-128, 40 * x))));
  }
}

// A case's tensors, the Problem over them, and the naive result.
class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        q_(c.batch * c.num_heads * c.seqlen_q * c.head_dim * size_of(c.dtype)),
        k_(c.batch * c.num_heads_k * c.seqlen_k * c.head_dim * size_of(c.dtype)),
        v_(c.batch * c.num_heads_k * c.seqlen_k * c.head_dim * size_of(c.dtype)),
        out_(c.batch * c.num_heads * c.seqlen_q * c.head_dim * size_of(c.dtype_out)),
        mask_(c.mask ? c.batch * c.seqlen_q * c.seqlen_k : 1),
        bias_(c.bias ? c.num_heads * c.seqlen_q * c.seqlen_k : 1),
        scale_out_(c.num_heads * c.head_dim),
        offset_out_(c.num_heads * c.head_dim),
        lse_(c.batch * c.num_heads * c.seqlen_q) {
    fill();
    describe();
  }

  // Worst error beyond the tolerance; negative if all is well.
  double check(const Executor& executor) {
    forward(problem_, executor);
    double worst = -1.0;
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t h = 0; h < c_.num_heads; ++h) {
        for (int64_t i = 0; i < c_.seqlen_q; ++i) worst = std::fmax(worst, check_row(b, h, i));
      }
    }
    return worst;
  }

 private:
  void fill() {
    std::normal_distribution<double> normal;
    const int64_t nq = c_.batch * c_.num_heads * c_.seqlen_q * c_.head_dim;
    const int64_t nk = c_.batch * c_.num_heads_k * c_.seqlen_k * c_.head_dim;
    for (int64_t i = 0; i < nq; ++i)
      put(c_.dtype, q_.data.get(), i, c_.magnitude * normal(random_));
    for (int64_t i = 0; i < nk; ++i) {
      put(c_.dtype, k_.data.get(), i, c_.magnitude * normal(random_));
      put(c_.dtype, v_.data.get(), i, normal(random_));
    }
    if (c_.mask) {
      for (int64_t i = 0; i < c_.batch * c_.seqlen_q * c_.seqlen_k; ++i) {
        mask_.data[i] = static_cast<uint8_t>(i / 97 % 3 == 0 ? 1 : random_() % 2);
      }
      for (int64_t j = 0; j < c_.seqlen_k; ++j)
        mask_.data[3 * c_.seqlen_k + j] = 1;  // an empty row
    }
    if (c_.bias) {
      const DType dtype = bias_dtype();
      for (int64_t i = 0; i < c_.num_heads * c_.seqlen_q * c_.seqlen_k; ++i) {
        put(dtype, bias_.data.get(), i, i % 11 == 0 ? -INFINITY : normal(random_));
      }
    }
    if (c_.poison) {  // the last key holds NaN and the case's band hides it from all rows but one
      for (int64_t d = 0; d < c_.head_dim; ++d) {
        put(c_.dtype, v_.data.get(), (c_.seqlen_k - 1) * c_.head_dim + d, kNan);
        put(c_.dtype, k_.data.get(), (c_.seqlen_k - 1) * c_.head_dim + d, kNan);
      }
    }
    for (int64_t i = 0; i < c_.num_heads * c_.head_dim; ++i) {
      scale_out_.data[i] = 20.0f + static_cast<float>(i % 7);
      offset_out_.data[i] = static_cast<float>(i % 5) - 2.0f;
    }
    for (int64_t b = 0; b < c_.batch; ++b) {
      seqused_q_.push_back(b % 2 == 0 ? c_.seqlen_q - 3 : 0);
      seqused_k_.push_back(c_.seqlen_k - 5 * (b + 1));
    }
  }

  [[nodiscard]] DType bias_dtype() const {
    return c_.dtype == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
  }

  void describe() {
    Problem& p = problem_;
    p.batch = c_.batch;
    p.num_heads = c_.num_heads;
    p.num_heads_k = c_.num_heads_k;
    p.seqlen_q = c_.seqlen_q;
    p.seqlen_k = c_.seqlen_k;
    p.head_dim = c_.head_dim;
    p.dtype = c_.dtype;
    p.dtype_out = c_.dtype_out;
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c_.head_dim));
    const auto view = [&](auto* data, int64_t heads, int64_t rows) {
      return InputView{data, heads * rows * c_.head_dim, rows * c_.head_dim, c_.head_dim};
    };
    p.q = view(q_.data.get(), c_.num_heads, c_.seqlen_q);
    p.k = view(k_.data.get(), c_.num_heads_k, c_.seqlen_k);
    p.v = view(v_.data.get(), c_.num_heads_k, c_.seqlen_k);
    p.out = {out_.data.get(), p.q.batch, p.q.head, p.q.row};
    p.lse = lse_.data.get();
    p.band = {c_.lo, c_.hi, c_.bottom_right};
    if (c_.mask) p.mask = {mask_.data.get(), c_.seqlen_q * c_.seqlen_k, c_.seqlen_k};
    if (c_.bias) {
      p.bias = {bias_.data.get(), bias_dtype(), 0, c_.seqlen_q * c_.seqlen_k, c_.seqlen_k};
    }
    if (c_.dtype == DType::kInt8) {
      p.quant.descale_s.data = &descale_s_;
      p.quant.scale_p.data = &c_.scale_p;
      p.quant.descale_o.data = &descale_o_;
    }
    if (c_.dtype_out == DType::kInt8) {
      p.quant.scale_out = {scale_out_.data.get(), ScaleType::kFloat32, 1};
      p.quant.offset_out = {offset_out_.data.get(), ScaleType::kFloat32, 1};
    }
    if (c_.lengths) {
      p.seqused_q = seqused_q_.data();
      p.seqused_k = seqused_k_.data();
    }
  }

  [[nodiscard]] bool visible(int64_t b, int64_t i, int64_t j) const {
    const int64_t anchor = c_.bottom_right ? problem_.keys_used(b) - problem_.rows_used(b) : 0;
    if (i >= problem_.rows_used(b) || j >= problem_.keys_used(b)) return false;
    if (j - i - anchor < c_.lo || j - i - anchor > c_.hi) return false;
    return !c_.mask || mask_.data[(b * c_.seqlen_q + i) * c_.seqlen_k + j] == 0;
  }

  [[nodiscard]] double check_lse(int64_t row, double largest, double sum) const {
    const double got = lse_.data[row];
    if (sum == 0.0) return got == -INFINITY ? -1.0 : INFINITY;
    if (std::isnan(sum)) return -1.0;  // the one row that sees the poisoned key
    const double expected = largest + std::log(sum), error = std::fabs(got - expected);
    return error <= 2e-3 * (1.0 + std::fabs(expected)) ? -1.0 : error;
  }

  double check_row(int64_t b, int64_t h, int64_t i) {
    const int64_t d = c_.head_dim, q_row = ((b * c_.num_heads + h) * c_.seqlen_q + i) * d;
    const int64_t kv = (b * c_.num_heads_k + h / (c_.num_heads / c_.num_heads_k)) * c_.seqlen_k * d;
    const bool int8 = c_.dtype == DType::kInt8;
    std::vector<double> p(static_cast<size_t>(c_.seqlen_k), -INFINITY);
    double largest = -INFINITY, sum = 0.0;
    for (int64_t j = 0; j < c_.seqlen_k; ++j) {
      if (!visible(b, i, j)) continue;
      double s = 0.0;
      for (int64_t x = 0; x < d; ++x) {
        s += get(c_.dtype, q_.data.get(), q_row + x) * get(c_.dtype, k_.data.get(), kv + j * d + x);
      }
      s *= problem_.softmax_scale * (int8 ? descale_s_ : 1.0f);
      if (c_.bias)
        s += get(bias_dtype(), bias_.data.get(), (h * c_.seqlen_q + i) * c_.seqlen_k + j);
      p[static_cast<size_t>(j)] = s;
      largest = std::fmax(largest, s);
    }
    for (double& x : p) {
      x = x == -INFINITY ? 0.0 : std::exp(x - largest);
      sum += x;
    }
    double worst = check_lse((b * c_.num_heads + h) * c_.seqlen_q + i, largest, sum);
    for (int64_t x = 0; x < d; ++x) {
      double o = 0.0, steps = 0.0;
      for (int64_t j = 0; j < c_.seqlen_k; ++j) {
        const double weight = p[static_cast<size_t>(j)];
        if (weight == 0.0) continue;
        const double value = get(c_.dtype, v_.data.get(), kv + j * d + x);
        const double steps_of_p = std::nearbyint(weight * std::fabs(c_.scale_p));
        const double stored = int8 ? std::fmin(c_.scale_p < 0 ? 128.0 : 127.0, steps_of_p) : weight;
        o += (c_.scale_p < 0 && int8 ? -stored : stored) * value;
        steps += std::fabs(value);
      }
      double expected = sum == 0.0 ? 0.0 : o / sum * (int8 ? descale_o_ : 1.0);
      // One step of P wherever int8 rounding falls, plus rounding of P and of the output.
      double allowed = int8 && sum > 0.0 ? 0.02 * steps / sum * descale_o_ + 0.03 : 0.0;
      allowed += (c_.dtype == DType::kBFloat16 ? 2e-2 : 2e-3) * (1.0 + std::fabs(expected));
      if (c_.dtype_out == DType::kInt8) {
        const double scale = scale_out_.data[h * d + x];
        allowed = allowed * scale + 1.0;
        if (sum != 0.0) {
          expected = std::fmin(
              127, std::fmax(-128, std::nearbyint(expected * scale + offset_out_.data[h * d + x])));
        }
      }
      const double actual = get(c_.dtype_out, out_.data.get(), q_row + x);
      if (std::isnan(expected)) continue;  // the one row that sees the poisoned key
      const double error = std::fabs(actual - expected);
      if (!(error <= allowed)) worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
    }
    return worst;
  }

  Case c_;
  std::mt19937 random_{7};
  Exact<uint8_t> q_, k_, v_, out_;
  Exact<uint8_t> mask_;
  Exact<uint16_t> bias_;
  Exact<float> scale_out_, offset_out_, lse_;
  std::vector<int64_t> seqused_q_, seqused_k_;
  float descale_s_ = 1.0f / 1600, descale_o_ = 1.0f / (40 * 127);
  Problem problem_;
};

void run_threads(int64_t tasks, Executor::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < tasks; ++i) threads.emplace_back(body, i, i + 1, context);
  if (tasks > 0) body(0, 1, context);
  for (std::thread& thread : threads) thread.join();
}

std::vector<Case> make_cases() {
  constexpr DType kF16 = DType::kFloat16, kBf16 = DType::kBFloat16, kI8 = DType::kInt8;
  std::vector<Case> cases;
  for (const DType dtype : {kF16, kBf16, kI8}) {
    const DType out = dtype == kBf16 ? kBf16 : kF16;
    const auto add = [&](const char* name, auto change) {
      Case c{name, dtype, out};
      change(c);
      cases.push_back(c);
    };
    add("full", [](Case&) {});
    add("one row, one key, one channel", [](Case& c) { c.seqlen_q = c.seqlen_k = c.head_dim = 1; });
    add("tiles with tails", [](Case& c) { c.seqlen_q = 103, c.seqlen_k = 521, c.head_dim = 7; });
    add("two channel panels", [](Case& c) { c.seqlen_k = 300, c.head_dim = 100; });
    add("widest head", [](Case& c) { c.seqlen_q = 9, c.seqlen_k = 200, c.head_dim = 512; });
    add("causal", [](Case& c) { c.hi = 0; });
    add("band at the bottom right", [](Case& c) { c.lo = -20, c.hi = 3, c.bottom_right = true; });
    add("band past every key", [](Case& c) { c.lo = 200; });
    add("mask", [](Case& c) { c.mask = true, c.seqlen_k = 300; });
    add("bias", [](Case& c) { c.bias = true, c.seqlen_k = 129; });
    add("mask and bias and band", [](Case& c) { c.mask = c.bias = true, c.lo = -40, c.hi = 70; });
    add("lengths", [](Case& c) { c.batch = 3, c.lengths = true, c.bottom_right = true, c.hi = 0; });
    add("no keys", [](Case& c) { c.seqlen_k = 0; });
    add("int8 output", [](Case& c) { c.dtype_out = kI8, c.mask = true; });
    if (dtype == kI8) {
      add("negative scale of P", [](Case& c) { c.scale_p = -127.0f; });
      add("saturating scale of P", [](Case& c) { c.scale_p = 200.0f; });
    } else {
      add("NaN in a key hidden from most rows", [](Case& c) {
        c.poison = true, c.num_heads = 1, c.seqlen_q = c.seqlen_k = 130, c.hi = 0;
      });
      add("large scores", [](Case& c) { c.magnitude = 8.0f; });
    }
  }
  return cases;
}

}  // namespace

int main() {
  int failures = 0;
  for (const char* name : {"amx", "avx512", "avx512_vnni", "avx2", "portable"}) {
    setenv("PFA_CPU_ISA", name, 1);
    try {
      isa();
    } catch (const std::runtime_error& error) {
      std::printf("%-12s not run: %s\n", name, error.what());
      continue;
    }
    int passed = 0;
    for (const Case& c : make_cases()) {
      const double error = Run(c).check({run_threads, 2});
      if (error < 0.0) {
        ++passed;
        continue;
      }
      ++failures;
      std::printf("%-12s FAILED: %s, dtype %d: off by %g\n", name, c.name,
                  static_cast<int>(c.dtype), error);
    }
    std::printf("%-12s %d cases right\n", name, passed);
  }
  return failures == 0 ? 0 : 1;
}
