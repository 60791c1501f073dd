"""The real command lines: torchrun around scripts/train.py, and the Slurm example with a stand-in for Slurm."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import find_port

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "VENV": sys.prefix,
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# Verbatim but for paths and `--nproc_per_node`; `--max_steps` keeps it short.
ORIGINAL_RECIPE = """--num_train_epochs 3 --per_device_train_batch_size 16 --per_device_eval_batch_size 16
    --gradient_accumulation_steps 1 --evaluation_strategy steps --eval_steps 2 --save_strategy epoch --save_total_limit 2
    --learning_rate 2e-5 --weight_decay 0.1 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1
    --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --gradient_checkpointing --bf16 True
    --tf32 True --method full --max_steps 3"""

FAILING = """
import os, sys
sys.path.insert(0, {root!r})
from qlora_moderation.cli import run_job
from qlora_moderation.loop import Loop

whole_step = Loop.take_step

def take_step(self, step):
    if step == 3 and os.environ["RANK"] == "1":
        raise ValueError("rank 1 has lost its mind")
    return whole_step(self, step)

Loop.take_step = take_step
sys.exit(run_job("train"))
"""

SRUN = """#!/usr/bin/env bash
shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
if [ -n "${STOP_AFTER:-}" ]; then
    until [ "$(wc -l <"$STOP_AFTER" 2>/dev/null || echo 0)" -ge 3 ]; do sleep 0.05; done
    kill -TERM "${tasks[@]}"
fi
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SQUEUE = """#!/usr/bin/env bash
echo "${STATE:-RUNNING}"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>"$REQUEUED"; fi
"""


def flags(backbone: Path, data: Path, output: Path) -> list[str]:
    return ["--model_name_or_path", str(backbone), "--train_data_name_or_path", str(data), "--output_dir", str(output)]


def execute(
    command: list[str], environment: dict[str, str] = ENVIRONMENT, timeout: int = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; `timeout` seconds is where it counts as hanging."""
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_the_original_recipe_trains_under_torchrun(llama, rows_file, tmp_path):
    command = [*TORCHRUN, "scripts/train.py", *flags(llama, rows_file, tmp_path / "run"), *shlex.split(ORIGINAL_RECIPE)]
    done = execute([*command, "--eval_data_name_or_path", str(rows_file), "--use_cpu", "True"])
    assert done.returncode == 0, done.stderr
    assert "sharding fsdp: asked for" in done.stdout and "x 2 processes" in done.stdout
    assert done.stdout.count("step 3/3") == 1, "rank 0 alone speaks"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_failing_rank_ends_the_run_with_its_error(llama, rows_file, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)))
    command = [*TORCHRUN, str(script), *flags(llama, rows_file, tmp_path / "run"), "--use_cpu", "--sharding", "fsdp"]
    done = execute(command, timeout=60)
    assert done.returncode != 0
    assert "[rank 1] ValueError: rank 1 has lost its mind" in done.stderr
    of_rank_0 = [line for line in done.stderr.splitlines() if line.startswith("[rank 0]")]
    assert len(of_rank_0) == 1 and of_rank_0[0].startswith("[rank 0] lost contact"), "\n".join(of_rank_0)


def test_a_configuration_error_is_said_once(llama, rows_file, tmp_path):
    command = [*TORCHRUN, "scripts/train.py", *flags(llama, rows_file, tmp_path / "run")]
    for more, words in (
        (["--sharding", "none", "--use_cpu"], "error: --sharding none means one process, and there are 2"),
        (["--fsdp", "full_shar"], "error: --fsdp full_shar: full_shar is unknown (did you mean full_shard?)"),
    ):
        done = subprocess.run(
            [*command, *more], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stderr.count(words) == 1, done.stderr
        assert not (tmp_path / "run").exists()


def test_the_slurm_example_stops_early_and_goes_on(llama, rows_file, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    environment = ENVIRONMENT | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MASTER_PORT": str(find_port()),
        "REQUEUED": str(requeued),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = ["bash", str(ROOT / "scripts" / "slurm_train.sh"), *flags(llama, rows_file, run), "--use_cpu"]
    command += ["--max_steps", "200", "--eval_strategy", "no", "--logging_steps", "100"]
    stopped = subprocess.run(
        command,
        env=environment | {"STOP_AFTER": str(run / "metrics.jsonl")},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert stopped.returncode == 143, stopped.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted, resumable"
    assert requeued.read_text() == "requeue 7\n"
    done = execute(command, environment)
    assert done.returncode == 0, done.stderr
    assert "going on from step-" in done.stdout and json.loads((run / "status.json").read_text())["state"] == "finished"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PROCESSES": "2"}, "--standalone --nproc_per_node 2 {root}/scripts/train.py --method lora; threads 4"),
        ({"PROCESSES": "999"}, "--nproc_per_node 999 {root}/scripts/train.py --method lora; threads 1"),
        ({"PROCESSES": "2", "OMP_NUM_THREADS": "7"}, "--method lora; threads 7"),
        ({}, "--nproc_per_node 3 {root}/scripts/train.py --method lora; threads 2"),
        ({"NODES": "2", "RENDEZVOUS": "a:1"}, "--nnodes 2 --rdzv_backend c10d"),
    ],
    ids=str,
)
def test_the_launcher_starts_as_many_processes_as_asked_for_and_shares_the_cores(variables, said, tmp_path):
    done = launch(tmp_path, variables)
    assert done.returncode == 0 and said.format(root=ROOT) in done.stdout, done


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PROCESSES": "0"}, "error: PROCESSES=0: give a whole number above 0"),
        ({"PROCESSES": "all"}, "error: PROCESSES=all: give"),
        ({"NODES": "two"}, "error: NODES=two: give"),
        ({"NODES": "2"}, "give the first machine as RENDEZVOUS=host:port"),
    ],
    ids=str,
)
def test_the_launcher_refuses_numbers_that_are_none(variables, said, tmp_path):
    done = launch(tmp_path, variables)
    assert done.returncode != 0 and said in done.stderr and done.stdout == "", done


def launch(place: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the launcher in an environment whose torchrun tells what it is asked for, with 8 cores and 3 GPUs."""
    (place / "bin").mkdir()
    for name, line in (("torchrun", 'echo "$@; threads $OMP_NUM_THREADS"'), ("python", "echo 3"), ("nproc", "echo 8")):
        (place / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (place / "bin" / name).chmod(0o755)
    installed = f"cat {ROOT}/pyproject.toml {ROOT}/scripts/constraints.txt | cksum >{place}/installed"
    subprocess.run(installed, shell=True, check=True)
    environment = {"PATH": os.environ["PATH"], "VENV": str(place), **variables}
    command = [str(ROOT / "scripts" / "launch.sh"), "--method", "lora"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
