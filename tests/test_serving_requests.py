"""What the server takes for a request, whom it lets in, and that no refusal repeats what was sent."""

from __future__ import annotations

import json
import re

import pytest

from qlora_moderation.cli import run_job
from qlora_moderation.errors import ConfigError
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.faults import RequestError
from qlora_moderation.serving.keys import KEY_VARIABLE, load_keys
from qlora_moderation.serving.page import _list_hashes, load_page
from qlora_moderation.serving.requests import read_pairs

CONFIG = ServeConfig(model_path=".", max_text_length=50, max_texts=3)
CANARY = "canary-7f3a"
KEYS = ["k" * 16, "another-key-of-some-length"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def part(text, kind="text"):
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        ({"input": "a"}, [("", "a", "answer_only")]),
        ({"input": "a", "model": "omni-moderation-latest"}, [("", "a", "answer_only")]),
        ({"input": ["a", "b"]}, [("", "a", "answer_only"), ("", "b", "answer_only")]),
        ({"input": {"question": "q", "answer": "a"}}, [("q", "a", "pair")]),
        ({"input": ["a", {"question": "", "answer": "b"}]}, [("", "a", "answer_only"), ("", "b", "pair")]),
        ({"input": [part("a"), part("b")]}, [("", "a\nb", "answer_only")]),
        ({"messages": [user("q"), assistant("a")]}, [("q", "a", "last_turn")]),
        ({"messages": [user("old"), assistant("old"), user("q"), assistant("a")]}, [("q", "a", "last_turn")]),
        ({"messages": [user("q1"), user("q2"), assistant("a1"), assistant("a2")]}, [("q1\nq2", "a1\na2", "last_turn")]),
        ({"messages": [user([part("q")]), assistant([part("a"), part("b")])]}, [("q", "a\nb", "last_turn")]),
        (
            {"messages": [user("q"), assistant(None), {"role": "tool", "content": "t"}, assistant("a")]},
            [("q", "a", "last_turn")],
        ),
        (
            {"messages": [user("q"), {"role": "assistant", "content": None, "refusal": "No."}]},
            [("q", "No.", "last_turn")],
        ),
        ({"messages": [{"role": "system", "content": 5}, assistant("a")]}, [("", "a", "answer_only")]),
    ],
)
def test_what_is_judged(request_, found):
    pairs = read_pairs(json.dumps(request_).encode(), CONFIG)
    assert [(pair.question, pair.answer, pair.context) for pair in pairs] == found
    assert not any("question" in repr(pair) for pair in pairs)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (f'{{"input": "{CANARY}', 400, None),
        (f'"{CANARY}"'.encode("utf-16")[:-1], 400, None),
        (b'{"input": "\xff"}', 400, None),
        ("[" * 100_000, 400, None),
        ("9" * 5000, 400, None),
        (f'"{CANARY}"', 422, None),
        ({CANARY: 1, "input": "a"}, 422, None),
        ({"input": "a", "model": [CANARY]}, 422, "model"),
        ({}, 422, "input"),
        ({"input": CANARY, "messages": [assistant(CANARY)]}, 422, "input"),
        ({"input": {CANARY: CANARY}}, 422, "input"),
        ({"input": {"question": "q", "answer": "a", CANARY: 1}}, 422, "input"),
        ({"input": []}, 422, "input"),
        ({"input": 5}, 422, "input"),
        ({"input": ["a"] * 4}, 422, "input"),
        ({"input": ["a", [CANARY]]}, 422, "input[1]"),
        ({"input": ["a", part(CANARY)]}, 422, "input[1]"),
        ({"input": [{"question": CANARY, "answer": 1}]}, 422, "input[0].answer"),
        ({"input": CANARY * 9}, 422, "input"),
        ({"input": ["a", {"question": CANARY * 9, "answer": "b"}]}, 422, "input[1].question"),
        ({"input": "\ud800" + CANARY}, 422, "input"),
        ({"input": [part(CANARY), {"type": "image_url", "image_url": {"url": CANARY}}]}, 422, "input[1].type"),
        ({"messages": CANARY}, 422, "messages"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [CANARY]}, 422, "messages[0]"),
        ({"messages": [{"role": CANARY, "content": "a"}]}, 422, "messages[0].role"),
        ({"messages": [user(CANARY)]}, 422, "messages"),
        ({"messages": [user("q"), assistant("a"), user(CANARY)]}, 422, "messages"),
        ({"messages": [user(None), assistant("a")]}, 422, "messages[0].content"),
        ({"messages": [user("q"), assistant([CANARY])]}, 422, "messages[1].content[0]"),
        ({"messages": [user("q"), assistant([part(3)])]}, 422, "messages[1].content[0].text"),
        ({"messages": [user("q"), assistant(CANARY * 9)]}, 422, "messages"),
    ],
)
def test_what_is_refused_is_named_by_its_place_and_never_repeated(body, status, param):
    text = json.dumps(body) if isinstance(body, dict) else body
    with pytest.raises(RequestError) as caught:
        read_pairs(text if isinstance(text, bytes) else text.encode(), CONFIG)
    error = caught.value
    assert (error.status, error.param) == (status, param)
    assert set(error.body["error"]) == {"message", "type", "param", "code"}
    assert CANARY not in json.dumps(error.body) and error.message


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    (tmp_path / "keys").write_text(f"# of the team\n{KEYS[0]}\n\n")
    config = ServeConfig(model_path=".", host="0.0.0.0", api_key_file=str(tmp_path / "keys"))
    keys = load_keys(config, {KEY_VARIABLE: f" {KEYS[1]},{'z' * 20} "})
    assert len(keys.digests) == 3 and not any(key in repr(vars(keys)) for key in KEYS)
    assert all(keys.admit(f"Bearer {key}") for key in (*KEYS, "z" * 20)) and keys.admit(f"bearer  {KEYS[0]} ")
    wrong = [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEYS[0],
        f"Basic {KEYS[0]}",
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        "Bearer é",
    ]
    assert not any(keys.admit(header) for header in wrong)
    assert load_keys(ServeConfig(model_path="."), {}).admit(None)


@pytest.mark.parametrize(
    ("content", "environment", "message"),
    [
        (None, {}, "keys: cannot be read"),
        ("# nothing\n", {}, "holds no key"),
        (f"{KEYS[0]}\nshort\n", {}, "line 2: a key needs at least 16 characters"),
        (f"{KEYS[0]} {KEYS[1]}\n", {}, "line 1: a key needs"),
        (f"{KEYS[0]}\n", {KEY_VARIABLE: " "}, f"{KEY_VARIABLE}: is set and holds no key"),
        (f"{KEYS[0]}\n", {KEY_VARIABLE: "secret"}, f"{KEY_VARIABLE}: a key needs"),
    ],
)
def test_keys_that_cannot_be_used_are_named_by_their_place(content, environment, message, tmp_path):
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_keys(ServeConfig(model_path=".", api_key_file=str(tmp_path / "keys")), environment)
    assert not re.search("secret|short|kkkk|another", str(caught.value))


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "127.8.0.1"}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "a.name"}, False),
        ({"host": "0.0.0.0", "allow_unauthenticated": True}, True),
    ],
)
def test_other_machines_need_a_key(flags, allowed):
    if allowed:
        load_keys(ServeConfig(model_path=".", **flags), {})
        return
    with pytest.raises(ConfigError, match="without a key; give --api_key_file"):
        load_keys(ServeConfig(model_path=".", **flags), {})


def test_faults_of_the_configuration_are_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "short")
    assert run_job("serve", ["--model_path", str(tmp_path / "none"), "--max_texts", "9", "--max_queue_pairs", "8"]) == 2
    said = capsys.readouterr().err
    assert "no such directory" in said and "--max_texts 9: a full request would never fit" in said
    assert run_job("serve", ["--model_path", str(tmp_path)]) == 2
    assert f"{KEY_VARIABLE}: a key needs" in capsys.readouterr().err
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setattr("qlora_moderation.serving.server.find_spec", lambda name: None if name == "uvicorn" else name)
    assert run_job("serve", ["--model_path", str(tmp_path)]) == 2
    assert "serve needs uvicorn; pip install -c scripts/constraints.txt -e '.[serve]'" in capsys.readouterr().err


def test_a_model_is_named_by_its_run_and_never_by_a_path(tmp_path):
    assert ServeConfig(model_path=str(tmp_path / "run" / "merged")).model_name == "run"
    assert ServeConfig(model_path=str(tmp_path / "own")).model_name == "own"
    assert ServeConfig(model_path=str(tmp_path), served_model_name="name").model_name == "name"


def test_the_page_may_run_its_own_script_and_nothing_else():
    page, headers = load_page()
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"] and policy["connect-src"] == "'self'"
    for directive, element in (("style-src", b"<style"), ("script-src", b"<script")):
        assert policy[directive].count("'sha256-") == page.count(element)
    # as browsers do it: every byte between the tags (the hash of " a " by openssl dgst)
    assert _list_hashes(b"<style> a </style>", b"style") == "'sha256-y/fzAATzZnywk7PHtVFpqQ4/AET26j/5PT91Qnpy43c='"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
