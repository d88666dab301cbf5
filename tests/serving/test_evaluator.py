"""Features of described inputs over HTTP: cached, coarse with a bound, and by a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import INPUTS, Client, calling
from made_up import EVENTS_BEFORE

from mtl.prior import Prior
from mtl.serving import evaluator as evaluators
from mtl.serving.evaluator import EncodingError, Evaluator
from mtl.serving.view import open_view


def evaluator_of(client: Client) -> Evaluator:
    assert client.service.view is not None
    return client.service.view.evaluator


def counted(client: Client, name: str) -> float:
    _, _, text = client.send("GET", "/metrics")
    return sum(float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(f"{name} "))


def predict(client: Client, user: str, *inputs: object, **more: object) -> dict:
    status, answer = client.ask("POST", "/v1/predict", {"user": user, "inputs": list(inputs), **more})
    assert status == 200, answer
    return answer


@contextmanager
def counting(client: Client) -> Iterator[list[int]]:
    """Inputs of each evaluation of the functions."""
    seen = list[int]()
    lane = evaluator_of(client).lanes[0]
    of = lane.function

    def function(encoded: np.ndarray, needed: tuple) -> np.ndarray:
        seen.append(len(encoded))
        return of(encoded, needed)

    lane.function = function
    yield seen
    lane.function = of


def test_equal_attributes_are_evaluated_once_for_all_users(tmp_path: Path) -> None:
    with calling(tmp_path) as client, counting(client) as seen:
        before = counted(client, "mtl_feature_cache_hits_total"), counted(client, "mtl_feature_cache_misses_total")
        first = predict(client, "u1", {"year": 3.25}, {"year": 4.25}, {"year": 3.25})
        assert seen == [2]
        again = predict(client, "u1", {"year": 3.25}, {"year": 4.25}, {"year": 3.25})
        other = predict(client, "u2", {"year": 4.25})
        assert seen == [2]
        assert first["scores"] == again["scores"]
        assert "bound" not in first["scores"][0]
        assert other["scores"][0]["score"] != first["scores"][1]["score"]
        after = counted(client, "mtl_feature_cache_hits_total"), counted(client, "mtl_feature_cache_misses_total")
        assert (after[0] - before[0], after[1] - before[1]) == (4, 3)


def test_an_observation_changes_the_score_and_not_the_features(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.prediction_cache_mb=1") as client, counting(client) as seen:
        before = predict(client, "u1", {"year": 3.25})["scores"][0]
        assert predict(client, "u1", {"year": 3.25})["scores"][0] == before
        assert counted(client, "mtl_prediction_cache_hits_total") >= 1
        assert client.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 5})[0] == 200
        assert predict(client, "u1", {"year": 3.25})["scores"][0] != before
        assert seen == [1]


def test_without_a_cache_every_request_evaluates(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.feature_cache_mb=0") as client, counting(client) as seen:
        for _ in range(3):
            predict(client, "u1", {"year": 3.25})
        assert seen == [1, 1, 1]


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize(
    ("classes", "coarseness"), [("rounded", "[0.3]"), ("hashed", "[0.3]"), ("clustered", "[9, 4]")]
)
def test_a_coarse_answer_is_within_its_bound_of_the_exact_one(
    tmp_path: Path, classes: str, coarseness: str, loss: str
) -> None:
    """All inputs of the store were measured when the server started."""
    settings = f"serve.classes={classes}", f"serve.coarseness={coarseness}"
    inputs = [{"year": i / 20, "colour": ["red", "blue"][i % 2]} for i in np.random.default_rng(0).permutation(INPUTS)]
    with calling(tmp_path / "exact", loss=loss) as client:
        exact = {u: predict(client, u, *inputs)["scores"] for u in ("u1", "u2", "u3")}
    with calling(tmp_path / "coarse", *settings, loss=loss) as client, counting(client) as seen:
        furthest = 0.0
        for user, wanted in exact.items():
            for one, right in zip(predict(client, user, *inputs)["scores"], wanted, strict=True):
                off = abs(one["score"] - right["score"])
                assert off <= one["bound"] + 1e-9
                furthest = max(furthest, off)
        assert furthest > 0  # or there was nothing to bound
        assert 0 < sum(seen) < INPUTS
        far = predict(client, "u1", "x1", {"year": -1e6})["scores"]
        assert far[0]["bound"] == 0
        if classes != "clustered" and loss == "squared":
            assert far[1]["bound"] is None  # nobody measured such an input


def test_an_answer_comes_by_its_deadline_and_what_was_not_reached_is_not_kept(tmp_path: Path) -> None:
    with calling(tmp_path) as client:
        lane, hang = evaluator_of(client).lanes[0], threading.Event()
        function = lane.function
        right = predict(client, "u1", {"year": 0.72})["scores"][0]
        lane.function = lambda encoded, needed: hang.wait(20)
        began = time.monotonic()
        late = predict(client, "u1", "x1", {"year": 0.72}, {"year": 0.82}, deadline_ms=60)
        assert time.monotonic() - began < 2
        assert late["incomplete_inputs"] == [2]
        assert late["scores"][1]["score"] == pytest.approx(right["score"], rel=1e-12)
        lane.function = function
        hang.set()
        whole = predict(client, "u1", {"year": 0.82})["scores"][0]
        assert whole["score"] != late["scores"][2]["score"]
        assert late["scores"][2]["std"] > whole["std"]


def test_an_encoding_that_hangs_keeps_nobody_waiting_either(tmp_path: Path) -> None:
    with calling(tmp_path) as client:
        hang = threading.Event()
        evaluator_of(client).encoding[0].function = lambda attributes, needed: hang.wait(20)
        began = time.monotonic()
        assert predict(client, "u1", {"year": 9.0}, deadline_ms=60)["incomplete_inputs"] == [0]
        assert time.monotonic() - began < 2
        hang.set()


def test_what_is_not_reached_is_what_inputs_are_on_average_with_their_spread(tmp_path: Path) -> None:
    with calling(tmp_path) as client:
        view = client.service.view
        assert view is not None
        user = view.weights_of("u1")
        assert user is not None
        all_of_them = view.evaluator.complete([{"year": i / 20} for i in range(INPUTS)])
        mean, _ = view.score(user, all_of_them)
        nothing, std = view.score(user, view.evaluator.unreached(1))
        assert nothing[0] == pytest.approx(mean.mean(), abs=0.02 * std[0])
        assert std[0] > np.sqrt(mean.var())


@pytest.mark.parametrize("settings", [(), ("serve.classes=rounded",)])
def test_attributes_that_cannot_be_encoded_are_the_clients_fault(
    tmp_path: Path, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object, attributes: object) -> None:
        raise EncodingError("year is no number")

    with calling(tmp_path, *settings) as client:
        monkeypatch.setattr(evaluators, "_encoded", refuse)
        status, answer = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": [{"year": "old"}]})
        assert (status, answer["error"]) == (422, "bad_attributes")
        assert "year is no number" in answer["message"]


DESCRIBED = f"x{INPUTS}"  # has attributes and no features


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set: functions of inputs return."""
    go, mean = threading.Event(), Prior.mean

    def wait(self: Prior, attributes: np.ndarray) -> np.ndarray:
        go.wait(20)
        return mean(self, attributes)

    go.set()
    monkeypatch.setattr(Prior, "mean", wait)
    yield go
    go.set()


def test_an_observation_whose_function_hangs_keeps_nobody_waiting_and_counts_when_it_returns(
    tmp_path: Path, held: threading.Event
) -> None:
    def n_events(user: str) -> int:
        return client.ask("GET", f"/v1/users/{user}")[1]["n_events"]

    with calling(tmp_path, "serve.feature_cache_mb=0") as client:
        held.clear()
        began = time.monotonic()
        for user in ("u1", "u2"):
            assert client.ask("POST", "/v1/observe", {"user": user, "input": DESCRIBED, "label": 5})[0] == 200
        before = predict(client, "u1", "x1", deadline_ms=50)["scores"]
        assert n_events("u1") == n_events("u2") == EVENTS_BEFORE
        assert time.monotonic() - began < 2
        held.set()
        ends = time.monotonic() + 10
        while n_events("u1") == EVENTS_BEFORE and time.monotonic() < ends:
            time.sleep(0.01)
        assert n_events("u1") == n_events("u2") == EVENTS_BEFORE + 1
        assert predict(client, "u1", "x1")["scores"] != before
        assert evaluator_of(client)._apart.counts().done == 1  # for both, however often they were asked for


@pytest.mark.parametrize(
    ("path", "query", "told"),
    [
        (f"/v1/inputs/{DESCRIBED}", "", {"incomplete": True}),
        ("/v1/users/u1", f"input={DESCRIBED}", {"incomplete": True}),
        ("/v1/similar", f"input={DESCRIBED}", {"incomplete": True}),
        ("/v1/top", {"user": "u1", "candidates": ["x1", DESCRIBED]}, {"incomplete_inputs": [DESCRIBED]}),
        ("/v1/choose", {"user": "u1", "inputs": ["x1", DESCRIBED]}, {"incomplete_inputs": [1]}),
    ],
)
def test_every_route_answers_by_the_deadline(
    tmp_path: Path, held: threading.Event, path: str, query: str | dict, told: dict
) -> None:
    with calling(tmp_path, "serve.deadline_ms=[60]", "serve.feature_cache_mb=0") as client:

        def ask() -> dict:
            posted = isinstance(query, dict)
            status, answer = client.ask(*(("POST", path, query) if posted else ("GET", path, None, query)))
            assert status == 200, answer
            return {name: answer[name] for name in told if name in answer}

        held.clear()
        began = time.monotonic()
        assert ask() == told
        assert time.monotonic() - began < 2
        held.set()
        ends = time.monotonic() + 10
        while ask() and time.monotonic() < ends:
            time.sleep(0.01)
        assert ask() == {}


def test_a_function_that_hangs_does_not_keep_a_version_from_being_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, whole = threading.Event(), evaluators._whole

    def wait(*of: Any) -> np.ndarray:
        go.wait(20)
        return whole(*of)

    monkeypatch.setattr("mtl.serving.view._UNKNOWN_SECONDS", 0.05)
    with calling(tmp_path) as client:
        service = client.service
        monkeypatch.setattr(evaluators, "_whole", wait)
        began = time.monotonic()
        view = open_view(service.store, service.overlay, service.settings)
        assert time.monotonic() - began < 5
        assert view is not None
        np.testing.assert_array_equal(view.unknown_input, view.evaluator.unreached(1)[0])
        go.set()
        expected, ends = view.evaluator.complete([{}])[0], time.monotonic() + 10
        while (view.unknown_input != expected).any() and time.monotonic() < ends:
            time.sleep(0.01)
        np.testing.assert_array_equal(view.unknown_input, expected)
