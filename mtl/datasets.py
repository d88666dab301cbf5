"""MovieLens-100K, out of a package that carries it, in our own columns."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mtl.errors import InputError
from mtl.schema import EVENT_TIME, INPUT_ID, LABEL, USER_ID

log = logging.getLogger("mtl")

PACKAGE = "recbole==1.2.1"
SPLITS = (1, 2, 3, 4, 5)
STREAM_FRACTION = 0.1  # of the training part, the last by time

_WHEEL = "recbole-1.2.1-py3-none-any.whl"
_MEMBERS = "recbole/dataset_example/ml-100k/ml-100k."
_PARTS = ("inter", "item", "user")
_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Split:
    """One of the canonical splits: events to train on, to stream and to test on, with all inputs and users."""

    train: pa.Table  # user_id, input_id, label (1 to 5 stars), event_time (seconds since 1970)
    stream: pa.Table
    test: pa.Table
    inputs: pa.Table  # input_id, title, year, genres (a list)
    users: pa.Table  # user_id, age, gender, occupation, zip

    def write(self, folder: Path) -> dict[str, Path]:
        """One Parquet file a table; their paths by name."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {field.name: folder / f"{field.name}.parquet" for field in fields(self)}
        for name, path in paths.items():
            pq.write_table(getattr(self, name), path)
        return paths


def fetch_movielens(folder: str | Path) -> Path:
    """The folder with ml-100k.inter, .item and .user; the package is downloaded the first time only.

    Args:
        folder: cache; a wheel that already lies there is used.

    Raises:
        InputError: the package cannot be had, or is broken.
    """
    folder = Path(folder)
    files = [folder / f"ml-100k.{part}" for part in _PARTS]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        wheel = folder / _WHEEL
        if not wheel.exists():
            _download(folder)
        try:
            with zipfile.ZipFile(wheel) as archive:
                contents = [archive.read(f"{_MEMBERS}{part}") for part in _PARTS]
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f"{wheel} is not the package {PACKAGE} ({error}): delete it and run again") from None
        for file, content in zip(files, contents, strict=True):
            part = file.with_suffix(f"{file.suffix}.part")
            part.write_bytes(content)
            part.replace(file)
    return folder


def movielens(folder: str | Path, split: int) -> Split:
    """The canonical split u1 … u5 of MovieLens-100K.

    Test are the lines (split − 1)·20,000 to split·20,000 of the events in their original order, a fifth of them all;
    the rest is the training part, of which the last tenth by time, equal times in the order of lines, is the stream.

    Args:
        folder: of :func:`fetch_movielens`.

    Raises:
        InputError: a file is missing, or there is no such split.
    """
    if split not in SPLITS:
        raise InputError(f"MovieLens-100K has the splits 1 to 5, not {split}")
    columns = [USER_ID, INPUT_ID, LABEL, EVENT_TIME]
    events = _read(folder, "inter", columns).astype({LABEL: float, EVENT_TIME: np.int64})
    fifth = len(events) // len(SPLITS)
    tested = slice((split - 1) * fifth, split * fifth)
    base = events.drop(events.index[tested]).sort_values(EVENT_TIME, kind="stable")
    first = len(base) - round(STREAM_FRACTION * len(base))
    parts = (base.iloc[:first], base.iloc[first:], events.iloc[tested])

    inputs = _read(folder, "item", [INPUT_ID, "title", "year", "genres"])
    inputs["year"] = pd.to_numeric(inputs["year"], errors="coerce")
    inputs["genres"] = inputs["genres"].fillna("").str.split()
    users = _read(folder, "user", [USER_ID, "age", "gender", "occupation", "zip"]).astype({"age": float})
    return Split(*(pa.Table.from_pandas(frame, preserve_index=False) for frame in (*parts, inputs, users)))


def _read(folder: str | Path, part: str, columns: Sequence[str]) -> pd.DataFrame:
    file = Path(folder) / f"ml-100k.{part}"
    try:
        # A title may hold a quotation mark that is just that.
        return pd.read_csv(file, sep="\t", header=0, names=list(columns), dtype=str, quoting=3)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None


def _download(folder: Path) -> None:
    log.info("datasets: downloading %s", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command += ["--no-deps", "--only-binary=:all:", "--dest", scratch, PACKAGE]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
            errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
            reason = (errors or run.stderr.splitlines() or [""])[-1].removeprefix("ERROR: ") if run.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"no answer within {_TIMEOUT_SECONDS} seconds"
        wheel = Path(scratch) / _WHEEL
        if not wheel.exists():
            raise InputError(
                f"cannot download MovieLens-100K, which the package {PACKAGE} carries ({reason or 'no wheel came'}); "
                f"with a network run again, or put {_WHEEL} into {folder}"
            )
        wheel.replace(folder / _WHEEL)
