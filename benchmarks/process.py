# SPDX-License-Identifier: Apache-2.0
"""Commands with a time limit, whose results survive it."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

LOG_CHARACTERS = 4 << 20


@dataclass
class Outcome:
    returncode: int | None  # None: it could not be killed
    output: str  # stdout and stderr
    seconds: float
    timed_out: bool = False


def run(
    command: list[str],
    seconds: float,
    log: Path | None = None,
    grace: float = 3.0,
    **settings: str,
) -> Outcome:
    """Interrupts the command when its time is up, and `grace` seconds later kills it and its
    children: pytest writes its report when it is interrupted. FileNotFoundError if there is no such
    program."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **settings},
        start_new_session=True,
    )
    output, timed_out = "", False
    for limit, sent in ((seconds, signal.SIGINT), (grace, signal.SIGKILL), (grace, None)):
        try:
            output = process.communicate(timeout=max(limit, 0.1))[0]
            break
        except subprocess.TimeoutExpired:
            timed_out = True
            if sent == signal.SIGINT:
                process.send_signal(sent)
            elif sent is not None:
                os.killpg(process.pid, sent)
    if log is not None:
        log.write_text(output[-LOG_CHARACTERS:])
    return Outcome(process.returncode, output, time.monotonic() - started, timed_out)
