"""Model versions: one live at a time, switched in one commit, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import functions as F

from mtl import models, schema
from mtl.config import load_settings
from mtl.encode import Encoder
from mtl.errors import StateError
from mtl.forms import Form
from mtl.layout import SCHEMAS
from mtl.model import Artefact, Model, model_of, model_row
from mtl.models import load_model, next_version, promote, publish, rollback
from mtl.prior import Prior
from mtl.tables import Tables

LIVE, CANDIDATE, RETIRED = schema.LIVE, schema.CANDIDATE, schema.RETIRED


def model(version: int, status: str) -> Model:
    prior = Prior(np.eye(1), (version + 1.0) * np.eye(2), np.array([[0.0, version]]))
    encoder = Encoder((), np.empty(0))
    return Model(
        version, status, Form(1), "squared", 3.5, 0.25, 1.0, 5.0, 7, 8, Artefact(encoder, encoder, 0, 0, prior, prior)
    )


def published(tables: Tables, *statuses: str) -> Tables:
    for version, status in enumerate(statuses, 1):
        of = model(version, status)
        publish(tables, model_row(of, "shared_basis", (2.0, 1.0), 10, {"users": 3}, load_settings()))
    return tables


def statuses(tables: Tables) -> list[str]:
    return [row[schema.STATUS] for row in models.versions(tables).orderBy(schema.MODEL_VERSION).collect()]


def test_a_model_comes_back_from_its_row_as_it_was(tables: Tables) -> None:
    published(tables, LIVE, CANDIDATE)
    for version, back in ((1, load_model(tables)), (2, load_model(tables, 2))):
        expected = model(version, (LIVE, CANDIDATE)[version - 1])
        for name in Model.__dataclass_fields__:
            if name != "artefact":
                assert getattr(back, name) == getattr(expected, name)
        np.testing.assert_array_equal(back.artefact.users.covariance, expected.artefact.users.covariance)
        assert back.d == 2


def test_a_version_that_needs_a_package_that_is_not_there_names_it() -> None:
    row = {schema.MODEL_VERSION: 3, schema.ARTEFACT: b"cno_such_package\nthing\n."}
    with pytest.raises(StateError, match="model version 3 needs no_such_package, which is not installed"):
        model_of(row)


def test_without_versions_or_a_live_one_the_reason_names_the_job(tables: Tables) -> None:
    assert next_version(tables) == 1
    with pytest.raises(StateError, match=r"no model version is live: run jobs/retrain\.py"):
        load_model(tables)
    with pytest.raises(StateError, match="there is no model version 9"):
        load_model(tables, 9)
    with pytest.raises(StateError, match=r"no candidate to promote: run jobs/retrain\.py"):
        promote(tables)
    with pytest.raises(StateError, match="nothing to roll back to"):
        rollback(tables)


def test_promoting_and_rolling_back_flip_exactly_one_live_version_each_in_one_commit(tables: Tables) -> None:
    published(tables, LIVE, CANDIDATE, CANDIDATE)
    commit = tables.version(schema.MODELS)

    def committed() -> int:
        return tables.version(schema.MODELS) - commit

    assert promote(tables) == {"live": 3, "was": 1}  # the newest candidate
    assert (statuses(tables), committed()) == ([RETIRED, CANDIDATE, LIVE], 1)
    assert promote(tables, 2) == {"live": 2, "was": 3}
    assert (statuses(tables), committed()) == ([RETIRED, LIVE, RETIRED], 2)
    assert rollback(tables) == {"live": 3, "was": 2}
    assert (statuses(tables), committed()) == ([RETIRED, RETIRED, LIVE], 3)
    # Rolling back once more undoes the rollback: 2 was live before 3.
    assert rollback(tables) == {"live": 2, "was": 3}
    assert statuses(tables).count(LIVE) == 1
    assert load_model(tables).version == 2


def test_promoting_what_is_live_or_unknown_changes_nothing(tables: Tables) -> None:
    published(tables, LIVE)
    commit = tables.version(schema.MODELS)
    assert promote(tables, 1) == {"live": 1, "was": 1}
    with pytest.raises(StateError, match=r"there is no model version 5: there are \[1\]"):
        promote(tables, 5)
    assert tables.version(schema.MODELS) == commit


def test_a_candidate_that_was_never_live_is_nothing_to_roll_back_to(tables: Tables) -> None:
    published(tables, LIVE, CANDIDATE)
    with pytest.raises(StateError, match="nothing to roll back to"):
        rollback(tables)


def test_the_next_version_clears_only_rows_that_no_version_owns(tables: Tables) -> None:
    published(tables, LIVE)
    for version in (1, 2, 3):
        row = {schema.MODEL_VERSION: version, schema.USER_ID: "u", schema.N_EVENTS: 0}
        tables.append(schema.USERS, tables.spark.createDataFrame([row], SCHEMAS[schema.USERS]))
    assert next_version(tables) == 2
    left = tables.read(schema.USERS).select(F.collect_set(schema.MODEL_VERSION)).collect()[0][0]
    assert left == [1]
