"""Logs of decisions from files: every form of a policy, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mtl.errors import InputError
from mtl.serving.decisions import chances_of, estimate, read_decisions

ROOT = Path(__file__).parents[2]
P = {"a": 0.5, "b": 0.3, "c": 0.2}
Q = {"a": 0.1, "b": 0.2, "c": 0.7}
MEAN = {"a": 0.2, "b": 0.4, "c": 0.6}


def decisions(n: int = 4000, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    chosen = random.choice(list(P), n, p=list(P.values()))
    return pd.DataFrame(
        {
            "decision_id": np.arange(n).astype(str),
            "input_id": chosen,
            "propensity": [P[a] for a in chosen],
            "target": [Q[a] for a in chosen],
            "reward": (random.random(n) < [MEAN[a] for a in chosen]).astype(float),
        }
    )


def written(rows: pd.DataFrame, path: Path) -> str:
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_parquet(path)
    return str(path)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    return written(pd.DataFrame({"input_id": list(Q), "probability": list(Q.values())}), tmp_path / "policy.csv")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_column_and_a_file_of_the_same_policy_agree_and_are_near_the_truth(
    kind: str, tmp_path: Path, policy: str
) -> None:
    log = written(decisions(), tmp_path / f"log.{kind}")
    by_column, by_file = estimate(log, "column:target", {}), estimate(log, policy, {})
    truth = sum(Q[a] * MEAN[a] for a in Q)
    for name in ("ips", "snips"):
        assert by_column[name] == pytest.approx(by_file[name])
        assert by_file[name]["low"] <= truth <= by_file[name]["high"]
    assert by_column["dr"] is None
    assert by_file["dr"]["low"] <= truth <= by_file["dr"]["high"]
    assert by_file["logged"]["value"] == pytest.approx(decisions()["reward"].mean())
    assert by_file["cautions"] == []


def test_uniform_is_one_over_the_inputs_of_the_log(tmp_path: Path) -> None:
    rows = decisions()
    found = estimate(written(rows, tmp_path / "log.parquet"), "uniform", {})
    assert found["actions"] == 3
    assert found["ips"]["value"] == pytest.approx((rows.reward / rows.propensity / 3).mean())


def test_a_predicted_reward_in_the_log_is_the_model(tmp_path: Path) -> None:
    rows = decisions()
    rows["predicted"], rows["expected"] = rows.input_id.map(MEAN), sum(Q[a] * MEAN[a] for a in Q)
    found = estimate(written(rows, tmp_path / "log.parquet"), "column:target", {})
    by_hand = rows.expected + rows.target / rows.propensity * (rows.reward - rows.predicted)
    assert found["dr"]["value"] == pytest.approx(by_hand.mean())


def test_chances_may_depend_on_columns_of_the_log(tmp_path: Path) -> None:
    rows = pd.DataFrame({"input_id": ["a", "b", "a"], "position": [1, 1, 2]})
    file = pd.DataFrame(
        {"input_id": ["a", "b", "b", "a"], "position": [1, 1, 2, 2], "probability": [0.1, 0.9, 0.4, 0.6]}
    )
    found = chances_of(written(file, tmp_path / "policy.parquet"), rows, {})
    np.testing.assert_allclose(found.chosen, [0.1, 0.9, 0.6])
    assert found.of_all is not None
    np.testing.assert_allclose(found.of_all[np.arange(3), found.action], found.chosen)
    np.testing.assert_allclose(found.of_all, [[0.1, 0.9], [0.1, 0.9], [0.6, 0.4]])


def test_rewards_that_came_later_are_joined_and_those_missing_left_out_or_given(tmp_path: Path) -> None:
    rows = decisions(1000)
    later = rows[["decision_id", "reward"]].iloc[::2]
    log = written(rows.drop(columns="reward"), tmp_path / "log.parquet")
    rewards = written(later, tmp_path / "rewards.jsonl")
    left_out, zero = (estimate(log, "column:target", {}, rewards, missing) for missing in (None, 0.0))
    assert (left_out["decisions"], left_out["without_reward"]) == (1000, 500)
    assert left_out["logged"]["value"] == pytest.approx(later.reward.mean())
    assert zero["logged"]["value"] == pytest.approx(later.reward.sum() / 1000)


def test_cautions_say_why_an_interval_may_be_too_narrow(tmp_path: Path) -> None:
    rows = decisions(100)
    rows["propensity"] *= 0.5
    rows["reward"] = (np.arange(100) < 20).astype(float)
    told = " ".join(estimate(written(rows, tmp_path / "log.parquet"), "column:target", {})["cautions"])
    assert "not 1: propensities or chances are wrong" in told
    assert "the log is worth" in told
    assert "only 20 decisions" in told


@pytest.mark.parametrize(
    ("change", "policy", "message"),
    [
        (lambda rows: rows.drop(columns="propensity"), "uniform", "no column propensity"),
        (lambda rows: rows, "column:none", "no column none"),
        (lambda rows: rows.assign(propensity="much"), "uniform", "row 0: propensity = 'much' is no number"),
        (lambda rows: rows.assign(propensity=0.0), "uniform", "propensity of decision 0 is 0.0"),
        (lambda rows: rows.assign(reward=None), "uniform", "no decision has a reward"),
        (lambda rows: rows.assign(propensity=[None] + [0.5] * 9), "uniform", "row 0 has no propensity"),
        (lambda rows: rows, "nowhere.csv", "there is no nowhere.csv"),
        (lambda rows: rows.assign(predicted=0.5, expected=[0.5, None] * 5), "uniform", "row 1 has no finite expected"),
        (lambda rows: rows.assign(predicted="some", expected=0.5), "uniform", "row 0: predicted = 'some' is no number"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change, policy: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        estimate(written(change(decisions(10)), tmp_path / "log.csv"), policy, {})


def test_chances_that_are_none_are_refused(tmp_path: Path) -> None:
    log = written(decisions(10), tmp_path / "log.parquet")
    for rows, message in (
        (pd.DataFrame({"input_id": ["a", "b"], "probability": [0.5, 0.4]}), "sum to 0.9"),
        (pd.DataFrame({"input_id": ["a", "a"], "probability": [0.5, 0.5]}), "input_id = a has more than one"),
        (
            pd.DataFrame({"input_id": ["a"], "decision_id": ["x"], "probability": [1.0]}),
            "no chances for decision_id = 0",
        ),
        (pd.DataFrame({"input_id": ["a"], "place": [1], "probability": [1.0]}), "the log has no column place"),
        (pd.DataFrame({"input_id": [], "probability": []}), "there is no row"),
    ):
        with pytest.raises(InputError, match=message):
            estimate(log, written(rows, tmp_path / "policy.csv"), {})


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "jobs/offpolicy.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )


def test_the_job_prints_one_line_of_json_or_one_line_of_reason(tmp_path: Path, policy: str) -> None:
    rows = decisions().rename(columns={"input_id": "item", "reward": "click"})
    log = written(rows, tmp_path / "log.parquet")
    done = run("--decisions", log, "--policy", policy, "--columns", "input_id=item,reward=click")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["decisions"] == 4000
    assert told["snips"]["low"] < 0.52 < told["snips"]["high"]
    failed = run("--decisions", log, "--policy", "uniform")
    assert failed.returncode == 1
    assert "has no column input_id" in failed.stderr.strip().splitlines()[-1]


def test_of_several_rewards_of_a_decision_the_first_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = decisions(200)
    told = rows[["decision_id", "reward"]]
    later = pd.concat([told.head(1).assign(reward=float("nan")), told, told.head(5), told.head(3).assign(reward=7.0)])
    log = written(rows.drop(columns="reward"), tmp_path / "log.jsonl")
    found = read_decisions(log, {}, written(later, tmp_path / "rewards.jsonl"))
    assert found["reward"].tolist() == rows["reward"].tolist()
    assert [record.args[-1] for record in caplog.records] == [8]


def test_ids_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    rows = pd.DataFrame({"input_id": ["2026-01-01", "2026-01-02"], "propensity": 0.5, "reward": [1.0, 0.0]})
    for kind in ("csv", "jsonl"):
        folder = tmp_path / kind
        folder.mkdir()
        written(rows.assign(event_time="2026-01-31T12:00:00Z"), folder / f"1.{kind}")
        written(rows.assign(input_id=["007", "b"], event_time="some time"), folder / f"2.{kind}")
        found = read_decisions(str(folder), {})
        assert found["input_id"].tolist() == ["2026-01-01", "2026-01-02", "007", "b"]
    chances = pd.DataFrame({"input_id": ["007", "10"], "probability": [0.9, 0.1]})
    log = written(pd.DataFrame({"input_id": ["007", "10"], "propensity": 0.5, "reward": 1.0}), tmp_path / "log.csv")
    found = estimate(log, written(chances, tmp_path / "chances.csv"), {})
    assert found["ips"]["value"] == pytest.approx(1.0)


def test_a_column_that_is_named_is_taken_before_one_of_our_name(tmp_path: Path) -> None:
    rows = decisions(20).assign(clicks=2.0)
    assert set(read_decisions(written(rows, tmp_path / "log.csv"), {"reward": "clicks"})["reward"]) == {2.0}


def test_an_input_that_was_never_rewarded_is_one_of_uniform_s(tmp_path: Path) -> None:
    rows = decisions()
    rows.loc[rows.input_id == "c", "reward"] = np.nan
    found = estimate(written(rows, tmp_path / "log.parquet"), "uniform", {})
    assert found["actions"] == 3
