"""Equivalence classes: what shares one, and the bound on what sharing costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl import gaussian
from mtl.features import Features
from mtl.serving import scorer
from mtl.serving.cache import RowCache
from mtl.serving.classes import ClassFunction, Clustered, Exact, Extents, Hashed, Rounded, vectors


def features_of(z: np.ndarray, d: int) -> Features:
    """A black box: smooth but far from linear, with some spread about its mean."""
    j = np.arange(d)
    mean = np.sin(z[:, :1] * (1 + j)) + np.abs(z[:, 1:2] - 0.3 * j) * (1 + j % 3)
    return Features.of(mean, np.tile(gaussian.pack(0.1 * np.eye(d)), (len(z), 1)), 2.0)


def functions(z: np.ndarray, coarseness: float) -> list[ClassFunction]:
    m = max(1, int(len(z) * (1 - coarseness)))
    return [
        Exact(),
        Rounded(0.01 + coarseness),
        Hashed.draw(z.shape[1], 0.01 + 3 * coarseness),
        Clustered.fit(z, m),
    ]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0, 0.95), st.integers(1, 6))
def test_the_bound_holds_on_every_request_of_a_run(seed: int, coarseness: float, d: int) -> None:
    random = np.random.default_rng(seed)
    catalogue = random.normal(size=(60, 3))
    features = features_of(catalogue, d)
    scale = random.uniform(0.2, 2, d)
    for function in functions(catalogue, coarseness):
        extents = Extents.measure(function(catalogue), features, scale)
        rows = scorer.feature_rows(features)
        cache = RowCache(rows.shape[1], 20 * 8 * 200)  # small: representatives come, go and change
        for _ in range(40):
            asked = random.integers(len(catalogue), size=5)
            w = scale * random.normal(size=d)
            keys = function(catalogue[asked])
            missing = np.flatnonzero(~cache.get(keys)[1])
            cache.put([keys[i] for i in missing], rows[asked[missing]])
            found, held = cache.get(keys)
            assert held.all()
            h, h_used = (f.offset + f.phi @ w for f in (features.take(asked), scorer.features_of(found, d)))
            bound = extents.bound(keys, w, h_used)
            assert np.isfinite(bound).all()
            assert (np.abs(h - h_used) <= bound + 1e-9 * (1 + np.abs(h))).all()


def test_the_run_finds_a_bound_that_is_too_small() -> None:
    random = np.random.default_rng(0)
    catalogue = random.normal(size=(60, 3))
    function, features = Rounded(2.0), features_of(catalogue, 3)
    keys = function(catalogue)
    extents = Extents.measure(keys, features)
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    used = features.take(np.array([first[key] for key in keys]))
    w = random.normal(size=3)
    error = np.abs(features.phi @ w + features.offset - used.phi @ w - used.offset)
    bound = extents.bound(keys, w, used.offset + used.phi @ w)
    assert (error > bound / 4).any()  # it is of the size of the errors, not merely above them
    assert (error <= bound + 1e-9).all()


def test_range_is_that_of_a_box_worked_by_hand() -> None:
    # c = (2, 1) and (4, −1): with w = (10, 3), h = 10 + 2 + 3 and 10 + 4 − 3; the box alone says 10 + [2 − 3, 4 + 3].
    features = Features.of(np.array([[2.0, 1.0], [4.0, -1.0]]), np.zeros((2, 3)), 0.0)
    extents = Extents.measure([b"a", b"a"], features, np.array([1.0, 1.0]))
    # The ball: centre (3, 0), radius √2, ‖(1, 3)‖ = √10: 13 ± √20, inside 10 + [−1, 7] on both sides? 8.53 … 17.47.
    low, high = extents.range([b"a"], np.array([10.0, 3.0]))
    assert low == pytest.approx(max(9.0, 13 - 20**0.5))
    assert high == pytest.approx(min(17.0, 13 + 20**0.5))
    # In the scale (1, 3) the ball's radius is √10 and ‖v/s‖ = √2: the same √20; in the scale (3, 1), √10 · √(1/9 + 9).
    other = Extents.measure([b"a", b"a"], features, np.array([3.0, 1.0]))
    assert other.range([b"a"], np.array([10.0, 3.0]))[0] == pytest.approx(9.0)


@pytest.mark.parametrize("members", [3, 9, 39])
def test_for_inputs_never_measured_the_bound_fails_no_more_often_than_stated(members: int) -> None:
    random, runs, failed = np.random.default_rng(members), 3000, 0
    for _ in range(runs):
        c = random.standard_t(3, size=(members + 1, 2))
        features = Features.of(c, np.zeros((members + 1, 3)), 0.0)
        known = np.arange(members)
        extents = Extents.measure([b"a"] * members, features.take(known))
        w = random.normal(size=2)
        h = features.offset + features.phi @ w
        failed += not (abs(h[-1] - h[0]) <= extents.bound([b"a"], w, h[:1])[0])
    stated = float(extents.chance([b"a"])[0])
    assert stated == 2 / (members + 1)
    assert failed / runs <= stated + 3 * (stated / runs) ** 0.5
    assert failed > 0


def test_a_class_never_measured_has_no_bound() -> None:
    extents = Extents.measure([b"a"], features_of(np.zeros((1, 3)), 2))
    assert extents.bound([b"b"], np.ones(2), np.zeros(1)).tolist() == [np.inf]
    assert extents.chance([b"b", b"a"]).tolist() == [1.0, 1.0]


def test_what_is_equal_shares_a_class_whatever_the_function() -> None:
    z = np.random.default_rng(0).normal(size=(30, 3))
    for function in functions(z, 0.3):
        assert function(z) == function(z.copy())
        assert function(z[::-1]) == function(z)[::-1]
        assert all(len(key) == 16 for key in function(z))
    assert Exact()(np.array([[0.0]])) == Exact()(np.array([[-0.0]]))
    assert Rounded(1.0)(np.zeros((1, 2))) != Rounded(0.5)(np.zeros((1, 2)))
    assert Clustered(z[:5])(z[:1]) != Clustered(z[:5] + 1e-9)(z[:1])


def test_coarser_means_fewer_classes() -> None:
    z = np.random.default_rng(0).normal(size=(400, 2))
    for family in (
        [Rounded(step) for step in (0.1, 0.5, 2.0)],
        [Hashed.draw(2, width) for width in (0.1, 1.0, 8.0)],
        [Clustered.fit(z, m) for m in (200, 50, 5)],
    ):
        counts = [len(set(function(z))) for function in family]
        assert counts[0] > counts[1] > counts[2]


def test_rounding_goes_to_the_nearest_multiple() -> None:
    keys = Rounded(0.5)(np.array([[0.24], [-0.24], [0.26], [0.74], [0.76]]))
    assert keys[0] == keys[1] != keys[2] == keys[3] != keys[4]


def test_clusters_are_by_the_nearest_centre() -> None:
    centres = np.random.default_rng(1).normal(size=(7, 3))
    z = np.random.default_rng(2).normal(size=(50, 3))
    nearest = np.linalg.norm(z[:, None] - centres, axis=2).argmin(1)
    keys, of_centres = Clustered(centres)(z), Clustered(centres)(centres)
    assert keys == [of_centres[i] for i in nearest]


def test_near_inputs_share_a_hash_more_often_than_far_ones() -> None:
    random = np.random.default_rng(0)
    z, step = random.normal(size=(2000, 4)), random.normal(size=(2000, 4))
    step /= np.linalg.norm(step, axis=1)[:, None]
    function = Hashed.draw(4, 4.0, m=4)
    shared = [np.mean([a == b for a, b in zip(function(z), function(z + r * step), strict=True)]) for r in (0.1, 1, 4)]
    assert shared[0] > 0.85 > shared[1] > shared[2]
    assert shared[2] < 0.15


def test_vectors_are_offset_and_functions() -> None:
    mean = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(vectors(Features.of(mean, np.zeros((1, 6)), 0.5)), [[1.5, 2, 3]])
