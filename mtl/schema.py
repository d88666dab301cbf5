"""Names and types of every table and column; nothing else in the project spells them.

A packed symmetric matrix (d×d) is stored as its upper triangle, row by row, d(d+1)/2 values.
"""

from pyspark.sql import types as T

# Tables
EVENTS = "events"
QUARANTINE = "quarantine"
INPUTS = "inputs"
USER_ATTRIBUTES = "user_attributes"
MODELS = "models"
FEATURES = "features"
USERS = "users"
WAITING = "waiting"
LEDGER = "ledger"
PROGRESS = "progress"
ERASURES = "erasures"

# Events
EVENT_ID = "event_id"
USER_ID = "user_id"
INPUT_ID = "input_id"
LABEL = "label"
WEIGHT = "weight"
CONTEXT = "context"  # of an event: JSON object of its contexts' values, by name in order; null where there are none
EVENT_TIME = "event_time"
SOURCE = "source"  # the file or stream that offered the row
BATCH = "batch"  # the ingest batch that wrote the row
LARGEST = 1e12  # label, weight and offset of an event: of larger ones nothing else is left in a sum
LARGEST_EXPONENT = 100.0  # offset where h is an exponent, as under logistic and Poisson loss

# Quarantine
RAW = "raw"  # the refused row as it came, as JSON
REASON = "reason"

# Models
MODEL_VERSION = "model_version"
STATUS = "status"
FORM = "form"
LOSS = "loss"
INPUT_COLUMNS = "input_columns"  # encoded attributes that are basis functions, see mtl.forms
USER_COLUMNS = "user_columns"
K = "k"
MU = "mu"
NOISE = "noise"
LABEL_MIN = "label_min"
LABEL_MAX = "label_max"
PRIOR_COVARIANCE = "prior_covariance"  # S of the users, packed
ARTEFACT = "artefact"  # pickled mtl.model.Artefact: encoders, user prior, basis functions
EVENTS_VERSION = "events_version"
INPUTS_VERSION = "inputs_version"
N_EVENTS = "n_events"
HALF_LIFE_DAYS = "half_life_days"  # of an event in its user's sums; 0: nothing is forgotten
OBJECTIVE = "objective"
METRICS = "metrics"
SETTINGS = "settings"
CREATED_AT = "created_at"
PROMOTED_AT = "promoted_at"

LIVE = "live"
CANDIDATE = "candidate"
RETIRED = "retired"
REFUSED = "refused"  # a candidate that was worse than the live version on fresh events
REQUESTED = "requested"  # no version: somebody asks for one

# Features
OFFSET = "offset"  # E[o(x)]; of an event, a known part of h beside it
PHI = "phi"  # E[φ(x)], length k+1, first entry 1
SECOND_MOMENT = "second_moment"  # E[φφᵀ], packed
OFFSET_PHI = "offset_phi"  # E[oφ], length k+1
IMPLICIT = "implicit"  # the input's attributes that its training events are, see mtl.implicit
OFFSET_VARIANCE = "offset_variance"  # Var[o]
RESIDUAL = "residual"  # what training added to the oracle's (o, f_1…f_k), length k+1
INPUT_CLASS = "input_class"  # equivalence class of the input

# Logs of decisions (files, see mtl.serving.decisions)
DECISION_ID = "decision_id"
PROPENSITY = "propensity"  # chance that the policy in use gave to what it chose
REWARD = "reward"
PROBABILITY = "probability"  # chance that another policy gives to an input
PREDICTED = "predicted"  # a model's prediction of the reward of what was chosen
EXPECTED = "expected"  # and of what another policy would choose, on average

# Users
A = "a"  # Σ c E[φφᵀ], packed
B = "b"  # Σ c (yφ − E[oφ])
W = "w"  # posterior mean of the user's weights
PRIOR_MEAN = "prior_mean"
REFERENCE_TIME = "reference_time"  # of the last event, which ages are counted from; null where nothing is forgotten

REPLACED = (
    "replaced"  # metadata of a commit that wrote all of a version's users anew, some of them changed (mtl.upsert)
)

# Ledger
QUERY = "query"
BATCH_ID = "batch_id"
APPLICATION_ID = "application_id"
STATE = "state"
OFFERED = "offered"
ACCEPTED = "accepted"
DUPLICATES = "duplicates"
QUARANTINED = "quarantined"
WAITED = "waited"
RELEASED = "released"
FINGERPRINT = "fingerprint"
OFFSETS = "offsets"

# Progress: sums over the events of a batch, predicted before they were applied (mtl.progress)
VALIDATED = "validated"  # how many events were predicted
ABSOLUTE = "absolute"
STANDARDIZED = "standardized"
COVERED = "covered"
PREDICTION_SUM = "prediction"
LABEL_SUM = "label"
SEEN_N = "seen_n"  # events by how many their user had before, see mtl.progress.SEEN
SEEN_LOSS = "seen_loss"
SEEN_AVERAGE = "seen_average"  # loss of the same events predicted for the average user,
SEEN_RIDGE = "seen_ridge"  # and from the user's own events about a prior of mean zero
PHI_SUM = "phi_sum"
PHI_SQUARES = "phi_squares"
# Erasures
ERASURE = "erase "  # begins the metadata of the commits that take rows away for an erasure
ERASURE_ID = "erasure_id"
KEY = "key"  # the column that the ids are of: user_id or event_id
IDS = "ids"  # what is to be erased; emptied when it is
CORRECTIONS = "corrections"  # the file that the events come back from, as JSON; null when they have
REPORT = "report"
FINISHED_AT = "finished_at"

PLANNED = "planned"
DONE = "done"
ABANDONED = "abandoned"
RECOVERED = "recovered"  # a new checkpoint goes on from here, see mtl.recover


def _table(*fields: tuple[str, T.DataType]) -> T.StructType:
    return T.StructType([T.StructField(name, kind) for name, kind in fields])


_VECTOR = T.ArrayType(T.DoubleType())
_EVENT = (
    (EVENT_ID, T.StringType()),
    (USER_ID, T.StringType()),
    (INPUT_ID, T.StringType()),
    (LABEL, T.DoubleType()),
    (WEIGHT, T.DoubleType()),
    (EVENT_TIME, T.TimestampType()),
    (OFFSET, T.DoubleType()),  # a known part of h; null: 0
    (CONTEXT, T.StringType()),
)

SCHEMAS: dict[str, T.StructType] = {
    EVENTS: _table(*_EVENT, (SOURCE, T.StringType()), (BATCH, T.StringType())),
    QUARANTINE: _table(
        (RAW, T.StringType()),
        (REASON, T.StringType()),
        (SOURCE, T.StringType()),
        (BATCH, T.StringType()),
        (CREATED_AT, T.TimestampType()),
    ),
    # Attribute columns join these two tables as they arrive (schema evolution).
    INPUTS: _table((INPUT_ID, T.StringType())),
    USER_ATTRIBUTES: _table((USER_ID, T.StringType())),
    MODELS: _table(
        (MODEL_VERSION, T.LongType()),
        (STATUS, T.StringType()),
        (FORM, T.StringType()),
        (LOSS, T.StringType()),
        (K, T.IntegerType()),
        (INPUT_COLUMNS, T.ArrayType(T.IntegerType())),
        (USER_COLUMNS, T.ArrayType(T.IntegerType())),
        (MU, T.DoubleType()),
        (NOISE, T.DoubleType()),
        (LABEL_MIN, T.DoubleType()),
        (LABEL_MAX, T.DoubleType()),
        (PRIOR_COVARIANCE, _VECTOR),
        (ARTEFACT, T.BinaryType()),
        (EVENTS_VERSION, T.LongType()),
        (INPUTS_VERSION, T.LongType()),
        (N_EVENTS, T.LongType()),
        (HALF_LIFE_DAYS, T.DoubleType()),
        (OBJECTIVE, _VECTOR),
        (METRICS, T.StringType()),
        (SETTINGS, T.StringType()),
        (CREATED_AT, T.TimestampType()),
        (PROMOTED_AT, T.TimestampType()),
    ),
    FEATURES: _table(
        (MODEL_VERSION, T.LongType()),
        (INPUT_ID, T.StringType()),
        (OFFSET, T.DoubleType()),
        (PHI, _VECTOR),
        (SECOND_MOMENT, _VECTOR),
        (OFFSET_PHI, _VECTOR),
        (OFFSET_VARIANCE, T.DoubleType()),
        (IMPLICIT, _VECTOR),
        (RESIDUAL, _VECTOR),
        (INPUT_CLASS, T.StringType()),
        # What the stream's events said of an input that training had no event of (mtl.arrivals); null for the others.
        (A, _VECTOR),
        (B, _VECTOR),
        (N_EVENTS, T.LongType()),
    ),
    USERS: _table(
        (MODEL_VERSION, T.LongType()),
        (USER_ID, T.StringType()),
        (A, _VECTOR),
        (B, _VECTOR),
        (W, _VECTOR),
        (PRIOR_MEAN, _VECTOR),
        (N_EVENTS, T.LongType()),
        (REFERENCE_TIME, T.TimestampType()),
    ),
    # Events of the update stream whose input is not known yet: BATCH_ID is the batch that set them aside,
    # RELEASED the batch that applied them.
    WAITING: _table(
        (MODEL_VERSION, T.LongType()),
        (APPLICATION_ID, T.StringType()),
        *_EVENT,
        (BATCH_ID, T.LongType()),
        (RELEASED, T.LongType()),
    ),
    LEDGER: _table(
        (QUERY, T.StringType()),
        (APPLICATION_ID, T.StringType()),
        (BATCH_ID, T.LongType()),
        (SOURCE, T.StringType()),
        (STATE, T.StringType()),
        (OFFSETS, T.StringType()),
        (FINGERPRINT, T.StringType()),
        (OFFERED, T.LongType()),
        (ACCEPTED, T.LongType()),
        (DUPLICATES, T.LongType()),
        (QUARANTINED, T.LongType()),
        (WAITED, T.LongType()),
        (RELEASED, T.LongType()),
        (CREATED_AT, T.TimestampType()),
    ),
    # What the update stream's events cost when predicted before they were applied: a row a batch or release.
    PROGRESS: _table(
        (MODEL_VERSION, T.LongType()),
        (APPLICATION_ID, T.StringType()),
        (BATCH_ID, T.LongType()),
        (OFFSETS, T.StringType()),
        (N_EVENTS, T.LongType()),
        (VALIDATED, T.LongType()),
        (LOSS, T.DoubleType()),
        (ABSOLUTE, T.DoubleType()),
        (STANDARDIZED, T.DoubleType()),
        (COVERED, T.DoubleType()),
        (PREDICTION_SUM, T.DoubleType()),
        (LABEL_SUM, T.DoubleType()),
        (SEEN_N, _VECTOR),
        (SEEN_LOSS, _VECTOR),
        (SEEN_AVERAGE, _VECTOR),
        (SEEN_RIDGE, _VECTOR),
        (PHI_SUM, _VECTOR),
        (PHI_SQUARES, _VECTOR),
        (CREATED_AT, T.TimestampType()),
    ),
    ERASURES: _table(
        (ERASURE_ID, T.StringType()),
        (STATE, T.StringType()),
        (KEY, T.StringType()),
        (IDS, T.ArrayType(T.StringType())),
        (CORRECTIONS, T.StringType()),
        (REPORT, T.StringType()),
        (CREATED_AT, T.TimestampType()),
        (FINISHED_AT, T.TimestampType()),
    ),
}

PARTITIONED_BY: dict[str, list[str]] = {FEATURES: [MODEL_VERSION], USERS: [MODEL_VERSION], WAITING: [MODEL_VERSION]}

_LONG_MEMORY = {
    # Longer than any downtime of a reader, so that a stream never finds its log cleaned behind it.
    "delta.logRetentionDuration": "interval 60 days",
    "delta.deletedFileRetentionDuration": "interval 30 days",
}
# Of tables with a commit every batch: a checkpoint of the log takes half as long as the batch that has to write it.
_OFTEN_WRITTEN = {**_LONG_MEMORY, "delta.checkpointInterval": "100"}
_MERGED = {**_LONG_MEMORY, "delta.enableDeletionVectors": "true"}
PROPERTIES: dict[str, dict[str, str]] = {
    # A MERGE of new events must not pass by an append that came meanwhile (mtl.intake).
    EVENTS: {**_OFTEN_WRITTEN, "delta.appendOnly": "true", "delta.isolationLevel": "Serializable"},
    QUARANTINE: _OFTEN_WRITTEN,
    INPUTS: {**_MERGED, "delta.enableChangeDataFeed": "true"},
    USER_ATTRIBUTES: _MERGED,
    MODELS: _LONG_MEMORY,
    FEATURES: _MERGED,
    USERS: {**_MERGED, **_OFTEN_WRITTEN},
    WAITING: _MERGED,
    LEDGER: _OFTEN_WRITTEN,
    PROGRESS: _OFTEN_WRITTEN,
    ERASURES: {},  # its old versions hold ids: no longer than they must
}
