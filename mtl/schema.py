"""Names of every table and column; nothing else in the project spells them. Their types are in :mod:`mtl.layout`."""

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
PHI = "phi"  # E[φ(x)], length d of mtl.forms, first entry 1
SECOND_MOMENT = "second_moment"  # E[φφᵀ], packed
OFFSET_PHI = "offset_phi"  # E[oφ], length d
IMPLICIT = "implicit"  # the input's attributes that its training events are, see mtl.implicit
OFFSET_VARIANCE = "offset_variance"  # Var[o]
RESIDUAL = "residual"  # what training added to the oracle's (o, f_1 …), length d
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

# Metadata of a commit that wrote all of a version's users anew, some of them changed (mtl.upsert).
REPLACED = "replaced"

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
