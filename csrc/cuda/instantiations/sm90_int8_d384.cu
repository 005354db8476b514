// SPDX-License-Identifier: Apache-2.0
#ifdef PFA_WITH_SM90A
#include "../sm90/launch.cuh"

PFA_INSTANTIATE_SM90(Int8, 384)
#endif
