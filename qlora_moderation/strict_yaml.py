"""YAML files without surprises: a mapping at the top, no key twice.

In: a path. Out: a mapping. Part of step 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_moderation.errors import ConfigError, brief


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if repeated is not None:
            raise yaml.YAMLError(f"key {repeated} stands twice")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path, flag: str) -> dict[str, Any]:
    """Read a mapping; an empty file is an empty one.

    Args:
        path: the file.
        flag: the option that named it, for messages.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds something else than a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        # where a tag and its value do not fit, as in `!!timestamp soon`, PyYAML raises whatever it meets
        raise ConfigError(f"{flag} {path}: is not valid YAML ({brief(error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{flag} {path}: must hold `key: value` lines, found a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}
