"""The server's interface as an OpenAPI document, for clients that are generated and for tests that make requests up.

In: the limits of a configuration. Out: a JSON-ready mapping. The checks of `requests` decide; what a schema cannot say, such as
that a chat ends with the assistant, stands in the descriptions.
"""

from __future__ import annotations

from typing import Any

from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.conversation import ROLES, TEXT_PARTS
from qlora_moderation.serving.requests import CONTEXTS

_REFUSALS = {
    400: "no JSON",
    401: "no valid key",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too long",
    415: "not sent as application/json",
    422: "a field of a wrong form or length",
    429: "too much is waiting; Retry-After says when to come again",
    500: "the model failed on this request",
    503: "being loaded, stopping, out of memory, or too slow",
}


def build_schema(config: ServeConfig) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these limits."""
    parts = _array(
        _object(
            {"type": {"enum": list(TEXT_PARTS)}, "text": _text(config), "refusal": _text(config)}, "type", open=True
        )
    )
    parts["items"]["anyOf"] = [
        {"properties": {"type": {"const": "refusal"}}, "required": ["refusal"]},
        {"properties": {"type": {"enum": [part for part in TEXT_PARTS if part != "refusal"]}}, "required": ["text"]},
    ]
    pair = _object({"question": _text(config), "answer": _text(config)}, "question", "answer")
    item = {"anyOf": [_text(config), pair]}
    message = _object({"role": {"enum": list(ROLES)}, "content": {"anyOf": [_text(config), parts]}}, "role", open=True)
    request = _object(
        {
            "model": {"type": ["string", "null"], "description": "any name; the answer says which model judged"},
            "input": {"anyOf": [_text(config), pair, _array(item, config.max_texts), parts]},
            "messages": {**_array(message), "description": "a chat that ends with the assistant's turn"},
        }
    )
    request["oneOf"] = [{"required": ["input"]}, {"required": ["messages"]}]
    moderate = _operation("Judge answers", "Moderation", 400, 401, 408, 413, 415, 422, 429, 500, 503)
    moderate["requestBody"] = {"required": True, "content": {"application/json": {"schema": request}}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    state = {"get": _operation("Say how it is", "State"), "head": _operation("Say how it is")}
    for method, answer in (("get", "State"), ("head", None)):
        state[method]["responses"]["503"] = {"description": "not well, or not ready", **_content(answer)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "qlora_moderation",
            "version": "1",
            "description": "moderation of questions with their answers",
        },
        "paths": {
            "/v1/moderations": {"post": moderate},
            "/v1/models": {"get": _operation("List the one model", "Models", 401)},
            "/v1/models/{name}": {"parameters": [name], "get": _operation("Describe the model", "Model", 401, 404)},
            "/healthz": state,
            "/readyz": state,
        },
        "components": {
            "schemas": _describe_answers(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe_answers() -> dict[str, Any]:
    number, boolean, text = {"type": "number", "minimum": 0, "maximum": 1}, {"type": "boolean"}, {"type": "string"}
    result = _object(
        {
            "flagged": boolean,
            "categories": _map(boolean),
            "category_scores": _map(number),
            "category_applied_input_types": _map(_array({"const": "text"})),
            "risk": number,
            "windows": {"type": "integer", "minimum": 1},
            "truncated": boolean,
            "context_used": {"enum": list(CONTEXTS)},
        },
        *("flagged", "categories", "category_scores", "category_applied_input_types"),
        *("risk", "windows", "truncated", "context_used"),
    )
    model = _object(
        {"id": text, "object": {"const": "model"}, "created": {"type": "integer"}}, "id", "object", open=True
    )
    nothing = {"type": ["string", "null"]}
    error = _object({"message": text, "type": text, "param": nothing, "code": text}, "message", "type", "param", "code")
    return {
        "Moderation": _object(
            {"id": text, "model": text, "results": _array(result), "thresholds": {"type": "object"}},
            *("id", "model", "results", "thresholds"),
        ),
        "Model": model,
        "Models": _object(
            {"object": {"const": "list"}, "data": _array({"$ref": "#/components/schemas/Model"})}, "data"
        ),
        "State": _object({"status": text}, "status"),
        "Error": _object({"error": error}, "error"),
    }


def _operation(summary: str, answer: str | None = None, *refusals: int) -> dict[str, Any]:
    responses = {"200": {"description": "the answer", **_content(answer)}}
    for status in refusals:
        responses[str(status)] = {"description": _REFUSALS[status], **_content("Error")}
    found: dict[str, Any] = {"summary": summary, "responses": responses}
    if 401 in refusals:
        found["security"] = [{}, {"key": []}]  # without keys the server asks for none
    return found


def _content(answer: str | None) -> dict[str, Any]:
    if answer is None:
        return {}
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}}


def _text(config: ServeConfig) -> dict[str, Any]:
    return {"type": "string", "maxLength": config.max_text_length}


def _object(properties: dict[str, Any], *required: str, open: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": open}
    return {**found, "required": list(required)} if required else found


def _array(items: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    found = {"type": "array", "items": items, "minItems": 1}
    return found if most is None else {**found, "maxItems": most}


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}
