// SPDX-License-Identifier: Apache-2.0
// What a block of threads works through, the same for its producer and its consumers, and what they
// tell each other in shared memory.
#pragma once

#include "config.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace pfa::cuda::sm90 {

// What a launch gets.
struct Arguments {
  Params params;
  TensorMaps maps;
  uint32_t blocks;  // of query rows, heads, batch elements and splits, without those of the tail
  // Heads, of all batch elements, whose blocks are done together, those with most keys first; 0:
  // blocks come in the order of their numbers.
  uint32_t section;
};

struct BlockIndex : BlockIndexOf<uint32_t> {
  uint32_t cut;  // its number among those of the tail, or kWhole

  static constexpr uint32_t kWhole = ~0u;
};
using Sequence = SequenceOf<int>;

template <class T>
struct Work;

// The blocks of work of this block of threads, or of the `kSlices` that share them. Results do not
// depend on who computes what.
template <int kSlices>
class Schedule {
 public:
  __device__ explicit Schedule(const Arguments& arguments) : a_(arguments) {}

  // The block of an iteration; false if there is none left.
  __device__ bool find(uint32_t iteration, BlockIndex& block) const {
    const Params& p = a_.params;
    if (a_.section == 0) {
      const uint32_t index =
          static_cast<uint32_t>(p.first_block) + worker() + iteration * workers();
      if (index >= a_.blocks) return find_piece((index - a_.blocks) / workers(), block);
      block = {decode_block(p, index), BlockIndex::kWhole};
      return true;
    }
    // There and back: who had the longest of one round has the shortest of the next.
    const uint32_t place = iteration % 2 == 0 ? worker() : workers() - 1 - worker();
    const uint32_t index = iteration * workers() + place;
    if (index >= a_.blocks) return false;
    const auto m_blocks = static_cast<uint32_t>(p.num_m_blocks);
    const auto num_heads = static_cast<uint32_t>(p.num_heads);
    const uint32_t first_head = index / (a_.section * m_blocks) * a_.section;
    const uint32_t in_section = index - first_head * m_blocks;
    const uint32_t heads = min(a_.section, static_cast<uint32_t>(p.batch) * num_heads - first_head);
    const uint32_t step = in_section / heads;
    const uint32_t head = first_head + in_section - step * heads;
    block.b = head / num_heads;
    block.head = static_cast<int>(head - block.b * num_heads);
    block.m_block = m_blocks - 1 - step;
    block.split = 0;
    block.cut = BlockIndex::kWhole;
    return true;
  }

  // Which of its block's tiles this worker computes, and where in the workspace, if anywhere, its
  // sums go. Only a block that sees all keys is ever cut.
  template <class T>
  __device__ static void share(const Params& p, const BlockIndex& block, Work<T>& work) {
    work.split = block.split;
    work.range = work.sequence.template tiles<T::kBlockN>(block.split, p.split.count);
    work.split_row = Work<T>::kNone;
    if (p.split.count > 1) {
      work.split_row =
          (int64_t{work.b} * p.num_heads + work.head) * p.seqlen_q + work.sequence.row_begin;
    } else if (block.cut != BlockIndex::kWhole) {
      const TailParams& tail = p.split.tail;
      const uint32_t first = block.cut * tail.tiles, begin = worker() * tail.share;
      work.split = static_cast<int>(worker() - tail.first_worker(block.cut));
      work.range.begin = static_cast<int>(max(begin, first) - first);
      work.range.end = static_cast<int>(min(begin + tail.share - first, tail.tiles));
      work.split_row = int64_t{block.cut} * T::kBlockM;
    }
  }

 private:
  [[nodiscard]] __device__ static uint32_t worker() { return blockIdx.x / kSlices; }
  [[nodiscard]] __device__ static uint32_t workers() { return gridDim.x / kSlices; }

  // A worker's pieces of the tail: the end of one block and the start of the next, or one.
  __device__ bool find_piece(uint32_t which, BlockIndex& block) const {
    const TailParams& tail = a_.params.split.tail;
    if (tail.blocks == 0) return false;
    const uint32_t begin = worker() * tail.share;
    block.cut = begin / tail.tiles + which;
    if (block.cut >= tail.blocks || block.cut * tail.tiles >= begin + tail.share) return false;
    block = {decode_block(a_.params, static_cast<uint32_t>(tail.first) + block.cut), block.cut};
    return true;
  }

  const Arguments& a_;
};

// A tile to compute on, and whether it has a packed mask. Of a dense mask the producer tells which
// tile comes first and which after another: consumers would need registers, and time at the start
// of each block, to look for them.
struct Visit {
  uint32_t word = 0;

  __device__ static Visit of(int n, bool has_bits) {
    return {static_cast<uint32_t>(n) << 1 | static_cast<uint32_t>(has_bits)};
  }
  [[nodiscard]] __device__ int n() const { return static_cast<int>(word >> 1); }
  [[nodiscard]] __device__ bool has_bits() const { return (word & 1) != 0; }
};

// Tiles that a warpgroup's rows see. What is to be done to the scores of some tiles alone is done
// to those that are not full; where it concerns all tiles, none is.
struct OwnRange : TileRange {
  int narrow;           // the last tile, if it is computed as if it had fewer keys, or kNone
  int narrow_keys;      // so many
  bool narrow_is_full;  // of those

  static constexpr int kNone = -1;
};

// One block of work. The producer writes it to shared memory, where consumers read what they need
// when they need it: it would occupy a dozen registers of theirs.
template <class T>
struct Work {
  OwnRange own[T::kConsumers];  // of each warpgroup
  TileRange range;
  Sequence sequence;
  int iteration;  // of this block of threads; kNone: no work is left
  int b, head, split;
  int64_t split_row;  // first row in the workspace, to which the sums go; kNone: they are whole
  Visit first;        // of a dense mask
  bool careful;       // keys that a row does not see must not reach it, whatever stands in K and V

  static constexpr int kNone = -1;
};

// A turn of a ring of buffers; one register, which counts in the unit of addresses of barriers.
template <int kSize>
struct Turn {
  static constexpr uint32_t kUnit = 8, kBytes = kSize * kUnit;
  uint32_t count = 0;

  [[nodiscard]] __device__ uint32_t barrier() const { return count % kBytes; }  // from the first's
  [[nodiscard]] __device__ uint32_t stage() const { return barrier() / kUnit; }
  [[nodiscard]] __device__ uint32_t parity() const { return count / kBytes % 2; }
  [[nodiscard]] __device__ Turn before() const { return {count - kUnit}; }
  __device__ void advance() { count += kUnit; }
};

// Shared memory by address.
template <class T>
struct Shared {
  uint32_t base;  // a multiple of 1024

  // The same memory as C++ sees it.
  [[nodiscard]] __device__ static char* pointer(uint32_t address) {
    extern __shared__ char memory[];
    return memory + (address - ptx::shared_address(memory));
  }
  // Of the block whose turn it is in the ring of Q.
  [[nodiscard]] __device__ Work<T>& work(Turn<T::kStagesQ> q) const {
    return reinterpret_cast<Work<T>*>(pointer(base + T::kWork))[q.count / q.kUnit % T::kWorkSlots];
  }
};

// With the rings of tiles; barriers at its end. A buffer is full when TMA has filled it and empty
// when every warp that reads it has said so.
template <class T>
struct Rings : Shared<T> {
  using TurnQ = Turn<T::kStagesQ>;
  using TurnK = Turn<T::kStages>;

  // Buffers of a turn, in units of 16 bytes, as descriptors have them.
  [[nodiscard]] __device__ uint32_t chunk_q(TurnQ q) const { return chunk<T::kQ, T::kBytesQ>(q); }
  [[nodiscard]] __device__ uint32_t chunk_k(TurnK k) const { return chunk<T::kK, T::kBytesK>(k); }
  [[nodiscard]] __device__ uint32_t chunk_v(TurnK v) const { return chunk<T::kV, T::kBytesV>(v); }
  // In bytes.
  [[nodiscard]] __device__ uint32_t q(TurnQ q) const { return chunk_q(q) * kChunkBytes; }
  [[nodiscard]] __device__ uint32_t k(TurnK k) const { return chunk_k(k) * kChunkBytes; }
  [[nodiscard]] __device__ uint32_t v(TurnK v) const { return chunk_v(v) * kChunkBytes; }
  [[nodiscard]] __device__ uint32_t bias(TurnK k) const {
    return chunk<T::kBias, T::kBytesBias>(k) * kChunkBytes;
  }

  // What comes after the tile of K of that turn. There are twice as many of them as buffers: it may
  // be read after K has been given back.
  [[nodiscard]] __device__ Visit& following(TurnK k) const {
    constexpr uint32_t kTurns = 2 * T::kStages;
    static_assert(T::kFollowing + kTurns * sizeof(Visit) <= T::kControlBytes);
    char* first = this->pointer(this->base + T::kControl + T::kFollowing);
    return reinterpret_cast<Visit*>(first)[k.count / k.kUnit % kTurns];
  }

  [[nodiscard]] __device__ uint32_t full_q(TurnQ q) const { return barrier<0>(q); }
  [[nodiscard]] __device__ uint32_t empty_q(TurnQ q) const { return barrier<1>(q); }
  [[nodiscard]] __device__ uint32_t full_k(TurnK k) const { return barrier<2>(k); }
  [[nodiscard]] __device__ uint32_t empty_k(TurnK k) const { return barrier<3>(k); }
  [[nodiscard]] __device__ uint32_t full_v(TurnK v) const { return barrier<4>(v); }
  [[nodiscard]] __device__ uint32_t empty_v(TurnK v) const { return barrier<5>(v); }

  __device__ void init_barriers() const {
    constexpr int kWarps = T::kConsumerThreads / kWarp;
    TurnQ q;
    for (int stage = 0; stage < T::kStagesQ; ++stage, q.advance()) {
      ptx::mbarrier_init(full_q(q), 1);
      ptx::mbarrier_init(empty_q(q), kWarps);
    }
    TurnK k;
    for (int stage = 0; stage < T::kStages; ++stage, k.advance()) {
      ptx::mbarrier_init(full_k(k), 1);
      ptx::mbarrier_init(empty_k(k), kWarps);
      ptx::mbarrier_init(full_v(k), 1);
      ptx::mbarrier_init(empty_v(k), kWarps);
    }
    ptx::fence_mbarrier_init();
  }

 private:
  template <int kFirst, int kBytes, class Turn>
  [[nodiscard]] __device__ uint32_t chunk(Turn turn) const {
    constexpr int kUnit = kChunkBytes * int{Turn::kUnit};
    static_assert(kBytes % kUnit == 0);
    return this->base / kChunkBytes + kFirst / kChunkBytes + turn.barrier() * (kBytes / kUnit);
  }
  // An `or` finds the address of a barrier, as the rings lie apart.
  template <int kRing, class Turn>
  [[nodiscard]] __device__ uint32_t barrier(Turn turn) const {
    constexpr int kRingBytes = 64;
    static_assert(Turn::kBytes <= kRingBytes && 6 * kRingBytes <= T::kFollowing);
    return (this->base | turn.barrier()) + T::kControl + kRing * kRingBytes;
  }
};

// Iterations that have to run again: a bit each, shared by iterations that are kBits apart; blocks
// of a cluster have the same. Behind them the producer notes that their run has begun.
template <class T>
class Suspects {
 public:
  static constexpr int kBits = 1024;
  __device__ explicit Suspects(const Shared<T>& shared) : words_(shared.base + T::kSuspects) {}

  __device__ void clear() const {
    if (threadIdx.x <= kBits / 32) *word(static_cast<int>(threadIdx.x)) = 0;
  }
  // For one warp.
  __device__ void begin() const {
    if (threadIdx.x % kWarp == 0) *word(kBits / 32) = 1;
    __syncwarp();
  }
  [[nodiscard]] __device__ bool has_begun() const { return *word(kBits / 32) != 0; }
  __device__ void add(int iteration) const {
    const int i = iteration % kBits / 32;
    const uint32_t bit = 1u << iteration % 32;
    if constexpr (T::kCluster == 1) {
      atomicOr(word(i), bit);
    } else {
      for (int rank = 0; rank < T::kCluster; ++rank) {
        ptx::or_in_cluster(ptx::address_in(words_ + 4 * i, rank), bit);
      }
    }
  }
  [[nodiscard]] __device__ bool has(int iteration) const {
    return (*word(iteration % kBits / 32) >> iteration % 32 & 1) != 0;
  }
  // All lanes of a warp call it together.
  [[nodiscard]] __device__ bool any() const {
    static_assert(kBits / 32 == kWarp);
    const int lane = static_cast<int>(recomputed(threadIdx.x) % kWarp);
    return __any_sync(0xffffffffu, *word(lane) != 0) != 0;
  }

 private:
  [[nodiscard]] __device__ uint32_t* word(int i) const {
    return reinterpret_cast<uint32_t*>(Shared<T>::pointer(words_ + 4 * i));
  }

  uint32_t words_;
};

// Named barriers.
enum Barrier : int { kAllThreads = 0, kAllConsumers = 1, kOneConsumer = 2, kTurnOfConsumer = 5 };

}  // namespace pfa::cuda::sm90
