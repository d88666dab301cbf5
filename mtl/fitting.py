"""From DataFrames of events and attributes to a fitted model; nothing here reads or writes a table."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T
from tqdm import tqdm

from mtl import contexts, gaussian, schema
from mtl.basis import OracleBasis
from mtl.blocks import EARLIER, EventBlock
from mtl.catalogue import Catalogue, describe_inputs, read_catalogue
from mtl.config import Settings, TrainSettings
from mtl.decay import last_times, with_ages
from mtl.differentiable import check_gradient, make_function
from mtl.distributed import DistributedEngine
from mtl.encode import Encoder, InputEncoder
from mtl.engine import SparkEngine
from mtl.errors import ConfigError, StateError
from mtl.firstorder import FunctionBasis, make_optimizer
from mtl.forms import Form, partly_given
from mtl.implicit import Implicit, Unknown
from mtl.losses import LOSSES, Loss
from mtl.oracle import make_fit_all, make_oracle, make_strategy
from mtl.oracle.imports import load_object
from mtl.partitions import changed, each_block, encode_users, partition_events
from mtl.pipeline import PipelineEncoder
from mtl.prior import Locked, Prior, VectorPrior, unlocked
from mtl.refusals import refuse_contradictions, refuse_labels
from mtl.resume import Checkpoint
from mtl.sampling import with_roles
from mtl.schema import INPUT_ID, USER_ID
from mtl.sharing import cores
from mtl.start import Live, from_covariance
from mtl.supervised import Supervised
from mtl.train import START_VARIANCE, Fit, Noise, Schedule, alternate
from mtl.trained import Trained
from mtl.userstep import Specification
from mtl.zeros import WithZeros, without_zeros

log = logging.getLogger("mtl")

MAX_K = 20
ENCODER_ROWS = 200_000  # rows of an attribute table that the encodings are chosen from
_CHECKED_INPUTS = 32  # that a user's function is tried on before training
_SINGLE_FROM = 1_000_000  # events, where the precision of passes is not forced
_LARGEST_MEAN = 100.0  # of the labels, in their standard deviations, for which single precision has digits enough
_EVENTS_PER_PARTITION = 20_000_000  # at most: a partition's events are one row, with 2 GB to a column
_EVENTS_PER_INPUT = 2  # from which on an input has a residual of its own, where that is not forced


def train(
    events: DataFrame,
    inputs: DataFrame,
    users: DataFrame,
    settings: Settings,
    live: Live | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Fit users, inputs and priors over all events; nothing is written but the checkpoint.

    Args:
        events: user_id, input_id, label, weight; event_time where old ones are forgotten; context with model.contexts, and
            offset where any event has one.
        inputs: input_id and the attributes of inputs; an input may be missing.
        users: user_id and the attributes of users; likewise.
        live: the version to begin from, or of which a part is kept.
        checkpoint: where a training that is interrupted goes on from.

    Raises:
        StateError: there are no events, all labels are equal, or one has no time where old ones are forgotten.
        ConfigError: the settings ask for columns that there are not, or contradict each other.
    """
    loss, zero_weight = LOSSES[settings.model.loss], settings.model.implicit_weight
    batches = live.batches if live else None
    refuse_contradictions(settings, live)
    half_life, last = settings.model.half_life_days, None
    if half_life:
        aged = with_ages(events, half_life)
        last, events = last_times(events, schema.REFERENCE_TIME), aged
    events = with_roles(events, settings.train.holdout, settings.train.max_events_per_user, batches)
    attributes = inputs.toPandas()
    catalogue = read_catalogue(events, attributes[INPUT_ID], loss)
    refuse_labels(catalogue, loss, beside_zeros=zero_weight > 0)
    if not catalogue.trained.n:
        if batches is not None:
            raise StateError("train.incremental: there is no event since the live version's training")
        raise StateError("train.holdout: all events are held out, and none is left to train on")
    if zero_weight and catalogue.has_offsets:
        raise ConfigError(
            "model.implicit_weight: events have offsets, which zeros have not: set model.implicit_weight = 0"
        )
    log.info("retrain: %d events, %d inputs", catalogue.n_events, len(catalogue.ids))
    effects = contexts.start(events, settings.model.contexts, _spread(catalogue, loss))

    lock, n_inputs = settings.train.lock, len(catalogue.ids)
    kept = live.model.artefact if live else None
    if kept and (lock or batches is not None):  # entries of w and c may be encoded attributes
        input_encoder, user_encoder = kept.input_encoder, kept.user_encoder
    else:
        input_encoder = _input_encoder(settings, attributes.drop(columns=INPUT_ID), inputs.drop(INPUT_ID).schema)
        some = users.orderBy(F.xxhash64(USER_ID), USER_ID).limit(ENCODER_ROWS)  # the same ones, however they are stored
        user_encoder = Encoder.fit(some.toPandas().drop(columns=USER_ID), settings.encode)
    encoded = encode_users(users, user_encoder) if user_encoder.width > 1 else None
    n_partitions = settings.train.partitions or max(
        cores(events.sparkSession), -(-catalogue.n_events // _EVENTS_PER_PARTITION)
    )
    undescribed = partition_events(events, encoded, user_encoder.width, catalogue.ids, n_partitions, effects)

    identity = settings.oracle.kind == "identity"
    implicit = Implicit.fit(partial(_each_whole, undescribed), catalogue.counts, settings.encode, nothing=identity)
    of_inputs = live.implicit(catalogue.ids) if live and "features" in lock else implicit.inputs(catalogue.counts)
    of_users = Unknown(kept.user_implicit) if kept and "users" in lock else implicit
    described = np.column_stack([describe_inputs(catalogue.ids, attributes, input_encoder), of_inputs])
    told = live.of_users(catalogue.ids) if live and batches is not None else None
    rows = changed(undescribed, _described(of_users, told)) if of_users.width or told else undescribed
    grams = each_block(rows, lambda block: (len(block), block.attributes.T @ block.attributes))
    if rows is not undescribed:
        undescribed.unpersist()
    n_users, user_gram = sum(n for n, _ in grams), np.sum([gram for _, gram in grams], axis=0)

    if zero_weight:
        catalogue = catalogue.with_zeros(n_users, zero_weight)
    form = _form(settings, n_users, n_inputs, input_encoder, user_encoder)
    if live and lock:
        form = _form_of_live(form, "train.lock", settings, live)
    if live and "features" in lock:
        mu = live.model.mu
    else:
        mu = loss.link(catalogue.mean_label) - catalogue.mean_offset
        if not np.isfinite(mu):
            raise StateError(
                f"model.half_life_days = {half_life:g}: nearly all that is left of old events has one label, "
                f"{catalogue.mean_label:g}: there is nothing to learn"
            )
    earlier = None
    if live and batches is not None:
        form, mu = _form_of_live(form, "train.incremental", settings, live), live.model.mu
        earlier = live.of_inputs(catalogue.ids, mu)
    specification = Specification(
        attributes=described,
        form=form,
        loss=loss,
        mu=mu,
        squared_labels=catalogue.trained.squared_labels,
        seed=settings.train.seed,
        known=live.known(catalogue, form, mu, described, complete="features" in lock) if live else None,
        precision=_precision(settings.train, catalogue),
        zero_weight=zero_weight,
        effects=effects,
        earlier=earlier,
        spread=_spread(catalogue, loss),
    )
    distributes = _distributes(settings.train, len(catalogue.ids), form.d)
    engine = (DistributedEngine if distributes else SparkEngine)(rows, specification)
    try:
        fit = _fit(engine, settings, specification, user_gram, catalogue, live, checkpoint)
    except BaseException:
        engine.close()
        raise
    if zero_weight:
        assert isinstance(engine, SparkEngine)
        fit = replace(fit, users=WithZeros.of(fit.users, engine.features, zero_weight))
    encoded_by = user_encoder, input_encoder, of_users.width, of_inputs.shape[1]
    return Trained(engine, fit, form, loss, mu, catalogue, *encoded_by, half_life, last)


def _input_encoder(settings: Settings, attributes: pd.DataFrame, kinds: T.StructType) -> InputEncoder:
    labels = settings.supervised.labels
    encoder: InputEncoder
    seen = [name for name in attributes.columns if name not in labels]
    if settings.oracle.pipeline:
        make = load_object("oracle.pipeline", settings.oracle.pipeline)
        encoder = PipelineEncoder.fit(attributes[seen], T.StructType([kinds[name] for name in seen]), make())
    else:
        encoder = Encoder.fit(attributes[[] if settings.oracle.kind == "identity" else seen], settings.encode)
    if not labels:
        return encoder
    if settings.oracle.kind == "identity":
        raise ConfigError("supervised.labels: oracle.kind identity sees no attributes to predict them from")
    return Supervised.fit(attributes, encoder, settings.supervised)


def _form(settings: Settings, n_users: int, n_inputs: int, inputs: InputEncoder, users: Encoder) -> Form:
    """The form as configured; k as forced, or as many as the data can tell apart up to a maximum.

    What is too many the priors shrink. Where other basis functions are given, none are learnt unless k is forced.
    """
    model = settings.model
    multilevel = model.form == "multilevel"
    of_inputs = inputs.linear("model.per_user", model.per_user or (["*"] if multilevel else []))
    if multilevel and not of_inputs:
        raise ConfigError("model.form multilevel needs attributes of inputs: ingest them with jobs/ingest.py --inputs")
    predicted = inputs.predicted if isinstance(inputs, Supervised) else ()
    k = 0 if multilevel or predicted else max(1, min(MAX_K, n_users - 1, n_inputs - 1))
    of_users = users.linear("model.per_input", model.per_input)
    return Form(k if model.k == "auto" else model.k, of_inputs + predicted, of_users)


def _form_of_live(form: Form, name: str, settings: Settings, live: Live) -> Form:
    """The live version's form, which the settings must ask for where the setting ``name`` keeps a part of it."""
    wanted = replace(form, k=live.model.form.k) if settings.model.k == "auto" else form
    if wanted != live.model.form:
        raise ConfigError(
            f"{name} is for the live version's form, with k = {live.model.form.k} and the same columns of attributes"
        )
    return wanted


def _each_whole(rows: DataFrame, work: Callable[[EventBlock], Any]) -> list[Any]:
    """:func:`each_block` with earlier events among the others: who acted on what is all events' to say."""
    return each_block(rows, lambda block: work(block.with_extra(EARLIER)))


def _described(
    of_users: Implicit | Unknown, told: Callable[[EventBlock], EventBlock] | None
) -> Callable[[EventBlock], EventBlock]:
    """Gives a block its users' implicit attributes, and what earlier events told of them."""

    def described(block: EventBlock) -> EventBlock:
        if of_users.width:
            block = replace(block, attributes=of_users.described(block.with_extra(EARLIER)).attributes)
        return told(block) if told else block

    return described


def _spread(catalogue: Catalogue, loss: Loss) -> float:
    """Variance that h can be thought to have before anything is learnt."""
    return catalogue.spread if loss.is_quadratic else 1.0


def _precision(settings: TrainSettings, catalogue: Catalogue) -> str:
    if settings.precision == "auto":
        # The noise is what is left of sums of squares, in which a large mean takes the digits.
        is_centred = catalogue.mean_label**2 <= _LARGEST_MEAN**2 * catalogue.spread
        return "single" if catalogue.n_events >= _SINGLE_FROM and is_centred else "double"
    return settings.precision


def _distributes(settings: TrainSettings, n_inputs: int, d: int) -> bool:
    """Whether the inputs' sums stay in Spark: as forced, or when they would pass the driver's limit."""
    megabytes = n_inputs * gaussian.packed_length(d + 1) * 8 / 1e6
    is_large = megabytes > settings.driver_limit_mb
    distributes = is_large if settings.reduction == "auto" else settings.reduction == "distributed"
    for name in ("holdout", "checkpoint"):
        if distributes and getattr(settings, name):
            raise ConfigError(f'train.{name} works with train.reduction = "driver" only')
    return distributes


def _fit(
    engine: SparkEngine | DistributedEngine,
    settings: Settings,
    specification: Specification,
    user_gram: np.ndarray,
    catalogue: Catalogue,
    live: Live | None,
    checkpoint: Checkpoint | None,
) -> Fit:
    form, lock = specification.form, settings.train.lock
    d_users, d_inputs = len(form.users.learnt), len(form.inputs.learnt)
    oracle, fit_all = make_oracle(settings.oracle), make_fit_all(settings.oracle, engine.rows.sparkSession)
    strategy = make_strategy(settings.train.algorithm, settings.oracle)
    start_of_inputs = START_VARIANCE * specification.input_units
    users: VectorPrior = Prior.start(user_gram, d_users, START_VARIANCE * specification.spread)
    inputs: VectorPrior
    repeated = catalogue.n_events >= _EVENTS_PER_INPUT * int(np.sum(catalogue.counts > 0))
    residual = repeated if settings.oracle.residual == "auto" else settings.oracle.residual
    if settings.train.algorithm == "first_order":
        inputs = _function_basis(settings, specification.attributes, start_of_inputs, residual)
    elif oracle:
        inputs = OracleBasis.start(oracle, d_inputs, start_of_inputs, residual, strategy, fit_all)
    else:
        inputs = Prior.start(engine.gram(), d_inputs, start_of_inputs)
    if live and specification.known:
        users = from_covariance(users, live.model.artefact.users.covariance, form.users)
        inputs = from_covariance(inputs, live.model.artefact.inputs.covariance, form.inputs)
    users, inputs = partly_given(users, form.users), partly_given(inputs, form.inputs)
    if live and "users" in lock:
        users = Locked(without_zeros(live.model.artefact.users))
    if live and "features" in lock:
        inputs = Locked(live.model.artefact.inputs)
    noise = None
    if live and specification.known:
        noise = Noise(live.model.noise, catalogue.counted - catalogue.kept.n if live.batches is not None else 0.0)

    def run(schedule: Schedule, checkpoint: Checkpoint | None = None) -> Fit:
        return _alternate(engine, users, inputs, specification.loss, catalogue, schedule, noise, checkpoint)

    limit, tolerance = settings.train.max_iterations, settings.train.tolerance
    if settings.train.iterations != "auto":
        schedule = Schedule(settings.train.iterations)
    elif not settings.train.holdout:
        schedule = Schedule(limit, tolerance)
    else:
        schedule = Schedule(run(Schedule(limit, patience=settings.train.patience)).best)
    if settings.train.holdout:
        engine.train_on_all(catalogue.kept.squared_labels)
        catalogue = replace(catalogue, trained=catalogue.kept)
    fit = run(schedule, checkpoint)
    return replace(fit, users=unlocked(fit.users), inputs=unlocked(fit.inputs))


def _function_basis(settings: Settings, attributes: np.ndarray, start: np.ndarray, residual: bool) -> FunctionBasis:
    """The configured function before training, the gradient of a user's own checked on some inputs."""
    if settings.oracle.kind == "identity":
        raise ConfigError('train.algorithm = "first_order" needs attributes of inputs: not oracle.kind = "identity"')
    p, d, of, seed = attributes.shape[1], len(start), settings.function, settings.train.seed
    function = make_function(of, p, d, seed)
    if of.kind in ("custom", "torch"):
        check_gradient(function, p, d, attributes[:_CHECKED_INPUTS])
    optimizer = make_optimizer(of, seed)
    return FunctionBasis.start(function, optimizer, of.weight_decay, p, d, start, residual, seed)


def _alternate(
    engine: SparkEngine | DistributedEngine,
    users: VectorPrior,
    inputs: VectorPrior,
    loss: Loss,
    catalogue: Catalogue,
    schedule: Schedule,
    noise: Noise | None,
    checkpoint: Checkpoint | None,
) -> Fit:
    """:func:`mtl.train.alternate` with its progress shown and saved."""
    resume = checkpoint.load(inputs) if checkpoint else None
    if resume:
        engine.inputs, engine.applied, engine.effects = resume.vectors, resume.applied, resume.effects
    with tqdm(total=schedule.iterations, desc="retrain", unit="pass", disable=None) as bar:

        def report(iteration: int, objective: float) -> None:
            bar.update()
            bar.set_postfix_str(f"objective {objective:.1f}")
            log.info("retrain: iteration %d, objective %.3f", iteration, objective)

        fit = alternate(
            engine,
            users,
            inputs,
            loss,
            catalogue.trained.n,
            catalogue.label_variance,
            schedule,
            report,
            known=noise,
            locked=isinstance(inputs, Locked),
            resume=resume,
            save=checkpoint.save if checkpoint else None,
        )
    if checkpoint:
        checkpoint.remove()
    return fit
