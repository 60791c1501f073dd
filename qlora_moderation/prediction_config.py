"""Every knob of scoring rows at scale.

In: YAML and flags through `options`. Out: frozen dataclasses. Torch is never imported here.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from qlora_moderation.options import option


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """What `scripts/predict.py` reads."""

    model_path: str = option(help="full model, adapter or merged directory")
    input: tuple[str, ...] = option(
        help="files (.jsonl, .json, .csv, .parquet), directories, quoted globs, or hub/name:split[@revision]",
        whole=True,
    )
    output_dir: str = option(help="where one file for each input goes, under its name, and the summary")
    prompt_column: str = option("prompt", "column of the questions; doc.prompt: prompt inside doc")
    response_column: str = option("response", "column of the answers")
    prefix: str = option("", "put before the names of the new columns: flagged, risk, probabilities, ...")
    on_bad_row: Literal["stop", "keep"] = option("stop", "a broken row stops, or is kept with an error column")
    group_by: tuple[str, ...] = option((), "columns; the summary gets the flagged proportion of each value", whole=True)
    bootstrap_replicates: int = option(1000, "draws of prompts for the intervals; 0: no intervals", minimum=0)
    shard: str | None = option(None, "i/n: score every n-th block only; combine puts the blocks together")
    block_size: int = option(2048, "rows scored together and written at once", minimum=1, maximum=1_000_000)
    overwrite: bool = option(False, "replace what another run left in output_dir")
    max_length: int | None = option(None, "longest text in tokens; default the model's", minimum=16)
    long_text: Literal["window", "truncate"] | None = option(None, "texts beyond max_length; default the model's")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute type; auto: bfloat16 on CUDA, float32 on CPU"
    )
    max_tokens_per_micro_batch: int | None = option(None, "token budget of one forward", minimum=1)
    use_cpu: bool = option(False, "stay on the CPU even when CUDA is there")
    engine: Literal["local", "ray"] = option("local", "this machine, or a Ray cluster (extra [ray])")
    ray_address: str | None = option(
        None, "auto: the cluster that this machine is part of, or host:port; default: $RAY_ADDRESS, or a Ray of its own"
    )
    ray_workers: int | None = option(None, "default: one for each GPU, else one for each machine", minimum=1)

    @property
    def share(self) -> tuple[int, int]:
        """Number of this shard, from 0, and of all shards."""
        if self.shard is None:
            return 0, 1
        number, every = self.shard.split("/")
        return int(number) - 1, int(every)

    def find_faults(self) -> list[str]:
        """Return contradictions between options."""
        faults = []
        if not self.input:
            faults.append("--input: needs at least one file, directory, glob or hub/name:split")
        if self.prompt_column == self.response_column:
            faults.append(f"--prompt_column and --response_column are both {self.prompt_column}; name two columns")
        if self.shard is not None and not re.fullmatch(r"[1-9][0-9]{0,5}/[1-9][0-9]{0,5}", self.shard):
            faults.append(f"--shard {self.shard}: expected i/n, as 1/8 for the first of eight")
        elif not 0 <= self.share[0] < self.share[1]:
            faults.append(
                f"--shard {self.shard}: there are only shards 1/{self.share[1]} to {self.share[1]}/{self.share[1]}"
            )
        if self.engine == "ray" and self.shard is not None:
            faults.append("--shard and --engine ray both deal the blocks out; drop one")
        if self.engine == "local" and (self.ray_address is not None or self.ray_workers is not None):
            faults.append("--ray_address and --ray_workers need --engine ray")
        if len(set(self.group_by)) < len(self.group_by):
            faults.append(f"--group_by {' '.join(self.group_by)}: names a column twice")
        return faults


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """What `qlora-moderation combine` reads."""

    output_dir: str = option(help="the --output_dir of the shards")
    group_by: tuple[str, ...] = option((), "columns of the summary; default: those that predict was given", whole=True)
    bootstrap_replicates: int | None = option(
        None, "draws of prompts for the intervals; 0: none; default: as predict was given", minimum=0
    )
