// SPDX-License-Identifier: Apache-2.0
// The kernel: a warp that loads tiles by TMA and two or three warpgroups that compute on them.
// Nothing is shared between blocks, so results do not depend on their order.
#pragma once

#include "epilogue.cuh"
#include "producer.cuh"

namespace pfa::cuda::sm90 {

// Calls step(work, iteration) for the blocks of work of this block of threads: all, then, if there
// are suspects, those again. The first run trusts V. If it ends with an infinity or a NaN, masked
// keys may have brought it in, and the block runs again with those keys isolated. Rows that see
// such a key keep the first run's result.
template <class T, class Step>
__device__ void for_each_block(const Arguments& a, const Suspects<T>& suspects, const Step& step) {
  const Schedule schedule(a);
  for (bool second = false;; second = true) {
    for (int iteration = 0;; ++iteration) {
      BlockIndex block{};
      if (!schedule.find(iteration, block)) break;
      if (!second || suspects.has(iteration)) step(Work<T>(a.params, block), iteration, second);
    }
    if (second) return;
    ptx::barrier_sync(kAllThreads, T::kThreads);
    if (!suspects.any()) return;
  }
}

template <class T>
__device__ __forceinline__ void forward(const Arguments& a) {
  extern __shared__ char unaligned[];
  const Shared<T> shared{(ptx::shared_address(unaligned) + 1023) / 1024 * 1024};
  const Suspects<T> suspects(shared);
  suspects.clear();
  if (threadIdx.x == 0) {
    shared.init_barriers();
    ptx::prefetch(&a.maps.q);
    ptx::prefetch(&a.maps.k);
    ptx::prefetch(&a.maps.v);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    ptx::give_up_registers<T::kProducerRegisters>();
    Producer<T> producer(a, shared);
    for_each_block<T>(a, suspects, [&](const Work<T>& work, int, bool) {
      if (threadIdx.x < kWarp) producer.run(work);
    });
  } else {
    ptx::take_registers<T::kConsumerRegisters>();
    Consumer<T> consumer(a, shared);
    for_each_block<T>(a, suspects, [&](const Work<T>& work, int iteration, bool second) {
      consumer.run(work, second);
      if (!second && consumer.has_nonfinite_output(work.sequence)) suspects.add(iteration);
      Epilogue<T>::store(a.params, work, consumer, second);
    });
  }
}

// Compiled for sm_90a alone; a library with it also has other code, in which the kernel is empty
// and which no GPU of compute capability 9.0 takes.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    forward_kernel(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  forward<T>(a);
#endif
}

}  // namespace pfa::cuda::sm90
