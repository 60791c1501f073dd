"""Bad input of every kind, one function each: it makes the damage and returns the command line that meets it.

`CASES` maps a name to (where it belongs, the function, what the one line of the answer must hold).
"""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import json
import lzma
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_moderation import rows


class Bench:
    """A folder to do damage in, and command lines that would work without it.

    Args:
        folder: empty.
        rows: labelled rows.
        llama: directory of a small backbone.
        adapters: method -> directory of trained weights.
        monkeypatch: undone behind the case.
    """

    def __init__(
        self, folder: Path, rows: list[dict], llama: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.folder, self.rows, self.llama, self.adapters = folder, rows, llama, adapters
        self.monkeypatch = monkeypatch
        self.at_end = contextlib.ExitStack()

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file into the folder."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def lines(self, change: Callable[[dict[str, Any]], Any] | None = None) -> str:
        """Return eight rows as JSON Lines, the third of them changed."""
        rows = json.loads(json.dumps(self.rows[:8]))
        if change is not None:
            change(rows[2])
        return "".join(map(self.as_line, rows))

    @staticmethod
    def as_line(row: dict[str, Any]) -> str:
        """Return a row as a line of JSON Lines."""
        return json.dumps(row) + "\n"

    def data(self, content: bytes | str | None = None, name: str = "rows.jsonl") -> Path:
        """Write rows."""
        return self.write(name, self.lines() if content is None else content)

    def train(self, data: object = None, model: object = None, **flags: object) -> list[str]:
        """Return the command line of a short run."""
        settings = {
            "model_name_or_path": model or self.llama, "train_data_name_or_path": data or self.data(), "max_steps": 1,
            "max_length": 128, "output_dir": self.folder / "out", "use_cpu": True, "eval_strategy": "no", "cache_dir": "none",
        }  # fmt: skip
        return ["train", *_flags(settings | flags)]

    def evaluate(self, model: object = None, data: object = None, **flags: object) -> list[str]:
        """Return the command line of an evaluation."""
        settings = {"model_path": model or self.adapters["lora"], "eval_dataset": data or self.data()}
        return ["evaluate", *_flags(settings | {"output_dir": self.folder / "out", "use_cpu": True} | flags)]

    def predict(self, data: object = None, **flags: object) -> list[str]:
        """Return the command line of a prediction."""
        settings = {"model_path": self.adapters.get("lora"), "input": data or self.data()}
        return ["predict", *_flags(settings | {"output_dir": self.folder / "out", "use_cpu": True} | flags)]

    def tune(self, model: object, data: object) -> list[str]:
        """Return the command line of a tuning."""
        return ["tune", *_flags({"model_path": model, "eval_dataset": data, "use_cpu": True})]

    def merge(self, adapter: Path | None = None, **flags: object) -> list[str]:
        """Return the command line of a merge."""
        settings = {
            "adapter_path": adapter or self.adapters["lora"],
            "output_dir": self.folder / "out",
            "use_cpu": True,
        }
        return ["merge", *_flags(settings | flags)]

    def config(self, text: str, **flags: object) -> list[str]:
        """Return the command line of a run with a YAML file."""
        return self.train(config=self.write("run.yaml", text), **flags)

    def backbone(self) -> Path:
        """Return a copy of the backbone to be damaged."""
        return Path(shutil.copytree(self.llama, self.folder / "backbone"))

    def model(self, method: str = "lora") -> Path:
        """Return a copy of trained weights to be damaged."""
        return Path(shutil.copytree(self.adapters[method], self.folder / "model"))


def _flags(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


class Case(NamedTuple):
    """One kind of bad input: `words` stand in the answer, where `{folder}` is the folder of the bench."""

    part: str
    damage: Callable[[Bench], list[str]]
    words: tuple[str, ...]


CASES: dict[str, Case] = {}
_part = ""


def case(*words: str) -> Callable[[Callable[[Bench], list[str]]], Callable[[Bench], list[str]]]:
    """Enter a function into the table."""

    def enter(damage: Callable[[Bench], list[str]]) -> Callable[[Bench], list[str]]:
        CASES[damage.__name__.replace("_", " ")] = Case(_part, damage, words)
        return damage

    return enter


# configuration

_part = "configuration"


@case("unknown flag --lerning_rate (did you mean learning_rate?)")
def a_misspelt_flag(bench):
    return bench.train(lerning_rate=1)


@case("{folder}/run.yaml: unknown key lora_rank (did you mean lora_r?)")
def a_misspelt_key(bench):
    return bench.config("lora_rank: 8")


@case("{folder}/run.yaml: lora_r: 'eight' is not valid, expected a whole number")
def text_for_a_number(bench):
    return bench.config("lora_r: eight")


@case("lora_r: [8] is not valid, expected a whole number")
def a_list_for_a_number(bench):
    return bench.config("lora_r: [8]")


@case("use_rslora: 'maybe' is not valid, expected True or False")
def a_word_for_a_switch(bench):
    return bench.config("use_rslora: maybe")


@case("learning_rate: nan is not valid, expected a finite number")
def a_rate_that_is_no_number(bench):
    return bench.config("learning_rate: .nan")


@case("--learning_rate: '1e999' is not valid, expected a finite number")
def an_infinite_rate(bench):
    return bench.train(learning_rate="1e999")


@case("--max_length: -5 is not valid, must be at least 16")
def a_negative_size(bench):
    return bench.train(max_length=-5)


@case("--per_device_train_batch_size: 0 is not valid, must be at least 1")
def a_size_of_zero(bench):
    return bench.train(per_device_train_batch_size=0)


@case("--lr_scheduler_type: 'cosin' is not valid, allowed: cosine, linear", "(did you mean cosine?)")
def an_unknown_schedule(bench):
    return bench.train(lr_scheduler_type="cosin")


@case("--bf16 True contradicts --dtype float32; drop one")
def two_types_at_once(bench):
    return bench.train(bf16=True, dtype="float32")


@case("--max_tokens_per_micro_batch 64: is below --max_length 128")
def a_budget_below_the_length(bench):
    return bench.train(max_tokens_per_micro_batch=64)


@case("--overwrite_output_dir would remove the checkpoint of --resume")
def a_start_over_that_goes_on(bench):
    return bench.train(overwrite_output_dir=True, resume="out/checkpoints/step-000001")


@case("--config {folder}/run.yaml: is not valid YAML (key lora_r stands twice)")
def a_key_that_stands_twice(bench):
    return bench.config("lora_r: 8\nseed: 1\nlora_r: 16")


@case("{folder}/run.yaml: evaluation_strategy means eval_strategy, which stands there already; keep one")
def a_key_under_two_names(bench):
    return bench.config("eval_strategy: no\nevaluation_strategy: epoch")


@case("--config {folder}/run.yaml: must hold `key: value` lines, found a list")
def a_configuration_that_is_a_list(bench):
    return bench.config("- lora_r: 8")


@case("--config {folder}/run.yaml: is not valid YAML", "python/object/apply:os.system")
def a_configuration_with_code_in_it(bench):
    return bench.config(f"seed: !!python/object/apply:os.system ['touch {bench.folder}/run-by-yaml']")


@case("--config {folder}/run.yaml: is not valid YAML", "'\\t'")
def a_configuration_with_tabs(bench):
    return bench.config("fsdp:\n\tfull_shard")


@case("--config {folder}/run.yaml: is not valid YAML", "utf-8")
def a_configuration_in_another_encoding(bench):
    return bench.train(config=bench.write("run.yaml", "taxonomy: Fälle.yaml".encode("latin-1")))


@case("{folder}/run.yaml: use_rslora: [[[...], ", "is not valid, expected a single value")
def a_configuration_that_unfolds_without_end(bench):
    nested = "&k0 [x]"
    for i in range(1, 12):
        nested = f"&k{i} [{nested}, {', '.join([f'*k{i - 1}'] * 8)}]"
    return bench.config(f"use_rslora: {nested}")


@case("--config {folder}: cannot be read (Is a directory); give the path of a YAML file")
def a_configuration_that_is_a_directory(bench):
    return bench.train(config=bench.folder)


@case("--config: needs a value, the path of a YAML file")
def a_flag_without_its_value(bench):
    return [*bench.train(), "--config"]


@case("--output_dir is missing: run directory")
def a_required_option_left_out(bench):
    return bench.train(output_dir=None)


@case("unexpected argument 'rows.jsonl'; every option is a flag, see --help")
def a_stray_word(bench):
    return ["train", "rows.jsonl", *bench.train()[1:]]


@case("{folder}/harms.yaml: taxonomy: categories repeat violence; each name may stand once")
def a_taxonomy_with_a_category_twice(bench):
    return bench.train(taxonomy=bench.write("harms.yaml", "categories: [violence, violence]"))


@case("--metric_for_best_model micro/f2: is no metric of this taxonomy (did you mean micro/f1?)")
def an_unknown_metric(bench):
    return bench.train(metric_for_best_model="micro/f2")


@case("--shard 9/8: there are only shards 1/8 to 8/8")
def a_shard_beyond_the_last(bench):
    return bench.predict(shard="9/8")


@case("--seed: 9223372036854775808 is not valid, must be at most 9223372036854775807")
def a_number_beyond_64_bits(bench):
    return bench.train(seed=2**63)


# data

_part = "data"


@case("{folder}/rows.jsonl: holds no usable row")
def an_empty_file(bench):
    return bench.train(bench.data(""))


@case("{folder}/rows.csv: holds no usable row")
def a_table_with_a_header_alone(bench):
    return bench.train(bench.data("prompt,response,is_safe\r\n", "rows.csv"))


@case("{folder}/rows.jsonl, line 8: is not valid JSON (", "mend it, or leave such rows out with --on_bad_row skip")
def a_last_line_cut_off(bench):
    return bench.train(bench.data(bench.lines()[:-40]))


@case("{folder}/rows.jsonl, line 1: is not valid UTF-8 at byte 0 of the line")
def a_file_in_utf_16(bench):
    return bench.train(bench.data(bench.lines().encode("utf-16")))


@case("{folder}/rows.jsonl, line 3: is not valid UTF-8 at byte 5 of the line")
def bytes_that_are_no_text(bench):
    lines = bench.lines().encode().split(b"\n")
    lines[2] = lines[2][:5] + b"\xff" + lines[2][6:]
    return bench.train(bench.data(b"\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: is not valid JSON (")
def zero_bytes_between_the_fields(bench):
    lines = bench.lines().encode().split(b"\n")
    lines[2] = lines[2].replace(b", ", b",\0", 1)
    return bench.train(bench.data(b"\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: prompt holds a lone surrogate, which is no character")
def half_a_character(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(prompt="\ud83d"))))


@case("{folder}/rows.jsonl, line 3: is not valid JSON (")
def a_line_of_50_megabytes_that_is_no_row(bench):
    lines = bench.lines().encode().split(b"\n")
    lines[2] = b"x" * 50_000_000
    return bench.train(bench.data(b"\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: is_safe is 'yyyyy", "yyy', not true or false")
def a_cell_of_50_megabytes(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(is_safe="y" * 50_000_000))))


@case("{folder}/rows.jsonl, line 3: is not valid JSON (nested too deeply)")
def a_row_nested_without_end(bench):
    lines = bench.lines().split("\n")
    lines[2] = "[" * 200_000
    return bench.train(bench.data("\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: prompt is int, not text")
def a_number_for_a_text(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(prompt=7))))


@case("{folder}/rows.jsonl, line 3: response is empty (null), not text")
def nothing_for_a_text(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(response=None))))


@case("{folder}/rows.jsonl, line 3: is a list, not an object with columns")
def a_list_for_a_row(bench):
    lines = bench.lines().split("\n")
    lines[2] = "[1, 2]"
    return bench.train(bench.data("\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: column response is missing; found prompt")
def a_column_left_out(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.pop("response"))))


@case("{folder}/rows.jsonl, line 3: category missing privacy_violation; name the row's categories with --taxonomy")
def a_category_left_out(bench):
    return bench.train(bench.data(bench.lines(lambda row: row["category"].pop("privacy_violation"))))


@case("{folder}/rows.jsonl, line 3: category unknown rudeness; name the row's categories with --taxonomy")
def a_category_too_many(bench):
    return bench.train(bench.data(bench.lines(lambda row: row["category"].update(rudeness=False))))


@case("{folder}/rows.jsonl, line 3: is_safe is 'False', not true or false")
def a_word_for_a_label(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(is_safe="False"))))


@case("{folder}/rows.jsonl, line 3: category privacy_violation is nan, not true or false")
def a_label_that_is_no_number(bench):
    return bench.train(bench.data(bench.lines(lambda row: row["category"].update(privacy_violation=float("nan")))))


@case("{folder}/rows.jsonl, line 3: is_safe is ", ", but the categories ticked are: ")
def a_flag_that_its_categories_contradict(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(is_safe=not row["is_safe"]))))


@case("{folder}/rows.csv, line 2: column prompt is missing; found question, answer, is_safe")
def a_table_with_other_columns(bench):
    return bench.train(bench.data('question,answer,is_safe\r\n"a\nb",c,true\r\n', "rows.csv"))


@case("{folder}/rows.csv, line 4: has another number of columns than the header (prompt, response): 1")
def a_row_too_short_behind_quoted_line_ends(bench):
    return bench.predict(bench.data('prompt,response\r\n"a\nb",c\r\nd\r\n', "rows.csv"))


@case("{folder}/rows.csv, line 2: is not valid CSV (")
def a_quote_that_never_ends(bench):
    return bench.train(bench.data('prompt,response,is_safe\r\n"a,b,true\r\n' * 2, "rows.csv"))


@case("{folder}/rows.parquet, row 1: column prompt is missing; found text, label")
def a_parquet_file_of_another_schema(bench):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), bench.folder / "rows.parquet")
    return bench.train(bench.folder / "rows.parquet")


@case("{folder}/rows.parquet: is not readable as Parquet (")
def a_parquet_file_cut_off(bench):
    pq.write_table(pa.Table.from_pylist(bench.rows[:8]), bench.folder / "rows.parquet")
    return bench.train(bench.data((bench.folder / "rows.parquet").read_bytes()[:-100], "rows.parquet"))


@case("{folder}/rows.jsonl.gz: is packed with gzip; unpack it, and give the path of what comes out")
def a_packed_file(bench):
    return bench.train(bench.data(gzip.compress(bench.lines().encode()), "rows.jsonl.gz"))


@case("{folder}/rows.jsonl: is packed with gzip")
def a_packed_file_under_another_name(bench):
    return bench.train(bench.data(gzip.compress(bench.lines().encode())))


@case("{folder}/rows.csv: is packed with xz")
def an_xz_file_under_another_name(bench):
    return bench.predict(bench.data(lzma.compress(b"prompt,response\r\na,b\r\n"), "rows.csv"))


@case("{folder}/rows.json: is packed with bzip2")
def a_bzip2_file_under_another_name(bench):
    return bench.evaluate(data=bench.data(bz2.compress(bench.lines().encode()), "rows.json"))


@case("{folder}/rows.jsonl: is a directory; give the path of a file")
def a_directory_for_a_file(bench):
    (bench.folder / "rows.jsonl").mkdir()
    return bench.train(bench.folder / "rows.jsonl")


@case("{folder}/rows.jsonl: cannot be read (")
def a_file_that_cannot_be_read(bench):
    (bench.folder / "rows.jsonl").symlink_to("/proc/self/mem")  # opens, even for root, and fails at the first byte
    return bench.train(bench.folder / "rows.jsonl")


@case("{folder}/rows.jsonl: no such file; give the path of a file")
def a_link_to_nowhere(bench):
    (bench.folder / "rows.jsonl").symlink_to("gone.jsonl")
    return bench.train(bench.folder / "rows.jsonl")


@case("{folder}/rows.jsonl: changed while it was read; give the same command again when it is written")
def a_file_that_changes_while_it_is_read(bench):
    path = bench.data()
    _touch_while_reading(bench, path)
    return bench.train(path)


def _touch_while_reading(bench: Bench, path: Path) -> None:
    def read(path: Path) -> Iterator[Any]:
        yield from whole(path)
        os.utime(path, (0, 0))

    whole = rows._read_jsonl
    bench.monkeypatch.setattr(rows, "_read_jsonl", read)


@case("someone/rows:train: cannot be loaded from the hub (", "check name, split and network, or download the file")
def a_hub_set_without_a_network(bench):
    return bench.train("someone/rows:train")


@case("someone/rows: is neither a file ending in .json, .jsonl, .csv, .parquet nor `hub/name:split[@revision]`")
def a_hub_set_without_a_split(bench):
    return bench.train("someone/rows")


@case("{folder}/rows.txt: is neither a file ending in")
def a_file_of_another_format(bench):
    return bench.train(bench.data("a\n", "rows.txt"))


@case("holding out 5% of 1 prompts leaves no training or no validation pair")
def a_single_row(bench):
    return bench.train(bench.data(json.dumps(bench.rows[0]) + "\n"), eval_strategy="epoch")


@case("{folder}/rows.jsonl: holds moderators' verdicts only; labelled rows have the columns category and is_safe")
def verdicts_for_labels(bench):
    return bench.train(bench.data('{"prompt": "a", "response": "b", "flagged": {"m": true}}\n'))


@case("{folder}/rows.jsonl: has a column risk already, which would be overwritten; name the new columns otherwise")
def rows_that_were_scored_before(bench):
    return bench.predict(bench.data('{"prompt": "a", "response": "b", "risk": 0.5}\n'))


@case("--input {folder}/nothing: holds no file ending in .json, .jsonl, .csv, .parquet")
def a_directory_without_rows(bench):
    (bench.folder / "nothing").mkdir()
    return bench.predict(bench.folder / "nothing")


@case("--output_dir {folder}/out: lies inside --input {folder}, and would be read the next time")
def an_output_among_the_inputs(bench):
    bench.data()
    return bench.predict(bench.folder)


# models

_part = "models"


@case("{folder}/nowhere: is no readable model directory or hub name (")
def a_backbone_that_is_not_there(bench):
    return bench.train(model=bench.folder / "nowhere")


@case("{folder}/backbone: holds no readable tokenizer (")
def a_backbone_without_a_tokenizer(bench):
    path = bench.backbone()
    for file in path.glob("tokenizer*"):
        file.unlink()
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_backbone_without_weights(bench):
    path = bench.backbone()
    (path / "model.safetensors").unlink()
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_backbone_cut_off(bench):
    path = bench.backbone()
    bench.write("backbone/model.safetensors", (path / "model.safetensors").read_bytes()[:-1000])
    return bench.train(model=path)


def _shards(bench: Bench) -> Path:
    path = bench.backbone()
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    bench.write("backbone/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": files}))
    return path


@case("{folder}/backbone: its weights cannot be loaded (", "model-00002-of-00002.safetensors")
def a_shard_that_is_missing(bench):
    path = _shards(bench)
    (path / "model-00002-of-00002.safetensors").unlink()
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_shard_cut_off(bench):
    path = _shards(bench)
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    return bench.train(model=path)


@case("{folder}/backbone: 1 weights are missing, the first is model.norm.weight")
def a_weight_that_is_missing(bench):
    path = bench.backbone()
    state = load_file(path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return bench.train(model=path)


def _poison(bench: Bench, value: float) -> Path:
    path = bench.backbone()
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@case("{folder}/backbone: weight model.layers.1.mlp.up_proj.weight is not finite; download the checkpoint again")
def a_weight_that_is_no_number(bench):
    return bench.train(model=_poison(bench, float("nan")))


@case("{folder}/backbone: weight model.layers.1.mlp.up_proj.weight is not finite; download the checkpoint again")
def an_infinite_weight_under_nf4(bench):
    return bench.train(model=_poison(bench, float("inf")), method="qlora")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@case("{folder}/backbone: its weights cannot be loaded (")
def a_pickle_with_code_in_it(bench):
    path = bench.backbone()
    (path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Touch(bench.folder / "run-by-pickle")}, path / "pytorch_model.bin")
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_bare_pickle_with_code_in_it(bench):
    path = bench.backbone()
    (path / "model.safetensors").unlink()
    bench.write("backbone/pytorch_model.bin", pickle.dumps(_Touch(bench.folder / "run-by-pickle")))
    return bench.train(model=path)


@case("{folder}/backbone: needs code of its own, which is never run here")
def a_backbone_with_code_of_its_own(bench):
    path = bench.backbone()
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    bench.write("backbone/config.json", json.dumps(config))
    bench.write("backbone/odd.py", f"open({str(bench.folder / 'run-by-model')!r}, 'w')\n")
    return bench.train(model=path)


@case("{folder}/backbone: its config.json cannot be used (")
def a_backbone_whose_numbers_contradict(bench):
    path = bench.backbone()
    config = json.loads((path / "config.json").read_text()) | {"num_attention_heads": 0}
    bench.write("backbone/config.json", json.dumps(config))
    return bench.train(model=path)


@case("{folder}/model: is an adapter, not a backbone; merge it first (scripts/merge_adapter.py)")
def an_adapter_for_a_backbone(bench):
    return bench.train(model=bench.model())


@case("reads at most 2048 tokens; lower --max_length 4096")
def a_length_beyond_the_positions(bench):
    return bench.train(max_length=4096)


@case("{folder}/nowhere: no such directory; give an adapter, full or merged model directory")
def a_model_that_is_not_there(bench):
    return bench.evaluate(bench.folder / "nowhere")


@case("its config.json has 3 labels, its taxonomy 14")
def labels_that_do_not_match_the_taxonomy(bench):
    path = bench.model("full")
    config = json.loads((path / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    config["label2id"] = {"a": 0, "b": 1, "c": 2}
    bench.write("model/config.json", json.dumps(config))
    return bench.evaluate(path)


def _point_to(bench: Bench, base: Path) -> Path:
    path = bench.model()
    settings = json.loads((path / "adapter_config.json").read_text())
    bench.write("model/adapter_config.json", json.dumps(settings | {"base_model_name_or_path": str(base)}))
    return path


@case("{folder}/model: its base model {folder}/gone is gone; name where it lies now")
def a_base_that_is_gone(bench):
    return bench.merge(_point_to(bench, bench.folder / "gone"))


@case("{folder}/model: ", "size mismatch")
def an_adapter_of_another_base(bench):
    from conftest import silent

    from qlora_moderation.embedded import build_llama_shape

    texts = [row["prompt"] + row["response"] for row in bench.rows]
    other = bench.folder / "other"
    build_llama_shape(other, texts, hidden_size=128, num_layers=2, vocab_size=600, steps=0, log=silent)
    return bench.evaluate(_point_to(bench, other))


@case("{folder}/model/adapter_config.json: names no base model; copy the adapter again")
def an_adapter_without_its_settings(bench):
    path = bench.model()
    bench.write("model/adapter_config.json", "{}")
    return bench.merge(path)


@case("{folder}/model/adapter_model.safetensors: cannot be read (", "copy the adapter again")
def an_adapter_cut_off(bench):
    path = bench.model()
    bench.write("model/adapter_model.safetensors", (path / "adapter_model.safetensors").read_bytes()[:-500])
    return bench.evaluate(path)


@case("{folder}/model/adapter_model.safetensors: ", "lora_B.weight is not finite; take an earlier adapter")
def an_adapter_that_is_no_number(bench):
    path = bench.model()
    state = load_file(path / "adapter_model.safetensors")
    state[next(name for name in state if "lora_B" in name)][0, 0] = float("nan")
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return bench.evaluate(path)


@case("--dtype float16: cannot hold ", "use bfloat16 or float32")
def weights_beyond_float16(bench):
    path = bench.model()
    state = load_file(path / "adapter_model.safetensors")
    state = {name: torch.full_like(value, 1e6) if "lora_B" in name else value for name, value in state.items()}
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return bench.merge(path, dtype="float16")


@case("{folder}/model/thresholds.json: ")
def thresholds_cut_off(bench):
    path = bench.model()
    bench.write("model/thresholds.json", (path / "thresholds.json").read_bytes()[:-20])
    return bench.evaluate(path)


@case("{folder}/model/moderation_config.json: ")
def a_meaning_cut_off(bench):
    path = bench.model()
    bench.write("model/moderation_config.json", (path / "moderation_config.json").read_bytes()[:-20])
    return bench.evaluate(path)


@case("--base dequantized: this adapter was trained on plain weights; use --base original")
def a_merge_into_weights_that_never_were(bench):
    return bench.merge(base="dequantized")


# run directories

_part = "run directories"


@case("--output_dir {folder}/out: is no run directory and not empty; give another directory")
def a_run_directory_that_holds_other_things(bench):
    (bench.folder / "out").mkdir()
    bench.write("out/thesis.txt", "years of work")
    return bench.train()


@case("--output_dir {folder}/out: ", "give another directory")
def a_run_directory_that_is_a_file(bench):
    bench.write("out", "")
    return bench.train()


@case("--output_dir /proc/run: cannot be ")
def a_run_directory_on_a_disk_that_takes_no_files(bench):
    return bench.train(output_dir="/proc/run")


@case("--output_dir {folder}/out: cannot be written (no permission in {folder})")
def a_run_directory_without_permission(bench):
    bench.monkeypatch.setattr("qlora_moderation.start.os.access", lambda place, mode: False)  # root may write anywhere
    return bench.train()


@case("--output_dir {folder}/out: cannot be written (", "make room, and give the same command again")
def a_run_directory_on_a_full_disk(bench):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    bench.monkeypatch.setattr("qlora_moderation.run_directory.write_text", full)
    return bench.train()


def _hold(bench: Bench, lock: Path) -> None:
    lock.parent.mkdir(parents=True)
    fcntl.flock(bench.at_end.enter_context(lock.open("w")), fcntl.LOCK_EX)


@case("--output_dir {folder}/out: another run is writing here; give another directory")
def a_run_directory_that_a_live_run_holds(bench):
    _hold(bench, bench.folder / "out" / ".lock")
    return bench.train()


@case("--output_dir {folder}/out: another run is writing here; give another directory")
def an_output_that_a_live_prediction_holds(bench):
    _hold(bench, bench.folder / "out" / "parts" / ".writer-1-of-1")
    return bench.predict()


@case("--resume {folder}/out/checkpoints/step-000007: is neither auto nor never nor a directory under checkpoints/")
def a_checkpoint_that_is_not_there(bench):
    return bench.train(resume=bench.folder / "out" / "checkpoints" / "step-000007")


@case("--output_dir {folder}/out: exists; give another directory, or --overwrite")
def a_merge_over_something(bench):
    (bench.folder / "out").mkdir()
    return bench.merge()


@case("--output_dir {folder}/out: holds other files than an evaluation's; give another directory")
def an_evaluation_over_something(bench):
    (bench.folder / "out").mkdir()
    bench.write("out/thesis.txt", "years of work")
    return bench.evaluate()


# devices

_part = "devices"


@case("--dtype bfloat16: this cpu device has no bfloat16 units; use --dtype float32")
def a_type_that_the_device_lacks(bench):
    bench.monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return bench.train(dtype="bfloat16")


@case("processes on a machine with 2 GPUs; lower --nproc_per_node, or stay on the CPU with --use_cpu True")
def more_processes_than_gpus(bench):
    bench.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench.monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bench.monkeypatch.setenv("LOCAL_RANK", "2")
    return bench.train(use_cpu=False)


@case("WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun or scripts/launch.sh")
def processes_that_cannot_meet(bench):
    bench.monkeypatch.setenv("WORLD_SIZE", "2")
    return bench.train()


@case("merge runs in one process; start it without torchrun")
def several_processes_for_one_job(bench):
    bench.monkeypatch.setenv("WORLD_SIZE", "2")
    return bench.merge()
