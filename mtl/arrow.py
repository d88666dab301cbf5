"""Matrices as Arrow columns of lists, and back without a copy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mtl.gaussian import Array


def lists(matrix: Array) -> pa.Array:
    """(n, m) → n lists of m numbers."""
    offsets = np.arange(len(matrix) + 1, dtype=np.int64) * matrix.shape[1]
    values = pa.array(np.ascontiguousarray(matrix).ravel())
    if offsets[-1] < 2**31:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def matrix(column: pa.Array | pa.ChunkedArray, m: int) -> Array:
    """n lists of m numbers each → (n, m)."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), m)


def fill(into: Array, place: np.ndarray, column: pa.ChunkedArray) -> None:
    """``into[place[i]]`` = the i-th list of the column, of those that are no null and have a place, which is not negative.

    Chunk by chunk: a copy of the whole column, or of a part of it, costs as much as what is done with it.
    """
    first = 0
    for chunk in column.chunks:
        of_lists = place[first : first + len(chunk)][chunk.is_valid().to_numpy(zero_copy_only=False)]
        values = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, into.shape[1])
        wanted = of_lists >= 0
        into[of_lists[wanted]] = values if wanted.all() else values[wanted]
        first += len(chunk)
