"""Types of every table's columns, and how Delta keeps the tables.

A packed symmetric matrix (d×d) is stored as its upper triangle, row by row, d(d+1)/2 values.
"""

from pyspark.sql import types as T

from mtl import schema


def _table(*fields: tuple[str, T.DataType]) -> T.StructType:
    return T.StructType([T.StructField(name, kind) for name, kind in fields])


_VECTOR = T.ArrayType(T.DoubleType())
_EVENT = (
    (schema.EVENT_ID, T.StringType()),
    (schema.USER_ID, T.StringType()),
    (schema.INPUT_ID, T.StringType()),
    (schema.LABEL, T.DoubleType()),
    (schema.WEIGHT, T.DoubleType()),
    (schema.EVENT_TIME, T.TimestampType()),
    (schema.OFFSET, T.DoubleType()),  # a known part of h; null: 0
    (schema.CONTEXT, T.StringType()),
)

SCHEMAS: dict[str, T.StructType] = {
    schema.EVENTS: _table(*_EVENT, (schema.SOURCE, T.StringType()), (schema.BATCH, T.StringType())),
    schema.QUARANTINE: _table(
        (schema.RAW, T.StringType()),
        (schema.REASON, T.StringType()),
        (schema.SOURCE, T.StringType()),
        (schema.BATCH, T.StringType()),
        (schema.CREATED_AT, T.TimestampType()),
    ),
    # Attribute columns join these two tables as they arrive (schema evolution).
    schema.INPUTS: _table((schema.INPUT_ID, T.StringType())),
    schema.USER_ATTRIBUTES: _table((schema.USER_ID, T.StringType())),
    schema.MODELS: _table(
        (schema.MODEL_VERSION, T.LongType()),
        (schema.STATUS, T.StringType()),
        (schema.FORM, T.StringType()),
        (schema.LOSS, T.StringType()),
        (schema.K, T.IntegerType()),
        (schema.INPUT_COLUMNS, T.ArrayType(T.IntegerType())),
        (schema.USER_COLUMNS, T.ArrayType(T.IntegerType())),
        (schema.MU, T.DoubleType()),
        (schema.NOISE, T.DoubleType()),
        (schema.LABEL_MIN, T.DoubleType()),
        (schema.LABEL_MAX, T.DoubleType()),
        (schema.PRIOR_COVARIANCE, _VECTOR),
        (schema.ARTEFACT, T.BinaryType()),
        (schema.EVENTS_VERSION, T.LongType()),
        (schema.INPUTS_VERSION, T.LongType()),
        (schema.N_EVENTS, T.LongType()),
        (schema.HALF_LIFE_DAYS, T.DoubleType()),
        (schema.OBJECTIVE, _VECTOR),
        (schema.METRICS, T.StringType()),
        (schema.SETTINGS, T.StringType()),
        (schema.CREATED_AT, T.TimestampType()),
        (schema.PROMOTED_AT, T.TimestampType()),
    ),
    schema.FEATURES: _table(
        (schema.MODEL_VERSION, T.LongType()),
        (schema.INPUT_ID, T.StringType()),
        (schema.OFFSET, T.DoubleType()),
        (schema.PHI, _VECTOR),
        (schema.SECOND_MOMENT, _VECTOR),
        (schema.OFFSET_PHI, _VECTOR),
        (schema.OFFSET_VARIANCE, T.DoubleType()),
        (schema.IMPLICIT, _VECTOR),
        (schema.RESIDUAL, _VECTOR),
        (schema.INPUT_CLASS, T.StringType()),
        # What the stream's events said of an input that training had no event of (mtl.arrivals); null for the others.
        (schema.A, _VECTOR),
        (schema.B, _VECTOR),
        (schema.N_EVENTS, T.LongType()),
    ),
    schema.USERS: _table(
        (schema.MODEL_VERSION, T.LongType()),
        (schema.USER_ID, T.StringType()),
        (schema.A, _VECTOR),
        (schema.B, _VECTOR),
        (schema.W, _VECTOR),
        (schema.PRIOR_MEAN, _VECTOR),
        (schema.N_EVENTS, T.LongType()),
        (schema.REFERENCE_TIME, T.TimestampType()),
    ),
    # Events of the update stream whose input is not known yet: BATCH_ID is the batch that set them aside,
    # schema.RELEASED the batch that applied them.
    schema.WAITING: _table(
        (schema.MODEL_VERSION, T.LongType()),
        (schema.APPLICATION_ID, T.StringType()),
        *_EVENT,
        (schema.BATCH_ID, T.LongType()),
        (schema.RELEASED, T.LongType()),
    ),
    schema.LEDGER: _table(
        (schema.QUERY, T.StringType()),
        (schema.APPLICATION_ID, T.StringType()),
        (schema.BATCH_ID, T.LongType()),
        (schema.SOURCE, T.StringType()),
        (schema.STATE, T.StringType()),
        (schema.OFFSETS, T.StringType()),
        (schema.FINGERPRINT, T.StringType()),
        (schema.OFFERED, T.LongType()),
        (schema.ACCEPTED, T.LongType()),
        (schema.DUPLICATES, T.LongType()),
        (schema.QUARANTINED, T.LongType()),
        (schema.WAITED, T.LongType()),
        (schema.RELEASED, T.LongType()),
        (schema.CREATED_AT, T.TimestampType()),
    ),
    # What the update stream's events cost when predicted before they were applied: a row a batch or release.
    schema.PROGRESS: _table(
        (schema.MODEL_VERSION, T.LongType()),
        (schema.APPLICATION_ID, T.StringType()),
        (schema.BATCH_ID, T.LongType()),
        (schema.OFFSETS, T.StringType()),
        (schema.N_EVENTS, T.LongType()),
        (schema.VALIDATED, T.LongType()),
        (schema.LOSS, T.DoubleType()),
        (schema.ABSOLUTE, T.DoubleType()),
        (schema.STANDARDIZED, T.DoubleType()),
        (schema.COVERED, T.DoubleType()),
        (schema.PREDICTION_SUM, T.DoubleType()),
        (schema.LABEL_SUM, T.DoubleType()),
        (schema.SEEN_N, _VECTOR),
        (schema.SEEN_LOSS, _VECTOR),
        (schema.SEEN_AVERAGE, _VECTOR),
        (schema.SEEN_RIDGE, _VECTOR),
        (schema.PHI_SUM, _VECTOR),
        (schema.PHI_SQUARES, _VECTOR),
        (schema.CREATED_AT, T.TimestampType()),
    ),
    schema.ERASURES: _table(
        (schema.ERASURE_ID, T.StringType()),
        (schema.STATE, T.StringType()),
        (schema.KEY, T.StringType()),
        (schema.IDS, T.ArrayType(T.StringType())),
        (schema.CORRECTIONS, T.StringType()),
        (schema.REPORT, T.StringType()),
        (schema.CREATED_AT, T.TimestampType()),
        (schema.FINISHED_AT, T.TimestampType()),
    ),
}

PARTITIONED_BY: dict[str, list[str]] = {
    table: [schema.MODEL_VERSION] for table in (schema.FEATURES, schema.USERS, schema.WAITING)
}

_LONG_MEMORY = {
    # Longer than any downtime of a reader, so that a stream never finds its log cleaned behind it.
    "delta.logRetentionDuration": "interval 60 days",
    "delta.deletedFileRetentionDuration": "interval 30 days",
}
# Of tables with a commit every batch: a checkpoint of the log takes half as long as the batch that has to write it.
_OFTEN_WRITTEN = {**_LONG_MEMORY, "delta.checkpointInterval": "100"}
_MERGED = {**_LONG_MEMORY, "delta.enableDeletionVectors": "true"}
PROPERTIES: dict[str, dict[str, str]] = {
    # A MERGE of new events must not pass by an append that came meanwhile (mtl.intake). No row of a file is ever only marked as
    # deleted, as some platforms have it by default: erased ones are to go, and mtl.known reads the files themselves.
    schema.EVENTS: {
        **_OFTEN_WRITTEN,
        "delta.appendOnly": "true",
        "delta.isolationLevel": "Serializable",
        "delta.enableDeletionVectors": "false",
    },
    schema.QUARANTINE: _OFTEN_WRITTEN,
    schema.INPUTS: {**_MERGED, "delta.enableChangeDataFeed": "true"},
    schema.USER_ATTRIBUTES: _MERGED,
    schema.MODELS: _LONG_MEMORY,
    schema.FEATURES: _MERGED,
    schema.USERS: {**_MERGED, **_OFTEN_WRITTEN},
    schema.WAITING: _MERGED,
    schema.LEDGER: _OFTEN_WRITTEN,
    schema.PROGRESS: _OFTEN_WRITTEN,
    schema.ERASURES: {},  # its old versions hold ids: no longer than they must
}
