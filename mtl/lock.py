"""One process at a time: a lock on a file, which the operating system gives back when its holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mtl.errors import StateError


@contextmanager
def exclusive(path: str, what: str) -> Iterator[None]:
    """Hold the lock at ``path``.

    Args:
        path: a local file, made where there is none, its folder too.
        what: what the lock is for, as the error says it: "model version 3".

    Raises:
        StateError: another process holds it.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StateError(
                f"{what} is in the hands of another job (process {holder}): stop that one first"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
