"""One command: its words, completion in a real shell, and what it says of the machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_moderation import environment
from qlora_moderation.cli import _JOBS, main
from qlora_moderation.completion import SHELLS
from qlora_moderation.prediction_config import CombineConfig

ROOT = Path(__file__).resolve().parent.parent
BASH = """
source "$1"
name=$(complete -p qlora-moderation | sed 's/.*-F \\([^ ]*\\).*/\\1/')
while IFS= read -r line; do
    read -r -a COMP_WORDS <<<"$line"
    [[ "$line" == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    "$name" qlora-moderation "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[*]}"
done
"""


def print_script(shell, capsys):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def complete_in_bash(script, lines, folder):
    """Return what bash offers behind each line."""
    (folder / "script.bash").write_text(script)
    command = ["bash", "--norc", "-c", BASH, "bash", str(folder / "script.bash")]
    done = subprocess.run(
        command, cwd=folder, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_bash_really_completes_jobs_flags_words_and_places(tmp_path, capsys):
    script = print_script("bash", capsys)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "runs").mkdir()
    expected = {
        "qlora-moderation ": {*_JOBS, "completion"},
        "qlora-moderation mer": {"merge"},
        "qlora-moderation train --lora_": {"--lora_r", "--lora_alpha", "--lora_dropout"},
        "qlora-moderation train --method ": {"lora", "qlora", "full"},
        "qlora-moderation train --method qlora --use_dora ": {"True", "False"},
        "qlora-moderation train --gradient_checkpointing s": {"selective"},
        "qlora-moderation plan --methods lora q": {"qlora"},
        "qlora-moderation merge --output_dir r": {"runs"},
        "qlora-moderation audit --train_data_name_or_path r": {"rows.jsonl", "runs"},
        "qlora-moderation completion ": set(SHELLS),
    }
    offered = dict(zip(expected, complete_in_bash(script, expected, tmp_path), strict=True))
    assert offered == expected


def test_every_flag_of_every_job_is_offered(tmp_path, capsys):
    script = print_script("bash", capsys)
    lines = [f"qlora-moderation {job} --" for job in _JOBS]
    for job, offered in zip(_JOBS, complete_in_bash(script, lines, tmp_path), strict=True):
        assert offered == {"--help", "--config"} | {
            f"--{name}"
            for field in dataclasses.fields(_JOBS[job][0])
            for name in (field.name, *field.metadata.get("aliases", ()))
        }


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_each_shell_names_the_jobs_and_no_inner_mark(shell, tmp_path, capsys):
    script = print_script(shell, capsys)
    assert all(job in script for job in _JOBS) and "bare" not in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["complete"], "unknown job complete (did you mean completion?); the jobs are train, "),
        (["--vresion"], "unknown flag --vresion (did you mean --version?)"),
        (["completion", "bsh"], "completion bsh (did you mean bash?): the shells are bash, zsh, fish, tcsh"),
    ],
)
def test_misspelt_words_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and not said.out


def test_help_names_every_word(capsys):
    assert main(["--help"]) == main(["help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {word} " in said for word in (*_JOBS, "completion", "--version"))
    assert main([]) == 2 and main(["completion"]) == 2 and main(["completion", "--help"]) == 0


def run_command(*arguments, **more):
    program = (
        "import sys\nfrom qlora_moderation.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    return subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, text=True, timeout=60, **more)


def test_versions_are_found_without_importing_what_they_are_of():
    done = run_command("--version", capture_output=True)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("qlora-moderation ")
    facts = {line.split("  ")[0]: line for line in lines}
    assert {"python", "system", "processor", "torch", "transformers", "peft", "tokenizers", "numpy"} <= facts.keys()
    assert {"CUDA of torch", "GPU"} <= facts.keys() and "cores" in facts["processor"]
    assert str(Path.home()) not in done.stdout and sys.prefix not in done.stdout


def test_a_reader_that_leaves_early_is_no_fault():
    read, write = os.pipe()
    os.close(read)
    done = run_command("--help", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_early_is_told_where_nothing_is_buffered():
    """As in a container with PYTHONUNBUFFERED: what the error was raised for is gone, and no flush says it again."""
    program = (
        "import sys\nfrom qlora_moderation import cli\n"
        "cli._JOBS['plan'] = (cli._JOBS['plan'][0], lambda _: print('a line'), '')\n"
        "sys.exit(cli.run_job('plan', []))\n"
    )
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
    )
    os.close(write)
    assert done.returncode == 141 and done.stderr == "stopped: nobody reads the output any more\n"


class Unread:
    """A standard output that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def raise_it(error):
    raise error


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (
            lambda _: print("a line"),
            141,
            "stopped: nobody reads the output any more; nothing is lost, give the same comm",
        ),
        (
            lambda _: sys.stdout.flush(),
            141,
            "stopped: nobody reads the output any more; nothing is lost, give the same",
        ),
        (lambda _: raise_it(ModuleNotFoundError(name="torch.nn")), 2, "error: torch is not installed in "),
    ],
)
def test_what_ends_a_job_from_outside_is_said_in_one_line(run, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(_JOBS, "combine", (CombineConfig, run, ""))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Unread())
        assert main(["combine", "--output_dir", str(tmp_path)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_a_job_needs_no_standard_output(tmp_path, monkeypatch):
    monkeypatch.setitem(_JOBS, "combine", (CombineConfig, lambda _: print("a line"), ""))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # as Python has it where descriptor 1 is closed
        assert main(["combine", "--output_dir", str(tmp_path)]) == 0


@pytest.mark.parametrize("error", [ModuleNotFoundError(name="qlora_moderation.gone"), BrokenPipeError("a connection")])
def test_what_is_wrong_inside_keeps_its_traceback(error, tmp_path, monkeypatch):
    monkeypatch.setitem(_JOBS, "combine", (CombineConfig, lambda _: raise_it(error), ""))
    with pytest.raises(type(error)):
        main(["combine", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'H, 81559 MiB, 580.1, 9.0'; echo 'H, 81559 MiB, 580.1, 9.0'",
            "2 x H, 81559 MiB, 580.1, 9.0 (memory, driver",
        ),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "nvidia-smi ended with 9: NVIDIA-SMI has failed"),
        ("exec sleep 20", "nvidia-smi does not answer (TimeoutExpired)"),
    ],
)
def test_the_driver_is_asked_and_need_not_answer(script, said, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(environment, "_DRIVER_SECONDS", 0.2)
    assert any(line.startswith("GPU") and said in line for line in environment.describe_versions())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "12.8"),
        ("cuda = None\nhip: Optional[str] = '6.4'\n", "none (ROCm 6.4)"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "none (a build for the CPU)"),
    ],
)
def test_the_build_of_torch_is_read_from_its_file(text, found, tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(text)
    spec = environment.importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: spec)
    assert environment._find_torch_build() == found
