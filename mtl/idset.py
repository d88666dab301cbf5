"""A set of 128-bit keys in files: sorted runs, memory-mapped, merged as they grow.

Adding n keys writes one sorted run; a run that is not at least twice as long as the one after it is merged with it, up to
``_LONGEST``. So a set of N keys is about log2(N) runs, each key is rewritten about log2(N) times in all, and looking up
n keys is a binary search in each run: no step reads the whole set. The list of runs and the mark of what they hold are
one small file that is replaced at once, after the runs are on disk: a crash leaves the set as it was before.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import numpy as np

Keys = np.ndarray  # (n, 2) uint64

_LONGEST = 1 << 26  # keys in a run at most, 1 GB: merging takes three times as much memory
_LIST = "runs.json"


class IdSet:
    """The set in ``folder``; empty, with ``mark`` None, where there is none or its files are not whole."""

    def __init__(self, folder: str):
        self.folder = folder
        self.mark: Any = None
        self._names: list[str] = []
        self._runs: list[np.ndarray] = []  # (2, n) each: first halves ascending, second halves
        os.makedirs(folder, exist_ok=True)
        try:
            with open(self._path(_LIST)) as file:
                content = json.load(file)
            self._runs = [np.load(self._path(name), mmap_mode="r") for name in content["runs"]]
            self._names, self.mark = content["runs"], content["mark"]
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            self.clear()
        self._sweep()

    def __len__(self) -> int:
        return sum(run.shape[1] for run in self._runs)

    def contains(self, keys: Keys) -> np.ndarray:
        """(n,) bool: which of the keys (n, 2) are in the set."""
        order = np.argsort(keys[:, 0])  # neighbours in a run are then looked up one after the other
        first, second = keys[order, 0], keys[order, 1]
        found = np.zeros(len(keys), bool)
        for run in self._runs:
            at = np.searchsorted(run[0], first)
            candidates = np.arange(len(keys))
            while len(candidates):
                candidates = candidates[at[candidates] < run.shape[1]]
                candidates = candidates[run[0][at[candidates]] == first[candidates]]
                found[candidates] |= run[1][at[candidates]] == second[candidates]
                candidates = candidates[~found[candidates]]
                at[candidates] += 1  # two keys with the same first half
        result = np.empty(len(keys), bool)
        result[order] = found
        return result

    def add(self, keys: Keys, mark: Any) -> None:
        """Add those of the keys (n, 2), all different, that are not there, and put ``mark`` (JSON) in the place of the old one."""
        keys = keys[~self.contains(keys)]
        if len(keys):
            self._append(_sorted(np.ascontiguousarray(keys.T)))
        while len(self._runs) > 1:
            last, before = self._runs[-1].shape[1], self._runs[-2].shape[1]
            if before >= 2 * last or before + last > _LONGEST:
                break
            both = _sorted(np.concatenate(self._runs[-2:], axis=1))
            del self._runs[-2:], self._names[-2:]
            self._append(both)
        self.mark = mark
        content = json.dumps({"runs": self._names, "mark": mark}).encode()
        self._write(_LIST, lambda file: file.write(content))
        self._sweep()

    def clear(self) -> None:
        """Forget everything."""
        self.mark, self._names, self._runs = None, [], []
        shutil.rmtree(self.folder)
        os.makedirs(self.folder)

    def _append(self, run: np.ndarray) -> None:
        taken = {int(name.split(".")[0]) for name in os.listdir(self.folder) if name.endswith(".npy")}
        name = f"{max(taken, default=-1) + 1}.npy"
        self._write(name, lambda file: np.save(file, run))
        self._names.append(name)
        self._runs.append(np.load(self._path(name), mmap_mode="r"))

    def _write(self, name: str, write: Any) -> None:
        with open(self._path("part"), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._path("part"), self._path(name))

    def _sweep(self) -> None:
        """Remove the files of merged runs and of what a crash left."""
        for name in os.listdir(self.folder):
            if name not in {_LIST, *self._names}:
                os.remove(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def _sorted(run: np.ndarray) -> np.ndarray:
    return run[:, np.argsort(run[0], kind="stable")]
