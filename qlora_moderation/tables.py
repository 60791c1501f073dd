"""Which tables are scored, and under which name each output goes.

In: files, directories, globs and hub sets. Out: tables in a fixed order. Formats have modules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from qlora_moderation.blocks import Table
from qlora_moderation.csv_tables import Csv
from qlora_moderation.errors import DataError, brief
from qlora_moderation.json_tables import JsonArray, JsonLines
from qlora_moderation.sources import FILE_ENDINGS, Source, find_kind, parse_spec, refuse_packed, unreadable

RESERVED = ("parts", "summary.json", "summary.png")
"""What an output directory holds beside the outputs."""


def find_sources(specs: Sequence[str], output_dir: str | None = None) -> dict[str, Source]:
    """Return name of the output -> source, in the order of the specs, what a directory or glob holds by name.

    Args:
        specs: files, directories, globs or hub sets.
        output_dir: must not be in, or be, what is read.

    Raises:
        DataError: nothing is there, or two outputs would have one name.
    """
    found: dict[str, Source] = {}
    for spec in specs:
        for name, source in _expand(spec, output_dir):
            output = None if output_dir is None else Path(output_dir) / name
            if name in found:
                raise DataError(
                    f"--input {spec}: {found[name]} and {source} would both be written to {name}; use two runs"
                )
            if PurePosixPath(name).parts[0] in RESERVED:
                raise DataError(f"--input {spec}: {name} is what the output directory itself holds; rename that file")
            if output is not None and source.split is None and output.resolve() == Path(source.name).resolve():
                raise DataError(f"--output_dir {output_dir}: the output would replace {source}; give another directory")
            found[name] = source
    return found


def _expand(spec: str, output_dir: str | None) -> Iterator[tuple[str, Source]]:
    path = Path(spec)
    kind = find_kind(path)
    if kind == "directory":
        if output_dir is not None and path.resolve() in Path(output_dir).resolve().parents:
            raise DataError(f"--output_dir {output_dir}: lies inside --input {spec}, and would be read the next time")
        files = [file for file in sorted(path.rglob("*")) if _is_table(file.relative_to(path)) and file.is_file()]
        if not files:
            raise DataError(f"--input {spec}: holds no file ending in {', '.join(FILE_ENDINGS)}")
        yield from ((file.relative_to(path).as_posix(), Source(str(file))) for file in files)
    elif kind is None and _is_glob(spec):
        try:
            matches = sorted(set(Path(path.anchor).glob(str(path.relative_to(path.anchor)))))
        except (ValueError, OSError) as error:
            raise DataError(f"--input {spec}: is no pattern that can be looked for ({brief(error)})") from None
        files = [match for match in matches if match.is_file() and _is_table(Path(match.name))]
        if not files:
            raise DataError(f"--input {spec}: matches no file ending in {', '.join(FILE_ENDINGS)}")
        yield from ((file.name, Source(str(file))) for file in files)
    else:
        for source in parse_spec(spec):
            yield (Path(source.name).name if source.split is None else _name_hub_set(source)), source


def _is_glob(spec: str) -> bool:
    # a hub set's split may be cut, as in train[:100]
    return bool(re.search(r"[*?\[]", spec)) and not re.match(r"[\w.-]+(/[\w.-]+)?:", spec)


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in FILE_ENDINGS and not any(part.startswith(".") for part in path.parts)


def _name_hub_set(source: Source) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{source.name.rpartition('/')[2]}-{source.split}").strip("-") + ".parquet"


def open_table(source: Source, prefix: str) -> Table:
    """Return the table of a source.

    Raises:
        DataError: the file cannot be read.
    """
    if source.split is not None:
        from qlora_moderation.columnar_tables import HubTable

        return HubTable(source, prefix)
    path = Path(source.name)
    try:
        refuse_packed(path)
    except OSError as error:
        raise unreadable(path, error) from None
    ending = path.suffix.lower()
    if ending == ".json":
        return make_table("json" if _begins_array(path) else "jsonl", source.name, prefix)
    return make_table(ending[1:], source.name, prefix)


def make_table(format_name: str, path: str, prefix: str) -> Table:
    """Return the table of a file of a known format."""
    if format_name == "parquet":  # Arrow is imported where it is needed
        from qlora_moderation.columnar_tables import ParquetTable

        return ParquetTable(path, prefix)
    kinds: dict[str, type[Table]] = {"jsonl": JsonLines, "json": JsonArray, "csv": Csv}
    return kinds[format_name](path, prefix)


def _begins_array(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(3)
            file.seek(3 if start == b"\xef\xbb\xbf" else 0)
            while byte := file.read(1):
                if not byte.isspace():
                    return byte == b"["
    except OSError as error:
        raise unreadable(path, error) from None
    return False
