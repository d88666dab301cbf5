"""Landmine: is there a mine at a point of one of 29 fields, by 9 numbers of its radar image; 6% ones, logistic loss.

Area under the ROC curve on half of every field's points, split at random within each label, ten times: over all test rows
at once, and per field, averaged. Logistic Multilevel (and boosted trees with per-field weights where this version has
train.algorithm) beside one logistic regression a field and one for all, which see the same encoded attributes and whose
strength is chosen by cross-validation on the training part, by the same measure.

    python tests/bench/landmine.py --data FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pandas as pd
from experiment import arguments, encoded, fit, read, session, summary
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from mtl.config import valid_keys
from mtl.gaussian import Array
from mtl.schema import LABEL, USER_ID

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C, the inverse of the penalty
FOLDS = 5
LOGISTIC = ("model.loss=logistic", "model.form=multilevel")
MODELS = {"multilevel": LOGISTIC}
BOOSTED = (
    "train.algorithm=boosted",
    "oracle.kind=sklearn",
    "oracle.factory=sklearn.tree:DecisionTreeRegressor",
    "oracle.params={max_depth = 4, min_samples_leaf = 20, random_state = 0}",
)
if "train.algorithm" in valid_keys():
    MODELS["boosted"] = (*LOGISTIC, *BOOSTED)
BASELINES = ("independent", "pooled")
MEASURES = ("auc", "field_auc")


def main() -> None:
    arguments_ = arguments(__doc__).parse_args()
    events, inputs = read(arguments_.data, "landmine", "input_id, x0 … x8")
    spark = session("landmine")
    runs = []
    for seed in range(arguments_.seed, arguments_.seed + arguments_.repeats):
        test = halved(events, seed)
        runs.append(measure(spark, events[~test], events[test], inputs, arguments_.set))
        print(f"split {seed}: {runs[-1]}", file=sys.stderr)
    result = {"experiment": "landmine", "repeats": len(runs)}
    for i, name in enumerate(MEASURES):
        of = {model: np.array([run[model][i] for run in runs]) for model in (*MODELS, *BASELINES)}
        result[name] = {model: summary(values, 1.0) for model, values in of.items()} | {
            f"{model} - {baseline}": summary(of[model] - of[baseline], 1.0)
            for model in MODELS
            for baseline in BASELINES
        }
    print(json.dumps({**result, "runs": runs}))


def halved(events: pd.DataFrame, seed: int) -> np.ndarray:
    """Which events are for testing: a random half of every field's ones, and of its zeros."""
    order = np.random.default_rng(seed).permutation(len(events))
    shuffled = events.iloc[order].groupby([USER_ID, LABEL])
    test = np.empty(len(events), bool)
    test[order] = shuffled.cumcount().to_numpy() % 2 == 1
    return test


def measure(spark, train: pd.DataFrame, test: pd.DataFrame, inputs: pd.DataFrame, assignments: list[str]) -> dict:
    known = inputs[inputs.input_id.isin(train.input_id)]
    told = {}
    for name, model in MODELS.items():
        fitted = fit(spark, train, known, [*model, *assignments])
        told[name] = aucs(test, fitted.predict(test, inputs).prediction.to_numpy())
        told[f"{name}_seconds"] = fitted.report["seconds"]
    z, z_test = (encoded(fitted, inputs, part.input_id)[:, 1:] for part in (train, test))
    told["independent"] = aucs(test, regression(z, train, z_test, test, by_field=True))
    told["pooled"] = aucs(test, regression(z, train, z_test, test, by_field=False))
    return told


def aucs(rows: pd.DataFrame, h: Array) -> list[float]:
    """Over all rows, and the mean of the fields'."""
    by_field = rows.assign(h=h).groupby(USER_ID)
    fields = [roc_auc_score(field[LABEL], field.h) for _, field in by_field]
    return [round(float(roc_auc_score(rows[LABEL], h)), 4), round(float(np.mean(fields)), 4)]


def regression(z: Array, train: pd.DataFrame, z_test: Array, test: pd.DataFrame, by_field: bool) -> Array:
    """h of the test rows by logistic regression, a field each or one for all, of the strength best in cross-validation."""
    y = train[LABEL].to_numpy()
    field, field_test = (rows[USER_ID].to_numpy() if by_field else np.zeros(len(rows)) for rows in (train, test))
    parts = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(z, [f"{f}{label}" for f, label in zip(field, y)])
    scores = np.zeros(len(STRENGTHS))
    for fitting, validating in parts:
        for i, strength in enumerate(STRENGTHS):
            h = _regression(z[fitting], y[fitting], field[fitting], z[validating], field[validating], strength)
            scores[i] += roc_auc_score(y[validating], h)
    return _regression(z, y, field, z_test, field_test, STRENGTHS[int(scores.argmax())])


def _regression(z: Array, y: Array, field: np.ndarray, z_test: Array, field_test: np.ndarray, strength: float) -> Array:
    h = np.empty(len(z_test))
    for each in np.unique(field_test):
        model = LogisticRegression(C=strength, max_iter=1000)
        mine, theirs = field == each, field_test == each
        h[theirs] = model.fit(z[mine], y[mine]).decision_function(z_test[theirs])
    return h


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
