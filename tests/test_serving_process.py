"""A real server process on loopback: OpenAI's own client, many connections, signals, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from qlora_moderation import QAModeration
from qlora_moderation.thresholds import Thresholds

ROOT = Path(__file__).resolve().parent.parent
MAIN = "import sys; from qlora_moderation.cli import main; sys.exit(main())"
KEY = "a-key-for-this-test-alone"


@contextlib.contextmanager
def start_server(directory, *flags, ready=True, **environment):
    """Start a server on a free port and yield its process, its address and the lines of its log."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    command = [
        sys.executable,
        "-c",
        MAIN,
        "serve",
        "--model_path",
        str(directory),
        "--port",
        "0",
        "--use_cpu",
        "True",
        *flags,
    ]
    process = subprocess.Popen(
        command, env=variables, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()

    def wait_for(text):
        deadline = time.monotonic() + 60
        while not (found := [line for line in list(lines) if text in line]):
            assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
            time.sleep(0.01)
        return found[0]

    try:
        address = re.search(r"http://\S+:\d+", wait_for("listening on"))[0]
        if ready:
            wait_for("ready")
        yield process, address, lines
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        process.stdout.close()


def finish(process):
    return process.wait(timeout=60)


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "run" / "model"
    shutil.copytree(runs["full"].weights, directory)
    return directory


async def judge_many(address, count):
    async with httpx.AsyncClient(base_url=address, timeout=60, headers={"authorization": f"Bearer {KEY}"}) as client:
        bodies = [{"input": {"question": f"{i}?", "answer": "word " * (i % 90)}} for i in range(count)]
        return await asyncio.gather(*(client.post("/v1/moderations", json=body) for body in bodies))


def wait_until_busy(address):
    """Return when the model has begun, and much is left."""
    keyed = {"authorization": f"Bearer {KEY}"}
    while not re.search(r"qlora_moderation_queue_tokens [1-9]", httpx.get(f"{address}/metrics", headers=keyed).text):
        time.sleep(0.005)


@contextlib.contextmanager
def asking_much(address):
    """Ask what takes seconds, beside the block; yields the list that the answer comes into."""
    body, keyed = {"input": ["word " * 4000] * 6}, {"authorization": f"Bearer {KEY}"}
    answers = []

    def ask():
        answers.append(httpx.post(f"{address}/v1/moderations", json=body, headers=keyed, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until_busy(address)
    yield answers
    asking.join()


def test_openai_s_client_and_many_others(model):
    """One process serves the official client, forty clients at once and a reload, then finishes what it accepted."""
    moderation = QAModeration.from_pretrained(model, use_cpu=True)
    wanted = moderation.predict("", "How do I boil an egg?")
    flags = ["--reload_seconds", "0", "--max_tokens_per_micro_batch", "128", "--max_queue_tokens", "10000000"]
    with start_server(model, *flags, MODERATION_API_KEY=KEY) as (process, address, lines):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        answer = client.moderations.create(input="How do I boil an egg?")
        scores = answer.results[0].category_scores.to_dict()
        # the client drops a category that is called as one of its attributes, so the server repeats it in OpenAI's spelling
        scores["self_harm"] = scores.pop("self-harm")
        assert scores == pytest.approx(wanted["categories"], abs=1e-5)
        assert answer.results[0].category_scores.self_harm == scores["self_harm"]
        assert answer.results[0].flagged == wanted["flagged"]
        assert answer.id.startswith("modr-") and answer.model == "run"
        several = client.moderations.create(model="omni-moderation-latest", input=["one", "two"])
        assert len(several.results) == 2 and len(several.results[1].categories.to_dict()) == len(scores)
        parts = client.moderations.create(input=[{"type": "text", "text": "one"}])
        assert parts.results[0].category_scores.to_dict() == pytest.approx(
            several.results[0].category_scores.to_dict(), abs=1e-5
        )
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        turn = client.post("/moderations", body={"messages": chat}, cast_to=object)
        assert turn["results"][0]["context_used"] == "last_turn"
        assert [each.id for each in client.models.list()] == ["run"] and client.models.retrieve("run").id == "run"
        with pytest.raises(openai.AuthenticationError, match="send a valid key"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").moderations.create(input="a")
        with pytest.raises(openai.UnprocessableEntityError, match="only text can be judged") as caught:
            client.moderations.create(input=[{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}])
        assert caught.value.code == "invalid_value" and caught.value.param == "input[0].type"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")

        answers = asyncio.run(judge_many(address, 40))
        expected = moderation.predict([f"{i}?" for i in range(40)], ["word " * (i % 90) for i in range(40)])
        for answer, one in zip(answers, expected, strict=True):
            assert answer.json()["results"][0]["category_scores"] == pytest.approx(one["categories"], abs=1e-5)
        keyed = {"headers": {"authorization": f"Bearer {KEY}"}}
        metrics = httpx.get(f"{address}/metrics", **keyed).text
        forwards = float(re.search(r"qlora_moderation_batch_windows_count (\S+)", metrics)[1])
        windows = float(re.search(r"qlora_moderation_batch_windows_sum (\S+)", metrics)[1])
        assert windows > forwards, "no two texts were ever scored together"

        before = several.model_extra["thresholds"]["version"]
        Thresholds.uniform(0.0, len(scores)).save(model, moderation.taxonomy)
        process.send_signal(signal.SIGHUP)
        while (after := client.moderations.create(input="a")).model_extra["thresholds"]["version"] == before:
            time.sleep(0.01)
        assert after.results[0].flagged

        with asking_much(address) as late:
            process.send_signal(signal.SIGTERM)
            while (state := httpx.get(f"{address}/readyz")).json()["status"] == "ready":
                time.sleep(0.005)
            assert state.status_code == 503
            refused = httpx.post(f"{address}/v1/moderations", json={"input": "a"}, **keyed)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert late[0].status_code == 200 and len(late[0].json()["results"]) == 6, "it was accepted"
        assert finish(process) == 0, "".join(lines)
    assert not any("egg" in line or KEY in line or "Traceback" in line for line in lines)


def test_a_second_signal_ends_it(model):
    flags = ["--max_tokens_per_micro_batch", "128", "--max_queue_tokens", "10000000", "--shutdown_timeout", "600"]
    with start_server(model, *flags) as (process, address, lines):
        with asking_much(address) as answers:
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{address}/readyz").status_code == 200:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "stopped")
        assert finish(process) == 143, "".join(lines)


def test_half_a_request_ends_with_the_server_and_without_a_traceback(model):
    with start_server(model, "--shutdown_timeout", "1") as (process, address, lines):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as half:
            half.sendall(
                b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
            )
            while "pairs" not in httpx.get(f"{address}/metrics").text:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: half.recv(4096), b""))
        assert finish(process) == 143
    assert answer.startswith(b"HTTP/1.1 503") and b'"code": "stopped"' in answer.replace(b'":"', b'": "')
    assert "Traceback" not in "".join(lines)


def test_what_cannot_start_says_why_and_exits_with_2(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", MAIN, "serve", "--model_path", str(model), "--port", port]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
    assert (
        done.returncode == 2 and f"--port {port}: cannot listen there" in done.stderr and "Traceback" not in done.stderr
    )
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with start_server(broken, ready=False) as (process, _, lines):
        assert finish(process) == 2
    said = [line for line in lines if line.startswith("error:")]
    assert len(said) == 1 and "broken" in said[0] and "Traceback" not in "".join(lines)
