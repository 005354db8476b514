# SPDX-License-Identifier: Apache-2.0
"""The logger `pfa`. PFA_LOG=debug shows its lines on stderr, beside those of the library."""

import logging
import os

logger = logging.getLogger("pfa")

if os.environ.get("PFA_LOG") == "debug":
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.DEBUG)
