# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences that are spread over the ranks of a torch.distributed group.

Importing it also lets torch.ops.pfa.forward take DTensors.
"""

from .. import _library
from .context_parallel import StepReport, context_parallel_forward
from .shards import shard_sequence, unshard_sequence

__all__ = ["StepReport", "context_parallel_forward", "shard_sequence", "unshard_sequence"]

if _library.load_error is None:
    from . import dtensor  # noqa: F401
