"""Tensors on disk: found and read without mapping, written in pieces, damaged files named."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_moderation.errors import CheckpointError
from qlora_moderation.tensor_files import OnlyWholeError, TensorWriter, describe_names, find_tensors, plan_files

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.full((5,), 1.5, dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.ones(2, 0),
    "e": torch.arange(20, dtype=torch.float16)[4:10],
}


def save_bin(directory, tensors=TENSORS, name="pytorch_model.bin", **options):
    torch.save(tensors, directory / name, **options)


def check_all(directory):
    places = find_tensors(str(directory))
    assert set(places) == set(TENSORS)
    for name, place in places.items():
        found = place.read()
        assert found.dtype == TENSORS[name].dtype and torch.equal(found, TENSORS[name]), name


def test_safetensors_are_read_at_their_places(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    check_all(tmp_path)


def test_pickled_shards_are_read_at_their_places(tmp_path):
    names = list(TENSORS)
    save_bin(tmp_path, {name: TENSORS[name] for name in names[:2]}, "pytorch_model-00001-of-00002.bin")
    save_bin(tmp_path, {name: TENSORS[name] for name in names[2:]}, "pytorch_model-00002-of-00002.bin")
    where = {name: f"pytorch_model-0000{1 if i < 2 else 2}-of-00002.bin" for i, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    check_all(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        find_tensors(str(tmp_path))
    where["z"] = "pytorch_model-00001-of-00002.bin"
    save_bin(tmp_path, {name: TENSORS[name] for name in names[2:]}, "pytorch_model-00002-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin lacks z"):
        find_tensors(str(tmp_path))


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/qlora_moderation_was_here",)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    save_bin(tmp_path, {"a": torch.ones(2), "evil": Evil()})
    with pytest.raises(CheckpointError, match="is damaged, or holds more than tensors"):
        find_tensors(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 40, -3])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated_files_are_named(kind, keep, tmp_path):
    if kind == "bin":
        save_bin(tmp_path)
    else:
        save_file(TENSORS, tmp_path / "model.safetensors")
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises((CheckpointError, OnlyWholeError) if kind == "bin" else CheckpointError, match=file.name):
        find_tensors(str(tmp_path))


def test_what_has_no_places_is_left_to_transformers(tmp_path):
    with pytest.raises(OnlyWholeError, match="neither"):
        find_tensors(str(tmp_path))
    save_bin(tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(OnlyWholeError, match=r"before 1\.6"):
        find_tensors(str(tmp_path))
    save_bin(tmp_path, {"t": torch.arange(6.0).view(2, 3).T})
    with pytest.raises(OnlyWholeError, match="no plain contiguous tensor"):
        find_tensors(str(tmp_path))


def test_a_file_that_shrinks_after_it_was_found_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    place = find_tensors(str(tmp_path))["a"]
    place.path.write_bytes(place.path.read_bytes()[: place.offset + 8])
    with pytest.raises(CheckpointError, match="ends too early"):
        place.read()


def test_files_are_filled_in_pieces_and_open_with_stock_loaders(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 3 + i).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(6)}
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with TensorWriter(tmp_path, shapes, file_bytes=250) as writer:
        for name, tensor in reversed(tensors.items()):
            width = tensor.shape[1]
            for start in (4, 0, 8):
                writer.write(name, start * width, tensor[start : start + 4])
    assert len(writer.files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / file)
        assert sum(t.nbytes for t in part.values()) <= 250 or len(part) == 1
        found |= part
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match=r"the weights take .* GiB and 0\.0 GiB are free"):
        TensorWriter(tmp_path, {"a": ((100,), torch.float32)})
    assert list(tmp_path.iterdir()) == []


def test_reading_one_tensor_takes_the_memory_of_one(tmp_path):
    """No mapping and no whole shard: the peak of this process rises by less than half of the file."""
    big = {f"t{i}": torch.zeros(16 * 2**20, dtype=torch.uint8) for i in range(16)}
    torch.save(big, tmp_path / "pytorch_model.bin")
    del big
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in find_tensors(str(tmp_path)).values():
        assert not place.read().any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_plans_keep_the_order_and_the_limit():
    assert plan_files({"a": 5, "b": 5, "c": 1}, 10) == {
        "model-00001-of-00002.safetensors": ["a", "b"],
        "model-00002-of-00002.safetensors": ["c"],
    }
    assert plan_files({"a": 50}, 10) == {"model.safetensors": ["a"]}
    assert describe_names(["lm_head.weight", "l.0.x", "l.1.x"]) == "lm_head.weight, l.*.x (2)"
