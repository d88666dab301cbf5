"""The status as one HTML page that needs nothing else: tables, and plots as images inside it."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtl import schema
from mtl.figures import Curve, plot_curves
from mtl.progress import SEEN
from mtl.schema import MODEL_VERSION
from mtl.status import DELAY

_SHOWN = 4  # versions, the newest
_CALLED = {  # where a figure's name does not say what it is
    "loss": "kind of loss",
    "waiting": "events waiting for their input",
    "lag_commits": "lag (commits)",
    "lag_events": "lag (events)",
    "lag_seconds": "lag (seconds)",
    "mean_loss": "mean loss of an event",
    "mae": "mean absolute error (label units)",
    "standardized_error": "mean of (error / std)²: 1 is right",
    "coverage90": "labels in the 90% interval: 0.9 is right",
    "bias": "mean of prediction − label (label units)",
    "input_drift": "drift of inputs against training (std)",
    "weight_distance": "mean of (w − m)² / S: about 1 at most",
}


def page(told: Mapping[str, Any], progress: pd.DataFrame) -> str:
    """The page of the newest versions.

    Args:
        told: what :func:`mtl.status.status` returned.
        progress: what :func:`mtl.status.batches` did.
    """
    parts = [f"<h1>oracle-mtl</h1><p>As of {told['at']}.</p>", "<h2>Versions</h2>", _versions(told["versions"])]
    if progress.empty:
        parts.append("<p>The update job has not applied an event yet: there is nothing to draw.</p>")
    else:
        shown = sorted(progress[MODEL_VERSION].unique())[-_SHOWN:]
        of = {f"version {version}": progress[progress[MODEL_VERSION] == version] for version in shown}
        parts.append("<h2>Progressive validation</h2><p>Every event is predicted before it is learnt from.</p>")
        parts += [_image(plot) for plot in _validation(of)]
        parts.append(
            "<h2>Cold start</h2><p>The same events, by how many their user had before: predicted by the model, as for "
        )
        parts.append("the average user, and from the user's own events about a mean of zero (a ridge).</p>")
        parts += _cold(told)
        parts.append("<h2>Keeping up</h2>")
        parts += [_image(plot) for plot in _keeping_up(of)]
    parts += ["<h2>Refused rows</h2>", _refused(told)]
    parts += ["<h2>Tables</h2>", _table([_sized(name, size) for name, size in told["tables"].items()])]
    return _PAGE.format("\n".join(parts))


@dataclass(frozen=True)
class Plot:
    """What :func:`mtl.figures.plot_curves` takes."""

    curves: Mapping[str, Curve]
    title: str
    x: str
    y: str
    ticks: Sequence[str] = ()


def _validation(of: Mapping[str, pd.DataFrame]) -> list[Plot]:
    def by_batch(numerator: str) -> dict[str, Curve]:
        curves = {}
        for name, rows in of.items():
            events, some = rows[schema.N_EVENTS].cumsum(), rows[schema.VALIDATED] > 0
            mean = rows[numerator] / rows[schema.VALIDATED]
            curves[name] = Curve(events[some].tolist(), mean[some].tolist())
        return curves

    applied = "events that the version has applied"
    return [
        Plot(by_batch(schema.LOSS), "Loss by batch: lower is better", applied, "mean loss of an event"),
        Plot(by_batch(schema.STANDARDIZED), "Calibration: 1 is right", applied, "mean of (error / std)²"),
        Plot(by_batch(schema.COVERED), "Stated 90% intervals: 0.9 is right", applied, "share of labels inside"),
    ]


def _keeping_up(of: Mapping[str, pd.DataFrame]) -> list[Plot]:
    first = min(rows[schema.CREATED_AT].min() for rows in of.values())
    late, fast = {}, {}
    for name, rows in of.items():
        minutes = (rows[schema.CREATED_AT] - first).dt.total_seconds() / 60
        some = rows[DELAY].notna()
        late[name] = Curve(minutes[some].tolist(), rows[DELAY][some].tolist())
        rate = (rows[schema.N_EVENTS] / (60 * minutes.diff())).replace(np.inf, np.nan)
        fast[name] = Curve(minutes[rate.notna()].tolist(), rate[rate.notna()].tolist())
    since = f"minutes since {first:%Y-%m-%d %H:%M:%S}"
    return [
        Plot(late, "Lag: age of a batch's oldest events when applied", since, "seconds"),
        Plot(fast, "Throughput, idle time between batches included", since, "events per second"),
    ]


def _cold(told: Mapping[str, Any]) -> list[str]:
    bins = told["cold_start"]
    if not bins:
        return ["<p>The live version has not predicted an event yet.</p>"]
    called = {"loss": "the live version", "average": "average user", "ridge": "ridge about zero"}
    at = list(range(len(bins)))
    curves = {name: Curve(at, [row[key] for row in bins]) for key, name in called.items()}
    labels = [_from_to(row["seen"]) for row in bins]
    plot = Plot(curves, "Loss by what the user had been seen to do", "events of the user before", "mean loss", labels)
    rows = [
        {"events of the user before": label, "events": row["n"], **{called[key]: row[key] for key in called}}
        for label, row in zip(labels, bins, strict=True)
    ]
    return [_image(plot), _table(rows)]


def _from_to(seen: int) -> str:
    """What a bin of users is called, by its lower edge."""
    i = SEEN.index(seen)
    if i + 1 == len(SEEN):
        return f"{seen}+"
    last = SEEN[i + 1] - 1
    return f"{seen}" if last == seen else f"{seen}–{last}"


def _image(plot: Plot) -> str:
    curves = {name: curve for name, curve in plot.curves.items() if len(curve.x)}
    if not curves:
        return f"<p>{html.escape(plot.title)}: one batch is not enough to draw it.</p>"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        plot_curves(path, curves, plot.title, plot.x, plot.y, ticks=plot.ticks)
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(plot.title)}" src="data:image/png;base64,{data}">'


def _refused(told: Mapping[str, Any]) -> str:
    if not told["quarantined"]:
        return f"<p>None of {told['offered']:,} rows offered.</p>"
    share = told["quarantined"] / told["offered"]
    reasons = [{"reason": reason, "rows": n} for reason, n in told["reasons"].items()]
    return f"<p>{told['quarantined']:,} of {told['offered']:,} rows offered ({share:.2%}).</p>" + _table(reasons)


def _versions(versions: Sequence[Mapping[str, Any]]) -> str:
    """A column a version, a line a figure: there are more figures than versions that one would look at."""
    if not versions:
        return "<p>None: jobs/retrain.py makes the first.</p>"
    shown = versions[-_SHOWN:]
    names = [name for name in dict.fromkeys(name for row in shown for name in row) if name != "version"]
    rows = [
        {"": _CALLED.get(name, name.replace("_", " ")), **{f"version {row['version']}": row.get(name) for row in shown}}
        for name in names
    ]
    return _table(rows)


def _sized(name: str, size: Mapping[str, int]) -> dict[str, Any]:
    return {"table": name, "files": size["files"], "MB": size["bytes"] / 1e6, "commits": size["commit"] + 1}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_told(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _told(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>oracle-mtl: status</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-size: 13px; }} th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .7rem; }}
th {{ text-align: left; }} td {{ text-align: right; }} td:first-child {{ text-align: left; }}
img {{ width: 48%; margin: .5rem .5% 0 0; }}
</style></head><body>
{}
</body></html>
"""
