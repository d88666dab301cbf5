"""Attributes of inputs and users from files into their tables: an upsert by key that touches only what changed.

An attribute is a number (double), a text, or a list of texts or numbers. Integers, decimals and floats become
doubles, so that a later file with fractions does not conflict; booleans become "true" and "false"; dates and times
become days since 1970. A column new to the table joins it; a column that a file lacks keeps its values.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl.config import IngestSettings
from mtl.errors import ConfigError, InputError
from mtl.parse import EVENT_COLUMNS, text_id
from mtl.read import MALFORMED, SourceFile, match, open_file, quoted, readable
from mtl.schema import BATCH, CREATED_AT, INPUT_ID, INPUTS, QUARANTINE, RAW, REASON, SOURCE, USER_ATTRIBUTES, USER_ID
from mtl.tables import Tables

log = logging.getLogger("mtl")

ATTRIBUTE_TABLES = {INPUTS: INPUT_ID, USER_ATTRIBUTES: USER_ID}

# Beside attributes of any name.
_COPY, _RAW, _REASON = "_mtl_copy", "_mtl_raw", "_mtl_reason"
_FORBIDDEN = re.compile(r"[ ,;{}()\n\t=]")  # what Delta does not take in a column name
_DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class AttributeReport:
    """What became of the rows of one file: ``upserted`` counts the rows of the table that are new or changed."""

    offered: int
    upserted: int
    duplicates: int
    quarantined: int
    batch: str


@dataclass(frozen=True)
class OfferedAttributes:
    """A file of attributes, read and checked; ``rows`` (persisted) holds key, attributes, reason, raw row and copy."""

    table: str
    rows: DataFrame
    attributes: tuple[str, ...]
    source: str
    plan: AttributeReport  # upserted still 0
    used: frozenset[str]


def read_attributes(
    tables: Tables, settings: IngestSettings, path: str, table: str, columns: Mapping[str, str]
) -> OfferedAttributes:
    """Read and check a file of attributes for ``table``; nothing is written.

    Rows without a key, and all rows of a key whose rows differ, are refused; of equal rows one counts.

    Args:
        columns: our name → the file's; names of event columns other than the key are left to the events file.

    Raises:
        InputError: the file cannot be read, lacks the key, has a column that is no attribute, or one whose type
            is not the stored one.
        ConfigError: ``list_columns`` without a ``list_separator``.
    """
    if settings.list_columns and not settings.list_separator:
        raise ConfigError("ingest.list_columns needs ingest.list_separator, the text between two categories")
    log.info("ingest: reading %s from %s", table, path)
    key = ATTRIBUTE_TABLES[table]
    renames = {ours: theirs for ours, theirs in columns.items() if ours == key or ours not in EVENT_COLUMNS}
    lists = {name for ours in settings.list_columns for name in (ours, renames.get(ours, ours))}
    file = open_file(tables.spark, path, settings, texts={key, renames.get(key, key)} | lists)
    # A rename of an attribute concerns this file only if its column is here.
    here = {ours: theirs for ours, theirs in renames.items() if ours == key or theirs in file.columns}
    found = match(file, here, list(here.keys() | {key}), (key,))
    ours_of = {theirs: ours for ours, theirs in found.items()}
    names = {theirs: ours_of.get(theirs, theirs) for theirs in file.columns}
    attributes = {
        names[theirs]: _attribute(file, theirs, names[theirs], settings)
        for theirs in file.columns
        if theirs != found[key] and not isinstance(file.kind(theirs), T.NullType)
    }
    _check_names(file, attributes)
    rows = _refused(file, key, text_id(quoted(found[key]), file.kind(found[key])), attributes).persist()
    first = F.col(_COPY) == 1
    with readable(path, file.format):
        offered, refused, kept, *filled = rows.agg(
            F.count("*"),
            F.count(_REASON),
            F.count(F.when(F.col(_REASON).isNull() & first, 1)),
            *(F.count(quoted(name)) for name in attributes),
        ).collect()[0]
    # A column without a value has no type that a later file should have to agree with.
    present = tuple(name for name, values in zip(attributes, filled, strict=True) if values)
    _check_types(tables, table, file, rows, present)
    plan = AttributeReport(offered, 0, offered - refused - kept, refused, uuid.uuid4().hex)
    used = frozenset(ours for ours, theirs in renames.items() if found.get(ours) == theirs)
    return OfferedAttributes(table, rows, present, path, plan, used)


def write_attributes(tables: Tables, offered: OfferedAttributes) -> AttributeReport:
    """Upsert what was read, and keep the refused rows in quarantine.

    The upsert comes first and may be repeated: a crash before the second step loses refused rows that the next
    ingest of the same file refuses again.
    """
    key, plan = ATTRIBUTE_TABLES[offered.table], offered.plan
    rows = offered.rows.where(F.col(_REASON).isNull() & (F.col(_COPY) == 1))
    rows = rows.select(key, *(quoted(name) for name in offered.attributes))
    stored = {name.lower() for name in tables.read(offered.table).columns}
    changed = F.lit(False)
    for name in offered.attributes:
        new = F.col(f"new.{_tick(name)}")
        known = F.col(f"known.{_tick(name)}") if name.lower() in stored else F.lit(None)
        changed = changed | ~new.eqNullSafe(known)
    outcome = (
        tables.delta(offered.table)
        .alias("known")
        .merge(rows.alias("new"), f"known.{key} = new.{key}")
        .withSchemaEvolution()
        .whenMatchedUpdateAll(condition=changed)
        .whenNotMatchedInsertAll()
        .execute()
    )
    report = AttributeReport(plan.offered, outcome.collect()[0][0], plan.duplicates, plan.quarantined, plan.batch)
    if plan.quarantined:
        refused = offered.rows.where(F.col(_REASON).isNotNull()).select(
            F.col(_RAW).alias(RAW),
            F.col(_REASON).alias(REASON),
            F.lit(offered.source).alias(SOURCE),
            F.lit(plan.batch).alias(BATCH),
            F.current_timestamp().alias(CREATED_AT),
        )
        tables.append(QUARANTINE, refused, once=(f"ingest-{offered.table}-{plan.batch}", 0))
    log.info("ingest: %s: %s", offered.source, report)
    return report


def _refused(file: SourceFile, key: str, identity: Column, attributes: Mapping[str, Column]) -> DataFrame:
    """Rows with their reason, and their number among equal rows of the same key."""
    rows = file.rows.select(
        identity.alias(key),
        *(value.alias(name) for name, value in attributes.items()),
        file.raw().alias(_RAW),
        MALFORMED,
    )
    same_key = Window.partitionBy(key)
    conflict = F.min(_RAW).over(same_key) != F.max(_RAW).over(same_key)
    reason = (
        F.when(F.col(MALFORMED).isNotNull(), "malformed CSV" if file.format == "csv" else "malformed JSON")
        .when(F.col(key).isNull(), f"{key} is missing")
        .when(conflict, F.concat(F.lit(f"conflicting attributes for {key} "), F.col(key)))
    )
    # A malformed line may have a readable key; it must not make a good row of that key a conflict.
    rows = rows.withColumn(key, F.when(F.col(MALFORMED).isNull(), F.col(key)))
    return rows.withColumn(_REASON, reason).withColumn(_COPY, F.row_number().over(same_key.orderBy(_RAW)))


def _attribute(file: SourceFile, theirs: str, ours: str, settings: IngestSettings) -> Column:
    cell, kind = quoted(theirs), file.kind(theirs)
    if ours in settings.list_columns and isinstance(kind, T.AtomicType):
        parts = F.split(cell.cast("string"), re.escape(settings.list_separator))
        return F.filter(F.transform(parts, F.trim), lambda part: part != "")
    return attribute(cell, kind, f"{file.path}: column {theirs}")


def attribute(cell: Column, kind: T.DataType, name: str) -> Column:
    """A cell of an attribute as the tables hold it; ``name`` says in an error where it is from.

    Raises:
        InputError: attributes cannot have this type.
    """
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.StringType):
        return cell
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.NumericType):
        return cell.cast("array<double>")
    if isinstance(kind, T.NumericType):
        return cell.cast("double")
    if isinstance(kind, T.StringType | T.BooleanType):
        return cell.cast("string")
    if isinstance(kind, T.DateType | T.TimestampType | T.TimestampNTZType):
        return F.unix_micros(cell.cast("timestamp")) / (_DAY_SECONDS * 1e6)
    raise InputError(
        f"{name} has the type {kind.simpleString()}; an attribute is a number, a text, a boolean, a time, or a list of "
        f"texts or numbers"
    )


def _check_names(file: SourceFile, attributes: Mapping[str, Column]) -> None:
    for name in attributes:
        if _FORBIDDEN.search(name):
            raise InputError(
                f"{file.path}: column {name!r} has a character that Delta does not take in a name (space , ; {{ }} ( ) "
                f"=): say --columns {_FORBIDDEN.sub('_', name)}={name}"
            )


def _check_types(tables: Tables, table: str, file: SourceFile, rows: DataFrame, attributes: tuple[str, ...]) -> None:
    if not tables.exists(table):
        return
    stored = {field.name.lower(): field.dataType.simpleString() for field in tables.read(table).schema.fields}
    for name in attributes:
        offered = rows.schema[name].dataType.simpleString()
        known = stored.get(name.lower(), offered)
        if known != offered:
            raise InputError(f"{file.path}: column {name} is {offered}, but the table {table} holds it as {known}")


def _tick(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"
