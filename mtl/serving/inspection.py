"""What a worker shows of what it knows: a user's weights and what they say of an input, inputs, their neighbours, models."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from mtl import gaussian
from mtl.effects import of_one
from mtl.serving import api, scorer
from mtl.serving.api import Problem
from mtl.serving.neighbours import Neighbours
from mtl.serving.records import digest
from mtl.serving.requests import allow, k_of, text_of
from mtl.serving.service import Service
from mtl.serving.view import View

_encode = msgspec.json.Encoder().encode


@dataclass
class Inspection:
    """Over the service of one worker."""

    service: Service
    _neighbours: Neighbours | None = field(default=None, init=False)

    async def user(self, identity: str, query: Mapping[str, str]) -> bytes:
        allow(query, "input")
        view, one = self.service.shown(), query.get("input")
        found = view.weights_of(identity)
        user = found or view.unknown_weights
        d = view.d
        covariance = gaussian.unpack(scorer.covariance_of(user)[None], d)[0]
        deviations = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        offset, features, score, std, incomplete = None, [None] * d, None, None, False
        if one is not None:
            in_time = await self.service.rows_in_time(view, [one], user, self.service.ends())
            rows, incomplete = in_time.rows, bool(in_time.incomplete)
            offset, features = float(rows[0, -1]), rows[0, :d].tolist()
            # As /v1/predict has it of an unnamed context.
            in_context = scorer.moved(user, *of_one(None, {}, view.model.artefact.effects))
            score, std = (float(values[0]) for values in view.score(in_context, rows))
        why = [
            api.Contribution(name, float(w), float(s), phi, None if phi is None else float(w) * phi)
            for name, w, s, phi in zip(view.basis, user.mean, deviations, features, strict=True)
        ]
        with self.service.overlay.reading() as transaction:
            pending = len(self.service.overlay.pending(transaction, digest(identity)))
        return _encode(
            api.UserAnswer(
                model_version=view.version,
                staleness_s=self.service.staleness,
                user=identity,
                known=found is not None,
                n_events=user.n_events,
                n_unconfirmed=pending,
                weights=user.mean.tolist(),
                covariance=covariance.tolist(),
                input=one,
                offset=offset,
                why=why,
                score=score,
                std=std,
                incomplete=incomplete,
            )
        )

    async def input(self, identity: str, query: Mapping[str, str]) -> bytes:
        allow(query)
        view = self.service.shown()
        rows, known, incomplete = await self.service.rows_in_time(
            view, [identity], view.unknown_weights, self.service.ends()
        )
        d, row = view.d, rows[0]
        spread = gaussian.unpack(row[None, : gaussian.packed_length(d)], d)[0] - np.outer(row[:d], row[:d])
        with self.service.store.reading() as transaction:
            attributes = self.service.store.attributes(transaction, identity)
            n_events, total = self.service.store.count(transaction, identity)
            has_features = view.row_of(identity, transaction) is not None
        return _encode(
            api.InputAnswer(
                model_version=view.version,
                staleness_s=self.service.staleness,
                input=identity,
                known=known[0],
                has_features=has_features,
                offset=float(row[-1]),
                offset_std=float(np.sqrt(max(row[-2], 0.0))),
                features=row[:d].tolist(),
                features_std=np.sqrt(np.maximum(np.diag(spread), 0.0)).tolist(),
                incomplete=bool(incomplete),
                attributes=attributes,
                n_events=n_events,
                mean_label=total / n_events if n_events else None,
            )
        )

    async def similar(self, query: Mapping[str, str]) -> bytes:
        allow(query, "input", "k")
        view, one = self.service.shown(), text_of(query, "input")
        k = k_of(query, self.service.settings.max_k)
        rows, known, incomplete = await self.service.rows_in_time(
            view, [one], view.unknown_weights, self.service.ends()
        )
        if not known[0]:
            raise Problem(404, "unknown_input", f"input {one!r} has neither features nor attributes")
        near = await asyncio.get_running_loop().run_in_executor(
            None, self._neighbours_in(view).of_input, one, rows[0], k
        )
        return _encode(
            api.SimilarAnswer(
                model_version=view.version,
                staleness_s=self.service.staleness,
                of=one,
                near=[api.Near(identity, distance) for identity, distance in near],
                incomplete=bool(incomplete),
            )
        )

    async def popular(self, query: Mapping[str, str]) -> bytes:
        allow(query, "k")
        view, k = self.service.shown(), k_of(query, self.service.settings.max_k)
        with self.service.store.reading() as transaction:
            most = self.service.store.popular(transaction)[:k]
        inputs = [api.PopularInput(one.input, one.n_events, one.mean_label) for one in most]
        return _encode(api.PopularAnswer(model_version=view.version, staleness_s=self.service.staleness, inputs=inputs))

    async def models(self, query: Mapping[str, str]) -> bytes:
        allow(query)
        view = self.service.shown()
        with self.service.store.reading() as transaction:
            models = self.service.store.model_list(transaction)
        contest = self.service.contest
        return _encode(api.ModelsAnswer(view.version, models, contest.competing(view) if contest else []))

    def _neighbours_in(self, view: View) -> Neighbours:
        if self._neighbours is None or self._neighbours.view is not view:
            self._neighbours = Neighbours(view)
        return self._neighbours
