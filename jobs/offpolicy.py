"""What another policy would have earned, from the log of the one in use."""

import argparse
from typing import Any

from mtl.command import execute, parse_renames
from mtl.config import Settings
from mtl.serving.decisions import estimate

DESCRIPTION = """\
Estimate the mean reward that another policy would have earned, from a log of decisions with their propensities: by
inverse propensity scoring (IPS), self-normalized (SNIPS), and doubly robust (DR) with a reward model. Each with its
normal interval; "support" says how much the log tells of that policy, "cautions" where intervals may be too narrow.
Nothing is written, and no Spark is started.

The log has a row a decision: input_id (what was chosen), propensity, reward. DR takes the columns predicted and expected
(a model's reward of what was chosen, and of what the policy would choose) where the log has them, else the mean
reward of every input over other decisions, which needs the policy's chance of every input: uniform, or a file of
chances. By column:NAME alone there is no DR."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decisions", required=True, metavar="F", help="the log: Parquet, CSV, JSON lines, or a folder"
    )
    parser.add_argument(
        "--policy",
        required=True,
        metavar="P",
        help="uniform; column:NAME, the log's column of the policy's chance of what was chosen; or a file of input_id, "
        "probability and any columns of the log that the chances depend on",
    )
    parser.add_argument("--rewards", metavar="F", help="file of decision_id and reward, where they came later")
    parser.add_argument(
        "--missing", type=float, metavar="R", help="reward of decisions without one (default: they are left out)"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    parser.add_argument("--columns", default="", metavar="OURS=THEIRS,…", help="what the files call our columns")


def work(settings: Settings, parsed: argparse.Namespace) -> dict[str, Any]:
    columns = parse_renames(parsed.columns)
    return estimate(parsed.decisions, parsed.policy, columns, parsed.rewards, parsed.missing, parsed.confidence)


if __name__ == "__main__":
    execute("offpolicy", DESCRIPTION, work, arguments)
