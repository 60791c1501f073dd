"""A model served by others: ids in, probabilities out, and the same flags as our own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from qlora_moderation import QAModeration
from qlora_moderation.calibration import Calibrator, RiskModel
from qlora_moderation.classify_api import ClassifyProtocol, ClassifyRequest
from qlora_moderation.errors import CheckpointError, DataError
from qlora_moderation.thresholds import Thresholds

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
HOSTILE = ("Is </s> or <s> a word?", "ASSISTANT: <unk></s>")


@pytest.fixture(scope="module")
def pairs(rows):
    """40 pairs, special strings among them, and two that need several windows."""
    found = [(row["prompt"], row["response"]) for row in rows[:37]]
    return [*found, HOSTILE, ("why " * 90, "so"), (rows[0]["prompt"], "it depends on " * 70)]


@pytest.fixture(scope="module")
def served(runs, pairs, tmp_path_factory):
    """A plain classifier whose thresholds, by either rule, flag about half of the pairs."""
    from qlora_moderation.classifier import load_classifier
    from qlora_moderation.scoring import score_pairs

    source = runs["full"].weights
    classifier = load_classifier(source)
    raw = score_pairs(classifier, *zip(*pairs, strict=True)).probabilities
    taxonomy = classifier.taxonomy
    middle = tuple(find_gap(raw[:, c], 0.3, 0.7) for c in range(raw.shape[1]))
    # of 14 medians almost every pair tops one: flagged has higher ones of its own
    own = tuple(find_gap(raw[:, c], 0.8, 0.93) for c in range(raw.shape[1]))
    risk = RiskModel(weights=tuple(1.0 / (c + 1) for c in range(raw.shape[1])), bias=0.5)
    platt = Calibrator("platt", slope=1.5, intercept=0.25)
    directories = {}
    for rule in ("max", "calibrated"):
        target = tmp_path_factory.mktemp("served") / rule
        shutil.copytree(source, target)
        if rule == "max":
            thresholds = dataclasses.replace(
                Thresholds.default(taxonomy), per_category=middle, flagged_per_category=own
            )
            # `flagged.threshold` must name the same points on the calibrated scale
            thresholds = _common_scale(thresholds, own)
        else:
            thresholds = Thresholds(
                middle,
                (1.0,) * len(middle),
                find_gap(risk.apply(raw), 0.3, 0.7),
                "calibrated",
                (platt,) * len(middle),
                risk,
            )
        thresholds.save(target, taxonomy)
        directories[rule] = target
    return directories


def find_gap(values, low, high):
    """Return the middle of the widest gap between two quantiles, where no noise of another engine moves a value across."""
    inside = np.unique(values)
    inside = inside[int(low * (len(inside) - 1)) : int(high * (len(inside) - 1)) + 1]
    widest = int(np.argmax(np.diff(inside)))
    assert (
        inside[widest + 1] - inside[widest] > 1e-4 * inside[widest]
    )  # a logit's noise is a share of a small probability
    return float(inside[widest : widest + 2].mean())


def _common_scale(thresholds, own):
    """Give each category a map that puts its own threshold at one half."""
    maps = tuple(Calibrator("platt", 1.0, -float(np.log(value / (1 - value)))) for value in own)
    return dataclasses.replace(thresholds, calibrators=maps, flagged_threshold=0.5)


def answer(model, body):
    """Answer as vLLM's pooling runner does: sigmoid of the head at the last token, the likeliest category as label."""
    data = []
    for index, ids in enumerate(body["input"]):
        with torch.no_grad():
            probs = torch.sigmoid(model(torch.tensor([ids])).logits[0].float()).tolist()
        label = model.config.id2label[int(np.argmax(probs))]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
    return {"id": "classify-1", "object": "list", "created": 1, "model": "m", "data": data[::-1], "usage": {}}


@pytest.mark.parametrize("rule", ["max", "calibrated"])
def test_a_server_s_answer_gives_what_predict_gives(rule, served, pairs):
    protocol = ClassifyProtocol.from_pretrained(served[rule])
    questions, answers = map(list, zip(*pairs, strict=True))
    request = protocol.build_request(questions, answers, model="moderator")
    body = json.loads(json.dumps(request.body))
    assert body.keys() == {"model", "input"} and len(body["input"]) > len(pairs)
    assert max(map(len, body["input"])) <= protocol.max_length == 128
    stock = AutoModelForSequenceClassification.from_pretrained(served[rule]).eval()
    assert stock.config.problem_type == "multi_label_classification"
    assert all(ids[0] == stock.config.bos_token_id and ids[-1] == stock.config.eos_token_id for ids in body["input"])
    found = protocol.read_response(request, json.loads(json.dumps(answer(stock, body))))
    ours = QAModeration.from_pretrained(served[rule]).predict(questions, answers)
    for one, other in zip(found, ours, strict=True):
        assert one["text"] == other["text"] and one["risk"] == pytest.approx(other["risk"], abs=1e-5)
        assert one["categories"] == pytest.approx(other["categories"], abs=1e-5)
    flags = [one["flagged"] for one in found]
    assert flags == [one["flagged"] for one in ours] and 5 < sum(flags) < 35
    decided = protocol.read_response(request, answer(stock, body), return_bool=True)
    assert (
        decided[0]["categories"]
        == QAModeration.from_pretrained(served[rule]).predict(questions[0], answers[0], return_bool=True)["categories"]
    )


@pytest.mark.parametrize("rule", ["max", "calibrated"])
def test_the_readme_s_reading_of_stock_probabilities_gives_our_flags(rule, served, pairs):
    """Text instead of ids, transformers' own pipeline, and no line of this library: the block that the README prints."""
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def read(" in code)
    assert "qlora_moderation" not in block.replace("output/quickstart/merged", "")
    variables: dict = {}
    exec(block.replace("output/quickstart/merged", str(served[rule])), variables)
    moderation = QAModeration.from_pretrained(served[rule])
    fitting = [pair for pair in pairs if moderation.classifier.encoder.count_tokens([pair[0]], [pair[1]])[0] <= 128]
    assert len(fitting) > 30 and HOSTILE in fitting
    texts = [variables["render"](*pair) for pair in fitting]
    classify = pipeline("text-classification", model=str(served[rule]), top_k=None, function_to_apply="sigmoid")
    ours = moderation.predict(*map(list, zip(*fitting, strict=True)), return_bool=True)
    names = list(moderation.taxonomy.categories)
    for text, scores, other in zip(texts, classify(texts), ours, strict=True):
        by_name = {score["label"]: score["score"] for score in scores}
        flagged, categories = variables["read"]([by_name[name] for name in names])
        assert text == other["text"] and flagged == other["flagged"]
        assert categories == [name for name, yes in other["categories"].items() if yes]


@pytest.fixture(scope="module")
def protocol(served):
    return ClassifyProtocol.from_pretrained(served["max"])


def response(rows):
    return {"data": [{"index": i, "label": "x", "probs": list(row)} for i, row in enumerate(rows)]}


def spread(count):
    """Rows of 14 probabilities that do not sum to 1."""
    return [[0.01 * (i + c) for c in range(14)] for i in range(count)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"error": {"message": "too long"}}, "holds no data: .*too long"),
        ([], "holds no data"),
        (response(spread(1)), "answered 1 of 2 texts"),
        ({"data": response(spread(1))["data"] * 2}, "answered 2 of 2 texts; each must be answered once"),
        (response([row[:13] for row in spread(2)]), "does not give 14 probabilities"),
        (response([[3.0] * 14, [0.5] * 14]), "no probabilities; do not send use_activation false"),
        (response([[float("nan")] * 14, [0.5] * 14]), "no probabilities"),
        (response([[1 / 14] * 14, [0.35, *[0.05] * 13]]), "compete .softmax.; serve a directory"),
        ({"data": [{"index": 0, "label": "x"}, {"index": 1}]}, "items without index or probs"),
        ({"data": [3, 4]}, "items without index or probs"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(given, message, protocol):
    with pytest.raises(DataError, match=message):
        protocol.read_response(protocol.build_request(["a", "b"], ["c", "d"]), given)


def test_of_several_windows_the_highest_counts(protocol):
    opened = protocol._opened
    plain = ClassifyProtocol(dataclasses.replace(opened, thresholds=Thresholds.default(opened.taxonomy)))
    request = ClassifyRequest({}, ("q", "p"), ("a", "b"), (0, 1, 1))
    rows = [[0.1] * 14, [0.2] * 13 + [0.9], [0.8] + [0.1] * 13]
    one, two = plain.read_response(request, response(rows))
    assert list(one["categories"].values()) == [0.1] * 14 and not one["flagged"]
    assert list(two["categories"].values()) == [0.8, *[0.2] * 12, 0.9] and two["flagged"] and two["risk"] == 0.9


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ("q", "a", "a list of questions"),
        ([], [], "a list of questions"),
        (["q"], [], "one answer for each"),
        (["q"], [3], "is not text"),
    ],
)
def test_bad_pairs_are_refused(questions, answers, message, protocol):
    with pytest.raises(DataError, match=message):
        protocol.build_request(questions, answers)


def test_what_no_server_can_serve_is_refused(runs, served, tmp_path):
    with pytest.raises(CheckpointError, match="is an adapter; merge it"):
        ClassifyProtocol.from_pretrained(runs["lora"].weights)
    shutil.copytree(served["max"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["problem_type"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"problem_type None.*set it to multi_label_classification"):
        ClassifyProtocol.from_pretrained(tmp_path / "m")
