"""The routes around a real model: the verdicts of `predict`, limits, keys, changing thresholds, and no text anywhere else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from qlora_moderation import QAModeration
from qlora_moderation.calibration import Calibrator, RiskModel
from qlora_moderation.model import ModerationModel
from qlora_moderation.prefix import share_prefixes
from qlora_moderation.serving.app import build_app
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.engine import Engine, _count_forwards, load_engine
from qlora_moderation.serving.keys import Keys, load_keys
from qlora_moderation.serving.service import Service
from qlora_moderation.thresholds import Thresholds

CANARY = "canary-7f3a"
URL = "/v1/moderations"
LONG = "a long answer that goes on and on. " * 60


@pytest.fixture(scope="module")
def served(runs, rows, tmp_path_factory):
    """A model whose thresholds differ by category and scale, and a copy of its directory to change."""
    directory = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(runs["full"].weights, directory)
    moderation = QAModeration.from_pretrained(directory, use_cpu=True)
    tune(directory, moderation.taxonomy, 0.05)
    judged = QAModeration.from_pretrained(directory, use_cpu=True).predict(
        [row["prompt"] for row in rows[:24]], ["."] * 24
    )
    tune(directory, moderation.taxonomy, float(np.median([one["risk"] for one in judged])))
    return directory


def tune(directory, taxonomy, value, rule="max"):
    """Write thresholds around `value` of the calibrated scale."""
    count = len(taxonomy.categories)
    calibrators = tuple(Calibrator("platt", 0.7 + 0.05 * c, -0.5 + 0.1 * c) for c in range(count))
    per_category = tuple(calibrators[c].invert(min(0.99, value * (1 + 0.3 * c))) for c in range(count))
    flagged = tuple(each.invert(value) for each in calibrators)
    risk_model = RiskModel(tuple(0.2 + 0.01 * c for c in range(count)), 1.0)
    Thresholds(per_category, flagged, value, rule, calibrators, risk_model, "test").save(directory, taxonomy)


@contextlib.asynccontextmanager
async def serving(directory, keys=None, load=None, start=True, **options):
    """Yield a client of the application around the model in `directory`, and its service."""
    settings = {"model_path": str(directory), "use_cpu": True, "reload_seconds": 0, "served_model_name": "tiny"}
    config = ServeConfig(**{**settings, **options})
    service = Service(config, keys or Keys(), load or (lambda: load_engine(config)))
    app = build_app(service)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=30) as client,
    ):
        while start and service.state == "loading" and service.failure is None:
            await asyncio.sleep(0.005)
        if service.failure is not None:
            raise service.failure
        yield client, service


def play(directory, script, **options):
    async def run():
        async with serving(directory, **options) as (client, service):
            return await script(client, service)

    return asyncio.run(run())


@pytest.mark.parametrize("forwards_at_once", [1, 3])
def test_scores_and_flags_are_those_of_predict(served, rows, forwards_at_once):
    """Whatever the batch: many clients at once, lists, chats, long texts, a budget of a few texts, several forwards at once."""
    moderation = QAModeration.from_pretrained(served, use_cpu=True)
    pairs = [(row["prompt"], row["response"]) for row in rows[:24]] + [
        ("", "Alone."),
        ("Why?", LONG),
        ("q " * 300, LONG),
    ]
    wanted = moderation.predict([q for q, _ in pairs], [a for _, a in pairs])
    decided = moderation.predict([q for q, _ in pairs], [a for _, a in pairs], return_bool=True)

    async def script(client, service):
        as_pairs = [{"question": question, "answer": answer} for question, answer in pairs]
        asked = [client.post(URL, json={"input": pair}) for pair in as_pairs]
        asked += [client.post(URL, json={"input": as_pairs})]
        chat = [{"role": "user", "content": pairs[0][0]}, {"role": "assistant", "content": pairs[0][1]}]
        asked += [client.post(URL, json={"messages": chat}), client.post(URL, json={"input": "Alone."})]
        answers = await asyncio.gather(*asked)
        assert {answer.status_code for answer in answers} == {200}
        metrics = (await client.get("/metrics")).text
        return [answer.json() for answer in answers], service.rule, metrics

    options = {"max_tokens_per_micro_batch": 300, "max_queue_tokens": 10**6, "forwards_at_once": forwards_at_once}
    answers, rule, metrics = play(served, script, **options)
    results = [answer["results"][0] for answer in answers]
    for found, indices in (
        (results[: len(pairs)], range(len(pairs))),
        (answers[len(pairs)]["results"], range(len(pairs))),
        (results[-2:], [0, 24]),
    ):
        for result, index in zip(found, indices, strict=True):
            one = wanted[index]
            assert result["category_scores"] == pytest.approx(one["categories"], abs=1e-5)
            assert result["risk"] == pytest.approx(one["risk"], abs=1e-5)
            if abs(one["risk"] - rule.thresholds.flagged_threshold) > 1e-5:
                assert result["flagged"] == one["flagged"]
            limits = rule.shown["categories"]
            near = {name for name, score in one["categories"].items() if abs(score - limits[name]) < 1e-5}
            assert all(result["categories"][name] == decided[index]["categories"][name] for name in set(limits) - near)
    assert {one["flagged"] for one in wanted} == {True, False}, "the test needs both"
    assert [result["context_used"] for result in (results[0], *results[-2:])] == ["pair", "last_turn", "answer_only"]
    assert results[25]["windows"] > 1 and not results[25]["truncated"] and results[0]["windows"] == 1
    assert all(answer["thresholds"] == rule.shown and answer["model"] == "tiny" for answer in answers)
    assert set(results[0]["category_applied_input_types"]) == set(moderation.taxonomy.categories)
    assert len({answer["id"] for answer in answers}) == len(answers)
    windows = sum(result["windows"] for result in [*results[:-3], *answers[len(pairs)]["results"], *results[-2:]])
    assert f"qlora_moderation_batch_windows_sum {windows}.0" in metrics
    assert f'qlora_moderation_pairs_total{{context="pair"}} {2 * len(pairs)}.0' in metrics


def test_bars_and_thresholds_stand_on_one_scale(served, tmp_path):
    """A category is a yes where its score is above the threshold shown; flagged, where the risk is."""

    async def script(client, service):
        answer = (await client.post(URL, json={"input": ["one", "two", "three"]})).json()
        limits = answer["thresholds"]
        for result in answer["results"]:
            above = {name: score > limits["categories"][name] for name, score in result["category_scores"].items()}
            assert above == result["categories"] and (result["risk"] > limits["flagged"]) == result["flagged"]
        return limits

    moderation = QAModeration.from_pretrained(served, use_cpu=True)
    risk = moderation.predict("", "one")["risk"]
    directory = tmp_path / "model"
    shutil.copytree(served, directory)
    for rule, value in (("max", risk - 0.001), ("max", risk + 0.001), ("calibrated", 0.4)):
        tune(directory, moderation.taxonomy, value, rule)
        limits = play(directory, script)
        wanted = [min(0.99, value * (1 + 0.3 * c)) for c in range(len(moderation.taxonomy.categories))]
        assert limits["rule"] == rule and limits["flagged"] == value
        assert list(limits["categories"].values()) == pytest.approx(wanted)


def test_a_text_is_truncated_where_that_is_wanted(served):
    async def script(client, service):
        return (await client.post(URL, json={"input": [LONG, "short"]})).json()["results"]

    long, short = play(served, script, long_text="truncate")
    assert (long["windows"], long["truncated"], short["truncated"]) == (1, True, False)


def test_thresholds_change_without_a_restart(served, tmp_path, caplog):
    directory = tmp_path / "model"
    shutil.copytree(served, directory)
    taxonomy = QAModeration.from_pretrained(directory, use_cpu=True).taxonomy
    caplog.set_level(logging.INFO, "qlora_moderation.serving")

    async def judge(client):
        answer = (await client.post(URL, json={"input": "a"})).json()
        return answer["thresholds"]["version"], answer["results"][0]["flagged"]

    async def metric(client, name):
        lines = (await client.get("/metrics")).text.splitlines()
        return [line.rpartition(" ")[2] for line in lines if line.startswith(f"qlora_moderation_{name}")]

    async def until_version(client, version):
        while (found := await judge(client))[0] == version:
            await asyncio.sleep(0.01)
        return found

    async def script(client, service):
        tune(directory, taxonomy, 0.05)
        first = await until_version(client, service.rule.version)
        tune(directory, taxonomy, 0.999)
        second = await until_version(client, first[0])
        assert not second[1]
        (directory / "thresholds.json").write_text('{"origin": "half a')
        while await metric(client, "thresholds_file_ok") != ["0.0"]:
            await asyncio.sleep(0.01)
        assert await judge(client) == second
        assert await metric(client, 'thresholds_reloads_total{outcome="failed"}') == ["1.0"]
        assert f"thresholds {second[0]} stay in use" in caplog.text and "is not valid JSON" in caplog.text
        (directory / "thresholds.json").unlink()
        while await metric(client, 'thresholds_reloads_total{outcome="failed"}') != ["2.0"]:
            await asyncio.sleep(0.01)
        assert await judge(client) == second and "is gone" in caplog.text
        tune(directory, taxonomy, 0.05)
        assert await until_version(client, second[0]) == first
        assert await metric(client, "thresholds_file_ok") == ["1.0"]
        assert await metric(client, f'thresholds_info{{rule="max",version="{first[0]}"}}') == ["1.0"]
        assert len(await metric(client, "thresholds_info")) == 1

    play(directory, script, reload_seconds=0.02)


def test_keys_guard_what_is_worth_guarding(served, monkeypatch):
    key = "a-key-that-is-long-enough"
    monkeypatch.setenv("MODERATION_API_KEY", key)
    keys = load_keys(ServeConfig(model_path=str(served)))
    routes = {
        "/": 200,
        "/healthz": 200,
        "/readyz": 200,
        "/openapi.json": 200,
        "/metrics": 401,
        "/v1/models": 401,
        "/v1/models/tiny": 401,
    }

    async def script(client, service):
        assert {route: (await client.get(route)).status_code for route in routes} == routes
        refused = await client.post(URL, content=b"{" * 10, headers={"authorization": f"Bearer {key}x"})
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["type"] == "authentication_error"
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        client.headers["authorization"] = f"Bearer {key}"
        assert {(await client.get(route)).status_code for route in routes} == {200}
        assert (await client.post(URL, json={"input": "a"})).status_code == 200
        monkeypatch.setenv("MODERATION_API_KEY", "short")
        service.reload()  # keys that cannot be used leave the old ones
        assert (await client.post(URL, json={"input": "a"})).status_code == 200
        monkeypatch.setenv("MODERATION_API_KEY", "another-key-since-yesterday")
        service.reload()
        assert (await client.post(URL, json={"input": "a"})).status_code == 401

    play(served, script, keys=keys)


async def in_chunks(*parts):
    for part in parts:
        yield part


def test_limits_and_wrong_roads(served):
    async def script(client, service):
        typed = {"content-type": "application/json"}
        cases = [
            ((URL,), {"content": b"x" * 2000, "headers": {"content-type": "application/json"}}, 413, "too_large"),
            (
                (URL,),
                {"content": in_chunks(*[b"x" * 600] * 3), "headers": {"content-type": "application/json"}},
                413,
                "too_large",
            ),
            # what is announced to be too long is not even read
            ((URL,), {"content": in_chunks(b"x"), "headers": {**typed, "content-length": "9999"}}, 413, "too_large"),
            ((URL,), {"data": {"input": "a"}}, 415, "unsupported_media_type"),
            ((URL,), {"content": b'{"input": "a"'}, 415, "unsupported_media_type"),
            ((URL,), {"json": {"input": ["a"] * 5}}, 422, "invalid_value"),
            ((URL,), {"json": {"input": "a" * 101}}, 422, "invalid_value"),
            (("/v1/moderation",), {"json": {"input": "a"}}, 404, "not_found"),
            ((URL + "/",), {"json": {"input": "a"}}, 404, "not_found"),
            (("/v1/models",), {"json": {}}, 405, "method_not_allowed"),
        ]
        for arguments, options, status, code in cases:
            found = await client.post(*arguments, **options)
            assert (found.status_code, found.json()["error"]["code"]) == (status, code)
            assert found.headers["x-content-type-options"] == "nosniff"
        unknown = await client.get("/v1/models/other/model")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert (await client.post(URL, json={"input": ["a" * 100] * 4})).status_code == 200
        assert service.bodies.held == service.active == 0
        model = (await client.get("/v1/models")).json()["data"][0]
        assert model == (await client.get("/v1/models/tiny")).json()
        assert model["limits"]["texts"] == 4 and len(model["categories"]) == 14 and model["object"] == "model"
        assert (await client.head("/healthz")).status_code == (await client.head("/")).status_code == 200
        text = (await client.get("/metrics")).text
        assert 'requests_total{route="/v1/moderations",status="413"} 3.0' in text
        assert 'requests_total{route="other",status="404"} 2.0' in text

    play(served, script, max_body_bytes=1024, max_texts=4, max_text_length=100)


def test_what_is_slow_is_told_so(served):
    async def never():
        yield b"{"
        await asyncio.sleep(20)

    async def script(client, service):
        slow = await client.post(URL, content=never(), headers={"content-type": "application/json"})
        assert slow.status_code == 408 and service.bodies.held == 0
        service.batcher.engine.score = lambda windows: __import__("time").sleep(0.3)
        late = await client.post(URL, json={"input": "a"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        asked = asyncio.create_task(client.post(URL, json={"input": "a"}))
        while not service.active:
            await asyncio.sleep(0.001)
        assert not await service.stop(), "it did not wait longer than it was told"
        assert (await asked).json()["error"]["code"] in ("stopped", "timeout")

    play(served, script, request_timeout=0.1, shutdown_timeout=0.02)


def test_before_and_after_it_answers(served):
    """503 until the model is loaded; then, on the way out, while what was accepted is finished."""

    async def script(client, service):
        for route in ("/readyz", "/v1/models", "/healthz"):
            assert (await client.get(route)).status_code == (503 if route == "/readyz" else 200)
        early = await client.post(URL, json={"input": "a"})
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        while service.state == "loading":
            await asyncio.sleep(0.005)
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        service.batcher.broken = True
        assert (await client.get("/readyz")).status_code == (await client.get("/healthz")).status_code == 503
        service.batcher.broken = False
        accepted = asyncio.create_task(client.post(URL, json={"input": [LONG] * 20}))
        while not service.active:
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0)
        assert (await client.get("/readyz")).json() == {"status": "draining"}
        while service.state == "draining":
            await asyncio.sleep(0.001)
        if not accepted.done():
            late = await client.post(URL, json={"input": "a"})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
            assert (await client.get("/readyz")).status_code == 503 and (
                await client.get("/healthz")
            ).status_code == 200
        assert (await accepted).status_code == 200 and await stopping

    play(served, script, start=False, max_tokens_per_micro_batch=128, max_queue_tokens=10**6, drain_seconds=0.01)


def test_a_client_that_goes_takes_its_work_with_it(served):
    """The request is cancelled by what an ASGI server sends when a connection is closed."""

    async def script(client, service):
        body = json.dumps({"input": [LONG] * 20}).encode()
        sent, messages = [], [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop(0)
            while not service.batcher.queue.tokens:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"server")]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": URL, "raw_path": URL.encode()}
        scope |= {"query_string": b"", "headers": headers, "root_path": "", "scheme": "http", "server": ("server", 80)}
        await client._transport.app(scope, receive, send)
        assert not sent and service.batcher.queue.tokens == service.batcher.pairs == service.active == 0
        text = (await client.get("/metrics")).text
        assert "qlora_moderation_disconnects_total 1.0" in text and 'status="499"' in text

    play(served, script, max_tokens_per_micro_batch=128, max_queue_tokens=10**6)


class Broken(Engine):
    """An engine whose faults quote what they failed on, as those of libraries do."""

    def cut(self, questions, answers):
        if any("cut-me" in answer for answer in answers):
            raise ValueError(f"cannot cut {answers}")
        return super().cut(questions, answers)

    def score(self, windows):
        if len(windows[0].ids) > 120:
            raise RuntimeError(f"cannot score {CANARY} {windows}")
        found = super().score(windows)
        return np.full_like(found, np.nan) if self.sick else found

    sick = False


def test_a_small_model_gets_a_forward_for_each_core_and_a_large_one_its_cores_together(served, monkeypatch):
    classifier = load_engine(ServeConfig(model_path=str(served), use_cpu=True)).classifier
    assert _count_forwards(classifier, 8) == 8
    weights = sum(m.weight.numel() for m in classifier.model.modules() if isinstance(m, torch.nn.Linear))
    for threads_a_text, forwards in ((2, 4), (3, 2), (100, 1)):
        monkeypatch.setattr("qlora_moderation.serving.engine._WEIGHTS_A_THREAD", weights // threads_a_text)
        assert _count_forwards(classifier, 8) == forwards
    with torch.device("meta"):  # its layers are no `nn.Linear`
        large = GPT2ForSequenceClassification(GPT2Config(n_embd=1600, n_layer=48, n_head=25, pad_token_id=0))
    monkeypatch.undo()
    assert _count_forwards(SimpleNamespace(model=ModerationModel(large, False, torch.device("cpu"))), 16) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for asked, said in ((2, "2 at once, threads each: 4"), (16, "16 at once, threads each: 1")):
        config = ServeConfig(model_path=str(served), use_cpu=True, forwards_at_once=asked)
        assert said in Engine(classifier, config).explain()


def test_the_forward_that_warms_a_gpu_up_is_as_large_as_any(served):
    engine = Engine(load_engine(ServeConfig(model_path=str(served), use_cpu=True)).classifier, ServeConfig(str(served)))
    engine.token_budget = 4 * engine.classifier.encoder.max_length + 3
    texts = [np.asarray(window.ids) for window in engine._fill_forward()]
    assert [len(text) for text in texts] == [engine.classifier.encoder.max_length] * 4 and share_prefixes(texts) is None
    assert np.isfinite(engine.score(engine._fill_forward())).all()


def test_a_canary_is_found_nowhere(served, caplog, capfd):
    """Through every path, at debug level, with asyncio's own debug log: no text leaves but in its verdict."""
    caplog.set_level(logging.DEBUG)
    options = {
        "max_body_bytes": 4096,
        "max_texts": 3,
        "max_queue_pairs": 3,
        "max_text_length": 2000,
        "log_level": "debug",
    }
    config = ServeConfig(model_path=str(served), use_cpu=True, **options)
    pair = {"question": CANARY, "answer": CANARY}
    json_type = {"content-type": "application/json"}
    seen: dict[int, int] = {}

    def load():
        engine = load_engine(config)
        return Broken(engine.classifier, config)

    async def script(client, service):
        asyncio.get_running_loop().set_debug(True)
        asyncio.get_running_loop().slow_callback_duration = 0
        texts = []

        async def send(status, method="POST", url=URL, **kwargs):
            answer = await client.request(method, url, **kwargs)
            assert answer.status_code == status, answer.text
            seen[status] = seen.get(status, 0) + 1
            texts.append(answer.text + str(answer.headers))

        await send(200, json={"input": [CANARY, pair], "model": CANARY})
        await send(
            200, json={"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY}]}
        )
        await send(
            200, url=f"{URL}?text={CANARY}", json={"input": CANARY}, headers={"user-agent": CANARY, "x-a": CANARY}
        )
        await send(400, content=f'{{"input": "{CANARY}', headers=json_type)
        await send(404, method="GET", url=f"/v1/models/{CANARY}?{CANARY}")
        await send(404, url=f"/{CANARY}?{CANARY}", json={"input": CANARY})
        await send(404, method="GET", url=f"{URL}/?{CANARY}")
        await send(405, method="PUT", url=f"{URL}?{CANARY}", json={"input": CANARY})
        await send(405, method=CANARY.upper(), url="/")
        await send(413, json={"input": CANARY * 500})
        await send(413, content=in_chunks(*[CANARY.encode() * 100] * 9), headers=json_type)
        await send(415, content=CANARY, headers={"content-type": f"text/{CANARY}"})
        await send(422, json={"input": [{CANARY: CANARY}]})
        await send(422, json={CANARY: CANARY})
        await send(422, json={"input": [CANARY] * 4})
        await send(422, json={"input": CANARY * 200})
        await send(422, content=json.dumps({"input": "\ud800" + CANARY}), headers=json_type)
        await send(422, json={"messages": [{"role": CANARY, "content": CANARY}]})
        await send(500, json={"input": f"cut-me {CANARY}"})
        await send(500, json={"input": f"{CANARY} " * 100})
        service.batcher.engine.sick = True
        await send(500, json={"input": CANARY})
        service.batcher.engine.sick = False
        slow, service.batcher.engine.score = (
            service.batcher.engine.score,
            lambda w: __import__("time").sleep(0.2) or slow(w),
        )
        full = [asyncio.create_task(send(200, json={"input": CANARY})) for _ in range(3)]
        while service.batcher.pairs < 3:
            await asyncio.sleep(0.001)
        await send(429, json={"input": CANARY})
        await asyncio.gather(*full)
        service.state = "stopping"
        await send(503, json={"input": CANARY})
        texts.append((await client.get("/metrics")).text)
        return texts

    texts = play(served, script, load=load, **options)
    assert set(seen) == {200, 400, 404, 405, 413, 415, 422, 429, 500, 503}
    server_logs = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]  # those are the client's
    logged = "\n".join(f"{r.name} {r.getMessage()} {r.exc_info} {r.stack_info}" for r in server_logs)
    assert (
        "tokenising failed: ValueError in" in logged
        and "windows failed: RuntimeError in" in logged
        and "/v1/moderations 429" in logged
        and "asyncio" in logged
    )
    printed = capfd.readouterr()
    for place in (*texts, logged, printed.out, printed.err):
        assert CANARY not in place and CANARY.upper() not in place
