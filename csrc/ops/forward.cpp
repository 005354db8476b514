// SPDX-License-Identifier: Apache-2.0
#include "forward.h"

#include <stdexcept>

namespace pfa {

Tensor forward(const Arguments& /*args*/) { throw std::runtime_error("pfa.forward: not built yet"); }

}  // namespace pfa
