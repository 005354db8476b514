// SPDX-License-Identifier: Apache-2.0
// The kernel: one block of threads computes one block of query rows of one head over one split of
// its keys. Grids are one-dimensional; nothing is shared between blocks, so results do not depend
// on their order.
#pragma once

#include "epilogue.cuh"

namespace pfa::cuda::sm80 {

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kTile.blocks_per_sm)
    forward_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  const BlockIndex block = decode_block(p, p.first_block + blockIdx.x);
  const Sequence sequence = Sequence::of<T::kBlockM>(p, block);
  const TileRange range = sequence.tiles<T::kBlockN>(block.split, p.split.count);
  Mainloop<T> mainloop(p, block, sequence, shared);
  // The first run trusts V. If it ends with an infinity or a NaN, masked keys may have brought it
  // in, and the block runs again with those keys isolated. Rows that see such a key keep the first
  // run's result.
  for (bool second = false;; second = true) {
    typename Mainloop<T>::Tiles tiles(p, block.b, block.m_block, range);
    mainloop.run(tiles, second);
    const bool suspicious = !T::Quant::kIsInteger && mainloop.has_nonfinite_output();
    Epilogue<T>::store(p, block, sequence, mainloop, shared, second);
    if (T::Quant::kIsInteger || second) return;
    if (!__syncthreads_or(suspicious)) return;
  }
}

}  // namespace pfa::cuda::sm80
