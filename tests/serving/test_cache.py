"""Caches: the least recently used goes, bytes stay bounded, threads share one."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl import gaussian
from mtl.errors import ConfigError
from mtl.features import Features
from mtl.serving import cache, scorer
from mtl.serving.cache import PredictionCache, RowCache

ROW = 8 * 2 + cache._ENTRY_BYTES


def some_features(n: int, d: int, seed: int = 0) -> Features:
    random = np.random.default_rng(seed)
    covariance = np.tile(gaussian.pack(0.1 * np.eye(d)), (n, 1))
    return Features.of(random.normal(size=(n, d)), covariance, 3.0)


@given(st.integers(1, 6), st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_what_goes_is_what_a_linked_list_would_let_go(capacity: int, steps: list[tuple[bool, int]]) -> None:
    rows = RowCache(2, capacity * (ROW + sys.getsizeof(b"0")))
    expected: OrderedDict[bytes, int] = OrderedDict()
    for time, (is_put, number) in enumerate(steps):
        key = str(number).encode()
        if is_put:
            rows.put([key], np.full((1, 2), float(time)))
            expected[key] = time
            expected.move_to_end(key)
            if len(expected) > capacity:
                expected.popitem(last=False)
        else:
            found, held = rows.get([key])
            assert held.tolist() == [key in expected]
            if key in expected:
                expected.move_to_end(key)
                np.testing.assert_array_equal(found, [[expected[key]] * 2])


def test_features_come_back_as_they_were() -> None:
    features, held = some_features(5, 4), RowCache(scorer.width(4), 100_000)
    held.put(list("abcde"), scorer.feature_rows(features))
    rows, is_held = held.get(["c", "x", "a"])
    assert is_held.tolist() == [True, False, True]
    found = scorer.features_of(rows, 4)
    for name, values in vars(features.take(np.array([2, 0]))).items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-12)
    counts = held.counts()
    assert (counts.hits, counts.misses, counts.evictions, counts.rows) == (2, 1, 0, 5)


def test_memory_that_a_full_cache_takes_is_within_its_bound() -> None:
    bound, d, n = 8_000_000, 11, 1000
    keys = np.random.default_rng(0).bytes(16 * 40 * n)
    rows = scorer.feature_rows(some_features(n, d))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    held = RowCache(scorer.width(d), bound)
    for part in range(40):
        held.put([keys[16 * (part * n + i) : 16 * (part * n + i + 1)] for i in range(n)], rows)
        assert held.counts().bytes <= bound
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held.counts().evictions > 0
    assert 0.7 * bound < taken < 1.05 * bound


def test_long_keys_count() -> None:
    held = RowCache(2, 100_000)
    for i in range(200):
        held.put([bytes(5000) + str(i).encode()], np.zeros((1, 2)))
    assert held.counts().rows < 20
    held.put([bytes(200_000)], np.zeros((1, 2)))  # larger than all of it: not kept, nothing else lost
    assert held.counts().rows > 10


def test_an_update_of_the_user_leaves_its_old_predictions_behind() -> None:
    held = PredictionCache(10_000)
    held.put("u", 1, ["a", "b"], np.array([1.0, 2.0]), np.array([0.1, 0.2]))
    found, is_held = held.get("u", 1, ["b", "c"])
    assert is_held.tolist() == [True, False]
    np.testing.assert_array_equal(found, [[2.0, 0.2]])
    assert not held.get("u", 2, ["a", "b"])[1].any()
    assert not held.get("v", 1, ["a", "b"])[1].any()


def test_threads_never_see_a_row_of_another_key() -> None:
    held, wrong = RowCache(8, 40 * (8 * 8 + cache._ENTRY_BYTES + 40)), []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(3000):
            keys = random.integers(0, 120, 5).tolist()
            found, is_held = held.get(keys)
            expected = np.array(keys, float)[is_held]
            wrong.extend(found[(found != expected[:, None]).any(1)].tolist())
            held.put(keys, np.repeat(np.array(keys, float)[:, None], 8, 1))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    counts = held.counts()
    assert counts.hits + counts.misses == 4 * 3000 * 5
    assert counts.evictions > 0


def test_a_cache_too_small_for_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no row"):
        RowCache(20, 100)
