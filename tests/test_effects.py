"""Offsets and the random effects of contexts, against a joint ridge solution, a GLM by statsmodels and a plain shift of labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, planted, user_ids

from mtl import alternation, gaussian
from mtl.blocks import CAPPED, HELD_OUT, TRAINED, EventBlock, build, from_arrow, to_arrow
from mtl.effects import Effect, Effects, of_one
from mtl.engine import LocalEngine
from mtl.features import Features
from mtl.gaussian import Array, Posterior
from mtl.losses import LOSSES
from mtl.train import Fit, Schedule, alternate
from mtl.working import settle

LEVELS = (3, 5)  # values of two contexts


@dataclass(frozen=True)
class InContext:
    """A problem whose events have offsets and contexts."""

    problem: Problem
    offset: Array
    codes: np.ndarray  # (events, contexts), −1 for none

    @classmethod
    def planted(cls, seed: int, size: float = 1.0, **shape: int) -> InContext:
        """Two contexts with effects of a standard deviation ``size``, and offsets known."""
        random, problem = np.random.default_rng([seed, 7]), planted(seed, **shape)
        codes = np.column_stack([random.integers(-1, n, len(problem)) for n in LEVELS])
        effects = [np.append(random.normal(scale=size, size=n), 0.0) for n in LEVELS]
        offset = random.normal(size=len(problem))
        moved = offset + sum(effect[code] for effect, code in zip(effects, codes.T, strict=True))
        return cls(replace(problem, label=problem.label + moved, expected=problem.expected + moved), offset, codes)

    def effects(self, of: tuple[int, ...] = (0, 1)) -> Effects:
        return tuple(Effect.start(f"c{j}", pa.array([f"v{i}" for i in range(LEVELS[j])])) for j in of)

    def block(self, role: np.ndarray | None = None, of: tuple[int, ...] = (0, 1)) -> EventBlock:
        p = self.problem
        users = np.arange(len(p.user_attributes))
        events = user_ids(p.user), p.input, p.label, p.weight, user_ids(users), p.user_attributes, role, self.offset
        return next(from_arrow([to_arrow(build(*events, self.codes[:, of].astype(np.int32)))]))

    def engine(self, k: int, loss: str = "squared", role: np.ndarray | None = None) -> LocalEngine:
        specification = replace(self.problem.specification(k, loss), effects=self.effects())
        return LocalEngine([self.block(role)], specification)


def train(case: InContext, k: int, schedule: Schedule, loss: str = "squared") -> tuple[LocalEngine, Fit]:
    engine, p = case.engine(k, loss), case.problem
    fit = alternate(engine, p.user_prior(k), p.input_prior(k), LOSSES[loss], len(p), p.label_variance, schedule)
    return engine, fit


def test_the_objective_never_rises_with_offsets_and_contexts() -> None:
    @settings(max_examples=60)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.sampled_from(["squared", "logistic", "poisson"]))
    def check(seed: int, k: int, loss: str) -> None:
        case = InContext.planted(seed, users=6, inputs=6, events=60)
        label = case.problem.label
        if loss != "squared":
            label = (label > np.median(label)).astype(float) * (1 if loss == "logistic" else 2)
        case = replace(case, problem=replace(case.problem, label=label))
        _, fit = train(case, k, Schedule(8), loss)
        assert np.isfinite(fit.objective).all()
        assert max(b - a for a, b in pairwise(fit.objective)) <= 1e-8 * np.abs(fit.objective).max()

    check()


def test_effects_are_the_best_linear_unbiased_prediction_of_the_joint_model() -> None:
    """Mean-field means are exact where all is Gaussian: those of one ridge system of all effects at once, solved directly."""
    case = InContext.planted(3, users=8, inputs=7, events=200)
    engine, fit = train(case, 0, Schedule(600))
    p, mu = case.problem, engine.specification.mu
    n_u, n_x = len(p.user_attributes), len(p.input_attributes)
    design = np.zeros((len(p), n_u + n_x + sum(LEVELS)))
    rows = np.arange(len(p))
    design[rows, p.user] = 1
    design[rows, n_u + p.input] = 1
    for j, first in enumerate((n_u + n_x, n_u + n_x + LEVELS[0])):
        there = case.codes[:, j] >= 0
        design[rows[there], first + case.codes[there, j]] = 1
    variance = [fit.users.covariance[0, 0]] * n_u + [fit.inputs.covariance[0, 0]] * n_x
    variance += [effect.prior for effect in engine.effects for _ in effect.values]
    mean = np.concatenate(
        [fit.users.mean(p.user_attributes)[:, 0], fit.inputs.mean(p.input_attributes)[:, 0], np.zeros(sum(LEVELS))]
    )
    precision = design.T @ (design * p.weight[:, None]) / fit.noise + np.diag(1 / np.array(variance))
    target = p.weight * (p.label - mu - case.offset)
    solved = np.linalg.solve(precision, design.T @ target / fit.noise + mean / variance)
    found = np.concatenate([effect.mean[:-1] for effect in engine.effects])
    np.testing.assert_allclose(found, solved[n_u + n_x :], atol=1e-4)
    np.testing.assert_allclose(engine.inputs.mean[:, 0], solved[n_u : n_u + n_x], atol=1e-4)


def test_planted_effects_are_found() -> None:
    case = InContext.planted(5, users=40, inputs=30, events=4000)
    engine, _ = train(case, 2, Schedule(20))
    random = np.random.default_rng([5, 7])
    _ = [random.integers(-1, n, 4000) for n in LEVELS]
    for effect, n in zip(engine.effects, LEVELS, strict=True):
        wanted = random.normal(size=n)
        # Their level is also the users' and the inputs'.
        np.testing.assert_allclose(_centred(effect.mean[:-1]), _centred(wanted), atol=0.08)


@pytest.mark.parametrize("loss", ["squared", "poisson", "logistic"])
def test_settled_users_with_offsets_are_a_glm_with_offsets(loss: str) -> None:
    random = np.random.default_rng(2)
    n, d = 400, 3
    phi = np.column_stack([np.ones(n), random.normal(size=(n, d - 1))])
    w, offset = np.array([0.3, -0.5, 0.8]), random.normal(size=n)
    h = phi @ w + offset
    label = {
        "squared": h + random.normal(size=n),
        "poisson": random.poisson(np.exp(h)).astype(float),
        "logistic": (random.uniform(size=n) < 1 / (1 + np.exp(-h))).astype(float),
    }[loss]
    family = {"squared": sm.families.Gaussian(), "poisson": sm.families.Poisson(), "logistic": sm.families.Binomial()}
    wanted = sm.GLM(label, phi, family[loss], offset=offset).fit().params
    block = build(
        user_ids(np.zeros(n, int)), np.arange(n), label, np.ones(n), user_ids([]), np.ones((0, 1)), None, offset
    )
    certain = _features(phi)
    flat = _flat_prior(d)
    a, b = settle(block.weight_matrix, block.label_matrix, certain, flat, LOSSES[loss], offsets=block.offsets(()))
    np.testing.assert_allclose(flat(a, b).mean[0], wanted, atol=0.02)


def test_an_offset_is_a_shift_of_the_labels_for_squared_loss() -> None:
    case = InContext.planted(9)
    shifted = replace(case.problem, label=case.problem.label - case.offset)
    plain = shifted.train(2, Schedule(6))
    fit = alternate(
        LocalEngine([case.block(of=())], replace(shifted.specification(2), squared_labels=_squares(case.problem))),
        shifted.user_prior(2),
        shifted.input_prior(2),
        LOSSES["squared"],
        len(shifted),
        shifted.label_variance,
        Schedule(6),
    )
    np.testing.assert_allclose(fit.objective, plain.objective, rtol=1e-9)


def test_events_held_out_keep_their_offsets_and_contexts() -> None:
    case = InContext.planted(11, events=150)
    role = np.random.default_rng(0).integers(0, 3, len(case.problem))
    whole = case.block(role).with_extra(HELD_OUT, CAPPED)
    direct = case.block()
    for block in (whole, direct):
        assert len(block.places) == 150
    rows = [_rows(block) for block in (whole, direct)]
    assert rows[0] == rows[1]
    assert _rows(case.block(role).with_extra(HELD_OUT)) == _rows(case.block(), role != CAPPED, case)
    assert len(case.block(role).extra.roles) == np.sum(role != TRAINED)


def test_a_block_all_of_whose_events_are_held_out_gets_them_back() -> None:
    case = InContext.planted(12, events=40)
    emptied = case.block(np.full(40, HELD_OUT))
    assert not len(emptied.places)
    assert _rows(emptied.with_extra(HELD_OUT)) == _rows(case.block())


def test_a_block_of_users_without_events_says_nothing_of_contexts() -> None:
    case = InContext.planted(13, events=60)
    silent = user_ids(np.arange(100, 103))
    nothing = np.zeros(0)
    events = silent[:0], nothing.astype(int), nothing, nothing, silent, np.ones((3, 3)), None, nothing
    empty = next(from_arrow([to_arrow(build(*events, np.zeros((0, 2), np.int32)))]))
    engine = case.engine(2)
    before = engine.effects
    engine.partitions.append(empty)
    for _ in before:
        engine.update_users(case.problem.user_prior(2), 0.5)
    alone = case.engine(2)
    for _ in before:
        alone.update_users(case.problem.user_prior(2), 0.5)
    for one, other in zip(engine.effects, alone.effects, strict=True):
        np.testing.assert_array_equal(one.mean, other.mean)


def test_a_value_that_training_did_not_see_is_a_draw_from_the_prior() -> None:
    effect = Effect.start("hour", pa.array(["1", "2"])).learn(np.array([10.0, 0.0]), np.array([5.0, 0.0]), 0.5).learnt()
    assert of_one(0.25, {"hour": "1"}, (effect,)) == pytest.approx((0.25 + effect.mean[0], effect.variance[0]))
    assert of_one(None, {"hour": "7"}, (effect,)) == (0.0, effect.prior)
    assert of_one(None, {}, (effect,)) == (0.0, effect.prior)
    assert effect.variance[0] < effect.variance[1]


def _features(phi: Array):

    n, d = phi.shape
    return Features.of(np.column_stack([np.zeros(n), phi[:, 1:]]), np.zeros((n, gaussian.packed_length(d))), 0.0)


def _flat_prior(d: int) -> Callable[[Array, Array], Posterior]:
    return lambda a, b: alternation.posteriors(a, b, np.zeros((len(b), d)), 1e-6 * np.eye(d), 1.0)


def _centred(values: Array) -> Array:
    return values - values.mean()


def _squares(problem: Problem) -> float:
    return float(problem.weight @ problem.label**2)


def _rows(block: EventBlock, chosen: np.ndarray | None = None, case: InContext | None = None) -> list[tuple]:
    """Every entry as the ids and numbers that it is made of, in order."""
    if case is not None:
        p = case.problem
        return sorted(
            (f"u{u}", int(x), c, c * y, o, *code)
            for u, x, c, y, o, code in zip(
                p.user[chosen],
                p.input[chosen],
                p.weight[chosen],
                p.label[chosen],
                case.offset[chosen],
                case.codes[chosen].tolist(),
                strict=True,
            )
        )
    users = np.repeat(np.array(block.users.to_pylist()), np.diff(block.starts))
    return sorted(
        (str(u), int(block.inputs[x]), c, cy, o, *code)
        for u, x, c, cy, o, code in zip(
            users, block.places, block.weights, block.labels, block.offset, block.contexts.tolist(), strict=True
        )
    )
