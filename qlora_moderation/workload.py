"""What a run scores: tables cut into blocks, and everything that its output depends on.

In: a configuration. Out: a `Workload` with a fingerprint; the same one on every machine that sees the same bytes. Torch is not
imported: that a run has finished, or does not fit its output directory, is said without a model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_moderation.blocks import Block, Survey, Table, check_columns, count_blocks
from qlora_moderation.errors import CheckpointError, DataError
from qlora_moderation.metadata import read_json
from qlora_moderation.options import nearest
from qlora_moderation.pair_columns import PairColumns
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.sources import stamp
from qlora_moderation.tables import find_sources, open_table

_SAMPLED_ABOVE = 2**26  # bytes of a file of weights; below, every byte counts
_SAMPLES, _SAMPLE = 256, 2**14
_MEANING = {".json", ".safetensors", ".bin", ".model", ".txt"}
_NOT_MEANING = {"merge_report.json", "thresholds.previous.json", "training_hashes.safetensors", "training_args.bin"}
_FORMAT = 1


class BlockId(NamedTuple):
    """A block: number of its table, number in the table, and rows from `low` (from 0) up to `high`."""

    table: int
    number: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Input:
    """One table that is scored.

    Attributes:
        name: of its output.
        table: the table.
        survey: of the table.
        stamp: of its file, before it was read.
    """

    name: str
    table: Table
    survey: Survey
    stamp: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Workload:
    """Everything that is to be scored.

    Attributes:
        inputs: in their order.
        facts: what the output depends on, as JSON has it: inputs, model, options.
    """

    inputs: tuple[Input, ...]
    facts: dict[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return what changes with any of the facts."""
        return fingerprint_facts(self.facts)

    @property
    def prefix(self) -> str:
        """Of the new columns."""
        return self.facts["options"]["prefix"]

    @property
    def columns(self) -> PairColumns:
        """Where the texts stand."""
        return PairColumns(self.facts["options"]["prompt_column"], self.facts["options"]["response_column"])

    def read(self, blocks: Sequence[BlockId]) -> Iterator[tuple[BlockId, Block]]:
        """Yield blocks with their rows; `blocks` are in their order.

        Raises:
            DataError: an input cannot be read, or is no longer what it was.
        """
        size, columns = self.facts["options"]["block_size"], dataclasses.astuple(self.columns)
        for number, group in itertools.groupby(blocks, key=lambda block: block.table):
            ids, each = list(group), self.inputs[number]
            found = each.table.read(each.survey, size, [block.number for block in ids], columns)
            for block_id, block in zip(ids, found, strict=True):
                if len(block.rows) != block_id.high - block_id.low:
                    raise DataError(
                        f"{each.table.source}: has changed while it was read; start over with --overwrite True"
                    )
                yield block_id, block


def fingerprint_facts(facts: dict[str, Any]) -> str:
    """Return 16 characters that change with the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def list_blocks(facts: dict[str, Any]) -> Iterator[BlockId]:
    """Yield the blocks of a run in their order."""
    size = facts["options"]["block_size"]
    for table, each in enumerate(facts["inputs"]):
        for number in range(count_blocks(each["rows"], size)):
            yield BlockId(table, number, number * size, min(each["rows"], (number + 1) * size))


def build_workload(config: PredictConfig) -> Workload:
    """Read every input once and return what is to be scored.

    Raises:
        ModerationError: an input or the model cannot be read, or columns are missing or taken.
    """
    sources = find_sources(config.input, config.output_dir)
    model = fingerprint_model(config.model_path)
    needed = [("prompt_column", config.prompt_column), ("response_column", config.response_column)]
    inputs, described = [], []
    for name, source in sources.items():
        before, table = stamp(Path(source.name)) if source.split is None else None, open_table(source, config.prefix)
        survey = table.survey(config.block_size)
        check_columns(str(source), survey, needed, config.prefix)
        inputs.append(Input(name, table, survey, before))
        described.append(
            {"name": name, "format": table.format, "rows": survey.rows, "content": source.fingerprint() or "unknown"}
        )
    known = [each.survey.columns for each in inputs]
    for column in config.group_by:
        if all(names and column not in names and column.partition(".")[0] not in names for names in known):
            names = dict.fromkeys(name for columns in known for name in columns or ())
            raise DataError(
                f"--group_by {column}: no input has such a column{nearest(column, names)}; there are {', '.join(names)}"
            )
    options = {
        name: getattr(config, name)
        for name in ("prompt_column", "response_column", "prefix", "block_size", "max_length", "long_text", "dtype")
    }
    return Workload(tuple(inputs), {"format": _FORMAT, "inputs": described, "model": model, "options": options})


def find_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return in words what two runs' facts differ in."""
    found = []
    if one.get("inputs") != other.get("inputs"):
        sides = [{each["name"]: each for each in facts.get("inputs", ())} for facts in (one, other)]
        names = [name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name)]
        found.append(
            f"input ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "order of the inputs"
        )
    if one.get("model") != other.get("model"):
        found.append("model or thresholds")
    settings = [facts.get("options", {}) for facts in (one, other)]
    found += [f"--{name}" for name in {**settings[0], **settings[1]} if settings[0].get(name) != settings[1].get(name)]
    return found or ["version"]


def fingerprint_model(path: str) -> str:
    """Return what changes with a model's weights, thresholds, tokenizer or metadata, wherever the directory lies.

    Of large files their length and a sample of their bytes count: trained weights differ all over.

    Raises:
        CheckpointError: there is no such directory, or a file cannot be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"--model_path {path}: no such directory; give an adapter, full or merged model directory"
        )
    digest = hashlib.sha256()
    try:
        _add_files(digest, directory)
        settings = directory / "adapter_config.json"
        base = read_json(settings).get("base_model_name_or_path") if settings.is_file() else None
        if base and Path(base).is_dir():
            _add_files(digest, Path(base))
    except OSError as error:
        raise CheckpointError(f"--model_path {path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def _add_files(digest: Any, directory: Path) -> None:
    for file in sorted(directory.iterdir()):
        if file.suffix not in _MEANING or file.name in _NOT_MEANING or file.name.startswith(".") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            if size <= _SAMPLED_ABOVE:
                digest.update(content.read())
                continue
            for sample in range(_SAMPLES):
                content.seek(sample * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE))


def check_unchanged(workload: Workload) -> None:
    """Look whether the inputs are still what they were when the workload was built.

    Raises:
        DataError: one was written to since.
    """
    for each in workload.inputs:
        if each.stamp is not None and _look_at(Path(each.table.source)) != each.stamp:
            raise DataError(f"{each.table.source}: has changed while it was scored; start over with --overwrite True")


def _look_at(path: Path) -> tuple[int, int] | None:
    try:
        return stamp(path)
    except OSError:  # it is gone
        return None
