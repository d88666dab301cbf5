"""A job that dies by kill -9 at a named point: ``doomed.py POINT JOB ARGUMENTS…``.

POINT is ``module:function:before|after:N`` or ``module:Class.method:before|after:N``, the N-th call counting from 0. The
job itself knows nothing of it. A point that is never reached lets the job end as it does.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import signal
import sys
from typing import Any


def owner_of(point: str) -> tuple[Any, str]:
    """The module or class that the point's function is in, and the function's name."""
    module, name = point.split(":")[:2]
    *owners, name = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def doom(point: str) -> None:
    owner, name = owner_of(point)
    when, number = point.split(":")[2:]
    real, calls = getattr(owner, name), [0]

    @functools.wraps(real)
    def mortal(*arguments: Any, **named: Any) -> Any:
        mine = calls[0] == int(number)
        calls[0] += 1
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **named)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, mortal)


if __name__ == "__main__":
    _, point, job, *arguments = sys.argv
    doom(point)
    sys.argv = [job, *arguments]
    runpy.run_path(job, run_name="__main__")
