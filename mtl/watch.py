"""The update job's figures in the text format of Prometheus, on a port of its own."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pyspark.sql.streaming import StreamingQueryListener

from mtl import models
from mtl.backlog import lag, unreleased
from mtl.batches import ingested
from mtl.drift import Seen, weight_distance
from mtl.errors import ConfigError
from mtl.stream import Stream

if TYPE_CHECKING:
    from mtl.update import Fleet

log = logging.getLogger("mtl")

_TABLES_EVERY = 60  # seconds between two looks at what takes a query over a table,
_WEIGHTS_EVERY = 600  # and at what takes a pass over all users of a version

_TOLD = {
    "loss": "Mean loss of the last batch's events, predicted before they were applied.",
    "standardized_error": "Mean of ((label - prediction) / std) squared over the last batch; 1 where the model is right.",
    "coverage": "Share of the last batch's labels within the stated 90% interval.",
    "bias": "Mean of prediction - label over the last batch.",
    "input_drift": "Largest shift of a basis function's mean against training, in standard deviations.",
    "weight_distance": "Mean squared standardized distance of users' weights from their prior means.",
    "batch_events": "Events of the last batch that were predicted.",
    "batch_seconds": "Seconds of the last batch by phase: ours, and Spark's own.",
    "waiting_events": "Events set aside, for their input is not known.",
    "lag_commits": "Commits of events that are not applied yet.",
    "lag_events": "Events in them.",
    "lag_seconds": "Age of the oldest of them.",
    "input_rows_per_second": "Rows per second that come, as Spark has it.",
    "processed_rows_per_second": "Rows per second while a batch is in hand, as Spark has it.",
    "live": "1 for the live version.",
    "candidate": "1 for a version that may go live.",
    "compared_events": "Fresh events that a candidate and the live version were compared on.",
    "compared_loss": "Mean loss over these, of the candidate and of the live version.",
}
_COUNTED = {
    "batches": "Batches applied since the job began.",
    "applied_events": "Events applied since the job began.",
    "updated_users": "Users updated since the job began, a user once a batch.",
    "promotions": "Candidates that the job made live since it began.",
    "offered_rows": "Rows that were offered to ingest.",
    "quarantined_rows": "Rows that ingest refused.",
    "failed_looks": "Looks at the job that failed; it runs on.",
}
Samples = list[tuple[str, dict[str, str], float]]


class Watch(Collector):
    """A server of figures; :meth:`look` takes them, a scrape reads the last ones.

    Raises:
        ConfigError: the address is taken, or not of this machine.
    """

    def __init__(self, host: str, port: int):
        self._samples: Samples = []
        self._seen: dict[int, Seen] = {}
        self._kept: dict[tuple[str, int], tuple[float, Any]] = {}
        self._failed = 0
        self.listener = Listener()
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(f"update.metrics_port = {port} on {host}: {error.strerror or error}") from error
        log.info("update: figures on http://%s:%d/metrics", host, self._server.server_port)

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for name, labels, value in [*self._samples, ("failed_looks", {}, float(self._failed))]:
            if name not in families:
                kind = CounterMetricFamily if name in _COUNTED else GaugeMetricFamily
                families[name] = kind(f"mtl_update_{name}", (_TOLD | _COUNTED)[name], labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        yield from families.values()

    def look(self, fleet: Fleet) -> None:
        """Take the figures; where that fails the last ones stay, for no figure is worth a stream."""
        try:
            self._samples = self._of_fleet(fleet)
        except Exception as error:
            self._failed += 1
            log.warning("update: no figures this time: %s", str(error).partition("\n")[0])

    def _of_fleet(self, fleet: Fleet) -> Samples:
        samples: Samples = []
        candidates = self._now_and_then("candidates", 0, _TABLES_EVERY, lambda: models.candidates(fleet.tables))
        for version, stream in fleet.streams.items():
            own = {"version": str(version)}
            samples += [(name, own, value) for name, value in self._of_stream(stream).items()]
            samples.append(("live", own, float(version == fleet.live)))
            samples.append(("candidate", own, float(version in candidates and version != fleet.live)))
            seconds = {**stream.updater.seconds, **self.listener.seconds.get(stream.name, {})}
            samples += [("batch_seconds", {**own, "phase": phase}, value) for phase, value in seconds.items()]
        for version, compared in fleet.comparisons.items():
            if version not in candidates:
                continue  # it was promoted or refused
            own = {"version": str(version)}
            samples.append(("compared_events", own, float(compared.n)))
            samples += [("compared_loss", {**own, "of": "candidate"}, compared.candidate)]
            samples += [("compared_loss", {**own, "of": "live"}, compared.live)]
        samples.append(("promotions", {}, float(len(fleet.promoted))))
        offered, quarantined = self._now_and_then("ingested", 0, _TABLES_EVERY, lambda: ingested(fleet.tables))
        return [*samples, ("offered_rows", {}, float(offered)), ("quarantined_rows", {}, float(quarantined))]

    def _of_stream(self, stream: Stream) -> dict[str, float]:
        updater, version, tables = stream.updater, stream.model.version, stream.tables
        recent = updater.recent
        n = recent.n.sum()
        told = {
            "batches": float(updater.tally.batches),
            "applied_events": float(updater.tally.applied),
            "updated_users": float(updater.updated),
            "batch_events": float(n),
            "waiting_events": float(
                self._now_and_then("waiting", version, _TABLES_EVERY, lambda: unreleased(tables, version).count())
            ),
            **lag(tables, stream.consumed),
            **self.listener.rates.get(stream.name, {}),
        }
        distance = self._now_and_then("weights", version, _WEIGHTS_EVERY, lambda: weight_distance(tables, stream.model))
        if distance is not None:
            told["weight_distance"] = distance
        if not n:  # nothing has been predicted yet: no figure, rather than one that looks perfect
            return told
        if version not in self._seen:
            self._seen[version] = Seen.of_version(tables, version)
        return told | {
            "loss": recent.loss.sum() / n,
            "standardized_error": recent.standardized.sum() / n,
            "coverage": recent.covered.sum() / n,
            "bias": (recent.prediction.sum() - recent.label.sum()) / n,
            "input_drift": self._seen[version].distance(recent),
        }

    def _now_and_then(self, what: str, version: int, seconds: float, work: Callable[[], Any]) -> Any:
        """What ``work`` gave at most so many seconds ago."""
        now = time.monotonic()
        taken, value = self._kept.get((what, version), (-math.inf, None))
        if now - taken >= seconds:
            value = work()
            self._kept[what, version] = now, value
        return value


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
