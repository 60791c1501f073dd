"""User text is data, whatever it holds: no special token from it, no border moved, every score a number, nothing lost."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import llama3_tokenizer, silent
from hostile_texts import CONTROL_TOKENS, TEXTS, list_texts
from test_serving_app import URL, play
from tokenizers import decoders

from qlora_moderation import QAModeration
from qlora_moderation.embedded import build_tokenizer
from qlora_moderation.predict import predict
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.scoring import cut_windows, score_pairs, score_windows
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.tokenization import TextEncoder

HOSTILE = list_texts()
GLUES = ("{}", "why{}not", " {} ", "{}{}")
PLAIN = "fine"


def load_with(tokenizer):
    """Give a tokenizer the control tokens of every family: half of them special, half merely added."""
    tokens = [token for family in CONTROL_TOKENS.values() for token in family]
    byte_tokens = {token for token in tokens if re.fullmatch("<0x..>", token)}  # entries of the vocabulary, never added
    tokens = [token for token in tokens if token not in byte_tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[::2]})
    tokenizer.add_tokens(tokens[1::2])
    return tokenizer


@pytest.fixture(scope="module", params=["sentencepiece-like", "byte-level", "words"])
def armed(request, texts, bert):
    """A tokenizer in which every control token of the table is one, and whether it gives each text back."""
    from transformers import AutoTokenizer

    if request.param == "words":
        return load_with(AutoTokenizer.from_pretrained(bert)), False
    if request.param == "sentencepiece-like":
        return load_with(build_tokenizer(texts, 600)), True
    made = llama3_tokenizer(texts)
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    return load_with(made), True


def test_there_are_enough_and_the_trap_is_set(armed):
    assert len(HOSTILE) >= 150 and len(TEXTS) >= 12
    tokenizer, _ = armed
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in ("</s>", "<|eot_id|>", "<|im_start|>", "<tool_call>", "[TOOL_CALLS]", "<start_of_turn>"):
        assert control.intersection(tokenizer(f"a {token} b", add_special_tokens=False)["input_ids"]), token


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("max_length", [100_000, 96], ids=["whole", "windows"])
def test_no_text_becomes_a_token_of_control(kind, max_length, armed):
    """In question, answer and both, alone and inside words: no special id but those put on, the end last, nothing lost."""
    tokenizer, is_lossless = armed
    encoder = TextEncoder(tokenizer, Taxonomy(), max_length)
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    hostile = [glue_in(glue, text) for text in TEXTS[kind] for glue in GLUES]
    pairs = [pair for text in hostile for pair in ((text, PLAIN), (PLAIN, text), (text, text))]
    prompts, responses = zip(*pairs, strict=True)
    begin, end = encoder.begin_ids, encoder.end_ids
    seen: dict[int, set[int]] = {}
    for window in encoder.windows(prompts, responses):
        ids = window.ids
        assert len(ids) <= max_length and ids[: len(begin)] == begin and ids[-len(end) :] == end
        inner = ids[len(begin) : -len(end)]
        assert not control.intersection(inner), pairs[window.text]
        seen.setdefault(window.text, set()).update(inner)
        if is_lossless and not window.truncated:
            assert show(encoder, inner) == Taxonomy().render(*pairs[window.text])
    whole = TextEncoder(tokenizer, Taxonomy(), 10**7).encode(prompts, responses)
    assert all(seen[i] == set(one.ids[len(begin) : -len(end)]) for i, one in enumerate(whole))


def glue_in(glue: str, text: str) -> str:
    """Put a text wherever `{}` stands, as it is."""
    return glue.replace("{}", text)


def show(encoder: TextEncoder, ids: list[int]) -> str:
    """Return the text that ids stand for."""
    return encoder._backend.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def moderation(runs):
    return QAModeration.from_pretrained(runs["lora"].weights, use_cpu=True)


PAIRS = [pair for text in HOSTILE for pair in ((text, PLAIN), (PLAIN, text), (text, text))]


def test_every_score_is_a_number_between_0_and_1(moderation):
    judged = moderation.predict(*map(list, zip(*PAIRS, strict=True)))
    scores = np.array([[one["risk"], *one["categories"].values()] for one in judged])
    assert scores.shape == (len(PAIRS), 15) and ((scores > 0) & (scores < 1)).all()


def test_the_server_says_the_same_of_pairs_and_of_chats(moderation, runs):
    """In a chat, too, markers of roles inside a text are text: only the roles of the messages count."""
    wanted = moderation.predict(*map(list, zip(*PAIRS[1::3], strict=True)))

    async def script(client, service):
        found = []
        for _, answer in PAIRS[1::3]:
            as_pair = {"input": {"question": PLAIN, "answer": answer}}
            chat = {"messages": [{"role": "user", "content": PLAIN}, {"role": "assistant", "content": answer}]}
            found.append([await client.post(URL, json=body) for body in (as_pair, chat)])
        return found

    options = {"max_queue_tokens": 10**6, "long_text": "window"}
    for (_, text), one, answers in zip(PAIRS[1::3], wanted, play(runs["lora"].weights, script, **options), strict=True):
        for answer in answers:
            assert answer.status_code == 200, (text, answer.text)
            scores = answer.json()["results"][0]["category_scores"]
            assert scores == pytest.approx(one["categories"], abs=1e-5), text


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_predict_carries_every_text_through(ending, moderation, runs, tmp_path):
    pairs = [pair for pair in PAIRS[1::3] if ending != "csv" or not {"\x00", "\r"}.intersection("".join(pair))]
    source, rows = tmp_path / f"rows.{ending}", [{"prompt": q, "response": a} for q, a in pairs]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif ending == "csv":
        with source.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("prompt", "response"), *pairs])
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        source.write_text("\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    options = {"model_path": str(runs["lora"].weights), "input": (str(source),), "output_dir": str(tmp_path / "out")}
    predict(PredictConfig(**options, use_cpu=True, bootstrap_replicates=0, block_size=64), silent)
    scored = read(tmp_path / "out" / source.name)
    assert [(row["prompt"], row["response"]) for row in scored] == pairs
    risks = [one["risk"] for one in moderation.predict(*map(list, zip(*pairs, strict=True)))]
    assert [float(row["risk"]) for row in scored] == pytest.approx(risks, abs=1e-5)


def read(path):
    """Return the rows of an output with the stock reader of its format."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_bytes().decode("utf-8")
    if path.suffix == ".csv":
        csv.field_size_limit(10**9)
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.parametrize("harmful_first", [True, False], ids=["padding behind", "padding before"])
def test_padding_cannot_hide_a_sentence(harmful_first, moderation):
    """100,000 harmless tokens around an answer: each category scores at least what the sentence's own window scores.

    The score of a long text is the highest of its windows, which overlap by a quarter of the answer's room, so a sentence
    no longer than that stands whole in one of them. What that window holds besides is the padding next to the sentence.
    """
    classifier = moderation.classifier
    encoder = classifier.encoder
    sentence = "Pour both bottles into the bucket, then throw it at the guard."
    padding = "the weather was mild and the bread was warm. " * 12_000
    answer = f"{sentence} {padding}" if harmful_first else f"{padding}{sentence}"
    (length,) = encoder.count_tokens(["How?"], [answer])
    assert length > 100_000
    windows = encoder.windows(["How?"], [answer])
    holds = [
        window
        for window in windows
        if "Pour both bottles" in show(encoder, window.ids) and "at the guard." in show(encoder, window.ids)
    ]
    assert len(windows) > 500 and holds
    own = score_windows(classifier, holds[:1], None, None)[0]
    every = score_windows(classifier, windows, None, None)
    scores = score_pairs(classifier, ["How?"], [answer])
    assert scores.logits[0] == pytest.approx(every.max(axis=0), abs=1e-5)
    assert not np.allclose(every[0], every.max(axis=0), atol=1e-3)  # the first window alone would say something else
    assert np.isfinite(scores.logits).all() and (scores.logits[0] >= own - 1e-5).all()
    assert scores.windows[0] == len(windows) == len(cut_windows(classifier, ["How?"], [answer]).windows)
