"""The alternation where the inputs do not fit the driver: users and inputs both in Spark partitions.

Inputs are kept in *shards*, ranges of the catalogue. Per pass three shuffles move what is needed and no more: features of
the inputs that a user partition saw go to it, its sums for them come back to their shards, and shards solve their own
half-step. The driver sees moments, errors and, for a linear oracle, its normal equations; for a function of θ, slopes over all
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from mtl import alternation, blocks, gaussian
from mtl.alternation import InputSums
from mtl.basis import FittedBasis, OracleBasis, Refitting, integrated_weights
from mtl.blocks import EventBlock
from mtl.effects import Effects
from mtl.engine import FeatureWork, UserWork
from mtl.errors import ConfigError
from mtl.features import Features
from mtl.firstorder import FunctionBasis, Slope
from mtl.forms import PartlyGiven
from mtl.gaussian import Array, Posterior
from mtl.oracle.linear import NormalEquations, fit_ridge
from mtl.partitions import settled
from mtl.prior import Moments, VectorPrior
from mtl.sharing import cores, share
from mtl.userstep import Specification, UserStep

SHARD_INPUTS = 16_384

_REFUSED = "settings that need this are refused beforehand (mtl.fitting)"
_PARTITION, _SHARD = "partition", "shard"
_PIECE = f"{_PARTITION} int, {_SHARD} int, inputs binary, payload binary, reply binary"
_PIECE_NAMES = [_PARTITION, _SHARD, "inputs", "payload", "reply"]
_STATE = f"{_SHARD} int, state binary, reply binary"


class DistributedEngine:
    """Users' events and inputs' posteriors in Spark, for squared loss.

    Args:
        rows, specification: see :class:`mtl.engine.SparkEngine`.
        shard_inputs: number of inputs in a shard.

    Raises:
        ConfigError: the loss is not squared, feedback implicit, events have contexts, or θ is trained on the latest events
            alone; (from ``refit``) the oracle is a black box, which is fitted on the driver.
    """

    applied: Any = None  # its steps are whole, and keep nothing of those before

    def __init__(self, rows: DataFrame, specification: Specification, shard_inputs: int = SHARD_INPUTS):
        if not specification.loss.is_quadratic:
            raise ConfigError(f'{specification.loss.name} loss is trained with train.reduction = "driver" only')
        if specification.earlier:
            raise ConfigError('train.incremental works with train.reduction = "driver" only')
        if specification.effects:
            raise ConfigError('model.contexts works with train.reduction = "driver" only')
        if specification.zero_weight:
            raise ConfigError('model.implicit_weight works with train.reduction = "driver" only')
        self.spark, self.rows = rows.sparkSession, rows
        self.blocks = rows.withColumn(_PARTITION, F.spark_partition_id())
        self.specification = replace(specification, attributes=specification.attributes[:0])  # what is sent around
        self.shard_inputs, self.rounding = shard_inputs, specification.rounding
        self.routes = settled(self.blocks.select(_PARTITION, "inputs").mapInArrow(_routes(shard_inputs), _PIECE))
        self.state = self._start(specification)

    def update_users(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        pieces = settled(
            self._on_partitions(_sums, (prior, noise, self.specification), self.blocks.drop("users"), _PIECE)
        )
        replies = [cloudpickle.loads(row[0]) for row in pieces.select("reply").where("reply IS NOT NULL").collect()]
        own = self.state.groupBy(_SHARD)
        received = _receive(self.specification, self.shard_inputs)
        self._replace(own.cogroup(pieces.groupBy(_SHARD)).applyInArrow(received, _STATE))
        moments, constants = zip(*replies, strict=True)
        deviance = self.specification.squared_labels + sum(constants) + sum(self._replies())
        self.constant = sum(constants)
        return sum(moments[1:], moments[0]), deviance

    def update_inputs(self, prior: VectorPrior, noise: float, step: float = 1.0) -> tuple[Moments, float]:
        self._replace(
            self.state.mapInArrow(_each_shard(_solve, self._broadcast((prior, noise, self.specification.mu))), _STATE)
        )
        moments, errors = zip(*self._replies(), strict=True)
        return sum(moments[1:], moments[0]), self.specification.squared_labels + self.constant + sum(errors)

    def refit(self, prior: VectorPrior, noise: float) -> VectorPrior:
        basis = prior.learnt if isinstance(prior, PartlyGiven) else prior
        if not isinstance(basis, FittedBasis):
            return prior
        evidence = prior, basis.covariance, noise, self.specification.mu
        if isinstance(basis, FunctionBasis):
            function = basis.function
            basis = basis.descend(lambda theta, rows=None: self._sum(_slope, (function, theta, evidence)), n=1)
        elif isinstance(basis, OracleBasis) and basis.oracle is fit_ridge:
            basis = replace(basis, functions=self._sum(_equations, evidence).solve(basis.functions))
        else:
            raise ConfigError('a black-box oracle is fitted on the driver: set train.reduction = "driver"')
        if isinstance(basis, OracleBasis) and basis.strategy != Refitting():
            raise ConfigError('train.algorithm boosted works with train.reduction = "driver" only')
        return replace(prior, learnt=basis) if isinstance(prior, PartlyGiven) else basis

    def _sum(self, work: Callable[[_Shard, Any], tuple[_Shard, Any]], arguments: Any) -> Any:
        """The sum of what ``work`` says of every shard."""
        shared = self._broadcast(arguments)
        rows = self.state.mapInArrow(_each_shard(work, shared), _STATE).select("reply").collect()
        said = [cloudpickle.loads(row[0]) for row in rows]
        return sum(said[1:], said[0])

    held_out = divergence = constant = 0.0
    effects: Effects = ()

    @property
    def inputs(self) -> Posterior:
        raise NotImplementedError(_REFUSED)

    @inputs.setter
    def inputs(self, vectors: Posterior) -> None:
        raise NotImplementedError(_REFUSED)

    def train_on_all(self, squared_labels: float) -> None:
        raise NotImplementedError(_REFUSED)

    def snapshot(self) -> Any:
        return self.state

    def restore(self, snapshot: Any) -> None:
        self.state = snapshot

    def close(self) -> None:
        """Give back the persisted rows."""
        self.rows.unpersist()

    def gram(self) -> Array:
        """Σ z zᵀ over all inputs, (p, p)."""
        return self._sum(_gram, None)

    def feature_rows(self, work: FeatureWork, ddl: str) -> DataFrame:
        size = self.shard_inputs

        def shards(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for shard, state in _states(batches):
                yield from work(shard * size, state.inputs, state.attributes).to_batches()

        return self.state.mapInArrow(shards, ddl)

    def user_rows(self, work: UserWork, arguments: Any, ddl: str) -> DataFrame:
        return self._on_partitions(_only(work), arguments, self.blocks, ddl)

    def _on_partitions(
        self, work: Callable[..., Iterator[pa.Table]], arguments: Any, rows: DataFrame, ddl: str
    ) -> DataFrame:
        """``work(block, features, arguments, …)`` of every user partition, with the features of the inputs it saw."""
        own = self.state.groupBy(_SHARD)
        features = self.routes.groupBy(_SHARD).cogroup(own).applyInArrow(_slice(self.shard_inputs), _PIECE)
        shared = self._broadcast((self.specification, self.shard_inputs, arguments))
        pair = rows.groupBy(_PARTITION).cogroup(features.groupBy(_PARTITION))
        return pair.applyInArrow(_on_partition(work, shared), ddl)

    def _start(self, specification: Specification) -> DataFrame:
        states, n_inputs = [], len(specification.attributes)
        for first in range(0, n_inputs, self.shard_inputs):
            part = specification.attributes[first : first + self.shard_inputs]
            inputs = specification.start(first, len(part))
            states.append(_Shard(inputs, part, InputSums.zeros(*inputs.mean.shape)))
        rows = pa.concat_tables(_state_row(number, state, None) for number, state in enumerate(states))
        n = min(len(states), cores(self.spark))
        return settled(self.spark.createDataFrame(rows).repartition(n, _SHARD))

    def _replace(self, state: DataFrame) -> None:
        self.state = settled(state)  # or plans would grow with every pass

    def _replies(self) -> list[Any]:
        return [cloudpickle.loads(row[0]) for row in self.state.select("reply").collect()]

    def _broadcast(self, value: Any) -> Any:
        return share(self.spark, value)


@dataclass(frozen=True)
class _Shard:
    inputs: Posterior
    attributes: Array
    sums: InputSums


def _state_row(shard: int, state: _Shard, reply: Any) -> pa.Table:
    buffers = [pa.array([cloudpickle.dumps(value)], pa.binary()) for value in (state, reply)]
    return pa.table([pa.array([shard], pa.int32()), *buffers], names=[_SHARD, "state", "reply"])


def _pieces(partition: int, shard: int, inputs: np.ndarray, payload: Any, reply: Any = None) -> pa.Table:
    reply = None if reply is None else cloudpickle.dumps(reply)
    binary = (inputs.astype(np.int32).tobytes(), cloudpickle.dumps(payload), reply)
    columns = [pa.array([key], pa.int32()) for key in (partition, shard)]
    return pa.table([*columns, *(pa.array([value], pa.binary()) for value in binary)], names=_PIECE_NAMES)


def _states(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, _Shard]]:
    for batch in batches:
        for shard, state in zip(batch.column(_SHARD).to_pylist(), batch.column("state"), strict=True):
            yield shard, cloudpickle.loads(state.as_buffer())


def _routes(size: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Which inputs of which shard a partition saw."""

    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number, buffer in zip(batch.column(_PARTITION).to_pylist(), batch.column("inputs"), strict=True):
                for shard, inputs in _by_shard(np.frombuffer(buffer.as_buffer(), np.int32), size):
                    yield from _pieces(number, shard, inputs, None).to_batches()

    return partition


def _by_shard(inputs: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Sorted catalogue indices, shard by shard."""
    shards = inputs // size
    for shard in np.unique(shards):
        yield int(shard), inputs[shards == shard]


def _slice(size: int) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Routes and the state of one shard → for each partition the posteriors of the inputs it saw."""

    def shard(routes: pa.Table, states: pa.Table) -> pa.Table:
        pieces = []
        for number, state in _states(iter(states.to_batches())):
            for partition, buffer in zip(routes[_PARTITION].to_pylist(), routes["inputs"], strict=True):
                inputs = np.frombuffer(buffer.as_buffer(), np.int32)
                local = inputs - number * size
                pieces.append(_pieces(partition, number, inputs, Posterior(*(part[local] for part in state.inputs))))
        return pa.concat_tables(pieces) if pieces else _no_pieces()

    return shard


def _on_partition(work: Callable[..., Iterator[pa.Table]], shared: Any) -> Callable[[pa.Table, pa.Table], pa.Table]:
    def partition(rows: pa.Table, pieces: pa.Table) -> pa.Table:
        specification, size, arguments = shared.value
        d = specification.form.d
        pieces = pieces.sort_by(_SHARD)
        # All there is where no user has an event.
        parts = [Posterior(np.empty((0, d)), np.empty((0, gaussian.packed_length(d))), np.empty(0))]
        parts += [cloudpickle.loads(payload.as_buffer()) for payload in pieces["payload"]]
        seen = Posterior(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        features = Features.of(seen.mean, seen.covariance, specification.mu)
        names = [name for name in rows.column_names if name != _PARTITION]
        tables: list[pa.Table] = []
        for number, block in zip(
            rows[_PARTITION].to_pylist(), blocks.from_arrow(rows.select(names).to_batches()), strict=True
        ):
            tables += work(block, features, arguments, number, size)
        return pa.concat_tables(tables)

    return partition


def _only(work: UserWork) -> Callable[..., Iterator[pa.Table]]:
    return lambda block, features, arguments, partition, size: work(block, features, arguments)


def _sums(block: EventBlock, features: Features, arguments: Any, partition: int, size: int) -> Iterator[pa.Table]:
    prior, noise, of = arguments
    local = replace(block, inputs=np.arange(len(block.inputs), dtype=np.int32))
    _, said = UserStep(features.astype(of.precision), prior, noise, of.loss, of.mu)(local)
    # Users that have attributes alone say nothing of any input, and yet have moments.
    shards = [*_by_shard(block.inputs, size)] or [(0, block.inputs)]
    for i, (shard, inputs) in enumerate(shards):
        rows = np.searchsorted(block.inputs, inputs)
        # The partition's moments and its part of the deviance travel with its first piece.
        sums = InputSums(said.sums.second[rows], said.sums.first[rows])
        yield _pieces(partition, shard, inputs, sums, None if i else (said.moments, said.constant))


def _receive(specification: Specification, size: int) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """The state of one shard and its sums from the partitions → the state with them, and its part of the error."""

    def shard(states: pa.Table, pieces: pa.Table) -> pa.Table:
        ((number, state),) = _states(iter(states.to_batches()))
        sums = InputSums.zeros(*state.inputs.mean.shape)
        # In the order of the partitions, so that a repeated task gives the same last bits.
        order = np.argsort(pieces[_PARTITION].to_numpy())
        for i in order:
            inputs = np.frombuffer(pieces["inputs"][int(i)].as_buffer(), np.int32)
            piece = cloudpickle.loads(pieces["payload"][int(i)].as_buffer())
            sums.second[inputs - number * size] += piece.second
            sums.first[inputs - number * size] += piece.first
        error = alternation.squared_error(sums, state.inputs, specification.mu)
        return _state_row(number, replace(state, sums=sums), error)

    return shard


def _each_shard(work: Callable[[_Shard, Any], tuple[_Shard, Any]], shared: Any) -> Callable:
    def shards(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number, state in _states(batches):
            yield from _state_row(number, *work(state, shared.value)).to_batches()

    return shards


def _solve(state: _Shard, shared: Any) -> tuple[_Shard, tuple[Moments, float]]:
    prior, noise, mu = shared
    inputs = prior.posteriors(*alternation.input_evidence(state.sums, mu), state.attributes, noise)
    error = alternation.squared_error(state.sums, inputs, mu)
    return replace(state, inputs=inputs), (prior.moments(inputs, state.attributes), error)


def _equations(state: _Shard, evidence: Any) -> tuple[_Shard, NormalEquations]:
    return state, NormalEquations.of(*_weights(state, *evidence), state.attributes)


def _slope(state: _Shard, shared: Any) -> tuple[_Shard, Slope]:
    function, theta, evidence = shared
    return state, Slope.of(function, theta, *_weights(state, *evidence), state.attributes)


def _weights(state: _Shard, prior: VectorPrior, covariance: Array, noise: float, mu: float) -> tuple[Array, Array]:
    """W and v of the shard's inputs for their learnt entries; see :class:`mtl.basis.OracleBasis`."""
    precision, information = alternation.input_evidence(state.sums, mu)
    if isinstance(prior, PartlyGiven):
        precision, information = prior.given.evidence(precision, information, prior.given.of(state.attributes))
    return integrated_weights(precision, information, covariance, noise)


def _gram(state: _Shard, shared: None) -> tuple[_Shard, Array]:
    return state, state.attributes.T @ state.attributes


def _no_pieces() -> pa.Table:
    kinds = [pa.int32(), pa.int32(), pa.binary(), pa.binary(), pa.binary()]
    return pa.table([pa.array([], kind) for kind in kinds], names=_PIECE_NAMES)
