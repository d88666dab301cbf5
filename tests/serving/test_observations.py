"""The log of observations: what was acknowledged is in it, whole, and ingest never sees what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtl.errors import StateError
from mtl.serving import observations
from mtl.serving.observations import Event, ObservationLog, parse, read, recover, sealed


def event(i: int) -> Event:
    return Event(f"e{i}", "u", "x\n", 1.5, 1.0, "2026-01-01T00:00:00+00:00")


def test_sealed_segments_hold_what_was_appended_in_order(tmp_path: Path) -> None:
    log = ObservationLog(tmp_path)
    log.append([event(0), event(1)])
    assert sealed(tmp_path) == []  # ingest does not see it yet
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    log.append([event(2)])
    log.seal()
    log.append([event(3)])
    log.seal()
    assert sorted(e.event_id for e in read(sealed(tmp_path))) == ["e0", "e1", "e2", "e3"]
    assert all(path.name.startswith("observed-") for path in tmp_path.iterdir())


def test_a_segment_without_rows_leaves_no_file(tmp_path: Path) -> None:
    log = ObservationLog(tmp_path)
    log.seal()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [b"", b'{"event_id":"e9"', b"\xff"])
def test_a_segment_of_a_dead_writer_is_recovered_without_its_torn_end(tmp_path: Path, torn: bytes) -> None:
    log = ObservationLog(tmp_path)
    log.append([event(0), event(1)])
    path = next(tmp_path.iterdir())
    with open(path, "ab") as file:
        file.write(torn)
    kept: list[Event] = []
    assert recover(tmp_path, lambda lines: kept.extend(parse(lines))) == 0  # its writer lives
    assert log._file is not None
    os.close(log._file)  # the writer dies
    assert recover(tmp_path, lambda lines: kept.extend(parse(lines))) == 1
    assert [e.event_id for e in kept] == [e.event_id for e in read(sealed(tmp_path))] == ["e0", "e1"]
    assert recover(tmp_path, kept.extend) == 0


def test_a_segment_stays_hidden_when_its_events_could_not_be_kept(tmp_path: Path) -> None:
    log = ObservationLog(tmp_path)
    log.append([event(0)])
    assert log._file is not None
    os.close(log._file)

    def fail(lines: list[bytes]) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        recover(tmp_path, fail)
    assert sealed(tmp_path) == []
    assert recover(tmp_path, lambda lines: None) == 1


def test_after_a_failed_write_nothing_of_it_is_ever_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ObservationLog(tmp_path)
    log.append([event(0)])
    real = os.fsync

    def fail(file: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        log.append([event(1)])
    log.append([event(2)])
    log.seal()
    assert sorted(e.event_id for e in read(sealed(tmp_path))) == ["e0", "e2"]


def test_a_damaged_line_is_named_with_its_file(tmp_path: Path) -> None:
    log = ObservationLog(tmp_path)
    log.append([event(0), event(1)])
    log.seal()
    (path,) = sealed(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"e1", b'"'))
    with pytest.raises(StateError, match=rf"{path.name}: line 2 is damaged"):
        list(read([path]))


def test_after_a_segment_was_deleted_another_is_begun(tmp_path: Path) -> None:
    log = ObservationLog(tmp_path)
    log.append([event(0)])
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(FileNotFoundError):
        log.seal()
    log.append([event(1)])
    log.seal()
    assert [e.event_id for e in read(sealed(tmp_path))] == ["e1"]


def test_a_segment_that_cannot_be_renamed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ObservationLog(tmp_path)
    log.append([event(0)])

    def fail(path: Path) -> None:
        raise OSError("disk failed")

    with monkeypatch.context() as patch:
        patch.setattr(observations, "_rename", fail)
        with pytest.raises(OSError, match="disk failed"):
            log.seal()
    log.append([event(1)])
    log.seal()
    assert [e.event_id for e in read(sealed(tmp_path))] == ["e0", "e1"]
    assert log.size == 0


def test_lines_that_are_damaged_are_put_aside_and_the_others_recovered(tmp_path: Path) -> None:
    """As a machine that lost power may leave them: pages of a group reach the disk in any order."""
    log = ObservationLog(tmp_path)
    log.append([event(0), event(1)])
    assert log._file is not None
    os.close(log._file)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n" + b"\0" * 300 + b"\n", 1))
    kept: list[Event] = []
    assert recover(tmp_path, lambda lines: kept.extend(parse(lines))) == 1
    assert [e.event_id for e in kept] == [e.event_id for e in read(sealed(tmp_path))] == ["e0", "e1"]
    (aside,) = tmp_path.glob(".damaged-*")
    assert aside.read_bytes() == b"\0" * 300 + b"\n"


def test_a_segment_that_cannot_be_begun_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(observations, "_sync_folder", fail)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="no"):
            ObservationLog(tmp_path).append([event(0)])
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []
