"""Scores blocks in this process, one after another.

In: a workload and the blocks that are to be done. Out: their parts.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora_moderation.backbone import choose_dtype
from qlora_moderation.block_scoring import BlockScorer, NotFiniteError
from qlora_moderation.blocks import Block
from qlora_moderation.classifier import load_classifier
from qlora_moderation.distributed import take_device
from qlora_moderation.environment import describe_environment
from qlora_moderation.errors import CheckpointError
from qlora_moderation.interruption import StopSignals
from qlora_moderation.pair_columns import PairColumns
from qlora_moderation.parts import Parts
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.progress import Progress
from qlora_moderation.row_check import check_new_columns
from qlora_moderation.scoring import default_token_budget
from qlora_moderation.shortage import scoring_shortage
from qlora_moderation.verdicts import Verdicts
from qlora_moderation.workload import BlockId, Workload


def score_blocks(
    config: PredictConfig,
    work: Workload,
    parts: Parts,
    todo: Sequence[BlockId],
    log: Callable[[str], None],
    speaks: bool = True,
) -> None:
    """Score blocks and write their parts.

    Args:
        config: model and options.
        work: what the blocks are of.
        parts: where they go.
        todo: the blocks, in their order.
        log: takes lines.
        speaks: whether this process tells of its progress.

    Raises:
        DataError: an input cannot be read, or a row holds a new column already.
        CheckpointError: the model cannot be used, or gives what is no number.
        Interrupted: a signal stopped the run; what is done stays.
    """
    with StopSignals() as signals:
        scorer, engine = open_scorer(config)
        differing = parts.agree_on_engine(engine)
        if differing:
            log(f"the blocks done were scored with another {' and '.join(differing)}; last digits may differ")
        log(f"thresholds: {scorer.classifier.thresholds.describe()}")
        rows = sum(block.high - block.low for block in todo)
        with Progress(rows, signals, log if speaks else None) as progress:
            for block_id, block in work.read(todo):
                progress.tick()
                verdicts = score_block(scorer, block, config, progress.tick)
                with parts.write(block_id) as file:
                    work.inputs[block_id.table].table.write_part(file, block, verdicts)
                progress.done(len(verdicts), verdicts.tokens)


def open_scorer(config: PredictConfig) -> tuple[BlockScorer, dict[str, Any]]:
    """Open the model on this process's device; return the scorer, and what it computes with."""
    device = take_device(config.use_cpu)
    classifier = load_classifier(config.model_path, config.dtype, config.use_cpu, max_length=config.max_length)
    columns = PairColumns(config.prompt_column, config.response_column)
    scorer = BlockScorer(classifier, columns, config.long_text, config.max_tokens_per_micro_batch)
    engine = {
        "categories": list(classifier.taxonomy.categories),
        "thresholds": classifier.thresholds.to_dict(classifier.taxonomy),
        "dtype": str(choose_dtype(config.dtype, device)).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "max_tokens_per_micro_batch": config.max_tokens_per_micro_batch,
        "versions": describe_environment()["packages"],
    }
    return scorer, engine


def score_block(
    scorer: BlockScorer, block: Block, config: PredictConfig, progress: Callable[[int], None] | None = None
) -> Verdicts:
    """Judge the rows of a block.

    Raises:
        DataError: a row holds a new column already.
        CheckpointError: the model's logits are not finite; it names the row.
    """
    longest = scorer.classifier.encoder.max_length
    budget = scorer.max_tokens or default_token_budget(scorer.classifier.model.device, longest)
    check_new_columns(block, config.prefix)
    try:
        with scoring_shortage(f"--model_path {config.model_path}", "--max_tokens_per_micro_batch", budget, longest):
            return scorer.score(block.rows, progress)
    except NotFiniteError as error:
        raise CheckpointError(f"{block.places[error.row]}: {error}") from None
