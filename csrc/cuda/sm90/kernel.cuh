// SPDX-License-Identifier: Apache-2.0
// The kernel: a warp that loads tiles by TMA and two or three warpgroups that compute on them.
// Nothing is shared between blocks, so results do not depend on their order.
#pragma once

#include "epilogue.cuh"
#include "producer.cuh"
#include "wide_kernel.cuh"

namespace pfa::cuda::sm90 {

// All blocks of work run and, if there are suspects, those run again. The first run trusts V. If it
// ends with an infinity or a NaN, masked keys may have brought it in, and the block runs again with
// those keys isolated. Rows that see such a key keep the first run's result.
template <class T>
__device__ __forceinline__ void forward(const Arguments& a) {
  extern __shared__ char unaligned[];
  const Rings<T> shared{(ptx::shared_address(unaligned) + 1023) / 1024 * 1024};
  const Suspects<T> suspects(shared);
  suspects.clear();
  if (threadIdx.x == 0) {
    shared.init_barriers();
    ptx::prefetch(&a.maps.q);
    ptx::prefetch(&a.maps.k);
    if constexpr (!T::kIsInteger) ptx::prefetch(&a.maps.v);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    ptx::give_up_registers<T::kProducerRegisters>();
    if (threadIdx.x >= kWarp) {
      ptx::barrier_sync(kAllThreads, T::kThreads);
      return;
    }
    Producer<T> producer(a, shared, suspects);
    for (;;) {
      producer.run();
      if (suspects.has_begun()) return;
      ptx::barrier_sync(kAllThreads, T::kThreads);
      if (!suspects.any()) return;
      suspects.begin();
    }
  } else {
    ptx::take_registers<T::kConsumerRegisters>();
    Consumer<T> consumer(a, shared);
    for (;;) {
      consumer.run([&](const Work<T>& work) {
        if (!work.careful && consumer.has_nonfinite_output(work.sequence)) {
          suspects.add(work.iteration);
        }
        Epilogue<T, Consumer<T>>::store(a.params, work, consumer, work.careful);
      });
      if (suspects.has_begun()) return;
      ptx::barrier_sync(kAllThreads, T::kThreads);
      if (!suspects.any()) return;
    }
  }
}

// Compiled for sm_90a alone; a library with it also has other code, in which the kernel is empty
// and which no GPU of compute capability 9.0 takes.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    forward_kernel(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (T::kCluster > 1) {
    wide_forward<T>(a);
  } else {
    forward<T>(a);
  }
#endif
}

}  // namespace pfa::cuda::sm90
