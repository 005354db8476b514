// SPDX-License-Identifier: Apache-2.0
#include "../sm80/launch.cuh"

PFA_INSTANTIATE_SM80(Float16, 192)
