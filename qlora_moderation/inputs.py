"""What a configuration names, checked before torch is imported: files, metrics, rules, objectives.

In: a configuration. Out: nothing, or all faults at once. Step 1 of the straight line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from qlora_moderation.config import EvaluateConfig, TrainConfig, TuneConfig
from qlora_moderation.errors import ConfigError, ModerationError
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.sources import parse_spec
from qlora_moderation.tables import find_sources
from qlora_moderation.taxonomy import load_taxonomy

_DATA_OPTIONS = ("train_data_name_or_path", "eval_data_name_or_path", "eval_dataset")


def check_inputs(config: Any) -> None:
    """Check what can be known without a model.

    Several processes leave it to rank 0 once they have met: the others may run where no rows lie, and would wait for it.

    Raises:
        ConfigError: names every file that is missing, and every name or rule that is unknown.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    faults = []
    for check in _list_checks(config):
        try:
            check()
        except ModerationError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))


def _list_checks(config: Any) -> Iterator[Callable[[], Any]]:
    for spec in filter(None, (getattr(config, name, None) for name in _DATA_OPTIONS)):
        yield functools.partial(parse_spec, spec)
    if isinstance(config, PredictConfig):
        yield functools.partial(find_sources, config.input, config.output_dir)
    if isinstance(config, TrainConfig):
        yield functools.partial(_check_metric, config)
    elif isinstance(config, EvaluateConfig) and config.fail_if:
        from qlora_moderation.comparison import Rule

        yield from (functools.partial(Rule.parse, text) for text in config.fail_if)
    elif isinstance(config, TuneConfig):
        from qlora_moderation.tuning import Objective

        objectives = dict.fromkeys(filter(None, (config.objective, config.flagged_objective)))
        yield from (functools.partial(Objective.parse, text) for text in objectives)
    elif isinstance(config, ServeConfig):
        from qlora_moderation.serving.keys import load_keys
        from qlora_moderation.serving.server import check_packages

        yield check_packages
        yield functools.partial(load_keys, config)


def _check_metric(config: TrainConfig) -> None:
    from qlora_moderation.metrics import check_selecting

    check_selecting(config.metric_for_best_model, load_taxonomy(config.taxonomy).categories)
