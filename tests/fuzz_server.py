"""Whatever a client sends is answered as the server's own OpenAPI document says, and never by a failure."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import requests
import schemathesis
from fuzz import Property
from fuzz_config import folder
from fuzz_files import JSON_VALUES
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from qlora_moderation.scoring import CutPairs
from qlora_moderation.serving.app import build_app
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.keys import Keys
from qlora_moderation.serving.schema import build_schema
from qlora_moderation.serving.service import Service
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.thresholds import Thresholds
from qlora_moderation.tokenization import Window

TAXONOMY = Taxonomy(categories=("a", "b,c"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
GOOD_BODIES = [
    {"input": "a", "model": None},
    {"input": {"question": "q", "answer": "a"}},
    {"input": ["a", {"question": "q", "answer": "a"}], "messages": None},
    {"input": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
    {"messages": [{"role": "system"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "assistant", "content": None, "refusal": "No."}]},
]


class Engine:
    """An engine without a model, whose logits are lengths of texts."""

    token_budget = 64
    brief_budget = 32
    forwards_at_once = 2
    names = TAXONOMY.categories
    classifier = SimpleNamespace(taxonomy=TAXONOMY, thresholds=Thresholds.default(TAXONOMY))

    def cut(self, questions: list[str], answers: list[str]) -> CutPairs:
        for text in (*questions, *answers):
            text.encode()
        windows = [Window([len(answer)] * (1 + len(answer) % 9), i, False) for i, answer in enumerate(answers)]
        return CutPairs(windows, len(answers), True)

    def score(self, windows: list[Window]) -> np.ndarray:
        return np.array([[window.ids[0] - 3, -1] for window in windows], dtype=np.float32)

    def probe(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {"categories": list(self.names)}

    def explain(self) -> str:
        return "nothing"


CONFIG = ServeConfig(
    model_path=str(folder() / "none"),
    served_model_name="tiny",
    max_text_length=20,
    max_texts=3,
    reload_seconds=0,
    log_requests=False,
)


@functools.cache
def client() -> TestClient:
    """Return a client of a server that runs until the process ends."""
    service = Service(CONFIG, Keys(), Engine)  # type: ignore[arg-type]
    made = TestClient(build_app(service), raise_server_exceptions=False).__enter__()
    while made.get("/readyz").status_code != 200:
        if service.failure is not None:
            raise service.failure
    return made


@functools.cache
def published() -> Any:
    """Return the schema as schemathesis reads it from the server."""
    assert client().get("/openapi.json").json() == json.loads(json.dumps(build_schema(CONFIG)))
    return schemathesis.openapi.from_dict(build_schema(CONFIG))


def check_case(draw: tuple[Any, bool]) -> None:
    """A request that the schema describes, or that it does not, is answered as the schema says."""
    case, is_wrong = draw
    kwargs = case.as_transport_kwargs(base_url="http://testserver")
    kwargs.pop("timeout", None)
    asked = requests.Request(**{key: value for key, value in kwargs.items() if key in _REQUEST}).prepare()
    headers = {key: value for key, value in asked.headers.items() if key.lower() != "content-length"}
    found = client().request(asked.method or "GET", asked.url or "", headers=headers, content=asked.body)
    checks = [*CHECKS, negative_data_rejection] if is_wrong else CHECKS
    case.validate_response(found, checks=checks)
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.status_code < 400 or is_wrong or found.status_code in (404, 413, 415, 422), found.text


_REQUEST = ("method", "url", "headers", "params", "json", "data", "cookies")


def _list_cases() -> st.SearchStrategy[tuple[Any, bool]]:
    found = []
    for operation in (found.ok() for found in published().get_all_operations()):
        found.append(st.tuples(operation.as_strategy(GenerationMode.POSITIVE), st.just(False)))
        if operation.method == "post":
            found.append(st.tuples(operation.as_strategy(GenerationMode.NEGATIVE), st.just(True)))
    return st.one_of(found)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, str]:
    """Draw a body of any bytes, or a good one of which a value is another, and what it says it is."""
    from fuzz_files import damaged

    kind = draw(st.sampled_from(["application/json"] * 5 + ["text/plain", "application/json; charset=utf-16", ""]))
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=12) | st.sampled_from([b"[" * 9000, b"9" * 5000, b"\xef\xbb\xbf{}"])), kind
    value = draw(damaged(GOOD_BODIES) | JSON_VALUES)
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"), kind


def check_body(draw: tuple[bytes, str]) -> None:
    """Any body is answered with verdicts where the schema takes it, and refused in OpenAI's shape where it does not."""
    body, kind = draw
    found = client().post("/v1/moderations", content=body, headers={"content-type": kind})
    assert found.status_code in (200, 400, 415, 422), found.text
    operation = published()["/v1/moderations"]["POST"]
    assert str(found.status_code) in build_schema(CONFIG)["paths"]["/v1/moderations"]["post"]["responses"]
    operation.validate_response(found)
    if found.status_code == 200 or (found.status_code == 422 and kind.startswith("application/json")):
        value = json.loads(body)
        try:
            fits = _validator().is_valid(value)
        except UnicodeEncodeError:  # a lone surrogate
            assert found.status_code == 422, value
            return
        if found.status_code == 200:
            assert fits, value
        elif fits:  # what a schema cannot say
            assert any(word in found.text for word in ("surrogate", "messages", "characters")), found.text


@functools.cache
def _validator() -> Any:
    import jsonschema_rs

    document = build_schema(CONFIG)
    return jsonschema_rs.Draft202012Validator(
        {**document["components"]["schemas"]["ModerationRequest"], "components": document["components"]}
    )


_REFUSAL_THAT_IS_NONE = (b'{"messages": [{"role": "assistant", "content": null, "refusal": 0}]}', "application/json")
PROPERTIES = {
    "requests by the schema": Property(st.deferred(_list_cases), check_case, weight=2),
    "bodies": Property(bodies(), check_body, (_REFUSAL_THAT_IS_NONE, (b"{}", "text/plain"))),
}
