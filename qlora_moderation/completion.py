"""Completion of the command line in a shell: a static script, made by shtab from the parsers of the jobs.

In: the jobs' configuration classes. Out: the text of a script; sourcing it starts no Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from qlora_moderation.errors import ConfigError
from qlora_moderation.options import build_parser, nearest

SHELLS = ("bash", "zsh", "fish", "tcsh")
PROGRAM = "qlora-moderation"
_WORDS = {"completion": "Print a script that completes commands: " + " | ".join(SHELLS)}


def build_script(shell: str, jobs: Mapping[str, tuple[type, str]]) -> str:
    """Return the script for one shell.

    Args:
        shell: one of `SHELLS`.
        jobs: name -> (configuration class, description).

    Raises:
        ConfigError: another shell, or shtab is not installed.
    """
    if shell not in SHELLS:
        raise ConfigError(f"completion {shell}{nearest(shell, SHELLS)}: the shells are {', '.join(SHELLS)}")
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion needs the package shtab: pip install shtab") from None
    return shtab.complete(_build_command(jobs), shell=shell)


def _build_command(jobs: Mapping[str, tuple[type, str]]) -> argparse.ArgumentParser:
    """Return the parser of the whole command; it is never given a command line."""
    command = argparse.ArgumentParser(prog=PROGRAM)
    command.add_argument("--version", action="store_true", help="print the versions that a report of a bug needs")
    words = command.add_subparsers()
    for name, (config_class, description) in jobs.items():
        parser = build_parser(config_class, description)
        _hint(parser, config_class)
        words.add_parser(name, help=description, parents=[parser], add_help=False)
    shells = words.add_parser("completion", help=_WORDS["completion"])
    shells.add_argument("shell", choices=SHELLS)
    return command


def _hint(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Tell shtab what an option may hold: one of some words, a file, a directory."""
    import shtab

    hints = typing.get_type_hints(config_class)
    names = {field.name for field in dataclasses.fields(config_class)}
    for action in parser._actions:
        if action.dest in names:
            action.choices = _list_words(hints[action.dest]) or None
        if not action.choices and action.dest in names | {"config"} and _may_be_text(hints.get(action.dest, str)):
            kind = shtab.DIRECTORY if action.dest.endswith("_dir") else shtab.FILE
            action.complete = kind  # type: ignore[attr-defined]  # what shtab reads


def _list_words(annotation: Any) -> list[str]:
    """Return the words that an annotation allows; none where it allows more than words."""
    if annotation is bool:
        return ["True", "False"]
    if typing.get_origin(annotation) is Literal:
        return [str(word) for word in typing.get_args(annotation)]
    parts = [part for part in typing.get_args(annotation) if part not in (type(None), Ellipsis)]
    found = [_list_words(part) for part in parts]
    return [word for words in found for word in words] if found and all(found) else []


def _may_be_text(annotation: Any) -> bool:
    return annotation is str or any(_may_be_text(part) for part in typing.get_args(annotation))
