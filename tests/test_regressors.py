"""Sums of fitted functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mtl.gaussian import Array
from mtl.regressors import Linear, Stages, combine

Z = np.random.default_rng(0).normal(size=(50, 3))


@dataclass(frozen=True)
class Power:
    exponent: int

    def predict(self, attributes: Array) -> Array:
        return attributes[:, 0] ** self.exponent


def test_a_sum_predicts_the_sum_however_it_was_nested() -> None:
    inner = combine([(0.5, Power(2)), (2.0, Linear(np.ones(3), 1.0))])
    outer = combine([(0.25, inner), (1.0, Power(3)), (-1.0, Linear(np.arange(3.0)))])
    line = 0.5 * (Z.sum(1) + 1) - Z @ np.arange(3.0)
    np.testing.assert_allclose(outer.predict(Z), Z[:, 0] ** 2 / 8 + Z[:, 0] ** 3 + line, atol=1e-12)
    assert len(outer.stages) == 3  # two powers and one line


def test_lines_add_up_to_a_line() -> None:
    line = combine([(0.3, Linear(np.ones(3))), (0.7, Linear(np.arange(3.0), 2.0))])
    assert isinstance(line, Linear)
    np.testing.assert_allclose(line.coefficients, 0.3 + 0.7 * np.arange(3))
    assert line.intercept == pytest.approx(1.4)


def test_what_adds_nothing_is_left_out() -> None:
    assert combine([(1.0, Linear(np.zeros(3))), (1.0, Power(1))]) == Power(1)
    assert combine([(0.0, Power(2)), (0.5, Power(1))]) == Stages(((0.5, Power(1)),))
    np.testing.assert_array_equal(combine([(0.0, Power(2))]).predict(Z), np.zeros(50))
