"""Reconstruction, likelihood, neighbours, the report and the curves, on tiny random systems and made-up drawings."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from small import small
from torch import Tensor

import nextscale as ns
from nextscale.contracts import Encoded
from nextscale.data.emoji import EmojiDataset, EmojiRow
from nextscale.encoded import encode_images
from nextscale.evaluation import report as report_module
from nextscale.evaluation.curves import plot_run, read_metrics
from nextscale.evaluation.likelihood import frequency_cross_entropy, scale_counts, unigram_entropy
from nextscale.evaluation.neighbours import base_groups, diversity, nearest, summary
from nextscale.evaluation.reconstruction import code_counts, evaluate_tokenizer
from nextscale.evaluation.report import evaluate
from nextscale.output import psnr
from nextscale.recipes.generators import var
from nextscale.schedule import Schedule
from nextscale.system import System

CLASSES = ("animals", "food", "cat")
SIZES = (1, 2)  # 16 px


def drawings(count: int, seed: int, bases: int | None = None) -> EmojiDataset:
    """Noise at 16 px; row i belongs to the base drawing `i % bases`."""
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    rows = [
        EmojiRow(f"{seed}-{i}", f"drawing {i}", CLASSES[i % 2], "cat", "", "", f"base {seed}-{i % (bases or count)}")
        for i in range(count)
    ]
    return EmojiDataset(images, rows, CLASSES)


@pytest.fixture(scope="module")
def data() -> SimpleNamespace:
    return SimpleNamespace(train=drawings(20, 0, bases=12), val=drawings(9, 1), classes=CLASSES)


@pytest.fixture(scope="module")
def system() -> System:
    return var.build(small(sizes=SIZES, num_classes=3, classes=CLASSES))


@pytest.fixture(scope="module")
def made(system: System, data: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("report")
    return evaluate(system, data, out, samples=10, progress=False), out


# ---- neighbours -----------------------------------------------------------------------------------------------------


def brute(images: Tensor, training: Tensor) -> Tensor:
    """Root mean square differences of all pairs, [B, N], in float64."""
    x, y = ((t.double() / 127.5 - 1).flatten(1) for t in (images, training))
    return (x[:, None] - y[None]).square().mean(dim=2).sqrt()


@pytest.mark.parametrize("chunk_values", [2**23, 768 * 4 + 1])  # all at once, and four images at a time
def test_nearest_equals_brute_force(monkeypatch: pytest.MonkeyPatch, chunk_values: int) -> None:
    monkeypatch.setattr("nextscale.evaluation.neighbours.CHUNK_VALUES", chunk_values)
    images, training = drawings(9, 1).images, drawings(20, 0).images
    expected = brute(images, training)
    found = nearest(images, training)
    assert found.indices.tolist() == expected.argmin(dim=1).tolist()
    assert torch.allclose(found.distances.double(), expected.amin(dim=1), atol=1e-6)
    as_float = nearest(images.float() / 127.5 - 1, training)
    assert torch.equal(as_float.distances, found.distances) and torch.equal(as_float.indices, found.indices)


def test_nearest_of_another_group() -> None:
    data = drawings(20, 0, bases=12)
    groups, names = base_groups(data)
    assert groups.tolist() == [i % 12 for i in range(20)] and names[3] == "base 0-3"
    expected = brute(data.images, data.images)
    expected[groups[:, None] == groups[None]] = math.inf
    found = nearest(data.images, data.images, groups=groups, own=groups)
    assert found.indices.tolist() == expected.argmin(dim=1).tolist()
    assert torch.allclose(found.distances.double(), expected.amin(dim=1), atol=1e-6)


def test_a_copy_has_distance_zero() -> None:
    training = drawings(20, 0).images
    training[6] = training[5]
    training[6, 0, 0, 0] ^= 1  # one step of colour in one value: close to the copy, yet not it
    found = nearest((training[[5, 6, 13]].float() / 127.5 - 1), training)
    assert found.indices.tolist() == [5, 6, 13] and found.distances.tolist() == [0, 0, 0]


def test_distances_have_units() -> None:
    black, white = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert nearest(black, white).distances.item() == pytest.approx(2)


def test_nearest_refuses_what_cannot_be_compared() -> None:
    training = drawings(3, 0).images
    with pytest.raises(ValueError, match="same size"):
        nearest(torch.zeros(1, 3, 8, 8), training)
    with pytest.raises(ValueError, match="another group"):
        nearest(training, training, groups=torch.zeros(3).long(), own=torch.zeros(3).long())


def test_diversity_counts_near_copies() -> None:
    images = drawings(4, 0).images
    first, second = torch.triu_indices(4, 4, 1)
    pairs = brute(images, images)[first, second]
    assert diversity(images) == (pytest.approx(float(pairs.mean()), rel=1e-5), 0)
    assert diversity(torch.cat([images, images[:1]])).close_pairs == 1
    with pytest.raises(ValueError, match="pairs"):
        diversity(images[:1])


def test_summary_of_known_distances() -> None:
    found = summary(torch.arange(101.0))
    assert (found["q0"], found["q10"], found["q90"], found["mean"], found["count"]) == pytest.approx(
        (0, 10, 90, 50, 101)
    )


# ---- reconstruction and likelihood ----------------------------------------------------------------------------------


class EveryCode:
    """A stand-in for a tokenizer: all codes equally often, and images that are off by a known amount."""

    def __init__(self, codes: int, errors: list[float]) -> None:
        self.pyramid = SimpleNamespace(codes=codes, limit=lambda k: codes, choices=lambda tokens: tokens)
        self.errors = errors

    def encode(self, images: Tensor, schedule: Schedule) -> Encoded:
        codes, count = self.pyramid.codes, len(images)
        tokens = [torch.arange(count * length).view(count, length) % codes for length in schedule.lengths]
        offsets = torch.tensor(self.errors).view(-1, 1, 1, 1)
        return Encoded(tokens, [], [images + offsets * sign for sign in (1, -1)])

    def decode(self, f_hat: Tensor) -> Tensor:
        return f_hat


def test_tokenizer_report_by_hand() -> None:
    items = [{"image": torch.zeros(3, 8, 8)} for _ in range(4)]
    errors = [0.02, 0.2, 0.1, 0.1]
    found = evaluate_tokenizer(EveryCode(8, errors), items, Schedule.squares(1, 2))  # type: ignore[arg-type]
    by_image = [10 * math.log10(4 / error**2) for error in errors]
    assert found.psnr == pytest.approx([sum(by_image) / 4] * 2, abs=1e-4)
    mse = sum(error**2 for error in errors) / 4
    assert found.mse == pytest.approx([mse] * 2)
    assert found.psnr_of_mean == pytest.approx([10 * math.log10(4 / mse)] * 2, abs=1e-4)
    assert found.perplexity == pytest.approx([4, 8])  # 4 tokens of the first scale cannot use 8 codes
    assert found.attainable == [4, 8] and found.used == [0.5, 1.0]
    assert found.metrics()["psnr"] == found.psnr[-1]


def test_psnr_by_hand() -> None:
    assert psnr(torch.full((1, 3, 4, 4), 5.0), torch.zeros(1, 3, 4, 4)).item() == pytest.approx(10 * math.log10(4))


def test_entropies_by_hand() -> None:
    schedule = Schedule.squares(1, 2)
    tokens = torch.tensor([[0, 0, 1, 2, 3], [1, 0, 1, 2, 3]])
    assert unigram_entropy(code_counts(schedule.split(tokens), 4)) == pytest.approx([math.log(2), math.log(4)])
    known = torch.tensor([[0, 0, 0, 0, 0]])  # counts plus one: 2 of 5; then 5 of 8, for code 0
    expected = [-(math.log(2 / 5) + math.log(1 / 5)) / 2, -(math.log(5 / 8) + 3 * math.log(1 / 8)) / 4]
    assert frequency_cross_entropy(
        *(code_counts(schedule.split(part), 4) for part in (known, tokens))
    ) == pytest.approx(expected)
    bits = torch.tensor([[[0, 1], [0, 0], [1, 0], [0, 1], [1, 1]]], dtype=torch.uint8)  # [1, 5, 2]: each bit on its own
    assert unigram_entropy(code_counts(schedule.split(bits), 2)) == pytest.approx([0, math.log(2)])


# ---- the report -----------------------------------------------------------------------------------------------------


def test_report_leaves_its_files(made: tuple[dict, Path]) -> None:
    found, out = made
    assert json.loads((out / "report.json").read_text()) == found
    names = ["neighbours.png", "reconstructions.png", "report.json", "report.md", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names[:2] + names[4:]:
        with Image.open(out / name) as picture:
            picture.verify()
    text = (out / "report.md").read_text()
    assert "nan" not in text and all(f"]({name})" in text for name in ("samples.png", "neighbours.png"))
    about = found["about"]
    assert about["dtype"] == "float32"
    assert about["torch"] == torch.__version__ and about["cpus"] >= 1 and about["nextscale"] == ns.__version__


def test_report_is_consistent(made: tuple[dict, Path], system: System, data: SimpleNamespace) -> None:
    found = made[0]
    tokens = encode_images(system, data.val)
    likelihood = found["likelihood"]
    assert likelihood["unigram_entropy"]["scales"] == unigram_entropy(scale_counts(system, tokens.content))
    for row, entropy in zip(found["tokenizer"], likelihood["unigram_entropy"]["scales"], strict=True):
        assert row["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-4)
        assert row["attainable"] == min(32, 9 * math.prod(row["size"]))
        assert row["psnr"] >= row["psnr_of_mean"] - 1e-4
    groups, subgroups = (ns.evaluate_likelihood(system, tokens.content, tokens.said(column)).mean for column in (0, 1))
    assert likelihood["model"]["group"]["cross_entropy"]["mean"] == pytest.approx(groups)
    assert likelihood["model"]["subgroup"]["cross_entropy"]["mean"] == pytest.approx(subgroups)
    samples = found["samples"]
    assert [samples["distance"][name]["count"] for name in ("samples", "validation", "training")] == [10, 9, 20]
    assert samples["diversity"]["samples"]["pairs"] == 45
    distances = nearest(data.val.images, data.train.images).distances
    assert samples["distance"]["validation"]["q0"] == pytest.approx(float(distances.min()))


def test_report_of_a_system_with_styles(tmp_path: Path, data: SimpleNamespace) -> None:
    """PSNR of each style, recognition, and samples in the styles of the training images."""
    train, val = (drawings(24, seed, bases=24) for seed in (0, 1))
    for part in (train, val):
        part.rows = [replace(row, set=("noto", "twemoji")[i % 2]) for i, row in enumerate(part.rows)]
    styled = var.build(small(sizes=SIZES, num_classes=3, classes=CLASSES, styles=("noto", "twemoji")))
    found = evaluate(
        styled, SimpleNamespace(train=train, val=val, classes=CLASSES), tmp_path, samples=4, progress=False
    )
    assert list(found["styles"]) == ["noto", "twemoji"] and len(found["styles"]["noto"]) == len(SIZES)
    mean = sum(values[-1] for values in found["styles"].values()) / 2
    assert found["tokenizer"][-1]["psnr"] == pytest.approx(mean, rel=1e-5)
    assert "| size | noto | twemoji |" in (text := (tmp_path / "report.md").read_text()) and "PSNR in dB" in text
    assert "recognition" not in found  # one subgroup
    # Data that tell no style are judged all the same.
    plain = [{k: v for k, v in data.train[i].items() if k != "style"} for i in range(len(data.train))]
    untold = evaluate(
        styled, SimpleNamespace(train=plain, val=plain, classes=CLASSES), tmp_path / "u", samples=2, progress=False
    )
    assert "styles" not in untold


def test_report_names_copies(
    monkeypatch: pytest.MonkeyPatch, system: System, data: SimpleNamespace, tmp_path: Path
) -> None:
    copies = data.train.images[[14, 4, 4]].float() / 127.5 - 1
    monkeypatch.setattr(report_module, "sample", lambda system, labels, seed: copies)
    samples = evaluate(system, data, tmp_path, samples=3, progress=False)["samples"]
    assert {(row["distance"], row["caption"], row["group"]) for row in samples["closest"]} == {
        (0, "drawing 14", "base 0-2"),
        (0, "drawing 4", "base 0-4"),
    }
    assert samples["below_validation_q5"] == 1 and samples["nearest_groups"] == 2
    assert samples["diversity"]["samples"]["close_pairs"] == 1


def test_report_without_a_model_on_an_image_folder(tmp_path: Path) -> None:
    for i, image in enumerate(drawings(12, 3).images):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    data = ns.image_folder(tmp_path / "images", 16, validation=0.4, progress=False)
    found = evaluate(var.build(small(sizes=SIZES, num_classes=0)), data, tmp_path / "out", progress=False)
    assert set(found) == {"about", "scores", "tokenizer", "reconstruction_protocol"} and len(found["tokenizer"]) == 2
    assert not (tmp_path / "out" / "samples.png").exists()
    with_model = var.build(small(sizes=SIZES, num_classes=2, classes=("a", "b")))
    found = evaluate(with_model, data, tmp_path / "out", samples=2, progress=False)
    assert set(found["likelihood"]["model"]) == {"label"} and "training" in found["samples"]["distance"]


def test_report_refuses_what_does_not_fit(system: System, data: SimpleNamespace, tmp_path: Path) -> None:
    other = SimpleNamespace(train=data.train, val=data.val, classes=("x", "y", "z"))
    with pytest.warns(UserWarning, match="classes of the data"):
        found = evaluate(system, other, tmp_path, samples=4, progress=False)
    assert found["likelihood"]["model"]["label"]["cross_entropy"]["mean"] > 0
    assert {pair["label"] for pair in found["samples"]["closest"]} <= set(CLASSES)
    with pytest.raises(ValueError, match="makes images of"):
        evaluate(var.build(small(sizes=(1,))), data, tmp_path)
    with pytest.raises(ValueError, match="no images"):
        evaluate(system, SimpleNamespace(train=data.train, val=[], classes=CLASSES), tmp_path)
    with pytest.raises(ValueError, match="at least 2"):
        evaluate(system, data, tmp_path, samples=1)
    with pytest.raises(ValueError, match="class number 2"):
        evaluate(var.build(small(sizes=SIZES, num_classes=2)), data, tmp_path)


# ---- curves ---------------------------------------------------------------------------------------------------------


def lines(path: Path, rows: list[dict], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def test_metrics_keep_the_last_of_each_step(tmp_path: Path) -> None:
    rows = [
        {"step": step, "time": 0, "train/loss": loss} for step, loss in ((10, 3.0), (20, 2.0), (30, 9.0), (20, 1.0))
    ]
    path = lines(tmp_path / "metrics.jsonl", [*rows, {"step": 20, "val/loss": 4.0}], end='\n{"step": 40, "tra')
    assert read_metrics(tmp_path) == read_metrics(path)
    assert read_metrics(path) == {"train/loss": {10: 3.0, 20: 1.0, 30: 9.0}, "val/loss": {20: 4.0}}
    with path.open("a") as file:
        file.write('\n{"step": 50, "train/loss": 0.5}\n')
    with pytest.warns(UserWarning, match="line 6"):
        assert read_metrics(path)["train/loss"][50] == 0.5


def test_curves_of_both_kinds(tmp_path: Path) -> None:
    steps = range(10, 50, 10)
    tokenizer = [{"step": s, "train/loss": 1 / s, "train/codebook": 0.0, "train/perplexity/0": s} for s in steps]
    first = lines(
        tmp_path / "a" / "metrics.jsonl", [*tokenizer, {"step": 40, "val/psnr/0": 20.0, "val/perplexity/0": 9}]
    )
    generator = [{"step": s, "train/loss": 1 / s, "train/loss/0": 2 / s} for s in steps]
    second = lines(
        tmp_path / "b" / "metrics.jsonl", [*generator, {"step": 40, "val/loss": 1, "val/cross_entropy/0": 2}]
    )
    with Image.open(plot_run([first, second], tmp_path / "curves.png")) as picture:
        assert picture.size == (2400, 1350) and round(picture.info["dpi"][0]) == 150


def test_curves_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        plot_run(tmp_path, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no metrics"):
        read_metrics(lines(tmp_path / "metrics.jsonl", []))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nextscale\[eval\]'"):
        plot_run(tmp_path, tmp_path / "curves.png")


def test_gain_of_the_condition_is_zero_for_a_model_that_does_not_listen():
    """The right caption against another's: 0 without an ear for it, and positive for one that was told the answer."""
    from nextscale.evaluation.likelihood import _derangement, condition_gain, frequency_accuracy

    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    other = _derangement(groups, torch.Generator().manual_seed(0))
    assert (groups[other] != groups).all()
    system = var.build(small(num_classes=4), seed=1)
    tokens = torch.randint(32, (8, system.schedule.length), generator=torch.Generator().manual_seed(1))
    labels = groups.clone()
    heard = condition_gain(system, tokens, labels, groups)
    assert heard.groups == 4 and heard.mean != 0 and heard.standard_error > 0
    with torch.no_grad():
        system.model.conditioner.embedding.weight.zero_()
    deaf = condition_gain(system, tokens, labels, groups)
    assert deaf.mean == 0 and deaf.scales == [0.0] * len(system.schedule)
    with pytest.raises(ValueError, match="all of one group"):
        condition_gain(system, tokens, labels, torch.zeros(8, dtype=torch.long))
    schedule = system.schedule
    known = torch.tensor([[3] * schedule.length, [3] * schedule.length, [5] * schedule.length])
    counts = scale_counts(system, known)
    assert frequency_accuracy(counts, counts) == pytest.approx([2 / 3] * len(schedule))
