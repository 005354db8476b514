# SPDX-License-Identifier: Apache-2.0
"""Adapters to other libraries. Nothing here is imported by ``import pfa``; each is opt-in."""
