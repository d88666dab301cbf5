"""The hand-over from observations to rows: in every state between its commits an event counts once."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from made_up import EVENTS_BEFORE, VERSION, fill

from mtl import gaussian
from mtl.config import load_settings
from mtl.serving import overlay, scorer
from mtl.serving import view as views
from mtl.serving.observations import Event
from mtl.serving.overlay import Pending, open_overlay
from mtl.serving.records import digest, pack_described, pack_users
from mtl.serving.scorer import covariance_of, features_of
from mtl.serving.store import Store
from mtl.serving.view import View, open_view


def event(i: int, user: str = "u1", input: str = "x1") -> Event:
    return Event(f"e{i}", user, input, 4.0, 1.0, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def view(tmp_path: Path) -> View:
    store = Store(tmp_path, 1)
    fill(store, 5, 5, 2)
    found = open_view(store, open_overlay(tmp_path, []), load_settings([], ["serve.users_cached=10"]).serve)
    assert found is not None
    return found


def counted(view: View, user: str = "u1") -> int:
    found = view.weights_of(user)
    assert found is not None
    several, is_known = view.weights_of_several([user])
    assert is_known == [True]
    assert several.quadratic[0].tolist() == found.quadratic.tolist()
    return found.n_events


def write_row(view: View, cycle: int, n_events: int) -> None:
    before = view.unknown_weights
    users = np.concatenate([before.mean, before.quadratic])[None]
    view.store.write_users(VERSION, [(digest("u1"), next(pack_users(cycle, [n_events], users)))])


def hand_over(view: View) -> list[int]:
    """What a reader counts after each commit of the hand-over, beyond the events before."""
    seen = [counted(view)]
    view.overlay.insert([(event(0), False)])
    seen.append(counted(view))
    every = view.overlay.every()
    for pending in every.values():
        pending.covered = (VERSION, 7)
    view.overlay.write(every)
    seen.append(counted(view))
    write_row(view, 7, EVENTS_BEFORE + 1)
    seen.append(counted(view))
    view.overlay.delete(every)
    seen.append(counted(view))
    return [n - EVENTS_BEFORE for n in seen]


def test_an_event_counts_once_after_every_commit_of_the_hand_over(view: View) -> None:
    assert hand_over(view) == [0, 1, 1, 1, 1]


def test_without_the_marks_it_would_count_twice(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "is_covered", lambda pending, version, record: False)
    assert hand_over(view) == [0, 1, 1, 2, 1]


def test_a_mark_of_another_version_does_not_count(view: View) -> None:
    view.overlay.insert([(event(0), False)])
    every = view.overlay.every()
    for pending in every.values():
        pending.covered = (VERSION + 1, 0)
    view.overlay.write(every)
    assert counted(view) == EVENTS_BEFORE + 1


def test_the_posterior_is_that_of_the_sums(view: View) -> None:
    """Against the closed form: precision and information of the row and of the event's features."""
    before = view.weights_of("u1")
    assert before is not None
    view.overlay.insert([(event(0), False), (event(1, input="x2"), False)])
    after = view.weights_of("u1")
    assert after is not None
    d, noise = view.d, view.model.noise
    rows = view.rows_of(["x1", "x2"]).rows
    full = gaussian.unpack(covariance_of(before)[None], d)[0]
    shared = features_of(rows, d)
    precision = np.linalg.inv(full) + gaussian.unpack(shared.second_moment, d).sum(0) / noise
    information = np.linalg.solve(full, before.mean) + (4.0 * shared.phi - shared.offset_phi).sum(0) / noise
    np.testing.assert_allclose(after.mean, np.linalg.solve(precision, information), atol=1e-10)
    found = gaussian.unpack(covariance_of(after)[None], d)[0]
    np.testing.assert_allclose(found, np.linalg.inv(precision), atol=1e-10)


def test_the_same_id_is_added_once(view: View) -> None:
    assert view.overlay.insert([(event(0), True), (event(0), True), (event(1), True)]) == [True, False, True]
    assert view.overlay.insert([(event(1), True)]) == [False]
    assert view.overlay.n_pending() == 2
    view.overlay.delete(view.overlay.every())
    assert view.overlay.insert([(event(0), True)]) == [False]  # known still
    assert view.overlay.forget_ids(before=2e9) == 2
    assert view.overlay.insert([(event(0), True)]) == [True]


def test_an_observation_of_an_input_without_features_is_kept_and_does_not_count(view: View) -> None:
    view.overlay.insert([(event(0, input="nothing"), False)])
    assert counted(view) == EVENTS_BEFORE


def test_an_observation_of_a_new_user_counts_on_the_prior(view: View) -> None:
    assert view.weights_of("new") is None
    view.overlay.insert([(event(0, user="new"), False)])
    assert counted(view, "new") == 1


def test_several_users_are_each_what_they_are_alone(view: View) -> None:
    """A row, nothing, attributes alone, observations on each of these, and what a request says of its own."""
    described = view.weights_of_described({"age": 1.0})
    view.store.write_users(VERSION, [(digest(one), pack_described(0, described.mean)) for one in ("told", "told, new")])
    view.overlay.insert([(event(i, user), False) for i, user in enumerate(["u2", "new", "told, new"])])
    own = scorer.moved(view.unknown_weights, 0.75, 0.25)
    users = ["u1", "nobody", "told", "u2", "new", "told, new", own]
    several, is_known = view.weights_of_several(users)
    assert is_known == [True, False, True, True, True, True, True]
    for i, user in enumerate(users):
        alone = user if isinstance(user, scorer.Weights) else view.weights_of(user) or view.unknown_weights
        assert several.mean[i].tolist() == alone.mean.tolist()
        assert several.quadratic[i].tolist() == alone.quadratic.tolist()
        assert several.offset[i].item() == alone.offset
    assert len(np.unique(several.quadratic, axis=0)) == len(users)


def test_after_a_start_of_the_machine_it_is_made_from_the_log(tmp_path: Path) -> None:
    first = open_overlay(tmp_path, [])
    first.insert([(event(0), False)])
    first.close()
    again = open_overlay(tmp_path, [event(5)])
    assert [p.event.event_id for p in again.every().values()] == ["e0"]
    again.set_boot("another")
    again.close()
    anew = open_overlay(tmp_path, [event(0), event(1), event(2)], lambda event_id: event_id == "e1")
    assert [p.event.event_id for p in anew.every().values()] == ["e0", "e2"]
    assert all(p.look_up for p in anew.every().values())
    anew.close()


def test_a_damaged_overlay_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "overlay.lmdb").write_bytes(b"nonsense" * 2000)
    overlay = open_overlay(tmp_path, [event(0)])
    assert overlay.n_pending() == 1
    overlay.close()


def test_pending_rows_read_as_written() -> None:
    pending = Pending(event(0), True, (3, 1), (2, 9))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(pending), type=Pending) == pending


def test_observations_do_not_wait_for_a_look_for_old_ids(view: View) -> None:
    view.overlay.insert([(event(0), False)])
    looking = threading.Thread(target=view.overlay.forget_ids, args=(0.0,), daemon=True)
    with view.overlay.environment.begin(write=True):  # as of a worker that inserts
        looking.start()
        looking.join(5)
        waited = looking.is_alive()
    assert not waited


def test_ids_are_forgotten_part_by_part(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "_AT_ONCE", 3)
    view.overlay.insert([(event(i), False) for i in range(10)])
    view.overlay.delete([key for key, pending in view.overlay.every().items() if pending.event.event_id != "e4"])
    assert view.overlay.forget_ids(before=2e9) == 9
    assert [i for i in range(10) if view.overlay.knows(f"e{i}")] == [4]


def test_what_is_learnt_of_an_observation_is_in_every_sight_of_its_user_at_once(view: View) -> None:
    view.overlay.insert([(event(1), True)])
    assert counted(view) == EVENTS_BEFORE + 1  # and kept
    ((key, pending),) = view.overlay.every().items()
    pending.landed, pending.covered = (0, 0), (VERSION, 0)  # its row has it, for it was in the table before
    view.overlay.write({key: pending})
    assert counted(view) == EVENTS_BEFORE
