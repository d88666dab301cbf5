"""A lock that one process of a machine (or of a shared file system that has locks) holds at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from mtl.errors import StateError


@contextmanager
def exclusive(path: str, what: str) -> Iterator[None]:
    """Hold the lock file at ``path``; it stays there, and the kernel frees the lock however its holder ends.

    Args:
        what: what runs once only, for the message.

    Raises:
        StateError: another process holds it; the message names that process.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise StateError(f"{what} is run by {holder}, which holds {path}: stop that one first") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
