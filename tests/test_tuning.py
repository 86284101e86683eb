"""Recognition of samples, and the search for how a system should sample."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import small

import nextscale as ns
from nextscale import cli
from nextscale.evaluation import recognition as judged
from nextscale.evaluation import tuning
from nextscale.evaluation.recognition import recognition, recognition_lines
from nextscale.evaluation.tuning import tune, with_sampling
from nextscale.recipes.generators import infinity, var
from nextscale.sampling.defaults import SamplingDefaults

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}


class Coloured(list):
    """Squares of four colours in turn; the label's number is the colour's, the caption names it and says which one it is."""


def coloured(count: int, first: int = 0) -> Coloured:
    items = Coloured()
    for i in range(first, first + count):
        name = list(COLOURS)[i % 4]
        image = torch.tensor(COLOURS[name]).float().view(3, 1, 1).expand(3, 32, 32) * (0.7 + 0.3 * (i % 7) / 7)
        items.append(
            {
                "image": image,
                "label": i % 4,
                "caption": f"{name} {i}",
                "style": "ink",
                "base": str(i),
                "mirror_ok": True,
            }
        )
    return items


@pytest.fixture(scope="module")
def data() -> SimpleNamespace:
    return SimpleNamespace(train=coloured(96), val=coloured(40, 96), classes=tuple(COLOURS))


@pytest.fixture(scope="module")
def system():
    return var.build(small(num_classes=4, classes=tuple(COLOURS)), seed=1)


def test_samples_that_show_their_label_are_recognised(system, data, monkeypatch):
    def as_told(_, told, **rest):
        return torch.stack([data.train[number]["image"] for number in told["label"]])

    monkeypatch.setattr(judged, "sample", as_told)
    found = recognition(system, data, 16)
    assert found == {
        "by": "label", "classes": 4, "each": 4, "chance": 0.25, "samples": 1.0, "held_out": 1.0, "ratio": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(judged, "sample", lambda _, told, **rest: as_told(_, {"label": [0] * len(told["label"])}))
    assert recognition(system, data, 16)["samples"] == 0.25
    assert "0.25 times as often" in "\n".join(recognition_lines(recognition(system, data, 16)))


def test_samples_that_show_their_caption_are_recognised(data, monkeypatch):
    reads = infinity.build(infinity.tiny(), seed=1)
    images = {item["caption"]: item["image"] for item in [*data.train, *data.val]}
    monkeypatch.setattr(judged, "sample", lambda _, told, **rest: torch.stack([images[c] for c in told["caption"]]))
    found = recognition(reads, data, 64)
    # Of 32 captions 8 are of the right colour.
    for kind in ("seen", "unseen"):
        assert found[kind]["samples"] >= 3 / 32 and found[kind]["samples"] == found[kind]["images"]
    assert found["captions"] == 32 and found["each"] == 2 and "times chance" in "\n".join(recognition_lines(found))
    monkeypatch.setattr(judged, "sample", lambda _, told, **rest: torch.zeros(len(told["caption"]), 3, 32, 32))
    assert recognition(reads, data, 64)["unseen"]["samples"] == 1 / 32


def test_nothing_is_said_and_nothing_recognised(system, data):
    untold = [item | {"label": None} for item in data.train]
    assert recognition(system, SimpleNamespace(train=untold, val=untold, classes=data.classes), 8) is None
    few = SimpleNamespace(train=data.train[:8], val=data.val[:8], classes=data.classes)
    assert recognition(infinity.build(infinity.tiny(), seed=1), few, 64) is None  # not 32 captions


class Means:
    """Features that are the means of the channels."""

    name, suffix, digest, classifier = "means", "_means", "1", None

    def __call__(self, images):
        return SimpleNamespace(pooled=images.float().mean((2, 3)).numpy() / 255, spatial=None)


@pytest.fixture
def better_with(monkeypatch):
    """Samples are like real ones at guidance 3, and darker at any other."""

    def sampled(_, told, *, seed, guidance, pick):
        weight = guidance.at(ns.Schedule.squares(1, 2), 1)[0]
        real = [coloured(1, first=136 + 4 * i + label)[0]["image"] for i, label in enumerate(told["label"])]
        return torch.stack(real) - 1.5 * abs(weight - 3)

    monkeypatch.setattr(tuning, "sample", sampled)


def test_the_best_settings_win_and_trials_are_kept(system, data, tmp_path, better_with, monkeypatch):
    ranges = {"guidance": (1.0, 3.0, 5.0), "temperature": (0.8, 1.0)}
    found = tune(system, data, tmp_path, ranges=ranges, samples=24, network=Means(), progress=False)
    assert found.settings == system.sampling.model_copy(update={"guidance": 3.0}) and found.score == min(
        score for _, score in found.trials
    )
    assert len(found.trials) == len({settings for settings, _ in found.trials}) == 5  # own, 1, 3, 5, then 0.8
    assert {path.name for path in tmp_path.iterdir()} == {"tune.json", "tune.md", "tune.png"}
    kept = json.loads((tmp_path / "tune.json").read_text())
    assert len(kept["trials"]) == len(found.trials)
    monkeypatch.setattr(tuning, "sample", lambda *_, **__: pytest.fail("nothing is left to try"))
    again = tune(system, data, tmp_path, ranges=ranges, samples=24, network=Means(), progress=False)
    assert again == found


def test_a_search_that_was_stopped_goes_on(system, data, tmp_path, better_with, monkeypatch):
    ranges, draw, left = {"guidance": (1.0, 3.0, 5.0)}, tuning.sample, [2]

    def stops(*words, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(*words, **options)

    monkeypatch.setattr(tuning, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        tune(system, data, tmp_path, ranges=ranges, samples=24, network=Means(), progress=False)
    assert len(json.loads((tmp_path / "tune.json").read_text())["trials"]) == 2
    left[0] = 2
    assert len(tune(system, data, tmp_path, ranges=ranges, samples=24, network=Means(), progress=False).trials) == 4


def test_searches_that_make_no_sense(system, data, tmp_path):
    for ranges, words in (
        ({"cfg": (1.0,)}, "ranges: expected"),
        ({"top_p": (2.0,)}, "top_p"),
        ({"top_k": ()}, "ranges"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(system, data, tmp_path, ranges=ranges, network=Means())
    (tmp_path / "tune.json").write_text('{"key": 1}')
    with pytest.raises(ValueError, match="trials of another system"):
        tune(system, data, tmp_path, network=Means())


def test_what_is_tried_by_default(system):
    styled = infinity.build(infinity.tiny(styles=("ink", "oil")), seed=1)
    assert list(tuning.usual_ranges(system)) == ["guidance", "temperature", "top_p", "top_k"]
    assert list(tuning.usual_ranges(styled)) == ["guidance", "style_guidance", "temperature"]


def test_settings_are_saved_with_the_system(system, tmp_path):
    tuned = with_sampling(system, SamplingDefaults(guidance=1.5, top_k=3))
    again = ns.load(ns.save(tuned, tmp_path / "s"))
    assert again.sampling == tuned.sampling and system.sampling != tuned.sampling
    assert torch.equal(ns.sample(tuned, "red", seed=1), ns.sample(again, "red", seed=1))


def test_the_command_ends_in_options_and_a_system(system, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ns.save(system, tmp_path / "s")
    for i in range(24):
        path = Path("photos", list(COLOURS)[i % 4], f"{i}.png")
        pixels = (np.array(COLOURS[path.parent.name]) * 100 + 128 + i).clip(0, 255).astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        ns.save_images(torch.from_numpy(pixels).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1, path)
    words = [
        "tune",
        "s",
        "--data",
        "photos",
        "--val",
        "photos",
        "--samples",
        "8",
        "--guidance",
        "1",
        "2",
        "--to",
        "tuned",
    ]
    assert cli.main(words) == 0
    report, folder, options = capsys.readouterr().out.splitlines()
    assert Path(report).is_file() and folder == "tuned"
    best = ns.load("tuned").sampling
    assert options.startswith(f"--guidance {best.guidance:g} --temperature 1 ") and best.guidance in (1, 2, 2.5)
    assert cli.main(words) == 2 and "holds a system already" in capsys.readouterr().err
