"""Which of several inputs to show a user: drawn by a policy, and on disk with its chance before it is told.

A row of the log says what was chosen and with what propensity, and what two other policies would have done: ``greedy`` and
``uniform`` are their chances of what was chosen, so that jobs/offpolicy.py judges them by ``column:greedy`` and
``column:uniform``. Rewards come later, by decision id, into a log of their own (:class:`mtl.serving.observations.Feedback`).
"""

from __future__ import annotations

import uuid
from datetime import datetime, timezone

import msgspec
import numpy as np

from mtl import gaussian
from mtl.config import ServeSettings
from mtl.gaussian import Array
from mtl.serving import bandit, scorer
from mtl.serving.api import Attributes
from mtl.serving.bandit import Candidates, Policy
from mtl.serving.classes import of_attributes
from mtl.serving.observations import Choice
from mtl.serving.scorer import Weights


class Drawn(msgspec.Struct):
    """What a policy chose."""

    place: int
    propensity: float
    policy: str
    greedy: float  # chances of it under other policies
    uniform: float


def policy_of(name: str, settings: ServeSettings) -> Policy:
    """By its name in serve.explore."""
    epsilon = settings.explore_epsilon
    if name == "linucb":
        return bandit.LinUCB(settings.explore_alpha, epsilon)
    if name == "thompson":
        return bandit.Thompson(settings.explore_draws, epsilon)
    return bandit.EpsilonGreedy(epsilon)


def choose(rows: Array, user: Weights, name: str, settings: ServeSettings) -> Drawn:
    """Draw one of the inputs with features ``rows`` (n, width)."""
    random = np.random.default_rng()  # of its own: generators are not safe to share between threads
    d = len(user.mean)
    covariance = gaussian.unpack(scorer.covariance_of(user)[None], d)[0]
    candidates = Candidates(user.mean, covariance, scorer.features_of(rows, d))
    place, propensity = bandit.draw(policy_of(name, settings).distribution(candidates, random), random)
    best = int(np.argmax(scorer.belief(rows, user)[0]))
    return Drawn(place, propensity, name, float(place == best), 1 / len(rows))


def name_of(one: str | Attributes) -> str:
    """How the log calls an input."""
    return one if isinstance(one, str) else of_attributes(one).hex()


def logged(
    drawn: Drawn,
    user: str,
    chosen: str | Attributes,
    model_version: int,
    version_propensity: float,
    versions: list[int],
    predicted_label: float,
    n: int,
) -> Choice:
    """The row of a decision among n inputs."""
    return Choice(
        decision_id=uuid.uuid4().hex,
        user_id=user,
        input_id=name_of(chosen),
        propensity=drawn.propensity,
        policy=drawn.policy,
        greedy=drawn.greedy,
        uniform=drawn.uniform,
        candidates=n,
        predicted_label=predicted_label,
        model_version=model_version,
        version_propensity=version_propensity,
        versions=versions,
        event_time=datetime.now(timezone.utc).isoformat(),
    )
