#!/usr/bin/env python
"""The licences of the pinned packages, as they declare them; fails where one is unknown or not permissive.

./scripts/licences.py [--runtime]
"""

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent / "constraints.txt"
OWN = "qlora-moderation"
PERMISSIVE = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense|Zlib|0BSD|CNRI|HPND|MPL|Mozilla", re.I
)
"""Of these, MPL asks for the source of its own files alone, and only from who passes them on changed."""
COPYLEFT = re.compile(r"GPL|General Public", re.I)


def find_licence(name):
    """Return what an installed package says of its licence, in a few words; None: it is not installed."""
    try:
        told = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if told.get("License-Expression"):
        return " ".join(told["License-Expression"].split())
    classifiers = [
        each.rpartition(" :: ")[2] for each in told.get_all("Classifier", []) if each.startswith("License ::")
    ]
    text = " and ".join(classifiers) or (told.get("License") or "").strip()
    if not text or "\n" in text or len(text) > 80:  # a whole licence text: its first words name it
        text = " ".join(text.split()[:6]) or _read_first_words(name)
    return text


def _read_first_words(name):
    for file in importlib.metadata.files(name) or ():
        if re.match(r"(LICEN[CS]E|COPYING)", file.name, re.I):
            return " ".join(file.read_text(encoding="utf-8").split()[:6])
    return ""


def read_pins():
    """Return the names in the constraints file."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return [line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")]


def find_runtime():
    """Return the names of the packages that the library itself needs, and what these need."""
    found, todo = set(), [OWN]
    while todo:
        name = todo.pop()
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in needed:
            other = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
            if "extra ==" not in line and other not in found:
                found.add(other)
                todo.append(other)
    return found


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", action="store_true", help="only what the library itself needs, without extras")
    arguments = parser.parse_args()
    wanted = find_runtime() if arguments.runtime else None
    print("| package | version | licence |\n|---|---|---|")
    refused = []
    for name in read_pins():
        if wanted is not None and name.lower().replace("_", "-") not in wanted:
            continue
        licence = find_licence(name)
        if licence is None:
            continue
        print(f"| {name} | {importlib.metadata.version(name)} | {licence or 'unknown'} |")
        if not PERMISSIVE.search(licence) or COPYLEFT.search(licence):
            refused.append(name)
    print(f"\nnot permissive, or unknown: {', '.join(refused) or 'none'}")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
