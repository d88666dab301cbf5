"""Files that people offer: found, opened as DataFrames, their columns matched with ours.

Nothing here looks at a value: :mod:`mtl.parse` does. Opening a file reads its header, footers or (JSON lines,
typed CSV) one pass for the names and types of its columns.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, DataFrameReader, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl.config import IngestSettings
from mtl.errors import InputError

MALFORMED = "_mtl_malformed"  # the text of a line that is no row, else null

_ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl"}
_ENDINGS[".ndjson"] = "jsonl"
_COMPRESSED = (".gz", ".bz2", ".zst", ".snappy", ".deflate", ".lz4")
_REMOTE = re.compile(r"[A-Za-z][\w+.-]*:/")
# Spark cannot read timestamps in nanoseconds, which pandas writes, but as numbers.
_NANOS_AS_LONG = "spark.sql.legacy.parquet.nanosAsLong"
_NANOS = (pyarrow.timestamp("ns"), pyarrow.timestamp("ns", "UTC"))
_TYPED_FOLDERS = "spark.sql.sources.partitionColumnTypeInference.enabled"  # of names such as user_id=007


@dataclass(frozen=True)
class SourceFile:
    """One offered file or folder: its rows, with the column ``MALFORMED`` beside the file's own ``columns``."""

    path: str
    format: str
    rows: DataFrame
    columns: tuple[str, ...]
    line: str | None = None  # a column that has the row as it came, where there is one

    def kind(self, column: str) -> T.DataType:
        return self.rows.schema[column].dataType

    def raw(self) -> Column:
        """The row as it came, as JSON; of a line that is no row, its text."""
        if self.line:
            return F.col(self.line)
        whole = F.to_json(F.struct(*(quoted(name) for name in self.columns)), {"ignoreNullFields": "false"})
        line = F.to_json(F.struct(F.col(MALFORMED).alias("malformed")))
        return F.when(F.col(MALFORMED).isNotNull(), line).otherwise(whole)


def quoted(name: str) -> Column:
    """The column of exactly this name, dots and backticks included."""
    return F.col(_in_backticks(name))


def _in_backticks(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def open_file(spark: SparkSession, path: str, settings: IngestSettings, texts: Collection[str] | None) -> SourceFile:
    """Open a Parquet, CSV (with header) or JSON-lines file, or a folder of them.

    Args:
        path: a file or folder, local or by URI.
        texts: columns of CSV and JSON files to read as text whatever they hold ("007" stays "007"); None: all.

    Raises:
        InputError: the path is missing, holds no readable file, its format is unknown, or it is empty or corrupt.
    """
    format = format_of(path, settings.format)
    return open_alike(spark, path, [path], format, settings, texts)


def open_alike(
    spark: SparkSession,
    path: str,
    files: list[str],
    format: str,
    settings: IngestSettings,
    texts: Collection[str] | None = None,
) -> SourceFile:
    """Open files of one format and, but for JSON lines, the same columns, as one; see :func:`open_file`.

    Args:
        path: what the messages call them.
    """
    with readable(path, format):
        if format == "parquet":
            rows = _parquet(spark, files, texts)
        else:
            rows = _csv(spark, files, settings, texts) if format == "csv" else _jsonl(spark, files, texts)
    columns = tuple(name for name in rows.columns if name != MALFORMED)
    twice = [name for name in columns if [other.lower() for other in columns].count(name.lower()) > 1]
    if twice:
        raise InputError(f"{path}: columns {', '.join(twice)} have the same name but for upper and lower case")
    return SourceFile(path, format, rows, columns)


@contextmanager
def readable(path: str, format: str) -> Iterator[None]:
    """Turn Spark's account of an unreadable file into one line that names the file."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        cause = error.java_exception.getMessage() if isinstance(error, Py4JJavaError) else str(error)
        line = " ".join((cause or str(error)).split("JVM stacktrace")[0].split())[:400]
        raise InputError(f"{path}: cannot be read as {format}: {line}") from None


def match(
    file: SourceFile, renames: Mapping[str, str], ours: Sequence[str], required: Collection[str]
) -> dict[str, str]:
    """Which of the file's columns is which of ours.

    A rename whose column the file lacks is passed over where the file has our own name for it: the rename is then
    meant for another file of the same call.

    Raises:
        InputError: a renamed or required column is not in the file, or a rename hides a column of our name.
    """
    found: dict[str, str] = {}
    for name in ours:
        theirs = renames.get(name, name)
        if theirs in file.columns:
            if theirs != name and name in file.columns and name not in renames.values():
                raise InputError(f"{file.path}: --columns {name}={theirs}, but the file has a column {name} as well")
            found[name] = theirs
        elif name in file.columns:
            found[name] = name
        elif name in renames:
            raise InputError(f"{file.path}: --columns {name}={theirs}, but {_absence(file, theirs, ours)}")
        elif name in required:
            nearest = _nearest(file, name, ours)
            raise InputError(f"{file.path}: {_absence(file, name, ours)}; if it is, say --columns {name}={nearest}")
    return found


def _absence(file: SourceFile, name: str, ours: Sequence[str]) -> str:
    return (
        f"there is no column {name}; the file has {', '.join(file.columns) or 'none'}; "
        f"the nearest is {_nearest(file, name, ours)}"
    )


def _nearest(file: SourceFile, name: str, ours: Sequence[str]) -> str:
    """The file's column spelled most like ``name``, of those that are not one of ours already."""
    lower = {column.lower(): column for column in reversed(file.columns) if column not in ours}
    return lower[difflib.get_close_matches(name.lower(), lower, 1, 0.0)[0]] if lower else "none"


def format_of(path: str, configured: str) -> str:
    """parquet, csv or jsonl: as configured, or by the endings of the file or the folder's files.

    Raises:
        InputError: there is no such path, or the endings do not say.
    """
    files = [path] if is_remote(path) else local_files(path)
    if configured != "auto":
        return configured
    formats = {}
    for file in files:
        stem, ending = os.path.splitext(file.rstrip("/").lower())
        if ending in _COMPRESSED:
            ending = os.path.splitext(stem)[1]
        if ending not in _ENDINGS:
            raise InputError(
                f"{file}: cannot tell its format from its ending {ending!r}; known are {', '.join(_ENDINGS)}; "
                f"or set ingest.format"
            )
        formats[_ENDINGS[ending]] = file
    if len(formats) > 1:
        raise InputError(f"{path}: mixes formats: {', '.join(f'{name} ({file})' for name, file in formats.items())}")
    return next(iter(formats))


def local_files(path: str) -> list[str]:
    """The files Spark will read: of a folder its own and those in partition folders key=value, hidden ones not."""
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no such file or folder")
    if os.path.isfile(path):
        if os.path.basename(path).startswith((".", "_")):
            raise InputError(f"{path}: Spark passes over files whose name begins with . or _: rename it")
        return [path]
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if "=" in name and not name.startswith((".", "_"))]
        files += [os.path.join(folder, name) for name in sorted(names) if not name.startswith((".", "_"))]
    if not files:
        raise InputError(f"{path}: the folder holds no file to read")
    return files


def parquet_shape(file: str) -> str:
    """Names and types of the columns of a local file, from its footer.

    Raises:
        InputError: it is no Parquet file.
    """
    return str(_footer(file))


def _footer(file: str) -> pyarrow.Schema:
    try:
        return pyarrow.parquet.read_schema(file).remove_metadata()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as parquet: {error}") from None


def csv_header(file: str, delimiter: str) -> list[str] | None:
    """The names in the first line of a local CSV file, in lower case; None where it is compressed as only Spark can read.

    Of a delimiter of several characters, which only Spark knows, the line is one name.

    Raises:
        InputError: it cannot be read.
    """
    if (opener := _opener(file)) is None:
        return None
    try:
        with opener(file, "rt", encoding="utf-8-sig", errors="replace", newline="") as lines:
            line = lines.readline().lower()
        return next(csv.reader([line], delimiter=delimiter), []) if len(delimiter) == 1 else [line.strip("\r\n")]
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as csv: {error}") from None


def _has_quoted_line_ends(file: str, delimiter: str) -> bool:
    """Whether rows of a local CSV file have line ends within quotes, all of them whole: a stray quote takes no others in."""
    if (opener := _opener(file)) is None or len(delimiter) > 1:
        return False
    try:
        with opener(file, "rb") as lines:
            if not any(line.count(b'"') % 2 for line in lines):
                return False
        with opener(file, "rt", encoding="utf-8-sig", errors="replace", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            width, last = len(next(rows, [])), rows.line_num
            for row in rows:
                if rows.line_num > last + 1 and len(row) != width:
                    return False
                last = rows.line_num
        return True
    except (OSError, EOFError, zlib.error, csv.Error):
        return False  # line by line, Spark says which is none


def _opener(file: str) -> Any:
    ending = os.path.splitext(file)[1]
    return {".gz": gzip.open, ".bz2": bz2.open}.get(ending, None if ending in _COMPRESSED else open)


def is_remote(path: str) -> bool:
    """Whether the path is a URI, for Spark to open."""
    return bool(_REMOTE.match(path))


def _reader(spark: SparkSession, paths: list[str]) -> DataFrameReader:
    """For local files by their names as they are: Spark would take [1] for a pattern."""
    return spark.read.option("__globPaths__", str(any(map(is_remote, paths))).lower())


def _parquet(spark: SparkSession, paths: list[str], texts: Collection[str] | None) -> DataFrame:
    # Spark would find a bad footer too, but with its executors' stack traces on the terminal.
    footers = [_footer(file) for path in paths if not is_remote(path) for file in local_files(path)]
    nanos = {field.name for footer in footers for field in footer if field.type in _NANOS}
    settings = {_NANOS_AS_LONG: "true"} | ({_TYPED_FOLDERS: "false"} if texts is None else {})
    for name, value in settings.items():
        spark.conf.set(name, value)
    try:
        rows = _reader(spark, paths).option("mergeSchema", "true").parquet(*paths)
    finally:
        for name in settings:
            spark.conf.unset(name)
    micros = {name: F.timestamp_micros(F.expr(f"{_in_backticks(name)} div 1000")) for name in nanos & {*rows.columns}}
    return rows.withColumns({**micros, MALFORMED: F.lit(None).cast("string")})


def _csv(spark: SparkSession, paths: list[str], settings: IngestSettings, texts: Collection[str] | None) -> DataFrame:
    files = [file for path in paths if not is_remote(path) for file in local_files(path)]
    headers = [csv_header(file, settings.csv_delimiter) for file in files]
    if other := next((file for file, header in zip(files, headers, strict=True) if header != headers[0]), None):
        raise InputError(f"{files[0]} and {other} have other header lines: ingest them apart")
    options: dict[str, bool | str] = {
        "header": True,
        "sep": settings.csv_delimiter,
        "escape": '"',  # RFC 4180: a quote within quotes is doubled
        "multiLine": any(
            _has_quoted_line_ends(file, settings.csv_delimiter) for file in files
        ),  # one task then reads a file
        # Where we could not, Spark compares the headers of a folder's files; not with names such as "", or that are there twice.
        "enforceSchema": not any(map(is_remote, paths)) and None not in headers,
        "columnPruning": False,  # a pruned column would hide a line of the wrong length
        "columnNameOfCorruptRecord": MALFORMED,
    }
    # The typed pass looks at every value; the untyped one at the first line only.
    schema = _reader(spark, paths).options(**options).option("inferSchema", texts is not None).csv(paths).schema
    if not schema.fields:
        raise InputError(f"{paths[0]}: the file is empty: a CSV file begins with a header line")
    return _reader(spark, paths).options(**options).schema(_with_texts(schema, texts)).csv(paths)


def _jsonl(spark: SparkSession, paths: list[str], texts: Collection[str] | None) -> DataFrame:
    reader = _reader(spark, paths).option("columnNameOfCorruptRecord", MALFORMED)
    schema = reader.option("primitivesAsString", texts is None).json(paths).schema
    if not [name for name in schema.names if name != MALFORMED]:
        raise InputError(f"{paths[0]}: there is no row: a JSON-lines file has one JSON object on each line")
    return reader.schema(_with_texts(schema, texts)).json(paths)


def _with_texts(schema: T.StructType, texts: Collection[str] | None) -> T.StructType:
    fields = [
        T.StructField(field.name, T.StringType() if texts is None or field.name in texts else field.dataType)
        for field in schema.fields
        if field.name != MALFORMED
    ]
    return T.StructType([*fields, T.StructField(MALFORMED, T.StringType())])
