"""Logs of decisions, and what another policy would have earned by them; files are read by pyarrow, and Spark is not asked.

A log has a row a decision: input_id (what was chosen), propensity, reward, and whatever else was known. Rewards that came later
may be in a file of their own, by decision_id. The other policy is a column of the log (the chance that it gives to what was
chosen), a file of chances (input_id, probability, and columns of the log that they depend on), or ``uniform``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds

from mtl.errors import InputError
from mtl.gaussian import Array
from mtl.schema import (
    DECISION_ID,
    EVENT_TIME,
    EXPECTED,
    INPUT_ID,
    PREDICTED,
    PROBABILITY,
    PROPENSITY,
    REWARD,
    USER_ID,
)
from mtl.serving.offpolicy import Estimate, Log, Support, doubly_robust, ips, mean_rewards, snips, support

log = logging.getLogger("mtl")

UNIFORM = "uniform"
_COLUMN = "column:"
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
_ROUNDING = 1e-6  # of a sum of chances
# Below and above which a normal interval is a guess.
_FEWEST_EFFECTIVE, _LARGEST_SHARE, _FEWEST_REWARDS = 50, 0.05, 50


@dataclass(frozen=True)
class Chances:
    """What a policy would have done at each of n decisions."""

    action: np.ndarray  # what was chosen, (n,) of 0 … actions − 1
    actions: int
    chosen: Array  # its chance under the policy, (n,)
    of_all: Array | None = None  # of every action, (m,) or (n, m), where they are known

    def at(self, rows: np.ndarray) -> Chances:
        """Of some of the decisions."""
        of_all = self.of_all if self.of_all is None or self.of_all.ndim == 1 else self.of_all[rows]
        return Chances(self.action[rows], self.actions, self.chosen[rows], of_all)


def estimate(
    decisions: str,
    policy: str,
    columns: Mapping[str, str],
    rewards: str | None = None,
    missing: float | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """What ``policy`` would have earned a decision, by IPS, SNIPS and DR, with their intervals.

    Args:
        decisions: the log, a file or folder of Parquet, CSV or JSON lines.
        policy: ``uniform``, ``column:NAME`` or a file of chances.
        columns: our column name → the log's.
        rewards: a file of decision_id and reward, where the log has none.
        missing: reward of decisions without one; they are left out by default.

    Returns:
        decisions, without_reward, confidence; logged, the mean reward that was earned, ips, snips and dr, each with value,
        standard_error, low and high; support, how much the log says of the policy, and cautions, why intervals
        may be too narrow. dr needs a reward model: predicted and expected are columns of the log, or it is the mean reward
        of each input over other decisions; without either dr is null.

    Raises:
        InputError: a file cannot be read, lacks a column, or has a value that cannot be; names it.
    """
    if not 0 < confidence < 1:
        raise InputError(f"a confidence of {confidence}: between 0 and 1 is wanted, such as 0.95")
    rows = read_decisions(decisions, columns, rewards)
    n_all = len(rows)
    if missing is not None:
        rows[REWARD] = rows[REWARD].fillna(missing)
    told = rows[REWARD].notna().to_numpy()
    if not told.any():
        raise InputError(f"{decisions}: no decision has a reward")
    chances = chances_of(policy, rows, columns).at(told)  # actions that were never rewarded are actions too
    rows = rows[told].reset_index(drop=True)
    acted = Log(rows[REWARD].to_numpy(float), rows[PROPENSITY].to_numpy(float), chances.chosen)
    of_policy = support(acted)
    own = Log(acted.reward, acted.propensity, acted.propensity)
    model = _reward_model(decisions, rows, chances)
    found = {
        "logged": ips(own, confidence),
        "ips": ips(acted, confidence),
        "snips": snips(acted, confidence),
        "dr": doubly_robust(acted, *model, confidence) if model else None,
    }
    return {
        "decisions": n_all,
        "without_reward": n_all - len(rows) if missing is None else 0,
        "actions": chances.actions,
        "confidence": confidence,
        **{name: asdict(value) if isinstance(value, Estimate) else None for name, value in found.items()},
        "support": asdict(of_policy),
        "cautions": _cautions(of_policy, acted),
    }


def read_decisions(path: str, columns: Mapping[str, str], rewards: str | None = None) -> pd.DataFrame:
    """A log in our own column names, with a reward that is null where there is none.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    rows = _read(path, columns)
    if rewards is not None:
        later = _read(rewards, columns)
        _require(later, rewards, DECISION_ID, REWARD)
        _require(rows, path, DECISION_ID)
        later = later[later[REWARD].notna()]
        again = later[DECISION_ID].duplicated()  # the first counts, as where versions compete
        if n := int(again.sum()):
            log.warning("offpolicy: %s: %d rewards are passed over, of decisions that had one before", rewards, n)
        later = later[~again]
        rows = rows.drop(columns=REWARD, errors="ignore").merge(later[[DECISION_ID, REWARD]], "left", DECISION_ID)
    _require(rows, path, INPUT_ID, PROPENSITY, REWARD)
    for name in (PROPENSITY, REWARD):
        rows[name] = _numbers(rows[name], path, name)
    if rows[PROPENSITY].isna().any():
        raise InputError(f"{path}: row {int(rows[PROPENSITY].isna().argmax())} has no {PROPENSITY}")
    return rows


def chances_of(policy: str, rows: pd.DataFrame, columns: Mapping[str, str]) -> Chances:
    """What a policy, named as :func:`estimate` takes it, would have done at the decisions ``rows``."""
    action, names = pd.factorize(rows[INPUT_ID])
    if policy == UNIFORM:
        m = len(names)
        return Chances(action, m, np.full(len(rows), 1 / m), np.full(m, 1 / m))
    if policy.startswith(_COLUMN):
        name = policy.removeprefix(_COLUMN)
        _require(rows, "the log", name)
        return Chances(action, len(names), _numbers(rows[name], "the log", name).to_numpy())
    return _chances_of_file(policy, rows, columns)


def _chances_of_file(path: str, rows: pd.DataFrame, columns: Mapping[str, str]) -> Chances:
    chances = _read(path, columns)
    _require(chances, path, INPUT_ID, PROBABILITY)
    context = [name for name in chances.columns if name not in (INPUT_ID, PROBABILITY)]
    _require(rows, "the log", *context)
    if chances.empty:
        raise InputError(f"{path}: there is no row")
    keys = [*context, INPUT_ID]
    if (twice := chances.duplicated(keys)).any():
        raise InputError(f"{path}: {_shown(chances[twice], keys)} has more than one {PROBABILITY}")
    names = pd.Index(chances[INPUT_ID].unique()).union(pd.Index(rows[INPUT_ID].unique()))
    place = np.zeros(len(chances) + len(rows), np.intp)  # of each row's context
    if context:
        place = (
            pd.concat([chances[context], rows[context]]).groupby(context, sort=False, dropna=False).ngroup().to_numpy()
        )
    here, there = place[: len(chances)], place[len(chances) :]
    table = np.zeros((int(here.max()) + 1, len(names)))
    if (there >= len(table)).any():
        raise InputError(
            f"{path}: it has no chances for {_shown(rows[there >= len(table)], context)}, which the log has"
        )
    table[here, names.get_indexer(chances[INPUT_ID])] = _numbers(chances[PROBABILITY], path, PROBABILITY)
    total = table.sum(1)
    if (off := ~(np.abs(total - 1) <= _ROUNDING * len(names))).any():
        bad = int(off.argmax())
        told = _shown(chances[here == bad], context) or "the policy"
        raise InputError(f"{path}: the chances of {told} sum to {total[bad]:.6g}, not to 1")
    action = names.get_indexer(rows[INPUT_ID])
    return Chances(action, len(names), table[there, action], table[there] if context else table[0])


def _reward_model(path: str, rows: pd.DataFrame, chances: Chances) -> tuple[Array, Array] | None:
    if {PREDICTED, EXPECTED} <= set(rows.columns):
        predicted, expected = (_numbers(rows[name], path, name) for name in (PREDICTED, EXPECTED))
        for values in (predicted, expected):
            if (lacking := ~np.isfinite(values)).any():
                raise InputError(f"{path}: row {int(lacking.argmax())} has no finite {values.name}")
        return predicted.to_numpy(), expected.to_numpy()
    if chances.of_all is None:
        return None
    return mean_rewards(chances.action, rows[REWARD].to_numpy(float), chances.of_all)


def _cautions(told: Support, log: Log) -> list[str]:
    weight, cautions = log.weight, list[str]()
    if told.effective < _FEWEST_EFFECTIVE:
        cautions.append(f"the log is worth {told.effective:.0f} decisions of this policy: intervals may be too narrow")
    if told.largest > _LARGEST_SHARE:
        cautions.append(f"one decision has {told.largest:.0%} of all weight")
    error = float(weight.std(ddof=1)) / len(weight) ** 0.5
    if abs(told.mean_weight - 1) > 4 * error + 1e-9:
        cautions.append(
            f"weights average {told.mean_weight:.3f} ± {error:.3f}, not 1: propensities or chances are wrong"
        )
    values, counts = np.unique(log.reward, return_counts=True)
    if len(values) == 2 and counts.min() < _FEWEST_REWARDS:
        cautions.append(f"only {counts.min()} decisions have the rarer of two rewards: no meaningful estimate")
    return cautions


def _read(path: str, columns: Mapping[str, str]) -> pd.DataFrame:
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"there is no {path}")
    # As Spark does, files that begin with a dot are passed over: they are still being written.
    found = (f for f in folder.rglob("*") if f.suffix in _FORMATS and not f.name.startswith("."))
    files = [folder] if folder.is_file() else sorted(found)
    suffixes = {file.suffix for file in files}
    if len(suffixes) != 1 or (suffix := suffixes.pop()) not in _FORMATS:
        raise InputError(f"{path}: one file, or a folder of files of one kind, is wanted: {', '.join(_FORMATS)}")
    try:
        rows = _parts(files, suffix, columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    theirs = {theirs: ours for ours, theirs in columns.items() if theirs in rows.columns}
    rows = rows.drop(columns=[ours for ours in theirs.values() if ours in rows.columns and ours not in theirs])
    rows = rows.rename(columns=theirs)
    for name in (INPUT_ID, DECISION_ID):
        if name in rows:
            rows[name] = rows[name].astype(str)
    return rows


def _parts(files: list[Path], suffix: str, columns: Mapping[str, str]) -> pd.DataFrame:
    """The rows of files of one kind; a column may be null all through one of them, or not there. Ids
    and times are text."""
    if _FORMATS[suffix] == "json":
        options = {"lines": True, "dtype": False, "convert_dates": False, "precise_float": True}
        return pd.concat([pd.read_json(file, **options) for file in files], ignore_index=True)
    text = {columns.get(name, name): pa.string() for name in (DECISION_ID, USER_ID, INPUT_ID, EVENT_TIME)}
    csv = ds.CsvFileFormat(convert_options=pyarrow.csv.ConvertOptions(column_types=text))
    kind = csv if _FORMATS[suffix] == "csv" else _FORMATS[suffix]
    return pa.concat_tables(
        [ds.dataset(str(file), format=kind).to_table() for file in files], promote_options="permissive"
    ).to_pandas()


def _require(rows: pd.DataFrame, path: str, *names: str) -> None:
    for name in names:
        if name not in rows.columns:
            raise InputError(f"{path} has no column {name}: it has {', '.join(map(str, rows.columns))} (see --columns)")


def _numbers(values: pd.Series, path: str, name: str) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    if (bad := numbers.isna() & values.notna()).any():
        raise InputError(f"{path}: row {int(bad.argmax())}: {name} = {values[bad].iloc[0]!r} is no number")
    return numbers


def _shown(rows: pd.DataFrame, names: list[str]) -> str:
    return ", ".join(f"{name} = {rows[name].iloc[0]}" for name in names)
