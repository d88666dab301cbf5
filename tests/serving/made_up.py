"""Stores of a made-up model, without tables: as many users and inputs as a test or bench asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
from msgspec.structs import replace

from mtl import gaussian, schema
from mtl.config import load_settings
from mtl.effects import Effects
from mtl.encode import Encoder
from mtl.features import Features
from mtl.gaussian import Array
from mtl.model import Artefact
from mtl.prior import Prior
from mtl.serving import scorer
from mtl.serving.records import digest, pack_users
from mtl.serving.store import Live, Store, new_feature_files, write_features

VERSION = 1
MU = 3.5
NOISE = 0.8
EVENTS_BEFORE = 30  # of every user


def covariances(random: np.random.Generator, n: int, d: int, size: float) -> Array:
    """n packed covariances."""
    root = random.normal(size=(n, d, d)) * np.sqrt(size / d)
    return gaussian.pack(root @ root.transpose(0, 2, 1))


def model_row(
    k: int, loss: str = "squared", seed: int = 0, effects: Effects = (), version: int = VERSION
) -> dict[str, Any]:
    """A row of the models table: attributes `year` of inputs and `age` of users say something of them."""
    random = np.random.default_rng(seed)
    d, settings = k + 1, load_settings().encode
    years, ages = pd.DataFrame({"year": random.normal(size=200)}), pd.DataFrame({"age": random.normal(size=200)})
    encoders = [Encoder.fit(frame, settings) for frame in (ages, years)]
    priors = []
    for encoder in encoders:
        gram = np.eye(encoder.width) * 100
        covariance = gaussian.unpack(covariances(random, 1, d, 0.1), d)[0] + 0.05 * np.eye(d)
        priors.append(Prior(gram, covariance, random.normal(size=(encoder.width, d)) * 0.3))
    artefact = Artefact(encoders[0], encoders[1], 0, 0, priors[0], priors[1], effects)
    return {
        schema.MODEL_VERSION: version,
        schema.STATUS: schema.LIVE,
        schema.K: k,
        schema.INPUT_COLUMNS: [],
        schema.USER_COLUMNS: [],
        schema.LOSS: loss,
        schema.MU: MU if loss == "squared" else 0.0,
        schema.NOISE: NOISE if loss == "squared" else 1.0,
        schema.LABEL_MIN: 1.0,
        schema.LABEL_MAX: 5.0,
        schema.EVENTS_VERSION: 1,
        schema.INPUTS_VERSION: 1,
        schema.HALF_LIFE_DAYS: 0.0,
        schema.ARTEFACT: cloudpickle.dumps(artefact),
    }


def features(random: np.random.Generator, n: int, d: int) -> Features:
    mean = random.normal(size=(n, d)) * 0.5
    return Features.of(mean, covariances(random, n, d, 0.05), MU)


def fill(
    store: Store,
    users: int,
    inputs: int,
    k: int,
    loss: str = "squared",
    seed: int = 0,
    effects: Effects = (),
    version: int = VERSION,
) -> None:
    """Users u0, u1 … and inputs x0, x1 … of random sums and features; of another version than the first, a candidate's."""
    random = np.random.default_rng(seed)
    d = k + 1
    store.write_model(version, model_row(k, loss, seed, effects, version))
    names = new_feature_files(version)
    live = Live(version, d, store.new_generation(), *names, 0, inputs + 10, 1.0)
    for first in range(0, inputs, 10_000):
        n = min(10_000, inputs - first)
        rows = scorer.feature_rows(features(random, n, d))
        write_features(store.folder, live, first, rows, scorer.top_columns(rows, d))
        store.write_input_ids(live.generation, first, (f"x{i}" for i in range(first, first + n)))
    store.write_users(version, _users(random, users, d))
    statuses = {version: schema.CANDIDATE, VERSION: schema.LIVE}
    store.write_model_list([{schema.MODEL_VERSION: one, schema.STATUS: status} for one, status in statuses.items()])
    store.write_live(replace(live, n_inputs=inputs))


def _users(random: np.random.Generator, users: int, d: int) -> Iterator[tuple[bytes, bytes]]:
    """Some of a few hundred distinct users each."""
    kinds = 200
    mean = random.normal(size=(kinds, d)) * 0.5
    quadratic = scorer.quadratics(mean, covariances(random, kinds, d, 0.02))
    records = list(pack_users(0, [EVENTS_BEFORE] * kinds, np.concatenate([mean, quadratic], axis=1)))
    for first in range(0, users, 100_000):
        names = sorted(digest(f"u{i}") for i in range(first, min(first + 100_000, users)))
        yield from ((name, records[name[0] % kinds]) for name in names)
