"""The whole product on MovieLens-100K: the steps of the jobs, one after the other, in one session."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import baselines, schema
from mtl.audit import audit
from mtl.config import Settings
from mtl.datasets import fetch_movielens, movielens
from mtl.errors import StateError
from mtl.evaluate import evaluate
from mtl.figures import plot_errors, plot_errors_by_events, plot_objective
from mtl.ingest import ingest_files
from mtl.metrics import clipped
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, LABEL, USER_ID
from mtl.score import PREDICTION, STD, score
from mtl.tables import Tables
from mtl.update import update

STARS = "stars"
CALLED = {
    baselines.GLOBAL_MEAN: "global mean",
    baselines.INPUT_MEAN: "input mean",
    baselines.INDEPENDENT: "independent per-user ridge",
    baselines.ALS_BEST: "MLlib ALS, best of grid",
}
BEFORE, AFTER = "oracle-mtl before the stream", "oracle-mtl after the stream"

Done = TypeVar("Done")


@dataclass
class Narrator:
    """Says each step with its seconds, on stderr: stdout has the one JSON line."""

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, name: str, work: Callable[[], Done], told: Callable[[Done], str]) -> Done:
        started = time.monotonic()
        done = work()
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.say(f"{name:<28}{self.seconds[name]:6.1f} s   {told(done)}")
        return done

    def say(self, line: str = "") -> None:
        print(line, file=sys.stderr, flush=True)


def demo(spark: SparkSession, settings: Settings, out: str | Path, split: int) -> dict[str, Any]:
    """Ingest, train, evaluate, stream, audit and compare on one of MovieLens-100K's canonical splits.

    Args:
        out: folder for the plots, ``tables`` (made anew) and ``cache`` (the downloaded package, kept).
        split: 1 to 5.

    Returns:
        What the steps returned, the table of errors, the recommendations and the seconds of each step.

    Raises:
        InputError: MovieLens-100K cannot be had, or there is no such split.
        StateError: the audit found an invariant broken.
    """
    out = Path(out)
    logging.getLogger("mtl").setLevel(logging.WARNING)  # each step has its own line here
    tell = Narrator()
    cache = tell.step("fetch MovieLens-100K", lambda: fetch_movielens(out / "cache"), lambda folder: f"in {folder}")
    data = movielens(cache, split)
    shutil.rmtree(out / "tables", ignore_errors=True)
    files = {name: str(path) for name, path in data.write(out / "data").items()}
    tables = Tables(spark, str(out.resolve() / "tables"))

    first = tell.step(
        f"ingest u{split}.base less 10%",
        lambda: ingest_files(tables, settings, files["train"], files["inputs"], files["users"])[0],
        lambda report: f"{report.accepted:,} events, {len(data.inputs):,} movies, {len(data.users):,} users",
    )
    trained = tell.step(
        "retrain",
        lambda: retrain(tables, settings),
        lambda run: f"version {run['model_version']} is {run['status']}: k = {run['k']}, {run['iterations']} passes",
    )
    before = tell.step(
        "evaluate before the stream",
        lambda: evaluate(tables, settings, files["test"]),
        lambda errors: f"RMSE {errors['rmse']:.4f} on {errors['n']:,} events of u{split}.test",
    )
    second = tell.step(
        "ingest the last 10% by time",
        lambda: ingest_files(tables, settings, files["stream"])[0],
        lambda report: f"{report.accepted:,} events",
    )
    streamed = tell.step(
        "update, available now",
        lambda: update(tables, settings, available_now=True),
        lambda tally: f"{tally['applied']:,} events added to their users",
    )
    audited = tell.step(
        "audit",
        lambda: audit(tables, settings),
        lambda checks: "an invariant is BROKEN" if checks["failed"] else "all invariants hold",
    )
    if audited["failed"]:
        raise StateError(f"the audit failed: {audited}")
    after = tell.step(
        "evaluate, with baselines",
        lambda: evaluate(tables, settings, files["test"], with_baselines=True),
        lambda errors: f"RMSE {errors['rmse']:.4f}; {errors['coverage90']:.1%} of the labels in the 90% interval",
    )
    user = most_frequent(data.stream[USER_ID])
    advice = tell.step(
        f"recommend to user {user}",
        lambda: recommend(tables, user, data.inputs.to_pandas()),
        lambda advice: f"{len(advice['unseen']):,} best of those not rated yet",
    )
    rows = {CALLED[name]: errors for name, errors in after["baselines"].items()} | {BEFORE: before, AFTER: after}
    errors = {name: {measure: row[measure] for measure in ("rmse", "mae")} for name, row in rows.items()}
    plots = draw(out, trained["objective"], errors, after["by_user_events"])
    tell.say(error_table(errors, split))
    tell.say(advice_table(user, advice))
    tell.say("\nplots: " + ", ".join(plots))
    return {
        "split": split,
        "errors": errors,
        "coverage90": after["coverage90"],
        "ingested": {"train": vars(first), "stream": vars(second)},
        "retrain": trained,
        "update": streamed,
        "audit": audited,
        "baselines": after["baselines"],
        "by_user_events": after["by_user_events"],
        "recommendations": {"user": user, **advice},
        "plots": plots,
        "seconds_by_step": tell.seconds,
        "seconds": round(time.monotonic() - tell.started, 1),
    }


def recommend(tables: Tables, user: str, inputs: pd.DataFrame, top: int = 10) -> dict[str, list[dict[str, Any]]]:
    """What the user rated highest, and the ``top`` inputs of highest prediction among those not rated yet.

    Args:
        inputs: input_id, title and year of all inputs.
    """
    events = tables.read(schema.EVENTS).where(F.col(USER_ID) == user)
    rated = events.select(INPUT_ID, LABEL, schema.EVENT_TIME).toArrow().to_pandas()
    rated = rated.merge(inputs, on=INPUT_ID).sort_values([LABEL, schema.EVENT_TIME], ascending=False)
    unseen = inputs[~inputs[INPUT_ID].isin(rated[INPUT_ID])]
    pairs = pa.table({USER_ID: [user] * len(unseen), INPUT_ID: pa.array(unseen[INPUT_ID], pa.string())})
    model = load_model(tables)
    scored = score(tables, model, tables.spark.createDataFrame(pairs))
    best = scored.orderBy(F.col(PREDICTION).desc()).limit(top)
    best = (
        best.withColumn(PREDICTION, clipped(F.col(PREDICTION), model)).toArrow().to_pandas().merge(inputs, on=INPUT_ID)
    )
    return {
        "liked": [{"title": _called(row), LABEL: row[LABEL]} for row in rated.head(3).to_dict("records")],
        "unseen": [
            {"title": _called(row), PREDICTION: row[PREDICTION], STD: row[STD]} for row in best.to_dict("records")
        ],
    }


def draw(
    out: Path, objective: list[float], errors: dict[str, dict[str, float]], groups: list[dict[str, Any]]
) -> list[str]:
    """The plots, and where they are."""
    paths = [out / f"{name}.png" for name in ("objective", "rmse", "rmse_by_user_events")]
    plot_objective(paths[0], objective)
    plot_errors(paths[1], {name: row["rmse"] for name, row in errors.items()}, (BEFORE, AFTER), STARS)
    plot_errors_by_events(
        paths[2], groups, {baselines.INPUT_MEAN: "input mean", baselines.ALS_BEST: "MLlib ALS"}, STARS
    )
    return [str(path) for path in paths]


def error_table(errors: dict[str, dict[str, float]], split: int) -> str:
    lines = [f"\n{f'u{split}.test':<30}{'RMSE':>8}{'MAE':>8}"]
    lines += [f"{name:<30}{row['rmse']:>8.4f}{row['mae']:>8.4f}" for name, row in errors.items()]
    return "\n".join(lines)


def advice_table(user: str, advice: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"\nUser {user} rated highest:"]
    lines += [f"  {row[LABEL]:.0f} stars       {row['title']}" for row in advice["liked"]]
    lines += ["and may like:"]
    lines += [f"  {row[PREDICTION]:.2f} ± {row[STD]:.2f}   {row['title']}" for row in advice["unseen"]]
    return "\n".join(lines)


def most_frequent(ids: pa.ChunkedArray) -> str:
    """The id that occurs most often, of several the first by spelling."""
    values, counts = np.unique(ids.to_numpy(zero_copy_only=False).astype(str), return_counts=True)
    return str(values[np.argmax(counts)])


def _called(row: dict[Any, Any]) -> str:
    return row["title"] if pd.isna(row["year"]) else f"{row['title']} ({row['year']:.0f})"
