"""Where the ingest stream takes its rows from: a folder, a Delta table or a Kafka topic; their columns as they drift.

A folder is streamed by the names of its files; each micro-batch opens its files as :mod:`mtl.read` opens offered ones.
A file is to be moved into the folder whole, for it is read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from mtl.config import Settings
from mtl.errors import ConfigError, InputError, StateError
from mtl.parse import OFFERED_COLUMNS, REQUIRED_EVENT_COLUMNS, match_events, offered_events, refused_events
from mtl.read import MALFORMED, SourceFile, csv_header, format_of, is_remote, open_alike, parquet_shape, readable
from mtl.schema import EVENT_ID

_FILES = "path string, modificationTime timestamp, length long, content binary"
_VALUE = "value"
_LINE = "_mtl_line"  # a name that no field of a row has
_PATTERN = set("{}[]*?\\")  # characters in a name, of which Spark makes a pattern
_ANY_AGE = "36500d"  # Spark passes over files that are a week older than the newest: restored or moved ones are


@dataclass(frozen=True)
class Source:
    """A configured source of events.

    Args:
        columns: our column → the source's.
    """

    spark: SparkSession
    settings: Settings
    columns: Mapping[str, str]

    @property
    def name(self) -> str:
        """What tables and messages call it."""
        source = self.settings.source
        return f"kafka:{source.topic}" if source.kind == "kafka" else source.path

    @property
    def slug(self) -> str:
        """A file name for it."""
        source = self.settings.source
        whole = "\n".join((source.kind, source.path, source.bootstrap_servers, source.topic))
        return f"{source.kind}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"

    def stream(self) -> DataFrame:
        """The streaming DataFrame whose micro-batches :meth:`events` understands.

        Raises:
            ConfigError: a setting of this kind of source is missing.
            InputError: there is no such folder or table.
            StateError: Kafka's jars are missing.
        """
        source = self.settings.source
        needed = ("bootstrap_servers", "topic") if source.kind == "kafka" else ("path",)
        for name in needed:
            if not getattr(source, name):
                raise ConfigError(f"source.{name} is empty: source.kind = {source.kind!r} needs it")
        limits: dict[str, str | int] = {"maxFilesPerTrigger": source.max_files_per_trigger}
        if source.max_bytes_per_trigger:
            limits["maxBytesPerTrigger"] = source.max_bytes_per_trigger
        if source.kind == "kafka":
            return self._topic()
        if source.kind == "folder":
            limits["maxFileAge"] = _ANY_AGE
            if not (is_remote(source.path) or os.path.isdir(source.path)):
                raise InputError(f"source.path {source.path}: there is no such folder")
        reader = self.spark.readStream.options(**{**limits, **source.options})
        if source.kind == "folder":
            return reader.format("binaryFile").schema(_FILES).load(source.path).select("path")
        reader = reader.format("delta")
        try:
            in_catalog = re.fullmatch(r"\w+(\.\w+){1,2}", source.path)
            return reader.table(source.path) if in_catalog else reader.load(source.path)
        except PySparkException as error:
            raise InputError(f"source.path {source.path}: {str(error).splitlines()[0]}") from None

    def _topic(self) -> DataFrame:
        source = self.settings.source
        options: dict[str, str | int] = {
            "kafka.bootstrap.servers": source.bootstrap_servers,
            "subscribe": source.topic,
            "startingOffsets": source.starting_offsets,
        }
        if source.max_events_per_trigger:
            options["maxOffsetsPerTrigger"] = source.max_events_per_trigger
        try:
            rows = self.spark.readStream.format("kafka").options(**options, **source.options).load()
        except (PySparkException, Py4JJavaError) as error:
            if "Failed to find" in str(error) or "ClassNotFound" in str(error) or "NoClassDef" in str(error):
                raise StateError(
                    "Kafka's jars are not beside Spark's own: remove .venv/setup.stamp and run 'make setup' where Maven "
                    'Central can be reached, or set spark.options "spark.jars.packages" to '
                    f"org.apache.spark:spark-sql-kafka-0-10_2.13:{self.spark.version}"
                ) from None
            raise
        return rows.select(F.col("value").cast("string").alias(_VALUE))

    def events(self, batch: DataFrame, seen: Columns, probe: bool = False) -> tuple[DataFrame, bool]:
        """The rows of a micro-batch as :func:`mtl.parse.typed_events` has them, and whether any came with an id.

        Args:
            seen: what the source's columns were, for drift.
            probe: read every file by itself first, to find those whose rows cannot be read.

        Raises:
            InputError: columns drifted, or a file cannot be read, and ``source.drift`` says stop.
        """
        parts, ids_given = [], False
        for offered in self._offered(batch, probe):
            if isinstance(offered, DataFrame):
                parts.append(offered)
                continue
            try:
                found, typed = offered_events(offered, self.columns, self.settings.model, ())
                seen.check(offered, found)
                parts.append(typed)
                ids_given |= EVENT_ID in found
            except InputError as error:
                if self.settings.source.drift == "stop":
                    advice = f"; where this is meant to be, remove {seen.path}" if isinstance(error, _Drift) else ""
                    raise InputError(f"{error}{advice}") from None
                parts.append(refused_events(offered, _reason(offered.path, error)))
        return reduce(DataFrame.unionByName, parts), ids_given

    def check(self, rows: DataFrame, seen: Columns) -> None:
        """Compare the columns of a source table, as :meth:`stream` gives it, with those it had at first.

        Raises:
            InputError: they drifted.
        """
        if self.settings.source.kind == "delta":
            table = self._table(rows)
            seen.check(table, match_events(table, self.columns, self.settings.model.contexts, ()))

    def _table(self, rows: DataFrame) -> SourceFile:
        whole = rows.withColumn(MALFORMED, F.lit(None).cast("string"))
        return SourceFile(self.name, "parquet", whole, tuple(rows.columns))

    def _offered(self, batch: DataFrame, probe: bool) -> Iterator[SourceFile | DataFrame]:
        kind = self.settings.source.kind
        if kind == "folder":
            yield from self._files([_plain(row[0]) for row in batch.select("path").collect()], probe)
        elif kind == "delta":
            yield self._table(batch)
        else:
            ours = (*OFFERED_COLUMNS, *self.settings.model.contexts)
            names = [self.columns.get(name, name) for name in ours]
            kind_of_row = T.StructType([T.StructField(name, T.StringType()) for name in (*names, MALFORMED)])
            parsed = F.from_json(_VALUE, kind_of_row, {"columnNameOfCorruptRecord": MALFORMED})
            rows = batch.select(F.col(_VALUE).alias(_LINE), parsed.alias("row")).select(_LINE, "row.*")
            yield SourceFile(self.name, "jsonl", rows, tuple(names), line=_LINE)

    def _files(self, paths: list[str], probe: bool) -> Iterator[SourceFile | DataFrame]:
        """Files of the same format and columns together, so that a micro-batch is few reads."""
        alike: dict[tuple[str, str], list[str]] = {}
        # Spark's own list has files more than once beside one whose name is like a pattern.
        for path in sorted(set(paths)):
            try:
                alike.setdefault(self._shape(path), []).append(path)
            except InputError as error:
                yield self._unreadable(path, error)
        for (format, _), files in alike.items():
            if probe and len(files) > 1:
                for file in files:
                    yield from self._files([file], probe)
                continue
            name = files[0] if len(files) == 1 else f"{self.name} ({', '.join(map(os.path.basename, files))})"
            try:
                opened = open_alike(self.spark, name, files, format, self.settings.ingest)
                if probe:
                    with readable(name, format):
                        opened.rows.agg(F.max(F.length(opened.raw()))).collect()
                yield opened
            except InputError as error:
                if len(files) == 1:
                    yield self._unreadable(name, error)
                else:
                    for file in files:
                        yield from self._files([file], probe)

    def _shape(self, path: str) -> tuple[str, str]:
        format = format_of(path, self.settings.ingest.format)
        if is_remote(path) or _PATTERN & set(path):
            return format, path  # by itself: Spark would read others of the same call twice
        if format == "jsonl":
            return format, ""  # rows name their columns
        if format == "parquet":
            return format, parquet_shape(path)
        header = csv_header(path, self.settings.ingest.csv_delimiter)
        return format, path if header is None else "\n".join(header)  # None: by itself

    def _unreadable(self, path: str, error: InputError) -> DataFrame:
        """One row in the place of a file that cannot be read."""
        if self.settings.source.drift == "stop":
            raise error
        row = self.spark.createDataFrame([(json.dumps({"file": path}),)], f"{_VALUE} string")
        rows = row.withColumn(MALFORMED, F.lit(None).cast("string"))
        return refused_events(SourceFile(path, "jsonl", rows, (), line=_VALUE), _reason(path, error))


class _Drift(InputError):
    """Columns are others than at first, and could be used all the same."""


class Columns:
    """Which of our columns a source had at first, and of what kind, kept in a file; drift is what differs.

    A batch that is repeated begins from what there was before it: :meth:`keep` is for its end. A column that was not there
    at first is let pass. Text formats (CSV, JSON lines) have no kinds: there a value that is none is a matter of its row.
    JSON rows name their columns each, so that only a whole file's absence is noticed.

    Raises:
        StateError: the file is damaged.
    """

    def __init__(self, path: str):
        self.path = path
        self.first: dict[str, dict[str, str]] = {}
        if os.path.exists(path):
            try:
                with open(path) as file:
                    self.first = json.load(file)
            except ValueError:
                raise StateError(f"{path} is damaged: remove it, and the next columns are the first") from None

    def check(self, file: SourceFile, found: Mapping[str, str]) -> None:
        """Compare a file's columns with the first of its format, or remember them as the first.

        Args:
            found: our column → the file's.

        Raises:
            InputError: a column that is required or was there at first is missing, or has another type.
        """
        types = {ours: file.kind(theirs) for ours, theirs in found.items()}
        kinds = {ours: _kind(type) for ours, type in types.items() if not isinstance(type, T.NullType)}
        first = self.first.get(file.format, {})
        wrong = [
            f"column {name} ({first.get(name, 'required')}) is missing"
            for name in dict.fromkeys((*OFFERED_COLUMNS, *first))
            if name not in found and (name in first or name in REQUIRED_EVENT_COLUMNS)
        ]
        wrong += [
            f"column {found[name]} ({name}) was {first[name]} and is {kind} ({types[name].simpleString()})"
            for name, kind in kinds.items()
            if first.get(name, kind) != kind
        ]
        if wrong:
            usable = found.keys() >= set(REQUIRED_EVENT_COLUMNS)
            raise (_Drift if usable else InputError)(f"{file.path}: {'; '.join(wrong)}")
        self.first[file.format] = {**kinds, **first}

    def keep(self) -> None:
        """For the next batch."""
        with open(f"{self.path}.part", "w") as out:
            json.dump(self.first, out)
        os.replace(f"{self.path}.part", self.path)


def _kind(type: T.DataType) -> str:
    kinds = {
        "text": T.StringType,
        "number": T.NumericType,
        "boolean": T.BooleanType,
        "time": (T.TimestampType, T.TimestampNTZType, T.DateType),
    }
    return next((kind for kind, classes in kinds.items() if isinstance(type, classes)), type.simpleString())


def _plain(uri: str) -> str:
    """A local path without its scheme."""
    return re.sub("^file:/*", "/", uri)


def _reason(path: str, error: InputError) -> str:
    return str(error).removeprefix(f"{path}: ")
