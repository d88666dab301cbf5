"""Checkpoints of a training on the driver's disk: a state after each iteration, of one training and no other."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle

from mtl.config import Settings
from mtl.forms import PartlyGiven
from mtl.prior import VectorPrior
from mtl.train import State

log = logging.getLogger("mtl")


@dataclass(frozen=True)
class Checkpoint:
    """One file; only what was written under the same key is read."""

    path: Path
    key: str

    @classmethod
    def of(cls, folder: str, settings: Settings, *data: object) -> Checkpoint:
        """For a training by these settings of data that the other arguments tell apart."""
        of = settings.model, settings.train, settings.oracle, settings.function, settings.encode, settings.supervised
        told = repr((of, data))
        return cls(Path(folder) / "retrain.state", hashlib.sha256(told.encode()).hexdigest())

    def save(self, state: State) -> None:
        """Replace the file in one move: a kill leaves the state before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_bytes(cloudpickle.dumps((self.key, state, _optimizer(state.inputs))))
        os.replace(unfinished, self.path)

    def load(self, inputs: VectorPrior) -> State | None:
        """The state of this training, its oracle taken from ``inputs``; None where there is none."""
        if not self.path.exists():
            return None
        try:
            key, state, optimizer = cloudpickle.loads(self.path.read_bytes())
        except Exception as error:  # of a pickle anything may come
            log.warning("retrain: the checkpoint in %s cannot be read: starting over (%s)", self.path.parent, error)
            return None
        if key != self.key:
            log.info("retrain: the checkpoint in %s is of another training: starting over", self.path.parent)
            return None
        log.info("retrain: resumed after iteration %d", state.iteration)
        return state._replace(inputs=_with_oracle_of(inputs, state.inputs, optimizer))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _optimizer(inputs: VectorPrior) -> Any:
    """What its steps so far have told an optimizer; None where there is none."""
    return getattr(inputs.learnt if isinstance(inputs, PartlyGiven) else inputs, "optimizer", None)


def _with_oracle_of(fresh: VectorPrior, stored: VectorPrior, optimizer: Any) -> VectorPrior:
    """What is stored predicts; to be fitted again it needs what a pickle leaves out."""
    if isinstance(stored, PartlyGiven) and isinstance(fresh, PartlyGiven):
        return replace(stored, learnt=_with_oracle_of(fresh.learnt, stored.learnt, optimizer))
    dropped = {name: getattr(fresh, name) for name in ("oracle", "fit_all") if hasattr(fresh, name)}
    dropped |= {"optimizer": optimizer} if hasattr(fresh, "optimizer") else {}
    return replace(stored, **dropped) if dropped else stored  # type: ignore[type-var]
