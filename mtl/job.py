"""What every job's command line has in common: arguments, settings, session, one JSON line, one-line failures."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from mtl.config import Settings, load_settings
from mtl.errors import MtlError
from mtl.session import open_session

log = logging.getLogger("mtl")

Work = Callable[[SparkSession, Settings, argparse.Namespace], dict[str, Any]]
Arguments = Callable[[argparse.ArgumentParser], None]


def run(name: str, description: str, work: Work, arguments: Arguments | None = None) -> None:
    """Run one job: parse, open the session, call ``work``, print its result as the last line on stdout.

    The exit status is 0, 1 where the result holds ``"failed": true`` (printed all the same), 2 for a wrong
    command line; any :class:`MtlError` or Spark error ends as one line on stderr and status 1.
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
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # a failed batch is reported once, by us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        settings = load_settings(parsed.conf, parsed.set)
        spark = open_session(settings.spark, f"oracle-mtl {name}")
        result = work(spark, settings, parsed)
        if "DATABRICKS_RUNTIME_VERSION" not in os.environ:  # there the session is not ours to stop
            spark.stop()
    except MtlError as error:
        _fail(name, str(error))
    except (PySparkException, Py4JError) as error:
        log.debug("Spark's own account", exc_info=True)
        _fail(name, f"{type(error).__name__}: {str(error)[:600]}")
    print(json.dumps(result), flush=True)
    if result.get("failed"):
        sys.exit(1)


def _fail(name: str, reason: str) -> None:
    print(f"{name}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    # The session may hold non-daemon threads that a plain exit would wait for.
    os._exit(1)
