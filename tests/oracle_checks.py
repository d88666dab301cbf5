"""What every oracle must do, whatever it is made of: subclass and give the fixture ``oracle``."""

from __future__ import annotations

import cloudpickle
import numpy as np

from mtl.gaussian import Array
from mtl.regressors import Oracle


def grid(n: int, seed: int = 0) -> tuple[Array, Array]:
    """Attributes on a small grid, the constant first, and a noisy target linear in them: fair to lines and to trees."""
    random = np.random.default_rng(seed)
    z = np.column_stack([np.ones(n), random.integers(-2, 3, (n, 2)) / 2.0])
    return z, z @ np.array([1.0, 2.0, -1.0]) + 0.3 * random.normal(size=n)


class OracleChecks:
    def test_predictions_are_one_finite_number_a_row_that_tell_the_target(self, oracle: Oracle) -> None:
        z, target = grid(300)
        function = oracle(z, target, np.ones(300))
        new, expected = grid(40, seed=1)
        values = function.predict(new)
        assert values.shape == (40,)
        assert np.isfinite(values).all()
        assert np.mean((values - expected) ** 2) < 0.2 * expected.var()

    def test_a_weight_counts_as_that_many_rows(self, oracle: Oracle) -> None:
        z, target = grid(300)
        weight = np.random.default_rng(2).integers(1, 6, 300)
        weighted = oracle(z, target, weight.astype(float)).predict(z)
        repeated = oracle(np.repeat(z, weight, 0), np.repeat(target, weight), np.ones(weight.sum())).predict(z)
        # A penalty counts for a number of average rows, so the two may differ, but little.
        assert np.abs(weighted - repeated).max() < 0.05 * target.std()

    def test_a_row_of_enormous_weight_is_what_the_function_passes_through(self, oracle: Oracle) -> None:
        z, target = grid(300)
        target[0] += 3.0
        plain, heavy = (
            oracle(z, target, np.array([first, *[1.0] * 299])).predict(z[:1])[0] - target[0] for first in (1.0, 1e6)
        )
        assert abs(heavy) < 0.2 * abs(plain)

    def test_the_scale_of_the_weights_does_not_matter(self, oracle: Oracle) -> None:
        z, target = grid(100)
        weight = np.random.default_rng(3).uniform(0.5, 2, 100)
        expected = oracle(z, target, weight).predict(z)
        for scale in (1e-6, 1e6):
            np.testing.assert_allclose(oracle(z, target, scale * weight).predict(z), expected, rtol=1e-6, atol=1e-6)

    def test_a_constant_target_is_predicted_nearly_so(self, oracle: Oracle) -> None:
        z, _ = grid(300)
        np.testing.assert_allclose(oracle(z, np.full(300, 4.0), np.ones(300)).predict(z), 4.0, rtol=0.05)

    def test_one_row_is_enough_to_fit_on_and_to_predict(self, oracle: Oracle) -> None:
        z = np.array([[1.0, 0.5, -0.5]])
        value = oracle(z, np.array([2.0]), np.array([3.0])).predict(z)
        assert value.shape == (1,)
        assert 0 < value[0] <= 2.0 + 1e-9

    def test_what_it_is_given_is_left_as_it_was(self, oracle: Oracle) -> None:
        given = (*grid(50), np.full(50, 2.0))
        before = [array.copy() for array in given]
        oracle(*given)
        for array, copy in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, copy)

    def test_a_stored_function_predicts_the_same(self, oracle: Oracle) -> None:
        z, target = grid(60)
        function = oracle(z, target, np.ones(60))
        np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(function)).predict(z), function.predict(z))
