"""Whatever comes in, an answer goes out, and it is never the server's fault."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from calling import Client, calling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("MTL_FUZZ_EXAMPLES", "150"))
fuzz = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])

ROUTES = [
    ("POST", "/v1/predict"),
    ("POST", "/v1/predict/batch"),
    ("POST", "/v1/observe"),
    ("POST", "/v1/choose"),
    ("POST", "/v1/feedback"),
    ("POST", "/v1/top"),
    ("GET", "/v1/top"),
    ("GET", "/v1/users/u1"),
    ("GET", "/v1/inputs/x1"),
    ("GET", "/v1/similar"),
    ("GET", "/v1/popular"),
    ("GET", "/v1/models"),
]
KEYS = [
    *("user", "inputs", "user_attributes", "deadline_ms", "requests", "input", "label", "weight", "event_id"),
    *(
        "event_time",
        "decision_id",
        "reward",
        "k",
        "candidates",
        "exclude",
        "exclude_seen",
        "explore",
        "where",
        "year",
        "colour",
        "age",
    ),
]

texts = st.one_of(
    st.sampled_from(["u1", "x1", "x2", "red", "nothing", "", " ", "\x00", "2026-01-01", "9" * 400]), st.text()
)
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True, allow_infinity=True), texts, st.just(10**400)
)
trees = st.recursive(
    values,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=5)
    ),
    max_leaves=15,
)
bodies = st.dictionaries(st.sampled_from(KEYS), trees, max_size=7)
near_misses = st.fixed_dictionaries(
    {},
    optional={
        "user": texts | st.integers(),
        "inputs": st.lists(texts | st.dictionaries(st.sampled_from(["year", "colour"]), trees, max_size=2), max_size=4),
        "user_attributes": st.dictionaries(st.sampled_from(["age"]), values, max_size=1),
        "deadline_ms": st.floats() | st.integers(),
        "input": texts | st.integers(),
        "label": st.floats() | st.integers(),
        "weight": st.floats(),
        "event_id": texts,
        "event_time": texts,
        "k": st.integers(),
        "candidates": st.lists(texts, max_size=3),
        "exclude": st.lists(texts, max_size=3),
        "exclude_seen": st.booleans(),
        "where": st.dictionaries(st.sampled_from(["year", "colour", "other"]), values, max_size=2),
        "decision_id": texts,
        "reward": st.floats(),
    },
)
queries = st.lists(st.tuples(st.sampled_from(KEYS) | texts, texts), max_size=4)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with calling(tmp_path_factory.mktemp("store")) as client:
        yield client


def check(client: Client, method: str, path: str, body: bytes = b"", query: bytes = b"") -> None:
    status, headers, answer = client.send(method, path, body, query)
    assert 200 <= status < 500, (status, answer, body, query)
    if headers["content-type"] == "application/json":
        json.loads(answer)


def encoded(body: object) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


@fuzz
@given(st.sampled_from(ROUTES), st.binary(max_size=200))
def test_any_bytes(client: Client, route: tuple[str, str], body: bytes) -> None:
    check(client, *route, body)


@fuzz
@given(st.sampled_from(ROUTES[:5]), st.one_of(trees, bodies, near_misses))
def test_any_json(client: Client, route: tuple[str, str], body: object) -> None:
    check(client, *route, encoded(body))


@fuzz
@given(near_misses)
def test_bodies_that_are_almost_right(client: Client, body: dict) -> None:
    for method, path in ROUTES[:5]:
        names = {
            "/v1/predict": ("user", "inputs", "user_attributes", "deadline_ms"),
            "/v1/observe": ("user", "input", "label", "weight", "event_id", "event_time"),
            "/v1/feedback": ("decision_id", "reward", "user", "input", "event_time"),
            "/v1/top": ("user", "k", "candidates", "exclude", "exclude_seen", "where", "user_attributes"),
        }.get(path)
        whole = body if names is None else {name: body[name] for name in names if name in body}
        check(client, method, path, encoded({"requests": [whole]} if names is None else whole))


@fuzz
@given(st.sampled_from(ROUTES), queries)
def test_any_query(client: Client, route: tuple[str, str], query: list[tuple[str, str]]) -> None:
    text = "&".join(f"{name}={value}" for name, value in query)
    check(client, *route, query=text.encode("utf-8", "surrogatepass"))


@fuzz
@given(st.sampled_from(["GET", "POST", "PUT", "OPTIONS", "HEAD"]), st.text(max_size=50), st.binary(max_size=60))
def test_any_path_and_query(client: Client, method: str, name: str, query: bytes) -> None:
    for folder in ("/", "/v1/users/", "/v1/inputs/", "/v1/"):
        check(client, method, folder + name, query=query)
