// SPDX-License-Identifier: Apache-2.0
// sparse_mode, atten_mask, pse_shift, pre_tokens and next_tokens. Every mode becomes a band, with
// the mask tensor on top in modes 0 and 1.
#include <algorithm>

#include "check.h"
#include "validate_steps.h"

namespace pfa {
namespace {

__extension__ typedef __int128 Wide;  // sums of two token counts

constexpr int64_t kCompressedSize = 2048;

enum SparseMode : int64_t { kDefault = 0, kAllMask = 1, kLeftUp = 2, kRightDown = 3, kBand = 4 };

void check_full_mask(const Tensor& mask, const Problem& p) {
  const int64_t rank = mask.dim();
  const bool ok = rank >= 2 && rank <= 4 && mask.size(rank - 2) >= p.seqlen_q &&
                  mask.size(rank - 1) >= p.seqlen_k &&
                  (rank < 3 || mask.size(0) == 1 || mask.size(0) == p.batch) &&
                  (rank < 4 || mask.size(1) == 1);
  PFA_CHECK(ok, "atten_mask must have shape (Sq, Skv), (1 or B, Sq, Skv) or (1 or B, 1, Sq, Skv) ",
            "with B = ", p.batch, ", Sq >= ", p.seqlen_q, " and Skv >= ", p.seqlen_k, ", got ",
            shape_text(mask));
}

void check_compressed_mask(const Arguments& args) {
  PFA_CHECK(args.atten_mask, "atten_mask must be the compressed (2048, 2048) mask for sparse_mode ",
            args.sparse_mode, ", got None");
  const Tensor& mask = *args.atten_mask;
  const int64_t rank = mask.dim();
  bool ok = rank >= 2 && rank <= 4 && mask.size(rank - 2) == kCompressedSize &&
            mask.size(rank - 1) == kCompressedSize;
  for (int64_t i = 0; ok && i < rank - 2; ++i) ok = mask.size(i) == 1;
  PFA_CHECK(ok, "atten_mask must have shape (2048, 2048), (1, 2048, 2048) or (1, 1, 2048, 2048) ",
            "for sparse_mode ", args.sparse_mode, ", got ", shape_text(mask));
}

// A negative token count may not empty the band of a batch element altogether.
void check_magnitude(const char* name, int64_t tokens, const char* length_name, int64_t length,
                     int64_t b) {
  PFA_CHECK(Wide{tokens} + length > 0, name, " must be greater than minus the ", length_name,
            " length ", length, " of batch element ", b, ", got ", tokens);
}

void check_tokens(const Arguments& args, const Problem& p) {
  const int64_t pre = args.pre_tokens;
  const int64_t next = args.next_tokens;
  PFA_CHECK(pre >= 0 || next >= 0, "pre_tokens and next_tokens must not both be negative, got ",
            pre, " and ", next);
  PFA_CHECK(Wide{pre} + next >= 0,
            "-next_tokens must be at most pre_tokens, got next_tokens = ", next,
            " and pre_tokens = ", pre);
  if (pre >= 0 && next >= 0) return;
  const bool known = lengths_are_known(args);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t q = known ? p.rows_used(b) : p.seqlen_q;
    const int64_t kv = known ? p.keys_used(b) : p.seqlen_k;
    if (q == 0 || kv == 0) continue;
    if (args.sparse_mode == kBand) {
      check_magnitude("next_tokens", next, "key", kv, b);
      check_magnitude("pre_tokens", pre, "query", q, b);
    } else {
      check_magnitude("next_tokens", next, "query", q, b);
      check_magnitude("pre_tokens", pre, "key", kv, b);
    }
  }
}

int64_t clamp_tokens(int64_t tokens) {
  return std::clamp(tokens, -Band::kUnbounded, Band::kUnbounded);
}

}  // namespace

bool reads_mask(const Arguments& args) { return args.atten_mask && args.sparse_mode <= kAllMask; }

void check_mask_dtypes(const Arguments& args) {
  if (args.pse_shift) {
    const bool bfloat = args.query.dtype() == ScalarType::BFloat16;
    PFA_CHECK(args.pse_shift->dtype() == (bfloat ? ScalarType::BFloat16 : ScalarType::Half),
              "pse_shift must have dtype ", bfloat ? "bfloat16" : "float16", " when query is ",
              dtype_text(args.query), ", got ", dtype_text(*args.pse_shift));
  }
  if (args.atten_mask) {
    const ScalarType dtype = args.atten_mask->dtype();
    PFA_CHECK(
        dtype == ScalarType::Bool || dtype == ScalarType::Char || dtype == ScalarType::Byte,
        "atten_mask must have dtype bool, int8 or uint8 with nonzero meaning masked out, got ",
        dtype_text(*args.atten_mask), " (an additive mask goes to pse_shift)");
  }
}

void check_sparse_mode(const Arguments& args) {
  const int64_t mode = args.sparse_mode;
  constexpr const char* kUnsupported[] = {"prefix", "global", "dilated", "block_local"};
  PFA_CHECK(mode < 5 || mode > 8, "sparse_mode ", mode, " (", kUnsupported[mode - 5],
            ") is not implemented, use a mode from 0 to 4");
  PFA_CHECK(mode >= 0 && mode <= kBand, "sparse_mode must be 0, 1, 2, 3 or 4, got ", mode);
}

void set_mask(const Arguments& args, Problem& problem) {
  if (args.sparse_mode > kAllMask) {
    if (args.atten_mask || !args.from_front_end) check_compressed_mask(args);
    return;
  }
  PFA_CHECK(args.atten_mask || args.sparse_mode == kDefault,
            "atten_mask must be given for sparse_mode 1, got None");
  if (args.atten_mask) check_full_mask(*args.atten_mask, problem);
}

void set_bias(const Arguments& args, Problem& problem) {
  if (!args.pse_shift) return;
  const Tensor& pse = *args.pse_shift;
  const bool ok = pse.dim() == 4 && (pse.size(0) == 1 || pse.size(0) == problem.batch) &&
                  pse.size(1) == problem.num_heads && pse.size(2) >= problem.seqlen_q &&
                  pse.size(3) >= problem.seqlen_k;
  PFA_CHECK(ok, "pse_shift must have shape (1 or B, N, Sq, Skv) with B = ", problem.batch,
            ", N = ", problem.num_heads, ", Sq >= ", problem.seqlen_q,
            " and Skv >= ", problem.seqlen_k, ", got ", shape_text(pse));
  problem.bias.dtype = pse.dtype() == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

void set_band(const Arguments& args, Problem& problem) {
  const int64_t mode = args.sparse_mode;
  const bool uses_tokens = mode == kBand || (mode == kDefault && args.atten_mask);
  if (uses_tokens) {
    check_tokens(args, problem);
    problem.band.lo = -clamp_tokens(args.pre_tokens);
    problem.band.hi = clamp_tokens(args.next_tokens);
  } else if (mode == kLeftUp || mode == kRightDown) {
    problem.band.hi = 0;
  }
  problem.band.bottom_right = mode == kRightDown || mode == kBand;
}

}  // namespace pfa
