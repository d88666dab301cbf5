"""What a streaming query leaves in its checkpoint folder, read to hold it against the ledger."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

from mtl.errors import ReplayError

Place = tuple[int, int]  # a commit, and the number of a file among those that it added


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder of Spark's, on a path that this process can read.

    Args:
        advice: what to do where it is damaged; ends every error.
    """

    folder: str
    advice: str

    @property
    def is_new(self) -> bool:
        return not os.path.exists(f"{self.folder}/metadata")

    @property
    def id(self) -> str:
        """The query's own id, which a new checkpoint has anew.

        Raises:
            ReplayError: the file that holds it is damaged.
        """
        try:
            with open(f"{self.folder}/metadata") as file:
                return json.load(file)["id"]
        except (ValueError, KeyError) as error:
            raise ReplayError(f"{self.folder}/metadata is damaged. {self.advice}") from error

    def offsets(self, number: int) -> str:
        """Where batch ``number`` ends in the source, as Spark wrote it before the batch.

        Raises:
            ReplayError: the batch is not there, or damaged.
        """
        path = f"{self.folder}/offsets/{number}"
        try:
            with open(path) as file:
                return file.read().splitlines()[2]
        except FileNotFoundError as error:
            raise ReplayError(
                f"{self.folder} has lost batch {number}, which the ledger knows. {self.advice}"
            ) from error
        except (IndexError, ValueError) as error:
            raise ReplayError(f"{path} is damaged. {self.advice}") from error

    def begins_by(self, number: int, commit: int) -> bool:
        """Whether batch ``number`` may read from ``commit`` of the source or from one before."""
        return number == 0 or end_of(self.offsets(number - 1))[0] <= commit

    def planned(self) -> list[int]:
        """Numbers of the batches whose offsets are kept, the last hundred or so."""
        folder = f"{self.folder}/offsets"
        return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []

    @property
    def done(self) -> int:
        """How many batches are done, of all runs: the number of the next."""
        return max((number + 1 for number in self.planned() if self.has_committed(number)), default=0)

    def has_committed(self, number: int) -> bool:
        return os.path.exists(f"{self.folder}/commits/{number}")

    def set_aside(self) -> str | None:
        """Move the folder out of the way, that a new one can take its place; where to, None if there was none."""
        if not os.path.exists(self.folder):
            return None
        aside = f"{self.folder}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
        os.rename(self.folder, aside)
        return aside


def end_of(offsets: str) -> Place:
    """The last file of a batch, from its offsets; the number −1 of a commit is before its first file."""
    offset = json.loads(offsets)
    return offset["reservoirVersion"], max(offset["index"], -1)


def offsets_at(place: Place) -> str:
    """The way back from :func:`end_of`."""
    return json.dumps({"reservoirVersion": place[0], "index": place[1]})
