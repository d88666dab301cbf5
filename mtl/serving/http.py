"""The Starlette application of one worker: routes, limits, authorization, metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import nullcontext
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mtl.serving import api, openapi
from mtl.serving.admission import Admission
from mtl.serving.api import Problem
from mtl.serving.inspection import Inspection
from mtl.serving.metrics import Metrics
from mtl.serving.predictions import Predictions
from mtl.serving.service import Service

log = logging.getLogger("mtl")

Answer = Callable[[bytes, Scope], Awaitable[bytes] | bytes]

_JSON = (b"content-type", b"application/json")
_encode = msgspec.json.Encoder().encode
PREDICT_PATH = "/v1/predict"
OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # for probes, which bring no token


class Endpoint:
    """One route as a plain ASGI application: read the body within its limits, answer, count.

    Starlette's own request and response objects cost as much as a prediction.
    """

    def __init__(self, name: str, answer: Answer, service: Service, metrics: Metrics, is_probe: bool = False):
        self.answer, self.settings, self.is_probe = answer, service.settings, is_probe
        self.admission = service.admission
        self.observe = metrics.of(name)
        self.max_body = service.settings.max_body_kb * 1024

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 200
        headers: tuple[tuple[bytes, bytes], ...] = ()
        admission, is_in = self.admission, False
        try:
            message = _there(receive)
            body = message.get("body", b"") if message else b""
            if message is None or message.get("more_body"):
                try:
                    body = await self._rest(body, receive)
                finally:
                    started = time.perf_counter()  # how long a client takes to send says nothing of the server
            if len(body) > self.max_body:
                raise _too_large(self.max_body)
            if admission is not None and not self.is_probe:
                is_in = admission.enter()
                if not is_in:
                    raise overloaded(admission)
            answer = self.answer(body, scope)
            content = answer if isinstance(answer, bytes) else await answer
        except Problem as problem:
            status, headers = problem.status, problem.headers
            content = error_body(problem)
        except Exception:
            log.exception("serve: %s failed", scope["path"])
            status, content = 500, _encode(api.ErrorBody("internal", "the server failed; its log says why"))
        length = (b"content-length", str(len(content)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]})
        await send({"type": "http.response.body", "body": content})
        elapsed = time.perf_counter() - started
        if is_in and admission is not None:
            admission.leave(elapsed)
        self.observe(status, elapsed)

    async def _rest(self, body: bytes, receive: Receive) -> bytes:
        """The whole body, of which there is a first part."""
        uploading = self.admission.uploading() if self.admission is not None else nullcontext()
        try:
            with uploading:
                return await asyncio.wait_for(self._joined(body, receive), self.settings.body_seconds)
        except asyncio.TimeoutError:
            raise Problem(408, "slow_body", "the body did not come in time (serve.body_seconds)") from None

    async def _joined(self, body: bytes, receive: Receive) -> bytes:
        parts, size = [body], len(body)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "incomplete", "the connection closed before the body was there")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                raise _too_large(self.max_body)
            if not message.get("more_body"):
                return b"".join(parts)


class Authorization:
    """Only requests with the bearer token pass, but for health checks."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        if is_open or allowed(scope["headers"], self.token):
            await self.app(scope, receive, send)
            return
        content = _encode(api.ErrorBody("unauthorized", "a bearer token is wanted in the header Authorization"))
        response = Response(content, 401, {"www-authenticate": "Bearer"}, "application/json")
        await response(scope, receive, send)


def allowed(headers: Iterable[tuple[bytes, bytes]], token: str) -> bool:
    """Whether a request brings the token, of which "" wants none."""
    if not token:
        return True
    given = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, brought = given.partition(b" ")
    return hmac.compare_digest(brought, token.encode()) and scheme.lower() == b"bearer"


class _Any(PathConvertor):
    """Ids: slashes and line ends too, but not nothing."""

    regex = "(?s:.+)"


register_url_convertor("any", _Any())


def application(service: Service, metrics: Metrics) -> ASGIApp:
    """All routes over one service."""

    def endpoint(name: str, answer: Answer, is_probe: bool = False) -> Endpoint:
        return Endpoint(name, answer, service, metrics, is_probe)

    def body(work: Callable[[bytes], Awaitable[bytes] | bytes]) -> Answer:
        return lambda content, scope: work(content)

    def query(work: Callable[[dict[str, str]], Awaitable[bytes]]) -> Answer:
        return lambda content, scope: work(_query(scope))

    def named(work: Callable[[str, dict[str, str]], Awaitable[bytes]]) -> Answer:
        return lambda content, scope: work(scope["path_params"]["id"], _query(scope))

    async def top(content: bytes, scope: Scope) -> bytes:
        return await (service.top(content) if scope["method"] == "POST" else service.top_by_query(_query(scope)))

    def health(content: bytes, scope: Scope) -> bytes:
        return _HEALTHY

    def ready(content: bytes, scope: Scope) -> bytes:
        state = service.ready()
        if not state.ready:
            raise Problem(503, "not_ready", state.reason, ((b"retry-after", b"1"),))
        return _encode(state)

    def schema(content: bytes, scope: Scope) -> bytes:
        return _OPENAPI

    predictions, inspection = Predictions(service), Inspection(service)
    routes = [
        Route(PREDICT_PATH, endpoint("predict", body(predictions.predict)), methods=["POST"]),
        Route("/v1/observe", endpoint("observe", body(service.observe)), methods=["POST"]),
        Route("/v1/top", endpoint("top", top), methods=["GET", "POST"]),
        Route("/v1/predict/batch", endpoint("predict_batch", body(predictions.predict_batch)), methods=["POST"]),
        Route("/v1/choose", endpoint("choose", body(service.choose)), methods=["POST"]),
        Route("/v1/feedback", endpoint("feedback", body(service.feedback)), methods=["POST"]),
        Route("/v1/users/{id:any}", endpoint("user", named(inspection.user)), methods=["GET"]),
        Route("/v1/inputs/{id:any}", endpoint("input", named(inspection.input)), methods=["GET"]),
        Route("/v1/similar", endpoint("similar", query(inspection.similar)), methods=["GET"]),
        Route("/v1/popular", endpoint("popular", query(inspection.popular)), methods=["GET"]),
        Route("/v1/models", endpoint("models", query(inspection.models)), methods=["GET"]),
        Route("/healthz", endpoint("healthz", health, is_probe=True), methods=["GET", "POST"]),
        Route("/readyz", endpoint("readyz", ready, is_probe=True), methods=["GET"]),
        Route("/openapi.json", endpoint("openapi", schema, is_probe=True), methods=["GET"]),
        Route("/metrics", lambda request: Response(metrics.text(), media_type=metrics.media_type)),
        Route("/docs", lambda request: Response(openapi.page(), media_type="text/html")),
    ]
    app: ASGIApp = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    token = service.settings.token.get_secret_value()
    return Authorization(app, token) if token else app


def _there(receive: Receive) -> MutableMapping[str, Any] | None:
    """The first message, where it can be had without waiting: then no timer need be set."""
    waiting: Any = receive()
    try:
        waiting.send(None)
    except StopIteration as found:
        return found.value
    waiting.close()
    return None


def _query(scope: Scope) -> dict[str, str]:
    """Parameters of the URL; of one that comes twice the last."""
    return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))


def _too_large(limit: int) -> Problem:
    return Problem(413, "too_large", f"the body is larger than {limit // 1024} KB (serve.max_body_kb)")


def overloaded(admission: Admission) -> Problem:
    seconds = admission.retry_after()
    told = f"too many requests for the objective (serve.objective_ms): come back in {seconds} s"
    return Problem(503, "overloaded", told, ((b"retry-after", str(seconds).encode()),))


def error_body(problem: Problem) -> bytes:
    return _encode(api.ErrorBody(problem.error, problem.message))


def _http_error(request: Request, error: Any) -> Response:
    body = api.ErrorBody("not_found" if error.status_code == 404 else "bad_request", str(error.detail))
    return Response(_encode(body), error.status_code, error.headers, "application/json")


_HEALTHY = _encode(api.HealthAnswer("ok"))
_OPENAPI = _encode(openapi.document())
