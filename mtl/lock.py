"""A lock that one process of a machine (or of a shared file system that has locks) holds at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from mtl.errors import LockedError, StateError


@contextmanager
def exclusive(path: str, what: str) -> Iterator[None]:
    """Hold the lock file at ``path``; it stays there, and the kernel frees the lock however its holder ends.

    Args:
        what: what runs once only, for the message.

    Raises:
        LockedError: another process holds it, which the message names.
        StateError: it cannot be held there.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StateError(f"{path} cannot be locked: {error.strerror}") from None
    with open(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read() or "another process"
            raise LockedError(f"{what} is run by {holder}, which holds {path}: stop that one first") from None
        except OSError as error:
            raise StateError(f"{path} cannot be locked, a local folder could be: {error.strerror}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
