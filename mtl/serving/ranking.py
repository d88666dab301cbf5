"""The best inputs for a user, of all or of candidates, less what the request leaves out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mtl.config import ServeSettings
from mtl.errors import ConfigError
from mtl.gaussian import Array
from mtl.serving import api
from mtl.serving.scorer import Weights
from mtl.serving.view import View

Rescore = Callable[[str, list[str], list[float], list[float]], Sequence[float]]
"""New scores of a user's candidates, from user, ids, scores and standard deviations: ``serve.rescore``."""

_INLINE = 200_000  # inputs that one look through them all holds nobody up
_SLACK = 32  # candidates beyond k


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
    excluded = view.excluded(
        str(request.user) if request.exclude_seen else None, list(map(str, request.exclude)), request.where
    )
    rows = view.best(user, request.k + _SLACK, excluded)
    return scored(view, user, view.ids(rows), view.rows.take(rows, 0))


def scored(view: View, user: Weights, ids: list[str], rows: Array) -> Ranked:
    """Inputs with their feature rows (n, width), scored for the user."""
    return Ranked(ids, *view.score(user, rows))


def wanted(view: View, request: api.TopRequest, candidates: Sequence[str | int]) -> list[str]:
    """Those of the candidates that nothing of the request leaves out."""
    drop = set(map(str, request.exclude))
    if request.exclude_seen:
        drop |= set(view.ids(view.seen_rows(str(request.user))))
    return [c for c in dict.fromkeys(map(str, candidates)) if c not in drop and view.has(c, request.where)]


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
