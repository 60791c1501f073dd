"""What the security section of the README promises of the code, of files that others wrote, and of secrets and paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workbench import Bench

from qlora_moderation.cli import main

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "qlora_moderation").rglob("*.py"))
SECRETS = {
    name: f"canary-{index}-5b1e"
    for index, name in enumerate(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MODERATION_API_KEY"))
}


def find_dangers(source: str) -> list[str]:
    """Return calls that could run what a file, a model or a user says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen") or re.match(
            r"(c?[pP]ickle|dill|joblib|marshal|shelve)\.", name
        ):
            found.append(name)
        if name in ("torch.load", "np.load", "numpy.load"):
            safe = given.get("weights_only") == "True" if name == "torch.load" else given.get("allow_pickle") != "True"
            found += [] if safe else [name]
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") and given.get("Loader") != "_UniqueKeyLoader":
            found.append(name)
        asked = ("shell", "trust_remote_code") if name.startswith("subprocess.") else ("trust_remote_code",)
        found += [f"{name}({word})" for word in asked if given.get(word, "False") != "False"]
    return found


DANGEROUS = (
    "eval(text)", "exec(text)", "os.system(text)", "pickle.load(file)", "torch.load(path)", "torch.load(path, weights_only=x)",
    "np.load(path, allow_pickle=True)", "yaml.load(text, Loader=yaml.Loader)", "subprocess.run(text, shell=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
)  # fmt: skip


@pytest.mark.parametrize("line", DANGEROUS)
def test_what_is_looked_for_is_found(line):
    assert find_dangers(line)


def test_no_code_of_others_is_run():
    found = {path.name: dangers for path in SOURCES if (dangers := find_dangers(path.read_text(encoding="utf-8")))}
    assert len(SOURCES) > 100 and not found
    from qlora_moderation.strict_yaml import _UniqueKeyLoader

    assert issubclass(_UniqueKeyLoader, __import__("yaml").SafeLoader)


@pytest.fixture(scope="module")
def line(rows, llama, runs, tmp_path_factory):
    """Every job in turn, with secrets in the environment, and one that fails at the hub: folder and all that was said."""
    folder = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        bench = Bench(folder, rows[:40], llama, {}, patch)
        data = bench.data("".join(map(bench.as_line, bench.rows)))
        run = folder / "run"
        adapter = run / "adapter"
        commands = [
            bench.train(data, output_dir=run, save_strategy="steps", save_steps=1),
            bench.merge(adapter, output_dir=folder / "merged"),
            bench.evaluate(folder / "merged", data, output_dir=folder / "evaluation"),
            bench.predict(data, model_path=adapter, output_dir=folder / "scored"),
            bench.tune(folder / "merged", bench.data(name="new.jsonl")),
            bench.train("someone/rows:train", output_dir=folder / "never"),
            ["--version"],
        ]
        yield folder, commands


def test_secrets_and_paths_stay_where_they_are(line, capfd):
    folder, commands = line
    codes = [main(command) for command in commands]
    said = "".join(capfd.readouterr())
    assert codes == [0, 0, 0, 0, 2, 2, 0], said  # tune: trained on these rows; train: no hub
    written = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(written) > 35
    for secret in SECRETS.values():
        assert secret not in said
        assert not [path for path, content in written.items() if secret.encode() in content]
    # what is passed on to others says nothing of the disk that it was made on
    passed_on = {
        path: content for path, content in written.items() if path.parts[0] in ("merged", "evaluation", "scored")
    }
    passed_on |= {path: content for path, content in written.items() if path.parts[:2] == ("run", "adapter")}
    for name in ("adapter_config.json", "moderation_config.json"):  # an adapter has to find its base again
        del passed_on[Path("run/adapter") / name]
    assert not [path for path, content in passed_on.items() if str(folder.parent).encode() in content]


def test_passwords_in_addresses_are_not_repeated():
    from qlora_moderation.errors import brief

    said = brief(OSError("404 for url https://user:secret@hub.example/api/models \x1b[1mnow\x1b[0m\n  gone"))
    assert said == "404 for url https://hub.example/api/models now gone"


def test_the_terminal_is_not_steered_by_what_a_message_repeats(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text('"\\e]0;title\\a\\e[2J\\u202e": 1\n' + '? "' + "k" * 100_000 + '"\n: 1\n')
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.replace("\n", "").isprintable() and len(error) < 10_000 and r"\x1b]0;title\x07\x1b[2J\u202e" in error


def test_licences_are_known_and_permissive():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "licences.py")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "not permissive, or unknown: none" in done.stdout, done.stdout
    rows = re.findall(r"^\| ([\w.-]+) \| \S+ \| (.+) \|$", done.stdout, re.MULTILINE)
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= {name for name, _ in rows} and len(rows) > 60
