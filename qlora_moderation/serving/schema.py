"""What the server takes and answers, as an OpenAPI document for programs that make clients or tests.

In: a configuration, for its limits. Out: the JSON of `/openapi.json`. What a schema cannot say is refused with 422: lengths of
texts in several parts, lone surrogates, chats that do not end with the assistant.
"""

from __future__ import annotations

from typing import Any

from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.conversation import ROLES, TEXT_PARTS
from qlora_moderation.serving.requests import CONTEXTS

Schema = dict[str, Any]
_REFUSALS = {
    400: "The body is no JSON.",
    401: "There are keys, and none of them came.",
    404: "There is no such model.",
    405: "The route has other methods.",
    408: "The body came too slowly.",
    413: "The body is too long.",
    415: "The body is not announced as JSON.",
    422: "A field has a wrong form or length.",
    429: "Too much is waiting; come again after the seconds in Retry-After.",
    500: "The model failed; there is no verdict.",
    503: "The model is being loaded, the server stops, or it took too long.",
}


def build_schema(config: ServeConfig) -> Schema:
    """Return the OpenAPI document of a server with these limits."""
    moderate = {
        "operationId": "moderate",
        "summary": "Judge texts, pairs of question and answer, or the last turn of a chat.",
        "requestBody": {"required": True, "content": _json(_refer("ModerationRequest"))},
        "responses": _answer("Moderation", 400, 401, 405, 408, 413, 415, 422, 429, 500, 503),
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    status = {"200": {"description": "Yes.", "content": _json(_refer("Status"))}}
    status["503"] = {"description": "No.", "content": _json(_refer("Status"))}
    text = {"type": "string"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qlora-moderation", "version": "1"},
        "security": [{}, {"bearer": []}],
        "paths": {
            "/v1/moderations": {"post": moderate},
            "/v1/models": {"get": _get("list_models", "The one model.", _answer("ModelList", 401, 405))},
            "/v1/models/{name}": {
                "parameters": [name],
                "get": _get("show_model", "A model by its name.", _answer("Model", 401, 404, 405)),
            },
            "/healthz": {"get": _get("tell_health", "Whether the model answers.", status)},
            "/readyz": {"get": _get("tell_readiness", "Whether new requests are taken.", status)},
            "/metrics": {
                "get": _get(
                    "show_metrics",
                    "Figures for Prometheus.",
                    {
                        "200": {"description": "Figures.", "content": {"text/plain": {"schema": text}}},
                        **_refuse(401, 405),
                    },
                )
            },
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {**_describe_request(config), **_describe_answers()},
        },
    }


def _describe_request(config: ServeConfig) -> dict[str, Schema]:
    text = {"type": "string", "maxLength": config.max_text_length}
    plain = [word for word in TEXT_PARTS if word != "refusal"]
    parts = {"type": "array", "minItems": 1, "items": _refer("TextPart")}
    return {
        "ModerationRequest": {
            "type": "object",
            "properties": {"model": {"type": ["string", "null"]}, "input": {}, "messages": {}},
            "additionalProperties": False,
            "oneOf": [
                {"required": ["input"], "properties": {"input": _refer("Input"), "messages": {"type": "null"}}},
                {"required": ["messages"], "properties": {"messages": _refer("Messages"), "input": {"type": "null"}}},
            ],
        },
        "Input": {
            "anyOf": [
                text,
                _refer("Pair"),
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": config.max_texts,
                    "items": {"anyOf": [text, _refer("Pair")]},
                },
                parts,
            ]
        },
        "Pair": _object({"question": text, "answer": text}),
        "TextPart": {
            "anyOf": [
                {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": plain}, "text": text}},
                {
                    "type": "object",
                    "required": ["type", "refusal"],
                    "properties": {"type": {"const": "refusal"}, "refusal": text},
                },
            ]
        },
        "Content": {"anyOf": [text, parts]},
        "Messages": {
            "description": "Ends with the assistant's turn, perhaps followed by messages of system and tools.",
            "type": "array",
            "minItems": 1,
            "items": _refer("Message"),
            "contains": {"properties": {"role": {"const": "assistant"}}},
        },
        "Message": {
            "type": "object",
            "required": ["role"],
            "properties": {"role": {"enum": list(ROLES)}},
            "oneOf": [
                {"properties": {"role": {"enum": [role for role in ROLES if role not in ("user", "assistant")]}}},
                {
                    "required": ["content"],
                    "properties": {"role": {"enum": ["user", "assistant"]}, "content": _refer("Content")},
                },
                {
                    "properties": {
                        "role": {"const": "assistant"},
                        "content": {"type": "null"},
                        "refusal": {"anyOf": [_refer("Content"), {"type": "null"}]},
                    }
                },
            ],
        },
    }


def _describe_answers() -> dict[str, Schema]:
    text, share, count = {"type": "string"}, {"type": "number", "minimum": 0, "maximum": 1}, {"type": "integer"}
    thresholds: dict[str, Schema] = {
        "version": text,
        "rule": {"enum": ["max", "calibrated"]},
        "flagged": share,
        "categories": _map(share),
    }
    result = {
        "flagged": {"type": "boolean"},
        "categories": _map({"type": "boolean"}),
        "category_scores": _map(share),
        "category_applied_input_types": _map({"type": "array", "items": text}),
        "risk": share,
        "windows": {"type": "integer", "minimum": 1},
        "truncated": {"type": "boolean"},
        "context_used": {"enum": list(CONTEXTS)},
    }
    model = {"id": text, "object": {"const": "model"}, "created": count, "owned_by": text}
    error: dict[str, Schema] = {"message": text, "type": text, "param": {"type": ["string", "null"]}, "code": text}
    results = {"type": "array", "minItems": 1, "items": _object(result)}
    return {
        "Moderation": _object({"id": text, "model": text, "results": results, "thresholds": _object(thresholds)}),
        "Model": {"type": "object", "required": list(model), "properties": model},
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _refer("Model")}}),
        "Status": _object({"status": text}),
        "Error": _object({"error": _object(error)}),
    }


def _object(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _refer(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _get(name: str, summary: str, responses: Schema) -> Schema:
    return {"operationId": name, "summary": summary, "responses": responses}


def _answer(name: str, *refusals: int) -> Schema:
    return {"200": {"description": "The answer.", "content": _json(_refer(name))}, **_refuse(*refusals)}


def _refuse(*statuses: int) -> Schema:
    return {str(status): {"description": _REFUSALS[status], "content": _json(_refer("Error"))} for status in statuses}
