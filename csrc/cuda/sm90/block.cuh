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
  uint32_t blocks;  // of query rows, heads, batch elements and splits
  // Heads, of all batch elements, whose blocks are done together, those with most keys first; 0:
  // blocks come in the order of their numbers.
  uint32_t section;
};

using BlockIndex = BlockIndexOf<uint32_t>;
using Sequence = SequenceOf<int>;

// The blocks of work of this block of threads, or of the cluster that shares them. Results do not
// depend on who computes what.
template <int kCluster>
class Schedule {
 public:
  __device__ explicit Schedule(const Arguments& arguments) : a_(arguments) {}

  // The block of an iteration; false if there is none left.
  __device__ bool find(uint32_t iteration, BlockIndex& block) const {
    const Params& p = a_.params;
    if (a_.section == 0) {
      const uint32_t index =
          static_cast<uint32_t>(p.first_block) + worker() + iteration * workers();
      if (index >= a_.blocks) return false;
      block = decode_block(p, index);
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
    return true;
  }

 private:
  [[nodiscard]] __device__ static uint32_t worker() { return blockIdx.x / kCluster; }
  [[nodiscard]] __device__ static uint32_t workers() { return gridDim.x / kCluster; }

  const Arguments& a_;
};

// One block of work. The producer writes it to shared memory, where consumers read what they need
// when they need it: it would occupy a dozen registers of theirs.
template <class T>
struct Work {
  TileRange own[T::kConsumers];  // of the rows of each warpgroup
  TileRange range;
  Sequence sequence;
  int iteration;  // of this block of threads; kNone: no work is left
  int b, head, split;

  static constexpr int kNone = -1;
};

// A turn of a ring of buffers; one register.
template <int kSize>
struct Turn {
  uint32_t count = 0;

  [[nodiscard]] __device__ int stage() const { return static_cast<int>(count % kSize); }
  [[nodiscard]] __device__ uint32_t parity() const { return count / kSize % 2; }
  [[nodiscard]] __device__ Turn before() const { return {count - 1}; }
  __device__ void advance() { ++count; }
};

// Shared memory by address; barriers at its end. A buffer is full when TMA has filled it and empty
// when every warp that reads it has said so.
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
    return reinterpret_cast<Work<T>*>(pointer(base + T::kWork))[q.count % T::kWorkSlots];
  }
  [[nodiscard]] __device__ uint32_t q(int stage) const { return base + T::kQ + stage * T::kBytesQ; }
  [[nodiscard]] __device__ uint32_t k(int stage) const { return base + T::kK + stage * T::kBytesK; }
  [[nodiscard]] __device__ uint32_t v(int stage) const { return base + T::kV + stage * T::kBytesK; }
  [[nodiscard]] __device__ uint32_t bias(int stage) const {
    return base + T::kBias + stage * T::kBytesBias;
  }
  [[nodiscard]] __device__ uint32_t full_q(int stage) const { return barrier(stage); }
  [[nodiscard]] __device__ uint32_t empty_q(int stage) const {
    return barrier(T::kStagesQ + stage);
  }
  [[nodiscard]] __device__ uint32_t full_k(int stage) const { return ring_barrier(0, stage); }
  [[nodiscard]] __device__ uint32_t empty_k(int stage) const { return ring_barrier(1, stage); }
  [[nodiscard]] __device__ uint32_t full_v(int stage) const { return ring_barrier(2, stage); }
  [[nodiscard]] __device__ uint32_t empty_v(int stage) const { return ring_barrier(3, stage); }

  __device__ void init_barriers() const {
    constexpr int kWarps = T::kConsumerThreads / kWarp;
    for (int stage = 0; stage < T::kStagesQ; ++stage) {
      ptx::mbarrier_init(full_q(stage), 1);
      ptx::mbarrier_init(empty_q(stage), kWarps);
    }
    for (int stage = 0; stage < T::kStages; ++stage) {
      ptx::mbarrier_init(full_k(stage), 1);
      ptx::mbarrier_init(empty_k(stage), kWarps);
      ptx::mbarrier_init(full_v(stage), 1);
      ptx::mbarrier_init(empty_v(stage), kWarps);
    }
    ptx::fence_mbarrier_init();
  }

 protected:
  [[nodiscard]] __device__ uint32_t ring_barrier(int ring, int stage) const {
    return barrier(2 * T::kStagesQ + ring * T::kStages + stage);
  }
  [[nodiscard]] __device__ uint32_t barrier(int i) const { return base + T::kControl + 8 * i; }
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
