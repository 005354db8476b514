# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences that are spread over the ranks of a torch.distributed group."""

from .context_parallel import StepReport, context_parallel_forward
from .shards import shard_sequence, unshard_sequence

__all__ = ["StepReport", "context_parallel_forward", "shard_sequence", "unshard_sequence"]
