"""A set of keys in files against Python's own set, with damage and crashes in between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl import idset
from mtl.idset import IdSet

KEYS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40)  # few values: many share a first half


def array(keys: list[tuple[int, int]]) -> np.ndarray:
    return np.array(keys, np.uint64).reshape(-1, 2)


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(KEYS, max_size=8), asked=KEYS, longest=st.sampled_from([8, 1 << 26]))
def test_it_holds_what_was_added_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, batches: list, asked: list, longest: int
) -> None:
    folder = str(tmp_path_factory.mktemp("ids"))
    expected: set[tuple[int, int]] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idset, "_LONGEST", longest)
        for i, batch in enumerate(batches):
            IdSet(folder).add(array(sorted(set(batch))), i)  # opened anew each time
            expected |= set(batch)
    opened = IdSet(folder)
    assert opened.mark == (len(batches) - 1 if batches else None)
    assert len(opened) == len(expected)
    np.testing.assert_array_equal(opened.contains(array(asked)), [key in expected for key in asked])


def test_runs_stay_few_and_only_listed_files_remain(tmp_path: Path) -> None:
    ids, random = IdSet(str(tmp_path)), np.random.default_rng(0)
    keys = random.integers(0, 2**64, (6400, 2), np.uint64, endpoint=False)
    for part in np.split(keys, 64):
        ids.add(part, "x")
    listed = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert len(listed) <= 8
    assert {file.name for file in tmp_path.iterdir()} == {"runs.json", *listed}
    assert len(ids) == 6400
    assert ids.contains(keys).all()
    assert not ids.contains(keys ^ np.uint64(1)).any()


def test_damage_empties_it_and_a_half_written_run_changes_nothing(tmp_path: Path) -> None:
    ids = IdSet(str(tmp_path))
    ids.add(array([(1, 2)]), "before")
    (tmp_path / "part").write_bytes(b"half")
    (tmp_path / "9.npy").write_bytes(b"never listed")
    assert (IdSet(str(tmp_path)).mark, len(IdSet(str(tmp_path)))) == ("before", 1)
    run = next(tmp_path.glob("*.npy"))
    run.write_bytes(run.read_bytes()[:-8])
    assert (IdSet(str(tmp_path)).mark, len(IdSet(str(tmp_path)))) == (None, 0)
