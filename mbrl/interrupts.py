"""Ctrl-C while the command `mbrl` starts: importing torch and MuJoCo takes seconds.

The interrupt may hit any line of any package, and some turn it into another error. So while the program
is the command, and only then, it ends the process at once; there is nothing to tidy up yet.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path


def leave(*_: object) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


def is_command() -> bool:
    """Whether this process is `mbrl` or `python -m mbrl`."""
    name, words = sys.argv[0] if sys.argv else "", sys.orig_argv
    if name == "-m":  # what Python puts there until it has found the module
        return words[words.index("-m") + 1 :][:1] == ["mbrl"]
    return Path(name).stem == "mbrl"


def end_startup() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, leave)
