"""Bad models: backbones, adapters and classifiers that are damaged, do not go together, or would run code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from workbench import Bench, case


@case("{folder}/nowhere: no such directory; give the directory of a model, or a hub name as owner/name")
def a_backbone_that_is_not_there(bench):
    return bench.train(model=bench.folder / "nowhere")


@case("{folder}/backbone: holds no readable tokenizer (")
def a_backbone_without_a_tokenizer(bench):
    path = bench.backbone()
    for file in path.glob("tokenizer*"):
        file.unlink()
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_backbone_without_weights(bench):
    path = bench.backbone()
    (path / "model.safetensors").unlink()
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_backbone_cut_off(bench):
    path = bench.backbone()
    bench.write("backbone/model.safetensors", (path / "model.safetensors").read_bytes()[:-1000])
    return bench.train(model=path)


def _shards(bench: Bench) -> Path:
    path = bench.backbone()
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    bench.write("backbone/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": files}))
    return path


@case("{folder}/backbone: its weights cannot be loaded (", "model-00002-of-00002.safetensors")
def a_shard_that_is_missing(bench):
    path = _shards(bench)
    (path / "model-00002-of-00002.safetensors").unlink()
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_shard_cut_off(bench):
    path = _shards(bench)
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    return bench.train(model=path)


@case("{folder}/backbone: 1 weights are missing, the first is model.norm.weight")
def a_weight_that_is_missing(bench):
    path = bench.backbone()
    state = load_file(path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return bench.train(model=path)


def _poison(bench: Bench, value: float) -> Path:
    path = bench.backbone()
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@case("{folder}/backbone: weight model.layers.1.mlp.up_proj.weight is not finite; download the checkpoint again")
def a_weight_that_is_no_number(bench):
    return bench.train(model=_poison(bench, float("nan")))


@case("{folder}/backbone: weight model.layers.1.mlp.up_proj.weight is not finite; download the checkpoint again")
def an_infinite_weight_under_nf4(bench):
    return bench.train(model=_poison(bench, float("inf")), method="qlora")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@case("{folder}/backbone: its weights cannot be loaded (")
def a_pickle_with_code_in_it(bench):
    path = bench.backbone()
    (path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Touch(bench.folder / "run-by-pickle")}, path / "pytorch_model.bin")
    return bench.train(model=path)


@case("{folder}/backbone: its weights cannot be loaded (")
def a_bare_pickle_with_code_in_it(bench):
    path = bench.backbone()
    (path / "model.safetensors").unlink()
    bench.write("backbone/pytorch_model.bin", pickle.dumps(_Touch(bench.folder / "run-by-pickle")))
    return bench.train(model=path)


@case("{folder}/backbone: needs code of its own, which is never run here")
def a_backbone_with_code_of_its_own(bench):
    path = bench.backbone()
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    bench.write("backbone/config.json", json.dumps(config))
    bench.write("backbone/odd.py", f"open({str(bench.folder / 'run-by-model')!r}, 'w')\n")
    return bench.train(model=path)


@case("{folder}/backbone: its config.json cannot be used (")
def a_backbone_whose_numbers_contradict(bench):
    path = bench.backbone()
    config = json.loads((path / "config.json").read_text()) | {"num_attention_heads": 0}
    bench.write("backbone/config.json", json.dumps(config))
    return bench.train(model=path)


@case("{folder}/model: is an adapter, not a backbone; merge it first (scripts/merge_adapter.py)")
def an_adapter_for_a_backbone(bench):
    return bench.train(model=bench.model())


@case("reads at most 2048 tokens; lower --max_length 4096")
def a_length_beyond_the_positions(bench):
    return bench.train(max_length=4096)


@case("{folder}/nowhere: no such directory; give an adapter, full or merged model directory")
def a_model_that_is_not_there(bench):
    return bench.evaluate(bench.folder / "nowhere")


@case("its config.json has 3 labels, its taxonomy 14")
def labels_that_do_not_match_the_taxonomy(bench):
    path = bench.model("full")
    config = json.loads((path / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    config["label2id"] = {"a": 0, "b": 1, "c": 2}
    bench.write("model/config.json", json.dumps(config))
    return bench.evaluate(path)


def _point_to(bench: Bench, base: Path) -> Path:
    path = bench.model()
    settings = json.loads((path / "adapter_config.json").read_text())
    bench.write("model/adapter_config.json", json.dumps(settings | {"base_model_name_or_path": str(base)}))
    return path


@case("{folder}/model: its base model {folder}/gone is gone; name where it lies now")
def a_base_that_is_gone(bench):
    return bench.merge(_point_to(bench, bench.folder / "gone"))


@case("{folder}/model: ", "size mismatch")
def an_adapter_of_another_base(bench):
    from conftest import silent

    from qlora_moderation.embedded import build_llama_shape

    texts = [row["prompt"] + row["response"] for row in bench.rows]
    other = bench.folder / "other"
    build_llama_shape(other, texts, hidden_size=128, num_layers=2, vocab_size=600, steps=0, log=silent)
    return bench.evaluate(_point_to(bench, other))


@case("{folder}/model/adapter_config.json: names no base model; copy the adapter again")
def an_adapter_without_its_settings(bench):
    path = bench.model()
    bench.write("model/adapter_config.json", "{}")
    return bench.merge(path)


@case("{folder}/model/adapter_model.safetensors: cannot be read (", "copy the adapter again")
def an_adapter_cut_off(bench):
    path = bench.model()
    bench.write("model/adapter_model.safetensors", (path / "adapter_model.safetensors").read_bytes()[:-500])
    return bench.evaluate(path)


@case("{folder}/model/adapter_model.safetensors: ", "lora_B.weight is not finite; take an earlier adapter")
def an_adapter_that_is_no_number(bench):
    path = bench.model()
    state = load_file(path / "adapter_model.safetensors")
    state[next(name for name in state if "lora_B" in name)][0, 0] = float("nan")
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return bench.evaluate(path)


@case("--dtype float16: cannot hold ", "use bfloat16 or float32")
def weights_beyond_float16(bench):
    path = bench.model()
    state = load_file(path / "adapter_model.safetensors")
    state = {name: torch.full_like(value, 1e6) if "lora_B" in name else value for name, value in state.items()}
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return bench.merge(path, dtype="float16")


@case("{folder}/model/thresholds.json: ")
def thresholds_cut_off(bench):
    path = bench.model()
    bench.write("model/thresholds.json", (path / "thresholds.json").read_bytes()[:-20])
    return bench.evaluate(path)


@case("{folder}/model/moderation_config.json: ")
def a_meaning_cut_off(bench):
    path = bench.model()
    bench.write("model/moderation_config.json", (path / "moderation_config.json").read_bytes()[:-20])
    return bench.evaluate(path)


@case("--base dequantized: this adapter was trained on plain weights; use --base original")
def a_merge_into_weights_that_never_were(bench):
    return bench.merge(base="dequantized")


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@case("{folder}/model: config.json has 1 layers and no place for model.layers.1.", "copy config.json again")
def a_configuration_with_fewer_layers_than_weights(bench):
    path = bench.model("full")
    _edit(path / "config.json", lambda values: values.update(num_hidden_layers=1))
    return bench.predict(model_path=path)


@case(
    "{folder}/model: output 0 is 'controversial_topics,politics' in config.json and 'animal_abuse' in moderation_config.json"
)
def a_configuration_with_other_categories(bench):
    path = bench.model("full")
    _edit(path / "config.json", lambda values: values["id2label"].update({"0": "controversial_topics,politics"}))
    return bench.predict(model_path=path)


@case("{folder}/model/thresholds.json: is no file; put the file back")
def thresholds_that_are_a_directory(bench):
    path = bench.model("full")
    (path / "thresholds.json").unlink()
    (path / "thresholds.json").mkdir()
    return bench.predict(model_path=path)


@case("{folder}/model/moderation_config.json: cannot be read (No such file or directory)")
def a_meaning_behind_a_link_to_nowhere(bench):
    path = bench.model("full")
    (path / "moderation_config.json").unlink()
    (path / "moderation_config.json").symlink_to(bench.folder / "nowhere.json")
    return bench.predict(model_path=path)


@case("{folder}/model: model_max_length in tokenizer_config.json is 'x', no number; copy the file again")
def a_tokenizer_whose_length_is_no_number(bench):
    path = bench.model("full")
    _edit(path / "tokenizer_config.json", lambda values: values.update(model_max_length="x"))
    return bench.predict(model_path=path)


@case("{folder}/model/moderation_config.json: is not readable as model metadata (weights_dtype is 'int3')")
def a_quantisation_of_an_unknown_type(bench):
    path = bench.model("qlora")
    _edit(path / "moderation_config.json", lambda values: values["quantization"].update(weights_dtype="int3"))
    return bench.merge(path)
