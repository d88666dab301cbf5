"""The n candidates of the largest inner product with each of many vectors: top-k near the price of the matrix product.

The scores of a tile of queries and candidates stay in the cache. Of a tile, the largest score of every group of g candidates
is an elementwise maximum over g slabs, the cheapest reduction there is; the n best candidates are in the n groups of the
largest maxima, and only those are looked through. With g ≈ √(candidates/n) both searches are small beside the product.

Source: the blocked product is MLlib's (Spark's ``ALSModel.recommendForAll``); there the search visits every score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl.arrow import matrix
from mtl.gaussian import Array
from mtl.sharing import share

ID, VECTOR = "id", "vector"
RECOMMENDATIONS, RATING = "recommendations", "rating"

_QUERIES_AT_ONCE, _CANDIDATES_AT_ONCE = 64, 16_384  # a tile of 8 MB
_BLOCK_BYTES = 1 << 28  # of candidates that are sent to the workers together

_FOUND = f"{ID} string, {RECOMMENDATIONS} array<struct<{RATING}: double, {ID}: string>>"


def recommend(queries: DataFrame, candidates: DataFrame, n: int) -> DataFrame:
    """(id, recommendations): for every query the n candidates of the largest inner product, the best first.

    Candidates are sent to the workers in blocks; the tops of several blocks are merged by one shuffle.

    Args:
        queries, candidates: id (text) and vector, all vectors of one length. Candidates are read once to be counted and once
            a block of 256 MB.
        n: at least 1; all candidates where there are fewer.
    """
    spark = queries.sparkSession
    found = [queries.mapInArrow(_in_arrow(share(spark, block), n), _FOUND) for block in _blocks(candidates)]
    if len(found) == 1:
        return found[0]
    best = F.sort_array(F.flatten(F.collect_list(RECOMMENDATIONS)), asc=False)
    return reduce(DataFrame.unionAll, found).groupBy(ID).agg(F.slice(best, 1, n).alias(RECOMMENDATIONS))


def top(queries: Array, candidates: Array, n: int) -> tuple[np.ndarray, Array]:
    """The min(n, c) rows of ``candidates`` with the largest inner products with each query, the best first.

    Args:
        queries: (q, d).
        candidates: (c, d).

    Returns:
        Rows of candidates and inner products, (q, min(n, c)) each.
    """
    n = min(n, len(candidates))
    tiles = max(1, -(-len(candidates) // _CANDIDATES_AT_ONCE))
    step = max(1, -(-len(candidates) // tiles))  # tiles of equal size
    rows, scores = np.empty((len(queries), n), np.int64), np.empty((len(queries), n))
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(first, first + _QUERIES_AT_ONCE)
        columns = np.ascontiguousarray(queries[part].T)
        best: np.ndarray = np.empty((columns.shape[1], 0), np.int64)
        values: Array = np.empty(best.shape)
        for start in range(0, len(candidates), step):
            found = _largest_of_tile(candidates[start : start + step] @ columns, n)
            best = np.concatenate([best, start + found[0]], axis=1)
            values = np.concatenate([values, found[1]], axis=1)
            best, values = _take(best, values, _largest(values, n))
        rows[part], scores[part] = _take(best, values, np.argsort(-values, axis=1, kind="stable"))
    return rows, scores


def _largest_of_tile(tile: Array, n: int) -> tuple[np.ndarray, Array]:
    """Rows and values of the n largest entries of each column of (c, w), (w, min(n, c)) each."""
    c, w = tile.shape
    size = int((c / n) ** 0.5)
    if size < 2:
        rows = _largest(tile.T, n)
        return rows, np.take_along_axis(tile.T, rows, axis=1)
    # Group j is rows j, j + m, j + 2m, …; what is left over after g·m rows is looked through in any case.
    m = c // size
    maxima = np.maximum.reduce(tile[: m * size].reshape(size, m, w), axis=0)
    groups = _largest(maxima.T, n)
    members = (groups[:, :, None] + m * np.arange(size)).reshape(w, -1)
    members = np.concatenate([members, np.broadcast_to(np.arange(m * size, c), (w, c - m * size))], axis=1)
    values = tile.ravel().take(members * w + np.arange(w)[:, None])
    return _take(members, values, _largest(values, n))


def _largest(values: Array, n: int) -> np.ndarray:
    """Columns of the n largest entries of each row, in no order."""
    if n >= values.shape[1]:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, -n, axis=1)[:, -n:]


def _take(rows: np.ndarray, scores: Array, columns: np.ndarray) -> tuple[np.ndarray, Array]:
    return np.take_along_axis(rows, columns, axis=1), np.take_along_axis(scores, columns, axis=1)


def _blocks(candidates: DataFrame) -> Iterator[tuple[pa.Array, Array]]:
    """Ids and vectors of the candidates in blocks of bounded size; one without any where there are none."""
    candidates = candidates.select(ID, VECTOR)
    count, d = candidates.agg(F.count("*"), F.max(F.size(VECTOR))).collect()[0]
    pieces = max(1, -(-count * 8 * (d or 1) // _BLOCK_BYTES))
    for piece in range(pieces):
        rows = candidates if pieces == 1 else candidates.where(F.pmod(F.xxhash64(ID), F.lit(pieces)) == piece)
        table = rows.toArrow()
        yield table[ID].combine_chunks(), matrix(table[VECTOR], d or 1)


def _in_arrow(shared: Any, n: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        ids, candidates = shared.value
        for batch in batches:
            queries = matrix(batch.column(VECTOR), candidates.shape[1])
            rows, scores = top(queries, candidates, n)
            offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
            pairs = [pa.array(scores.ravel()), ids.take(pa.array(rows.ravel()))]
            found = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(pairs, [RATING, ID]))
            yield pa.record_batch([batch.column(ID), found], [ID, RECOMMENDATIONS])

    return partition
