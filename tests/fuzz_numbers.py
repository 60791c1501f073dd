"""Batches of any lengths, and metrics of any decisions beside those of scikit-learn."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
from fuzz import Property
from hypothesis import strategies as st
from sklearn import metrics as sk

from qlora_moderation.batching import count_steps, epoch_order, micro_batches, step_batch
from qlora_moderation.metrics import Judged, compute_agreement, compute_binary_metrics, compute_metrics, measure
from qlora_moderation.serving.planning import plan_batch
from qlora_moderation.thresholds import Judgement

CLOSE = 1e-9

LENGTHS = st.lists(st.integers(1, 40) | st.sampled_from([1, 512, 4096]), max_size=60)


def check_batches(draw: tuple[list[int], int, str, int]) -> None:
    """Texts are dealt once each, within the budget, in equally many micro-batches on every rank, and always the same way."""
    lengths, budget, layout, ranks = draw
    dealt = micro_batches(lengths, budget, layout, ranks)  # type: ignore[arg-type]
    assert dealt == micro_batches(lengths, budget, layout, ranks)  # type: ignore[arg-type]
    assert len(dealt) == ranks and len({len(mine) for mine in dealt}) == 1
    bins = [members for mine in dealt for members in mine]
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
    for members in bins:
        each = [lengths[i] for i in members]
        cost = sum(each) if layout == "packed" else len(each) * max(each, default=0)
        assert len(members) <= 1 or cost <= budget
    if len(lengths) >= len(bins):
        assert all(bins)


def check_epochs(draw: tuple[int, int, int, int]) -> None:
    """Each pair stands once in an epoch, whatever the step; what a step holds is its seed's and size's business alone."""
    size, each, seed, epoch = draw
    steps = count_steps(size, each)
    found = [step_batch(size, each, seed, epoch * steps + step) for step in range(steps)]
    assert sorted(itertools.chain.from_iterable(found)) == list(range(size))
    assert all(len(batch) == each for batch in found[:-1]) and 0 < len(found[-1]) <= each
    epoch_order.cache_clear()
    assert found[-1] == step_batch(size, each, seed, (epoch + 1) * steps - 1)


def check_plan(draw: tuple[list[tuple[list[int], int]], int, int]) -> None:
    """A forward of the server takes at least the oldest request's next window, and no more than its budgets."""
    requests, budget, most = draw
    lengths = [each for each, _ in requests]
    begun = [start % len(each) for each, start in requests]
    taken = plan_batch(lengths, begun, budget, most)
    sizes = [
        size for each, start, count in zip(lengths, begun, taken, strict=True) for size in each[start : start + count]
    ]
    assert all(0 <= count <= len(each) - start for each, start, count in zip(lengths, begun, taken, strict=True))
    if lengths:
        assert taken[0] >= 1
        assert len(sizes) == 1 or (sum(sizes) <= budget and len(sizes) <= most)


_SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.5000001, 1.0]) | st.floats(0, 1)
ROWS = st.lists(
    st.tuples(st.booleans(), st.booleans(), _SCORES, st.sampled_from([0, 1, 1, 2, 7])), min_size=1, max_size=25
)


def _expected(truth: np.ndarray, decided: np.ndarray, score: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Return scikit-learn's numbers; NaN where `measure` says that there is none."""
    keep = weight > 0  # what has no weight is not there
    truth, decided, score, weight = truth[keep], decided[keep], score[keep], weight[keep]
    if not len(truth):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            truth, decided, average="binary", sample_weight=weight, zero_division=0
        )
        kappa = sk.cohen_kappa_score(truth, decided, labels=[False, True], sample_weight=weight)
        both = len(set(truth)) == 2
        return {
            "accuracy": sk.accuracy_score(truth, decided, sample_weight=weight),
            "precision": precision,
            "recall": recall if truth.any() else math.nan,
            "f1": f1,
            "false_positive_rate": weight[decided & ~truth].sum() / weight[~truth].sum()
            if not truth.all()
            else math.nan,
            "flagged_proportion": weight[decided].sum() / weight.sum(),
            "cohen_kappa": kappa,
            "auroc": sk.roc_auc_score(truth, score, sample_weight=weight) if both else math.nan,
            "average_precision": sk.average_precision_score(truth, score, sample_weight=weight)
            if truth.any()
            else math.nan,
        }


def _check_close(found: dict[str, Any], wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        one = math.nan if found[name] is None else float(found[name])
        assert math.isnan(value) == math.isnan(one) and (math.isnan(one) or abs(one - value) <= CLOSE), (
            name,
            one,
            value,
        )


def check_metrics(rows: list[tuple[bool, bool, float, int]]) -> None:
    """Metrics are scikit-learn's, plain and weighted; NaN only where they are undefined."""
    truth, decided, score, weight = (np.array(column) for column in zip(*rows, strict=True))
    weight = weight.astype(float)
    with np.errstate(all="ignore"):
        found = measure(Judged.of(truth, decided, score), np.stack([np.ones(len(truth)), weight]))
    for b, weights in enumerate((np.ones(len(truth)), weight)):
        _check_close({name: values[b] for name, values in found.items()}, _expected(truth, decided, score, weights))
    plain = _expected(truth, decided, score, np.ones(len(truth)))
    agreed = compute_agreement(truth, decided)
    _check_close(
        {**agreed, "accuracy": agreed["agreement"]}, {name: plain[name] for name in ("accuracy", "f1", "cohen_kappa")}
    )
    binary = compute_binary_metrics(truth, decided, score)
    _check_close(binary, {name: value for name, value in plain.items() if name in binary})
    assert binary["support"] == truth.sum()


def check_votes(rows: list[tuple[list[tuple[bool, bool]], float, float]]) -> None:
    """Counting every annotation by itself is what scikit-learn says of the annotations written out; so is their majority."""
    votes = [np.array(each, dtype=bool) for each, _, _ in rows]
    labels = np.array([each.mean(axis=0) for each in votes])
    flagged = np.array([each.any(axis=1).mean() for each in votes])
    raw = np.array([[a, b] for _, a, b in rows])
    judgement = Judgement(raw, raw, raw.max(axis=1), raw.max(axis=1) > 0.5, raw > 0.5)
    annotations = np.array([len(each) for each in votes])
    names = ("a", "b")
    every = compute_metrics(labels, flagged, judgement, names, annotations.astype(float))
    single = compute_metrics(labels, flagged, judgement, names)
    repeat = np.repeat(np.arange(len(rows)), annotations)
    truth = np.concatenate(votes)
    for one, rows_of, truths, anyone in (
        (every, repeat, truth, truth.any(axis=1)),
        (single, np.arange(len(rows)), labels >= 0.5, flagged >= 0.5),
    ):
        parts = {
            "flagged": (anyone, judgement.flagged[rows_of], judgement.risk[rows_of]),
            "micro": (truths.ravel(), judgement.categories[rows_of].ravel(), raw[rows_of].ravel()),
            **{n: (truths[:, c], judgement.categories[rows_of, c], raw[rows_of, c]) for c, n in enumerate(names)},
        }
        wanted = {part: _expected(*columns, np.ones(len(columns[0]))) for part, columns in parts.items()}
        for part, values in wanted.items():
            told = {key: value for key, value in values.items() if f"{part}/{key}" in one}
            assert part != "flagged" or told.keys() == values.keys()
            _check_close({key: one[f"{part}/{key}"] for key in told}, told)
            assert one[f"{part}/support"] == parts[part][0].sum()
        for key in ("precision", "recall", "f1", "auroc", "average_precision"):
            each = [wanted[name][key] for name in names if not math.isnan(wanted[name][key])]
            _check_close({key: one[f"macro/{key}"]}, {key: float(np.mean(each)) if each else math.nan})


_VOTED = st.tuples(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4), _SCORES, _SCORES)

PROPERTIES = {
    "micro-batches": Property(
        st.tuples(LENGTHS, st.integers(1, 600), st.sampled_from(["packed", "padded"]), st.integers(1, 9)),
        check_batches,
        (([3, 3, 3], 5, "packed", 1),),
    ),
    "epochs": Property(
        st.tuples(st.integers(1, 200), st.integers(1, 50), st.integers(), st.integers(0, 9)), check_epochs, weight=0.5
    ),
    "forwards of the server": Property(
        st.tuples(
            st.lists(st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 9)), max_size=6),
            st.integers(1, 100),
            st.integers(1, 8),
        ),
        check_plan,
        (([([1], 0)] * 3, 100, 2),),
        weight=0.5,
    ),
    "metrics": Property(ROWS, check_metrics),
    "metrics of votes": Property(st.lists(_VOTED, min_size=1, max_size=12), check_votes),
}
