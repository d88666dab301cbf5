"""What a worker tells of itself in /metrics, beside its requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

from mtl.serving.admission import Admission
from mtl.serving.evaluator import Evaluator
from mtl.serving.metrics import Reading
from mtl.serving.service import Service


def readings(service: Service) -> dict[str, Reading]:
    """By name."""
    view = service.view
    found = {
        "mtl_model_version": Reading("Model version shown, 0 for none.", view.version if view else 0),
        "mtl_staleness_seconds": Reading(
            "Since store and tables last agreed.", max(0.0, time.time() - service.checked_at)
        ),
        "mtl_unconfirmed_observations": Reading(
            "Observations not in their users' rows yet, of the live version and of each rival.", service.n_pending()
        ),
        "mtl_inputs": Reading("Inputs with features.", len(view.rows) if view else 0),
    }
    if view:
        found |= dict(_of_evaluator(view.evaluator))
    return found | dict(_of_admission(service.admission)) if service.admission else found


def _of_evaluator(evaluator: Evaluator) -> Iterator[tuple[str, Reading]]:
    for name, counts in zip(("feature", "prediction"), evaluator.counts(), strict=True):
        if counts is not None:
            for kind in ("hits", "misses", "evictions"):
                yield f"mtl_{name}_cache_{kind}", Reading(f"Of the {name} cache.", getattr(counts, kind), "total")
            yield f"mtl_{name}_cache_rows", Reading(f"In the {name} caches of all workers.", counts.rows, "sum")
            yield f"mtl_{name}_cache_bytes", Reading(f"Of the {name} caches of all workers.", counts.bytes, "sum")
    lanes = [asdict(counts) for counts in evaluator.lane_counts()]
    for kind, told in (
        ("done", "Evaluations of functions that ended."),
        ("failed", "Evaluations that raised."),
        ("late", "Evaluations that ended after their deadline."),
        ("dropped", "Evaluations that did not begin by their deadline."),
        ("refused", "Evaluations that found no thread."),
    ):
        yield f"mtl_evaluations_{kind}", Reading(told, sum(of[kind] for of in lanes), "total")
    yield "mtl_hung_threads", Reading("Threads that are written off now.", sum(of["hung"] for of in lanes), "sum")


def _of_admission(admission: Admission) -> Iterator[tuple[str, Reading]]:
    state, rung = admission.state, admission.rung
    each: dict[str, tuple[str, float]] = {
        "rung": ("Place on the ladder, 0 the best answers.", state.rung),
        "deadline_ms": ("Deadline in force.", rung.deadline_ms),
        "coarseness": ("Place of the classes in force, 0 the exact ones.", rung.coarseness),
        "limit": ("Requests that are let in at once, -1 for any number.", -1 if state.limit is None else state.limit),
        "in_flight": ("Requests in hand.", admission.in_flight),
        "lag_seconds": ("How late the event loop is.", admission.lag),
    }
    for name, (told, value) in each.items():
        yield f"mtl_load_{name}", Reading(told, value, "each")
    yield "mtl_load_steps_down", Reading("Decisions for worse answers.", state.steps_down, "total")
    yield "mtl_load_steps_up", Reading("Decisions for better answers.", state.steps_up, "total")
    yield "mtl_load_ticks_limited", Reading("Ticks in which requests could be refused.", state.ticks_limited, "total")
