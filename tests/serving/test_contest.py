"""Model versions that compete in one server: who answers, what is learnt of them, and that it is in the logs."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from calling import USERS, Client, calling
from made_up import fill
from running import Server, insist

from mtl import schema
from mtl.config import load_settings
from mtl.effects import Effect
from mtl.errors import ConfigError, StateError
from mtl.serving import contest
from mtl.serving.contest import Record, make_record
from mtl.serving.observations import Decided, Rewarded
from mtl.serving.server import Folders, _prepare_contest
from mtl.serving.store import Store

INPUTS = ["x1", "x2", "x3"]
CANDIDATE = {1: schema.LIVE, 2: schema.CANDIDATE}


def choose(client: Client, user: str = "u1") -> dict:
    status, answer = client.ask("POST", "/v1/choose", {"user": user, "inputs": INPUTS})
    assert status == 200, answer
    return answer


def tell(client: Client, decision: dict, reward: float) -> None:
    body = {"decision_id": decision["decision_id"], "reward": reward}
    assert client.ask("POST", "/v1/feedback", body)[0] == 200


def rows_of(folder: Path) -> Iterator[dict]:
    for path in folder.glob("*.jsonl"):
        yield from map(json.loads, path.read_bytes().splitlines())


@pytest.mark.parametrize("policy", ["thompson", "exp3"])
def test_the_better_version_is_found_by_its_rewards(tmp_path: Path, policy: str) -> None:
    chances, random = {1: 0.2, 2: 0.9, 3: 0.3}, np.random.default_rng(0)
    earned: dict[int, list[float]] = {version: [] for version in chances}
    with calling(tmp_path, "serve.rivals=[2, 3]", f"serve.contest={policy}") as client:
        answers = []
        for i in range(900):
            answers.append(choose(client, f"u{i % USERS}"))
            version = answers[-1]["model_version"]
            reward = float(random.random() < chances[version])
            earned[version].append(reward)
            tell(client, answers[-1], reward)
            if i % 100 == 0:  # a client that heard no answer tells it again
                tell(client, answers[-1], reward)
        competitors = client.ask("GET", "/v1/models")[1]["competitors"]
    last = Counter(answer["model_version"] for answer in answers[-200:])
    assert last[2] > (160 if policy == "thompson" else 100)
    assert {one["model_version"]: one["n_rewards"] for one in competitors} == {v: len(r) for v, r in earned.items()}
    for one in competitors:
        assert one["mean_reward"] == pytest.approx(np.mean(earned[one["model_version"]]))
    logged = {row["decision_id"]: row for row in rows_of(tmp_path / "decisions")}
    for answer in answers:
        row = logged[answer["decision_id"]]
        assert row["model_version"] == answer["model_version"]
        assert row["version_propensity"] == answer.get("version_propensity", 1.0)


def test_in_a_split_a_user_has_one_version_in_every_answer(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.rivals=[2]", "serve.contest=split", "serve.contest_shares=[1, 3]") as client:
        found, body = Counter[int](), {"inputs": INPUTS}
        for i in range(USERS):
            user = f"u{i}"
            predicted = client.ask("POST", "/v1/predict", {"user": user, **body})[1]
            by_attributes = client.ask("POST", "/v1/predict", {"user": user, "inputs": [{"year": 0.1}]})[1]
            top = client.ask("POST", "/v1/top", {"user": user, "k": 3})[1]
            chosen = choose(client, user)
            version = predicted["model_version"]
            assert {by_attributes["model_version"], top["model_version"], chosen["model_version"]} == {version}
            assert chosen["version_propensity"] == (0.25 if version == 1 else 0.75)
            found[version] += 1
            view = client.service.view if version == 1 else client.service.contest.rivals[0].view
            scores, _ = view.score(view.weights_of(user), view.gather(INPUTS))
            np.testing.assert_array_equal([one["score"] for one in predicted["scores"]], scores)
        assert 0 < found[1] < found[2]


def test_a_version_that_cannot_answer_yet_is_not_drawn(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.rivals=[2]", "serve.contest=split", "serve.contest_shares=[1, 99]") as client:
        rival = client.service.contest.rivals[0]
        shown, rival.view = rival.view, None
        answers = [choose(client, f"u{i}") for i in range(10)]
        assert {(a["model_version"], a.get("version_propensity", 1.0)) for a in answers} == {(1, 1.0)}
        rival.view = shown
        assert 2 in {choose(client, f"u{i}")["model_version"] for i in range(10)}


def test_an_observation_counts_once_in_every_version(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.rivals=[2]") as client:
        views = [client.service.view, client.service.contest.rivals[0].view]
        before = [view.weights_of("u1").n_events for view in views]
        event = {"user": "u1", "input": "x1", "label": 4.0, "event_id": "once"}
        for duplicate in (False, True):
            assert client.ask("POST", "/v1/observe", event)[1]["duplicate"] is duplicate
        assert [view.weights_of("u1").n_events for view in views] == [n + 1 for n in before]


@pytest.mark.parametrize(
    "models",
    [
        {1: schema.LIVE, 2: schema.REFUSED},
        {1: schema.LIVE, 2: schema.RETIRED},
        {1: schema.RETIRED, 2: schema.CANDIDATE, 3: schema.LIVE},  # older than the live one: no stream follows it
        {1: schema.LIVE},
    ],
)
def test_a_rival_that_is_over_neither_answers_nor_learns(tmp_path: Path, models: dict[int, str]) -> None:
    with calling(tmp_path, "serve.rivals=[2]", "serve.contest=split", "serve.contest_shares=[1, 99]") as client:
        (rival,) = client.service.contest.rivals
        event = {"user": "u1", "input": "x1", "label": 4.0}
        for of, answering, pending in (
            (CANDIDATE, 2, 1),
            (models, 1, 1),
            (CANDIDATE, 2, 2),
            ({1: schema.RETIRED, 2: schema.LIVE}, 2, 3),
        ):
            rival.store.write_model_list([{schema.MODEL_VERSION: v, schema.STATUS: s} for v, s in of.items()])
            client.service.look()
            versions = {choose(client, f"u{i}")["model_version"] for i in range(10)}
            assert max(versions) == answering
            assert client.ask("POST", "/v1/observe", event)[0] == 200
            assert rival.overlay.n_pending() == pending


def test_a_rival_that_cannot_be_told_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(events: Any) -> None:
        raise lmdb.MapFullError("full")

    with calling(tmp_path, "serve.rivals=[2, 3]") as client:
        full, other = client.service.contest.rivals
        monkeypatch.setattr(full.overlay, "insert", fail)
        for n in (1, 2):
            assert client.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 4.0})[0] == 200
            assert [one.n_pending() for one in (client.service.overlay, full.overlay, other.overlay)] == [n, 0, n]


def test_observations_that_wait_in_any_version_are_counted(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.rivals=[2]") as client:
        client.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 4.0})
        client.service.overlay.delete(client.service.overlay.every())
        assert b"mtl_unconfirmed_observations 1.0" in client.send("GET", "/metrics")[2]


def test_a_reward_that_is_none_is_refused(tmp_path: Path) -> None:
    with calling(tmp_path, "serve.rivals=[2]") as client:
        body = {"decision_id": choose(client)["decision_id"], "reward": 1.5}
        status, answer = client.ask("POST", "/v1/feedback", body)
        assert (status, answer["error"]) == (422, "bad_reward")


def test_the_record_is_what_the_logs_say(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    with calling(tmp_path, "serve.rivals=[2]") as client:
        for i in range(60):
            decision = choose(client)
            for _ in range(i % 3):  # none, one, and one that is told twice
                tell(client, decision, round(float(random.random()), 3))
            if i == 30:
                client.service.observer._choices.seal()
        kept = client.service.contest.record.rewards([1, 2])
    assert kept.n.sum() == 40
    with open(next((tmp_path / "feedback").glob("*.jsonl")), "ab") as file:
        file.write(b'{"decision_id": "torn')
    make_record(tmp_path / "anew", tmp_path / "decisions", tmp_path / "feedback")
    anew = Record(tmp_path / "anew").rewards([1, 2])
    for one, other in zip(vars(anew).values(), vars(kept).values(), strict=True):
        np.testing.assert_allclose(one, other)
    with open(next((tmp_path / "feedback").glob("*.jsonl")), "ab") as file:
        file.write(b"\n")
    with pytest.raises(StateError, match="line 61 is damaged"):
        make_record(tmp_path / "anew", tmp_path / "decisions", tmp_path / "feedback")


def test_the_record_reads_of_a_line_what_it_needs(tmp_path: Path) -> None:
    """JSON has no number for what an answer may have been."""
    versions = {"model_version": 2, "version_propensity": 0.5, "versions": [1, 2]}
    for name, line in (
        ("decisions", {"decision_id": "d", "predicted_label": None, **versions}),
        ("feedback", {"decision_id": "d", "reward": 1.0, "event_time": None}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "observed-1.jsonl").write_text(json.dumps(line) + "\n")
    make_record(tmp_path / "record", tmp_path / "decisions", tmp_path / "feedback")
    assert Record(tmp_path / "record").rewards([2]).total == [1.0]


def test_what_versions_earned_against_others_is_not_held_against_a_newcomer(tmp_path: Path) -> None:
    record = Record(tmp_path)
    for i, version in enumerate([1, 2] * 50):
        record.add([Decided(f"d{i}", version, 0.5, [1, 2]), Rewarded(f"d{i}", 1.0)])
    before = record.rewards([2, 1])
    assert before.weighted.tolist() == [100.0, 100.0]
    against = record.rewards([1, 3])
    assert (against.n.tolist(), against.total.tolist()) == ([50.0, 0.0], [50.0, 0.0])
    assert against.weighted.tolist() == [0.0, 0.0]
    record.add([Decided("new", 3, 0.25, [1, 3]), Rewarded("new", 1.0)])
    assert record.rewards([3, 1]).weighted.tolist() == [4.0, 0.0]
    assert record.rewards([1, 2]).weighted.tolist() == [100.0, 100.0]


def test_a_context_of_one_version_is_no_mistake_to_another(tmp_path: Path) -> None:
    hour = (Effect("hour", pa.array(["9"]), np.array([1.0, 0.0]), np.array([0.01, 0.1]), 0.1),)
    with calling(tmp_path, "serve.rivals=[2]", "serve.contest=split", of_rivals=hour) as client:
        for i in range(USERS):
            body = {"user": f"u{i}", "inputs": INPUTS, "context": {"hour": "9"}}
            assert client.ask("POST", "/v1/predict", body)[0] == 200
            assert client.ask("POST", "/v1/choose", body)[0] == 200
        event = {"user": "u1", "input": "x1", "label": 4.0, "context": {"hour": "9"}}
        assert client.ask("POST", "/v1/observe", event)[0] == 200
        assert client.ask("POST", "/v1/observe", {**event, "context": {"minute": "9"}})[0] == 422


def test_decisions_that_nobody_rewards_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "REMEMBERED", 10)
    with calling(tmp_path, "serve.rivals=[2]") as client:
        decisions = [choose(client) for _ in range(45)]
        for decision in decisions[-1:-11:-1]:
            tell(client, decision, 1.0)
        rewards = client.service.contest.record.rewards
        assert rewards([1, 2]).n.sum() == 10
        tell(client, decisions[0], 1.0)  # is in the log alone
        assert rewards([1, 2]).n.sum() == 10
    make_record(tmp_path / "anew", tmp_path / "decisions", tmp_path / "feedback")
    assert Record(tmp_path / "anew").rewards([1, 2]).n.sum() == 11


def test_a_version_competes_once() -> None:
    with pytest.raises(ConfigError, match=r"serve\.rivals = \[2, 2\].*each version can compete once"):
        load_settings([], ["serve.rivals=[2, 2]"])


def test_of_versions_that_compete_no_more_nothing_is_kept(tmp_path: Path) -> None:
    settings = load_settings([], [f"tables.root={tmp_path}", f"serve.store={tmp_path}", "serve.store_gb=1"])
    folders = Folders.of(settings)
    for rivals in ([2, 3], [3], []):
        _prepare_contest(settings.serve.model_copy(update={"rivals": rivals}), folders)
        assert sorted(folder.name for folder in folders.rivals.iterdir()) == list(map(str, rivals))


def test_shares_are_of_all_versions() -> None:
    with pytest.raises(ConfigError, match="contest_shares: 3 are wanted"):
        load_settings([], ["serve.rivals=[2, 3]", "serve.contest_shares=[1, 1]"])


def test_a_rival_is_told_what_was_observed_without_it(tmp_path: Path) -> None:
    def make(folder: Path, version: int) -> None:
        store = Store(folder, 1)
        fill(store, 20, 30, 3, version=version)
        store.close()

    make(tmp_path, 1)
    own, rivals = (
        f"serve.store={tmp_path}",
        ["serve.rivals=[2]", "serve.contest=split", "serve.contest_shares=[1, 1e9]"],
    )
    body, scores = {"user": "u1", "inputs": ["x1"]}, []
    for settings in (rivals, [], rivals):
        if settings:  # without it a server keeps nothing of it
            make(tmp_path / "rivals" / "2", 2)
        with Server(tmp_path / "nowhere", own, *settings, workers=1) as server:
            answer = server.ask("POST", "/v1/predict", body)[1]
            assert answer["model_version"] == (2 if settings else 1)
            if settings:
                scores.append(answer["scores"][0]["score"])
            else:
                server.ask("POST", "/v1/observe", {"user": "u1", "input": "x1", "label": 50.0})
    assert scores[1] > scores[0] + 1


def test_killed_workers_forget_no_reward(tmp_path: Path) -> None:
    for folder, version in ((tmp_path, 1), (tmp_path / "rivals" / "2", 2)):
        store = Store(folder, 1)
        fill(store, 20, 30, 3, version=version)
        store.close()
    settings, told = [f"serve.store={tmp_path}", "serve.rivals=[2]"], dict[str, tuple[int, float]]()
    with Server(tmp_path / "nowhere", *settings) as server:
        for i in range(60):
            if i in (20, 40):
                for pid in server.children():
                    os.kill(pid, signal.SIGKILL)
            answer = insist(server.port, "POST", "/v1/choose", {"user": f"u{i % 20}", "inputs": INPUTS})
            reward = {"decision_id": answer["decision_id"], "reward": float(i % 2)}
            insist(server.port, "POST", "/v1/feedback", reward)
            told[answer["decision_id"]] = answer["model_version"], reward["reward"]
    with Server(tmp_path / "nowhere", *settings) as server:  # which makes its record anew
        found = {one["model_version"]: one for one in server.ask("GET", "/v1/models")[1]["competitors"]}
    assert {1, 2} == found.keys() == {version for version, _ in told.values()}
    for version, one in found.items():
        rewards = [reward for of, reward in told.values() if of == version]
        assert one["n_rewards"] == len(rewards)
        assert one["mean_reward"] == pytest.approx(np.mean(rewards))
