"""The best inputs for a user, of all or of candidates, less what the request leaves out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import numpy as np

from mtl.config import ServeSettings
from mtl.errors import ConfigError
from mtl.serving import api
from mtl.serving.scorer import Weights
from mtl.serving.view import View

Rescore = Callable[[str, list[str], list[float], list[float]], Sequence[float]]
"""New scores of a user's candidates, from user, ids, scores and standard deviations: ``serve.rescore``."""

_INLINE = 200_000  # inputs that one look through them all holds nobody up
_SLACK = 32  # candidates beyond k


def is_quick(view: View, request: api.TopRequest) -> bool:
    """Whether the best of all inputs are found without looking anything up."""
    return not (request.where or request.exclude_seen or request.exclude or len(view.rows) > _INLINE)


def best_of_all(view: View, user: Weights, request: api.TopRequest, rescore: Rescore | None) -> list[api.Score]:
    excluded = view.excluded(
        str(request.user) if request.exclude_seen else None, list(map(str, request.exclude)), request.where
    )
    # A few more than k: single precision and E[h] order almost as predictions do.
    rows = view.best(user, request.k + _SLACK, excluded)
    return ordered(view, user, request, view.ids(rows), view.rows.take(rows, 0), rescore)


def wanted(view: View, request: api.TopRequest, candidates: Sequence[str | int]) -> list[str]:
    """Those of the candidates that nothing of the request leaves out."""
    drop = set(map(str, request.exclude))
    if request.exclude_seen:
        drop |= set(view.ids(view.seen_rows(str(request.user))))
    return [c for c in dict.fromkeys(map(str, candidates)) if c not in drop and view.has(c, request.where)]


def ordered(
    view: View, user: Weights, request: api.TopRequest, ids: list[str], rows: np.ndarray, rescore: Rescore | None
) -> list[api.Score]:
    """The best k of inputs.

    Args:
        ids, rows: (n,) inputs and their feature rows.
    """
    scores, stds = view.score(user, rows)
    if rescore is not None and ids:
        scores = np.asarray(rescore(str(request.user), ids, scores.tolist(), stds.tolist()), float)
    order = np.argsort(-scores, kind="stable")[: request.k]
    return [api.Score(ids[i], float(scores[i]), float(stds[i])) for i in order]


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
