"""Exploration over HTTP: what is drawn, with what chance, on disk; and the server's own log judged by jobs/offpolicy.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import Client, calling
from made_up import fill
from running import ROOT, Server, insist

from mtl.serving.decisions import estimate, read_decisions
from mtl.serving.store import Store

INPUTS = ["x1", "x2", "x3", "x4"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with calling(tmp_path_factory.mktemp("store"), "serve.explore_epsilon=0.2") as client:
        yield client


def choose(client: Client, user: str = "u1", **more: Any) -> dict[str, Any]:
    status, answer = client.ask("POST", "/v1/choose", {"user": user, "inputs": INPUTS, **more})
    assert status == 200, answer
    return answer


def predicted(client: Client, user: str = "u1") -> list[dict[str, Any]]:
    return client.ask("POST", "/v1/predict", {"user": user, "inputs": INPUTS})[1]["scores"]


def lines(client: Client) -> list[dict[str, Any]]:
    hidden = next((client.service.store.folder / "decisions").glob(".open-*"))
    return [json.loads(line) for line in hidden.read_bytes().splitlines()]


@pytest.mark.parametrize("policy", ["greedy", "linucb", "thompson"])
def test_a_decision_is_on_disk_with_its_chance_when_it_is_told(client: Client, policy: str) -> None:
    answer = choose(client, explore=policy)
    row = lines(client)[-1]
    assert answer["input"] == INPUTS[answer["place"]]
    assert (row["decision_id"], row["input_id"], row["propensity"], row["policy"]) == (
        answer["decision_id"],
        answer["input"],
        answer["propensity"],
        policy,
    )
    assert (row["user_id"], row["candidates"], row["uniform"], row["model_version"]) == ("u1", 4, 0.25, 1)
    scores = [one["score"] for one in predicted(client)]
    assert row["greedy"] == float(answer["place"] == int(np.argmax(scores)))
    assert answer["score"] == pytest.approx(scores[answer["place"]])


def test_greedy_takes_the_best_with_the_chance_that_it_says(client: Client) -> None:
    best = int(np.argmax([one["score"] for one in predicted(client)]))
    answers = [choose(client, explore="greedy") for _ in range(300)]
    for one in answers:
        assert one["propensity"] == pytest.approx(0.85 if one["place"] == best else 0.05)
    share = Counter(one["place"] for one in answers)[best] / len(answers)
    assert abs(share - 0.85) < 5 * np.sqrt(0.85 * 0.15 / 300)


def test_propensities_of_thompson_are_how_often_it_draws(client: Client) -> None:
    """Σ over decisions of 1{i}/p_i is n on average, for each input: what makes off-policy estimates right."""
    answers = [choose(client, user="u7") for _ in range(300)]
    assert {one["explore"] for one in answers} == {"thompson"}
    for place in range(4):
        weights = np.array([(one["place"] == place) / one["propensity"] for one in answers])
        assert abs(weights.mean() - 1) < 5 * weights.std() / np.sqrt(300)


def test_inputs_by_attributes_unknown_inputs_and_unknown_users(client: Client) -> None:
    given = [{"year": 0.5}, "nothing", "x1"]
    status, answer = client.ask("POST", "/v1/choose", {"user": "nobody", "inputs": given})
    assert status == 200
    assert answer["input"] == given[answer["place"]]
    assert answer["user_known"] is False
    assert answer["unknown_inputs"] == ["nothing"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"user": "u1", "inputs": []}, 422, "nothing to choose from"),
        ({"user": "u1", "inputs": ["x1"], "explore": "dice"}, 422, "dice"),
        ({"user": " ", "inputs": ["x1"]}, 422, "user is empty"),
        ({"user": "u1", "inputs": ["x1"] * 1001}, 413, "serve.max_inputs"),
    ],
)
def test_a_bad_request_says_what_is_wrong(client: Client, body: dict[str, Any], status: int, says: str) -> None:
    found, answer = client.ask("POST", "/v1/choose", body)
    assert found == status
    assert says in answer["message"]


def test_a_disk_that_is_full_is_told(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(rows: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(client.service.observer._choices, "append", fail)
    assert client.ask("POST", "/v1/choose", {"user": "u1", "inputs": INPUTS})[0] == 503


def test_the_servers_own_log_tells_what_other_policies_would_have_earned(tmp_path: Path) -> None:
    """Rewards of known chances: the estimates hold the truth within their intervals, and the job agrees."""
    chances, random = {"x1": 0.2, "x2": 0.8, "x3": 0.5, "x4": 0.4}, np.random.default_rng(0)
    with calling(tmp_path, "serve.explore_epsilon=0.4") as client:
        best = INPUTS[int(np.argmax([one["score"] for one in predicted(client)]))]
        for i in range(500):
            answer = choose(client, explore="greedy")
            reward = float(random.random() < chances[answer["input"]])
            told = {"decision_id": answer["decision_id"], "reward": reward}
            for _ in range(1 + (i % 50 == 0)):  # a client that heard no answer tells it again
                assert client.ask("POST", "/v1/feedback", told)[0] == 200
            if i == 250:  # two segments of each
                client.service.observer._choices.seal()
                client.service.observer._rewards.seal()
        choose(client)  # one without a reward
    decisions, rewards = str(tmp_path / "decisions"), str(tmp_path / "feedback")
    for policy, truth in (("uniform", np.mean(list(chances.values()))), ("greedy", chances[best])):
        found = estimate(decisions, f"column:{policy}", {}, rewards, confidence=0.999)
        assert (found["decisions"], found["without_reward"]) == (501, 1)
        for way in ("ips", "snips"):
            assert found[way]["low"] <= truth <= found[way]["high"]
    words = ["--decisions", decisions, "--rewards", rewards, "--policy", "column:greedy", "--confidence", "0.999"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "offpolicy.py"), *words],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert json.loads(done.stdout.splitlines()[-1])["ips"] == found["ips"]


def test_decisions_of_workers_that_were_killed_are_in_the_log(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    fill(store, 20, 30, 3)
    store.close()
    told = dict[str, float]()
    with Server(tmp_path / "nowhere", f"serve.store={tmp_path}", "serve.objective_ms=1000") as server:
        for i in range(60):
            if i in (20, 40):
                for pid in server.children():
                    os.kill(pid, signal.SIGKILL)
            answer = insist(server.port, "POST", "/v1/choose", {"user": "u1", "inputs": ["x1", "x2", {"year": 0.5}]})
            told[answer["decision_id"]] = answer["propensity"]
            reward = {"decision_id": answer["decision_id"], "reward": float(i % 2)}
            assert insist(server.port, "POST", "/v1/feedback", reward)["decision_id"] in told
        metrics = server.ask("GET", "/metrics")[1]
    assert "mtl_load_rung{pid=" in metrics
    assert "mtl_feature_cache_hits_total" in metrics
    rows = read_decisions(str(tmp_path / "decisions"), {}, str(tmp_path / "feedback")).set_index("decision_id")
    assert {name: rows.propensity[name] for name in told} == told  # others may be there that no answer told of
    assert rows.reward[list(told)].notna().all()
