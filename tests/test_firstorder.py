"""The first-order algorithm: its gradients are right, it ends where an exact oracle does, and it never makes things worse."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from itertools import pairwise

import cloudpickle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, definite, planted

from mtl import alternation, gaussian
from mtl.alternation import InputSums
from mtl.basis import OracleBasis, integrated_weights
from mtl.config import load_settings
from mtl.differentiable import Differentiable, LinearFunction, TorchFunction, TwoLayer, check_gradient, make_function
from mtl.distributed import DistributedEngine, _Shard
from mtl.engine import LocalEngine
from mtl.errors import ConfigError, OracleError
from mtl.firstorder import LBFGS, Adam, FunctionBasis, Optimizer, Slope, make_optimizer
from mtl.fitting import _function_basis
from mtl.forms import Form, partly_given
from mtl.gaussian import Array
from mtl.losses import LOSSES
from mtl.oracle.linear import NormalEquations, fit_ridge
from mtl.prior import COEFFICIENT_PRECISION, VectorPrior
from mtl.train import START_VARIANCE, Fit, Schedule, alternate

FUNCTIONS = [LinearFunction(), TwoLayer(2)]
FIFTY_STEPS = LBFGS(50)


def basis(
    problem: Problem,
    function: Differentiable,
    k: int = 2,
    optimizer: Optimizer = FIFTY_STEPS,
    decay: float = COEFFICIENT_PRECISION,
    residual: bool = True,
    d: int | None = None,
) -> FunctionBasis:
    p = problem.input_attributes.shape[1]
    return FunctionBasis.start(function, optimizer, decay, p, d or k + 1, START_VARIANCE, residual)


def train(problem: Problem, inputs: VectorPrior, k: int | Form, schedule: Schedule, loss: str = "squared", engine=None):
    engine = engine or problem.engine(k, loss=loss)
    users = problem.user_prior(k)
    return alternate(engine, users, inputs, LOSSES[loss], len(problem), problem.label_variance, schedule)


def curved(seed: int = 0, users: int = 60, inputs: int = 80, events: int = 3000, noise: float = 0.3) -> Problem:
    """Basis functions that no linear function of the attributes comes near to: y = sin 2z₁ + b_u + p_u (z₂² − 1) + noise."""
    random = np.random.default_rng(seed)
    z = np.column_stack([np.ones(inputs), random.normal(size=(inputs, 2))])
    b, w = random.normal(size=(2, users))
    user, input = random.integers(users, size=events), random.integers(inputs, size=events)
    expected = 3 + np.sin(2 * z[input, 1]) + b[user] + w[user] * (z[input, 2] ** 2 - 1)
    label = expected + noise * random.normal(size=events)
    return Problem(user, input, label, np.ones(events), np.ones((users, 1)), z, expected)


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LinearFunction, TwoLayer])
def test_the_gradients_of_the_built_in_functions_are_those_of_their_values(kind: type) -> None:
    @settings(max_examples=60)
    @given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(1, 9))
    def check(p: int, d: int, seed: int, hidden: int) -> None:
        function = kind(hidden) if kind is TwoLayer else kind()
        check_gradient(function, p, d, seed=seed, tolerance=1e-6)
        assert len(function.owners(p, d)) == len(function.start(p, d, seed))

    check()


@dataclass(frozen=True)
class Broken(LinearFunction):
    """A gradient that forgets one parameter."""

    parameter: int = 4

    def gradient(self, theta: Array, attributes: Array, upstream: Array) -> Array:
        gradient = super().gradient(theta, attributes, upstream)
        gradient[self.parameter] = 0.0
        return gradient


class Averaging(LinearFunction):
    """The mean over rows where the sum is asked for: what a deep learning habit makes of a loss."""

    def gradient(self, theta: Array, attributes: Array, upstream: Array) -> Array:
        return super().gradient(theta, attributes, upstream) / len(attributes)


class Standardizing(LinearFunction):
    """Rows that see each other."""

    def values(self, theta: Array, attributes: Array) -> Array:
        values = super().values(theta, attributes)
        return values - values.mean(0)


class Flat(LinearFunction):
    def gradient(self, theta: Array, attributes: Array, upstream: Array) -> Array:
        return attributes.T @ upstream


class Wide(LinearFunction):
    def values(self, theta: Array, attributes: Array) -> Array:
        return super().values(theta, attributes)[:, :-1]


class Infinite(LinearFunction):
    def values(self, theta: Array, attributes: Array) -> Array:
        return super().values(theta, attributes) / 0.0


class Raising(LinearFunction):
    def values(self, theta: Array, attributes: Array) -> Array:
        raise KeyError("no such layer")


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Broken(), r"wrong in parameter 4 of 6: it says 0, finite differences of the values -?\d"),
        (Averaging(), "wrong in parameter 0 of 6"),
        (Standardizing(), "depend on the other rows"),
        (Flat(), r"gradient returned shape \(3, 2\), \(6,\) is wanted"),
        (Wide(), r"values returned shape \(4, 1\), \(4, 2\)|values returned shape \(8, 1\), \(8, 2\)"),
        (Infinite(), "not finite"),
        (Raising(), "the function has no values .KeyError: 'no such layer'"),
    ],
)
def test_a_broken_function_is_an_error_that_says_what_and_where(function: Differentiable, reason: str) -> None:
    with pytest.raises(OracleError, match=reason):
        check_gradient(function, 3, 2)


def full_objective(engine: LocalEngine, users: VectorPrior, inputs: FunctionBasis, noise: float, rounds: int) -> float:
    """J with users, and residuals where there are any, at their optimum for this θ; priors and noise as given."""
    precision, information = engine._evidence(1.0)
    engine.inputs = inputs.posteriors(precision, information, engine.specification.attributes, noise)
    for _ in range(rounds):
        user_moments, deviance = engine.update_users(users, noise)
        moments = inputs.moments(engine.inputs, engine.specification.attributes)
        objective = deviance / (2 * noise) + users.divergence(user_moments) + inputs.divergence(moments)
        if inputs.residual:
            engine.update_inputs(inputs, noise)
    return objective


@pytest.mark.parametrize("function", FUNCTIONS, ids=["linear", "two layers"])
@pytest.mark.parametrize(("residual", "rounds"), [(False, 1), (True, 300)], ids=["exact", "with residuals"])
def test_the_collapsed_gradient_is_that_of_the_whole_objective_with_users_at_their_optimum(
    function: Differentiable, residual: bool, rounds: int
) -> None:
    problem, noise, k = planted(3, users=5, inputs=4, k=1, events=30), 0.4, 1
    start = basis(problem, function, k, residual=residual)
    random = np.random.default_rng(0)
    theta = start.theta + 0.5 * random.normal(size=len(start.theta))
    inputs, users, z = replace(start, theta=theta), problem.user_prior(k), problem.input_attributes
    engine = problem.engine(k)
    full_objective(engine, users, inputs, noise, rounds)
    W, v = integrated_weights(*engine._evidence(noise), inputs.covariance, noise)
    gradient = Slope.of(function, theta, W, v, z).gradient
    assert np.abs(gradient).max() > 1
    for j in range(len(theta)):
        step = np.zeros_like(theta)
        step[j] = 1e-4
        above, below = (
            full_objective(engine, users, replace(inputs, theta=theta + sign * step), noise, rounds) for sign in (1, -1)
        )
        assert gradient[j] == pytest.approx((above - below) / 2e-4, rel=1e-4, abs=1e-4 * np.abs(gradient).max())


def test_slopes_of_parts_add_to_that_of_the_whole() -> None:
    problem = planted(1, inputs=9)
    engine = problem.engine(2)
    engine.update_users(problem.user_prior(2), 0.4)
    W, v = integrated_weights(*engine._evidence(0.4), np.zeros((3, 3)), 0.4)
    function, z = TwoLayer(4), problem.input_attributes
    theta = function.start(3, 3, 0) + 0.1
    whole = Slope.of(function, theta, W, v, z)
    parts = [Slope.of(function, theta, W[part], v[part], z[part]) for part in (slice(0, 4), slice(4, 4), slice(4, 9))]
    for name, value in vars(sum(parts[1:], parts[0])).items():
        np.testing.assert_allclose(value, getattr(whole, name), rtol=1e-12)


# --- Where it ends ----------------------------------------------------------------------------------------------------


def evidence_of(problem: Problem, k: int) -> tuple[Array, Array]:
    engine = problem.engine(k)
    engine.update_users(problem.user_prior(k), 0.4)
    return engine._evidence(1.0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("optimizer", [LBFGS(500), Adam(4000, 0.02, 0)], ids=["lbfgs", "adam"])
def test_one_refit_to_convergence_is_the_linear_oracle_s_ridge_for_all_functions_jointly(
    residual: bool, optimizer: Optimizer
) -> None:
    problem = planted(2, users=30, inputs=40, events=600)
    evidence, z = evidence_of(problem, 2), problem.input_attributes
    start = basis(problem, LinearFunction(), optimizer=optimizer, residual=residual)
    W, v = integrated_weights(*evidence, start.covariance, 0.4)
    sums = NormalEquations.of(W, v, z)
    # All normal equations at once, with the ridge that fit_ridge gives each function.
    d, p = sums.first.shape
    ridge = np.kron(np.diag(COEFFICIENT_PRECISION * sums.weight / sums.told), np.eye(p))
    matrix = sums.second.transpose(0, 2, 1, 3).reshape(d * p, d * p) + ridge
    wanted = np.linalg.solve(matrix, sums.first.ravel()).reshape(d, p)
    after = start.refit(*evidence, z, 0.4)
    np.testing.assert_allclose(after.theta.reshape(p, d), wanted.T, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_training_a_linear_function_ends_at_the_objective_of_the_linear_oracle(residual: bool) -> None:
    for seed in range(2):
        problem = planted(seed, users=40, inputs=30, events=900)
        schedule = Schedule(80)
        oracle = problem.train(2, schedule, fit_ridge, residual)
        function = train(problem, basis(problem, LinearFunction(), residual=residual), 2, schedule)
        assert function.objective[-1] == pytest.approx(oracle.objective[-1], rel=5e-3)


def error(problem: Problem, engine: LocalEngine, fit: Fit, events: Problem) -> float:
    """Root mean squared error of predictions of the expected labels, given attributes alone of the inputs."""
    block, z = problem.block(), problem.input_attributes
    features = engine.features.take(block.inputs)
    users = fit.users.posteriors(
        *alternation.user_sums(block.weight_matrix, block.label_matrix, features), block.attributes, fit.noise
    )
    place = {name: i for i, name in enumerate(block.users.to_pylist())}
    w = users.mean[[place[f"u{u}"] for u in events.user]]
    c = fit.inputs.mean(z)[events.input]
    guess = problem.mean_label + c[:, 0] + w[:, 0] + np.sum(w[:, 1:] * c[:, 1:], axis=1)
    return float(np.sqrt(np.mean((guess - events.expected) ** 2)))


def test_two_layers_find_a_planted_curve_that_a_linear_function_cannot() -> None:
    problem = curved()
    # Judged on inputs without an event, of which only the attributes tell.
    seen = problem.take(problem.input < 60)
    unseen = problem.take(problem.input >= 60)
    errors = {}
    for function in (LinearFunction(), TwoLayer(20)):
        engine = seen.engine(1)
        fit = train(seen, basis(seen, function, 1, residual=False, decay=0.1), 1, Schedule(60), engine=engine)
        errors[type(function)] = error(seen, engine, fit, unseen)
    assert errors[TwoLayer] < 0.5 * errors[LinearFunction], errors


def test_one_step_a_pass_comes_down_too_only_later() -> None:
    problem = curved()
    many, few = (
        train(problem, basis(problem, TwoLayer(10), 1, LBFGS(steps), decay=0.1, residual=False), 1, Schedule(40))
        for steps in (20, 1)
    )
    assert max(np.diff(few.objective)) <= 1e-9 * abs(few.objective[0])
    assert few.objective[-1] < 0.9 * few.objective[0]
    assert many.objective[20] < few.objective[20]


# --- It never makes things worse --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [LBFGS(10), LBFGS(1), Adam(5, 0.01, 3), Adam(5, 100.0, 3)], ids=["lbfgs", "one step", "adam", "wild"]
)
def test_the_objective_never_rises_whatever_the_optimizer(optimizer: Optimizer) -> None:
    @settings(max_examples=25)
    @given(st.integers(0, 2**32 - 1), st.sampled_from(FUNCTIONS), st.booleans(), st.integers(1, 3))
    def check(seed: int, function: Differentiable, residual: bool, k: int) -> None:
        problem = planted(seed, noise=0.3)
        fit = train(problem, basis(problem, function, k, optimizer, residual=residual), k, Schedule(8))
        assert np.isfinite(fit.objective).all()
        assert np.diff(fit.objective).max() <= 1e-9 * np.abs(fit.objective).max()

    check()


def test_a_penalty_is_not_paid_for_with_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = planted(2, users=30, inputs=40, events=600)
    evidence, z = evidence_of(problem, 2), problem.input_attributes
    best = basis(problem, LinearFunction(), decay=0.0, residual=False, optimizer=LBFGS(500)).refit(*evidence, z, 0.4)
    W, v = integrated_weights(*evidence, best.covariance, 0.4)

    def rise() -> float:
        after = replace(best, weight_decay=50.0).refit(*evidence, z, 0.4)
        before, after = (Slope.of(LinearFunction(), one.theta, W, v, z).value for one in (best, after))
        return (after - before) / abs(before)

    assert rise() <= 1e-9
    monkeypatch.setattr("mtl.firstorder._ROUNDING", np.inf)
    assert rise() > 0.01


def test_steps_of_which_none_helps_are_taken_back_counted_and_shortened() -> None:
    problem = planted(2, users=30, inputs=40, events=600)
    evidence, z = evidence_of(problem, 2), problem.input_attributes
    settled = basis(problem, LinearFunction(), optimizer=LBFGS(500)).refit(*evidence, z, 0.4)
    wild = replace(settled, optimizer=Adam(3, 50.0, 8))
    after = wild.refit(*evidence, z, 0.4)
    np.testing.assert_array_equal(after.theta, settled.theta)
    assert after.counts == {"refused_steps": 1}
    assert after.optimizer.learning_rate == 25.0
    assert after.optimizer.t == 3


def test_adam_goes_on_where_it_was() -> None:
    problem = planted(2, users=30, inputs=40, events=600)
    evidence, z = evidence_of(problem, 2), problem.input_attributes
    once = basis(problem, LinearFunction(), optimizer=Adam(6, 0.01, 0)).refit(*evidence, z, 0.4)
    twice = basis(problem, LinearFunction(), optimizer=Adam(3, 0.01, 0))
    for _ in range(2):
        twice = twice.refit(*evidence, z, 0.4)
    np.testing.assert_allclose(twice.theta, once.theta, rtol=1e-12)


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
def test_other_losses_and_forms_train_by_the_same_steps(loss: str) -> None:
    problem = planted(4, users=20, inputs=15, events=400)
    random = np.random.default_rng(0)
    label = (problem.label > problem.label.mean()) if loss == "logistic" else random.poisson(np.exp(problem.label / 3))
    problem = replace(problem, label=label.astype(float), weight=np.ones(len(problem)))
    form = Form(1, input_columns=(1,), user_columns=(2,))
    given = form.inputs
    learnt = basis(problem, TwoLayer(4), d=len(given.learnt))
    fit = train(problem, partly_given(learnt, given), form, Schedule(8), loss)
    assert np.isfinite(fit.objective).all()
    assert np.diff(fit.objective).max() <= 1e-9 * np.abs(fit.objective).max()
    assert fit.objective[-1] < fit.objective[0]


def test_inputs_of_which_no_event_tells_move_nothing() -> None:
    problem = planted(2, inputs=12)
    evidence, z = evidence_of(problem, 2), problem.input_attributes
    one = basis(problem, TwoLayer(4)).refit(*evidence, z, 0.4)
    more = tuple(np.vstack([array, np.zeros((2, array.shape[1]))]) for array in evidence)
    two = basis(problem, TwoLayer(4)).refit(*more, np.vstack([z, np.full((2, 3), 9.0)]), 0.4)
    np.testing.assert_array_equal(one.theta, two.theta)
    nothing = tuple(np.zeros_like(array) for array in evidence)
    with pytest.raises(OracleError, match="no event says anything of any basis function"):
        one.refit(*nothing, z, 0.4)


class Shards(DistributedEngine):
    """The distributed engine's refit with its shards in this process."""

    def __init__(self, engine: LocalEngine, cuts: list[int]):
        of, bounds = engine.specification, pairwise([0, *cuts, len(engine.specification.attributes)])
        self.specification, self.shards = of, []
        for part in (slice(*bound) for bound in bounds):
            sums = InputSums(engine.sums.second[part], engine.sums.first[part])
            self.shards.append(_Shard(engine.inputs, of.attributes[part], sums))

    def _sum(self, work, arguments):
        arguments = cloudpickle.loads(cloudpickle.dumps(arguments))
        said = [work(shard, arguments)[1] for shard in self.shards]
        return sum(said[1:], said[0])


@pytest.mark.parametrize("form", [Form(2), Form(1, (1,))], ids=["shared basis", "with per-user attributes"])
@pytest.mark.parametrize("optimizer", [LBFGS(3), Adam(3, 0.01, 0)], ids=["lbfgs", "adam"])
def test_a_refit_over_shards_is_one_over_all_inputs(form: Form, optimizer: Optimizer) -> None:
    problem = planted(2, users=30, inputs=40, events=600)
    engine = problem.engine(form)
    engine.update_users(problem.user_prior(form), 0.4)
    start = partly_given(basis(problem, TwoLayer(3), d=3 - len(form.input_columns), optimizer=optimizer), form.inputs)
    one, other = engine.refit(start, 0.4), Shards(engine, [7, 7, 30]).refit(start, 0.4)
    assert np.abs(one.mean(problem.input_attributes)).max() > 0.01
    np.testing.assert_allclose(
        other.mean(problem.input_attributes), one.mean(problem.input_attributes), rtol=1e-7, atol=1e-9
    )


def test_both_bases_treat_residuals_alike() -> None:
    z = np.random.default_rng(0).normal(size=(6, 3))
    S = definite(0, 1, 3)[0]
    one = replace(basis(planted(0), LinearFunction()), covariance=S)
    other = OracleBasis(fit_ridge, S, residual=True)
    precision, information = gaussian.pack(definite(1, 6, 3)), z
    for mine, theirs in zip(
        one.posteriors(precision, information, z, 0.4), other.posteriors(precision, information, z, 0.4), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


# --- Storing and settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_a_stored_basis_predicts_the_same_without_its_optimizer(module) -> None:
    problem = planted(2)
    evidence, z = evidence_of(problem, 2), problem.input_attributes
    fitted = basis(problem, TwoLayer(4), optimizer=Adam(3, 0.01, 0)).refit(*evidence, z, 0.4)
    back = module.loads(module.dumps(fitted))
    assert back.optimizer is None
    np.testing.assert_array_equal(back.mean(z), fitted.mean(z))
    assert back.mean(np.empty((0, 3))).shape == (0, 3)


def configured(*assignments: str):
    return load_settings([], ["train.algorithm=first_order", *assignments])


def test_the_function_and_its_optimizer_are_as_configured() -> None:
    chosen = configured("function.kind=two_layer", "function.hidden=7").function
    assert make_function(chosen, 3, 2, 0) == TwoLayer(7)
    assert make_function(configured().function, 3, 2, 0) == LinearFunction()
    assert make_optimizer(configured("function.steps=1").function, 0) == LBFGS(1)
    adam = configured("function.optimizer=adam", "function.steps=9", "function.batch=5").function
    assert make_optimizer(adam, 3) == Adam(9, 0.01, 5, 3)
    own = configured("function.kind=custom", "function.factory=mtl.differentiable:LinearFunction").function
    assert make_function(own, 3, 2, 0) == LinearFunction()


@pytest.mark.parametrize(
    ("assignments", "reason"),
    [
        (["function.kind=custom"], "function.kind custom needs function.factory"),
        (
            ["function.factory=mtl.differentiable:TwoLayer"],
            "function.factory is for function.kind custom or torch, not linear",
        ),
        (["function.kind=custom", "function.factory=mtl.differentiable:Nothing"], "function.factory = .* no attribute"),
        (["function.kind=custom", "function.factory=mtl.firstorder:LBFGS"], "function.factory = .*TypeError"),
        (["oracle.kind=identity"], "needs attributes of inputs"),
    ],
)
def test_contradictory_settings_say_what_would_be_right(assignments: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _function_basis(configured(*assignments), np.ones((4, 3)), np.ones(2), True)


def test_a_user_s_gradient_is_checked_before_training_and_a_built_in_one_is_trusted() -> None:
    own = configured("function.kind=custom", "function.factory=test_firstorder:Broken")
    with pytest.raises(OracleError, match="wrong in parameter 4"):
        _function_basis(own, np.random.default_rng(0).normal(size=(40, 3)), np.ones(2), True)
    assert _function_basis(configured(), np.ones((4, 3)), np.ones(2), False).theta.shape == (6,)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def test_without_pytorch_its_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    wanted = configured("function.kind=torch", "function.factory=test_firstorder:two_layers").function
    with pytest.raises(ConfigError, match=r"pip install .oracle-mtl\[torch\]"):
        make_function(wanted, 3, 2, 0)


def two_layers(p: int, d: int):
    torch = pytest.importorskip("torch")
    return torch.nn.Sequential(torch.nn.Linear(p, 6), torch.nn.Tanh(), torch.nn.Linear(6, d))


def test_a_torch_module_has_the_gradient_of_its_values_and_trains() -> None:
    pytest.importorskip("torch")
    function = TorchFunction.of(two_layers, 3, 3, seed=1)
    np.testing.assert_array_equal(
        function.start(3, 3, 0), TorchFunction.of(two_layers, 3, 3, seed=1).start(3, 3, 0), "the start is repeatable"
    )
    check_gradient(function, 3, 3)
    problem = planted(1)
    fit = train(problem, basis(problem, function, optimizer=LBFGS(10)), 2, Schedule(6))
    assert np.diff(fit.objective).max() <= 1e-9 * np.abs(fit.objective).max()
    back = cloudpickle.loads(cloudpickle.dumps(fit.inputs))
    z = problem.input_attributes
    np.testing.assert_array_equal(back.mean(z), fit.inputs.mean(z))
