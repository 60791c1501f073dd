"""Defaults ← YAML file ← command-line flags, for any dataclass of options.

In: a dataclass whose fields are made with `option`, and a command line. Out: a checked instance. Step 1 of the straight
line. All faults are collected and reported at once, and nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, Union

import yaml

from qlora_moderation.errors import ConfigError, printable, show
from qlora_moderation.strict_yaml import read_yaml

T = TypeVar("T")
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_LARGEST = 2**64 - 1


def option(default: Any = dataclasses.MISSING, help: str = "", **checks: Any) -> Any:
    """Return a dataclass field with help text and checks.

    Args:
        default: the default; without one the option is required.
        help: one line for `--help`.
        checks: `minimum`, `maximum` (inclusive bounds), `above` (exclusive lower bound), `aliases` (other names), `whole`
            (parts of a list keep their spaces and commas).
    """
    metadata = {"help": help, "required": default is dataclasses.MISSING, **checks}
    return dataclasses.field(default=None if default is dataclasses.MISSING else default, metadata=metadata)


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """Return ` (did you mean X?)` for the nearest known name, or the first with these words in it, or nothing."""
    match = _find_nearest(name, list(known))
    return f" (did you mean {before}{match}?)" if match else ""


def _find_nearest(name: str, names: list[str]) -> str | None:
    match = difflib.get_close_matches(name, names, n=1)
    if not match and len(name) > 2:  # two letters, as of a learning rate, stand for too much
        match = [other for other in names if set(name.split("_")) <= set(other.split("_"))]
    return match[0] if match else None


def _word(value: Any) -> str:
    if isinstance(value, list | tuple | dict | set):  # YAML's aliases can make one larger than memory when written out
        raise ValueError("expected a single value")
    return str(value)


def _convert(value: Any, annotation: Any, whole: bool = False) -> Any:
    """Turn a YAML value or the text of a flag into the annotated type; `ValueError` says what is allowed."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        words = [argument for argument in arguments if typing.get_origin(argument) is Literal]
        if bool in arguments and words:  # a switch that has words of its own beside yes and no
            allowed = typing.get_args(words[0])
            if _word(value) in allowed or _word(value).lower() not in _TRUE | _FALSE:
                return _convert(_word(value), words[0])
            return _convert(value, bool)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        if set(arguments) == {bool, str}:  # a word for which YAML has a boolean of its own
            return str(value).lower() if isinstance(value, bool) else _convert(value, str)
        return _convert(value, next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        text = (
            {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        )  # YAML 1.1 reads a bare no as False
        if text not in arguments:
            raise ValueError(f"allowed: {', '.join(map(str, arguments))}{nearest(_word(value), map(str, arguments))}")
        return text
    if origin is tuple:
        if value is None or isinstance(value, dict):
            raise ValueError("expected a list")
        parts = value if isinstance(value, list | tuple) else [value]
        items = [
            word
            for part in parts
            for word in (part.replace(",", " ").split() if isinstance(part, str) and not whole else [part])
        ]
        if not items and not whole:
            raise ValueError("expected at least one")
        return tuple(_convert(item, arguments[0]) for item in items)
    if annotation is bool:
        text = _word(value).lower()
        if text not in _TRUE | _FALSE:
            raise ValueError("expected True or False")
        return text in _TRUE
    if annotation is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError("expected a whole number")
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise ValueError("expected a whole number") from None
        if not -_LARGEST <= number <= _LARGEST:
            raise ValueError("expected a whole number of at most 64 bits")
        return number
    if annotation is float:
        try:
            real = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            real = float("nan")
        if not abs(real) < float("inf"):
            raise ValueError("expected a finite number")
        return real
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError("expected text")
    return str(value)


def _check_bounds(value: Any, checks: typing.Mapping[str, Any]) -> str | None:
    if value is None or isinstance(value, str | tuple):
        return None
    if "minimum" in checks and value < checks["minimum"]:
        return f"must be at least {checks['minimum']}"
    if "above" in checks and value <= checks["above"]:
        return f"must be above {checks['above']}"
    if "maximum" in checks and value > checks["maximum"]:
        return f"must be at most {checks['maximum']}"
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; see --help")


class _Formatter(argparse.HelpFormatter):
    """Shows `--flag X`: that a value may be missing is argparse's way to let us say so in our own words."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return action.metavar if isinstance(action.metavar, str) else super()._format_args(action, default_metavar)


def build_parser(cls: type, description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Return an argument parser with one flag for each field of `cls`, and `--config`."""
    needed = " ".join(f"--{field.name} X" for field in dataclasses.fields(cls) if field.metadata["required"])
    parser = _Parser(
        prog=prog,
        usage=" ".join(filter(None, ["%(prog)s", needed, "[--config YAML] [--flag X ...]"])),
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    parser.add_argument("--help", action="help", help="show this text (also -h)")
    parser.add_argument(
        "--config", metavar="YAML", nargs="?", const=_BARE, help="file of `key: value` lines; flags win"
    )
    hints = typing.get_type_hints(cls)
    for field in sorted(dataclasses.fields(cls), key=lambda field: not field.metadata["required"]):
        annotation = _without_none(hints[field.name])
        names = [f"--{name}" for name in (field.name, *field.metadata.get("aliases", ()))]
        facts = [" | ".join(map(str, typing.get_args(annotation)))] if typing.get_origin(annotation) is Literal else []
        if field.metadata["required"]:
            facts.append("required")
        elif field.default not in (None, "", ()):
            facts.append(f"default: {_say_default(field.default)}")
        text = " ".join(filter(None, [field.metadata["help"], f"({'; '.join(facts)})" if facts else ""]))
        several = typing.get_origin(annotation) is tuple
        # given twice, both lists count
        arity: dict[str, Any] = {"nargs": "*", "action": "extend"} if several else {"nargs": "?", "const": _BARE}
        metavar = "X ..." if several else "[True | False]" if annotation is bool else "X"
        parser.add_argument(*names, dest=field.name, help=text.replace("%", "%%"), metavar=metavar, **arity)
    return parser


def _without_none(annotation: Any) -> Any:
    """Return the type of an option that may be left open."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return kinds[0] if is_union and len(kinds) == 1 else annotation


def _say_default(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


_BARE = "\0bare"  # a flag without a value: `--gradient_checkpointing`


def load_options(cls: type[T], parser: argparse.ArgumentParser, argv: Sequence[str]) -> T:
    """Fill `cls` from defaults, then the YAML file named by `--config`, then flags.

    `cls` may define `find_faults(self) -> list[str]` for checks over several fields; it runs when every single value is
    valid, or else its faults would repeat theirs.

    Raises:
        ConfigError: names every unknown key (with the nearest known one), every wrong value and every contradiction.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    aliases = {alias: name for name, field in fields.items() for alias in field.metadata.get("aliases", ())}
    hints = typing.get_type_hints(cls)
    faults: list[str] = []

    # argparse takes every -hX for -h with a value, as if -host asked for help
    parsed, unknown = parser.parse_known_args(["--help" if word == "-h" else word for word in argv])
    flags = vars(parsed)
    meant: set[str | None] = set()  # by a misspelt flag, or by a file that could not be read
    for name in unknown:
        if name.startswith("--"):
            key = name[2:].split("=")[0]
            every = [*fields, *aliases, "config"]
            faults.append(f"unknown flag --{key}{nearest(key, every, '--')}")
            meant.add(_find_nearest(key, every))
        elif not any(earlier.startswith("--") for earlier in unknown[: unknown.index(name)]):
            faults.append(f"unexpected argument {name!r}; every option is a flag, see --help")

    given: dict[str, tuple[str, Any]] = {}
    path = flags.pop("config", None)
    if path == _BARE:
        faults.append("--config: needs a value, the path of a YAML file")
    elif path is not None:
        values: dict[str, Any] = {}
        try:
            values = read_yaml(path, "--config")
        except ConfigError as error:
            faults.append(str(error))
            meant |= fields.keys()
        for key, value in values.items():
            name = aliases.get(key, key)
            if name in given:
                faults.append(f"{path}: {key} means {name}, which stands there already; keep one")
            elif name in fields:
                given[name] = (f"{path}: {key}", value)
            else:
                faults.append(f"{path}: unknown key {key}{nearest(key, [*fields, *aliases])}")
    given.update({name: (f"--{name}", value) for name, value in flags.items()})

    resolved: dict[str, Any] = {}
    for name, (place, value) in given.items():
        if value == _BARE:
            if hints[name] is not bool and bool not in typing.get_args(hints[name]):
                faults.append(f"{place}: needs a value")
                continue
            value = True
        try:
            resolved[name] = _convert(value, hints[name], fields[name].metadata.get("whole", False))
        except ValueError as error:
            faults.append(f"{place}: {show(value)} is not valid, {error}")
            continue
        if fields[name].metadata["required"] and resolved[name] in ("", ("",)):
            faults.append(
                f"{place}: is empty, as where a shell's variable is not set; give {fields[name].metadata['help']}"
            )
            continue
        fault = _check_bounds(resolved[name], fields[name].metadata)
        if fault:
            faults.append(f"{place}: {value} is not valid, {fault}")
    for name, field in fields.items():
        if field.metadata["required"] and name not in given and not meant & {name, *field.metadata.get("aliases", ())}:
            faults.append(f"--{name} is missing: {field.metadata['help']}")

    if not faults:
        config = cls(**resolved)
        faults = getattr(config, "find_faults", list)()
        if not faults:
            return config
    raise ConfigError("\n".join(map(printable, faults)))


def dump_options(config: Any) -> str:
    """Return the YAML text of a resolved configuration; `load_options` reads it back."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
