"""What a model was trained on, as hashes that travel with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import silent

from qlora_moderation.config import MergeConfig
from qlora_moderation.errors import CheckpointError
from qlora_moderation.leakage import HASHES_FILE, hash_training, load_hashes
from qlora_moderation.merge import merge_adapter


def test_texts_are_known_whatever_their_capitals_and_spaces(tmp_path):
    hashes = hash_training(["How do I?", "Why?"], ["So.", "Because."], ["Who?"])
    asked = ["how  do I?", "How do I? ", "HOW DO I?", "How do I", "Why?", "Who?", "Ｗhy?"]
    assert hashes.has_prompts(asked).tolist() == [True, True, True, False, True, False, True]
    assert hashes.has_pairs(["Why?", "Why?", "How do I?"], ["because.", "So.", "so."]).tolist() == [True, False, True]
    assert hashes.has_selection_prompts(asked).tolist() == [False] * 5 + [True, False]
    hashes.save(tmp_path)
    found = load_hashes(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(vars(hashes).values(), vars(found).values(), strict=True))
    assert b"How" not in (tmp_path / HASHES_FILE).read_bytes()
    assert hash_training(["\ud800"], ["a"]).has_prompts(["\ud800"]).all() and load_hashes(tmp_path / "none") is None
    (tmp_path / HASHES_FILE).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_hashes(tmp_path)


def test_a_border_between_prompt_and_response_matters():
    hashes = hash_training(["a b"], ["c"])
    assert hashes.has_pairs(["a b", "a"], ["c", "b c"]).tolist() == [True, False]


def test_they_are_written_with_every_model_and_survive_the_merge(runs, rows_file, tmp_path):
    merge_adapter(MergeConfig(str(runs["lora"].weights), str(tmp_path / "m")), silent)
    selected = [json.loads(x)["prompt"] for x in (runs["lora"].directory / "validation.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in rows_file.read_text().splitlines()]
    for directory in (runs["lora"].weights, runs["full"].weights, tmp_path / "m"):
        hashes = load_hashes(directory)
        held_out = np.isin(prompts, selected)
        assert (hashes.has_prompts(prompts) == ~held_out).all() and hashes.has_selection_prompts(selected).all()
