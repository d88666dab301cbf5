"""What goes in and out over HTTP: one struct a body, and the errors a client can get."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Value = str | float | bool | None | list[str | float]
Attributes = dict[str, Value]
Context = dict[str, str | float | bool]


class Problem(Exception):
    """An answer other than 200: its status, a word for programs and a sentence for people."""

    def __init__(self, status: int, error: str, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()):
        super().__init__(message)
        self.status, self.error, self.message, self.headers = status, error, message, headers


class ErrorBody(msgspec.Struct):
    error: str
    message: str


class About(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """For whom inputs are judged, and in what context."""

    user: str | int
    user_attributes: Attributes | None = None  # of a user of whom the tables know nothing, whatever was observed
    offset: float = 0.0  # a known part of h
    context: Context = {}  # values of model.contexts


class PredictRequest(About, kw_only=True, forbid_unknown_fields=True):
    """One user, many inputs, each an id or an object of attributes."""

    inputs: list[str | int | Attributes]
    deadline_ms: float | None = None


class Score(msgspec.Struct, omit_defaults=True, gc=False):  # many, and in no cycle
    input: str | int | Attributes
    score: float
    std: float
    # Of a coarse answer: how far the score may be from that of any member of the input's class that was measured; null where none
    # was.
    bound: float | None = None


class Stamp(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What every answer says of where it is from."""

    model_version: int
    staleness_s: float  # since the tables were last seen to hold what this server shows


class PredictAnswer(Stamp, kw_only=True, omit_defaults=True):
    scores: list[Score]
    user_known: bool = True
    unknown_inputs: list[str | int] = []  # scored as an input of which nothing is known
    incomplete_inputs: list[int] = []  # places of inputs whose features did not come by the deadline


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    requests: list[PredictRequest]
    deadline_ms: float | None = None


class BatchAnswer(msgspec.Struct):
    answers: list[PredictAnswer]


class ObserveRequest(msgspec.Struct, forbid_unknown_fields=True):
    user: str | int
    input: str | int
    label: float
    weight: float = 1.0
    event_id: str | None = None
    event_time: str | None = None  # ISO 8601; now, where there is none
    offset: float = 0.0
    context: Context = {}


class ObserveAnswer(msgspec.Struct):
    event_id: str
    duplicate: bool  # this event_id had been observed before: nothing was added


class FeedbackRequest(msgspec.Struct, forbid_unknown_fields=True):
    decision_id: str
    reward: float
    user: str | int | None = None
    input: str | int | None = None
    event_time: str | None = None


class FeedbackAnswer(msgspec.Struct):
    decision_id: str


class ChooseRequest(About, kw_only=True, forbid_unknown_fields=True):
    """One of several inputs for a user, each named once, drawn by a policy: serve.explore, where none is named."""

    inputs: list[str | int | Attributes]
    explore: Literal["greedy", "linucb", "thompson"] | None = None
    deadline_ms: float | None = None


class ChooseAnswer(Stamp, kw_only=True, omit_defaults=True):
    input: str | int | Attributes
    place: int  # among the inputs
    propensity: float  # the chance that it had
    decision_id: str  # by which its reward is told (/v1/feedback)
    explore: str
    score: float
    std: float
    user_known: bool = True
    unknown_inputs: list[str | int] = []
    incomplete_inputs: list[int] = []
    version_propensity: float = 1.0  # the chance that the model version had to decide


class TopRequest(About, kw_only=True, forbid_unknown_fields=True):
    """The best inputs for a user: of all, or of ``candidates``; only those with all attributes of ``where``."""

    k: int = 10
    candidates: list[str | int] | None = None
    exclude: list[str | int] = []
    exclude_seen: bool = False
    where: Attributes = {}


class TopAnswer(Stamp, kw_only=True, omit_defaults=True):
    scores: list[Score]
    user_known: bool = True
    incomplete_inputs: list[str] = []  # candidates whose features did not come by the deadline
    rescored: bool = True  # false where serve.rescore failed or was late, and the order is the model's


class Contribution(msgspec.Struct):
    basis: str
    weight: float
    weight_std: float
    feature: float | None
    contribution: float | None


class UserAnswer(Stamp, kw_only=True):
    user: str
    known: bool
    n_events: int
    n_unconfirmed: int  # of them observed here and not in the tables' row yet
    weights: list[float]
    covariance: list[list[float]]
    input: str | None  # of which ``why`` speaks
    offset: float | None  # what all users share of it
    why: list[Contribution]
    score: float | None
    std: float | None
    incomplete: bool = False  # the input's features did not come by the deadline


class InputAnswer(Stamp, kw_only=True):
    input: str
    known: bool
    has_features: bool  # or the oracle's, from the attributes
    offset: float
    offset_std: float
    features: list[float]
    features_std: list[float]
    attributes: dict[str, Any] | None
    n_events: int
    mean_label: float | None
    incomplete: bool = False  # the features did not come by the deadline


class Near(msgspec.Struct):
    id: str
    distance: float  # root mean square of the difference in h


class SimilarAnswer(Stamp, kw_only=True):
    of: str
    near: list[Near]
    incomplete: bool = False  # features of ``of`` did not come by the deadline


class PopularInput(msgspec.Struct):
    input: str
    n_events: int
    mean_label: float


class PopularAnswer(Stamp, kw_only=True):
    inputs: list[PopularInput]


class Competitor(msgspec.Struct):
    """A model version that decides beside others."""

    model_version: int
    n_rewards: int
    mean_reward: float | None


class ModelsAnswer(msgspec.Struct, omit_defaults=True):
    live: int
    models: list[dict[str, Any]]
    competitors: list[Competitor] = []


class HealthAnswer(msgspec.Struct):
    status: str


class ReadyAnswer(msgspec.Struct):
    ready: bool
    model_version: int | None
    staleness_s: float | None
    reason: str = ""
