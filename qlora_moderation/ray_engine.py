"""Scores blocks on a Ray cluster: a Ray Data job whose rows are blocks, each read, scored and written by one of its workers.

In: a workload and the blocks that are to be done. Out: their parts. Model, inputs and output directory lie on a disk that all
machines share, so no text travels through Ray. A block that is lost with its worker goes to another one, and a part appears
whole or not at all: no row is lost or doubled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_moderation.errors import CheckpointError, ConfigError, ModerationError, brief
from qlora_moderation.interruption import StopSignals
from qlora_moderation.parts import RUN_FILE, Parts
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.progress import Progress
from qlora_moderation.workload import BlockId, Workload

_TASKS = 10_000  # tasks of a job at most; with more blocks than that a task holds several
_FIELDS = BlockId._fields


def score_blocks(
    config: PredictConfig,
    work: Workload,
    parts: Parts,
    todo: Sequence[BlockId],
    log: Callable[[str], None],
    speaks: bool = True,
) -> None:
    """Score blocks on a cluster and wait for their parts; see `local_engine.score_blocks`.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster where one was named.
        ModerationError: what a worker met; what is done stays.
        Interrupted: a signal stopped the run; what is done stays.
    """
    with _joined_cluster(config.ray_address) as ray:
        workers, resources = plan_workers(ray, config.ray_workers, config.use_cpu, len(todo))
        log(f"Ray {ray.__version__}: {workers} workers with {_describe(resources)} each")
        done = set[BlockId]()
        # entered when Ray is there, which takes SIGTERM for itself
        with StopSignals() as signals:
            rows = sum(block.high - block.low for block in todo)
            with Progress(rows, signals, log if speaks else None) as progress:
                for block, tokens in _run_job(ray, config, work, parts, todo, workers, resources):
                    progress.tick()
                    if block not in done:  # a task of several blocks that is given to another worker tells of all again
                        done.add(block)
                        progress.done(block.high - block.low, tokens)
    lost = done.intersection(parts.find_missing())
    if lost:
        raise CheckpointError(
            f"--output_dir {parts.output}: {len(lost)} parts that workers have written are not to be seen here; give a "
            "directory on a disk that all machines share"
        )


def _run_job(
    ray: Any,
    config: PredictConfig,
    work: Workload,
    parts: Parts,
    todo: Sequence[BlockId],
    workers: int,
    resources: dict[str, float],
) -> Iterator[tuple[BlockId, int]]:
    """Yield each block that has its part, with the tokens read for it, in the order in which they end."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans are not for a reader of this log
    names = [dict(zip(_FIELDS, block, strict=True)) for block in todo]
    dataset = ray.data.from_items(names, override_num_blocks=min(len(names), _TASKS)).map_batches(
        BlockWorker,
        fn_constructor_args=(config, work, parts, str(Path.cwd())),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        **resources,
    )
    for found in dataset.iter_rows():
        if found["fault"]:
            raise ModerationError(found["fault"])
        yield BlockId(*(int(found[name]) for name in _FIELDS)), int(found["tokens"])


class BlockWorker:
    """A worker: holds the model, and scores the blocks that it is given.

    What it meets comes back as words: a cluster has many logs, and the one that was started should say it.
    """

    def __init__(self, config: PredictConfig, work: Workload, parts: Parts, directory: str) -> None:
        self._config, self._work, self._parts, self._directory = config, work, parts, directory
        self._scorer: Any = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Score the blocks of a batch and write their parts."""
        blocks = [BlockId(*map(int, values)) for values in zip(*(batch[name] for name in _FIELDS), strict=True)]
        tokens, fault = [0] * len(blocks), ""
        try:
            tokens = [self._score(block) for block in blocks]
        except ModerationError as error:
            fault = f"{error} (worker on {platform.node()})"
        except OSError as error:
            fault = (
                f"worker on {platform.node()}: {error}; all machines must share the disk of model, inputs and output"
            )
        return {**batch, "tokens": tokens, "fault": [fault] * len(blocks)}

    def _score(self, block: BlockId) -> int:
        from qlora_moderation.local_engine import open_scorer, score_block

        if self._scorer is None:
            os.chdir(self._directory)  # relative paths mean what they meant where the command was given
            if not (self._parts.directory / RUN_FILE).is_file():
                raise CheckpointError(
                    f"--output_dir {self._parts.output}: is not seen here; give one on a disk that all machines share"
                )
            self._scorer, engine = open_scorer(self._config)
            self._parts.agree_on_engine(engine)
        if self._parts.path_of(block).is_file():
            return 0  # a worker before this one has done it, and was lost behind it
        tokens = 0
        for block_id, rows in self._work.read([block]):
            verdicts = score_block(self._scorer, rows, self._config)
            with self._parts.write(block_id) as file:
                self._work.inputs[block_id.table].table.write_part(file, rows, verdicts)
            tokens += verdicts.tokens
        return tokens


def plan_workers(ray: Any, wanted: int | None, use_cpu: bool, blocks: int) -> tuple[int, dict[str, float]]:
    """Return how many workers a job gets, and what each of them holds.

    Without a number: one for each GPU; on a cluster without GPUs one for each machine, with all of its cores.

    Raises:
        ConfigError: more workers are wanted than the cluster has room for.
    """
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    gpus = 0 if use_cpu else int(sum(machine.get("GPU", 0) for machine in machines))
    cores = [int(machine.get("CPU", 0)) for machine in machines if machine.get("CPU", 0) >= 1]
    room, what = (gpus, "GPUs") if gpus else (sum(cores), "cores")
    if not room or (wanted or 1) > room:
        raise ConfigError(f"--ray_workers {wanted or 1}: the cluster has {room} {what}; give at most so many")
    workers = min(wanted or (gpus or len(cores)), blocks)
    if gpus:
        return workers, {"num_gpus": 1}
    share = max(cores)
    while sum(machine // share for machine in cores) < workers:  # as many cores as let every worker find a machine
        share -= 1
    return workers, {"num_cpus": share}


def _describe(resources: dict[str, float]) -> str:
    (name, count), *_ = resources.items()
    word = name.removeprefix("num_").removesuffix("s")
    return f"{count:g} {'GPU' if word == 'gpu' else 'core'}{'' if count == 1 else 's'}"


@contextlib.contextmanager
def _joined_cluster(address: str | None) -> Iterator[Any]:
    """Join a cluster, or start a Ray on this machine, and leave it in the end.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install -c scripts/constraints.txt -e '.[ray]'") from None
    package = str(Path(__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    named = address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"address": "local", "include_dashboard": False}
    try:
        ray.init(
            **({"address": named} if named else own),
            logging_level="error",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": search}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        remedy = "start one with ray start --head, or leave the option out for a Ray on this machine"
        if "nauthenticated" in str(error):
            remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token"
        raise ConfigError(f"--ray_address {named}: no cluster answers ({brief(error)}); {remedy}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
