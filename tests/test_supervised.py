"""Supervised features: labels of inputs as functions of their other attributes, and mistakes that say what to do."""

from __future__ import annotations

from dataclasses import replace

import cloudpickle
import numpy as np
import pandas as pd
import pytest
from problems import planted
from sklearn.linear_model import LogisticRegression

from mtl.config import SupervisedSettings, load_settings
from mtl.encode import Encoder
from mtl.errors import ConfigError, OracleError
from mtl.fitting import _form, _input_encoder
from mtl.forms import Form
from mtl.oracle.linear import fit_ridge
from mtl.supervised import Supervised, choose_labels
from mtl.train import Schedule

ENCODE = load_settings().encode


def asked(*labels: str, classifier: str = "sklearn.linear_model:LogisticRegression", **params) -> SupervisedSettings:
    return SupervisedSettings(labels=list(labels), classifier=classifier, params=params, min_count=2, max_labels=3)


def movies(n: int = 60) -> pd.DataFrame:
    """Genres that follow from the year, some of them missing; every movie is a film."""
    random = np.random.default_rng(0)
    year = random.normal(size=n)
    genres = [["film", "old" if z < 0 else "new", *(["odd"] if i < 1 else [])] for i, z in enumerate(year)]
    kind = np.where(year + 0.3 * random.normal(size=n) < 0, "silent", "sound").astype(object)
    frame = pd.DataFrame({"year": year, "genres": genres, "kind": kind, "size": random.normal(size=n)})
    frame.loc[::7, "genres"] = None
    return frame


def fitted(frame: pd.DataFrame, settings: SupervisedSettings) -> Supervised:
    return Supervised.fit(frame, Encoder.fit(frame.drop(columns=settings.labels), ENCODE), settings)


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_labels_in_all_inputs_or_too_few_are_left_out_and_of_two_categories_one_says_it_all() -> None:
    frame = movies()
    labels = {label.name: label for label in choose_labels(frame, asked("genres", "kind"))}
    assert set(labels) == {"genres=old", "genres=new", f"kind={frame.kind.value_counts().index[1]}"}
    np.testing.assert_array_equal(labels["genres=old"].known, frame.genres.notna())
    np.testing.assert_array_equal(labels["genres=old"].holds, (frame.year < 0) & frame.genres.notna())


def test_the_most_frequent_labels_are_kept() -> None:
    frame = pd.DataFrame({"topic": ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 2})
    assert [label.name for label in choose_labels(frame, asked("topic"))] == ["topic=a", "topic=b", "topic=c"]


def test_a_list_without_categories_is_known_to_have_none_and_a_missing_one_is_not() -> None:
    frame = pd.DataFrame({"tags": [["a"], ["a"], [], None, np.nan]})
    (label,) = choose_labels(frame, asked("tags"))
    assert label.known.tolist() == [True, True, True, False, False]
    assert label.holds.tolist() == [True, True, False, False, False]


# --- Features ---------------------------------------------------------------------------------------------------------


def test_probabilities_are_the_classifiers_own_trained_where_the_label_is_known() -> None:
    frame = movies()
    encoder = fitted(frame, asked("genres", C=0.5))
    z = Encoder.fit(frame.drop(columns="genres"), ENCODE)(frame)
    known = frame.genres.notna().to_numpy()
    for i, name in enumerate(encoder.names):
        holds = np.array([name.removeprefix("genres=") in row for row in frame.genres[known]])
        theirs = LogisticRegression(C=0.5).fit(z[known, 1:], holds).predict_proba(z[:, 1:])[:, 1]
        np.testing.assert_allclose(encoder(frame)[:, encoder.predicted[i]], theirs - theirs.mean(), atol=1e-9)
    np.testing.assert_allclose(encoder(frame)[:, : z.shape[1]], z)


def test_a_new_input_without_a_label_gets_probabilities_from_its_other_attributes() -> None:
    frame = movies()
    encoder = fitted(frame, asked("genres"))
    new = pd.DataFrame({"year": [-2.0, 2.0], "kind": ["silent", "sound"], "size": [0.0, 0.0]})
    p = encoder(new)[:, encoder.predicted] + encoder.centre
    old = encoder.names.index("genres=old")
    assert p[0, old] > 0.9 > 0.1 > p[1, old]
    # The label itself is never looked at: f is a function of x.
    np.testing.assert_array_equal(encoder(new.assign(genres=[["new"], ["old"]])), encoder(new))


def test_an_input_of_which_nothing_is_known_is_the_average_and_no_inputs_are_no_rows() -> None:
    encoder = fitted(movies(), asked("genres"))
    np.testing.assert_array_equal(encoder(pd.DataFrame(index=[0])), np.eye(1, encoder.width))
    np.testing.assert_array_equal(encoder(movies().assign(year=None, kind=None, size=None)[:1])[0, 1:], 0)
    assert encoder(movies().iloc[:0]).shape == (0, encoder.width)


def test_a_stored_encoder_gives_the_same_features() -> None:
    frame = movies()
    encoder = fitted(frame, asked("genres", classifier="sklearn.ensemble:RandomForestClassifier", random_state=0))
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(encoder))(frame), encoder(frame))


# --- Forms ------------------------------------------------------------------------------------------------------------


def form_of(*assignments: str) -> tuple[Form, Supervised]:
    settings = load_settings(assignments=['supervised.labels=["genres"]', *assignments])
    encoder = _input_encoder(settings, movies(), None)
    assert isinstance(encoder, Supervised)
    users = Encoder.fit(pd.DataFrame({"age": [1.0, 2.0, 3.0]}), ENCODE)
    return _form(settings, 50, 60, encoder, users), encoder


def test_labels_are_basis_functions_alone_beside_learnt_ones_or_beside_given_attributes() -> None:
    form, encoder = form_of()
    assert form == Form(0, encoder.predicted)
    assert "genres" not in [column.name for column in encoder.encoder.columns]
    assert form_of("model.k=3")[0] == Form(3, encoder.predicted)
    year = encoder.linear("", ["year"])
    assert form_of('model.per_user=["year"]')[0] == Form(0, year + encoder.predicted)
    form, encoder = form_of("model.form=multilevel")
    assert form == Form(0, encoder.linear("", ["*"]) + encoder.predicted)


def test_supervised_functions_are_worth_their_users_weights_and_learnt_ones_beside_them_are_more() -> None:
    """Planted: users like the two labels differently, and one thing that no label tells."""
    random = np.random.default_rng(1)
    frame = movies(80)
    encoder = fitted(frame, asked("genres"))
    z = encoder(frame)
    n, users = 4000, 100
    user, place = random.integers(users, size=n), random.integers(80, size=n)
    liking, hidden = random.normal(size=users), random.normal(size=(users, 80))
    hidden = random.normal(size=(users, 1)) * random.normal(size=80)
    label = 3 + 2 * liking[user] * (frame.year.to_numpy() < 0)[place] + 0.5 * hidden[user, place]
    label += 0.2 * random.normal(size=n)
    base = planted(0, users=users, inputs=80, attributes=0)
    problem = replace(base, user=user, input=place, label=label, weight=np.ones(n), input_attributes=z, expected=label)
    noise = {
        name: problem.train(form, Schedule(12), fit_ridge).noise
        for name, form in {
            "biases": Form(0),
            "supervised": Form(0, encoder.predicted),
            "both": Form(1, encoder.predicted),
        }.items()
    }
    assert noise["supervised"] < 0.6 * noise["biases"]
    assert noise["both"] < 0.6 * noise["supervised"]


# --- Mistakes ---------------------------------------------------------------------------------------------------------


class Failing(LogisticRegression):
    def fit(self, X, y):
        raise ValueError("I will not")


class Blind(LogisticRegression):
    def predict_proba(self, X):
        return np.full((len(X), 2), np.nan)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (asked("topic"), r"supervised.labels: there is no attribute 'topic'; there are year, genres, kind, size"),
        (
            asked("genres", classifier="sklearn.svm:LinearSVC"),
            "'sklearn.svm:LinearSVC' is no classifier with fit and pred",
        ),
        (
            asked("genres", classifier="sklearn.nothing:X"),
            "supervised.classifier = 'sklearn.nothing:X': No module named",
        ),
        (asked("genres", depth=3), "supervised.params do not fit sklearn.linear_model:LogisticRegression: .*depth"),
        (
            asked("size"),
            r"supervised.labels = \['size'\]: no label occurs in 2 inputs or more \(supervised.min_count\)",
        ),
    ],
)
def test_settings_that_cannot_be_are_told(settings: SupervisedSettings, reason: str) -> None:
    frame = movies()
    with pytest.raises(ConfigError, match=reason):
        Supervised.fit(frame, Encoder.fit(frame[["year"]], ENCODE), settings)


def test_labels_need_other_attributes_that_something_may_see() -> None:
    frame = movies()[["genres"]]
    with pytest.raises(ConfigError, match="there are no other attributes of inputs to predict them from"):
        fitted(frame, asked("genres"))
    with pytest.raises(ConfigError, match=r"oracle\.kind identity sees no attributes"):
        form_of("oracle.kind=identity")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Failing", r"the classifier of genres=\w+ cannot be trained \(ValueError: I will not\)"),
        ("Blind", r"the classifier of genres=\w+ gave values that are no probabilities"),
    ],
)
def test_a_classifier_that_fails_is_named_with_its_label(name: str, reason: str) -> None:
    with pytest.raises(OracleError, match=reason):
        fitted(movies(), asked("genres", classifier=f"test_supervised:{name}"))
