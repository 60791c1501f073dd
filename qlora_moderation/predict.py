"""Scores rows at scale: inputs are cut into blocks, each is scored by itself and kept as a part, the parts become the outputs.

In: a model directory and rows. Out: the same rows with verdicts, in their format and order, and a summary. Whoever starts the
same command again, after whatever end, goes on behind the blocks that are done.

Processes of torchrun and shards of a cluster are the same thing here: each takes every n-th block and none talks to another, so
a block's bytes do not depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_moderation.combine import count_anew, find_lost, finish, read_finished
from qlora_moderation.errors import CheckpointError, Interrupted, ModerationError, SaidByMainError
from qlora_moderation.interruption import StopSignals
from qlora_moderation.parts import Parts, raise_other, refuse_others, remove_others, writing
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.row_check import check_blocks
from qlora_moderation.state_files import Asked
from qlora_moderation.summary import SUMMARY_FILE
from qlora_moderation.workload import BlockId, Workload, build_workload, check_unchanged, list_blocks

Log = Callable[[str], None]


def _say(line: str) -> None:
    print(line, flush=True)  # into a file, too, a long run's lines come as they are said


def predict(config: PredictConfig, log: Log = _say) -> dict[str, Any] | None:
    """Score what is not scored yet, and finish the run where nothing is missing then.

    Returns:
        The content of `summary.json`; None where other processes or shards have blocks left.

    Raises:
        ModerationError: model or rows cannot be used, or `output_dir` holds another run.
        Interrupted: a signal stopped the run.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    say, log = log, log if rank == 0 else _silent
    output = Path(config.output_dir)
    try:
        work = build_workload(config)
        _check_output(config, output, work)
    except ModerationError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SaidByMainError("the first process of this machine meets it, too") from error
        raise
    asked = Asked(config.group_by, config.bootstrap_replicates)
    finished = read_finished(output, work.facts)
    if finished is not None and config.overwrite and find_lost(output, finished):
        finished = None  # its outputs are replaced; the summary would call them finished if this were killed
        with writing(output):
            (output / SUMMARY_FILE).unlink(missing_ok=True)
    if finished is not None:
        Parts(output, work.facts).remove_abandoned()
        return count_anew(output, finished, asked, log) if rank == 0 else None
    shard, shards = config.share
    number, every = shard + shards * rank, shards * processes
    parts = Parts(output, work.facts)
    made = [path for path in (output, *output.parents) if not path.exists()]
    with parts.locked(number, every), parts.leaving_no_trace(made if every == 1 else None):
        if read_finished(output, work.facts) is None:
            mine = {block for index, block in enumerate(list_blocks(work.facts)) if index % every == number}
            todo = [block for block in parts.find_missing() if block in mine]
            _report_start(work, mine, todo, log)
            if config.on_bad_row == "stop":
                check_blocks(work, todo)
            parts.open(asked)
            if todo:
                if config.engine == "ray":
                    from qlora_moderation.ray_engine import score_blocks
                else:
                    from qlora_moderation.local_engine import score_blocks

                score_blocks(config, work, parts, todo, log, speaks=rank == 0)
            check_unchanged(work)
        return _finish(parts, asked, shards, say)


def _silent(_: str) -> None:
    pass


def _check_output(config: PredictConfig, output: Path, work: Workload) -> None:
    """Refuse an output directory that holds something else, or clear it of what another run has begun.

    Raises:
        CheckpointError: it does.
    """
    there = next(place for place in [output.resolve(), *output.resolve().parents] if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise CheckpointError(f"--output_dir {output}: cannot be made, {there} is no directory that can be written in")
    for each in work.inputs:
        if output.resolve() in Path(each.table.source).resolve().parents and Path(each.table.source).is_file():
            raise CheckpointError(f"--output_dir {output}: holds the input {each.table.source}; give another directory")
    finished = read_finished(output)
    if finished is not None and finished["run"] == work.facts:
        return
    if config.overwrite:  # a finished result stays until this one takes its place
        remove_others(output, work.facts)
        return
    if finished is not None:
        raise_other(output, finished["run"], work.facts)
    refuse_others(output, work.facts)
    taken = [each.name for each in work.inputs if (output / each.name).exists()]
    if taken and not Parts(output, work.facts).directory.is_dir():
        raise CheckpointError(
            f"--output_dir {output}: holds {taken[0]}, which is not of this run; give another directory, or --overwrite True"
        )


def _report_start(work: Workload, mine: set[BlockId], todo: list[BlockId], log: Log) -> None:
    rows, left = (sum(block.high - block.low for block in blocks) for blocks in (mine, todo))
    every, tables = sum(each.survey.rows for each in work.inputs), len(work.inputs)
    line = f"{every:,} rows in {tables} table{'s' if tables > 1 else ''}"
    if rows < every:
        line += f", {rows:,} of them for this process"
        if not rows:
            line += (
                f" (blocks have {work.facts['options']['block_size']:,} rows; a lower --block_size makes more of them)"
            )
    if left < rows:
        line += f"; going on, {rows - left:,} are done"
    log(line)


def _finish(parts: Parts, asked: Asked, shards: int, log: Log) -> dict[str, Any] | None:
    """Put the outputs together where this process is the last one; shards leave that to `combine`."""
    missing = parts.find_missing()
    if read_finished(parts.output, parts.facts) is not None:
        return None  # another process was the last one
    if missing or shards > 1:
        everything = sum(1 for _ in list_blocks(parts.facts))
        state = f"{len(missing):,} of {everything:,} blocks are not scored yet" if missing else "all blocks are scored"
        remedy = (
            f"; then: qlora-moderation combine --output_dir {parts.output}" if shards > 1 else " by the other processes"
        )
        log(f"this share is done, {state}{remedy}")
        return None
    with StopSignals() as signals, parts.combining():
        if read_finished(parts.output, parts.facts) is not None:
            parts.remove()
            return None

        def check() -> None:
            if signals.noted:
                log("all rows are scored; the same command writes the outputs")
                raise Interrupted(signals.noted)

        return finish(parts, asked, log, check)
