"""Answers over HTTP: predictions, the best inputs, and learning from what users do."""

import argparse
from typing import Any

from mtl.command import execute
from mtl.config import Settings
from mtl.errors import ConfigError

DESCRIPTION = """\
Serve the live model version over HTTP: predict, top, observe and more; GET /docs lists them.

The server keeps a copy of what it needs of the tables and follows them as they change; it starts no Spark, and answers
from its copy when the tables cannot be read. Observations go to a durable log, a folder that jobs/ingest.py takes as
--events. SIGTERM ends it after the requests in hand."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (serve.host)")
    parser.add_argument("--port", type=int, help="port, 0 for any that is free (serve.port)")


def work(settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    try:
        import deltalake  # noqa: F401 (of the refresher, a process that would be started again and again)

        from mtl.serving.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'oracle-mtl[serve]'") from error
    given = {name: value for name in ("host", "port") if (value := getattr(parsed, name)) is not None}
    if not 0 <= given.get("port", 0) <= 65535:
        raise ConfigError(f"--port {parsed.port}: from 0 to 65535")
    return serve(settings.model_copy(update={"serve": settings.serve.model_copy(update=given)}))


if __name__ == "__main__":
    execute("serve", DESCRIPTION, work, arguments)
