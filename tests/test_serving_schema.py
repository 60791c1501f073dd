"""Made-up requests against the server's own OpenAPI document: no fault, and no status, type or field that it does not name."""

from __future__ import annotations

import hypothesis
import jsonschema_rs
import pytest
import requests
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from test_serving_process import start_server

CHECKS = (
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
)  # fmt: skip


@pytest.fixture(scope="module")
def address(runs):
    with start_server(runs["lora"].weights, "--max_text_length", "200", "--max_texts", "4") as (_, address, _):
        yield address


MADE_UP = {("/v1/moderations", "POST"): 60, ("/v1/models", "GET"): 2, ("/v1/models/{name}", "GET"): 10}
MADE_UP |= {("/healthz", "GET"): 2, ("/readyz", "HEAD"): 2}
"""Requests for each route and method."""


@pytest.mark.parametrize(("path", "method"), MADE_UP)
def test_answers_are_as_documented(path, method, address):
    operation = schemathesis.openapi.from_url(f"{address}/openapi.json")[path][method]
    seen = []

    @hypothesis.settings(
        max_examples=MADE_UP[path, method],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def ask(case):
        answer = case.call()
        case.validate_response(answer, checks=list(CHECKS))
        seen.append(answer.status_code)
        if (
            path == "/v1/moderations" and "messages" not in case.body
        ):  # a schema cannot say that a chat ends with an answer
            assert answer.status_code == 200, (case.body, answer.text)

    ask()
    assert set(seen) == {404} if path == "/v1/models/{name}" else 200 in seen


def test_the_document_allows_what_is_judged_and_forbids_what_is_refused(address):
    document = requests.get(f"{address}/openapi.json", timeout=10).json()
    content = document["paths"]["/v1/moderations"]["post"]["requestBody"]["content"]["application/json"]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    good = [
        {"input": "a"},
        {"input": {"question": "q", "answer": "a"}},
        {"input": ["a", {"question": "", "answer": "b"}]},
    ]
    good += [{"input": [{"type": "text", "text": "a"}], "model": None}, {"messages": chat, "model": "any"}]
    bad = [{}, {"input": 5}, {"input": []}, {"input": "a", "more": 1}, {"input": ["a"] * 5}, {"input": "a" * 201}]
    bad += [
        {"input": {"question": "q"}},
        {"input": "a", "messages": chat},
        {"messages": [{"role": "robot", "content": "a"}]},
    ]
    for body, status in [*((each, 200) for each in good), *((each, 422) for each in bad)]:
        assert requests.post(f"{address}/v1/moderations", json=body, timeout=30).status_code == status, body
        assert jsonschema_rs.is_valid(content["schema"], body) == (status == 200), body
