"""Bad data: files and rows that cannot be used."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from workbench import Bench, case

from qlora_moderation import rows


@case("{folder}/rows.jsonl: holds no usable row")
def an_empty_file(bench):
    return bench.train(bench.data(""))


@case("{folder}/rows.csv: holds no usable row")
def a_table_with_a_header_alone(bench):
    return bench.train(bench.data("prompt,response,is_safe\r\n", "rows.csv"))


@case("{folder}/rows.jsonl, line 8: is not valid JSON (", "mend it, or leave such rows out with --on_bad_row skip")
def a_last_line_cut_off(bench):
    return bench.train(bench.data(bench.lines()[:-40]))


@case("{folder}/rows.jsonl, line 1: is not valid UTF-8 at byte 0 of the line")
def a_file_in_utf_16(bench):
    return bench.train(bench.data(bench.lines().encode("utf-16")))


@case("{folder}/rows.jsonl, line 3: is not valid UTF-8 at byte 5 of the line")
def bytes_that_are_no_text(bench):
    lines = bench.lines().encode().split(b"\n")
    lines[2] = lines[2][:5] + b"\xff" + lines[2][6:]
    return bench.train(bench.data(b"\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: is not valid JSON (")
def zero_bytes_between_the_fields(bench):
    lines = bench.lines().encode().split(b"\n")
    lines[2] = lines[2].replace(b", ", b",\0", 1)
    return bench.train(bench.data(b"\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: prompt holds a lone surrogate, which is no character")
def half_a_character(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(prompt="\ud83d"))))


@case("{folder}/rows.jsonl, line 3: is not valid JSON (")
def a_line_of_50_megabytes_that_is_no_row(bench):
    lines = bench.lines().encode().split(b"\n")
    lines[2] = b"x" * 50_000_000
    return bench.train(bench.data(b"\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: is_safe is 'yyyyy", "yyy', not true or false")
def a_cell_of_50_megabytes(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(is_safe="y" * 50_000_000))))


@case("{folder}/rows.jsonl, line 3: is not valid JSON (nested too deeply)")
def a_row_nested_without_end(bench):
    lines = bench.lines().split("\n")
    lines[2] = "[" * 200_000
    return bench.train(bench.data("\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: prompt is int, not text")
def a_number_for_a_text(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(prompt=7))))


@case("{folder}/rows.jsonl, line 3: response is empty (null), not text")
def nothing_for_a_text(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(response=None))))


@case("{folder}/rows.jsonl, line 3: is a list, not an object with columns")
def a_list_for_a_row(bench):
    lines = bench.lines().split("\n")
    lines[2] = "[1, 2]"
    return bench.train(bench.data("\n".join(lines)))


@case("{folder}/rows.jsonl, line 3: column response is missing; found prompt")
def a_column_left_out(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.pop("response"))))


@case("{folder}/rows.jsonl, line 3: category: missing privacy_violation; give each of the 14 true or false, or name")
def a_category_left_out(bench):
    return bench.train(bench.data(bench.lines(lambda row: row["category"].pop("privacy_violation"))))


@case("{folder}/rows.jsonl, line 3: category: unknown rudeness; give each of the 14 true or false, or name other")
def a_category_too_many(bench):
    return bench.train(bench.data(bench.lines(lambda row: row["category"].update(rudeness=False))))


@case("{folder}/rows.jsonl, line 3: is_safe is 'False', not true or false")
def a_word_for_a_label(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(is_safe="False"))))


@case("{folder}/rows.jsonl, line 3: category privacy_violation is nan, not true or false")
def a_label_that_is_no_number(bench):
    return bench.train(bench.data(bench.lines(lambda row: row["category"].update(privacy_violation=float("nan")))))


@case("{folder}/rows.jsonl, line 3: is_safe is ", ", but the categories ticked are: ")
def a_flag_that_its_categories_contradict(bench):
    return bench.train(bench.data(bench.lines(lambda row: row.update(is_safe=not row["is_safe"]))))


@case("{folder}/rows.csv, line 2: column prompt is missing; found question, answer, is_safe")
def a_table_with_other_columns(bench):
    return bench.train(bench.data('question,answer,is_safe\r\n"a\nb",c,true\r\n', "rows.csv"))


@case("{folder}/rows.csv, line 4: has another number of columns than the header (prompt, response): 1")
def a_row_too_short_behind_quoted_line_ends(bench):
    return bench.predict(bench.data('prompt,response\r\n"a\nb",c\r\nd\r\n', "rows.csv"))


@case("{folder}/rows.csv, line 2: is not valid CSV (")
def a_quote_that_never_ends(bench):
    return bench.train(bench.data('prompt,response,is_safe\r\n"a,b,true\r\n' * 2, "rows.csv"))


@case("{folder}/rows.parquet, row 1: column prompt is missing; found text, label")
def a_parquet_file_of_another_schema(bench):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), bench.folder / "rows.parquet")
    return bench.train(bench.folder / "rows.parquet")


@case("{folder}/rows.parquet: is not readable as Parquet (")
def a_parquet_file_cut_off(bench):
    pq.write_table(pa.Table.from_pylist(bench.rows[:8]), bench.folder / "rows.parquet")
    return bench.train(bench.data((bench.folder / "rows.parquet").read_bytes()[:-100], "rows.parquet"))


@case("{folder}/rows.jsonl.gz: is packed with gzip; unpack it, and give the path of what comes out")
def a_packed_file(bench):
    return bench.train(bench.data(gzip.compress(bench.lines().encode()), "rows.jsonl.gz"))


@case("{folder}/rows.jsonl: is packed with gzip")
def a_packed_file_under_another_name(bench):
    return bench.train(bench.data(gzip.compress(bench.lines().encode())))


@case("{folder}/rows.csv: is packed with xz")
def an_xz_file_under_another_name(bench):
    return bench.predict(bench.data(lzma.compress(b"prompt,response\r\na,b\r\n"), "rows.csv"))


@case("{folder}/rows.json: is packed with bzip2")
def a_bzip2_file_under_another_name(bench):
    return bench.evaluate(data=bench.data(bz2.compress(bench.lines().encode()), "rows.json"))


@case("{folder}/rows.jsonl: is a directory; give the path of a file")
def a_directory_for_a_file(bench):
    (bench.folder / "rows.jsonl").mkdir()
    return bench.train(bench.folder / "rows.jsonl")


@case("{folder}/rows.jsonl: cannot be read (")
def a_file_that_cannot_be_read(bench):
    (bench.folder / "rows.jsonl").symlink_to("/proc/self/mem")  # opens, even for root, and fails at the first byte
    return bench.train(bench.folder / "rows.jsonl")


@case("{folder}/rows.jsonl: no such file; give the path of a file")
def a_link_to_nowhere(bench):
    (bench.folder / "rows.jsonl").symlink_to("gone.jsonl")
    return bench.train(bench.folder / "rows.jsonl")


@case("{folder}/rows.jsonl: changed while it was read; give the same command again when it is written")
def a_file_that_changes_while_it_is_read(bench):
    path = bench.data()
    _touch_while_reading(bench, path)
    return bench.train(path)


def _touch_while_reading(bench: Bench, path: Path) -> None:
    def read(path: Path) -> Iterator[Any]:
        yield from whole(path)
        os.utime(path, (0, 0))

    whole = rows._read_jsonl
    bench.monkeypatch.setattr(rows, "_read_jsonl", read)


@case("someone/rows:train: cannot be loaded from the hub (", "check name, split and network, or download the file")
def a_hub_set_without_a_network(bench):
    return bench.train("someone/rows:train")


@case("someone/rows: is neither a file ending in .json, .jsonl, .csv, .parquet nor `hub/name:split[@revision]`")
def a_hub_set_without_a_split(bench):
    return bench.train("someone/rows")


@case("{folder}/rows.txt: is neither a file ending in")
def a_file_of_another_format(bench):
    return bench.train(bench.data("a\n", "rows.txt"))


@case("holding out 5% of 1 prompts leaves no training or no validation pair")
def a_single_row(bench):
    return bench.train(bench.data(json.dumps(bench.rows[0]) + "\n"), eval_strategy="epoch")


@case("{folder}/rows.jsonl: holds moderators' verdicts only; labelled rows have the columns category and is_safe")
def verdicts_for_labels(bench):
    return bench.train(bench.data('{"prompt": "a", "response": "b", "flagged": {"m": true}}\n'))


@case("{folder}/rows.jsonl: has a column risk already, which would be overwritten; name the new columns otherwise")
def rows_that_were_scored_before(bench):
    return bench.predict(bench.data('{"prompt": "a", "response": "b", "risk": 0.5}\n'))


@case("--input {folder}/nothing: holds no file ending in .json, .jsonl, .csv, .parquet")
def a_directory_without_rows(bench):
    (bench.folder / "nothing").mkdir()
    return bench.predict(bench.folder / "nothing")


@case("--output_dir {folder}/out: lies inside --input {folder}, and would be read the next time")
def an_output_among_the_inputs(bench):
    bench.data()
    return bench.predict(bench.folder)


@case("{folder}/rows.csv, line 1: names the column 'response' twice; rename one of them")
def a_table_with_a_column_twice(bench):
    return bench.train(bench.data("prompt,response,response\r\na,b,c\r\n", "rows.csv"))


@case("{folder}/rows.csv, line 1: names the column 'prompt' twice; rename one of them")
def a_table_to_be_scored_with_a_column_twice(bench):
    return bench.predict(bench.data("prompt,prompt,response\r\na,b,c\r\n", "rows.csv"))


@case("{folder}/rows.parquet: names the column 'prompt' twice; rename one of them")
def a_parquet_file_with_a_column_twice(bench):
    table = pa.table([pa.array(["a"])] * 3, names=["prompt", "prompt", "response"])
    pq.write_table(table, bench.folder / "rows.parquet")
    return bench.train(bench.folder / "rows.parquet")
