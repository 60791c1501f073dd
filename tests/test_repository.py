"""What the repository promises about itself: recipes load, README commands parse, imports stay light."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_moderation.cli import _JOBS
from qlora_moderation.config import TrainConfig
from qlora_moderation.errors import ConfigError
from qlora_moderation.options import build_parser, load_options

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "train.py": "train",
    "plan.py": "plan",
    "evaluate.py": "evaluate",
    "merge_adapter.py": "merge",
    "tune.py": "tune",
    "predict.py": "predict",
    "combine.py": "combine",
    "build_backbone.py": "backbone",
    "quickstart.py": "quickstart",
    "quickstart.sh": "quickstart",
}
NEEDED = ["--model_name_or_path", "m", "--train_data_name_or_path", "d", "--output_dir", "o"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load_and_refuse_a_misspelt_key(path, tmp_path):
    parser = build_parser(TrainConfig, "")
    load_options(TrainConfig, parser, ["--config", str(path), *NEEDED])
    text = path.read_text()
    assert (text.startswith("# ") and "Hardware:" in text and ".py" in text) or ".sh" in text
    key = next(iter(yaml.safe_load(text)))
    (tmp_path / "typo.yaml").write_text(text.replace(f"{key}:", f"{key}x:", 1))
    with pytest.raises(ConfigError, match=f"unknown key {key}x .did you mean {key}"):
        load_options(TrainConfig, parser, ["--config", str(tmp_path / "typo.yaml"), *NEEDED])


def test_a_script_beside_a_clone_called_like_the_package_finds_it(tmp_path):
    (tmp_path / "qlora_moderation").symlink_to(ROOT)
    program = [sys.executable, "-c", "from qlora_moderation import QAModeration, __file__ as place; print(place)"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(program, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("__init__.py")


def readme_lines() -> list[str]:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def readme_commands() -> list[str]:
    return [line for line in readme_lines() if re.search(r"scripts/\w+\.(py|sh)", line)]


def test_every_link_inside_the_readme_leads_to_a_section():
    text = (ROOT / "README.md").read_text()
    sections = re.findall(r"^##+ (.+)$", text, flags=re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", section).lower().replace(" ", "-") for section in sections}
    links = re.findall(r"\]\(#(.+?)\)", text)
    assert len(links) > 20 and set(links) <= places


def test_every_command_of_the_readme_parses():
    commands = readme_commands()
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command, comments=True)
        index = next(i for i, word in enumerate(words) if re.search(r"scripts/\w+\.(py|sh)$", word))
        script = Path(words[index])
        assert (ROOT / "scripts" / script.name).is_file(), command
        if script.name in SCRIPTS:
            config_class = _JOBS[SCRIPTS[script.name]][0]
            arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in words[index + 1 :]]
            load_options(config_class, build_parser(config_class, ""), arguments)


def test_every_job_that_the_readme_starts_parses():
    commands = [shlex.split(line, comments=True) for line in readme_lines() if line.startswith("qlora-moderation ")]
    assert any(words[1] == "audit" for words in commands)
    for words in commands:
        if words[1] not in ("--help", "--version", "completion"):
            config_class = _JOBS[words[1]][0]
            try:
                load_options(config_class, build_parser(config_class, ""), words[2:])
            except ConfigError as error:  # a place that a quick start has yet to make
                assert re.fullmatch(r"--\w+ [^\n]*: no such directory[^\n]*", str(error)), words


def test_scripts_are_thin_and_help_is_light():
    for name in (
        "train.py",
        "plan.py",
        "evaluate.py",
        "merge_adapter.py",
        "tune.py",
        "predict.py",
        "combine.py",
        "build_backbone.py",
        "quickstart.py",
    ):
        assert len((ROOT / "scripts" / name).read_text().splitlines()) <= 12
    code = (
        "import sys\nfrom qlora_moderation.cli import run_job\n"
        "try:\n    run_job('train', ['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "--learning_rate" in finished.stdout


def test_the_top_level_holds_what_it_should():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    folders = {"qlora_moderation", "scripts", "configs", "tests"}
    files = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    top = {name.partition("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} <= folders | files


def test_nothing_of_a_machine_is_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked or [str(path.relative_to(ROOT)) for path in (ROOT / "qlora_moderation").glob("*.py")]:
        path = ROOT / name
        if path.is_file():
            text = path.read_bytes()
            assert not re.search(rb"(^|[^A-Za-z0-9_.])/(home|root|Users)/[a-z]", text), name
            assert len(text) < 400_000, name
