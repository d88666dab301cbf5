"""Matrices and Arrow columns of lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mtl.arrow import fill, lists, matrix

WIDTH = 3


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 6), max_size=4))
def test_fill_puts_every_list_that_has_a_place_there_and_touches_nothing_else(seed: int, sizes: list[int]) -> None:
    random = np.random.default_rng(seed)
    n = sum(sizes)
    values, is_list = random.normal(size=(n, WIDTH)), random.random(n) < 0.7
    place = np.where(random.random(n) < 0.6, random.permutation(n), -1)
    column = pa.array([list(row) if there else None for row, there in zip(values, is_list, strict=True)])
    column = column.cast(pa.list_(pa.float64()))
    starts = np.cumsum([0, *sizes])
    chunks = [column.slice(start, size) for start, size in zip(starts, sizes, strict=False)]
    into = np.full((n, WIDTH), 7.0)
    fill(into, place, pa.chunked_array(chunks, pa.list_(pa.float64())))
    expected = np.full((n, WIDTH), 7.0)
    for row, there, to in zip(values, is_list, place, strict=True):
        if there and to >= 0:
            expected[to] = row
    np.testing.assert_array_equal(into, expected)


def test_a_matrix_comes_back_from_lists() -> None:
    values = np.arange(12.0).reshape(4, WIDTH)
    np.testing.assert_array_equal(matrix(lists(values), WIDTH), values)
