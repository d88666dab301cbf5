"""Top-n by tiles against sorting all scores."""

from __future__ import annotations

import numpy as np
import pytest

from mtl import recommend
from mtl.recommend import top


@pytest.mark.parametrize("n", [1, 3, 10, 40, 200, 500])
@pytest.mark.parametrize("tile", [(64, 16_384), (7, 50), (1, 1)])
def test_the_best_candidates_are_those_of_sorting_all_scores(
    n: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend, "_QUERIES_AT_ONCE", tile[0])
    monkeypatch.setattr(recommend, "_CANDIDATES_AT_ONCE", tile[1])
    random = np.random.default_rng(n)
    queries, candidates = random.normal(size=(23, 4)), random.normal(size=(201, 4))
    all_scores = queries @ candidates.T
    rows, scores = top(queries, candidates, n)
    expected = np.argsort(-all_scores, axis=1)[:, :n]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(all_scores, expected, axis=1), rtol=1e-12, atol=1e-12)


def test_ties_give_as_many_different_candidates_as_asked() -> None:
    rows, scores = top(np.ones((2, 3)), np.ones((100, 3)), 10)
    assert all(len(set(row)) == 10 for row in rows)
    np.testing.assert_array_equal(scores, 3.0)


def test_without_candidates_or_queries_there_is_nothing_to_recommend() -> None:
    assert top(np.ones((2, 3)), np.ones((0, 3)), 5)[0].shape == (2, 0)
    assert top(np.ones((0, 3)), np.ones((4, 3)), 5)[0].shape == (0, 4)
