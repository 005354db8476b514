# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of pfa beside its peers: ``python -m benchmarks --help``."""
