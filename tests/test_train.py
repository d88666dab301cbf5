"""Training: the objective never rises, what was planted is found, and odd shapes of data are survived."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, planted
from sklearn.tree import DecisionTreeRegressor

from mtl import alternation, gaussian
from mtl.basis import OracleBasis
from mtl.blocks import HELD_OUT, TRAINED, from_arrow, to_arrow
from mtl.catalogue import Catalogue, Totals
from mtl.config import load_settings
from mtl.differentiable import LinearFunction
from mtl.engine import LocalEngine
from mtl.errors import ConfigError
from mtl.features import Features
from mtl.firstorder import Adam, FunctionBasis
from mtl.fitting import _precision
from mtl.forms import Form
from mtl.losses import LOSSES
from mtl.oracle.linear import fit_ridge
from mtl.prior import Locked
from mtl.refusals import refuse_contradictions
from mtl.regressors import Oracle
from mtl.resume import Checkpoint
from mtl.train import Fit, Noise, Schedule, State, alternate
from mtl.userstep import Known, Specification
from mtl.working import beliefs, settle

problems = st.builds(
    planted,
    seed=st.integers(0, 2**32 - 1),
    users=st.integers(1, 12),
    inputs=st.integers(1, 12),
    k=st.integers(1, 3),
    events=st.integers(2, 100),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    attributes=st.integers(0, 3),
    weighted=st.booleans(),
).filter(lambda problem: np.ptp(problem.label) > 0.01)


def fit_tree(attributes, target, weight):
    return DecisionTreeRegressor(max_depth=2, random_state=0).fit(attributes, target, sample_weight=weight)


def featureless(problem: Problem) -> Problem:
    """Inputs without attributes: the identity oracle, which is matrix factorization."""
    return replace(problem, input_attributes=np.ones((len(problem.input_attributes), 1)))


def assert_never_rises(problem: Problem, fit: Fit) -> None:
    # The error is a difference of sums of squares: near a perfect fit its rounding is divided by a tiny noise.
    rounding = 100 * np.finfo(float).eps * (problem.weight @ problem.label**2) / fit.noise
    allowed = 1e-9 * np.abs(fit.objective).max() + rounding
    rises = [after - before for before, after in pairwise(fit.objective)]
    assert max(rises, default=0.0) <= allowed


def test_the_objective_never_rises_for_factorization_and_for_a_linear_basis_in_closed_form() -> None:
    @settings(max_examples=150)
    @given(problems, st.integers(1, 3), st.booleans())
    def check(problem: Problem, k: int, with_attributes: bool) -> None:
        problem = problem if with_attributes else featureless(problem)
        fit = problem.train(k, Schedule(8))
        assert np.isfinite(fit.objective).all()
        assert_never_rises(problem, fit)

    check()


# Not even for an oracle that minimizes something else (a ridge penalty) or only approximately (a shallow tree): a fit
# that would raise the objective is refused.
@pytest.mark.parametrize("oracle", [fit_ridge, fit_tree])
def test_the_objective_never_rises_whatever_the_oracle(oracle: Oracle) -> None:
    @settings(max_examples=60)
    @given(problems, st.integers(1, 3), st.booleans())
    def check(problem: Problem, k: int, residual: bool) -> None:
        fit = problem.train(k, Schedule(6), oracle, residual)
        assert np.isfinite(fit.objective).all()
        assert_never_rises(problem, fit)

    check()


def test_without_the_guard_of_the_oracles_fits_the_objective_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    def rises() -> bool:
        fits = [planted(seed).train(2, Schedule(10), fit_ridge, residual=False) for seed in range(5)]
        return any(np.diff(fit.objective).max() > 1e-3 for fit in fits)

    assert not rises()

    def unguarded(basis: OracleBasis, precision, information, attributes, noise) -> OracleBasis:
        A, g, functions = gaussian.unpack(precision, 3), basis.mean(attributes).copy(), []
        for i in range(3):
            gradient = information[:, i] - np.einsum("nl,nl->n", A[:, i], g)
            functions.append(fit_ridge(attributes, g[:, i] + gradient / A[:, i, i], A[:, i, i] / noise))
            g[:, i] = functions[i].predict(attributes)
        return replace(basis, functions=tuple(functions), _known=None)

    monkeypatch.setattr(OracleBasis, "refit", unguarded)
    assert rises()


# --- What is learnt ---------------------------------------------------------------------------------------------------


def predictions(engine, fit: Fit, problem: Problem, events: Problem) -> np.ndarray:
    """Labels expected of ``events`` by the trained users and inputs."""
    features = engine.features
    block = problem.block()
    users = fit.users.posteriors(
        *alternation.user_sums(block.weight_matrix, block.label_matrix, features.take(block.inputs)),
        block.attributes,
        fit.noise,
    )
    place = {name: i for i, name in enumerate(block.users.to_pylist())}
    rows = [place[f"u{u}"] for u in events.user]
    return features.offset[events.input] + np.sum(users.mean[rows] * features.phi[events.input], axis=1)


@pytest.mark.parametrize("k", [2, 6])
def test_a_planted_model_is_recovered_almost_to_the_noise_and_a_rank_too_many_does_no_harm(k: int) -> None:
    whole = planted(0, users=150, inputs=80, k=2, events=6000, noise=0.3, weighted=False)
    held_out = np.arange(len(whole)) % 5 == 0
    problem, test = whole.take(~held_out), whole.take(held_out)
    engine = problem.engine(k)
    fit = problem.train(k, Schedule(30), engine=engine)
    guess = predictions(engine, fit, problem, test)
    # 0.3 is what the labels' own noise costs whoever knows the truth.
    assert np.sqrt(np.mean((guess - test.label) ** 2)) < 1.1 * 0.3
    assert np.sqrt(np.mean((guess - test.expected) ** 2)) < 0.13
    assert fit.noise == pytest.approx(0.3**2, rel=0.1)


def test_a_user_who_was_never_seen_is_predicted_better_by_attributes_than_by_the_average() -> None:
    whole = planted(1, users=200, inputs=60, k=1, events=6000, noise=0.3)
    known = whole.take(whole.user < 150)
    new = whole.take(whole.user >= 150)
    engine = known.engine(1)
    fit = known.train(1, Schedule(20), engine=engine)
    features = engine.features
    w = fit.users.mean(whole.user_attributes)
    by_attributes = features.offset[new.input] + np.sum(w[new.user] * features.phi[new.input], axis=1)
    average = fit.users.mean(np.eye(1, whole.user_attributes.shape[1]))[0]
    by_average = features.offset[new.input] + features.phi[new.input] @ average
    error_by_attributes, error_by_average = (np.mean((g - new.expected) ** 2) for g in (by_attributes, by_average))
    assert error_by_attributes < 0.8 * error_by_average


def test_users_in_partitions_are_the_same_users() -> None:
    problem = planted(2)
    one, three = (problem.train(2, Schedule(6), engine=problem.engine(2, partitions=n)) for n in (1, 3))
    np.testing.assert_allclose(three.objective, one.objective, rtol=1e-10)
    np.testing.assert_allclose(three.users.coefficients, one.users.coefficients, rtol=1e-8, atol=1e-10)
    assert three.noise == pytest.approx(one.noise)


def test_an_event_of_weight_two_counts_as_two_events() -> None:
    once = planted(3, weighted=False)
    doubled = replace(once, weight=np.full(len(once), 2.0))
    twice = once.take(np.repeat(np.arange(len(once)), 2))
    fits = [problem.engine(2) for problem in (doubled, twice)]
    for engine, problem in zip(fits, (doubled, twice), strict=True):
        prior = problem.user_prior(2)
        engine.update_users(prior, 0.5)
        engine.update_inputs(problem.input_prior(2), 0.5)
    np.testing.assert_allclose(fits[0].inputs.mean, fits[1].inputs.mean, atol=1e-12)
    np.testing.assert_allclose(fits[0].sums.second, fits[1].sums.second, atol=1e-10)


def test_the_same_seed_gives_the_same_model_and_another_seed_another_start() -> None:
    problem = planted(4)
    fits = [problem.train(2, Schedule(3), engine=problem.engine(2, seed)) for seed in (0, 0, 1)]
    assert fits[0].objective == fits[1].objective != fits[2].objective


# --- When it stops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", [None, fit_ridge])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_labels_in_other_units_are_learnt_the_same(scale: float, oracle: Oracle | None) -> None:
    problem = planted(6, users=30, inputs=20, k=2, events=1000)
    other = replace(problem, label=scale * problem.label)
    schedule = Schedule(40, tolerance=1e-3)
    one, scaled = (of.train(2, schedule, oracle) for of in (problem, other))
    assert one.iterations == scaled.iterations > 3
    assert scaled.noise == pytest.approx(scale**2 * one.noise, rel=1e-6)
    np.testing.assert_allclose(scaled.users.covariance, scale**2 * one.users.covariance, rtol=1e-5)


def test_training_stops_when_an_iteration_gains_less_than_the_tolerance() -> None:
    problem = planted(5, events=300)
    fit = problem.train(2, Schedule(200, tolerance=1e-3))
    assert fit.iterations < 200
    # Recorded after the inputs' half of every iteration, and after the users' half of all but the first.
    assert len(fit.objective) == 2 * fit.iterations - 1
    by_iteration = np.array(fit.objective[::2])
    gains = -np.diff(by_iteration) / len(problem)
    assert gains[-1] < 1e-3
    assert (gains[:-1] >= 1e-3).all()


def test_training_without_a_tolerance_makes_all_its_iterations() -> None:
    assert planted(5).train(2, Schedule(25)).iterations == 25


# --- Odd shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"users": 1, "inputs": 10},
        {"users": 10, "inputs": 1},
        {"users": 1, "inputs": 1},
        {"users": 12, "inputs": 12, "events": 2},
        {"users": 4, "inputs": 3, "events": 12, "noise": 0.0},
    ],
    ids=["one user", "one input", "one user and one input", "two events", "no noise"],
)
@pytest.mark.parametrize("oracle", [None, fit_ridge])
@pytest.mark.parametrize("k", [1, 15])
def test_odd_data_and_a_rank_beyond_it_end_in_finite_sound_models(shape: dict, oracle: Oracle | None, k: int) -> None:
    problem = planted(6, **shape)
    engine = problem.engine(k)
    fit = problem.train(k, Schedule(25), oracle, engine=engine)
    assert np.isfinite(fit.objective).all()
    assert_never_rises(problem, fit)
    # An event of weight c has the variance σ²/c; σ² holds what is not known of the vectors too.
    assert 0 < fit.noise < 2 * problem.label_variance * problem.weight.mean()
    for covariance in (fit.users.covariance, fit.inputs.covariance):
        assert (np.linalg.eigvalsh(covariance) > 0).all()
    guess = predictions(engine, fit, problem, problem)
    assert np.isfinite(guess).all()
    # Shrunken towards the mean, never beyond the labels by more than their own spread.
    spread = np.ptp(problem.label)
    assert problem.label.min() - spread <= guess.min() <= guess.max() <= problem.label.max() + spread


def test_one_event_each_is_explained_by_the_average_and_attributes_alone() -> None:
    random = np.random.default_rng(0)
    n = 12
    problem = replace(
        planted(7, users=n, inputs=n, events=n), user=np.arange(n), input=np.arange(n), label=random.normal(size=n)
    )
    fit = problem.train(3, Schedule(25))
    assert np.isfinite(fit.objective).all()
    assert_never_rises(problem, fit)


def test_inputs_without_events_have_their_prior_for_their_posterior() -> None:
    problem = planted(8, inputs=12, events=60)
    problem = problem.take(problem.input < 10)
    engine = problem.engine(2)
    fit = problem.train(2, Schedule(5), engine=engine)
    precision, information = alternation.input_evidence(engine.sums, engine.specification.mu)
    assert not precision[10:].any()
    assert not information[10:].any()
    inputs = fit.inputs.posteriors(precision, information, engine.specification.attributes, fit.noise)
    np.testing.assert_allclose(inputs.mean[10:], fit.inputs.mean(engine.specification.attributes)[10:], atol=1e-10)
    np.testing.assert_allclose(gaussian.unpack(inputs.covariance, 3)[10:], [fit.inputs.covariance] * 2, atol=1e-10)
    assert len(Features.of(inputs.mean, inputs.covariance, 0.0)) == 12


# --- Events held out --------------------------------------------------------------------------------------------------


def with_roles(problem: Problem, role: np.ndarray, of: Specification) -> LocalEngine:
    return LocalEngine([next(from_arrow([to_arrow(problem.block(role=role))]))], of)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_events_held_out_and_capped_do_not_train(loss: str) -> None:
    problem = planted(11, events=150)
    if loss == "logistic":
        problem = replace(problem, label=(problem.label > problem.label.mean()).astype(float))
    role = np.random.default_rng(0).integers(0, 3, len(problem))
    trained = problem.take(role == TRAINED)
    one = trained.engine(2, loss=loss)
    other = with_roles(problem, role, one.specification)
    fits = [trained.train(2, Schedule(3), engine=engine, loss=loss) for engine in (one, other)]
    np.testing.assert_allclose(fits[1].objective, fits[0].objective, rtol=1e-9)
    # What is held out is measured as a plain loop over it would.
    features, block = other.features, other.partitions[0]
    other.update_users(fits[1].users, fits[1].noise)
    a, b = alternation.user_sums(
        block.matrix(block.weights if loss == "squared" else block.precision),
        block.matrix(block.labels if loss == "squared" else block.information),
        features.take(block.inputs),
    )
    if loss == "squared":
        w = fits[1].users.posteriors(a, b, block.attributes, fits[1].noise).mean
        place = {user: i for i, user in enumerate(block.users.to_pylist())}
        wanted = 0.0
        held = problem.take(role == HELD_OUT)
        for u, x, y, c in zip(held.user, held.input, held.label, held.weight, strict=True):
            h = features.offset[x] + w[place[f"u{u}"]] @ features.phi[x]
            wanted += c * h**2 / 2 - c * y * h
        assert other.held_out == pytest.approx(wanted, rel=1e-9)


def test_training_on_all_is_training_as_if_nothing_had_been_held_out() -> None:
    problem = planted(12, events=150)
    role = np.random.default_rng(0).integers(0, 2, len(problem))
    engine = with_roles(problem, role, problem.specification(2))
    problem.take(role == TRAINED).train(2, Schedule(3), engine=engine)
    engine.train_on_all(float(problem.weight @ problem.label**2))
    again, plain = (problem.train(2, Schedule(3), engine=one) for one in (engine, problem.engine(2)))
    np.testing.assert_allclose(again.objective, plain.objective, rtol=1e-9)


def test_a_checkpoint_of_another_function_is_of_another_training(tmp_path: Path) -> None:
    asked = ("function.kind=linear", "function.kind=two_layer", "oracle.kind=identity")
    keys = {Checkpoint.of(str(tmp_path), load_settings([], [assignment]), 1).key for assignment in asked}
    assert len(keys) == 3


def test_labels_far_from_zero_are_summed_in_double_precision() -> None:
    totals = Totals(1e6, 1e6)
    catalogue = Catalogue(
        pa.array([]), np.empty(0), 2_000_000, 2_000_000, 2e6, 3.0, 0.0, False, 1.0, 2e6, totals, totals, 0.0, 9.0
    )
    train = load_settings().train
    assert _precision(train, catalogue) == "single"
    assert _precision(train, replace(catalogue, mean_label=500.0)) == "double"


def test_patience_stops_and_the_best_number_of_iterations_is_known() -> None:
    assert Fit(None, None, 1.0, (), 9, held_out=(0.0, 5.0, 3.0, 4.0, 4.0)).best == 2
    assert Fit(None, None, 1.0, (), 9, held_out=(1.0,)).best == 9
    schedule = Schedule(30, patience=2)
    assert not schedule.is_overfit([5.0, 3.0, 4.0])
    assert schedule.is_overfit([5.0, 3.0, 4.0, 4.0])


# --- Beginning elsewhere than at random -------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", [None, fit_ridge])
def test_a_resumed_training_goes_on_as_if_nothing_had_happened(oracle: Oracle | None, tmp_path: Path) -> None:
    problem, schedule = planted(13, events=150), Schedule(6)
    checkpoint = Checkpoint(tmp_path / "state", "key")
    whole = problem.train(2, schedule, oracle)

    class Killed(Exception):
        pass

    def dies(state: State) -> None:
        checkpoint.save(state)
        if state.iteration == 3:
            raise Killed

    def run(engine: LocalEngine, resume: State | None, save) -> Fit:
        priors = problem.user_prior(2), problem.input_prior(2, oracle)
        return alternate(
            engine, *priors, LOSSES["squared"], len(problem), problem.label_variance, schedule, resume=resume, save=save
        )

    with pytest.raises(Killed):
        run(problem.engine(2), None, dies)
    engine = problem.engine(2)
    resume = checkpoint.load(problem.input_prior(2, oracle))
    engine.inputs, engine.applied = resume.vectors, resume.applied
    again = run(engine, resume, None)
    assert again.iterations == whole.iterations
    np.testing.assert_allclose(again.objective, whole.objective, rtol=1e-12)
    assert replace(checkpoint, key="of other data").load(problem.input_prior(2, oracle)) is None


def test_a_checkpoint_that_cannot_be_read_is_started_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint(tmp_path / "state", "key")
    checkpoint.path.write_bytes(b"torn")
    assert checkpoint.load(planted(1).input_prior(2)) is None
    assert "cannot be read: starting over" in caplog.text


def test_an_optimizer_goes_on_from_where_it_was(tmp_path: Path) -> None:
    inputs = FunctionBasis.start(LinearFunction(), Adam(3, 0.1, 4), 5.0, 2, 3, 0.2, residual=True)
    inputs = replace(inputs, optimizer=replace(inputs.optimizer, t=7, learning_rate=0.025))
    state = State(3, None, None, None, inputs, 1.0, [], [], 0.0, (), 0.5, 2)
    checkpoint = Checkpoint(tmp_path / "state", "key")
    checkpoint.save(state)
    fresh = FunctionBasis.start(LinearFunction(), Adam(3, 0.1, 4), 5.0, 2, 3, 0.2, residual=True)
    again = checkpoint.load(fresh)
    assert again is not None
    assert again.inputs.optimizer == inputs.optimizer
    assert (again.step, again.damped) == (0.5, 2)


def counts(seed: int) -> Problem:
    """Few events of rates that differ by thousands, of which Newton's steps overshoot."""
    random = np.random.default_rng(seed)
    problem = planted(seed, users=5, inputs=5, events=int(random.integers(8, 40)))
    label = random.poisson(np.exp(np.clip(3 * (problem.expected - problem.expected.mean()), -4, 6))).astype(float)
    label[0] = 1
    return replace(problem, label=label)


@pytest.mark.parametrize(("seed", "form"), [(174, Form(2)), (2, Form(1, (2,), (1, 2))), (6, Form(2))])
def test_counts_train_on_after_an_iteration_was_taken_back(seed: int, form: Form) -> None:
    """An iteration that is repeated with half the step is held against the one before, not against itself."""
    problem, tolerance = counts(seed), 3e-4
    stopped, whole = (problem.train(form, Schedule(30, stop), loss="poisson") for stop in (tolerance, None))
    assert whole.damped
    assert (np.diff(stopped.objective) <= 1e-9 * np.abs(stopped.objective[:-1])).all()
    left = (30 - stopped.iterations) * tolerance * len(problem)
    assert stopped.objective[-1] - whole.objective[-1] <= left


@pytest.mark.parametrize("asked", ['model.per_user=["price"]', "model.form=multilevel"])
def test_weights_on_attributes_that_the_oracle_does_not_see_are_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match=r'oracle\.kind "identity" sees no attributes of inputs'):
        refuse_contradictions(load_settings([], ["oracle.kind=identity", asked]), None)
    refuse_contradictions(load_settings([], [asked]), None)


def test_a_training_that_is_resumed_beyond_its_last_iteration_ends() -> None:
    """As where the iteration that predicted best is found to be an earlier one than before the interruption."""
    problem, states = planted(14, events=200), list[State]()
    engine, priors = problem.engine(2), (problem.user_prior(2), problem.input_prior(2))
    of = LOSSES["squared"], len(problem), problem.label_variance
    alternate(engine, *priors, *of, Schedule(6), save=states.append)
    state = states[-1]
    assert state.iteration > 3
    engine.inputs, engine.applied = state.vectors, state.applied
    fit = alternate(engine, *priors, *of, Schedule(3), resume=state)
    assert fit.iterations == state.iteration + 1


def test_a_training_of_damped_steps_that_is_resumed_goes_on_from_what_was_applied() -> None:
    """A step of less than 1 keeps a part of what the inputs were computed from: of nothing, they would shrink."""
    problem, form, schedule = counts(12), Form(2), Schedule(30)
    states: list[State] = []
    engine = problem.engine(form, loss="poisson")
    priors = problem.user_prior(form, "poisson"), problem.input_prior(form, loss="poisson")
    of = LOSSES["poisson"], len(problem), problem.label_variance, schedule
    whole = alternate(engine, *priors, *of, save=states.append)
    damped = [state for state in states if state.step < 1]
    assert damped
    for state in damped[:3]:
        again = problem.engine(form, loss="poisson")
        again.inputs, again.applied = state.vectors, state.applied
        fit = alternate(again, *priors, *of, resume=state)
        assert fit.objective[-1] < state.objective[-1] + 1e-3 * len(problem)
        assert fit.objective[-1] < whole.objective[-1] + 0.1 * len(problem)
        size = np.abs(again.inputs.mean).sum() / np.abs(state.vectors.mean).sum()
        assert 0.9 < size < 1.5


def test_what_training_ends_with_is_not_worse_than_what_it_was_judged_by() -> None:
    """Poisson's last step of the inputs is one that the users' half-step after it was held against."""
    problem = counts(238)
    engine = problem.engine(Form(0, (1, 2)), loss="poisson")
    fit = problem.train(Form(0, (1, 2)), Schedule(30), engine=engine, loss="poisson")
    block = problem.block()
    posteriors = partial(fit.users.posteriors, attributes=block.attributes, noise=1.0)
    features = engine.features.take(block.inputs)
    users = posteriors(*settle(block.weight_matrix, block.label_matrix, features, posteriors, LOSSES["poisson"]))
    believed = beliefs(block.weight_matrix, users, features)
    assert LOSSES["poisson"].expected(*believed, block.weights, block.labels).sum() < fit.objective[-1] / 2


def test_a_warm_start_is_where_the_earlier_training_ended() -> None:
    problem = planted(14, events=200)
    engine = problem.engine(2)
    first = problem.train(2, Schedule(30), engine=engine)
    vectors = engine.features.vectors(engine.specification.mu)
    np.testing.assert_allclose(vectors.mean, engine.inputs.mean, atol=1e-12)
    np.testing.assert_allclose(vectors.covariance, engine.inputs.covariance, atol=1e-12)
    known = Known(np.arange(len(vectors.mean)), vectors)
    warm = LocalEngine(engine.partitions, replace(engine.specification, known=known))
    priors = [
        replace(prior, covariance=learnt.covariance)
        for prior, learnt in ((problem.user_prior(2), first.users), (problem.input_prior(2), first.inputs))
    ]
    again = alternate(
        warm,
        *priors,
        LOSSES["squared"],
        len(problem),
        problem.label_variance,
        Schedule(3),
        known=Noise(first.noise),
    )
    cold = problem.train(2, Schedule(3))
    assert again.objective[-1] < cold.objective[-1]
    assert again.objective[-1] == pytest.approx(first.objective[-1], rel=0.02)


def test_locked_features_stay_and_the_users_prior_is_learnt() -> None:
    problem = planted(15, events=200)
    engine = problem.engine(2)
    fit = problem.train(2, Schedule(10), engine=engine)
    before = engine.inputs.mean.copy()
    again = alternate(
        engine,
        problem.user_prior(2),
        Locked(fit.inputs),
        LOSSES["squared"],
        len(problem),
        problem.label_variance,
        Schedule(5),
        locked=True,
    )
    np.testing.assert_array_equal(engine.inputs.mean, before)
    assert (np.diff(again.objective) <= 1e-9 * np.abs(again.objective[:-1])).all()
    kept = alternate(
        engine,
        Locked(fit.users),
        fit.inputs,
        LOSSES["squared"],
        len(problem),
        problem.label_variance,
        Schedule(2),
    )
    assert kept.users.prior is fit.users


def test_single_precision_stays_within_a_ten_thousandth() -> None:
    problem = planted(16, users=60, inputs=40, events=1500)
    fits = {}
    for precision in ("double", "single"):
        engine = problem.engine(3)
        engine = LocalEngine(engine.partitions, replace(engine.specification, precision=precision))
        fits[precision] = problem.train(3, Schedule(10), engine=engine), engine.features
    (double, wanted), (single, found) = fits["double"], fits["single"]
    np.testing.assert_allclose(single.objective, double.objective, rtol=1e-5)
    np.testing.assert_allclose(found.phi, wanted.phi, atol=1e-4)
    np.testing.assert_allclose(found.offset, wanted.offset, atol=1e-4)
    assert not np.array_equal(found.phi, wanted.phi)
