"""A network of the tests' own.

Chromium drops its connections, those to 127.0.0.1 as well, whenever an interface of the machine comes or goes
(net::ERR_NETWORK_CHANGED), as those of containers do all the time while other tests run or images are built.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000  # linux/sched.h


@contextmanager
def own_network() -> Iterator[bool]:
    """What this thread starts from now on has a loopback of its own and nothing else. False without the right to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            yield False
            return
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield True
        finally:
            if libc.setns(before, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "the network of the machine is not entered again")
    finally:
        os.close(before)
