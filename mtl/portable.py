"""A model version as a folder of files that predicts without a Spark session.

It holds features of all inputs and sums of all users as they were when it was saved; the tables go on without it.
"""

from __future__ import annotations

from pathlib import Path

import cloudpickle
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mtl import blocks, schema
from mtl.contexts import COLUMN
from mtl.model import Model
from mtl.schema import INPUT_ID, OFFSET, USER_ID
from mtl.score import PREDICTION, STATE, STD, add_scores, inputs_of
from mtl.tables import Tables
from mtl.users import SharedInputs, prior_means

_MODEL, _USERS = "model.pickle", "users.parquet"


class PortableModel:
    """Predictions of one model version, as :func:`mtl.score.score` makes them of the same state.

    Args:
        model: the version.
        inputs: features of its inputs, as :func:`mtl.score.inputs_of` has them.
        users: user_id, and the columns of ``mtl.score.STATE`` by their names there; ids once each.
    """

    def __init__(self, model: Model, inputs: SharedInputs, users: pa.Table):
        self.model, self.inputs, self.users = model, inputs, users
        self._ids = users[USER_ID].combine_chunks()

    def predict(self, rows: pd.DataFrame, params: object = None) -> pd.DataFrame:
        """``prediction`` and ``std`` of each row's user_id and input_id, in the rows' order and under their index.

        An unknown user has the prior, an unknown input what the oracle says of an empty attribute row. Rows may also have an
        ``offset`` and columns of the model's contexts.
        """
        columns = {name: pa.array(rows[name], pa.string()) for name in (USER_ID, INPUT_ID)}
        if OFFSET in rows:
            columns[OFFSET] = pa.array(rows[OFFSET], pa.float64())
        for name in self.model.contexts:
            columns[COLUMN + name] = (
                pa.array(rows[name], pa.string()) if name in rows else pa.nulls(len(rows), pa.string())
            )
        asked = pa.table(columns)
        places = blocks.index_of(asked[USER_ID].unique(), self._ids)
        states = self.users.take(pa.array(places[places >= 0]))
        together = pa.concat_tables([asked, states], promote_options="default")
        scored = add_scores(together, self.model, self.inputs)
        return scored.select([PREDICTION, STD]).to_pandas().set_index(rows.index)


def save_portable(tables: Tables, model: Model, folder: Path) -> None:
    """Write the files of a model version as its tables are now; they pass through the driver's memory."""
    users = tables.of_version(schema.USERS, model.version)
    states = [users.select(USER_ID, *STATE).withColumnsRenamed(STATE).toArrow()]
    attributes = tables.read(schema.USER_ATTRIBUTES)
    if len(attributes.columns) > 1:
        without = attributes.join(users.select(USER_ID), USER_ID, "left_anti")
        states.append(prior_means(without, model).withColumnsRenamed(STATE).toArrow())
    shared, inputs = tables.of_version(schema.FEATURES, model.version), tables.read(schema.INPUTS)
    known = inputs_of(model, shared, inputs, shared.select(INPUT_ID).union(inputs.select(INPUT_ID)).distinct())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MODEL).write_bytes(cloudpickle.dumps((model, known)))
    pq.write_table(pa.concat_tables(states, promote_options="default"), folder / _USERS)


def load_portable(folder: str | Path) -> PortableModel:
    """What :func:`save_portable` wrote; it is unpickled, so take only files that you trust."""
    model, inputs = cloudpickle.loads((Path(folder) / _MODEL).read_bytes())
    return PortableModel(model, inputs, pq.read_table(Path(folder) / _USERS))


def size_mb(tables: Tables, model: Model) -> float:
    """About how large the files would be, by the packed sums of users and features of inputs (MB)."""
    rows = sum(tables.of_version(table, model.version).count() for table in (schema.USERS, schema.FEATURES))
    return rows * 8 * (model.d * (model.d + 1) / 2 + 2 * model.d) / 1e6


_load_pyfunc = load_portable  # the name by which MLflow calls a loader module
