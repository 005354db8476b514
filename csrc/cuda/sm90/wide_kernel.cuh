// SPDX-License-Identifier: Apache-2.0
// The 16-bit kernel above head_dim 256, for a cluster of two blocks of threads.
#pragma once

#include "epilogue.cuh"
#include "wide_consumer.cuh"
#include "wide_producer.cuh"

namespace pfa::cuda::sm90 {

// Calls step(work, second) for the blocks of work of this cluster: all, then, if there are
// suspects, those again, as in kernel.cuh.
template <class T, class Step>
__device__ void for_each_block(const Arguments& a, const Suspects<T>& suspects, const Step& step) {
  const Schedule<T::kSlices> schedule(a);
  for (bool second = false;; second = true) {
    BlockIndex block{};
    for (int iteration = 0; schedule.find(iteration, block); ++iteration) {
      if (second && !suspects.has(iteration)) continue;
      Work<T> work{};
      work.iteration = iteration;
      work.b = static_cast<int>(block.b);
      work.head = block.head;
      work.sequence = Sequence::of<T::kBlockM>(a.params, block);
      Schedule<T::kSlices>::share(a.params, block, work);
      step(work, second);
    }
    if (second) return;
    ptx::cluster_sync();
    if (!suspects.any()) return;
  }
}

template <class T>
__device__ __forceinline__ void wide_forward(const Arguments& a) {
  extern __shared__ char unaligned[];
  const WideShared<T> shared{(ptx::shared_address(unaligned) + 1023) / 1024 * 1024};
  const Suspects<T> suspects(shared);
  suspects.clear();
  if (threadIdx.x == 0) {
    shared.init_barriers();
    ptx::prefetch(&a.maps.q);
    ptx::prefetch(&a.maps.k);
    ptx::prefetch(&a.maps.v);
  }
  ptx::cluster_sync();
  if (threadIdx.x < kWarpgroup) {
    ptx::give_up_registers<T::kProducerRegisters>();
    WideProducer<T> producer(a, shared);
    for_each_block<T>(a, suspects,
                      [&](const Work<T>& work, bool second) { producer.run(work, second); });
  } else {
    ptx::take_registers<T::kConsumerRegisters>();
    WideConsumer<T> consumer(a, shared);
    for_each_block<T>(a, suspects, [&](const Work<T>& work, bool second) {
      consumer.run(work, second);
      if (!second && consumer.has_nonfinite_output(work.sequence)) suspects.add(work.iteration);
      Epilogue<T, WideConsumer<T>>::store(a.params, work, consumer, second);
    });
  }
  // Shared memory that the other block writes to stays until both have ended.
  ptx::cluster_sync();
}

}  // namespace pfa::cuda::sm90
