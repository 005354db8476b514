# SPDX-License-Identifier: Apache-2.0
"""Fused prompt attention as one PyTorch operator, ``torch.ops.pfa.forward``."""

import pathlib

import torch

from ._version import __version__

__all__ = ["__version__"]

torch.ops.load_library(str(pathlib.Path(__file__).with_name("_C.abi3.so")))
