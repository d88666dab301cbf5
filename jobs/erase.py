"""Users and events erased as if they had never been seen; events corrected."""

import argparse
from typing import Any

from pyspark.sql import SparkSession

from mtl.command import parse_renames
from mtl.config import Settings
from mtl.erase import erase
from mtl.job import run
from mtl.tables import Tables

DESCRIPTION = """\
Erase whole users or single events from all tables and from the users of every model version, or correct events.

Stop the update job and the ingest stream first and start them again afterwards; this job runs every version's stream to
its end itself. If it is interrupted, run it again: what was begun is finished first, also without --user, --event, --file and
--correct.

The JSON says what was removed where, and still_in what it cannot remove: the sources that the rows came from (ingested again,
they come back), old versions of the tables until VACUUM may remove their files, and the versions whose shared part
was trained on them, until their next retraining. A server's own store follows the users table at its next refresh."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", action="append", default=[], metavar="U", help="a user, with all events and attributes"
    )
    parser.add_argument("--event", action="append", default=[], metavar="E", help="the id of an event")
    parser.add_argument("--file", metavar="F", help="a file with a column user_id or event_id of such ids")
    parser.add_argument("--correct", metavar="F", help="a file of events whose event_ids exist, as they ought to be")
    parser.add_argument("--columns", default="", metavar="OURS=THEIRS,…", help="what the file calls our columns")


def work(spark: SparkSession, settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    tables, columns = Tables(spark, settings.tables.root), parse_renames(parsed.columns)
    return erase(tables, settings, parsed.user, parsed.event, parsed.file, parsed.correct, columns)


if __name__ == "__main__":
    run("erase", DESCRIPTION, work, arguments)
