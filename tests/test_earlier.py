"""Informative priors: evidence of earlier events with later ones is all events at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import certain, definite, gaussians, planted

from mtl import alternation, gaussian
from mtl.blocks import CAPPED, EARLIER, TRAINED, from_arrow, to_arrow
from mtl.earlier import Evidence
from mtl.engine import LocalEngine
from mtl.features import Features
from mtl.forms import Given, partly_given
from mtl.prior import Prior
from mtl.train import Schedule


@pytest.mark.parametrize("form", [Given(3), Given(4, (1, 3), (0, 1))])
def test_evidence_and_later_sums_are_all_sums_under_whatever_prior_is_learnt_next(form: Given) -> None:
    random, n, d, noise = np.random.default_rng(0), 30, form.d, 0.7
    attributes = random.normal(size=(n, 2))
    first, second = ((gaussian.pack(definite(seed, n, d)), random.normal(size=(n, d))) for seed in (1, 2))
    before, after = (
        partly_given(
            Prior(np.eye(2), definite(seed, 1, len(form.learnt))[0], random.normal(size=(2, len(form.learnt)))), form
        )
        for seed in (3, 4)
    )
    known = before.posteriors(*first, attributes, noise)
    evidence = Evidence.of(known, before.mean(attributes), before.covariance, form)
    found = after.posteriors(*evidence.beside(*second, noise), attributes, noise)
    wanted = after.posteriors(*(one + other for one, other in zip(first, second, strict=True)), attributes, noise)
    for values, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-9)


def test_the_energy_is_its_expectation() -> None:
    vectors = gaussians(1, 5, 3)
    evidence = Evidence(gaussian.pack(definite(2, 5, 3)), np.random.default_rng(3).normal(size=(5, 3)))
    wanted = 0.0
    for P, h, m, V in zip(
        gaussian.unpack(evidence.precision, 3),
        evidence.information,
        vectors.mean,
        gaussian.unpack(vectors.covariance, 3),
        strict=True,
    ):
        wanted += (np.trace(P @ V) + m @ P @ m) / 2 - h @ m
    assert evidence.energy(vectors) == pytest.approx(wanted)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.sampled_from(["squared", "logistic"]))
def test_the_objective_never_rises_with_what_earlier_events_said(seed: int, k: int, loss: str) -> None:
    problem = planted(seed, users=6, inputs=5, events=40)
    if loss == "logistic":
        problem = replace(problem, label=(problem.label > np.median(problem.label)).astype(float))
    random, d = np.random.default_rng(seed), k + 1

    def evidence(n: int, which: int) -> Evidence:
        P = definite(seed + which, n, d) * 3
        return Evidence(gaussian.pack(P), np.einsum("nij,nj->ni", P, random.normal(size=(n, d))))

    of_users = evidence(6, 1)
    block = replace(problem.block(), earlier_precision=of_users.precision, earlier_information=of_users.information)
    block = next(from_arrow([to_arrow(block)]))
    np.testing.assert_array_equal(block.earlier.precision, of_users.precision)
    specification = replace(problem.specification(k, loss), earlier=evidence(5, 2))
    fit = problem.train(k, Schedule(8), engine=LocalEngine([block], specification), loss=loss)
    assert np.isfinite(fit.objective).all()
    assert max(b - a for a, b in pairwise(fit.objective)) <= 1e-8 * np.abs(fit.objective).max()


def test_inputs_end_where_training_on_all_events_ends_when_users_are_known() -> None:
    """Users certain (their own evidence without end), so that the inputs' half is conjugate: two halves are the whole."""
    problem, k = planted(5, users=8, inputs=6, events=300), 2
    w = np.random.default_rng(1).normal(size=(8, k + 1))
    sure = Evidence(np.tile(gaussian.pack(1e9 * np.eye(k + 1)), (8, 1)), 1e9 * w)
    prior, users = problem.input_prior(k), problem.user_prior(k)

    def step(events: np.ndarray, earlier: Evidence | None) -> LocalEngine:
        block = problem.take(events).block()
        place = np.array([int(user[1:]) for user in block.users.to_pylist()])
        known = sure.take(place)
        block = replace(block, earlier_precision=known.precision, earlier_information=known.information)
        engine = LocalEngine([block], replace(problem.specification(k), earlier=earlier))
        engine.update_users(users, 0.5)
        engine.update_inputs(prior, 0.5)
        return engine

    first, second = np.arange(150), np.arange(150, 300)
    known = step(first, None).inputs
    told = Evidence.of(known, prior.mean(problem.input_attributes), prior.covariance, Given(k + 1))
    found, wanted = step(second, told).inputs, step(np.arange(300), None).inputs
    np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-6)
    np.testing.assert_allclose(found.covariance, wanted.covariance, atol=1e-6)


def test_a_block_keeps_earlier_events_apart() -> None:
    problem = planted(2, events=90)
    role = np.random.default_rng(0).choice([TRAINED, CAPPED, EARLIER], 90)
    block = problem.block(role=role)
    alone, direct = block.of_role(EARLIER), problem.take(role == EARLIER).block()
    features = Features.of(*certain(np.random.default_rng(1).normal(size=(10, 3)))[:2], 0.0)
    sums = []
    for one in (alone, direct):
        a, b = alternation.user_sums(one.weight_matrix, one.label_matrix, features.take(one.inputs))
        order = np.argsort(one.users.to_pylist())
        sums.append((a[order], b[order]))
    for found, wanted in zip(*sums, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert block.with_extra(CAPPED, EARLIER).weights.sum() == pytest.approx(problem.weight.sum())
    assert len(problem.block().of_role(EARLIER).places) == 0
    whole = block.with_extra(CAPPED, EARLIER).pattern
    assert whole.has_canonical_format
    assert (whole != problem.block().pattern).nnz == 0  # a pair once, however its events are kept
