# SPDX-License-Identifier: Apache-2.0
"""Fused prompt attention as one PyTorch operator, ``torch.ops.pfa.forward``."""

from . import _library, _log  # noqa: F401  (PFA_LOG is read here)
from ._library import cpu_isa
from ._version import __version__
from .api import prompt_flash_attention
from .merge import merge_states
from .portable import check_portable
from .quant import trans_quant_param

__all__ = [
    "__version__",
    "check_portable",
    "cpu_isa",
    "merge_states",
    "prompt_flash_attention",
    "trans_quant_param",
]

if _library.load_error is None:
    from . import _fake  # noqa: F401  (registers the operator's shape rule)
