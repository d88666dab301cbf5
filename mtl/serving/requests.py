"""What a client sent, decoded and checked; what is wrong with it is a :class:`mtl.serving.api.Problem`."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TypeVar

import msgspec

from mtl.losses import Loss
from mtl.moment import moment
from mtl.schema import LARGEST, LARGEST_EXPONENT
from mtl.serving import api
from mtl.serving.api import Problem
from mtl.serving.filters import as_ingested
from mtl.serving.observations import Event, Feedback

MAX_ID = 1000  # characters
DEFAULT_K = 10

Body = TypeVar("Body", bound=msgspec.Struct)

PREDICT = msgspec.json.Decoder(api.PredictRequest)
BATCH = msgspec.json.Decoder(api.BatchRequest)
CHOOSE = msgspec.json.Decoder(api.ChooseRequest)
TOP = msgspec.json.Decoder(api.TopRequest)
OBSERVE = msgspec.json.Decoder(api.ObserveRequest)
FEEDBACK = msgspec.json.Decoder(api.FeedbackRequest)


def decode(decoder: msgspec.json.Decoder[Body], body: bytes | bytearray) -> Body:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Problem(422, "bad_request", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "bad_json", f"the body is no JSON: {error}") from error


def too_many(what: str, n: int, limit: int, setting: str) -> Problem:
    return Problem(413, "too_many", f"{n} {what}: at most {limit} ({setting})")


def identity_of(name: str, identity: str | int) -> str:
    text = str(identity)
    if not text.strip():
        raise Problem(422, f"bad_{name}", f"{name} is empty")
    if len(text) > MAX_ID:
        raise Problem(422, f"bad_{name}", f"{name} has {len(text)} characters: at most {MAX_ID}")
    return text


def as_text(inputs: Sequence[str | int | api.Attributes]) -> list[str | api.Attributes]:
    """Ids are text, as the tables have them; attributes stay."""
    return [str(one) if isinstance(one, int) else one for one in inputs]


def moment_of(text: str | None) -> str:
    if text is None:
        return datetime.now(timezone.utc).isoformat()
    try:
        return moment(text).isoformat()
    except ValueError as error:
        raise Problem(
            422, "bad_event_time", f"event_time {text[:40]!r}: ISO 8601 is wanted, such as 2026-01-31T12:00:00Z"
        ) from error


def allow(query: Mapping[str, str], *names: str) -> None:
    for name in query:
        if name not in names:
            there = ", ".join(names) or "none"
            raise Problem(422, "bad_query", f"unknown parameter {name[:40]!r}; there are: {there}")


def text_of(query: Mapping[str, str], name: str) -> str:
    if not query.get(name):
        raise Problem(422, "bad_query", f"the parameter {name} is missing")
    return query[name]


def flag_of(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in ("true", "false"):
        raise Problem(422, "bad_query", f"{name} = {value[:20]!r}: true or false")
    return value == "true"


def pairs_of(query: Mapping[str, str], name: str) -> list[tuple[str, str]]:
    """Pairs of ``name:value,…``."""
    parts = [part.partition(":") for part in filter(None, query.get(name, "").split(","))]
    for before, colon, _ in parts:
        if not colon or not before or [other for other, _, _ in parts].count(before) > 1:
            raise Problem(
                422, "bad_query", f"{name}: write name:value,… with every name once; values with a comma go in a POST"
            )
    return [(before, after) for before, _, after in parts]


def k_of(query: Mapping[str, str], most: int) -> int:
    text = query.get("k", str(DEFAULT_K))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Problem(422, "bad_k", f"k = {text[:20]!r}: a whole number is wanted")
    return checked_k(int(text), most)


def checked_k(k: int, most: int) -> int:
    if not 1 <= k <= most:
        raise Problem(422, "bad_k", f"k = {k}: from 1 to {most} (serve.max_k)")
    return k


def limited(name: str, value: float, most: float = LARGEST) -> float:
    """A finite number whose size is at most ``most``, as ingest takes it."""
    if not math.isfinite(value):
        raise Problem(422, f"bad_{name}", f"{name} {value}: a finite number is wanted")
    if abs(value) > most:
        raise Problem(422, f"bad_{name}", f"{name} {value:g} is beyond {most:g}")
    return value + 0.0  # −0 is 0, as ingest has it


def offset_of(value: float, loss: Loss) -> float:
    return limited("offset", value, LARGEST if loss.name == "squared" else LARGEST_EXPONENT)


def context_of(given: Mapping[str, str | float | bool], contexts: Sequence[str]) -> dict[str, str]:
    """Values as the text that ingest makes of them."""
    for name in given:
        if name not in contexts:
            there = ", ".join(contexts) or "none"
            raise Problem(422, "bad_context", f"unknown context {name[:40]!r}; the model has: {there}")
    return {name: as_ingested(value) for name, value in given.items()}


def event_of(request: api.ObserveRequest, loss: Loss, contexts: Sequence[str]) -> Event:
    """The event; what ingest would put into quarantine is refused."""
    label, weight = limited("label", request.label), limited("weight", request.weight)
    if (reason := loss.refusal(label, label, label == math.floor(label))) is not None:
        raise Problem(422, "bad_label", f"label {label}: a model of {loss.name} loss takes no {reason}")
    if weight <= 0:
        raise Problem(422, "bad_weight", f"weight {weight}: a number above 0 is wanted")
    return Event(
        uuid.uuid4().hex if request.event_id is None else identity_of("event_id", request.event_id),
        identity_of("user", request.user),
        identity_of("input", request.input),
        label,
        weight,
        moment_of(request.event_time),
        offset_of(request.offset, loss) or None,
        context_of(request.context, contexts),
    )


def feedback_of(request: api.FeedbackRequest) -> Feedback:
    return Feedback(
        identity_of("decision_id", request.decision_id),
        limited("reward", request.reward),
        None if request.user is None else identity_of("user", request.user),
        None if request.input is None else identity_of("input", request.input),
        moment_of(request.event_time),
    )


def top_of(query: Mapping[str, str], max_k: int) -> api.TopRequest:
    allow(query, "user", "k", "exclude_seen", "where", "context")
    return api.TopRequest(
        user=text_of(query, "user"),
        k=k_of(query, max_k),
        exclude_seen=flag_of(query, "exclude_seen"),
        where=dict(pairs_of(query, "where")),
        context=dict(pairs_of(query, "context")),
    )
