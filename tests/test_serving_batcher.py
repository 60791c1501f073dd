"""Requests of many clients in the same forwards: who is taken, who is refused, and what a failure does to the others."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from qlora_moderation.errors import DataError
from qlora_moderation.scoring import CutPairs
from qlora_moderation.serving.batcher import Batcher
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.faults import EngineShortageError, RequestError
from qlora_moderation.serving.instruments import Instruments
from qlora_moderation.serving.planning import plan_batch
from qlora_moderation.tokenization import Window

WIDTH = 10  # tokens of a window of the engine below


class Engine:
    """An engine without a model: an answer of n words is n windows of ten tokens, and its logits are its number of letters.

    The first forward waits until `gate` is opened, so that a test decides what waits together.
    """

    def __init__(self, budget: int = 40, forwards_at_once: int = 1, brief_budget: int | None = None) -> None:
        self.token_budget = budget
        self.brief_budget = brief_budget or budget
        self.forwards_at_once = forwards_at_once
        self.names = ("one", "two")
        self.forwards: list[list[int]] = []
        self.gate = threading.Event()
        self.fault: Exception | None = None

    def cut(self, questions, answers):
        if "uncuttable" in answers:
            raise DataError("canary")
        if "slow" in answers:
            time.sleep(0.05)
        windows = [
            Window([len(word)] * WIDTH, index) for index, answer in enumerate(answers) for word in answer.split()
        ]
        return CutPairs(windows, len(answers), True)

    def score(self, windows):
        self.gate.wait(10)
        first = [window.ids[0] for window in windows]
        self.forwards.append(first)
        if self.fault is not None or 13 in first:
            raise self.fault or ValueError("canary")
        if 14 in first:
            raise EngineShortageError
        logits = np.array([[size, -size] for size in first], dtype=np.float32)
        logits[np.array(first) == 15] = np.nan
        return logits

    def probe(self):
        return self.fault is None


def drive(play, engine: Engine | None = None, **options):
    """Run `play(batcher, engine)` beside the batcher's loop."""

    async def run():
        batcher, chosen = Batcher(ServeConfig(model_path=".", **options), Instruments()), engine or Engine()
        await batcher.load(lambda: chosen)
        loop = asyncio.create_task(batcher.run())
        try:
            result = await asyncio.wait_for(play(batcher, chosen), 20)
            assert batcher.pairs == batcher.queue.tokens == 0 and not batcher.queue and not batcher.queue._open
            return result
        finally:
            chosen.gate.set()
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            batcher.close()

    return asyncio.run(run())


def ask(batcher, *answers):
    return asyncio.create_task(batcher.score([""] * len(answers), answers))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def settle(*tasks):
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("lengths", "begun", "budget", "most", "taken"),
    [
        ([[5], [5], [5]], [0, 0, 0], 10, 9, [1, 1, 0]),
        ([[5, 5, 5, 5], [5]], [0, 0], 15, 9, [2, 1]),
        ([[5, 5, 5, 5], [5]], [2, 0], 100, 9, [2, 1]),
        ([[99], [5]], [0, 0], 10, 9, [1, 0]),
        ([[4], [99], [4]], [0, 0, 0], 10, 9, [1, 0, 1]),
        ([[1], [1], [1]], [0, 0, 0], 10, 2, [1, 1, 0]),
        ([[1, 1, 1]], [0], 10, 1, [1]),
    ],
)
def test_each_request_gives_a_window_in_turn(lengths, begun, budget, most, taken):
    assert plan_batch(lengths, begun, budget, most) == taken


def test_every_window_is_taken_once_and_the_oldest_request_always_gets_on():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [[rng.randint(1, 30) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(1, 12))]
        begun, forwards = [0] * len(lengths), 0
        while any(position < len(sizes) for position, sizes in zip(begun, lengths, strict=True)):
            left = [index for index, sizes in enumerate(lengths) if begun[index] < len(sizes)]
            taken = plan_batch([lengths[i] for i in left], [begun[i] for i in left], 40, 6)
            sizes = [s for i, n in zip(left, taken, strict=True) for s in lengths[i][begun[i] : begun[i] + n]]
            assert taken[0] and len(sizes) <= 6 and sum(sizes) <= 40
            for index, count in zip(left, taken, strict=True):
                begun[index] += count
            forwards += 1
        assert begun == [len(sizes) for sizes in lengths]


def test_what_waits_is_scored_together_and_everyone_gets_his_own():
    async def play(batcher, engine):
        first = ask(batcher, "a")
        await until(lambda: batcher._working)
        tasks = [ask(batcher, "b" * n) for n in range(1, 8)] + [ask(batcher, "bb", "bbb bbbbbb b")]
        await until(lambda: len(batcher.queue) == 8)
        engine.gate.set()
        await first
        return await asyncio.gather(*tasks), engine.forwards

    answers, forwards = drive(play)
    assert [scores.logits.tolist() for scores in answers[:7]] == [[[n, -n]] for n in range(1, 8)]
    assert answers[7].logits.tolist() == [[2, -2], [6, -1]] and answers[7].windows.tolist() == [1, 3]
    assert answers[7].first_window_logits.tolist() == [[2, -2], [3, -3]]
    assert [len(forward) for forward in forwards] == [1, 4, 4, 3]
    assert sum(map(len, forwards)) == 12


def test_forwards_at_once_share_what_waits():
    async def play(batcher, engine):
        tasks = [ask(batcher, "a"), ask(batcher, "bb"), ask(batcher, "ccc ddd")]
        await until(lambda: len(batcher._working) == 3)
        late = ask(batcher, "eeee eeee eeee")
        await until(lambda: len(batcher.queue) == 1)
        engine.gate.set()
        return [*await asyncio.gather(*tasks, late)], sorted(engine.forwards)

    engine = Engine(forwards_at_once=3)
    answers, forwards = drive(play, engine)
    assert [scores.logits.tolist() for scores in answers] == [[[1, -1]], [[2, -2]], [[3, -3]], [[4, -4]]]
    assert (
        sum(map(len, forwards)) == 7 and forwards[:2] == [[1], [2]] and [3, 3] in forwards
    )  # nobody waits for the others


def test_forwards_are_brief_until_much_waits():
    async def play(batcher, engine):
        first = ask(batcher, "a")
        await until(lambda: batcher._working)
        tasks = [ask(batcher, "bb") for _ in range(12)]
        await until(lambda: len(batcher.queue) == 12)
        engine.gate.set()
        await asyncio.gather(first, *tasks)
        return [len(forward) for forward in engine.forwards]

    # of 120 tokens a quarter, then never less than 20
    assert drive(play, Engine(brief_budget=20)) == [1, 3, 2, 2, 2, 2, 1]


def test_windows_of_one_request_come_back_in_any_order():
    async def play(batcher, engine):
        late, score = threading.Event(), engine.score

        def score_out_of_order(windows):
            if windows[0].ids[0] == 1:
                late.wait(10)
            found = score(windows)
            late.set()
            return found

        engine.score = score_out_of_order
        engine.gate.set()
        return await ask(batcher, "a", "bb", "ccc", "dddd")

    scores = drive(play, Engine(budget=20, forwards_at_once=2))
    assert scores.logits.tolist() == [[n, -n] for n in range(1, 5)]


@pytest.mark.parametrize(("wait", "forwards"), [(5000, [[1, 4]]), (0, [[1], [4]])])
def test_an_idle_model_waits_for_those_who_are_being_tokenised(wait, forwards):
    async def play(batcher, engine):
        engine.gate.set()
        await asyncio.gather(ask(batcher, "a"), ask(batcher, "slow"))
        return engine.forwards

    assert drive(play, batch_wait_ms=wait) == forwards


def test_a_full_queue_refuses_with_the_time_to_come_again():
    async def play(batcher, engine):
        tasks = [ask(batcher, "a", "a") for _ in range(2)]
        refused = (await settle(ask(batcher, "a")))[0]
        assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        engine.gate.set()
        await asyncio.gather(*tasks)
        await ask(batcher, "a", "a", "a", "a")

    drive(play, max_queue_pairs=4)


def test_the_queue_is_bounded_in_tokens_too():
    async def play(batcher, engine):
        first = ask(batcher, "a")
        await until(lambda: batcher._working)
        second = ask(batcher, "a a a")
        await until(lambda: batcher.queue.tokens == 3 * WIDTH)
        refused, too_long = await settle(ask(batcher, "a a"), ask(batcher, "a a a a a"))
        assert refused.status == 429
        assert too_long.status == 422 and "50 tokens" in too_long.message and "40" in too_long.message
        third = ask(batcher, "a")
        await until(lambda: batcher.queue.tokens == 4 * WIDTH)
        with pytest.raises(RequestError, match="too much is waiting"):
            batcher.check_room()
        engine.gate.set()
        await asyncio.gather(first, second, third)

    drive(play, max_queue_tokens=40)


def test_a_full_queue_tokenises_nothing_until_a_forward_has_room():
    async def play(batcher, engine):
        cuts, cut = [], engine.cut
        engine.cut = lambda questions, answers: cuts.append(answers) or cut(questions, answers)
        first = ask(batcher, "a")
        await until(lambda: batcher._working)
        waiting = [ask(batcher, " ".join("a" * 19)) for _ in range(2)]
        await until(lambda: batcher.queue.tokens == 38 * WIDTH)
        refused = (await settle(ask(batcher, "a a a")))[0]
        assert refused.status == 429 and len(cuts) == 4
        refused = (await settle(ask(batcher, "a")))[0]  # would fit, but so near the brim most would not
        assert refused.status == 429 and len(cuts) == 4
        engine.gate.set()
        await asyncio.gather(first, *waiting)
        await ask(batcher, "a")

    drive(play, max_queue_tokens=400)


def test_who_has_gone_is_not_scored():
    async def play(batcher, engine):
        first = ask(batcher, "a a a a a a")
        await until(lambda: batcher._working)
        gone, stays = ask(batcher, "bb"), ask(batcher, "ccc")
        await until(lambda: len(batcher.queue) == 3)
        gone.cancel()
        first.cancel()  # two of its windows have not begun
        await settle(gone, first)
        engine.gate.set()
        await stays
        return engine.forwards

    assert drive(play) == [[1, 1, 1, 1], [3]]


def test_one_bad_request_does_not_take_the_others_down(caplog):
    async def play(batcher, engine):
        first = ask(batcher, "a")
        await until(lambda: batcher._working)
        tasks = [ask(batcher, answer) for answer in ("bb", "b" * 13, "b" * 15, "ccc")]
        await until(lambda: len(batcher.queue) == 4)
        engine.gate.set()
        await first
        return [
            *await settle(*tasks),
            *await settle(ask(batcher, "b" * 14), ask(batcher, "uncuttable")),
            batcher.broken,
        ]

    good, bad, odd, fine, shortage, uncuttable, broken = drive(play)
    assert good.logits.tolist() == [[2, -2]] and fine.logits.tolist() == [[3, -3]] and not broken
    assert (bad.status, bad.code) == (500, "model_failed")
    assert (odd.status, odd.code) == (500, "not_finite")
    assert (shortage.status, shortage.code) == (503, "out_of_memory") and shortage.headers["retry-after"] == "1"
    assert (uncuttable.status, uncuttable.code) == (500, "model_failed")
    assert "canary" not in caplog.text + str([bad, odd, uncuttable])


def test_a_model_that_fails_on_everything_is_called_broken_until_it_answers(monkeypatch):
    monkeypatch.setattr("qlora_moderation.serving.batcher._PROBE_SECONDS", 0.01)

    async def play(batcher, engine):
        engine.gate.set()
        engine.fault = RuntimeError("canary")
        failed = await settle(ask(batcher, "a"))
        await until(lambda: batcher.broken)
        engine.fault = None
        await until(lambda: not batcher.broken)
        await ask(batcher, "a")
        return failed[0]

    assert drive(play).status == 500


def test_several_idle_loops_send_one_probe_at_a_time(monkeypatch):
    monkeypatch.setattr("qlora_moderation.serving.batcher._PROBE_SECONDS", 0.01)

    async def play(batcher, engine):
        engine.gate.set()
        at_once, most, probe = [], [0], engine.probe

        def watch():
            at_once.append(1)
            most[0] = max(most[0], len(at_once))
            time.sleep(0.02)
            at_once.pop()
            return probe()

        engine.probe, engine.fault = watch, RuntimeError("canary")
        await settle(ask(batcher, "a"))
        await asyncio.sleep(0.2)
        engine.fault = None
        await until(lambda: not batcher.broken)
        return most[0]

    assert drive(play, Engine(forwards_at_once=4)) == 1


def test_giving_up_answers_everyone():
    async def play(batcher, engine):
        tasks = [ask(batcher, "a"), ask(batcher, "a a a a a")]
        await until(lambda: batcher._working and batcher.pairs == 2 and len(batcher.queue._open) == 2)
        batcher.queue.give_up()
        return await settle(*tasks)

    assert [(error.status, error.code) for error in drive(play)] == [(503, "stopped")] * 2


def test_metrics_tell_batches_and_depth():
    instruments = Instruments()
    instruments.watch(lambda: 3, lambda: 70, lambda: 1)
    instruments.batch_windows.observe(5)
    text = instruments.render().decode()
    assert "qlora_moderation_queue_pairs 3.0" in text and "qlora_moderation_queue_tokens 70.0" in text
    assert 'qlora_moderation_batch_windows_bucket{le="8.0"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    judged = SimpleNamespace(
        risk=np.array([0.2, 0.9]),
        flagged=np.array([False, True]),
        probabilities=np.array([[0.2, 0.1], [0.9, 0.3]]),
        categories=np.array([[False, False], [True, False]]),
    )
    instruments.count_verdicts(("one", "two"), judged, ["pair", "answer_only"])
    text = instruments.render().decode()
    assert "qlora_moderation_flagged_total 1.0" in text and 'qlora_moderation_pairs_total{context="pair"} 1.0' in text
    assert 'qlora_moderation_category_flagged_total{category="one"} 1.0' in text
    assert 'qlora_moderation_category_score_bucket{category="one",le="0.2"} 1.0' in text
