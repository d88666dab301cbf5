"""Files and streams into the tables: events once each, attributes by key, refused rows into quarantine."""

import argparse
import signal
import threading
from typing import Any

from pyspark.sql import SparkSession

from mtl.command import parse_renames
from mtl.config import Settings
from mtl.errors import InputError
from mtl.ingest import ingest_files
from mtl.intake import ingest_stream
from mtl.job import run
from mtl.schema import INPUTS, USER_ATTRIBUTES
from mtl.tables import Tables

DESCRIPTION = """\
Ingest files of events, input attributes and user attributes: Parquet, CSV with a header, or JSON lines.

events: user_id, input_id, label; weight (default 1), offset (a known part of h, default 0), event_id and event_time if
there are any, and the columns that model.contexts names. event_time is ISO 8601 text, a timestamp, or an epoch in seconds
(above 1e11 milliseconds, above 1e14 microseconds, above 1e17 nanoseconds).
An event without event_id gets one from its content (SHA-256 over all the columns above), so the same file again adds
nothing and a repeated row counts once; give event_id where a repeated row is meant twice.
inputs, users: input_id or user_id, and any columns; they update by key.
Rows that cannot be used go to the table quarantine with all their reasons.

--stream takes events from the source of the settings [source] (a folder, a Delta table, Kafka) as they come, from where
it stopped, until SIGTERM, which ends it after the batch in hand."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", metavar="F", help="file or folder of events")
    parser.add_argument("--inputs", metavar="F", help="file or folder of input attributes")
    parser.add_argument("--users", metavar="F", help="file or folder of user attributes")
    parser.add_argument("--stream", action="store_true", help="events from the source of the settings [source]")
    parser.add_argument("--available-now", action="store_true", help="--stream: stop when all there is was ingested")
    columns = "what files or source call our columns, for example input_id=item,label=rating; each where it applies"
    parser.add_argument("--columns", default="", metavar="OURS=THEIRS,…", help=columns)


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables, columns = Tables(spark, settings.tables.root), parse_renames(parsed.columns)
    if parsed.stream:
        if parsed.events or parsed.inputs or parsed.users:
            raise InputError("--stream takes no files: its source is in the settings [source]")
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        return vars(ingest_stream(tables, settings, columns, parsed.available_now, stop))
    events, attributes = ingest_files(tables, settings, parsed.events, parsed.inputs, parsed.users, columns)
    result: dict[str, Any] = vars(events)
    for table, name in ((INPUTS, "inputs"), (USER_ATTRIBUTES, "users")):
        if table in attributes:
            result |= {name: attributes[table].upserted, f"{name}_quarantined": attributes[table].quarantined}
    return result


if __name__ == "__main__":
    run("ingest", DESCRIPTION, work, arguments)
