"""Every route, its limits, and what it says of a request that it cannot use."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from calling import INPUTS, Client, calling
from connecting import connect, posted
from made_up import EVENTS_BEFORE, VERSION

from mtl.effects import Effect
from mtl.errors import OracleError
from mtl.schema import LARGEST, LARGEST_EXPONENT
from mtl.serving import predictions
from mtl.serving import view as views
from mtl.serving.evaluator import Evaluator
from mtl.serving.http import PREDICT_PATH
from mtl.serving.observations import read, sealed
from mtl.serving.predictions import Predictions
from mtl.serving.records import digest, pack_users
from mtl.serving.scorer import quadratics
from mtl.serving.store import Store
from mtl.serving.view import View

_weights_of_several = View.weights_of_several


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    limits = ["serve.max_inputs=50", "serve.max_batch=14", "serve.max_k=20", "serve.max_body_kb=16"]
    with calling(tmp_path_factory.mktemp("store"), *limits) as client:
        yield client


def predicted_at_once(
    client: Client, bodies: list[bytes], headers: Sequence[Sequence[bytes]] = ()
) -> list[tuple[int, bytes]]:
    """Status and body of answers to predictions that come in one turn of the loop, each over a connection of its own."""

    async def at_once() -> list[tuple[int, bytes]]:
        connections = [connect(client.app, client.turn) for _ in bodies]
        for i, ((protocol, _), body) in enumerate(zip(connections, bodies, strict=True)):
            protocol.data_received(posted(PREDICT_PATH, body, *(headers[i] if headers else ())))
        while not all(transport.written for _, transport in connections):
            await asyncio.sleep(0.001)
        answers = [transport.written[0] for _, transport in connections]
        return [(int(one.split()[1]), one.partition(b"\r\n\r\n")[2]) for one in answers]

    return client.loop.run_until_complete(asyncio.wait_for(at_once(), 30))


def test_predict_scores_ids_attributes_and_what_nobody_knows(client: Client) -> None:
    inputs = ["x1", {"year": 3}, "nothing", "x60", "x2"]
    status, answer = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": inputs})
    assert status == 200
    assert [one["input"] for one in answer["scores"]] == inputs
    assert answer["unknown_inputs"] == ["nothing"]
    assert answer["model_version"] == 1
    view = client.service.view
    assert view is not None
    user = view.weights_of("u1")
    assert user is not None
    expected = view.score(user, view.rows_of(inputs).rows)
    np.testing.assert_allclose([one["score"] for one in answer["scores"]], expected[0], atol=1e-12)
    np.testing.assert_allclose([one["std"] for one in answer["scores"]], expected[1], atol=1e-12)
    _, alone = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1", "x2"]})
    assert alone["scores"] == [answer["scores"][0], answer["scores"][4]]


@pytest.mark.parametrize(("rows", "n_together"), [(1024, [10, 1, 1]), (24, [8, 2, 1, 1]), (11, [3, 3, 3, 1, 1, 1])])
def test_requests_of_one_moment_are_scored_together_and_answered_as_each_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch, rows: int, n_together: list[int]
) -> None:
    monkeypatch.setattr(predictions, "_ROWS", rows)
    asked = [
        {"user": "u1", "inputs": ["x1", "x2", "x3"]},
        {"user": "u2", "inputs": ["x3", "x2", "x1"]},
        {"user": "u3", "inputs": ["x4"]},
        {"user": "u4", "inputs": []},
        {"user": "nobody", "inputs": ["x1", "x2", "x5"]},
        {"user": "nobody", "inputs": ["x1", "x2", "x5"], "user_attributes": {"age": 2.0}},
        {"user": "u1", "inputs": ["x1", "x2", "x3"], "offset": 0.5},
        {"user": "u1", "inputs": ["x1", {"year": 3}, "nothing"]},
        {"user": "u1", "inputs": ["x1"] * 51},
        {"user": "u1"},
        *({"user": f"u{i}", "inputs": ["x1", "x2", f"x{i}"]} for i in range(5, 10)),
    ]
    several: list[list[Any]] = []
    monkeypatch.setattr(
        View, "weights_of_several", lambda self, users: several.append(users) or _weights_of_several(self, users)
    )
    bodies = [json.dumps(one).encode() for one in asked]
    bodies.append(bodies[0] + b" " * 17_000)
    alone = [client.send("POST", "/v1/predict", body) for body in bodies]
    several.clear()

    assert predicted_at_once(client, bodies) == [(s, body) for s, _, body in alone]
    assert [status for status, _, _ in alone] == [200] * 8 + [413, 422] + [200] * 5 + [413]
    assert [len(users) for users in several] == n_together  # of as many inputs, in as many rows as may be


def test_a_request_that_harms_its_turn_harms_nobody_else(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        View, "weights_of_several", lambda self, users: _weights_of_several(self, users) if len(users) == 1 else 1 / 0
    )
    body = b'{"user": "u1", "inputs": ["x1", "x2"]}'
    alone = client.send("POST", "/v1/predict", body)
    assert alone[0] == 200
    assert predicted_at_once(client, [body, body]) == [(200, alone[2])] * 2


def test_what_is_answered_past_the_application_is_counted_as_all_else(client: Client) -> None:
    def counted() -> list[float]:
        lines = client.send("GET", "/metrics")[2].decode().splitlines()
        names = 'mtl_requests_total{route="predict",status="200"}', 'mtl_request_seconds_count{route="predict"}'
        return [float(line.split()[-1]) for name in names for line in lines if line.startswith(name)]

    body = b'{"user": "u1", "inputs": ["x1"]}'
    client.send("POST", "/v1/predict", body)
    before = counted()
    predicted_at_once(client, [body, b'{"user": "u1"}', body])
    (requests, times), (requests_before, times_before) = counted(), before
    assert requests - requests_before == 2
    assert times - times_before == 3  # with the one that was refused


def test_ids_that_are_numbers_are_found_as_text_and_remembered(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    view = client.service.view
    assert view is not None
    view.store.write_input_ids(view.live.generation, 7, ["7"])
    _, by_text = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["7", "x1"]})
    for _ in range(2):
        _, by_number = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": [7, "x1"]})
        assert by_number["scores"][0] == {**by_text["scores"][0], "input": 7}
        assert "unknown_inputs" not in by_number
        monkeypatch.delattr(Store, "input_row", raising=False)  # for the second time


def test_more_inputs_than_are_remembered_are_found_all_the_same(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"user": "u1", "inputs": [f"x{i}" for i in range(40, 50)]}
    _, remembered = client.ask("POST", "/v1/predict", body)
    monkeypatch.setattr(views, "_INDEX_LIMIT", 3)
    client.service.view._index.clear()  # type: ignore[union-attr]
    assert client.ask("POST", "/v1/predict", body)[1] == remembered


def test_an_unknown_user_has_the_prior_by_attributes_where_given(client: Client) -> None:
    _, plain = client.ask("POST", "/v1/predict", {"user": "nobody", "inputs": ["x1"]})
    body = {"user": "nobody", "inputs": ["x1"], "user_attributes": {"age": 2.0}}
    _, described = client.ask("POST", "/v1/predict", body)
    assert plain["user_known"] is described["user_known"] is False
    assert plain["scores"] != described["scores"]


def test_a_user_who_is_described_stays_so_when_something_was_observed(tmp_path: Path) -> None:
    with calling(tmp_path) as client:
        described = {"user": "nobody", "inputs": ["x1"], "user_attributes": {"age": 2.0}}

        def moved() -> float:
            """What the attributes are worth."""
            asked = [described, {**described, "user_attributes": None}, described]
            one, other, again = (client.ask("POST", "/v1/predict", body)[1]["scores"][0]["score"] for body in asked)
            assert one == again
            return one - other

        before = moved()
        for _ in range(2):
            assert client.ask("POST", "/v1/observe", {"user": "nobody", "input": "x2", "label": 4})[0] == 200
            assert 0 < moved() / before < 1  # a prior mean counts for less, the more is known


@pytest.mark.parametrize("rows", [1, 4096])
def test_a_batch_is_its_requests(client: Client, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(predictions, "_ROWS", rows)
    requests = [
        {"user": "u1", "inputs": ["x1"]},
        {"user": "u2", "inputs": [{"year": 1}]},
        {"user": "u3", "inputs": ["x2"]},
    ]
    status, answer = client.ask("POST", "/v1/predict/batch", {"requests": requests})
    assert status == 200
    alone = [client.ask("POST", "/v1/predict", one)[1]["scores"] for one in requests]
    assert [one["scores"] for one in answer["answers"]] == alone


def test_a_batch_is_of_one_version_whatever_comes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with calling(tmp_path, "serve.rivals=[2]") as client:
        service, contest = client.service, client.service.contest
        assert contest is not None
        other, evaluated = contest.rivals[0].view, Predictions._evaluated
        assert other is not None
        monkeypatch.setattr(service, "contest", None)

        async def then_switched(*of: Any) -> Any:
            service.view = other
            return await evaluated(*of)

        monkeypatch.setattr(Predictions, "_evaluated", then_switched)
        new, known = {"user": "u1", "inputs": [{"year": 1}]}, {"user": "u2", "inputs": ["x1"]}
        _, answer = client.ask("POST", "/v1/predict/batch", {"requests": [new, known, new]})
        assert [one["model_version"] for one in answer["answers"]] == [1, 1, 1]
        assert client.ask("POST", "/v1/predict", known)[1]["model_version"] == 2


def test_top_is_the_best_of_all(client: Client) -> None:
    _, all_of_them = client.ask("POST", "/v1/predict", {"user": "u3", "inputs": [f"x{i}" for i in range(50)]})
    _, rest = client.ask("POST", "/v1/predict", {"user": "u3", "inputs": [f"x{i}" for i in range(50, INPUTS)]})
    ordered = sorted([*all_of_them["scores"], *rest["scores"]], key=lambda one: -one["score"])
    status, answer = client.ask("GET", "/v1/top", query="user=u3&k=7")
    assert status == 200
    assert [one["input"] for one in answer["scores"]] == [one["input"] for one in ordered[:7]]
    best = ordered[0]["input"]
    _, without = client.ask("POST", "/v1/top", {"user": "u3", "k": 3, "exclude": [best]})
    assert [one["input"] for one in without["scores"]] == [one["input"] for one in ordered[1:4]]
    _, red = client.ask("GET", "/v1/top", query="user=u3&k=3&where=colour:red")
    wanted = [one["input"] for one in ordered if int(one["input"][1:]) % 2 == 0][:3]
    assert [one["input"] for one in red["scores"]] == wanted
    _, some = client.ask("POST", "/v1/top", {"user": "u3", "k": 2, "candidates": ["x4", "x5", "x6", "x5"]})
    of_three = [one for one in ordered if one["input"] in ("x4", "x5", "x6")][:2]
    assert some["scores"] == of_three


def test_a_rescoring_hook_has_the_last_word(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def least_first(user: str, ids: list[str], scores: list[float], stds: list[float]) -> list[float]:
        return [-score for score in scores]

    monkeypatch.setattr(client.service, "rescore", least_first)
    _, answer = client.ask("POST", "/v1/top", {"user": "u3", "k": 3, "candidates": ["x1", "x2", "x3"]})
    scores = [one["score"] for one in answer["scores"]]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) < 0


def test_what_a_rescoring_hook_gives_minus_infinity_is_left_out(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.service, "rescore", lambda user, ids, scores, stds: [1.0, -float("inf"), 2.0])
    _, answer = client.ask("POST", "/v1/top", {"user": "u3", "k": 3, "candidates": ["x1", "x2", "x3"]})
    assert [(one["input"], one["score"]) for one in answer["scores"]] == [("x3", 2.0), ("x1", 1.0)]


@pytest.mark.parametrize("candidates", [None, ["x1", "x2", "x3"]], ids=["of all", "of some"])
@pytest.mark.parametrize("fault", ["hangs", "fails", "leaves one out", "is no number"])
def test_a_rescoring_hook_that_fails_or_is_late_leaves_the_order_as_it_was(
    client: Client, monkeypatch: pytest.MonkeyPatch, candidates: list[str] | None, fault: str
) -> None:
    request = {"user": "u3", "k": 3} | ({"candidates": candidates} if candidates else {})
    _, plain = client.ask("POST", "/v1/top", request)
    go_on = threading.Event()

    def rescore(user: str, ids: list[str], scores: list[float], stds: list[float]) -> list[float]:
        if fault == "hangs":
            go_on.wait(10)
        elif fault == "fails":
            raise KeyError("u3")
        return scores[1:] if fault == "leaves one out" else [float("nan") for _ in scores]

    monkeypatch.setattr(client.service, "rescore", rescore)
    began = time.monotonic()
    status, answer = client.ask("POST", "/v1/top", request)
    took = time.monotonic() - began
    go_on.set()
    assert status == 200
    assert answer.pop("rescored") is False
    assert {**answer, "staleness_s": 0} == {**plain, "staleness_s": 0}
    assert took < 5


def test_requests_do_not_queue_for_a_rescoring_hook_that_hangs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, calls = threading.Event(), []
    monkeypatch.setattr("mtl.serving.service._MOST_RESCORING", 2)
    monkeypatch.setattr(client.service, "ends", lambda *_: time.monotonic() + 0.05)

    def rescore(user: str, ids: list[str], scores: list[float], stds: list[float]) -> list[float]:
        calls.append(user)
        go_on.wait(10)
        return scores

    def top() -> bool:
        return client.ask("POST", "/v1/top", {"user": "u3"})[1].get("rescored", True)

    monkeypatch.setattr(client.service, "rescore", rescore)
    assert [top() for _ in range(5)] == [False] * 5
    assert len(calls) == 2
    go_on.set()
    monkeypatch.setattr(client.service, "ends", lambda *_: time.monotonic() + 5)
    ends = time.monotonic() + 10
    while not top() and time.monotonic() < ends:
        client.loop.run_until_complete(asyncio.sleep(0.01))
    assert top()


def test_what_was_seen_is_no_candidate_though_it_has_no_features(client: Client) -> None:
    described = f"x{INPUTS}"
    request = {"user": "u9", "candidates": [described, "x1"], "exclude_seen": True}
    assert {one["input"] for one in client.ask("POST", "/v1/top", request)[1]["scores"]} == {described, "x1"}
    assert client.ask("POST", "/v1/observe", {"user": "u9", "input": described, "label": 4})[0] == 200
    assert [one["input"] for one in client.ask("POST", "/v1/top", request)[1]["scores"]] == ["x1"]


@pytest.mark.parametrize("inputs", [["x1", "x1"], ["1", 1], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]])
def test_an_input_is_chosen_from_once(client: Client, inputs: list[Any]) -> None:
    status, answer = client.ask("POST", "/v1/choose", {"user": "u1", "inputs": inputs})
    assert (status, answer["error"]) == (422, "repeated_inputs")


def test_ids_with_a_line_end_are_ids(client: Client) -> None:
    for odd in ("odd\n", "o\nd/d"):
        assert client.ask("POST", "/v1/observe", {"user": odd, "input": "x1", "label": 4})[0] == 200
        assert client.ask("GET", f"/v1/users/{odd}")[1]["user"] == odd
    assert client.ask("GET", "/v1/users/u1\n")[1]["known"] is False
    assert client.ask("GET", "/v1/users/")[0] == 404


def test_observe_is_in_the_next_prediction_once_and_on_disk(client: Client) -> None:
    before = client.ask("GET", "/v1/users/u4")[1]
    event = {"user": "u4", "input": "x1", "label": 5, "event_id": "mine", "event_time": "2026-01-31T12:00:00Z"}
    assert client.ask("POST", "/v1/observe", event) == (200, {"event_id": "mine", "duplicate": False})
    after = client.ask("GET", "/v1/users/u4")[1]
    assert (before["n_events"], after["n_events"]) == (EVENTS_BEFORE, EVENTS_BEFORE + 1)
    assert after["n_unconfirmed"] == 1
    assert client.ask("POST", "/v1/observe", event) == (200, {"event_id": "mine", "duplicate": True})
    assert client.ask("GET", "/v1/users/u4")[1]["weights"] == after["weights"]
    made = client.ask("POST", "/v1/observe", {"user": "u4", "input": "x1", "label": 5})[1]
    assert len(made["event_id"]) == 32
    _, seen = client.ask("GET", "/v1/top", query="user=u4&k=20&exclude_seen=true")
    assert "x1" not in [one["input"] for one in seen["scores"]]
    hidden = next((client.service.store.folder / "observations").glob(".open-*"))
    lines = [json.loads(line) for line in hidden.read_bytes().splitlines()][-2:]
    assert [line["event_id"] for line in lines] == ["mine", made["event_id"]]
    assert lines[0]["event_time"] == "2026-01-31T12:00:00+00:00"


def test_a_reward_is_on_disk_when_it_is_acknowledged(client: Client) -> None:
    body = {"decision_id": "d1", "reward": 1.5, "user": "u1"}
    assert client.ask("POST", "/v1/feedback", body) == (200, {"decision_id": "d1"})
    hidden = next((client.service.store.folder / "feedback").glob(".open-*"))
    assert json.loads(hidden.read_bytes())["reward"] == 1.5


def test_why_adds_up_to_the_mean(client: Client) -> None:
    _, answer = client.ask("GET", "/v1/users/u5", query="input=x7")
    total = answer["offset"] + sum(one["contribution"] for one in answer["why"])
    assert total == pytest.approx(answer["score"], abs=1e-12)
    assert [one["basis"] for one in answer["why"]] == ["intercept", "f1", "f2", "f3"]


def test_similar_inputs_are_those_that_users_of_the_prior_take_alike(client: Client) -> None:
    """Against drawing users from the prior."""
    view = client.service.view
    assert view is not None
    random = np.random.default_rng(0)
    covariance = views.gaussian.unpack(view.prior_covariance, view.d)[0]
    users = random.multivariate_normal(view.unknown_weights.mean, covariance, 200_000)
    rows = np.asarray(view.rows)
    h = users @ rows[:, : view.d].T + rows[:, -1]
    distance = np.sqrt(((h - h[:, [9]]) ** 2).mean(0))
    _, answer = client.ask("GET", "/v1/similar", query="input=x9&k=4")
    assert [one["id"] for one in answer["near"]] == [f"x{i}" for i in np.argsort(distance)[1:5]]
    np.testing.assert_allclose([one["distance"] for one in answer["near"]], np.sort(distance)[1:5], rtol=0.02)


def test_inputs_popular_models_and_pages(client: Client) -> None:
    assert client.ask("GET", "/v1/inputs/x3")[1]["has_features"] is True
    described = client.ask("GET", "/v1/inputs/x60")[1]
    assert (described["known"], described["has_features"]) == (True, False)
    assert client.ask("GET", "/v1/inputs/nothing")[1]["known"] is False
    assert client.ask("GET", "/v1/popular")[0] == client.ask("GET", "/v1/models")[0] == 200
    assert client.ask("GET", "/healthz") == (200, {"status": "ok"})
    assert client.ask("GET", "/readyz")[1]["ready"] is True
    _, _, page = client.send("GET", "/docs")
    assert b"/v1/predict" in page
    assert b"http://" not in page.replace(b"https://", b"http://")
    status, _, text = client.send("GET", "/metrics")
    assert status == 200
    assert b'mtl_requests_total{route="healthz",status="200"}' in text


def test_the_openapi_document_names_every_route(client: Client) -> None:
    _, document = client.ask("GET", "/openapi.json")
    paths = set(document["paths"])
    assert {"/v1/predict", "/v1/observe", "/v1/top", "/v1/users/{id}", "/healthz"} <= paths
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/v1/predict", b"{", 400, "no JSON"),
        ("POST", "/v1/predict", b"[]", 422, "object"),
        ("POST", "/v1/predict", b'{"user":"u","inputs":[1.5]}', 422, "inputs"),
        ("POST", "/v1/predict", b'{"user":"u","inputs":[],"x":1}', 422, "unknown field `x`"),
        ("POST", "/v1/predict", json.dumps({"user": "u", "inputs": ["x"] * 51}).encode(), 413, "serve.max_inputs"),
        ("POST", "/v1/predict", b" " * 20_000, 413, "serve.max_body_kb"),
        (
            "POST",
            "/v1/predict/batch",
            json.dumps({"requests": [{"user": 1, "inputs": []}] * 15}).encode(),
            413,
            "max_batch",
        ),
        ("GET", "/v1/top?user=u&k=0", b"", 422, "from 1 to 20"),
        ("GET", "/v1/top?user=u&k=21", b"", 422, "from 1 to 20"),
        ("GET", "/v1/top?k=1", b"", 422, "user is missing"),
        ("GET", "/v1/top?user=u&where=adult=false", b"", 422, "name:value"),
        ("GET", "/v1/top?user=u&where=genre:a,genre:b", b"", 422, "every name once"),
        ("GET", "/v1/top?user=u&where=title:Hello,%20World", b"", 422, "values with a comma go in a POST"),
        ("GET", "/v1/top?user=u&kk=1", b"", 422, "unknown parameter 'kk'"),
        ("POST", "/v1/observe", b'{"user":"u","input":"x"}', 422, "label"),
        ("POST", "/v1/observe", b'{"user":" ","input":"x","label":1}', 422, "user is empty"),
        ("POST", "/v1/observe", b'{"user":"u","input":"x","label":1,"weight":0}', 422, "above 0"),
        ("POST", "/v1/observe", b'{"user":"u","input":"x","label":1e999}', 422, ""),
        ("POST", "/v1/observe", b'{"user":"u","input":"x","label":1,"event_time":"noon"}', 422, "ISO 8601"),
        ("GET", "/v1/similar?input=nothing", b"", 404, "neither features nor attributes"),
        ("GET", "/nowhere", b"", 404, "Not Found"),
        ("DELETE", "/v1/predict", b"", 405, "Not Allowed"),
    ],
)
def test_a_bad_request_says_what_is_wrong(
    client: Client, method: str, path: str, body: bytes, status: int, says: str
) -> None:
    path, _, query = path.partition("?")
    found, headers, answer = client.send(method, path, body, query.encode())
    assert found == status, answer
    assert headers["content-type"] == "application/json"
    assert says in json.loads(answer)["message"]


def test_a_large_offset_is_a_part_of_every_answer_and_of_no_deviation(tmp_path: Path) -> None:
    offset, inputs = 1e8, ["x1", {"year": 1.0}, "x60"]
    settings = "serve.classes=rounded", "serve.prediction_cache_mb=1", "serve.max_batch=3"
    with calling(tmp_path, *settings) as client:

        def answers(**more: Any) -> list[dict[str, Any]]:
            about = {"user": "u1", "inputs": inputs, **more}
            batch = client.ask("POST", "/v1/predict/batch", {"requests": [about]})[1]["answers"][0]
            top = client.ask("POST", "/v1/top", {"user": "u1", "candidates": ["x1"], **more})[1]
            best = client.ask("POST", "/v1/top", {"user": "u1", "k": 3, **more})[1]
            found = [client.ask("POST", "/v1/predict", about)[1], batch, top, best]
            return [one for answer in found for one in answer["scores"]]

        for plain, moved in zip(answers(), answers(offset=offset), strict=True):
            assert plain["input"] == moved["input"]
            assert moved["score"] - offset == pytest.approx(plain["score"], abs=1e-6)
            assert moved["std"] == pytest.approx(plain["std"], rel=1e-9)
            assert moved.get("bound", 0) == pytest.approx(plain.get("bound", 0), abs=1e-6)
        status, chosen = client.ask("POST", "/v1/choose", {"user": "u1", "inputs": inputs, "offset": offset})
        assert status == 200
        assert 0 < chosen["std"] < 10


def test_labels_that_the_loss_does_not_take_are_refused(tmp_path: Path) -> None:
    with calling(tmp_path, loss="logistic") as client:
        status, answer = client.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 2})
        assert (status, answer["error"]) == (422, "bad_label")
        assert client.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 1})[0] == 200
    assert [event.label for event in read(sealed(tmp_path / "observations"))] == [1.0]


NUMBERS = [
    ("squared", {"label": -1e200}, "label -1e+200 is beyond 1e+12"),
    ("squared", {"label": 1, "weight": 1e200}, "weight 1e+200 is beyond 1e+12"),
    ("squared", {"label": 1, "offset": -1e200}, "offset -1e+200 is beyond 1e+12"),
    ("poisson", {"label": 1e300}, "label 1e+300 is beyond 1e+12"),
    ("poisson", {"label": 1, "weight": 1e308}, "weight 1e+308 is beyond 1e+12"),
    ("poisson", {"label": 1, "offset": 101}, "offset 101 is beyond 100"),
    ("logistic", {"label": 1, "offset": -1e200}, "offset -1e+200 is beyond 100"),
]


@pytest.mark.parametrize(("loss", "observed", "says"), NUMBERS)
def test_numbers_that_leave_nothing_of_others_are_refused(
    tmp_path: Path, loss: str, observed: dict[str, float], says: str
) -> None:
    with calling(tmp_path, loss=loss) as client:
        status, answer = client.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", **observed})
        assert (status, answer["message"]) == (422, says)
        status, answer = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1"]})
        assert status == 200
        assert answer["scores"][0]["score"] is not None


@pytest.mark.parametrize("loss", ["squared", "logistic", "poisson"])
def test_the_largest_numbers_that_are_taken_do_a_user_no_harm(tmp_path: Path, loss: str) -> None:
    label, offset = (1.0 if loss == "logistic" else LARGEST), (LARGEST if loss == "squared" else LARGEST_EXPONENT)
    with calling(tmp_path, loss=loss) as client:
        for sign in (1, -1):
            event = {"user": "u1", "input": "x1", "label": label, "weight": LARGEST, "offset": sign * offset}
            assert client.ask("POST", "/v1/observe", event)[0] == 200
            about = {"user": "u1", "inputs": ["x1", "x2"], "offset": sign * offset}
            status, answer = client.ask("POST", "/v1/predict", about)
            assert status == 200
            assert None not in [one[name] for one in answer["scores"] for name in ("score", "std")]
            status, answer = client.ask("POST", "/v1/choose", {**about, "explore": "thompson"})
            assert status == 200
            assert 0 < answer["propensity"] <= 1


def test_after_a_large_label_a_user_goes_on(tmp_path: Path) -> None:
    """Its row in the tables leaves only rounding of the covariance, and an observation is added to that."""
    with calling(tmp_path) as client:
        view = client.service.view
        assert view is not None
        mean = np.full((1, view.d), 1e10)
        users = np.concatenate([mean, quadratics(mean, view.prior_covariance)], axis=1)
        view.store.write_users(VERSION, [(digest("u1"), next(pack_users(9, [3], users)))])
        assert client.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 4})[0] == 200
        for path, body in (("predict", {"inputs": ["x1"]}), ("top", {"k": 2}), ("choose", {"inputs": ["x1", "x2"]})):
            status, answer = client.ask("POST", f"/v1/{path}", {"user": "u1", **body})
            assert status == 200, answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/predict", {"user": "u1", "inputs": ["x1"], "offset": 1e200}),
        ("/v1/predict", {"user": "u1", "inputs": [{"year": 1}], "offset": 1e200}),
        ("/v1/predict/batch", {"requests": [{"user": "u1", "inputs": ["x1"], "offset": 1e200}]}),
        ("/v1/top", {"user": "u1", "offset": 1e200}),
        ("/v1/choose", {"user": "u1", "inputs": ["x1"], "offset": 1e200}),
        ("/v1/feedback", {"decision_id": "d", "reward": 1e200}),
    ],
)
def test_numbers_too_large_to_answer_are_refused(client: Client, path: str, body: dict[str, Any]) -> None:
    status, answer = client.ask("POST", path, body)
    assert status == 422
    assert "1e+200 is beyond 1e+12" in answer["message"]


def test_a_version_whose_functions_nobody_can_evaluate_here_answers_for_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions that only Spark evaluates: known inputs have rows, others are the average one and incomplete."""

    def only_spark(self: Any, attributes: Any) -> Any:
        raise OracleError("the oracle of basis function 0 cannot predict")

    monkeypatch.setattr(Evaluator, "complete", only_spark)
    with calling(tmp_path) as client:
        status, answer = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1", "nothing"]})
        assert status == 200
        assert answer["unknown_inputs"] == ["nothing"]
        assert answer["scores"][1]["std"] > answer["scores"][0]["std"] * 0.5


def test_a_disk_that_is_full_is_told_and_nothing_is_learnt(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(rows: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(client.service.observer._events, "append", fail)
    status, answer = client.ask("POST", "/v1/observe", {"user": "u6", "input": "x1", "label": 1})
    assert (status, answer["error"]) == (503, "not_written")
    assert client.ask("GET", "/v1/users/u6")[1]["n_events"] == EVENTS_BEFORE


def test_an_overlay_that_is_full_is_told(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(events: Any) -> None:
        raise lmdb.MapFullError("full")

    monkeypatch.setattr(client.service.overlay, "insert", fail)
    status, answer = client.ask("POST", "/v1/observe", {"user": "u6", "input": "x1", "label": 1})
    assert (status, answer["error"]) == (503, "not_written")


def test_a_deadline_is_kept_by_a_feature_function_that_hangs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    hang = threading.Event()
    assert client.service.view is not None
    monkeypatch.setattr(client.service.view.evaluator.lanes[0], "function", lambda encoded, needed: hang.wait(5))
    began = time.monotonic()
    body = {"user": "u1", "inputs": ["x1", {"year": 1.5}], "deadline_ms": 50}
    status, answer = client.ask("POST", "/v1/predict", body)
    hang.set()
    assert status == 200
    assert time.monotonic() - began < 1
    assert answer["incomplete_inputs"] == [1]


def test_with_a_token_only_probes_pass_without_it(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.token=open sesame") as client:
        assert client.send("GET", "/healthz")[0] == client.send("GET", "/readyz")[0] == 200
        status, headers, _ = client.send("GET", "/metrics")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        for wrong in ("Bearer nothing", "open sesame", "", "Bearer open sesame "):
            assert client.send("GET", "/v1/popular", headers={"authorization": wrong})[0] == 401
        for scheme in ("Bearer", "bearer"):
            assert client.send("GET", "/v1/popular", headers={"authorization": f"{scheme} open sesame"})[0] == 200


def test_a_token_is_asked_of_each_that_comes_at_once(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.token=open sesame") as client:
        body = b'{"user": "u1", "inputs": ["x1"]}'
        headers = [
            [b"authorization: Bearer open sesame"],
            [b"authorization: Bearer open says me"],
            [],
            [b"authorization: bearer open sesame"],
            [b"authorization: Basic open sesame"],
        ]
        found = predicted_at_once(client, [body] * len(headers), headers)
        assert [status for status, _ in found] == [200, 401, 401, 200, 401]
        assert found[0] == found[3]


def test_contexts_and_offsets_move_every_score_alike(tmp_path: Path) -> None:
    effect = (
        Effect.start("hour", pa.array(["18", "6"])).learn(np.array([50.0, 50.0]), np.array([40.0, -40.0]), 0.8).learnt()
    )
    with calling(tmp_path, effects=(effect,)) as client:

        def scores(**more: Any) -> np.ndarray:
            status, answer = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1", {"year": 1}], **more})
            assert status == 200
            return np.array([one["score"] for one in answer["scores"]])

        plain = scores()
        np.testing.assert_allclose(scores(context={"hour": 18}) - plain, effect.mean[0], atol=1e-12)
        np.testing.assert_allclose(scores(context={"hour": "6"}, offset=0.5) - plain, effect.mean[1] + 0.5, atol=1e-12)
        np.testing.assert_allclose(scores(context={"hour": "noon"}), plain, atol=1e-12)
        _, one = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1"]})
        _, why = client.ask("GET", "/v1/users/u1", query="input=x1")
        assert (why["score"], why["std"]) == (one["scores"][0]["score"], one["scores"][0]["std"])
        status, answer = client.ask("GET", "/v1/top", query="user=u1&k=3&context=hour:18")
        _, without = client.ask("GET", "/v1/top", query="user=u1&k=3")
        assert status == 200
        for one, other in zip(answer["scores"], without["scores"], strict=True):
            assert one["input"] == other["input"]
            assert one["score"] - other["score"] == pytest.approx(effect.mean[0])
            assert one["std"] < other["std"]  # no hour is any hour
        status, answer = client.ask("POST", "/v1/predict", {"user": "u1", "inputs": ["x1"], "context": {"month": 1}})
        assert (status, answer["error"]) == (422, "bad_context")
        assert "the model has: hour" in answer["message"]
        body = {
            "user": "u1",
            "input": "x1",
            "label": 4,
            "event_id": "in-context",
            "offset": 0.5,
            "context": {"hour": 18},
        }
        assert client.ask("POST", "/v1/observe", body)[0] == 200
        client.service.observer.stop()
        folder = tmp_path / "observations"
        (line,) = [json.loads(line) for path in sealed(folder) for line in path.read_text().splitlines()]
        assert (line["hour"], line["offset"]) == ("18", 0.5)
        assert "context" not in line
        (event,) = read(sealed(folder))
        assert (event.context, event.offset) == ({"hour": "18"}, 0.5)
