"""The cache gives exactly what would be made anew, and nothing that is damaged, foreign or out of date."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import make_config

from qlora_moderation import token_cache
from qlora_moderation.embedded import build_tokenizer
from qlora_moderation.errors import DataError
from qlora_moderation.plan import load_material
from qlora_moderation.sources import parse_spec
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.token_cache import Corpus, TokenCache, find_directory, load_corpus
from qlora_moderation.tokenization import TextEncoder

TAXONOMY = Taxonomy(categories=("theft,fraud", "abuse"))


def row(prompt: str, response: str, *ticked: str, **more: Any) -> dict[str, Any]:
    category = {name: name in ticked for name in TAXONOMY.categories}
    return {"prompt": prompt, "response": response, "category": category, "is_safe": not ticked, **more}


PLAIN = [row(f"question {i % 5}", f"answer {i % 9} " * (i % 4), *TAXONOMY.categories[: i % 3]) for i in range(40)]
ODD = [
    row("größe\u2028😀", "", "abuse", model="vicuna", flagged={"api": True, "ünï": None}),
    row("größe\u2028😀", "", model="vicuna", flagged={"api": False, "ünï": True}),
    row("", "long " * 200, "abuse"),
    {"prompt": "broken \ud800"},
    row("</s>", "<s>", model=""),
]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return build_tokenizer(texts, 600)


@pytest.fixture(scope="module")
def encoder(tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer, TAXONOMY, 64)


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "home" / "cache"


def save(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return str(path)


def load(spec: str, encoder: TextEncoder, place: Path | None, **options: Any) -> tuple[Corpus, list[str]]:
    log: list[str] = []
    cache = TokenCache(place, log.append, options.pop("read_only", False))
    return load_corpus(spec, encoder, options.pop("on_bad_row", "stop"), log.append, cache, **options), log


def plain_values(value: Any) -> Any:
    """Return an object as values that `==` compares wholly: types, shapes and NaNs included."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return {name: plain_values(item) for name, item in value.items()} if isinstance(value, dict) else value


def entries(place: Path) -> list[Path]:
    return sorted(place.glob("*")) if place.is_dir() else []


@pytest.fixture
def no_work(monkeypatch):
    """From then on rows are neither parsed nor tokenised."""

    def forbid() -> None:
        def fail(*arguments: Any) -> None:
            raise AssertionError("parsed or tokenised although the cache holds it")

        monkeypatch.setattr(token_cache, "aggregate_rows", fail)
        monkeypatch.setattr(TextEncoder, "encode_all", fail)

    return forbid


@pytest.mark.parametrize("content", [PLAIN, ODD, [ODD[3], *PLAIN, *ODD]], ids=["plain", "odd", "both"])
def test_what_is_read_equals_what_is_made_in_every_field_and_line(content, encoder, place, tmp_path, no_work):
    other = save(tmp_path / "other.json", PLAIN[:3])
    for spec in (save(tmp_path / "rows.jsonl", content), f"{tmp_path / 'rows.jsonl'}+{other}"):
        made, log = load(spec, encoder, None, on_bad_row="skip")
        first, log_of_first = load(spec, encoder, place, on_bad_row="skip")
        assert plain_values(first) == plain_values(made) and log_of_first == log and len(made.pairs) >= 3
    no_work()
    again, log_of_second = load(spec, encoder, place, on_bad_row="skip")
    assert plain_values(again) == plain_values(made) and log_of_second == log
    assert again.pairs.fingerprint() == made.pairs.fingerprint() and len(entries(place)) == 2


def test_a_path_that_is_no_utf8_comes_back(encoder, place, tmp_path, no_work):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/r\xff.jsonl")
    try:
        save(Path(path), [*PLAIN, []])
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    made, _ = load(path, encoder, place, on_bad_row="skip")
    no_work()
    assert plain_values(load(path, encoder, place, on_bad_row="skip")[0]) == plain_values(made)
    assert made.pairs.places[0] == f"{path}, line 1"


@pytest.mark.parametrize("options", [{}, {"holds": 0.3}, {"validation": True}], ids=["alone", "split", "validation"])
def test_a_start_has_the_same_material_with_and_without_a_cache(options, encoder, llama, place, tmp_path, no_work):
    rows = save(tmp_path / "rows.jsonl", [*PLAIN, {}])
    more: dict[str, Any] = {"on_bad_row": "skip", "max_length": 64}
    if "holds" in options:
        more |= {"validation_fraction": options["holds"], "eval_strategy": "epoch"}
    if "validation" in options:
        more["eval_data_name_or_path"] = save(tmp_path / "validation.jsonl", [*ODD[:3], *PLAIN[:4]])
    classifier: Any = SimpleNamespace(taxonomy=TAXONOMY, encoder=encoder)
    found = []
    for directory, dry in ((None, False), (place, True), (place, False), (place, False)):
        cache_dir = None if directory is None else str(directory)
        config = make_config(llama, Path(rows), "unused", cache_dir=cache_dir, dry_run=dry, **more)
        log: list[str] = []
        material = load_material(config, classifier, log.append)
        ids = [text.tolist() for text in material.ids]
        found.append((plain_values(material.training), plain_values(material.validation), ids, material.audit, log))
        assert len(entries(place)) == (0 if directory is None or dry else 1 + ("validation" in options))
        if len(found) == 3:
            no_work()
    assert found[1:] == found[:1] * 3
    assert material.training.skipped_rows and len(ids) == len(material.training)


def test_anything_that_decides_the_content_decides_the_entry(tokenizer, encoder, place, tmp_path, texts, monkeypatch):
    cache, spec = TokenCache(place, print), save(tmp_path / "rows.jsonl", PLAIN)
    other_categories = dataclasses.replace(TAXONOMY, categories=("abuse", "theft,fraud"))
    other_template = dataclasses.replace(TAXONOMY, template="Q {question} A {answer}")
    encoders = [
        encoder,
        TextEncoder(tokenizer, TAXONOMY, 65),
        TextEncoder(tokenizer, other_categories, 64),
        TextEncoder(tokenizer, other_template, 64),
        TextEncoder(build_tokenizer(texts, 590), TAXONOMY, 64),
    ]
    keys = [cache.find_key(parse_spec(spec), each, "stop") for each in encoders]
    keys.append(cache.find_key(parse_spec(spec), encoder, "skip"))
    keys.append(cache.find_key(parse_spec(save(tmp_path / "copy.jsonl", PLAIN)), encoder, "stop"))
    keys.append(cache.find_key(parse_spec(f"{spec}+{spec}"), encoder, "stop"))
    state = Path(spec).stat()
    Path(spec).write_bytes(Path(spec).read_bytes().replace(b"answer 1", b"answer 8"))
    os.utime(spec, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Path(spec).stat().st_size == state.st_size and Path(spec).stat().st_mtime_ns == state.st_mtime_ns
    keys.append(cache.find_key(parse_spec(spec), encoder, "stop"))
    for name in ("_FORMAT", "_fingerprint_code", "version"):
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, name, 0 if name == "_FORMAT" else lambda *arguments: "other")
            keys.append(cache.find_key(parse_spec(spec), encoder, "stop"))
    assert None not in keys and len(set(keys)) == len(keys) == 12
    assert cache.find_key(parse_spec(spec), TextEncoder(tokenizer, TAXONOMY, 64), "stop") == keys[8]


def test_a_damaged_or_foreign_entry_is_named_and_made_anew(encoder, place, tmp_path):
    spec = save(tmp_path / "rows.jsonl", [*PLAIN, *ODD[:2]])
    made, _ = load(spec, encoder, place)
    entry = entries(place)[0]
    whole = entry.read_bytes()
    load(save(tmp_path / "others.jsonl", PLAIN[:4]), encoder, place)
    foreign = next(path for path in entries(place) if path != entry).read_bytes()
    flips = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), len(whole) // 60)]
    cuts = [whole[:length] for length in (0, 7, 100, len(whole) - 1)]
    for damage in (*flips, *cuts, foreign, whole + b"x", b"\x80\x04N."):
        entry.write_bytes(damage)
        again, log = load(spec, encoder, place)
        assert plain_values(again) == plain_values(made)
        assert len(log) == 1 and log[0].startswith(f"cache: {entry} cannot be used ("), log
        assert log[0].endswith("reading and tokenising the rows again") and "\n" not in log[0]
        assert load(spec, encoder, place)[1] == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners and modes")
def test_only_the_owner_reads_and_writes(encoder, place, tmp_path, monkeypatch):
    spec = save(tmp_path / "rows.jsonl", PLAIN)
    before = os.umask(0)
    try:
        load(spec, encoder, place)
    finally:
        os.umask(before)
    entry = entries(place)[0]
    assert stat.S_IMODE(place.stat().st_mode) == 0o700 and stat.S_IMODE(entry.stat().st_mode) == 0o600
    for path, mode in ((entry, 0o602), (place, 0o770)):
        kept = path.stat().st_mode
        path.chmod(mode)
        assert "can be written by them" in load(spec, encoder, place)[1][0]
        path.chmod(kept)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    log = load(spec, encoder, place)[1]
    assert len(log) == 2 and "belongs to others" in log[0] and "cannot be written" in log[1]


def test_a_place_that_cannot_be_written_costs_a_line_and_nothing_else(encoder, place, tmp_path, monkeypatch):
    spec = save(tmp_path / "rows.jsonl", PLAIN)
    made, _ = load(spec, encoder, None)
    (tmp_path / "file").touch()
    found, log = load(spec, encoder, tmp_path / "file" / "cache")
    assert plain_values(found) == plain_values(made) and len(log) == 1 and "going on without it" in log[0]

    def fill_disk(arrays: Any, path: Path, *more: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "save_file", fill_disk)
    found, log = load(spec, encoder, place)
    assert plain_values(found) == plain_values(made) and entries(place) == []
    assert log == [f"cache: {place} cannot be written (No space left on device); going on without it"]


def test_the_entries_used_last_are_kept(encoder, place, tmp_path):
    specs = [save(tmp_path / f"{i}.jsonl", PLAIN[: i + 1]) for i in range(10)]
    now = time.time()
    for i, spec in enumerate(specs[:8]):
        before = set(entries(place))
        load(spec, encoder, place)
        (entry,) = set(entries(place)) - before
        os.utime(entry, (now - 100 + i, now - 100 + i))
    load(specs[0], encoder, place)  # used again, so the second is the oldest now
    abandoned, busy = (place / f"{letter * 64}.{'0' * 16}.unfinished" for letter in "ab")
    aliens = [place / name for name in ("notes.txt", "model.safetensors", "download.unfinished")]
    for path in (abandoned, busy, *aliens):
        path.touch()
    for path in (abandoned, *aliens):
        os.utime(path, (now - 10**6, now - 10**6))
    load(specs[8], encoder, place)
    assert not abandoned.exists() and busy.exists() and all(alien.exists() for alien in aliens)
    kept = [path for path in entries(place) if path.suffix == ".safetensors" and path not in aliens]
    assert len(kept) == token_cache._KEPT == 8
    cache = TokenCache(place, print)
    known = [cache.read(cache.find_key(parse_spec(spec), encoder, "stop")) is not None for spec in specs]
    assert known == [True, False, *[True] * 7, False]


def test_writers_and_readers_at_once(encoder, place, tmp_path):
    spec = save(tmp_path / "rows.jsonl", PLAIN)
    corpus, _ = load(spec, encoder, place)
    key = TokenCache(place, print).find_key(parse_spec(spec), encoder, "stop")
    log: list[str] = []
    cache = TokenCache(place, log.append)

    def write() -> None:
        for _ in range(30):
            cache.write(key, corpus)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert plain_values(cache.read(key)) == plain_values(corpus)
    assert log == [] and len(entries(place)) == 1


@pytest.mark.parametrize(
    "change",
    [lambda raw: b"".join(raw.splitlines(True)[:30]), lambda raw: raw.replace(b"answer 1", b"answer 8")],
    ids=["shorter", "of the same size and time"],
)
def test_a_file_that_changes_while_it_is_read_is_not_kept(change, encoder, place, tmp_path, monkeypatch):
    spec = save(tmp_path / "rows.jsonl", PLAIN)
    aggregate = token_cache.aggregate_rows

    def change_and_aggregate(*arguments: Any) -> Any:
        state = Path(spec).stat()
        Path(spec).write_bytes(change(Path(spec).read_bytes()))
        os.utime(spec, ns=(state.st_atime_ns, state.st_mtime_ns))
        return aggregate(*arguments)

    monkeypatch.setattr(token_cache, "aggregate_rows", change_and_aggregate)
    load(spec, encoder, place)
    assert entries(place) == []


def test_faults_are_those_of_a_start_without_a_cache(encoder, place, tmp_path):
    verdicts = {"prompt": "q", "response": "r", "flagged": {"human": True}}
    for rows, message in (([{}], "line 1: column prompt is missing"), ([verdicts], "verdicts only"), ([], "no usable")):
        with pytest.raises(DataError, match=message):
            load(save(tmp_path / "rows.jsonl", rows), encoder, place)
    assert entries(place) == []
    spec = save(tmp_path / "rows.jsonl", [verdicts])
    assert load(spec, encoder, place, need_labels=False)[0].pairs.labels is None
    with pytest.raises(DataError, match="verdicts only"):
        load(spec, encoder, place)


@pytest.mark.parametrize("known", [True, False])
def test_a_hub_set_is_known_by_its_fingerprint(known, encoder, place, monkeypatch, no_work):
    opened = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        rows = datasets.Dataset.from_list(PLAIN)
        return rows if known else list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made, _ = load("a/b:train", encoder, place)
    assert len(entries(place)) == known and len(opened) == 1
    if known:
        no_work()
        assert plain_values(load("a/b:train", encoder, place)[0]) == plain_values(made) and len(opened) == 2


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [
        ("auto", "/x", Path("/x/qlora_moderation")),
        ("auto", "", Path("/h/.cache/qlora_moderation")),
        ("auto", "relative", Path("/h/.cache/qlora_moderation")),
        ("/y", "/x", Path("/y")),
        (None, "/x", None),
        ("none", "/x", None),
    ],
)
def test_where_the_cache_lies(option, variable, expected, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.setenv("HOME", "/h")
    assert find_directory(option) == expected
