"""Settings: typed, validated, in layers (default file, --conf files, environment, --set)."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from mtl.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pydantic-settings[toml] brings it

DEFAULTS = Path(__file__).resolve().parent.parent / "conf" / "default.toml"
ENVIRONMENT_PREFIX = "MTL_"

AutoOrCount = Literal["auto"] | Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TablesSettings(_Section):
    root: str


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


class ModelSettings(_Section):
    form: Literal["shared_basis"]
    loss: Literal["squared"]
    k: AutoOrCount


class TrainSettings(_Section):
    iterations: AutoOrCount
    max_iterations: int = Field(ge=1)
    tolerance: float = Field(gt=0)
    partitions: int = Field(ge=0)
    reduction: Literal["auto", "driver", "distributed"]
    driver_limit_mb: int = Field(ge=1)
    seed: int


class OracleSettings(_Section):
    kind: Literal["identity", "linear", "sklearn", "spark"]
    factory: str
    params: dict[str, Any]
    residual: bool
    pipeline: str


class EncodeSettings(_Section):
    activity: bool
    max_categories: int = Field(ge=1)
    min_category_count: int = Field(ge=1)
    text_dimensions: int = Field(ge=1)


class UpdateSettings(_Section):
    max_files_per_trigger: int = Field(ge=1)
    trigger_seconds: float = Field(ge=0)
    partitions: int = Field(ge=0)
    checkpoint: str


class EvaluateSettings(_Section):
    als_ranks: list[int] = Field(min_length=1)
    als_regularization: list[float] = Field(min_length=1)
    als_iterations: int = Field(ge=1)
    validation_fraction: float = Field(gt=0, lt=1)


class AuditSettings(_Section):
    tolerance: float = Field(gt=0)


class Settings(BaseSettings):
    """All settings of a job; see conf/default.toml for what each means."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__"
    )

    tables: TablesSettings
    spark: SparkSettings
    ingest: IngestSettings
    model: ModelSettings
    train: TrainSettings
    oracle: OracleSettings
    encode: EncodeSettings
    update: UpdateSettings
    evaluate: EvaluateSettings
    audit: AuditSettings


def load_settings(files: Sequence[str | Path] = (), assignments: Sequence[str] = ()) -> Settings:
    """Settings from the default file, then ``files``, the environment and ``assignments``, later wins.

    Args:
        files: TOML files.
        assignments: ``section.key=value``; the value is TOML, or text where it is not.

    Raises:
        ConfigError: a file is missing or malformed, a key is unknown (the nearest valid one is named) or a
            value is out of its range.
    """
    layers: dict[str, Any] = {}
    for file in (DEFAULTS, *files):
        _merge(layers, _read(Path(file)))
    _check_environment()

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            **_: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=layers)

    try:
        return Layered(**_assigned(assignments))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def valid_keys() -> list[str]:
    """Every ``section.key`` there is."""
    return [
        f"{section}.{key}"
        for section, field in Settings.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"configuration file {file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
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
        *sections, key = path.strip().split(".")
        if not equals or not sections:
            raise ConfigError(f"--set {assignment}: write section.key=value")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = _value(text.strip())
    return tree


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_environment() -> None:
    sections = Settings.model_fields
    for name in os.environ:
        section = name.removeprefix(ENVIRONMENT_PREFIX).split("__")[0].lower()
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name and section not in sections:
            raise ConfigError(f"environment variable {name}: no section {section!r}; there are {', '.join(sections)}")


def _explain(error: ValidationError) -> str:
    """One line a mistake: the key, what is wrong, and for an unknown key the nearest valid one."""
    reasons = []
    for mistake in error.errors():
        path = [str(part) for part in mistake["loc"]]
        key = ".".join(path[:2])
        if mistake["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(
                key, valid_keys() if len(path) > 1 else list(Settings.model_fields), 1, 0.0
            )
            reasons.append(f"unknown setting {key!r}: did you mean {nearest[0]!r}?")
        else:
            reasons.append(f"setting {key} = {mistake['input']!r}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}")
    return "; ".join(dict.fromkeys(reasons))
