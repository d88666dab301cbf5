"""What every job's command line has in common, with Spark or without: arguments, settings, one JSON line, one-line failures."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from mtl.config import Settings, load_settings
from mtl.errors import InputError, MtlError

log = logging.getLogger("mtl")

Arguments = Callable[[argparse.ArgumentParser], None]
Work = Callable[[Settings, argparse.Namespace], dict[str, Any]]


def execute(
    name: str,
    description: str,
    work: Work,
    arguments: Arguments | None = None,
    failures: tuple[type[Exception], ...] = (),
) -> None:
    """Run one job: parse, call ``work``, print its result as the last line on stdout.

    The exit status is 0, 1 where the result holds ``"failed": true`` (printed all the same), 2 for a wrong
    command line; any :class:`MtlError` or other of ``failures`` ends as one line on stderr and status 1.
    """
    parser = argparse.ArgumentParser(
        prog=f"jobs/{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if arguments:
        arguments(parser)
    parser.add_argument(
        "--conf",
        action="append",
        default=[],
        metavar="FILE",
        help="TOML settings over conf/default.toml; repeatable, later wins",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting, such as tables.root=DIR; repeatable",
    )
    parsed = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        result = work(load_settings(parsed.conf, parsed.set), parsed)
    except MtlError as error:
        _fail(name, str(error))
    except failures as error:
        log.debug("its own account", exc_info=True)
        _fail(name, _reason(error))
    print(json.dumps(result), flush=True)
    if result.get("failed"):
        sys.exit(1)


def _reason(error: Exception) -> str:
    """In one line; where one of ours was raised in a Python worker, that one."""
    of_worker = re.search(r"^mtl\.errors\.\w+: (.+)$", str(error), re.MULTILINE)
    return of_worker[1] if of_worker else f"{type(error).__name__}: {str(error)[:600]}"


def _fail(name: str, reason: str) -> None:
    print(f"{name}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    # A Spark session may hold non-daemon threads that a plain exit would wait for.
    os._exit(1)


def parse_renames(text: str) -> dict[str, str]:
    """``ours=theirs,…`` as a mapping from our name to the file's.

    Raises:
        InputError: a part is not ours=theirs, or a name is given twice.
    """
    renames: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs):
            raise InputError(f"--columns {part!r}: write ours=theirs, for example input_id=item")
        if ours in renames or theirs in renames.values():
            raise InputError(f"--columns {part!r}: {ours if ours in renames else theirs} is renamed twice")
        renames[ours] = theirs
    return renames
