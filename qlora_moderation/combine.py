"""Puts the parts of a run together: the outputs and the summary.

In: an output directory in which every block has its part. Out: one file for each input, `summary.json`, `summary.png`; the
parts are gone. Needs neither the model nor the inputs, nor torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_moderation.blocks import Table
from qlora_moderation.errors import CheckpointError, DataError
from qlora_moderation.metadata import read_json, written_whole
from qlora_moderation.parts import PARTS, Parts, find_runs, writing
from qlora_moderation.prediction_config import CombineConfig
from qlora_moderation.proportions import MISSING, Proportions
from qlora_moderation.state_files import Asked, is_summary
from qlora_moderation.summary import FIGURE_FILE, SUMMARY_FILE, describe_method, render_summary, write_summary
from qlora_moderation.tables import make_table
from qlora_moderation.workload import BlockId, list_blocks

Log = Callable[[str], None]
_NAMED = 8


def combine(config: CombineConfig, log: Log = print) -> dict[str, Any]:
    """Put the parts of a run together, or count the rows of a finished one anew.

    Raises:
        CheckpointError: the directory holds no run or two, or blocks are missing; it names them.
    """
    output = Path(config.output_dir)
    runs = find_runs(output)
    finished = read_finished(output)
    if len(runs) > 1:
        raise CheckpointError(
            f"--output_dir {output}: holds parts of {len(runs)} different runs; remove all but one of the directories in "
            f"{output / PARTS}"
        )
    if not runs and finished is None:
        raise CheckpointError(f"--output_dir {output}: holds no parts; give the --output_dir of the shards")
    if finished is not None and runs in ([], [finished["run"]]):
        if runs:
            Parts(output, runs[0]).remove_abandoned()  # a kill behind the last step left them
        return count_anew(output, finished, _choose(config, Asked.from_dict(finished["summary"])), log)
    parts = Parts(output, runs[0])
    missing = parts.find_missing()
    if missing:
        raise CheckpointError(describe_missing(output, parts, missing))
    return finish(parts, _choose(config, parts.asked), log)


def _choose(config: CombineConfig, before: Asked) -> Asked:
    replicates = before.replicates if config.bootstrap_replicates is None else config.bootstrap_replicates
    return Asked(config.group_by or before.group_by, replicates)


def describe_missing(output: Path, parts: Parts, missing: list[BlockId]) -> str:
    """Return a line that names the blocks without a part, the first of them with their rows."""
    names = [each["name"] for each in parts.facts["inputs"]]
    shown = [f"block {b.number + 1} of {names[b.table]} (rows {b.low + 1:,} to {b.high:,})" for b in missing[:_NAMED]]
    more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
    every = sum(1 for _ in list_blocks(parts.facts))
    return (
        f"--output_dir {output}: {len(missing):,} of {every:,} blocks are not scored yet: {'; '.join(shown)}{more}; run their "
        "shards again, or the same command without --shard"
    )


def read_finished(output: Path, facts: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the summary of a run that has finished, or None; with facts, of the run that has these.

    Raises:
        CheckpointError: it is none of ours.
    """
    if not (output / SUMMARY_FILE).is_file():
        return None
    found = read_json(output / SUMMARY_FILE)
    if not is_summary(found):
        raise CheckpointError(f"--output_dir {output}: its {SUMMARY_FILE} is not of a run; give another directory")
    return found if facts in (None, found["run"]) else None


def find_lost(output: Path, finished: dict[str, Any]) -> list[Path]:
    """Return the outputs of a finished run that are not there in the size that they were written in."""
    places = {output / name: facts["bytes"] for name, facts in finished["outputs"].items()}
    return [place for place, size in places.items() if not place.is_file() or place.stat().st_size != size]


def finish(parts: Parts, asked: Asked, log: Log, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write outputs and summary, and remove the parts and what an earlier run left. Killed under way, it can be called again.

    What an earlier run left stays until every new output is whole.

    Args:
        parts: all of them there.
        asked: which summary.
        log: takes the summary's lines.
        check: called now and then; may raise to stop.
    """
    counts = _start_count(parts.facts, asked)
    outputs, unfinished = {}, {}
    for number, group in itertools.groupby(list_blocks(parts.facts), key=lambda block: block.table):
        blocks = list(group)
        each = parts.facts["inputs"][number]
        place = parts.output / each["name"]
        log(f"writing {place}")
        table = make_table(each["format"], str(place), parts.facts["options"]["prefix"])

        # until all are there it lies among the parts, and a kill leaves nothing else behind
        beside = parts.directory / f"output-{number:05d}"
        with writing(parts.output), written_whole(beside) as file:
            table.join(_count_parts(parts, table, blocks, counts, check), file)
        outputs[each["name"]] = {"bytes": beside.stat().st_size, "rows": each["rows"]}
        unfinished[beside] = place
    if asked.group_by != parts.asked.group_by:  # the run's own columns were found in the inputs
        _check_groups(counts)
    found = _describe(parts.facts, parts.engine, outputs, counts, asked)
    with writing(parts.output):
        _remove_earlier(parts, outputs)
        for beside, place in unfinished.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            beside.replace(place)
        write_summary(parts.output, found)
    parts.remove()
    _report(parts.output, found, log)
    return found


def _remove_earlier(parts: Parts, outputs: Container[str]) -> None:
    """Remove what another run left and this one does not replace, its summary last: it names the rest."""
    earlier = read_finished(parts.output)
    if earlier is not None and earlier["run"] != parts.facts:
        for name in earlier["outputs"]:
            if name not in outputs:
                (parts.output / name).unlink(missing_ok=True)
        (parts.output / SUMMARY_FILE).unlink()


def _count_parts(
    parts: Parts, table: Table, blocks: Sequence[BlockId], counts: Proportions, check: Callable[[], None]
) -> Iterator[Path]:
    """Yield the parts of a table, each once its rows are counted.

    Raises:
        CheckpointError: one has another number of rows than its block.
    """
    for block in blocks:
        check()
        path, before = parts.path_of(block), counts.rows
        for rows in table.read_output(path, counts.columns):
            counts.add(rows)
        if counts.rows - before != block.high - block.low:
            raise CheckpointError(f"{path}: is damaged; remove it, and give the same command again")
        yield path


def count_anew(output: Path, finished: dict[str, Any], asked: Asked, log: Log) -> dict[str, Any]:
    """Return the summary of a finished run, counted anew from its outputs where it is asked for other groups or intervals.

    Raises:
        CheckpointError: an output is gone or was changed.
    """
    lost = find_lost(output, finished)
    if lost:
        raise CheckpointError(
            f"{lost[0]}: is gone or was changed since the run finished; restore it, or score again with --overwrite True"
        )
    log(f"{output}: the run has finished; nothing is left to score")
    if finished["summary"] == asked.to_dict():
        _report(output, finished, log)
        return finished
    counts = _start_count(finished["run"], asked)
    for each in finished["run"]["inputs"]:
        table = make_table(each["format"], str(output / each["name"]), counts.prefix)
        for rows in table.read_output(output / each["name"], counts.columns):
            counts.add(rows)
    _check_groups(counts)
    found = _describe(finished["run"], finished["engine"], finished["outputs"], counts, asked)
    with writing(output):
        write_summary(output, found)
    _report(output, found, log)
    return found


def _start_count(facts: dict[str, Any], asked: Asked) -> Proportions:
    options = facts["options"]
    return Proportions(options["prompt_column"], asked.group_by, options["prefix"], asked.replicates)


def _check_groups(counts: Proportions) -> None:
    """Refuse a column of which no row has a value.

    Raises:
        DataError: names it.
    """
    for column, tallies in counts.groups.items():
        if tallies is not None and tallies.keys() == {MISSING}:
            raise DataError(f"--group_by {column}: no row has a value there; give another column")


def _describe(
    facts: dict[str, Any], engine: dict[str, Any], outputs: dict[str, Any], counts: Proportions, asked: Asked
) -> dict[str, Any]:
    return {
        **counts.to_dict(),
        "intervals": describe_method(asked.replicates),
        "summary": asked.to_dict(),
        "outputs": outputs,
        "engine": engine,
        "run": facts,
    }


def _report(output: Path, found: dict[str, Any], log: Log) -> None:
    for line in render_summary(found):
        log(line)
    names = list(found["outputs"])
    shown = ", ".join(names) if len(names) <= 3 else f"{len(names)} outputs"
    log(f"written: {output} ({shown}, {SUMMARY_FILE}, {FIGURE_FILE})")
