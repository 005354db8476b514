// SPDX-License-Identifier: Apache-2.0
// Reads a dense mask once: packs it into bits in the order in which the attention kernel's threads
// hold scores (fragment.cuh), and classifies each tile as empty, partial or full, so that only
// partial tiles cost anything later. All on the device: capturable, no synchronisation.
//
// The band and the lengths are not looked at. Rows and keys that do not exist are masked in the
// bits and do not keep a tile from being full; the lengths cut them off anyway.
#include "check.h"
#include "launch.h"
#include "mask.cuh"
#include "mask_pack.h"

namespace pfa::cuda {
namespace {

constexpr int kCellsPerBlock = 4;  // cells of 64 keys that a block reads
constexpr int kGranule = 32;       // keys: divides every tile
constexpr int kGranulesOfCell = kMaskKeys / kGranule;

struct PackParams {
  Mask mask;
  int64_t seqlen_q, seqlen_k;
  PackedMaskParams packed;
  int64_t num_m_blocks, key_blocks, key_cells;
  int64_t first_block;
  int block_m, block_n;
  bool vectorised;  // every row starts at a multiple of 16 bytes
};

// Bits 8 i + {0, 1} of a row's mask, shifted down by the lane's column, -> bits 4 i + {0, 1}.
__device__ __forceinline__ uint32_t gather_pairs(uint32_t x) {
  return (x & 0x3u) | (x >> 4 & 0x30u) | (x >> 8 & 0x300u) | (x >> 12 & 0x3000u);
}

// What a warp has seen of each granule of its rows: a bit per granule.
struct Seen {
  uint32_t kept = 0, masked = 0;
};

// Which of 16 bytes are not 0: byte 4 w + b in bit 8 b + w.
__device__ __forceinline__ uint32_t nonzero_bytes(const uint4& x) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    bits |= ((((words[w] & 0x7f7f7f7fu) + 0x7f7f7f7fu) | words[w]) & 0x80808080u) >> (7 - w);
  }
  return bits;
}

// pack_cell of a lane's 16 keys, from 16 (lane % 4) on, of the rows lane / 4 and 8 below.
__device__ __forceinline__ uint32_t pack_words(const uint4& upper, const uint4& lower, int granule,
                                               Seen& seen) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const uint32_t mine = nonzero_bytes(upper) | nonzero_bytes(lower) << 4;
  seen.kept |= static_cast<uint32_t>(mine != ~0u) << (granule + lane / 2 % 2);
  seen.masked |= static_cast<uint32_t>(mine != 0) << (granule + lane / 2 % 2);
  // Of 16 keys, the lane's columns c = 0 and 1 of tiles n = 0 and 1 and rows r = upper and lower
  // are then in bits 8 c + 4 r + 2 n, and belong in bits 4 n + 2 r + c.
  const int shift = lane % 2 * 16 + lane / 2 % 2;
  uint32_t bytes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t first = __shfl_sync(0xffffffffu, mine, 2 * i, 4) >> shift;
    const uint32_t second = __shfl_sync(0xffffffffu, mine, 2 * i + 1, 4) >> shift;
    const uint32_t x = __byte_perm(first, second, 0x5410);
    bytes[i] = (x & 0x00410041u) | (x >> 7 & 0x00820082u) | (x >> 2 & 0x00040004u) |
               (x >> 9 & 0x00080008u) | (x << 2 & 0x00100010u) | (x >> 5 & 0x00200020u);
  }
  return __byte_perm(bytes[0], bytes[1], 0x6420);
}

// All cells of a block, which exist whole: every load is under way before the first is used.
__device__ __forceinline__ void pack_cells(const PackParams& p, const uint8_t* rows,
                                           uint32_t* words, Seen& seen) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const uint8_t* from = rows + lane / 4 * p.mask.row + lane % 4 * kChunkBytes;
  uint4 bytes[kCellsPerBlock][2];
#pragma unroll
  for (int i = 0; i < kCellsPerBlock; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bytes[i][half] =
          *reinterpret_cast<const uint4*>(from + 8 * half * p.mask.row + i * kMaskKeys);
    }
  }
#pragma unroll
  for (int i = 0; i < kCellsPerBlock; ++i) {
    words[i * kWarp + lane] = pack_words(bytes[i][0], bytes[i][1], i * kGranulesOfCell, seen);
  }
  seen.kept = __reduce_or_sync(0xffffffffu, seen.kept);
  seen.masked = __reduce_or_sync(0xffffffffu, seen.masked);
}

// 16 rows by 64 keys: reads the bytes and writes the lane's word. kWhole: all of them exist.
template <bool kWhole>
__device__ __forceinline__ void pack_cell(const PackParams& p, const uint8_t* rows,
                                          int64_t row_begin, int64_t key_begin, int granule,
                                          uint32_t* words, Seen& seen) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t rows_left = p.seqlen_q - row_begin, keys_left = p.seqlen_k - key_begin;
  bool masked[kMaskRows][2];
#pragma unroll
  for (int r = 0; r < kMaskRows; ++r) {
    const uint8_t* row = rows + r * p.mask.row + key_begin + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = kWhole || (r < rows_left && half * kWarp + lane < keys_left);
      masked[r][half] = !exists || row[half * kWarp] != 0;
    }
  }
  uint32_t mine[2] = {~0u, ~0u};  // of row `lane`, for lanes below 16
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t exist =
        kWhole ? ~0u : __ballot_sync(0xffffffffu, half * kWarp + lane < keys_left);
    uint32_t some_kept = 0, some_masked = 0;
#pragma unroll
    for (int r = 0; r < kMaskRows; ++r) {
      const uint32_t row_mask = __ballot_sync(0xffffffffu, masked[r][half]);
      if (lane == r) mine[half] = row_mask;
      some_kept |= ~row_mask;
      if (kWhole || r < rows_left) some_masked |= row_mask;
    }
    seen.kept |= static_cast<uint32_t>((some_kept & exist) != 0) << (granule + half);
    seen.masked |= static_cast<uint32_t>((some_masked & exist) != 0) << (granule + half);
  }
  const int row = accumulator_row(lane, 0), column = accumulator_column(lane, 0);
  uint32_t word = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t upper = __shfl_sync(0xffffffffu, mine[half], row) >> column;
    const uint32_t lower = __shfl_sync(0xffffffffu, mine[half], row + 8) >> column;
    word |= (gather_pairs(upper) | gather_pairs(lower) << 2) << (16 * half);
  }
  words[lane] = word;
}

__device__ TileClass class_of(const Seen& seen, int first_granule, int granules) {
  const uint32_t window = ((1u << granules) - 1) << first_granule;
  if ((seen.kept & window) == 0) return kEmpty;
  return (seen.masked & window) == 0 ? kFull : kPartial;
}

__global__ void pack_mask_kernel(const __grid_constant__ PackParams p) {
  __shared__ uint32_t kept, masked;
  if (threadIdx.x == 0) kept = masked = 0;
  __syncthreads();
  int64_t index = p.first_block + blockIdx.x;
  const int64_t key_block = index % p.key_blocks;
  index /= p.key_blocks;
  const int64_t m_block = index % p.num_m_blocks, b = index / p.num_m_blocks;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row_begin = m_block * p.block_m + warp * kMaskRows;
  const uint8_t* rows = p.mask.data + b * p.mask.batch + row_begin * p.mask.row;
  uint32_t* words = const_cast<uint32_t*>(p.packed.bits) + b * p.packed.bits_batch +
                    row_begin / kMaskRows * p.packed.bits_row_group;
  Seen seen;
  const int64_t first_cell = key_block * kCellsPerBlock;
  const bool has_rows = row_begin + kMaskRows <= p.seqlen_q;
  const bool in_words =
      p.vectorised && has_rows && (first_cell + kCellsPerBlock) * kMaskKeys <= p.seqlen_k;
  if (in_words) pack_cells(p, rows + first_cell * kMaskKeys, words + first_cell * kWarp, seen);
  for (int i = 0; !in_words && i < kCellsPerBlock; ++i) {
    const int64_t cell = first_cell + i;
    if (cell >= p.key_cells) break;
    const int granule = i * kGranulesOfCell;
    const bool whole = has_rows && (cell + 1) * kMaskKeys <= p.seqlen_k;
    if (whole) {
      pack_cell<true>(p, rows, row_begin, cell * kMaskKeys, granule, words + cell * kWarp, seen);
    } else {
      pack_cell<false>(p, rows, row_begin, cell * kMaskKeys, granule, words + cell * kWarp, seen);
    }
  }
  if (threadIdx.x % kWarp == 0) {
    atomicOr(&kept, seen.kept);
    atomicOr(&masked, seen.masked);
  }
  __syncthreads();
  const int granules = p.block_n / kGranule;
  const int64_t n_tile = key_block * (kCellsPerBlock * kMaskKeys / p.block_n) + threadIdx.x;
  const int first_granule = static_cast<int>(threadIdx.x) * granules;
  if (first_granule * kGranule >= kCellsPerBlock * kMaskKeys) return;
  if (n_tile * p.block_n >= p.seqlen_k) return;
  uint8_t* classes = const_cast<uint8_t*>(p.packed.classes) + b * p.packed.classes_batch +
                     m_block * p.packed.classes_m_block;
  classes[n_tile] = class_of({kept, masked}, first_granule, granules);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PackedMaskPlan::PackedMaskPlan(const Problem& problem, int block_m, int block_n)
    : masks(problem.mask.batch == 0 ? 1 : problem.batch),
      row_groups(ceil_div(problem.seqlen_q, block_m) * block_m / kMaskRows),
      key_cells(ceil_div(ceil_div(problem.seqlen_k, block_n) * block_n, kMaskKeys)),
      num_m_blocks(ceil_div(problem.seqlen_q, block_m)),
      num_tiles(ceil_div(problem.seqlen_k, block_n)) {}

int64_t PackedMaskPlan::bits_bytes() const {
  return masks * row_groups * key_cells * kWarp * int64_t{sizeof(uint32_t)};
}

int64_t PackedMaskPlan::classes_bytes() const { return masks * num_m_blocks * num_tiles; }

PackedMaskParams PackedMaskPlan::params(void* bits, void* classes) const {
  PackedMaskParams params;
  params.bits = static_cast<const uint32_t*>(bits);
  params.classes = static_cast<const uint8_t*>(classes);
  params.bits_row_group = key_cells * kWarp;
  params.bits_batch = masks == 1 ? 0 : row_groups * params.bits_row_group;
  params.classes_m_block = num_tiles;
  params.classes_batch = masks == 1 ? 0 : num_m_blocks * num_tiles;
  return params;
}

void pack_mask(const Problem& problem, const PackedMaskPlan& plan, const PackedMaskParams& packed,
               int block_m, int block_n, cudaStream_t stream) {
  PackParams p{};
  p.mask = problem.mask;
  p.seqlen_q = problem.seqlen_q;
  p.seqlen_k = problem.seqlen_k;
  p.packed = packed;
  p.num_m_blocks = plan.num_m_blocks;
  p.key_cells = plan.key_cells;
  p.key_blocks = ceil_div(plan.key_cells, kCellsPerBlock);
  p.block_m = block_m;
  p.block_n = block_n;
  const auto address = reinterpret_cast<uintptr_t>(p.mask.data);
  p.vectorised = address % kChunkBytes == 0 && p.mask.row % kChunkBytes == 0 &&
                 p.mask.batch % kChunkBytes == 0;
  const int64_t blocks = plan.masks * p.num_m_blocks * p.key_blocks;
  while (p.first_block < blocks) {
    const int64_t left = blocks - p.first_block;
    const auto grid = static_cast<unsigned>(left < kMaxGrid ? left : kMaxGrid);
    pack_mask_kernel<<<grid, block_m / kMaskRows * kWarp, 0, stream>>>(p);
    check(cudaGetLastError(), "launch pack_mask");
    p.first_block += grid;
  }
}

}  // namespace pfa::cuda
