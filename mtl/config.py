"""Settings: typed, validated, in layers (default file, --conf files, environment, --set)."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources_of
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from mtl.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable


def _conf() -> Traversable:
    """The folder conf: inside the package in a wheel, which may be a zip on the path; beside it in a checkout."""
    packaged = resources_of("mtl") / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "conf"


CONF = _conf()
DEFAULTS = CONF / "default.toml"
ENVIRONMENT_PREFIX = "MTL_"

AutoOrCount = Literal["auto"] | Annotated[int, Field(ge=1)]
Size = Annotated[str, Field(pattern=r"^(\d+[kmgt]?b?)?$")]  # bytes, as Spark reads them; "": no limit
AutoOrAny = Literal["auto"] | Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TablesSettings(_Section):
    root: str


def is_catalog(root: str) -> bool:
    """Whether tables.root is ``catalog.schema`` and no folder."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", root))


class SparkSettings(_Section):
    master: str
    driver_memory: str = Field(pattern=r"^\d+[kmgt]$")
    shuffle_partitions: int = Field(ge=1)
    log_level: Literal["ERROR", "WARN", "INFO", "DEBUG"]
    options: dict[str, str]


class IngestSettings(_Section):
    format: Literal["auto", "parquet", "csv", "jsonl"]
    csv_delimiter: str = Field(min_length=1)
    list_separator: str
    list_columns: list[str]
    recover_after_minutes: float = Field(ge=0, le=5_000_000)


class SourceSettings(_Section):
    kind: Literal["folder", "delta", "kafka"]
    path: str
    bootstrap_servers: str
    topic: str
    starting_offsets: str
    options: dict[str, str]
    drift: Literal["quarantine", "stop"]
    trigger_seconds: float = Field(ge=0)
    max_files_per_trigger: int = Field(ge=1)
    max_bytes_per_trigger: Size
    max_events_per_trigger: int = Field(ge=0)
    checkpoint: str


class ModelSettings(_Section):
    form: Literal["shared_basis", "multilevel"]
    loss: Literal["squared", "logistic", "poisson"]
    implicit_weight: float = Field(ge=0)
    half_life_days: float = Field(ge=0)
    k: AutoOrAny
    per_user: list[str]
    per_input: list[str]
    contexts: list[Annotated[str, Field(pattern=r"^\w[\w .-]*$")]]


class TrainSettings(_Section):
    algorithm: Literal["oracle", "boosted", "first_order"]
    iterations: AutoOrCount
    max_iterations: int = Field(ge=1)
    tolerance: float = Field(gt=0)
    holdout: float = Field(ge=0, lt=1)
    patience: int = Field(ge=1)
    max_events_per_user: int = Field(ge=0)
    precision: Literal["auto", "single", "double"]
    warm_start: bool
    incremental: bool
    lock: list[Literal["features", "users"]]
    checkpoint: str
    partitions: int = Field(ge=0)
    reduction: Literal["auto", "driver", "distributed"]
    driver_limit_mb: int = Field(ge=1)
    seed: int = Field(ge=0)


class OracleSettings(_Section):
    kind: Literal["identity", "linear", "sklearn", "xgboost", "lightgbm", "spark"]
    factory: str
    params: dict[str, Any]
    parallel: Literal["auto"] | bool
    shrinkage: float = Field(gt=0, le=1)
    residual: Literal["auto"] | bool
    pipeline: str


class FunctionSettings(_Section):
    kind: Literal["linear", "two_layer", "torch", "custom"]
    factory: str
    hidden: int = Field(ge=1)
    optimizer: Literal["lbfgs", "adam"]
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    batch: int = Field(ge=0)
    weight_decay: float = Field(ge=0)


class EncodeSettings(_Section):
    activity: bool
    spectral: AutoOrAny
    max_categories: int = Field(ge=1)
    min_category_count: int = Field(ge=1)
    text_dimensions: int = Field(ge=1)


class SupervisedSettings(_Section):
    labels: list[str]
    classifier: str
    params: dict[str, Any]
    min_count: int = Field(ge=1)
    max_labels: int = Field(ge=1)


class UpdateSettings(_Section):
    max_files_per_trigger: int = Field(ge=1)
    max_bytes_per_trigger: Size
    trigger_seconds: float = Field(ge=0)
    partitions: int = Field(ge=0)
    checkpoints: str
    learn_arrivals: bool
    rewrite_above: float = Field(ge=0, le=1)
    keep_mb: int = Field(ge=0)
    metrics_host: str
    metrics_port: int = Field(ge=0, le=65535)


class SwitchSettings(_Section):
    policy: Literal["manual", "automatic"]
    tolerance: float = Field(ge=0)
    min_events: int = Field(ge=1)
    lag_commits: int = Field(ge=0)
    grace_seconds: float = Field(ge=0)
    surprise_limit: float = Field(gt=1)
    surprise_events: int = Field(ge=1)
    retrain_here: bool


class CareSettings(_Section):
    compact_every_batches: int = Field(ge=0)
    vacuum_every_compactions: int = Field(ge=0)


class ServeSettings(_Section):
    host: str
    port: int = Field(ge=0, le=65535)
    workers: int = Field(ge=0)
    store: str
    store_gb: float = Field(gt=0)
    refresh_seconds: float = Field(gt=0)
    token: SecretStr  # never shown, nor stored with a model's settings
    max_body_kb: int = Field(ge=1)
    max_inputs: int = Field(ge=1)
    max_batch: int = Field(ge=1)
    max_k: int = Field(ge=1)
    body_seconds: float = Field(gt=0)
    users_cached: int = Field(ge=0)
    log: str
    segment_seconds: float = Field(gt=0)
    segment_mb: float = Field(gt=0)
    remember_hours: float = Field(gt=0)
    rescore: str
    feature_cache_mb: int = Field(ge=0)
    prediction_cache_mb: int = Field(ge=0)
    classes: Literal["exact", "rounded", "hashed", "clustered"]
    coarseness: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    deadline_ms: list[Annotated[float, Field(gt=0, le=60_000)]] = Field(min_length=1)
    objective_ms: float = Field(ge=0)
    explore: Literal["greedy", "linucb", "thompson"]
    explore_epsilon: float = Field(ge=0, le=1)
    explore_alpha: float = Field(ge=0)
    explore_draws: int = Field(ge=1, le=10_000)
    rivals: list[Annotated[int, Field(ge=1)]]
    contest: Literal["thompson", "exp3", "split"]
    contest_shares: list[Annotated[float, Field(gt=0)]]

    @field_validator("deadline_ms")
    @classmethod
    def _falls(cls, values: list[float]) -> list[float]:
        if any(b >= a for a, b in pairwise(values)):
            raise ValueError("each deadline is to be shorter than the one before")
        return values

    @field_validator("rivals")
    @classmethod
    def _differ(cls, values: list[int]) -> list[int]:
        if len(set(values)) < len(values):
            raise ValueError("each version can compete once")
        return values

    @model_validator(mode="after")
    def _centres_are_two(self) -> ServeSettings:
        if self.classes == "clustered" and min(self.coarseness) < 2:
            raise ValueError(
                f"coarseness = {self.coarseness}: with classes = 'clustered' numbers of centres are wanted, 2 or more each, "
                "such as [1000, 100]"
            )
        return self

    @model_validator(mode="after")
    def _one_share_each(self) -> ServeSettings:
        if self.contest_shares and len(self.contest_shares) != 1 + len(self.rivals):
            raise ValueError(
                f"contest_shares: {1 + len(self.rivals)} are wanted, of the live version and of each rival"
            )
        return self


class EvaluateSettings(_Section):
    als_ranks: list[int] = Field(min_length=1)
    als_regularization: list[float] = Field(min_length=1)
    als_iterations: int = Field(ge=1)
    validation_fraction: float = Field(gt=0, lt=1)


class AuditSettings(_Section):
    tolerance: float = Field(gt=0)


class MlflowSettings(_Section):
    tracking_uri: str
    experiment: str = Field(min_length=1)
    model_limit_mb: int = Field(ge=0)


class Settings(_Section):
    """All settings of a job; see conf/default.toml for what each means."""

    tables: TablesSettings
    spark: SparkSettings
    ingest: IngestSettings
    source: SourceSettings
    model: ModelSettings
    train: TrainSettings
    oracle: OracleSettings
    function: FunctionSettings
    encode: EncodeSettings
    supervised: SupervisedSettings
    update: UpdateSettings
    switch: SwitchSettings
    care: CareSettings
    serve: ServeSettings
    evaluate: EvaluateSettings
    audit: AuditSettings
    mlflow: MlflowSettings


def load_settings(
    files: Sequence[str | Path] = (), assignments: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from the default file, then ``files``, the environment, ``assignments`` and ``values``, later wins.

    Args:
        files: TOML files.
        assignments: ``section.key=value``; the value is TOML, or text where it is not.
        values: ``section.key`` → the value itself.

    Raises:
        ConfigError: a file is missing or malformed, a key is unknown (the nearest valid one is named) or a
            value is out of its range.
    """
    tree: dict[str, Any] = {}
    for file in (DEFAULTS, *map(Path, files)):
        _merge(tree, _read(file))
    _merge(tree, _assigned(_environment()))
    _merge(tree, _assigned(assignments))
    for path, value in (values or {}).items():
        section, _, key = path.partition(".")
        if not key:
            raise ConfigError(f"setting {path!r}: write section.key")
        tree[section] = {**tree.get(section, {}), key: value}
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def valid_keys() -> list[str]:
    """Every ``section.key`` there is."""
    return [
        f"{section}.{key}"
        for section, field in Settings.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]


def _read(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not valid TOML: {error}") from None


def _merge(base: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and base[key]:
            _merge(base[key], value)
        else:
            base[key] = value


def _assigned(assignments: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        # What follows section.key is one name inside a table, dots and all: spark.options.spark.executor.memory.
        section, key, *inner = path.strip().split(".", 2) if "." in path else ("", "")
        if not (equals and section and key):
            raise ConfigError(f"--set {assignment}: write section.key=value")
        value = _value(text.strip(), _type_of(section, key) in ((dict[str, str],) if inner else (str, SecretStr)))
        _merge(tree, {section: {key: {inner[0]: value} if inner else value}})
    return tree


def _type_of(section: str, key: str) -> Any:
    fields = getattr(Settings.model_fields.get(section), "annotation", Settings).model_fields
    return fields[key].annotation if key in fields else None


def _value(text: str, is_text: bool) -> Any:
    """TOML, or the text itself where it is no TOML or where the setting wants text (a folder named 2026)."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if is_text and not isinstance(value, str) else value


def _environment() -> list[str]:
    """The assignments of the variables MTL_SECTION__KEY."""
    assignments = []
    sections = Settings.model_fields
    for name, value in os.environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if section in sections and key:
            assignments.append(f"{section}.{key}={value}")
        elif separator:
            raise ConfigError(f"environment variable {name}: no section {section!r}; there are {', '.join(sections)}")
        elif section.split("_")[0] in sections:
            raise ConfigError(f"environment variable {name}: write {ENVIRONMENT_PREFIX}SECTION__KEY, two underscores")
    return assignments


def _explain(error: ValidationError) -> str:
    """One line a mistake: the key, what is wrong, and for an unknown key the nearest valid one."""
    reasons: dict[str, list[str]] = {}
    for mistake in error.errors():
        path = [str(part) for part in mistake["loc"]]
        key = ".".join(path[:2])
        if mistake["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(
                key, valid_keys() if len(path) > 1 else list(Settings.model_fields), 1, 0.0
            )
            reasons[f"unknown setting {key!r}"] = [f"did you mean {nearest[0]!r}?"]
        else:
            # A union reports each of its members: one mistake, several remedies.
            value = "(not shown)" if _type_of(path[0], path[-1]) is SecretStr else repr(mistake["input"])
            is_section = len(path) == 1 and isinstance(mistake["input"], dict)  # which may hold a secret
            of_one = f"section {key}" if is_section else f"setting {key} = {value}"
            remedies = reasons.setdefault(of_one, [])
            remedies.append(mistake["msg"][0].lower() + mistake["msg"][1:])
    return "; ".join(
        f"{mistake}: " + " or ".join(dict.fromkeys(remedies)).replace(" or input should be ", " or ")
        for mistake, remedies in reasons.items()
    )
