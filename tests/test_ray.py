"""Ray: the same rows as the local engine gives, with a worker killed under way; run by scripts/check_ray.sh."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import silent
from ranks import find_port
from safetensors.torch import load_file, save_file

from qlora_moderation.errors import ConfigError
from qlora_moderation.predict import predict
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.ray_engine import plan_workers

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "import sys; from qlora_moderation.cli import main; sys.exit(main(sys.argv[1:]))"]
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # given here, it is not written into anybody's home
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "PYTHONPATH": str(ROOT),
}
SECONDS = 100


@pytest.fixture(scope="module")
def many_rows(rows, tmp_path_factory):
    """3,000 different rows, and a bad one for another file."""
    folder = tmp_path_factory.mktemp("ray")
    made = [
        {"id": i, "prompt": rows[i % 300]["prompt"], "response": f"{rows[i % 300]['response']} {i // 300}"}
        for i in range(3000)
    ]
    lines = [json.dumps(row) + "\n" for row in made]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "bad.jsonl").write_text("".join([*lines[:150], '{"prompt": "p"}\n', *lines[:150]]))
    return folder


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def find_workers(parent):
    """Return the process ids of the workers below a process."""
    import psutil

    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "BlockWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_for(what, running):
    ends = time.monotonic() + SECONDS
    while not (found := what()):
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < ends, "nothing happened"
        time.sleep(0.02)
    return found


def start(*arguments):
    command = [*COMMAND, "predict", *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_all(head):
    """End a process and what it has started."""
    import psutil

    started = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(started, timeout=5)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    head.wait(timeout=30)


def finish(running):
    """Wait for a process; return its exit code, output and errors."""
    try:
        printed, said = running.communicate(timeout=SECONDS)
        return running.returncode, printed, said
    finally:
        if running.poll() is None:
            end_all(running)


@pytest.mark.ray
def test_a_worker_killed_under_way_costs_no_row_and_doubles_none(runs, many_rows, tmp_path):
    weights, source = runs["full"].weights, many_rows / "rows.jsonl"
    options = {"block_size": 25, "bootstrap_replicates": 0, "use_cpu": True}
    local = predict(PredictConfig(str(weights), (str(source),), str(tmp_path / "local"), **options), silent)
    flags = ["--model_path", weights, "--input", source, "--output_dir", tmp_path / "ray", "--block_size", 25]
    flags += ["--bootstrap_replicates", 0, "--use_cpu", "--engine", "ray", "--ray_workers", 2]
    running = start(*flags)
    try:
        parts = tmp_path / "ray" / "parts"
        wait_for(lambda: len(find_workers(running.pid)) == 2, running)
        wait_for(lambda: len(list(parts.glob("*/00000-*"))) >= 5, running)
        workers = find_workers(running.pid)
        os.kill(workers[0], signal.SIGKILL)
        assert len(list(parts.glob("*/00000-*"))) < 100  # of 120: there was work left
        code, printed, said = finish(running)
    finally:
        if running.poll() is None:
            end_all(running)
    assert code == 0, said
    assert "2 workers with 1 core each" in printed
    ours, theirs = read_rows(tmp_path / "local" / "rows.jsonl"), read_rows(tmp_path / "ray" / "rows.jsonl")
    assert [row["id"] for row in theirs] == list(range(3000)) == [row["id"] for row in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
        assert (other["prompt"], other["response"], other["windows"]) == (
            one["prompt"],
            one["response"],
            one["windows"],
        )
    assert json.loads((tmp_path / "ray" / "summary.json").read_text())["rows"] == local["rows"]
    assert not parts.exists()


@pytest.mark.ray
def test_a_cluster_that_is_there_is_joined_and_its_workers_faults_are_told(runs, many_rows, tmp_path):
    port, weights, broken = find_port(), runs["full"].weights, tmp_path / "broken"
    shutil.copytree(weights, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=1",
    ]
    cluster = subprocess.Popen(
        [*command, "--include-dashboard=false", "--disable-usage-stats"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    flags = ["--block_size", 100, "--bootstrap_replicates", 0, "--use_cpu"]
    flags += ["--engine", "ray", "--ray_address", f"127.0.0.1:{port}", "--output_dir", tmp_path / "out"]
    try:
        time.sleep(5)
        code, printed, said = finish(start(*flags, "--model_path", broken, "--input", many_rows / "rows.jsonl"))
        assert code == 2, printed + said
        assert "error: " in said and "score.weight is not finite" in said
        assert "(worker on" in said and "Traceback" not in said
        rest = [
            "--model_path",
            weights,
            "--input",
            many_rows / "bad.jsonl",
            "--on_bad_row",
            "keep",
            "--overwrite",
            "True",
        ]
        code, printed, said = finish(start(*flags, *rest))
        assert code == 0, printed + said
        found = read_rows(tmp_path / "out" / "bad.jsonl")
        assert len(found) == 301 and [i for i, row in enumerate(found) if row.get("error")] == [150]
    finally:
        end_all(cluster)


class Cluster:
    """Machines as `ray.nodes()` tells of them."""

    def __init__(self, *machines):
        self.machines = machines

    def nodes(self):
        gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
        return [gone, *({"Alive": True, "Resources": resources} for resources in self.machines)]


@pytest.mark.parametrize(
    ("machines", "wanted", "use_cpu", "blocks", "plan"),
    [
        ([{"CPU": 8.0}], None, False, 99, (1, {"num_cpus": 8})),
        ([{"CPU": 8.0}, {"CPU": 4.0}], None, False, 99, (2, {"num_cpus": 4})),
        ([{"CPU": 2.0}], 2, False, 99, (2, {"num_cpus": 1})),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, False, 99, (3, {"num_cpus": 4})),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], None, False, 99, (4, {"num_gpus": 1})),
        ([{"CPU": 8.0, "GPU": 4.0}], 2, False, 99, (2, {"num_gpus": 1})),
        ([{"CPU": 8.0, "GPU": 4.0}], None, True, 99, (1, {"num_cpus": 8})),
        ([{"CPU": 8.0, "GPU": 4.0}], None, False, 1, (1, {"num_gpus": 1})),
    ],
)
def test_workers_fit_the_cluster(machines, wanted, use_cpu, blocks, plan):
    assert plan_workers(Cluster(*machines), wanted, use_cpu, blocks) == plan


@pytest.mark.parametrize("machines", [[{"CPU": 2.0}], [{"CPU": 9.0, "GPU": 2.0}]])
def test_more_workers_than_there_is_room_for_are_refused(machines):
    with pytest.raises(ConfigError, match="--ray_workers 3: the cluster has 2"):
        plan_workers(Cluster(*machines), 3, False, 99)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"engine": "ray", "shard": "1/2"}, "--shard and --engine ray both deal the blocks out"),
        ({"ray_address": "auto"}, "need --engine ray"),
        ({"ray_workers": 2}, "need --engine ray"),
    ],
)
def test_options_that_do_not_go_together(options, fault):
    assert fault in PredictConfig("m", ("i",), "o", **options).find_faults()[0]
