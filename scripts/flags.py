"""Kinds of values that the benchmarks take, refused on the command line before anything is measured. Imported by them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from qlora_moderation.sources import FILE_ENDINGS


def whole(least: int = 1, multiple_of: int = 1) -> Callable[[str], int]:
    """Return a reader of whole numbers that are not below `least`, and multiples of `multiple_of`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is too small, give at least {least}")
        if number % multiple_of:
            raise argparse.ArgumentTypeError(f"{text} is no multiple of {multiple_of}")
        return number

    return read


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def rows_file(text: str) -> str:
    """Read the path of a file of rows."""
    if not Path(text).is_file() or Path(text).suffix.lower() not in FILE_ENDINGS:
        raise argparse.ArgumentTypeError(f"{text}: is no file ending in {', '.join(FILE_ENDINGS)}")
    return text


def model_name(text: str) -> str:
    """Read a model directory or a hub name; what looks like a path must be there."""
    if text.startswith((".", "/")) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such directory")
    return text


def existing_folder(text: str) -> Path:
    """Read the path of a directory that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such directory")
    return Path(text)


def new_file(text: str) -> str:
    """Read the path of a file to write at the end: better refused now than after all measurements."""
    if Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a directory, or lies in none")
    return text


def refuse(message: str) -> NoReturn:
    """End with a line for the user."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmarks of speed have in common: rows, backbone, its shape, where figures go."""
    add_rows_flags(parser, rows="made-up rows of the same lengths", layers=8, width=512)
    parser.add_argument(
        "--backbone", type=model_name, help="default: a LLaMA with random weights, 8 layers of width 512"
    )
    parser.add_argument("--rounds", type=whole(), default=2)
    parser.add_argument("--json", type=new_file, help="also write the figures here")


def add_rows_flags(parser: argparse.ArgumentParser, rows: str, layers: int, width: int) -> None:
    """Add rows and the shape of the backbone that is made on the spot, with the defaults given."""
    parser.add_argument("--rows", type=rows_file, help=f"JSONL in BeaverTails' layout; default: {rows}")
    parser.add_argument("--layers", type=whole(), default=layers, help="of the LLaMA made on the spot")
    parser.add_argument("--width", type=whole(64, 64), default=width, help="of the LLaMA made on the spot")
