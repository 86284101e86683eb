"""Caches of encoded images: all that is told goes with them, relabelled data are other data, files are read in slices."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small import small
from test_told import items, several
from test_training import DATA, Squares
from torch import Tensor

import nextscale as ns
from nextscale import encoded
from nextscale.data.transforms import AugmentSettings
from nextscale.draws import Draws
from nextscale.encoded import Choices, encode_images
from nextscale.readers import TensorReader
from nextscale.recipes.generators import infinity, var


class Named(torch.utils.data.Dataset):
    """Images with texts, and what they say without decoding them."""

    def __init__(self, words):
        self.words, self.decoded = words, 0

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        self.decoded += 1
        image = torch.full((3, 64, 64), index / len(self))
        return {"image": image, "mirror_ok": True, **self.said(index)}

    def said(self, index):
        return {"caption": self.words[index]}


def test_relabelled_data_are_other_data(tmp_path):
    system = infinity.build(infinity.tiny(), seed=1)
    first, other = Named(["a", "b", "c", "d"] * 8), Named(["a", "b", "c", "d"] * 7 + ["a", "b", "d", "c"])
    encode_images(system, first, tmp_path)
    first.decoded = 0
    assert list(encode_images(system, first, tmp_path, strict=True).said()["caption"]) == first.words
    assert first.decoded <= 17  # what is said needs no image; sixteen are looked at, and the first
    with pytest.raises(ValueError, match="another told"):
        encode_images(system, other, tmp_path, strict=True)
    assert list(encode_images(system, other, tmp_path).said()["caption"]) == other.words

    classes = var.build(small(num_classes=5), seed=1)
    squares, relabelled = Squares(12), Squares(12)
    relabelled.items = [item | {"label": 4, "labels": (4,)} for item in squares.items]
    encode_images(classes, squares, tmp_path / "classes")
    with pytest.raises(ValueError, match="another told"):
        encode_images(classes, relabelled, tmp_path / "classes", strict=True)
    assert set(encode_images(classes, relabelled, tmp_path / "classes").said()["label"]) == {4}


@pytest.mark.parametrize("in_memory", [2**30, 0])
def test_labels_texts_and_tensors_go_through_the_cache(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(encoded, "SHARD", 3)
    monkeypatch.setattr(encoded, "IN_MEMORY", in_memory)
    system, data = several(), items()
    plain, cached = encode_images(system, data), encode_images(system, data, tmp_path)
    for images in (plain, cached):
        assert len(images) == 8
        said = images.said()
        assert list(said["label"]) == [item["label"] for item in data]
        assert list(said["style"]) == [item["style"] for item in data]
        for got, item in zip(said["map"], data, strict=True):
            assert got is None if item["map"] is None else torch.equal(got, item["map"])
        batch = images.collate([images[1], images[2], images[3]])
        picked = images.pick(batch["told"], Draws(torch.Generator(), 3))
        assert picked["label"] == ["dog", "horse", "cat"] and picked["style"] == [1, 0, None]
        assert picked["map"][1] is None and torch.equal(picked["map"][2], data[3]["map"])
        assert batch["content"].dtype == torch.int64
    assert torch.equal(cached.content[2:7], plain.content[2:7]) and torch.equal(cached.content[5], plain.content[5])


class Pair(NamedTuple):
    ids: Tensor
    rest: Tensor


@pytest.mark.parametrize("in_memory", [2**30, 0])
def test_tokens_of_several_tensors(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(encoded, "SHARD", 10)
    monkeypatch.setattr(encoded, "IN_MEMORY", in_memory)
    system = var.build(small(), seed=1)
    plain = encode_images(system, DATA).content.long()
    encode = system.tokenizer.encode

    def pairs(content, schedule):
        found = encode(content, schedule)
        return found._replace(tokens=[Pair(t, torch.stack([t, -t], 2).half()) for t in found.tokens])

    monkeypatch.setattr(system.tokenizer, "encode", pairs)
    monkeypatch.setattr(system.tokenizer.pyramid, "token_type", Pair, raising=False)
    images = encode_images(system, DATA, tmp_path)
    batch = images.collate([images[i] for i in range(24)])["content"]
    assert isinstance(batch, Pair) and torch.equal(batch.ids, plain) and batch.rest.dtype == torch.float16
    assert torch.equal(batch.rest[..., 1].long(), -plain)
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as file:
        assert {"content.ids", "content.rest"} <= set(file.keys())


def test_validation_and_report_read_from_files(tmp_path, monkeypatch):
    """As with a cache that is larger than memory."""
    from nextscale.evaluation.likelihood import condition_gain, scale_counts

    system, val = var.build(small(num_classes=3), seed=1), Squares(9, seed=1)
    config = ns.TrainConfig(steps=2, batch_size=4, validate_every=1, log_every=1)
    ns.train_model(system, DATA, config, out=tmp_path / "plain", val=val)
    whole = encode_images(system, val, tmp_path / "val")
    monkeypatch.setattr(encoded, "IN_MEMORY", 0)
    monkeypatch.setattr(encoded, "SHARD", 4)
    again = var.build(small(num_classes=3), seed=1)
    ns.train_model(again, DATA, config, out=tmp_path / "lazy", val=val)
    for name, tensor in system.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    lazy = encode_images(system, val, tmp_path / "val-lazy")
    assert isinstance(lazy.content, encoded.EncodedShards)
    reports = [ns.evaluate_likelihood(system, one.content, one.said(), batch_size=5) for one in (whole, lazy)]
    assert reports[0] == reports[1]
    groups = torch.arange(9)
    gains = [condition_gain(system, one.content, one.said(), groups, batch_size=5) for one in (whole, lazy)]
    assert gains[0] == gains[1]
    counts = [scale_counts(system, one.content, batch_size=2) for one in (whole, lazy)]
    assert all(torch.equal(a, b) for a, b in zip(*counts, strict=True))


def test_workers_load_the_images():
    system = var.build(small(num_classes=3), seed=1)
    options = {"augmentation": AugmentSettings(), "views": 2}
    alone, shared = (encode_images(system, DATA, workers=workers, **options) for workers in (0, 2))
    assert torch.equal(alone.content, shared.content)


def test_what_data_must_say():
    system = several()
    with pytest.raises(ValueError, match="do not say 'label'"):
        encode_images(system, [{"image": torch.zeros(3, 32, 32)}])
    ragged = [item | {"labels": [item["label"]] * (1 + i % 2)} for i, item in enumerate(items(2))]
    with pytest.raises(ValueError, match="as many labels"):
        encode_images(system, ragged)
    aligned = several()
    aligned.readers["map"] = TensorReader("map", (3, 32, 32))
    data = [item | {"map": torch.zeros(3, 32, 32)} for item in items(2)]
    with pytest.raises(ValueError, match="moves the pixels of images, but not those of 'map'"):
        encode_images(aligned, data, augmentation=AugmentSettings())
    for shape, where in (((3, 16, 16), None), ((1, 5), None), ((4,), True)):
        aligned.readers["map"] = TensorReader("map", shape, aligned=where)
        with pytest.raises(ValueError, match="but not those of 'map'"):  # whatever its size
            encode_images(
                aligned, [item | {"map": torch.zeros(shape)} for item in data], augmentation=AugmentSettings()
            )
    for shape, where in (((4,), None), ((3, 16, 16), False)):
        aligned.readers["map"] = TensorReader("map", shape, aligned=where)
        free = [item | {"map": torch.zeros(shape)} for item in data]
        assert len(encode_images(aligned, free, augmentation=AugmentSettings())) == 2
    aligned.readers["map"] = TensorReader("map", (3, 32, 32))
    still = AugmentSettings(mirror=0, shift=0, scale=0)
    assert len(encode_images(aligned, data, augmentation=still)) == 2
    unsaid = [{name: value for name, value in item.items() if name != "style"} for item in items(4)]
    with pytest.raises(ValueError, match=r"do not say 'style'.* items have image, label, map, mirror_ok"):
        encode_images(system, unsaid)
    unsaid[3]["style"] = 1  # one item is enough
    assert list(encode_images(system, unsaid).said()["style"]) == [None, None, None, 1]
    unknown = Choices(torch.tensor([[7]], dtype=torch.int32))
    with pytest.raises(ValueError, match="class number 7, but the model knows 0 to 2"):
        encoded.EncodedImages(torch.zeros(1, 30), {"label": unknown}).check(system)


def test_arrays_are_numbers_and_tensors_may_be_of_any_kind(tmp_path):
    system = several()
    plain = [item | {"labels": [i % 3, 2], "map": torch.full((3, 8, 8), float(i))} for i, item in enumerate(items(4))]
    expected = encode_images(system, plain).told
    for convert in (np.array, torch.tensor):
        data = [item | {"labels": convert(item["labels"])} for item in plain]
        assert torch.equal(
            encode_images(system, data, tmp_path / convert.__name__).told["label"].numbers, expected["label"].numbers
        )
    kinds = {
        "half": lambda t: t.bfloat16(),
        "gradient": lambda t: t.clone().requires_grad_(),
        "array": lambda t: t.numpy(),
        "strided": lambda t: t.mT,
    }
    for name, convert in kinds.items():
        data = [item | {"map": convert(item["map"])} for item in plain]
        cached = encode_images(system, data, tmp_path / name)
        assert torch.equal(cached.told["map"].values, expected["map"].values)


def test_a_system_of_half_precision_has_a_fingerprint():
    system = var.build(small(), seed=1)
    before = encoded.fingerprint(system)
    assert encoded.fingerprint(system.half_(torch.bfloat16)) != before
    assert encoded.bytes_of(torch.tensor(1.0)) == b"\0\0\x80\x3f" and encoded.bytes_of(torch.zeros(0)) == b""
