"""The update job's figures in the text format of Prometheus, on a port of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from pyspark.sql import functions as F
from pyspark.sql.streaming import StreamingQueryListener

from mtl import schema
from mtl.drift import Seen, seen_in_training
from mtl.stream import Stream

if TYPE_CHECKING:
    from mtl.update import Fleet

log = logging.getLogger("mtl")

_TOLD = {
    "loss": "Mean loss of the last batch's events, predicted before they were applied.",
    "standardized_error": "Mean of ((label - prediction) / std) squared over the last batch; 1 where the model is right.",
    "coverage": "Share of the last batch's labels within the stated 90% interval.",
    "bias": "Mean of prediction - label over the last batch.",
    "input_drift": "Largest shift of a basis function's mean against training, in standard deviations.",
    "applied_events": "Events applied since the job began.",
    "waited_events": "Events set aside since the job began, for their input is not known.",
    "lag_commits": "Commits of events that are not applied yet.",
    "lag_events": "Events in them.",
    "lag_seconds": "Age of the oldest of them.",
    "input_rows_per_second": "Rows per second that come, as Spark has it.",
    "processed_rows_per_second": "Rows per second while a batch is in hand, as Spark has it.",
    "live": "1 for the live version.",
}
Samples = list[tuple[str, dict[str, str], float]]


class Watch(Collector):
    """A server of figures; :meth:`look` takes them, a scrape reads the last ones."""

    def __init__(self, host: str, port: int):
        self._samples: Samples = []
        self._seen: dict[int, Seen] = {}
        self.listener = Listener()
        registry = CollectorRegistry()
        registry.register(self)
        self._server, _ = start_http_server(port, host, registry)
        log.info("update: figures on http://%s:%d/metrics", host, self._server.server_port)

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in self._samples:
            if name not in families:
                families[name] = GaugeMetricFamily(f"mtl_update_{name}", _TOLD.get(name, name), labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        yield from families.values()

    def look(self, fleet: Fleet) -> None:
        samples: Samples = []
        for version, stream in fleet.streams.items():
            own = {"version": str(version)}
            samples += [(name, own, value) for name, value in self._of(stream).items()]
            samples.append(("live", own, float(version == fleet.live)))
            seconds = {**stream.updater.seconds, **self.listener.seconds.get(stream.name, {})}
            samples += [("batch_seconds", {**own, "phase": phase}, value) for phase, value in seconds.items()]
        for version, compared in fleet.comparisons.items():
            own = {"version": str(version)}
            samples += [("compared_loss", {**own, "of": "candidate"}, compared.candidate)]
            samples += [("compared_loss", {**own, "of": "live"}, compared.live)]
        samples.append(("promotions", {}, float(len(fleet.promoted))))
        samples.append(("quarantined_events", {}, float(fleet.tables.read(schema.QUARANTINE).count())))
        self._samples = samples

    def _of(self, stream: Stream) -> dict[str, float]:
        version, recent, tally = stream.model.version, stream.updater.recent, stream.updater.tally
        if version not in self._seen:
            self._seen[version] = seen_in_training(stream.tables, stream.model, stream.updater.inputs)
        n = max(recent.n.sum(), 1.0)
        return {
            "loss": recent.loss.sum() / n,
            "standardized_error": recent.standardized.sum() / n,
            "coverage": recent.covered.sum() / n,
            "bias": (recent.prediction.sum() - recent.label.sum()) / n,
            "input_drift": self._seen[version].distance(recent),
            "applied_events": float(tally.applied),
            "waited_events": float(tally.waited),
            **lag(stream),
            **self.listener.rates.get(stream.name, {}),
        }


class Listener(StreamingQueryListener):
    """What Spark says of the queries, by their name."""

    def __init__(self) -> None:
        self.rates: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, dict[str, float]] = {}

    def onQueryStarted(self, event: Any) -> None:
        pass

    def onQueryProgress(self, event: Any) -> None:
        progress = event.progress
        self.rates[progress.name] = {
            "input_rows_per_second": progress.inputRowsPerSecond,
            "processed_rows_per_second": progress.processedRowsPerSecond,
        }
        self.seconds[progress.name] = {phase: ms / 1000 for phase, ms in progress.durationMs.items()}

    def onQueryIdle(self, event: Any) -> None:
        pass

    def onQueryTerminated(self, event: Any) -> None:
        pass


def lag(stream: Stream) -> dict[str, float]:
    """What the stream has not applied yet: commits, events in them, and the age of the oldest (seconds)."""
    commits = stream.tables.delta(schema.EVENTS).history().where(F.col("version") > stream.consumed)
    metrics = F.col("operationMetrics")
    written = F.coalesce(F.try_element_at(metrics, F.lit("numTargetRowsInserted")), metrics["numOutputRows"])
    age = F.unix_timestamp(F.current_timestamp()) - F.unix_timestamp(F.min("timestamp"))
    row = commits.agg(F.count(F.lit(1)), F.sum(written.cast("long")), age).first()
    return dict(zip(("lag_commits", "lag_events", "lag_seconds"), (float(value or 0) for value in row), strict=True))
