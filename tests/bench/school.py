"""School: exam scores of 139 schools' pupils by 27 attributes; inputs that never repeat, one Multilevel model.

Explained variance (1 − squared error / variance) on a quarter of every school's pupils, split at random, ten times:
Multilevel with the shipped defaults, beside one ridge regression a school and one for all schools, which see the same
encoded attributes and whose strength is chosen by cross-validation on the training part.

    python tests/bench/school.py --data FOLDER
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
from experiment import arguments, encoded, fit, read, session, summary
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, StratifiedKFold

from mtl.gaussian import Array
from mtl.schema import LABEL, USER_ID

TEST_FRACTION = 0.25
STRENGTHS = tuple(float(s) for s in 10.0 ** np.arange(-1, 4.01, 0.5))
FOLDS = 5
MODEL = ("model.form=multilevel",)


def main() -> None:
    arguments_ = arguments(__doc__).parse_args()
    events, inputs = read(arguments_.data, "school", "input_id, x0 … x26")
    spark = session("school")
    runs = []
    for seed in range(arguments_.seed, arguments_.seed + arguments_.repeats):
        test = tested(events[USER_ID], TEST_FRACTION, seed)
        runs.append(measure(spark, events[~test], events[test], inputs, arguments_.set))
        print(f"split {seed}: {runs[-1]}", file=sys.stderr)
    ratio = TEST_FRACTION / (1 - TEST_FRACTION)
    names = ("multilevel", "independent", "pooled")
    print(
        json.dumps(
            {
                "experiment": "school",
                "measure": "explained variance",
                "repeats": len(runs),
                **{name: summary([run[name] for run in runs], ratio) for name in names},
                **{
                    f"multilevel - {name}": summary([run["multilevel"] - run[name] for run in runs], ratio)
                    for name in names[1:]
                },
                "seconds_to_train": summary([run["seconds"] for run in runs])["mean"],
                "runs": runs,
            }
        )
    )


def tested(user: pd.Series, fraction: float, seed: int) -> np.ndarray:
    """Which events are for testing: a random ``fraction`` of every user's, rounded."""
    order = np.random.default_rng(seed).permutation(len(user))
    shuffled = user.iloc[order].reset_index(drop=True)
    place, size = shuffled.groupby(shuffled).cumcount(), shuffled.map(shuffled.value_counts())
    test = np.empty(len(user), bool)
    test[order] = place < (fraction * size).round()
    return test


def measure(spark, train: pd.DataFrame, test: pd.DataFrame, inputs: pd.DataFrame, assignments: list[str]) -> dict:
    known = inputs[inputs.input_id.isin(train.input_id)]
    fitted = fit(spark, train, known, [*MODEL, *assignments])
    z, z_test = (encoded(fitted, inputs, part.input_id) for part in (train, test))
    y, y_test = train[LABEL].to_numpy(), test[LABEL].to_numpy()
    user, user_test = train[USER_ID].to_numpy(), test[USER_ID].to_numpy()
    everyone, everyone_test = np.zeros(len(user)), np.zeros(len(user_test))
    predictions = {
        "multilevel": fitted.predict(test, inputs).prediction.to_numpy(),
        "independent": ridge(z, y, user, z_test, user_test),
        "pooled": ridge(z, y, everyone, z_test, everyone_test),
    }
    told = {name: round(float(r2_score(y_test, prediction)), 4) for name, prediction in predictions.items()}
    return {**told, "iterations": fitted.report["iterations"], "seconds": fitted.report["seconds"]}


def ridge(z: Array, y: Array, group: np.ndarray, z_test: Array, group_test: np.ndarray) -> Array:
    """Predictions of one ridge regression a group, all of the one strength that does best in cross-validation."""
    folds = StratifiedKFold if len(np.unique(group)) > 1 else KFold
    parts = list(folds(FOLDS, shuffle=True, random_state=0).split(z, group))
    errors = [
        sum(np.sum((y[v] - _ridge(z[t], y[t], group[t], z[v], group[v], strength)) ** 2) for t, v in parts)
        for strength in STRENGTHS
    ]
    return _ridge(z, y, group, z_test, group_test, STRENGTHS[int(np.argmin(errors))])


def _ridge(z: Array, y: Array, group: np.ndarray, z_test: Array, group_test: np.ndarray, strength: float) -> Array:
    prediction = np.full(len(z_test), y.mean())
    for each in np.unique(group):
        mine, theirs = group == each, group_test == each
        if theirs.any():
            prediction[theirs] = Ridge(strength).fit(z[mine], y[mine]).predict(z_test[theirs])
    return prediction


if __name__ == "__main__":
    main()
