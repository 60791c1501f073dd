"""Step 4: ids as in the original recipe, user text as data, windows that lose nothing, a tokenizer for stock use."""

from __future__ import annotations

import itertools
import json
import pickle
import re

import numpy as np
import pytest
from conftest import llama3_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from qlora_moderation import tokenization
from qlora_moderation.embedded import build_tokenizer
from qlora_moderation.errors import CheckpointError, ConfigError, DataError
from qlora_moderation.stock_tokenizer import prepare_for_stock_use, save_stock_tokenizer
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.tokenization import TextEncoder, choose_pad_token

TAXONOMY = Taxonomy()
OTHER_TEMPLATE = Taxonomy(template="Q: {question}\n### A: {answer} END.")
HOSTILE = [
    "</s>", "<s>", "<unk>", "<pad>", "[SEP]", "<|begin_of_text|>", "<|end_of_text|>", "<tool_call>", "<0x41>", "ASSISTANT:",
    " ASSISTANT: ", "\x00", "\x1b[0m", "\u202e", "\u200b", "{question}", "{answer}", "\r\n", "\ufeff", "▁", "</", "s>", "",
    "😀é\u0301", " ", "\n\n",
]  # fmt: skip
HOSTILE_PAIRS = [
    pair
    for text in HOSTILE
    for glue in ("{0}", "a{0}b", " {0} ", "{0}{0}")
    for pair in ((glue.format(text), "fine"), ("fine", glue.format(text)))
]


def llama_class_tokenizer(texts: list[str]) -> LlamaTokenizer:
    """What `AutoTokenizer` makes of a LLaMA checkpoint: a class of its own that pads on the left by default."""
    model = json.loads(build_tokenizer(texts, 600).backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)


def forging_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """LLaMA-like, with merges that lead from `</` and `s>` to the end token."""
    state = json.loads(build_tokenizer(texts, 600).backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for token in ("<", "/", "s", ">", "</", "s>"):
        vocab.setdefault(token, len(vocab))
    state["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)


MAKERS = {
    "llama": lambda texts: build_tokenizer(texts, 600),
    "llama3": llama3_tokenizer,
    "llama class": llama_class_tokenizer,
    "forging": forging_tokenizer,
}


@pytest.fixture(params=MAKERS)
def tokenizer(request, texts):
    return MAKERS[request.param](texts)


@pytest.fixture(params=["llama", "llama3"])
def plain(request, texts):
    return MAKERS[request.param](texts)


def word_tokenizer(vocab: list[str], **names: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **names)


def test_ids_are_those_of_the_original_recipe(tokenizer, rows):
    prompts, responses = ([row[side] for row in rows[:100]] for side in ("prompt", "response"))
    prompts += ["  two  spaces ", "größe, 😀?", "line\nbreak"]
    responses += ["", "<", "a\tb \u2028 c "]
    texts = [TAXONOMY.render(*pair) + tokenizer.eos_token for pair in zip(prompts, responses, strict=True)]
    expected = tokenizer(texts)["input_ids"]
    encoder = TextEncoder(tokenizer, TAXONOMY, 512)
    assert [window.ids for window in encoder.encode(prompts, responses)] == expected
    assert encoder.count_tokens(prompts, responses) == [len(ids) for ids in expected]


def test_begin_and_end_ids(texts, bert):
    found = {
        name: (encoder.begin_ids, encoder.end_ids)
        for name, made in [*((name, make(texts)) for name, make in MAKERS.items())]
        for encoder in [TextEncoder(made, TAXONOMY, 512)]
    }
    llama = ([1], [2])
    assert found == {"llama": llama, "llama3": ([0], [1]), "llama class": llama, "forging": llama}
    encoder = TextEncoder(AutoTokenizer.from_pretrained(bert), TAXONOMY, 512)
    assert (encoder.begin_ids, encoder.end_ids) == ([2], [3])


@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [("<s> $A </s>", [1], [2]), ("$A </s>", [], [2]), ("$A", [], [2]), ("<s> $A", [1], [2])],
)
def test_the_end_token_stands_once(template, begin, end, texts):
    tokenizer = build_tokenizer(texts, 600)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoder = TextEncoder(tokenizer, TAXONOMY, 512)
    assert (encoder.begin_ids, encoder.end_ids) == (begin, end)
    ids = encoder.encode(["Why?"], ["So."])[0].ids
    assert ids.count(2) == 1 and ids.count(1) == len(begin)


@pytest.mark.parametrize(
    ("maker", "names", "expected"),
    [
        ("llama", {}, "<unk>"),
        ("llama class", {}, "<unk>"),
        ("llama3", {}, "<pad>"),
        ("llama3", {"pad_token": "<|begin_of_text|>"}, "<|begin_of_text|>"),
        ("llama3", {"pad_token": "<|finetune_right_pad_id|>"}, "<|finetune_right_pad_id|>"),
        ("llama3", {"pad_token": "<|end_of_text|>"}, "<pad>"),  # pad = eos would hide the end of a text
        ("llama", {"pad_token": "</s>"}, "<unk>"),
        ("llama", {"pad_token": "</s>", "unk_token": "</s>"}, "<pad>"),  # as GPT-2's
    ],
)
def test_the_pad_token_is_never_the_end_token(maker, names, expected, texts):
    tokenizer = MAKERS[maker](texts)
    for name, token in names.items():
        setattr(tokenizer, name, token)
    assert choose_pad_token(tokenizer) == expected


def test_the_pad_token_of_an_encoder(bert, texts):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert choose_pad_token(tokenizer) == "[PAD]"
    tokenizer.pad_token = "[SEP]"
    assert choose_pad_token(tokenizer) == "[UNK]"


def slices_of(part: list[int], whole: list[int]) -> list[range]:
    """Where `part` stands in `whole`."""
    starts = range(len(whole) - len(part) + 1)
    return [range(i, i + len(part)) for i in starts if whole[i : i + len(part)] == part]


class Parts:
    """The ids of a long ASCII text by part, cut by the lengths of the token strings instead of the backend's offsets."""

    def __init__(self, tokenizer, taxonomy: Taxonomy, question: str, answer: str) -> None:
        whole = TextEncoder(tokenizer, taxonomy, 100_000)
        (window,) = whole.windows([question], [answer])
        assert not window.truncated
        self.begin, self.end = whole.begin_ids, whole.end_ids
        ids = window.ids[len(self.begin) : -len(self.end)]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        place = -1 if tokens[0].startswith("▁") else 0  # LLaMA's puts a space in front
        before, between, _ = taxonomy.template_parts
        start = len(before) + len(question) + len(between)
        spans = (range(len(before), len(before) + len(question)), range(start, start + len(answer)))
        self.question, self.answer, template = [], [], [[], [], []]
        for token, i in zip(tokens, ids, strict=True):
            stop = place + (1 if re.fullmatch("<0x..>", token) else len(token))
            inside = [max(place, span.start) < min(stop, span.stop) for span in spans]
            if inside[0]:
                self.question.append(i)
            elif inside[1]:
                self.answer.append(i)
            else:
                template[(stop > spans[0].start) + (stop > spans[1].start)].append(i)
            place = stop
        self.before, self.between, self.after = template
        assert place == len(taxonomy.render(question, answer)), tokens

    def locate(self, ids: list[int]) -> tuple[range, range]:
        """The stretches of question and answer in a window, which must have everything else in its place."""
        head, tail = self.begin + self.before, self.after + self.end
        assert ids[: len(head)] == head and ids[len(ids) - len(tail) :] == tail
        inner = ids[len(head) : len(ids) - len(tail)]
        found = [
            (question, answer)
            for cut in slices_of(self.between, inner)
            for question in slices_of(inner[: cut.start], self.question)
            for answer in slices_of(inner[cut.stop :], self.answer)
        ]
        assert len(found) == 1, (found, inner)
        return found[0]


def words(mark: str, count: int) -> str:
    """Words that all differ."""
    return " ".join(f"{mark}{i * 37 % 1000:03d}" for i in range(count))


@pytest.mark.parametrize("taxonomy", [TAXONOMY, OTHER_TEMPLATE], ids=["default", "other"])
@pytest.mark.parametrize(("questions", "answers"), [(3, 200), (200, 3), (150, 180), (12, 40), (60, 10), (1, 41)])
@pytest.mark.parametrize("max_length", [96, 130])
def test_windows_lose_nothing(plain, taxonomy, questions, answers, max_length):
    # a first word that is one token with the space before it, which crosses the border
    question, answer = f"How {words('q', questions)}", f"How {words('a', answers)}"
    parts = Parts(plain, taxonomy, question, answer)
    encoder = TextEncoder(plain, taxonomy, max_length)
    windows = encoder.windows([question], [answer])
    assert len(windows) > 1 and all(window.truncated and window.text == 0 for window in windows)
    assert all(len(window.ids) <= max_length for window in windows)
    assert encoder.encode([question], [answer]) == windows[:1]
    assert len(windows[0].ids) == max_length  # no room is wasted
    places = [parts.locate(window.ids) for window in windows]
    for side, whole in enumerate((parts.question, parts.answer)):
        assert {i for place in places for i in place[side]} == set(range(len(whole)))
        starts = sorted({place[side].start for place in places})
        size = len(places[0][side])
        assert {len(place[side]) for place in places} == {size}
        for one, other in itertools.pairwise(starts):
            assert other - one == size - size // 4 or (other == starts[-1] and other - one < size - size // 4)
        if side == 0:  # a question keeps half of the room, or more where the answer leaves it
            room = size + len(places[0][1])
            assert size == min(len(whole), max(room // 2, room - len(parts.answer)))
    # each further stretch stands beside the start of the other text
    assert all(q.start == 0 or a.start == 0 for q, a in places)


@pytest.mark.parametrize(
    ("question", "answer"), [("", "word " * 300), ("word " * 300, ""), ("😀é" * 90, "größe 🏳️‍🌈 " * 60)]
)
def test_windows_of_odd_texts(plain, question, answer):
    check_windows(plain, 64, question, answer)


def check_windows(tokenizer, max_length: int, question: str, answer: str) -> None:
    encoder, whole = (TextEncoder(tokenizer, TAXONOMY, length) for length in (max_length, 100_000))
    windows = encoder.windows([question], [answer])
    assert set().union(*(window.ids for window in windows)) == set(whole.encode([question], [answer])[0].ids)
    for window in windows:
        tokens = tokenizer.convert_ids_to_tokens(window.ids[len(encoder.begin_ids) : -len(encoder.end_ids)])
        shown = re.sub("[▁Ġ]", " ", "".join(tokens)).lstrip()
        assert shown.startswith("BEGINNING OF CONVERSATION: USER:") and " ASSISTANT:" in shown
        assert window.ids[: len(encoder.begin_ids)] == encoder.begin_ids and len(window.ids) <= max_length
        assert window.ids[-1:] == encoder.end_ids


def test_letters_at_a_border_do_not_change_the_template_of_other_windows(texts):
    """A token that holds letters of template and text stands in one stretch alone."""
    taxonomy = Taxonomy(template="Q:{question}|A:{answer}|END")
    state = json.loads(build_tokenizer(texts, 600).backend_tokenizer.to_str())
    vocab, merged = state["model"]["vocab"], [(":", "N"), ("b", "|"), ("z", "|")]
    for token in ("|", "z", *map("".join, merged)):
        vocab.setdefault(token, len(vocab))
    state["model"]["merges"] += [list(pair) for pair in merged]
    state["pre_tokenizer"]["pretokenizers"].pop()  # punctuation no longer stands alone
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    encoder, whole = (TextEncoder(tokenizer, taxonomy, length) for length in (64, 100_000))
    for question, answer in (
        ("N" + words("q", 40) + "b", "N" + words("a", 40) + "z"),
        ("b", "N" + words("a", 40) + "z"),
        ("N" + words("q", 40) + "b", "Nz"),
    ):
        ids = whole.encode([question], [answer])[0].ids
        assert [ids.count(vocab[token]) for token in map("".join, merged)] == [2 if question[0] == "N" else 1, 1, 1]
        windows = encoder.windows([question], [answer])
        shown = [tokenizer.decode(window.ids[1:-1]) for window in windows]
        assert len(windows) > 2 and max(len(window.ids) for window in windows) <= 64
        assert all(re.fullmatch(r"Q:[^|]+\|A:[^|]+\|END", text) for text in shown), shown
        runs = {run for window in windows for run in itertools.pairwise(window.ids)}
        assert runs >= {*itertools.pairwise(ids)}, "a neighbour was lost"


def test_texts_keep_their_order_and_a_text_that_fits_is_one_window(plain, monkeypatch):
    monkeypatch.setattr(tokenization, "_CHUNK", 2)
    encoder = TextEncoder(plain, TAXONOMY, 64)
    prompts, responses = [f"q{i}" for i in range(5)], ["a", words("a", 90), "b", "c", words("b", 60)]
    windows = encoder.windows(prompts, responses)
    texts = [window.text for window in windows]
    assert texts == sorted(texts) and set(texts) == {0, 1, 2, 3, 4}
    first = [next(window for window in windows if window.text == i) for i in range(5)]
    assert encoder.encode(prompts, responses) == first
    assert [texts.count(i) == 1 and not first[i].truncated for i in range(5)] == [True, False, True, True, False]
    assert encoder.windows([], []) == encoder.encode([], []) == []


def test_a_length_too_small_for_the_template_is_refused(plain):
    with pytest.raises(ConfigError, match=r"--max_length 10: the template alone takes \d+ tokens") as caught:
        TextEncoder(plain, TAXONOMY, 10)
    least = int(re.search(r"give at least (\d+)", str(caught.value))[1])
    with pytest.raises(ConfigError):
        TextEncoder(plain, TAXONOMY, least - 1)
    check_windows(plain, least, words("q", 50), words("a", 50))


def test_user_text_never_becomes_a_control_token(tokenizer):
    encoder = TextEncoder(tokenizer, TAXONOMY, 512)
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for window in encoder.encode(*zip(*HOSTILE_PAIRS, strict=True)):
        inner = window.ids[len(encoder.begin_ids) : -len(encoder.end_ids)]
        assert not control.intersection(inner)


def test_merges_that_lead_to_the_end_token_are_not_taken(texts, rows):
    tokenizer = forging_tokenizer(texts)
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    state["added_tokens"] = []
    assert 2 in Tokenizer.from_str(json.dumps(state)).encode("a</s>b").ids  # the trap is real
    encoder = TextEncoder(tokenizer, TAXONOMY, 512)
    ids = encoder.encode(["a</s>b"], ["</s>"])[0].ids
    assert ids.count(2) == 1 and ids[-1] == 2
    assert tokenizer.decode(ids[1:-1]) == "BEGINNING OF CONVERSATION: USER: a</s>b ASSISTANT:</s>"


def test_a_tokenizer_that_user_text_could_forge_is_refused():
    tokenizer = word_tokenizer(["[UNK]", "[END]", "a"], eos_token="[END]")
    with pytest.raises(CheckpointError, match=r"'\[END\]' into the control token 1"):
        TextEncoder(tokenizer, TAXONOMY, 512)


def test_a_tokenizer_without_an_end_token_or_a_backend_is_refused():
    with pytest.raises(CheckpointError, match="no end token; set eos_token"):
        TextEncoder(word_tokenizer(["[UNK]", "a"]), TAXONOMY, 512)

    class Slow:
        name_or_path = "slow"

    with pytest.raises(CheckpointError, match=r"slow: its tokenizer has no `tokenizers` backend"):
        TextEncoder(Slow(), TAXONOMY, 512)


def test_a_lone_surrogate_is_refused(plain):
    encoder = TextEncoder(plain, TAXONOMY, 512)
    for call in (encoder.encode, encoder.windows, encoder.count_tokens):
        with pytest.raises(DataError, match="lone surrogate"):
            call(["fine", "a\ud800"], ["fine", "b"])


@pytest.mark.parametrize("chunk", [3, 4096])
def test_one_pass_gives_what_encode_and_count_tokens_give(plain, chunk, rows, monkeypatch):
    monkeypatch.setattr(tokenization, "_CHUNK", chunk)
    encoder = TextEncoder(plain, OTHER_TEMPLATE, 40)
    pairs = [*((row["prompt"], row["response"]) for row in rows[:20]), (words("q", 90), "a"), ("", words("a", 90))]
    prompts, responses = map(list, zip(*pairs, strict=True))
    ids, counts = encoder.encode_all(prompts, responses)
    expected = [window.ids for window in encoder.encode(prompts, responses)]
    assert [text.tolist() for text in ids] == expected and ids.values.dtype == np.int32
    assert counts.tolist() == encoder.count_tokens(prompts, responses) and max(counts) > 40 == max(map(len, expected))
    assert [len(part) for part in encoder.encode_all([], [])] == [0, 0]


def test_token_ids_are_views_that_travel_whole(plain):
    ids, _ = TextEncoder(plain, TAXONOMY, 64).encode_all([*"abcde"], ["x", "", "y z", "w", "v"])
    texts = [text.tolist() for text in ids]
    assert ids[-1].base is not None and [ids[i].tolist() for i in range(5)] == texts and len({*map(len, texts)}) > 1
    taken = ids.take([4, 1, 1])
    assert [text.tolist() for text in taken] == [texts[4], texts[1], texts[1]] and taken.values is ids.values
    assert [text.tolist() for text in ids[1::2]] == texts[1::2]
    assert [text.tolist() for text in pickle.loads(pickle.dumps(taken))] == [texts[4], texts[1], texts[1]]
    with pytest.raises(IndexError):
        _ = ids[5]


def test_the_state_of_an_encoder_holds_all_that_its_ids_depend_on(texts):
    def state(tokenizer=None, taxonomy=TAXONOMY, max_length=64):
        return TextEncoder(tokenizer or build_tokenizer(texts, 600), taxonomy, max_length).state

    other_end = build_tokenizer(texts, 600)
    other_end.eos_token = "<unk>"
    states = [
        state(),
        state(build_tokenizer(texts, 590)),
        state(other_end),
        state(None, OTHER_TEMPLATE),
        state(None, TAXONOMY, 65),
    ]
    assert len(set(states)) == 5 and state() == states[0]


def reload(tokenizer, directory):
    save_stock_tokenizer(tokenizer, directory)
    # transformers 4 reads this class from tokenizer.json alone; its LLaMA class would drop the end token
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == tokenizer.model_input_names
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("times", [0, 1, 2], ids=["in memory", "reloaded", "reloaded twice"])
def test_the_stock_tokenizer_gives_our_ids(tokenizer, times, rows, tmp_path):
    tokenizer.add_special_tokens({"pad_token": choose_pad_token(tokenizer)})
    encoder = TextEncoder(tokenizer, TAXONOMY, 512)
    prepare_for_stock_use(tokenizer, encoder)
    for time in range(times):
        tokenizer = reload(tokenizer, tmp_path / str(time))
    pairs = [*((row["prompt"], row["response"]) for row in rows[:30]), *HOSTILE_PAIRS]
    ours = [window.ids for window in encoder.encode(*zip(*pairs, strict=True))]
    stock = tokenizer([TAXONOMY.render(*pair) for pair in pairs])["input_ids"]
    assert [pair for pair, one, other in zip(pairs, ours, stock, strict=True) if one != other] == []
    # what was prepared is what a reader of the files gets, and our encoder reads it the same way
    again = TextEncoder(tokenizer, TAXONOMY, 512)
    assert [window.ids for window in again.encode(*zip(*pairs, strict=True))] == ours
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("times", [0, 1], ids=["in memory", "reloaded"])
def test_the_stock_tokenizer_pads_and_cuts_on_the_right(tokenizer, times, tmp_path):
    tokenizer.add_special_tokens({"pad_token": choose_pad_token(tokenizer)})
    prepare_for_stock_use(tokenizer, TextEncoder(tokenizer, TAXONOMY, 64))
    if times:
        tokenizer = reload(tokenizer, tmp_path)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")
    short, long = tokenizer(["a", "a b c d e f g"], padding=True)["input_ids"]
    assert short[0] == long[0] and short[-1] == tokenizer.pad_token_id != long[-1] == tokenizer.eos_token_id
    cut = tokenizer([words("w", 100)], truncation=True)["input_ids"][0]
    assert len(cut) == 64 and cut[-1] == tokenizer.eos_token_id
