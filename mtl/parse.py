"""Cells of offered files become ids, numbers and times, or a reason for refusing the row; all in Spark's expressions.

Every cast is a try_cast: under ANSI rules a plain one would stop the job at the first bad cell.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl.config import ModelSettings
from mtl.errors import ConfigError, InputError
from mtl.read import MALFORMED, SourceFile, match, quoted
from mtl.schema import (
    CONTEXT,
    EVENT_ID,
    EVENT_TIME,
    INPUT_ID,
    LABEL,
    LARGEST,
    LARGEST_EXPONENT,
    OFFSET,
    RAW,
    REASON,
    USER_ID,
    WEIGHT,
)

EVENT_COLUMNS = (EVENT_ID, USER_ID, INPUT_ID, LABEL, WEIGHT, EVENT_TIME, OFFSET, CONTEXT)
OFFERED_COLUMNS = EVENT_COLUMNS[:-1]  # of files: contexts come as columns of their own names
REQUIRED_EVENT_COLUMNS = (USER_ID, INPUT_ID, LABEL)

_BLANK = "_blank_"
_NO_TIME = "null"  # no event time reads like this: times are digits
_YEAR_1, _YEAR_10000 = -62_135_596_800_000_000, 253_402_300_800_000_000  # µs since 1970


def text_id(cell: Column, kind: T.DataType) -> Column:
    """An id as text: numbers without a fraction as integers (1.0 → "1"); empty text, null and NaN → null."""
    if isinstance(kind, T.DoubleType | T.FloatType | T.DecimalType):
        whole = (cell % 1 == 0) & (F.abs(cell) < 1e18)
        text = F.when(whole, cell.try_cast("bigint").cast("string")).otherwise(cell.cast("string"))
        return text if isinstance(kind, T.DecimalType) else F.when(~F.isnan(cell), text)
    text = cell.cast("string")
    return F.when(F.trim(text) != "", text)


def number(cell: Column, kind: T.DataType) -> Column:
    """A double; null where the text is no decimal number. −0 becomes 0."""
    if isinstance(kind, T.StringType):
        # Java reads "1d", "2f" and hexadecimals as numbers as well; a person did not mean them so.
        value = F.when(~cell.rlike("[0-9.][dDfFxX]"), cell.try_cast("double"))
    elif isinstance(kind, T.FloatType):
        value = cell.cast("string").try_cast("double")  # 0.1f is 0.1, as a CSV file of the same rows has it
    else:
        value = cell.try_cast("double")
    return F.when(value == 0, 0.0).otherwise(value)


def moment(cell: Column, kind: T.DataType) -> Column:
    """A timestamp from a timestamp, a date, ISO 8601 text (UTC where it names no zone) or an epoch.

    An epoch, a number or its text, counts seconds with fractions; above 1e11 milliseconds, above 1e14
    microseconds, above 1e17 nanoseconds. What is no time between the years 1 and 9999 becomes null.
    """
    if isinstance(kind, T.TimestampType | T.TimestampNTZType | T.DateType):
        return cell.cast("timestamp")
    # Decimals, not doubles: an epoch in nanoseconds has more digits than a double.
    epoch = cell.try_cast("decimal(29,9)")
    size = F.abs(epoch)
    micros = (
        F.when(size <= F.expr("100000000000BD"), F.floor(epoch * F.expr("1000000BD")).try_cast("bigint"))
        .when(size <= F.expr("100000000000000BD"), F.floor(epoch * F.expr("1000BD")).try_cast("bigint"))
        .when(size <= F.expr("100000000000000000BD"), F.floor(epoch).try_cast("bigint"))
        .otherwise(F.floor(epoch / F.expr("1000BD")).try_cast("bigint"))
    )
    at = F.when((micros >= _YEAR_1) & (micros < _YEAR_10000), F.timestamp_micros(micros))
    if isinstance(kind, T.StringType):
        # Spark reads a bare "12:30" as today; a time without its day is no time here.
        iso = F.when(cell.rlike(r"^\s*\d{4}-\d"), cell.try_cast("timestamp"))
        return F.coalesce(at, iso)
    return at


def derived_id() -> Column:
    """The id of an event that came without one: the same content, whatever the file's format, the same id.

    The first 32 hexadecimal digits of SHA-256 over user_id, input_id, label, weight and event_time in their typed
    form (doubles as Java prints them, times in microseconds since 1970, "null" for none), joined by U+001F, and where
    the event has them the offset and the JSON object of its contexts.
    """
    time = F.coalesce(F.unix_micros(F.col(EVENT_TIME)).cast("string"), F.lit(_NO_TIME))
    parts = [F.col(USER_ID), F.col(INPUT_ID), F.col(LABEL).cast("string"), F.col(WEIGHT).cast("string"), time]
    parts += [F.col(OFFSET).cast("string"), F.col(CONTEXT)]  # a null is passed over
    return F.substring(F.sha2(F.concat_ws("\u001f", *parts), 256), 1, 32)


def refusal(format: str, loss: str, timed: bool = False) -> Column:
    """All reasons for which a typed row is no event, joined by "; ", or null where there is none.

    Args:
        format: of the file, to name a malformed line by.
        loss: of the model; ``logistic`` accepts the labels 0 and 1 only, ``poisson`` counts.
        timed: whether every event needs a time.
    """
    label, weight, offset = F.col(LABEL), F.col(WEIGHT), F.col(OFFSET)
    there = {name: ~F.col(_BLANK + name) for name in (LABEL, WEIGHT, EVENT_TIME, OFFSET)}
    largest_offset = LARGEST if loss == "squared" else LARGEST_EXPONENT
    limited = (LABEL, label, LARGEST), (WEIGHT, weight, LARGEST), (OFFSET, offset, largest_offset)
    reasons = [
        (F.col(USER_ID).isNull(), f"{USER_ID} is missing"),
        (F.col(INPUT_ID).isNull(), f"{INPUT_ID} is missing"),
        # Whatever cannot be read is this character, so that different ids would be one.
        *((F.col(name).contains("\ufffd"), f"{name} is not UTF-8") for name in (USER_ID, INPUT_ID)),
        (~there[LABEL], f"{LABEL} is missing"),
        (there[LABEL] & label.isNull(), f"{LABEL} is not a number"),
        (~_finite(label), f"{LABEL} is not finite"),
        (there[WEIGHT] & weight.isNull(), f"{WEIGHT} is not a number"),
        (~_finite(weight), f"{WEIGHT} is not finite"),
        (_finite(weight) & (weight <= 0), f"{WEIGHT} is not above 0"),
        *((_finite(value) & (F.abs(value) > most), f"{name} is beyond {most:g}") for name, value, most in limited),
        (there[OFFSET] & offset.isNull(), f"{OFFSET} is not a number"),
        (~_finite(offset), f"{OFFSET} is not finite"),
        (there[EVENT_TIME] & F.col(EVENT_TIME).isNull(), f"{EVENT_TIME} is not understood"),
    ]
    if timed:
        reasons.append((~there[EVENT_TIME], f"{EVENT_TIME} is missing (model.half_life_days)"))
    if loss == "logistic":
        reasons.append((_finite(label) & ~label.isin(0.0, 1.0), f"{LABEL} is neither 0 nor 1 (logistic loss)"))
    if loss == "poisson":
        is_count = (label >= 0) & (label == F.floor(label))
        reasons.append((_finite(label) & ~is_count, f"{LABEL} is no count 0, 1, 2, … (Poisson loss)"))
    found = F.concat_ws("; ", *(F.when(condition, F.lit(reason)) for condition, reason in reasons))
    return F.when(F.col(MALFORMED).isNotNull(), F.lit(f"malformed {_NAMES[format]}")).otherwise(
        F.when(found != "", found)
    )


def typed_events(
    file: SourceFile, found: Mapping[str, str], loss: str, timed: bool = False, contexts: Sequence[str] = ()
) -> DataFrame:
    """The file's rows as events, with the reason of refusal and, where there is one, the raw row.

    Args:
        found: our column → the file's, see :func:`match_events`.
        loss, timed: see :func:`refusal`.
        contexts: columns whose values are kept with the events (:mod:`mtl.effects`).

    Raises:
        InputError: a column's type cannot hold what the column means.
    """

    def cell(name: str, kinds: tuple[type[T.DataType], ...]) -> tuple[Column, T.DataType]:
        if name not in found:
            return F.lit(None).cast("string"), T.StringType()
        kind = file.kind(found[name])
        if isinstance(kind, T.NullType):
            return quoted(found[name]).cast("string"), T.StringType()
        if not isinstance(kind, kinds):
            raise InputError(f"{file.path}: column {found[name]} ({name}) has the type {kind.simpleString()}")
        return quoted(found[name]), kind

    cells = {name: cell(name, (T.StringType, T.NumericType, T.BooleanType)) for name in (LABEL, WEIGHT, OFFSET)}
    times = (T.StringType, T.NumericType, T.TimestampType, T.TimestampNTZType, T.DateType)
    cells[EVENT_TIME] = cell(EVENT_TIME, times)
    ids = {name: cell(name, (T.AtomicType,)) for name in (EVENT_ID, USER_ID, INPUT_ID)}
    values = {name: text_id(*cell(name, (T.AtomicType,))) for name in sorted(contexts)}
    weight = F.when(F.col(_BLANK + WEIGHT), 1.0).otherwise(number(*cells[WEIGHT]))
    rows = file.rows.select(
        "*",
        *(_blank(*cells[name]).alias(_BLANK + name) for name in cells),
    ).select(
        F.col(MALFORMED),
        file.raw().alias(RAW),
        *(F.col(_BLANK + name) for name in cells),
        *(text_id(*ids[name]).alias(name) for name in ids),
        number(*cells[LABEL]).alias(LABEL),
        weight.alias(WEIGHT),
        moment(*cells[EVENT_TIME]).alias(EVENT_TIME),
        number(*cells[OFFSET]).alias(OFFSET),
        context(values).alias(CONTEXT),
    )
    return rows.withColumn(REASON, refusal(file.format, loss, timed)).select(
        F.coalesce(EVENT_ID, derived_id()).alias(EVENT_ID),
        *EVENT_COLUMNS[1:],
        REASON,
        F.when(F.col(REASON).isNotNull(), F.col(RAW)).alias(RAW),
    )


def context(values: Mapping[str, Column]) -> Column:
    """The values (text) by their names as one JSON object; null where there are none."""
    if not values:
        return F.lit(None).cast("string")
    there = F.coalesce(*values.values()).isNotNull()
    return F.when(there, F.to_json(F.struct(*(value.alias(name) for name, value in values.items()))))


def check_renames(columns: Mapping[str, str], contexts: Sequence[str]) -> None:
    """Refuse renames of what is no column of ours.

    Raises:
        InputError: names it.
    """
    ours = (*OFFERED_COLUMNS, *contexts)
    for name, theirs in columns.items():
        if name not in ours:
            nearest = difflib.get_close_matches(name, ours, 1, 0.0)[0]
            raise InputError(
                f"--columns {name}={theirs}: events have no column {name}, the nearest is {nearest} (model.contexts adds some)"
            )


def check_contexts(names: Sequence[str]) -> None:
    """Refuse contexts with names that are not theirs alone.

    Raises:
        ConfigError: names it.
    """
    for i, name in enumerate(names):
        if name in EVENT_COLUMNS or name in names[:i]:
            raise ConfigError(
                f"model.contexts: {name} is "
                + ("named twice" if name in names[:i] else "a column that events have anyway")
            )


def match_events(
    file: SourceFile,
    columns: Mapping[str, str],
    contexts: Sequence[str],
    required: Sequence[str] = REQUIRED_EVENT_COLUMNS,
) -> dict[str, str]:
    """:func:`mtl.read.match` for a file of events.

    Raises:
        ConfigError: a context has the name of another column of events.
        InputError: see there.
    """
    check_contexts(contexts)
    return match(file, columns, (*OFFERED_COLUMNS, *contexts), required)


def offered_events(
    file: SourceFile, columns: Mapping[str, str], model: ModelSettings, required: Sequence[str] = REQUIRED_EVENT_COLUMNS
) -> tuple[dict[str, str], DataFrame]:
    """Which of the file's columns are ours, and its rows as events (:func:`typed_events`) for a model of these settings.

    Raises:
        InputError, ConfigError: see :func:`match_events` and :func:`typed_events`.
    """
    found = match_events(file, columns, model.contexts, required)
    return found, typed_events(file, found, model.loss, model.half_life_days > 0, model.contexts)


def refused_events(file: SourceFile, reason: str) -> DataFrame:
    """All rows of a file as :func:`typed_events` has refused ones."""
    kinds = {LABEL: "double", WEIGHT: "double", EVENT_TIME: "timestamp", OFFSET: "double"}
    nothing = (F.lit(None).cast(kinds.get(name, "string")).alias(name) for name in EVENT_COLUMNS)
    return file.rows.select(*nothing, F.lit(reason).alias(REASON), file.raw().alias(RAW))


def checked_events(
    rows: DataFrame,
    user: str,
    input: str,
    label: str,
    weight: str | None,
    loss: str,
    offset: str | None = None,
    contexts: Sequence[str] = (),
) -> DataFrame:
    """(user_id, input_id, label, weight, offset, context, reason): rows of a DataFrame, with the reason for refusing one.

    Args:
        user, input, label, weight, offset: names of its columns; every weight is 1 where there is no column of weights.
        contexts: names of its columns that are contexts.
    """

    def cell(name: str) -> tuple[Column, T.DataType]:
        return quoted(name), rows.schema[name].dataType

    typed = rows.select(
        text_id(*cell(user)).alias(USER_ID),
        text_id(*cell(input)).alias(INPUT_ID),
        number(*cell(label)).alias(LABEL),
        (number(*cell(weight)) if weight else F.lit(1.0)).alias(WEIGHT),
        quoted(label).isNull().alias(_BLANK + LABEL),
        F.lit(False).alias(_BLANK + WEIGHT),
        F.lit(True).alias(_BLANK + EVENT_TIME),
        F.lit(None).cast("timestamp").alias(EVENT_TIME),
        (number(*cell(offset)) if offset else F.lit(None).cast("double")).alias(OFFSET),
        (quoted(offset).isNull() if offset else F.lit(True)).alias(_BLANK + OFFSET),
        context({name: text_id(*cell(name)) for name in sorted(contexts)}).alias(CONTEXT),
        F.lit(None).cast("string").alias(MALFORMED),
    )
    return typed.select(USER_ID, INPUT_ID, LABEL, WEIGHT, OFFSET, CONTEXT, refusal("parquet", loss).alias(REASON))


_NAMES = {"csv": "CSV", "jsonl": "JSON", "parquet": "Parquet"}


def _blank(cell: Column, kind: T.DataType) -> Column:
    return cell.isNull() | (F.trim(cell) == "") if isinstance(kind, T.StringType) else cell.isNull()


def _finite(value: Column) -> Column:
    # Null stays null, so that neither the condition nor its opposite holds.
    return F.abs(value) < float("inf")
