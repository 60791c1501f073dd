"""Several processes on the CPU through gloo: the same steps, the same files, whatever their number."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import grid
import kills
import numpy as np
import pytest
import rank_cases
import torch
from conftest import make_config
from grid import losses, norms, options
from rank_cases import bench_sharding
from ranks import run_ranks
from safetensors.torch import load_file

from qlora_moderation.checkpoint import find_checkpoints
from qlora_moderation.classifier import load_classifier
from qlora_moderation.config import EvaluateConfig
from qlora_moderation.evaluate import evaluate
from qlora_moderation.memory import compute_static_memory
from qlora_moderation.scoring import score_pairs
from qlora_moderation.train import train


@pytest.mark.parametrize("method", grid.METHODS)
def test_law_1_processes_sharding_budget_and_recomputation_change_no_step(method, llama, rows, rows_file, tmp_path):
    texts = [row["prompt"] for row in rows[:64]], [row["response"] for row in rows[:64]]
    cells = grid.COVERING if method == "lora" else grid.ONCE  # the campaign has all cells of all methods
    differences, skipped = grid.measure(method, cells, llama, rows_file, texts, tmp_path, steps=6)
    assert len(differences) == len(cells) + 1 and not skipped
    assert not {name: each for name, each in differences.items() if each.fails}


@pytest.mark.parametrize("pairs", [2, 4])
def test_law_1_holds_where_a_step_has_fewer_texts_than_there_are_ranks(pairs, llama, rows, tmp_path):
    """Steps of at most 3 distinct pairs, and a last one of a single pair: some of three ranks have only fillers."""
    few = list({(row["prompt"], row["response"]): row for row in rows}.values())[:pairs]
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in few))
    more = {"max_steps": 4, "max_grad_norm": 0.0}
    train(make_config(llama, data, tmp_path / "one", per_device_train_batch_size=3, **more), lambda line: None)
    kinds = {
        "ddp": {"sharding": "ddp"},
        "fsdp": {"sharding": "fsdp"},
        "fsdp of attentions": {"sharding": "fsdp", "fsdp_transformer_layer_cls_to_wrap": "LlamaAttention"},
    }
    cases = [
        (
            "learn",
            {
                "options": options(llama, data, tmp_path / kind, 3, **more, **sharding)
                | {"per_device_train_batch_size": 1}
            },
        )
        for kind, sharding in kinds.items()
    ]
    run_ranks(3, rank_cases.run_all, cases)
    for kind in kinds:
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert norms(tmp_path / kind) == pytest.approx(norms(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_weights_of_a_sharded_run_have_the_files_of_one_process(method, llama, rows_file, tmp_path, monkeypatch):
    more = {"method": method, "max_steps": 2}
    alone = train(make_config(llama, rows_file, tmp_path / "alone", **more), lambda line: None)
    run_ranks(2, rank_cases.learn, options(llama, rows_file, tmp_path / "two", 2, sharding="fsdp", **more))
    together = tmp_path / "two" / alone.name
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    for name in {"adapter_config.json", "config.json", "moderation_config.json"} & set(map(str, together.iterdir())):
        assert json.loads((together / name).read_text()) == json.loads((alone / name).read_text())
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    one, two = load_file(alone / name), load_file(together / name)
    assert {key: (t.shape, t.dtype) for key, t in one.items()} == {key: (t.shape, t.dtype) for key, t in two.items()}


def test_a_full_model_is_written_file_by_file(llama, rows_file, tmp_path):
    """Each file by another rank, and none of them whole on one: the result is a plain sharded checkpoint."""
    settings = options(llama, rows_file, tmp_path / "run", 2, sharding="fsdp", method="full", max_steps=2)
    held = run_ranks(2, rank_cases.run_all, [("learn_in_small_files", {"options": settings, "file_bytes": 100_000})])
    index = json.loads((tmp_path / "run" / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 4
    assert all(rank[0] <= 0.7 * index["metadata"]["total_size"] for rank in held)
    run_ranks(2, rank_cases.learn, settings | {"output_dir": str(tmp_path / "plain")})
    texts = ["How?"] * 2, ["So.", "Never do that."]
    logits = [score_pairs(load_classifier(tmp_path / run / "model"), *texts).logits for run in ("run", "plain")]
    np.testing.assert_array_equal(*logits)


def test_an_encoder_computes_in_bfloat16_and_has_an_fp32_head(bert, rows_file, tmp_path):
    more = {"max_steps": 2, "dtype": "bfloat16"}
    cases = [
        (
            "learn",
            {
                "options": options(
                    bert, rows_file, tmp_path / f"{method}-{kind}", 2, sharding=kind, method=method, **more
                )
            },
        )
        for method, kind in itertools.product(("lora", "full"), ("ddp", "fsdp"))
    ]
    run_ranks(2, rank_cases.run_all, cases)
    for method in ("lora", "full"):
        ddp, fsdp = (losses(tmp_path / f"{method}-{kind}") for kind in ("ddp", "fsdp"))
        assert fsdp == pytest.approx(ddp, rel=2e-2)


def test_a_directory_that_the_machines_do_not_share_is_refused(llama, rows_file, tmp_path):
    settings = options(llama, rows_file, Path("run"), 2, sharding="fsdp")
    said = [
        result[0]
        for result in run_ranks(
            2, rank_cases.run_all, [("learn_elsewhere", {"options": settings, "root": str(tmp_path)})]
        )
    ]
    assert said[0].startswith("SaidByMainError")
    assert "must lie on a disk that all machines share, and rank 1 sees another" in said[1]


@pytest.mark.parametrize("name", ["Linear", "ModuleList", "LlamaForSequenceClassification", "LlamaDecoderLayr"])
def test_a_class_that_is_no_layer_is_refused(name, llama, rows_file, tmp_path):
    more = {"sharding": "fsdp", "fsdp_transformer_layer_cls_to_wrap": name, "method": "full"}
    case = ("fail", {"options": options(llama, rows_file, tmp_path / "run", 1, **more)})
    (said,) = run_ranks(1, rank_cases.run_all, [case])[0]
    assert said.startswith("ConfigError: --fsdp_transformer_layer_cls_to_wrap") and "LlamaDecoderLayer" in said


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_encoder_is_sharded_too(method, bert, rows_file, tmp_path):
    more = {"method": method, "max_steps": 3, "max_tokens_per_micro_batch": 256}
    train(make_config(bert, rows_file, tmp_path / "one", **more), lambda line: None)
    cases = [
        ("learn", {"options": options(bert, rows_file, tmp_path / kind, 2, sharding=kind, **more)})
        for kind in ("ddp", "fsdp")
    ]
    run_ranks(2, rank_cases.run_all, cases)
    for kind in ("ddp", "fsdp"):
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_scoring_is_shared_and_keeps_the_order(llama, build, rows, rows_file, tmp_path):
    prompts, responses = [row["prompt"] for row in rows[:40]], [row["response"] for row in rows[:40]]
    expected = score_pairs(build(llama), prompts, responses).logits
    for kind in ("ddp", "fsdp"):
        settings = options(llama, rows_file, tmp_path, 1, sharding=kind)
        arguments = {"options": settings, "prompts": prompts, "responses": responses, "budget": 256}
        results = [result[0] for result in run_ranks(3, rank_cases.run_all, [("score", arguments)])]
        for every, few, _ in results:
            np.testing.assert_allclose(every, expected, atol=1e-5)
            for logits, count in zip(few, (1, 2, 0), strict=True):
                np.testing.assert_allclose(logits, expected[:count], atol=1e-5)
        texts = [count for _, _, count in results]
        assert sum(texts) == 40 if kind == "ddp" else sum(texts) <= 42, "each text once, and at most a filler a rank"
        assert max(texts) - min(texts) <= 8


def test_evaluation_is_shared(runs, rows_file, tmp_path):
    settings = {"model_path": str(runs["lora"].weights), "eval_dataset": str(rows_file), "use_cpu": True}
    alone = evaluate(EvaluateConfig(output_dir=str(tmp_path / "one"), **settings), lambda line: None)
    case = ("judge", {"options": settings | {"output_dir": str(tmp_path / "two")}})
    results = run_ranks(2, rank_cases.run_all, [case])
    for (metrics,) in results:
        assert metrics == pytest.approx(alone["metrics"], abs=1e-6)
    lines = [(tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["prompt"] for line in lines[0]] == [json.loads(line)["prompt"] for line in lines[1]]


def test_every_rank_gets_the_weights_of_rank_0_and_no_more_than_its_share(llama, rows_file, tmp_path):
    for method in ("lora", "qlora", "full"):
        alone = rank_cases.load_and_compare(options(llama, rows_file, tmp_path, 1, method=method))
        capacity = rank_cases.open_classifier(options(llama, rows_file, tmp_path, 1, method=method)).capacity
        network = capacity.blueprint.build(torch.device("meta"))[0]
        for kind in ("ddp", "fsdp"):
            settings = options(llama, rows_file, tmp_path, 1, method=method, sharding=kind)
            results = run_ranks(2, rank_cases.run_all, [("load_and_compare", {"options": settings})])
            foreseen = compute_static_memory(network, "adamw_torch", slices=1 if kind == "ddp" else 2)
            assert results[0][0]["held"] == foreseen["weights"] + foreseen["adapters"], (method, kind)
            for held in results:
                assert held[0]["kind"] == kind
                assert held[0]["buffers"] == alone["buffers"]
                assert held[0]["whole"] == alone["whole"]
                share = 1.0 if kind == "ddp" else 0.5
                assert held[0]["held"] == pytest.approx(share * alone["held"], rel=0.05)


def test_full_training_computes_in_bfloat16_and_keeps_fp32(llama, rows_file, tmp_path):
    settings = options(llama, rows_file, tmp_path, 1, method="full", sharding="fsdp", dtype="bfloat16")
    for found in run_ranks(2, rank_cases.run_all, [("describe_precision", {"options": settings})]):
        assert found[0]["layer"] == found[0]["weight"] == found[0]["out"] == torch.bfloat16
        assert found[0]["head"] == found[0]["logits"] == torch.float32
        assert found[0]["kept"] == found[0]["gradients"] == {torch.float32}


def test_every_bit_pattern_of_an_nf4_payload_comes_back(llama, rows_file, tmp_path):
    settings = options(llama, rows_file, tmp_path, 1, method="qlora", sharding="fsdp")
    cases = [("gather_every_pattern", {}), ("find_changed_bytes", {"options": settings})]
    results = run_ranks(2, rank_cases.run_all, cases)
    assert all(patterns for patterns, _ in results)
    assert [count for _, (count, _) in results] == [14, 14]
    said = [text for _, (_, text) in results]
    assert said[0].startswith("ConfigError: the NF4 weights of 1 layers changed") and "--sharding ddp" in said[0]
    assert said[1].startswith("SaidByMainError")


def test_auto_decides_by_memory_and_says_why(llama, rows_file, tmp_path):
    for method in ("full", "qlora"):
        settings = options(llama, rows_file, tmp_path, 1, method=method)
        cases = [("choose", {"options": settings, "memory": memory}) for memory in (2 * 10**9, 2**30 + 500_000)]
        (roomy, tight), _ = run_ranks(2, rank_cases.run_all, cases)
        assert roomy[0] == "ddp" and "ddp with checkpointing none needs an estimated 0." in roomy[1]
        assert "which fits the 1.9 GiB of cpu memory for each process less 1.00" in roomy[1]
        assert tight[0] == "fsdp" and tight[1].startswith("nothing fits the 1.0 GiB of cpu memory")


def test_what_fails_on_one_rank_stops_all_and_is_said_once():
    assert run_ranks(2, rank_cases.run_all, [("agree_on_errors", {"kind": "main"})]) == [
        ["DataError: row 7 is broken"],
        ["SaidByMainError: rank 0 stopped"],
    ]
    assert run_ranks(2, rank_cases.run_all, [("agree_on_errors", {"kind": "other"})]) == [
        ["SaidByMainError: rank 1 stopped"],
        ["DataError: rank 1 has no disk"],
    ]


def test_a_rank_that_fails_behind_another_says_so_in_a_line_whatever_it_met():
    behind, first = run_ranks(2, rank_cases.run_all, [("report_odd_faults", {})])
    assert first == ["[rank 1] ValueError: rank 1 has lost its mind"]
    assert behind == ["[rank 0] lost contact with rank 1, whose error stands in the same log (KeyError: 'a buffer')"]


def test_gradients_are_summed_and_a_missing_one_is_zero():
    expected = [[3.0] * 3, [2.0] * 2, [3.0]]
    assert run_ranks(2, rank_cases.run_all, [("sum_some_gradients", {})]) == [[expected], [expected]]


@pytest.mark.parametrize(
    ("before", "after"), [((2, "fsdp"), (1, "none")), ((1, "none"), (2, "fsdp")), ((2, "fsdp"), (2, "ddp"))]
)
def test_a_checkpoint_is_taken_up_by_another_number_of_processes(before, after, llama, rows_file, tmp_path):
    more = {"method": "qlora", "save_strategy": "steps", "save_steps": 3, "max_steps": 8, "optim": "adamw_torch_fused"}
    whole = train(make_config(llama, rows_file, tmp_path / "whole", **more), lambda line: None)
    run = tmp_path / "run"
    for index, (count, kind) in enumerate((before, after)):
        settings = options(llama, rows_file, run, count, sharding=kind, **more)
        case = ("learn_until", {"options": settings, "step": 5 if index == 0 else -1, "number": signal.SIGTERM})
        results = run_ranks(count, rank_cases.run_all, [case])
        assert results[0][0] == ((143, "interrupted, resumable") if index == 0 else (0, "finished"))
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    texts = ["How?"] * 2, ["So.", "Never do that."]
    logits = [score_pairs(load_classifier(path), *texts).logits for path in (whole, run / "adapter")]
    np.testing.assert_allclose(*logits, atol=1e-4)


@pytest.mark.parametrize(("number", "code", "method"), [(signal.SIGTERM, 143, "full"), (signal.SIGINT, 130, "lora")])
def test_a_signal_to_any_rank_stops_all_behind_a_checkpoint(number, code, method, llama, rows_file, tmp_path):
    """The checkpoint follows an evaluation, which leaves gathered weights behind if it is not careful."""
    more = {"sharding": "fsdp", "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "method": method}
    more["lora_dropout"] = 0.1 if method == "lora" else 0.0
    unbroken = options(llama, rows_file, tmp_path / "unbroken", 2, **more)
    stopped = options(llama, rows_file, tmp_path / "stopped", 2, **more)
    signalled = {"options": stopped, "step": 4, "number": number, "by": 1}
    results = run_ranks(2, rank_cases.run_all, [("learn", {"options": unbroken}), ("learn_until", signalled)])
    assert [result[1] for result in results] == [(code, "interrupted, resumable")] * 2
    assert [path.name for path in find_checkpoints(tmp_path / "stopped")] == ["step-000004"]
    run_ranks(2, rank_cases.learn, stopped)
    kills.compare(tmp_path / "unbroken", tmp_path / "stopped")


def test_a_full_disk_on_one_rank_leaves_the_earlier_checkpoint(llama, rows_file, tmp_path):
    more = {"sharding": "fsdp", "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "method": "full"}
    settings = options(llama, rows_file, tmp_path / "run", 2, **more)
    said = [
        result[0]
        for result in run_ranks(
            2, rank_cases.run_all, [("learn_with_full_disk", {"options": settings, "step": 3, "by": 1})]
        )
    ]
    assert any(text.startswith("CheckpointError:") and "step-000004: cannot be written" in text for text in said), said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    log = run_ranks(2, rank_cases.learn, settings)[0]
    assert any("going on from step-000002" in line for line in log)


def test_a_full_disk_while_the_weights_are_written_is_said_by_the_rank_that_met_it(llama, rows_file, tmp_path):
    settings = options(llama, rows_file, tmp_path / "run", 2, sharding="fsdp", method="full", max_steps=2)
    case = ("learn_with_full_disk", {"options": settings, "step": 2, "by": 1, "file_bytes": 100_000})
    said = [result[0] for result in run_ranks(2, rank_cases.run_all, [case])]
    assert said[0].startswith("SaidByMainError") and "model: cannot be written" in said[1]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("count", [2, 4])
def test_the_wire_carries_what_theory_asks_for(count, llama, rows_file, tmp_path):
    """Bytes sent by one rank in a step, counted at the collectives; one micro-batch a rank and step."""
    for method in ("lora", "qlora", "full"):
        common = {"method": method, "max_steps": 2, "max_tokens_per_micro_batch": 4096}
        expected = bench_sharding.theory(options(llama, rows_file, tmp_path, 1, method=method), count)
        runs = [
            options(llama, rows_file, tmp_path / f"{method}-{kind}", count, sharding=kind, **common)
            for kind in ("ddp", "fsdp")
        ]
        for sent in run_ranks(count, rank_cases.run_all, [("count_bytes", {"options": run}) for run in runs]):
            for collectives, least in zip(sent, expected, strict=True):
                assert least <= sum(collectives.values()) <= 1.05 * least, (method, collectives, least)


@pytest.mark.parametrize(("processes", "method"), [(1, "lora"), (2, "qlora")])
def test_law_6_a_run_killed_at_any_instant_ends_like_one_that_was_not(processes, method, llama, rows_file, tmp_path):
    """Five kills each, at random instants and in the middle of writing; scripts/stress.sh does hundreds."""
    more = {"method": method, "max_steps": 12, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    more |= {"eval_strategy": "steps", "eval_steps": 3, "lora_dropout": 0.1, "max_tokens_per_micro_batch": 256}
    more |= {"sharding": "fsdp" if processes > 1 else "none"}

    def settings(run: Path) -> dict:
        return options(llama, rows_file, run, processes, **more)

    tally = kills.campaign(settings, processes, kills=5, folder=tmp_path, seed=0)
    assert tally.kills == 5 and tally.runs >= 1


def test_gradients_wait_for_the_last_micro_batch_of_a_step(llama, rows_file, tmp_path):
    """Many micro-batches a step: each gathers its weights, but gradients travel once."""
    part = 1 / 2
    more = {"max_steps": 2, "max_tokens_per_micro_batch": 128, "gradient_accumulation_steps": 2}
    alone = rank_cases.open_classifier(options(llama, rows_file, tmp_path, 1)).model
    trained = sum(4 * p.numel() for p in alone.parameters() if p.requires_grad)
    runs = [options(llama, rows_file, tmp_path / kind, 2, sharding=kind, **more) for kind in ("ddp", "fsdp")]
    for ddp, fsdp in run_ranks(2, rank_cases.run_all, [("count_bytes", {"options": run}) for run in runs]):
        assert sum(ddp.values()) <= 1.05 * 2 * part * trained
        reduced = sum(number for name, number in fsdp.items() if name.startswith("reduce_scatter"))
        gathered = sum(number for name, number in fsdp.items() if name.startswith("all_gather"))
        assert part * trained <= reduced <= 1.05 * part * trained
        assert gathered > 4 * bench_sharding.theory(options(llama, rows_file, tmp_path, 1), 2)[1] - reduced
