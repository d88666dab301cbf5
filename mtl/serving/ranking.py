"""The best inputs for a user, of all or of candidates, less what the request leaves out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl.config import ServeSettings
from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.schema import INPUTS
from mtl.serving import api
from mtl.serving.filters import matches
from mtl.serving.records import digest
from mtl.serving.scorer import Weights
from mtl.serving.view import View

Rescore = Callable[[str, list[str], list[float], list[float]], Sequence[float]]
"""New scores of a user's candidates, from user, ids, scores and standard deviations: ``serve.rescore``."""

_INLINE = 200_000  # inputs that one look through them all holds nobody up
_SLACK = 32  # candidates beyond k
_FILTERS = 100  # attributes of which the inputs that lack them are remembered


class Ranked(NamedTuple):
    """Inputs that may be among the best, with what is predicted of them: (n,) each."""

    ids: list[str]
    scores: Array
    stds: Array

    def rescored(self, rescore: Rescore, user: str) -> Ranked:
        """
        Raises:
            ValueError: there is not one score a candidate, or one is no number or +∞.
        """
        if not self.ids:
            return self
        scores = np.asarray(rescore(user, self.ids, self.scores.tolist(), self.stds.tolist()), float)
        if scores.shape != (len(self.ids),) or not (scores < np.inf).all():
            raise ValueError(
                f"{len(self.ids)} numbers are wanted, one a candidate, none of them +inf; it gave {scores}"
            )
        return self._replace(scores=scores)

    def best(self, k: int) -> list[api.Score]:
        """The k largest scores; what was given −∞ is left out."""
        order = np.argsort(-self.scores, kind="stable")
        order = order[self.scores[order] > -np.inf][:k]
        return [api.Score(self.ids[i], float(self.scores[i]), float(self.stds[i])) for i in order]


def is_quick(view: View, request: api.TopRequest) -> bool:
    """Whether the best of all inputs are found without looking anything up."""
    return not (request.where or request.exclude_seen or request.exclude or len(view.rows) > _INLINE)


def best_of_all(view: View, user: Weights, request: api.TopRequest) -> Ranked:
    """The k best, and a few more: single precision and E[h] order almost as predictions do."""
    rows = view.best(user, request.k + _SLACK, excluded(view, request))
    return scored(view, user, view.ids(rows), view.rows.take(rows, 0))


def scored(view: View, user: Weights, ids: list[str], rows: Array) -> Ranked:
    """Inputs with their feature rows (n, width), scored for the user."""
    return Ranked(ids, *view.score(user, rows))


# What a request leaves out.


def wanted(view: View, request: api.TopRequest, candidates: Sequence[str | int]) -> list[str]:
    """Those of the candidates that nothing of the request leaves out."""
    drop = set(map(str, request.exclude))
    seen = seen_inputs(view, str(request.user)) if request.exclude_seen else set()
    left = (c for c in dict.fromkeys(map(str, candidates)) if c not in drop and digest(c) not in seen)
    return [c for c in left if has(view, c, request.where)]


def excluded(view: View, request: api.TopRequest) -> np.ndarray | None:
    """Rows of all that is left out: what the user has seen, inputs by name, and what lacks an attribute."""
    out = []
    if request.exclude_seen:
        out.append(seen_rows(view, str(request.user)))
    if request.exclude:
        with view.store.reading() as transaction:
            rows = [view.row_of(str(one), transaction) for one in request.exclude]
        out.append(np.array([row for row in rows if row is not None], np.int64))
    out += [_without(view, name, value) for name, value in request.where.items()]
    return np.concatenate(out) if out else None


def seen_inputs(view: View, user: str) -> set[bytes]:
    """Digests of the inputs that the user has acted on, as the events table and the observations say."""
    key = digest(user)
    with view.overlay.reading() as observed:  # before the store: see mtl.serving.overlay
        pending = view.overlay.pending(observed, key)
        with view.store.reading() as transaction:
            return {*view.store.seen(transaction, key), *(digest(p.event.input_id) for p in pending)}


def seen_rows(view: View, user: str) -> np.ndarray:
    """Rows of those of them that have features."""
    inputs = seen_inputs(view, user)
    with view.store.reading() as transaction:
        rows = (view.store.input_row(transaction, view.generation, identity) for identity in inputs)
        return np.array([row for row in rows if row is not None and row < len(view.rows)], np.int64)


def has(view: View, identity: str, where: api.Attributes) -> bool:
    """Whether an input has all attributes of ``where``."""
    if not where:
        return True
    with view.store.reading() as transaction:
        attributes = view.store.attributes(transaction, identity) or {}
    return all(matches(attributes.get(name), value) for name, value in where.items())


def _without(view: View, name: str, value: Any) -> np.ndarray:
    """Rows of the inputs that lack an attribute; looked through once for what is asked for, until attributes change."""
    with view.store.reading() as transaction:
        key = (name, repr(value), view.store.versions(transaction).get(INPUTS, -1))
    lacking = view.lacking.get(key)
    if lacking is None:
        rows = np.arange(len(view.rows))
        with view.store.reading() as transaction:
            found = (view.store.attributes(transaction, one) for one in view.ids(rows))
            are_so = np.fromiter((matches((a or {}).get(name), value) for a in found), bool, len(rows))
        lacking = np.packbits(~are_so)
        if len(view.lacking) >= _FILTERS:
            view.lacking.clear()
        view.lacking[key] = lacking
    return np.flatnonzero(np.unpackbits(lacking, count=len(view.rows)))


# What rescores.


def rescore_of(settings: ServeSettings) -> Rescore | None:
    """
    Raises:
        ConfigError: serve.rescore names nothing that can be called.
    """
    if not settings.rescore:
        return None
    module, _, name = settings.rescore.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"serve.rescore = {settings.rescore!r}: {error}; write package.module:function") from error
    if not callable(found):
        raise ConfigError(f"serve.rescore = {settings.rescore!r}: this is no function; write package.module:function")
    return found
