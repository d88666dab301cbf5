"""What training events are, as attributes of both sides."""

from __future__ import annotations

from functools import partial

import numpy as np
from problems import planted

from mtl.config import load_settings
from mtl.implicit import Implicit, Unknown


def test_both_sides_get_as_many_columns_and_none_without_events() -> None:
    problem = planted(1, users=40, inputs=30, events=400)
    users = np.arange(40)
    problem = problem.take((problem.user != 3) & (problem.input != 5))
    blocks = [problem.block(users[users % 2 == i]) for i in range(2)]
    counts = np.bincount(problem.input, minlength=30)
    settings = load_settings([], ["encode.spectral=4"]).encode
    implicit = Implicit.fit(partial(map_blocks, blocks), counts, settings)
    of_inputs = implicit.inputs(counts)
    assert of_inputs.shape == (30, implicit.width) == (30, 5)
    assert not of_inputs[5].any()
    described = [implicit.described(block) for block in blocks]
    of_users = np.vstack([block.attributes[:, 3:] for block in described])
    assert of_users.shape == (40, 5)
    logs = np.log1p(np.concatenate([block.n_events for block in blocks]))
    known = logs > 0
    np.testing.assert_allclose(of_users[known, 0], (logs[known] - logs[known].mean()) / logs[known].std(), atol=1e-12)
    np.testing.assert_allclose(of_users[known].mean(0), 0, atol=1e-12)
    assert not of_users[~known].any()
    np.testing.assert_array_equal(described[0].attributes[:, :3], blocks[0].attributes)


def test_nothing_is_asked_and_nothing_is_computed() -> None:
    settings = load_settings([], ["encode.spectral=0", "encode.activity=false"]).encode
    for implicit in (
        Implicit.fit(None, np.ones(4), settings),
        Implicit.fit(None, np.ones(4), load_settings().encode, nothing=True),
    ):
        assert implicit.width == 0
        assert implicit.inputs(np.ones(4)).shape == (4, 0)


def test_users_of_a_kept_prior_are_average() -> None:
    block = Unknown(3).described(planted(2).block())
    assert not block.attributes[:, -3:].any()


def map_blocks(blocks, work):
    return [work(block) for block in blocks]
