"""Trees without the library that grew them."""

from __future__ import annotations

import numpy as np
import pytest

from mtl.gaussian import Array
from mtl.oracle.trees import parse_trees

Z = np.random.default_rng(0).normal(size=(50, 3))

FOREST = """GBTRegressionModel: uid=GBTRegressor_1, numTrees=2, numFeatures=3
  Tree 0 (weight 1.0):
    If (feature 2 <= -0.1)
     If (feature 0 <= 0.5)
      Predict: 1.0
     Else (feature 0 > 0.5)
      If (feature 0 <= 1.0E-1)
       Predict: -99.0
      Else (feature 0 > 1.0E-1)
       Predict: 2.0
    Else (feature 2 > -0.1)
     Predict: -3.5
  Tree 1 (weight 0.1):
    Predict: 7.0
"""


def by_hand(z: Array) -> Array:
    return np.where(z[:, 2] <= -0.1, np.where(z[:, 0] <= 0.5, 1.0, 2.0), -3.5)


def test_trees_are_read_and_walked() -> None:
    trees = parse_trees(FOREST)
    assert trees is not None
    assert (len(trees.roots), trees.depth) == (2, 3)
    np.testing.assert_allclose(trees.predict(Z), by_hand(Z) + 0.7, rtol=1e-15)
    np.testing.assert_allclose(parse_trees(FOREST, 0.5).predict(Z), (by_hand(Z) + 0.7) / 2, rtol=1e-15)
    assert trees.predict(Z[:0]).shape == (0,)


def test_many_rows_are_walked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.oracle.trees._CELLS", 14)  # 7 rows at once
    np.testing.assert_allclose(parse_trees(FOREST).predict(Z), by_hand(Z) + 0.7, rtol=1e-15)


def test_on_a_threshold_it_is_left_and_where_there_is_no_number_right() -> None:
    rows = np.array([[0.5, 0, -0.1], [0, 0, np.nan]])
    np.testing.assert_allclose(parse_trees(FOREST).predict(rows), [1.7, -2.8])


@pytest.mark.parametrize(
    "line", ["    If (feature 2 in {0.0,1.0})", "    If (age <= -0.1)", "    If (feature 2 <= -0.1) or so"]
)
def test_splits_of_another_kind_are_not_read(line: str) -> None:
    assert parse_trees(FOREST.replace("    If (feature 2 <= -0.1)", line)) is None
