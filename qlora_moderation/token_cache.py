"""Parsed and tokenised rows, kept for the next start.

In: a data spec, and all that its pairs and ids depend on. Out: a `Corpus`, read back or made anew, equal in every field.
Steps 2 to 4.

An entry is one safetensors file, named by a SHA-256 over everything that decides its content. It appears whole or not at
all, carries a checksum, and is rebuilt where anything about it is odd: a cache may cost time, never a wrong step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora_moderation import annotation, data, rows, taxonomy, tokenization, windows
from qlora_moderation.data import Pairs, aggregate_rows, check_usable, tell_renamed
from qlora_moderation.errors import brief
from qlora_moderation.sources import Source, parse_spec
from qlora_moderation.token_ids import TokenIds
from qlora_moderation.tokenization import TextEncoder

_FORMAT = 1
_KEPT = 8
_ENDING = ".safetensors"
_UNFINISHED = ".unfinished"
_OWN = re.compile(rf"[0-9a-f]{{64}}({re.escape(_ENDING)}|\.[0-9a-f]{{16}}{re.escape(_UNFINISHED)})")
_ABANDONED_SECONDS = 24 * 3600
_DECIDING = (annotation, data, rows, taxonomy, tokenization, windows)  # an entry made by other code is not read

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data spec as a run needs it.

    Attributes:
        pairs: N distinct pairs.
        ids: their token ids, cut to the model's window.
        token_counts: [N] int64 tokens before the cut.
    """

    pairs: Pairs
    ids: TokenIds
    token_counts: np.ndarray

    def take(self, indices: Sequence[int]) -> Corpus:
        """Return the pairs at `indices`, in that order."""
        return Corpus(self.pairs.take(indices), self.ids.take(indices), self.token_counts[indices])


def load_corpus(
    spec: str, encoder: TextEncoder, on_bad_row: str, log: Log, cache: TokenCache, need_labels: bool = True
) -> Corpus:
    """Load, aggregate and tokenise a data spec, or read back what an earlier start made of the same content.

    Raises:
        DataError: see `data.load_pairs`.
    """
    sources = parse_spec(spec)
    tell_renamed(sources, log)
    stamps, key = _stamps(sources), cache.find_key(sources, encoder, on_bad_row)
    corpus = cache.read(key)
    if corpus is not None:
        check_usable(spec, corpus.pairs, log, need_labels)
        return corpus
    pairs = aggregate_rows(sources, encoder.taxonomy, on_bad_row)
    check_usable(spec, pairs, log, need_labels)
    corpus = Corpus(pairs, *encoder.encode_all(pairs.prompts, pairs.responses))
    if _stamps(sources) == stamps:  # a file that changed while it was read has another key than its rows
        cache.write(key, corpus)
    return corpus


def _stamps(sources: Sequence[Source]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for source in sources:
        with contextlib.suppress(OSError):
            state = Path(source.name).stat()
            # the time of modification can be set back, as rsync and tar do; that of the change cannot
            found.append((state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return found


def find_directory(option: str | None) -> Path | None:
    """Return the directory that `--cache_dir` means; None: no cache."""
    if option in (None, "none"):
        return None
    if option != "auto":
        return Path(option)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # other values are to be ignored, says the XDG base directory specification
        return Path(base) / "qlora_moderation"
    try:
        return Path.home() / ".cache" / "qlora_moderation"
    except RuntimeError:
        return None


class TokenCache:
    """A directory of entries. Whatever goes wrong in it is a line in the log, and the work is done without it.

    Args:
        directory: made where it is missing, readable by its owner alone, since entries hold users' texts; None: no cache.
        log: receives what went wrong.
        read_only: entries are read and never written.
    """

    def __init__(self, directory: Path | None, log: Log, read_only: bool = False) -> None:
        self._directory, self._log, self._read_only = directory, log, read_only

    def find_key(self, sources: Sequence[Source], encoder: TextEncoder, on_bad_row: str) -> str | None:
        """Return the name of the entry for this content; None where there is no cache or the content has no fingerprint.

        Raises:
            DataError: a source cannot be read.
        """
        if self._directory is None:
            return None
        fingerprints, code = [source.fingerprint() for source in sources], _fingerprint_code()
        if None in fingerprints or code is None:
            return None
        facts = {
            "format": _FORMAT,
            "sources": [[str(source), content] for source, content in zip(sources, fingerprints, strict=True)],
            "taxonomy": encoder.taxonomy.to_dict(),
            "tokenizer": encoder.state,
            "on_bad_row": on_bad_row,
            "tokenizers": version("tokenizers"),
            "code": code,
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def read(self, key: str | None) -> Corpus | None:
        """Return the entry; None where there is none that can be trusted."""
        if key is None or self._directory is None:
            return None
        path = self._directory / f"{key}{_ENDING}"
        try:
            if not path.is_file():
                return None
            _check_owner(path)
            _check_owner(self._directory)
            corpus = _read_entry(path, key)
            with contextlib.suppress(OSError):
                os.utime(path)  # the entries used last are kept
            return corpus
        except Exception as error:  # whatever a damaged file makes of the readers
            self._log(f"cache: {path} cannot be used ({brief(error)}); reading and tokenising the rows again")
            return None

    def write(self, key: str | None, corpus: Corpus) -> None:
        """Keep a corpus, and only the entries used last."""
        if key is None or self._directory is None or self._read_only:
            return
        path = self._directory / f"{key}{_ENDING}"
        # a name of its own for every writer: of two that write the same entry, the later one replaces what says the same
        unfinished = path.with_name(f"{key}.{secrets.token_hex(8)}{_UNFINISHED}")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(self._directory)
            try:
                arrays, facts = _pack(corpus)
                unfinished.touch(mode=0o600)
                save_file(arrays, unfinished, {"facts": facts, "checksum": _checksum(key, facts, arrays)})
                unfinished.chmod(0o600)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
            self._prune()
        except (OSError, SafetensorError) as error:
            self._log(f"cache: {self._directory} cannot be written ({brief(error)}); going on without it")

    def _prune(self) -> None:
        assert self._directory is not None
        ages: list[tuple[float, Path]] = []
        for path in self._directory.iterdir():
            if not _OWN.fullmatch(path.name):
                continue  # somebody may name a directory that holds models
            with contextlib.suppress(OSError):  # another process prunes, too
                used = path.stat().st_mtime
                if path.suffix == _ENDING:
                    ages.append((used, path))
                elif path.suffix == _UNFINISHED and time.time() - used > _ABANDONED_SECONDS:
                    path.unlink()
        for _, path in sorted(ages, reverse=True)[_KEPT:]:
            path.unlink(missing_ok=True)


def _fingerprint_code() -> str | None:
    """Return a SHA-256 of the code that decides an entry's content; None where only its bytecode is there."""
    try:
        return hashlib.sha256("".join(inspect.getsource(module) for module in _DECIDING).encode()).hexdigest()
    except OSError:
        return None


def _check_owner(path: Path) -> None:
    """Refuse what others may have written; their files could be made to say anything."""
    state = path.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(0, f"{path.name or path} belongs to others or can be written by them")


def _pack(corpus: Corpus) -> tuple[dict[str, np.ndarray], str]:
    pairs = corpus.pairs
    arrays = {"weight": pairs.weight, "ids": corpus.ids.values, "lengths": corpus.ids.lengths}
    arrays["token_counts"] = corpus.token_counts
    lists = {"prompts": pairs.prompts, "responses": pairs.responses, "places": pairs.places, "models": pairs.models}
    for name, texts in {**lists, "skipped_rows": pairs.skipped_rows}.items():
        if texts is not None:
            # a path that is no UTF-8 stands in places as lone surrogates
            raw = [text.encode("utf-8", "surrogatepass") for text in texts]
            arrays[f"{name}.text"] = np.frombuffer(b"".join(raw), dtype=np.uint8)
            arrays[f"{name}.ends"] = np.cumsum([len(text) for text in raw], dtype=np.int64)
    if pairs.labels is not None and pairs.flagged is not None:
        arrays |= {"labels": np.ascontiguousarray(pairs.labels), "flagged": pairs.flagged}
    names = list(pairs.verdicts)
    arrays |= {f"verdicts.{index}": pairs.verdicts[name] for index, name in enumerate(names)}
    return arrays, json.dumps({"moderators": names, "annotations": pairs.annotations})


def _read_entry(path: Path, key: str) -> Corpus:
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        metadata = file.metadata() or {}
    facts = metadata.get("facts", "")
    if metadata.get("checksum") != _checksum(key, facts, arrays):
        raise ValueError("its checksum is not that of its content")
    return _unpack(arrays, json.loads(facts))


def _unpack(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> Corpus:
    def texts(name: str) -> list[str]:
        raw, ends = arrays[f"{name}.text"].tobytes(), arrays[f"{name}.ends"].tolist()
        return [raw[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]

    pairs = Pairs(
        prompts=texts("prompts"),
        responses=texts("responses"),
        labels=arrays.get("labels"),
        flagged=arrays.get("flagged"),
        weight=arrays["weight"],
        places=texts("places"),
        models=texts("models") if "models.ends" in arrays else None,
        verdicts={name: arrays[f"verdicts.{index}"] for index, name in enumerate(facts["moderators"])},
        annotations=facts["annotations"],
        skipped_rows=texts("skipped_rows"),
    )
    return Corpus(pairs, TokenIds.of(arrays["ids"], arrays["lengths"]), arrays["token_counts"])


def _checksum(key: str, facts: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{key}\n{facts}\n".encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return digest.hexdigest()
