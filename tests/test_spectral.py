"""The spectral embedding against SciPy's singular vectors, in one block and in several."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from mtl import spectral
from mtl.blocks import EventBlock, build

USERS, INPUTS, SILENT = 120, 60, 3


def pattern(seed: int = 0, groups: int = 4) -> sp.csr_matrix:
    """Users and inputs of a few groups that meet within their group more often; the last inputs have no events."""
    rng = np.random.default_rng(seed)
    same = rng.integers(groups, size=(USERS, 1)) == rng.integers(groups, size=INPUTS)
    acted = rng.random((USERS, INPUTS)) < np.where(same, 0.5, 0.1)
    acted[:, -SILENT:] = False
    return sp.csr_matrix(acted.astype(float))


def blocks_of(matrix: sp.csr_matrix, n: int = 1) -> list[EventBlock]:
    """The users dealt out to n blocks; one more user in the last has attributes and no events."""
    found = []
    for part in range(n):
        rows = matrix[part::n].tocoo()
        users = pa.array([f"u{n * row + part}" for row in rows.row], pa.string())
        silent = pa.array(["silent"] if part == n - 1 else [], pa.string())
        ones = np.ones(rows.nnz)
        found.append(build(users, rows.col, 3 * ones, 2 * ones, silent, np.ones((len(silent), 1))))
    return found


def embedding(blocks: list[EventBlock], m: int | None, **how) -> spectral.Spectral:
    return spectral.fit(lambda work: map(work, blocks), INPUTS, m, **how)


def by_user(found: spectral.Spectral, blocks: list[EventBlock]) -> dict[str, np.ndarray]:
    return {
        user: row
        for block in blocks
        for user, row in zip(block.users.to_pylist(), found.of_users(block, slice(0, len(block))), strict=True)
    }


def scale(found: spectral.Spectral) -> np.ndarray:
    return spectral.LARGEST_DEVIATION * found.values / found.values[0]


def standardized(vectors: np.ndarray) -> np.ndarray:
    return (vectors - vectors.mean(0)) / vectors.std(0)


def test_the_embedding_is_the_singular_vectors_beside_the_first_scaled_by_their_values() -> None:
    matrix = pattern()
    left, right = (1 / np.sqrt(np.maximum(np.asarray(matrix.sum(axis)).ravel(), 1)) for axis in (1, 0))
    u, values, vt = svds(sp.diags(left) @ matrix @ sp.diags(right), k=6, random_state=0)
    order = np.argsort(-values)
    assert values[order[0]] == pytest.approx(1)
    blocks = blocks_of(matrix)
    found = embedding(blocks, 5, cycles=30)
    np.testing.assert_allclose(found.values, values[order[1:]], rtol=1e-3)
    seen = standardized(vt[order[1:], :-SILENT].T)
    agreement = np.mean(seen * found.of_inputs()[:-SILENT], axis=0) / scale(found)
    np.testing.assert_allclose(np.abs(agreement[:3]), 1, atol=1e-3)
    rows = by_user(found, blocks)
    users = np.array([rows[f"u{i}"] for i in range(USERS)])
    expected = np.sign(agreement[:3]) * standardized(u[:, order[1:4]]) * scale(found)[:3]
    np.testing.assert_allclose(users[:, :3], expected, atol=0.02)
    for side in users, found.of_inputs()[:-SILENT]:
        np.testing.assert_allclose([side.mean(0), side.std(0)], [np.zeros(5), scale(found)], atol=1e-8)


def test_a_vector_reproduces_itself_through_the_events() -> None:
    """An independent check of all dimensions at once: v_j = Nᵀ u_j / σ_j."""
    matrix = pattern(1)
    blocks = blocks_of(matrix)
    found = embedding(blocks, 4, cycles=100)
    rows = by_user(found, blocks)
    users = np.array([rows[f"u{i}"] for i in range(USERS)]) + found.user_centre
    left, right = (1 / np.sqrt(np.maximum(np.asarray(matrix.sum(axis)).ravel(), 1))[:, None] for axis in (1, 0))
    again = standardized((right * (matrix.T @ (left * users)))[:-SILENT])
    agreement = np.mean(again * found.of_inputs()[:-SILENT], axis=0) / scale(found)
    np.testing.assert_allclose(agreement, 1, atol=1e-3)


def test_vectors_keep_their_deviation_however_many_users_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "_SMALLEST", 0.01)  # of σ, and much above the variance 1/n of a vector over n users
    blocks = blocks_of(sp.vstack([pattern()] * 50).tocsr())
    found = embedding(blocks, 3, cycles=30)
    users = np.array([row for user, row in by_user(found, blocks).items() if user != "silent"])
    np.testing.assert_allclose(users.std(0), scale(found), rtol=1e-6)


def test_users_in_several_blocks_get_what_they_get_in_one() -> None:
    matrix = pattern()
    one, several = blocks_of(matrix), blocks_of(matrix, 3)
    a, b = embedding(one, 4), embedding(several, 4)
    np.testing.assert_allclose(a.of_inputs(), b.of_inputs(), atol=1e-8)
    left, right = by_user(a, one), by_user(b, several)
    assert left.keys() == right.keys()
    for user in left:
        np.testing.assert_allclose(left[user], right[user], atol=1e-8)


def test_who_has_no_events_is_average() -> None:
    blocks = blocks_of(pattern())
    found = embedding(blocks, 4)
    assert not found.of_inputs()[-SILENT:].any()
    assert not by_user(found, blocks)["silent"].any()
    assert found.of_inputs()[:-SILENT].all()


def test_labels_weights_and_repeated_pairs_do_not_matter() -> None:
    matrix = pattern()
    rows = matrix.tocoo()
    twice = np.concatenate([np.arange(rows.nnz), np.arange(rows.nnz)])
    users = pa.array([f"u{i}" for i in rows.row[twice]])
    rng = np.random.default_rng(0)
    labels, weights = rng.normal(size=len(twice)), rng.gamma(1, size=len(twice))
    other = [build(users, rows.col[twice], labels, weights, pa.array([], pa.string()), np.ones((0, 1)))]
    np.testing.assert_allclose(embedding(other, 4).of_inputs(), embedding(blocks_of(matrix), 4).of_inputs(), atol=1e-8)


def test_as_many_dimensions_as_there_are_groups_stand_out_of_noise() -> None:
    assert embedding(blocks_of(pattern(groups=4)), None).dimensions == 3
    assert embedding(blocks_of(pattern(groups=1)), None).dimensions == 0


def test_a_pattern_too_small_for_any_dimension_gives_none() -> None:
    everything = sp.csr_matrix(np.ones((USERS, INPUTS)))
    for matrix in (everything, sp.csr_matrix((USERS, INPUTS)), everything[:1]):
        blocks = blocks_of(matrix)
        found = embedding(blocks, 4)
        assert found.dimensions == 0
        assert found.of_inputs().shape == (INPUTS, 0)
        assert found.of_users(blocks[0], slice(0, len(blocks[0]))).shape == (len(blocks[0]), 0)
