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
  int64_t blocks;  // of query rows, heads, batch elements and splits
  // A block of threads takes the blocks m and num_m_blocks - 1 - m of a head in turn: with the band
  // of a causal mask all pairs are the same work.
  bool in_pairs;
};

// The blocks of work of this block of threads. Results do not depend on who computes what.
class Schedule {
 public:
  __device__ explicit Schedule(const Arguments& arguments) : a_(arguments) {}

  // The block of an iteration; false if there is none left.
  __device__ bool find(int iteration, BlockIndex& block) const {
    const Params& p = a_.params;
    if (!a_.in_pairs) {
      if (index(iteration) >= a_.blocks) return false;
      block = decode_block(p, index(iteration));
      return true;
    }
    const int64_t pairs = p.num_m_blocks / 2, pair = index(iteration / 2);
    if (pair >= a_.blocks / 2) return false;
    const int64_t head = pair / pairs, m = pair - head * pairs;
    block.b = head / p.num_heads;
    block.head = static_cast<int>(head - block.b * p.num_heads);
    block.m_block = iteration % 2 != 0 ? m : p.num_m_blocks - 1 - m;
    block.split = 0;
    return true;
  }

 private:
  [[nodiscard]] __device__ int64_t index(int turn) const {
    return a_.params.first_block + blockIdx.x + static_cast<int64_t>(turn) * gridDim.x;
  }

  const Arguments& a_;
};

// One block of work.
template <class T>
struct Work {
  BlockIndex block;
  Sequence sequence;
  TileRange range;

  __device__ Work(const Params& p, const BlockIndex& index)
      : block(index),
        sequence(Sequence::of<T::kBlockM>(p, block)),
        range(sequence.template tiles<T::kBlockN>(p.band, block.split, p.split.count)) {}
};

// Turns of a ring of buffers.
template <int kSize>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage < kSize) return;
    stage = 0;
    parity ^= 1;
  }
};

// Shared memory by address; barriers at its end. A buffer is full when TMA has filled it and empty
// when every warp that reads it has said so.
template <class T>
struct Shared {
  uint32_t base;  // a multiple of 1024

  // The same memory as C++ sees it.
  [[nodiscard]] __device__ static char* pointer(uint32_t address) {
    return static_cast<char*>(__cvta_shared_to_generic(address));
  }
  [[nodiscard]] __device__ uint32_t q() const { return base + T::kQ; }
  [[nodiscard]] __device__ uint32_t k(int stage) const { return base + T::kK + stage * T::kBytesK; }
  [[nodiscard]] __device__ uint32_t v(int stage) const { return base + T::kV + stage * T::kBytesK; }
  [[nodiscard]] __device__ uint32_t bias(int stage) const {
    return base + T::kBias + stage * T::kBytesBias;
  }
  [[nodiscard]] __device__ uint32_t full_q() const { return barrier(0); }
  [[nodiscard]] __device__ uint32_t empty_q() const { return barrier(1); }
  [[nodiscard]] __device__ uint32_t full_k(int stage) const { return barrier(2 + stage); }
  [[nodiscard]] __device__ uint32_t empty_k(int stage) const {
    return barrier(2 + T::kStages + stage);
  }
  [[nodiscard]] __device__ uint32_t full_v(int stage) const {
    return barrier(2 + 2 * T::kStages + stage);
  }
  [[nodiscard]] __device__ uint32_t empty_v(int stage) const {
    return barrier(2 + 3 * T::kStages + stage);
  }

  __device__ void init_barriers() const {
    constexpr int kWarps = T::kConsumerThreads / kWarp;
    ptx::mbarrier_init(full_q(), 1);
    ptx::mbarrier_init(empty_q(), kWarps);
    for (int stage = 0; stage < T::kStages; ++stage) {
      ptx::mbarrier_init(full_k(stage), 1);
      ptx::mbarrier_init(empty_k(stage), kWarps);
      ptx::mbarrier_init(full_v(stage), 1);
      ptx::mbarrier_init(empty_v(stage), kWarps);
    }
    ptx::fence_mbarrier_init();
  }

 private:
  [[nodiscard]] __device__ uint32_t barrier(int i) const { return base + T::kControl + 8 * i; }
};

// Iterations that have to run again: a bit each, shared by iterations that are kBits apart.
template <class T>
class Suspects {
 public:
  static constexpr int kBits = 1024;
  __device__ explicit Suspects(const Shared<T>& shared) : words_(shared.base + T::kSuspects) {}

  __device__ void clear() const {
    if (threadIdx.x < kBits / 32) *word(static_cast<int>(threadIdx.x)) = 0;
  }
  __device__ void add(int iteration) const {
    atomicOr(word(iteration % kBits / 32), 1u << iteration % 32);
  }
  [[nodiscard]] __device__ bool has(int iteration) const {
    return (*word(iteration % kBits / 32) >> iteration % 32 & 1) != 0;
  }
  [[nodiscard]] __device__ bool any() const {
    uint32_t found = 0;
    for (int i = 0; i < kBits / 32; ++i) found |= *word(i);
    return found != 0;
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
