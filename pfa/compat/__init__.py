# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for other libraries' interfaces. Nothing here is imported by ``import pfa``."""
