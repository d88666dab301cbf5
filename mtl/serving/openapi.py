"""The OpenAPI document, made from the structs that the server decodes, and a page of it that needs no other host."""

from __future__ import annotations

import html
from functools import cache
from typing import Any

import msgspec

from mtl.serving import api

_REF = "#/components/schemas/{name}"
_TEXT, _COUNT, _FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}, {"type": "boolean"}

# method, path, what it does, body, answer, parameters of the URL (name, schema, is it needed)
_ROUTES: tuple[tuple[str, str, str, type | None, type, tuple[tuple[str, dict[str, Any], bool], ...]], ...] = (
    (
        "post",
        "/v1/predict",
        "Score inputs for a user: prediction and standard deviation of a label.",
        api.PredictRequest,
        api.PredictAnswer,
        (),
    ),
    ("post", "/v1/predict/batch", "The same for several users.", api.BatchRequest, api.BatchAnswer, ()),
    (
        "post",
        "/v1/observe",
        "Learn from an event: on disk and in the user's next prediction when it answers.",
        api.ObserveRequest,
        api.ObserveAnswer,
        (),
    ),
    (
        "post",
        "/v1/choose",
        "Draw one of several inputs for a user, with the chance that it had: on disk when it answers.",
        api.ChooseRequest,
        api.ChooseAnswer,
        (),
    ),
    ("post", "/v1/feedback", "Log the reward of a decision.", api.FeedbackRequest, api.FeedbackAnswer, ()),
    ("post", "/v1/top", "The best inputs for a user, with candidates and filters.", api.TopRequest, api.TopAnswer, ()),
    (
        "get",
        "/v1/top",
        "The best inputs for a user; where=name:value,… filters by attributes, context=name:value,… is the context.",
        None,
        api.TopAnswer,
        (
            ("user", _TEXT, True),
            ("k", _COUNT, False),
            ("exclude_seen", _FLAG, False),
            ("where", _TEXT, False),
            ("context", _TEXT, False),
        ),
    ),
    (
        "get",
        "/v1/users/{id}",
        "A user's weights, their uncertainty, and what each contributes to an input's score.",
        None,
        api.UserAnswer,
        (("input", _TEXT, False),),
    ),
    ("get", "/v1/inputs/{id}", "An input's features and attributes.", None, api.InputAnswer, ()),
    (
        "get",
        "/v1/similar",
        "Inputs that users take alike.",
        None,
        api.SimilarAnswer,
        (("input", _TEXT, True), ("k", _COUNT, False)),
    ),
    ("get", "/v1/popular", "Inputs of most events.", None, api.PopularAnswer, (("k", _COUNT, False),)),
    ("get", "/v1/models", "The model versions there are.", None, api.ModelsAnswer, ()),
    ("get", "/healthz", "Whether the process answers.", None, api.HealthAnswer, ()),
    ("get", "/readyz", "Whether there is a model to answer with.", None, api.ReadyAnswer, ()),
)


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    kinds = [kind for _, _, _, body, answer, _ in _ROUTES for kind in (body, answer) if kind] + [api.ErrorBody]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for method, path, summary, body, answer, parameters in _ROUTES:
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {
                "200": {"description": "the answer", "content": _json(of[answer])},
                "4XX": {"description": "what was wrong with the request", "content": _json(of[api.ErrorBody])},
                "503": {"description": "not now: see Retry-After", "content": _json(of[api.ErrorBody])},
            },
        }
        if body:
            operation["requestBody"] = {"required": True, "content": _json(of[body])}
        there = [{"name": name, "in": "query", "schema": kind, "required": must} for name, kind, must in parameters]
        if "{id}" in path:
            there.append({"name": "id", "in": "path", "schema": _TEXT, "required": True})
        if there:
            operation["parameters"] = there
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "oracle-mtl", "version": "1", "summary": "Predictions of personalized models that learn."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


@cache
def page() -> str:
    """The document as one HTML page."""
    schemas = document()["components"]["schemas"]
    parts = []
    for method, path, summary, body, answer, parameters in _ROUTES:
        rows = "".join(
            f"<tr><td>{name}</td><td>{kind['type']}</td><td>{'needed' if must else ''}</td></tr>"
            for name, kind, must in parameters
        )
        parts.append(
            f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(summary)}</p>"
            + (f"<table>{rows}</table>" if rows else "")
            + (_fields("Body", body, schemas) if body else "")
            + _fields("Answer", answer, schemas)
        )
    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td{padding:.1em 1em .1em 0;vertical-align:top}h2{margin-top:2em}code{background:#eee}"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>oracle-mtl</title><style>{style}</style>"
        f"<h1>oracle-mtl</h1><p>The same for programs: <a href=/openapi.json>openapi.json</a></p>{''.join(parts)}</html>"
    )


def _fields(title: str, kind: type, schemas: dict[str, Any]) -> str:
    found = schemas[kind.__name__]
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_told(value))}</td>"
        f"<td>{'needed' if name in found.get('required', []) else ''}</td></tr>"
        for name, value in found["properties"].items()
    )
    return f"<p>{title}</p><table>{rows}</table>"


def _told(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(map(_told, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_told(schema.get('items') or {})}"
    return str(schema.get("type", "anything"))


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
