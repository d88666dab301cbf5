"""Implicit feedback: zeros of all pairs by sums alone, equal to zeros as events, and worth having for a ranking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from problems import Problem, planted
from sklearn.metrics import roc_auc_score

from mtl import alternation
from mtl.catalogue import Catalogue, Totals
from mtl.engine import LocalEngine
from mtl.forms import Form
from mtl.losses import LOSSES
from mtl.oracle.linear import fit_ridge
from mtl.regressors import Oracle
from mtl.train import Fit, Schedule, alternate
from mtl.zeros import WithZeros

WEIGHT = 0.07


def choices(seed: int, **shape) -> Problem:
    """Events of label 1, some pairs of them more than once; inputs and users without any among the others."""
    problem = planted(seed, **shape)
    some = (problem.user > 0) & (problem.input > 1)
    return replace(problem, label=np.ones(len(problem))).take(some)


def with_zeros(problem: Problem, weight: float) -> Problem:
    """The same with an explicit event of label 0 for every pair of a user and an input."""
    user, place = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(len(problem.user_attributes)), np.arange(len(problem.input_attributes)), indexing="ij"
        )
    )
    zero = np.zeros(len(user))
    return replace(
        problem,
        user=np.append(problem.user, user),
        input=np.append(problem.input, place),
        label=np.append(problem.label, zero),
        weight=np.append(problem.weight, zero + weight),
        expected=np.append(problem.expected, zero),
    )


def engine_of(problem: Problem, form: int | Form, weight: float, partitions: int = 1) -> LocalEngine:
    """That never sees a zero."""
    specification = with_zeros(problem, weight).specification(form)
    engine = problem.engine(form, partitions=partitions)
    return LocalEngine(engine.partitions, replace(specification, zero_weight=weight))


def train(problem: Problem, form: int | Form, schedule: Schedule, engine: LocalEngine, oracle: Oracle | None) -> Fit:
    dense = with_zeros(problem, WEIGHT)
    n, variance = len(dense), dense.label_variance
    return alternate(
        engine, problem.user_prior(form), problem.input_prior(form, oracle), LOSSES["squared"], n, variance, schedule
    )


@pytest.mark.parametrize("oracle", [None, fit_ridge], ids=["closed form", "oracle"])
@pytest.mark.parametrize("form", [Form(2), Form(0, (1,)), Form(1, (2,), (1,))], ids=["basis", "multilevel", "all"])
def test_sums_over_all_pairs_equal_zeros_as_explicit_events(form: Form, oracle: Oracle | None) -> None:
    problem = choices(0, events=90)
    explicit, engine = with_zeros(problem, WEIGHT).engine(form), engine_of(problem, form, WEIGHT, partitions=3)
    wanted, found = (train(problem, form, Schedule(8), chosen, oracle) for chosen in (explicit, engine))
    np.testing.assert_allclose(found.objective, wanted.objective, rtol=1e-10)
    assert found.noise == pytest.approx(wanted.noise, rel=1e-8)
    np.testing.assert_allclose(engine.inputs.mean, explicit.inputs.mean, atol=1e-9)
    np.testing.assert_allclose(engine.inputs.covariance, explicit.inputs.covariance, atol=1e-9)
    # The users, from sums over their events alone: those without any have the zeros too.
    dense, block = with_zeros(problem, WEIGHT).block(), problem.block()
    posteriors = []
    for of, prior in ((dense, wanted.users), (block, WithZeros.of(found.users, engine.features, WEIGHT))):
        sums = alternation.user_sums(of.weight_matrix, of.label_matrix, engine.features.take(of.inputs))
        order = np.argsort(of.users.to_numpy(zero_copy_only=False))
        users = prior.posteriors(*sums, of.attributes, found.noise)
        posteriors.append([users.mean[order], users.covariance[order]])
    for theirs, ours in zip(*posteriors, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_the_objective_never_rises() -> None:
    for seed in range(10):
        problem = choices(seed)
        fit = train(problem, 2, Schedule(10), engine_of(problem, 2, WEIGHT), None)
        assert np.diff(fit.objective).max() <= 1e-9 * np.abs(fit.objective).max()


def test_a_zero_weight_of_0_is_explicit_feedback() -> None:
    problem = planted(1)
    plain, none = (problem.train(2, Schedule(4), engine=engine) for engine in (problem.engine(2), _unweighted(problem)))
    assert none.objective == plain.objective


def _unweighted(problem: Problem) -> LocalEngine:
    return LocalEngine(problem.engine(2).partitions, replace(problem.specification(2), zero_weight=0.0))


def test_totals_with_zeros_are_those_of_zeros_as_events() -> None:
    problem = planted(3)

    def totals(of: Problem) -> Catalogue:
        n, squares = len(of), float(of.weight @ of.label**2)
        variance = float(of.weight @ (of.label - of.mean_label) ** 2) / n
        ids = pa.array([str(i) for i in range(len(of.input_attributes))])
        weight, totals = float(of.weight.sum()), Totals(n, squares)
        low, high = float(of.label.min()), float(of.label.max())
        return Catalogue(
            ids, np.empty(0), n, n, weight, of.mean_label, 0.0, False, variance, n, totals, totals, low, high
        )

    found = totals(problem).with_zeros(len(problem.user_attributes), WEIGHT)
    wanted = totals(with_zeros(problem, WEIGHT))
    for name in ("mean_label", "label_variance", "label_min", "label_max"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name)), name
    assert (found.trained, found.kept) == (wanted.trained, wanted.kept)
    assert found.n_events == len(problem)


def test_inputs_that_users_would_choose_rank_above_popular_ones() -> None:
    """Choices of what a planted taste ranks high, a fifth of them held out; popularity is planted too."""
    random = np.random.default_rng(2)
    users, inputs = 120, 80
    taste = 1.5 * random.normal(size=(users, 3)) @ random.normal(size=(3, inputs)) + random.normal(size=inputs)
    chosen = random.uniform(size=taste.shape) < 1 / (1 + np.exp(3 - taste))
    held_out = chosen & (random.uniform(size=taste.shape) < 0.2)
    user, place = np.nonzero(chosen & ~held_out)
    ones = np.ones(len(user))
    problem = replace(
        planted(0, users=users, inputs=inputs, attributes=0),
        user=user,
        input=place,
        label=ones,
        weight=ones,
        expected=ones,
    )
    engine = engine_of(problem, 3, 0.3)
    fit = train(problem, 3, Schedule(10), engine, None)
    block, features = problem.block(), engine.features
    sums = alternation.user_sums(block.weight_matrix, block.label_matrix, features.take(block.inputs))
    posteriors = WithZeros.of(fit.users, features, 0.3).posteriors(*sums, block.attributes, fit.noise)
    w = posteriors.mean[np.argsort([int(name[1:]) for name in block.users.to_pylist()])]
    score = features.offset + w @ features.phi.T
    popularity = np.tile(np.bincount(place, minlength=inputs), (users, 1))
    unseen = ~chosen | held_out

    def auc(values: np.ndarray) -> float:
        rows = [u for u in range(users) if held_out[u].any()]
        return float(np.mean([roc_auc_score(held_out[u][unseen[u]], values[u][unseen[u]]) for u in rows]))

    assert auc(score) > auc(popularity) + 0.1
    assert auc(score) > 0.75
