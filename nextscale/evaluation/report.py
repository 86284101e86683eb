"""One report about a system: what its tokenizer loses, what its generator knows, whether its samples are new.

`report.json` holds all numbers, `report.md` the same as tables beside the pictures.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

import nextscale
from nextscale.data.dataset import Untold, pictures, says
from nextscale.data.images import save_images
from nextscale.encoded import Choices, EncodedImages, encode_images, said_by
from nextscale.evaluation.image_sets import ArraySet, DataSet, ImageSet
from nextscale.evaluation.likelihood import (
    condition_gain,
    evaluate_likelihood,
    frequency_accuracy,
    frequency_cross_entropy,
    residual_bits,
    scale_counts,
    unigram_entropy,
)
from nextscale.evaluation.neighbours import NEAR_COPY, QUANTILES, Nearest, base_groups, diversity, nearest, summary
from nextscale.evaluation.networks import FeatureNetwork, Lite0Network
from nextscale.evaluation.protocol import KEYS, SMALL, Split, findings, refuse, sheet, sheet_lines
from nextscale.evaluation.recognition import recognition, recognition_lines
from nextscale.evaluation.reconstruction import evaluate_tokenizer
from nextscale.evaluation.sample_set import fingerprint_of
from nextscale.evaluation.score import Distance, SetFeatures, described, paired_scores, set_scores
from nextscale.extras import need
from nextscale.files import as_path, atomic_write
from nextscale.modules import as_module, usual_defaults
from nextscale.output import at_size, psnr
from nextscale.progress import Bar
from nextscale.sampling.loop import sample
from nextscale.schedule import Schedule
from nextscale.settings import STYLE, Settings, brief, whole_number
from nextscale.system import System, check_system

BATCH = 64
MOST_ROWS = 16  # scales of a table
SHOWN_SAMPLES = 96
MOST_SAMPLES = 1_000_000
RECOGNISED = 3  # times as many samples are drawn to be recognised
SHOWN_PAIRS = 24  # half of them the closest, half of them typical
TRAINING_QUERIES = 4096  # training images, evenly spaced, whose own neighbours are sought


@torch.no_grad()
@usual_defaults()
def evaluate(
    system: System,
    data: Any,
    out: str | os.PathLike[str],
    *,
    samples: int = 256,
    seed: int = 0,
    network: FeatureNetwork | None = None,
    distances: Sequence[Distance] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Judge a system on held-out images and write `report.json`, `report.md` and pictures into the folder `out`.

    A system without a model gets the tokenizer's part alone.

    Args:
        data: `ns.openmoji(size)` or `ns.image_folder(path, size, validation=0.1)` of the system's size: `train`, `val`
            and `classes`. Where these are not the system's, images are told nothing, with a warning.
        samples: images to generate with the system's own guidance and filter, at least 2; their labels are drawn from
            the first labels of the training images.
        seed: of those labels; image i is drawn from seed + i.
        network: whose features compare sets of images; default: EfficientNet-lite0. Inception's make it FID.
        distances: perceptual ones, of reconstructions; default: `perceptual_lite0`.

    Returns what `report.json` holds. Raises ValueError if the data do not fit the system.
    """
    _check(system, data, samples)
    data = _said_alike(system, data)
    out = as_path(out, "a folder to write")
    started = time.perf_counter()
    report: dict[str, Any] = {"about": _about(system, data, samples, seed)}
    network = network or Lite0Network(str(system.device))
    report["scores"] = {}
    report["tokenizer"] = _tokenizer(system, data, report["scores"])
    if styles := _by_style(system, data.val):
        report["styles"] = styles
    sets = _Sets(data, network, progress)
    made: dict[str, Any] = {"system": system.recipe, "fingerprint": fingerprint_of(system)}
    rebuilt = ArraySet(reconstructions(system, data.val), "reconstructions", {"made": made})
    originals = DataSet(data.val, "held-out images")
    report["reconstruction_protocol"] = _protocol(rebuilt, originals, network, paired=True)
    report["scores"] |= paired_scores(rebuilt, originals, distances or _usual())
    report["scores"] |= set_scores(SetFeatures(rebuilt, network), sets.val, network, paired=True)
    report["scores"]["residual_bits"] = residual_bits(rebuilt, originals)
    _save_reconstructions(system, data.val, out / "reconstructions.png")
    if system.model is not None:
        training, held_out = encode_images(system, data.train), encode_images(system, data.val)
        training.check(system)
        held_out.check(system)
        report["likelihood"] = _likelihood(system, data.val, training, held_out, base_groups(data.val)[0])
        first = next(iter(report["likelihood"]["model"].values()))
        if "bits_per_dimension" in first:
            bits = first["bits_per_dimension"]["mean"]
            report["scores"] |= {"bits_per_dimension": bits, "pixel_bits": bits + report["scores"]["residual_bits"]}
        report["samples"] = _samples(system, data, training, samples, seed, out, progress, sets, made, report)
        if recognised := recognition(system, data, RECOGNISED * samples, seed, progress):
            report["recognition"] = recognised
    report["about"]["seconds"] = round(time.perf_counter() - started, 1)
    with atomic_write(out / "report.json") as path:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_write(out / "report.md") as path:
        path.write_text(_markdown(report), encoding="utf-8")
    return report


def _check(system: System, data: Any, samples: int) -> None:
    check_system(system)
    need("eval", "judging images")
    for name in ("train", "val", "classes"):
        if not hasattr(data, name):
            raise ValueError(
                f"data: expected images for training and validation, got {brief(data)}; read them with ns.openmoji(size), or "
                "ns.image_folder(path, size, validation=0.1)"
            )
    if system.output.field != "image":
        raise ValueError(f"the report compares images, and this system makes {system.output.field}s")
    hint = "; they are compared with each other, so expected at least 2"
    whole_number("samples", samples, 2, MOST_SAMPLES, hint)
    for name in ("train", "val"):
        if not len(getattr(data, name)):
            raise ValueError(
                f"data.{name} has no images; give a validation set (--val, or val= of ns.DataSource), or read the data with "
                "validation=0.1, which holds out a tenth"
            )
        got, wanted = tuple(getattr(data, name)[0]["image"].shape), (system.tokenizer.channels, *system.image_size)
        if got != wanted:
            raise ValueError(f"this system makes images of {list(wanted)}, got data.{name} of {list(got)}; read it so")


def _said_alike(system: System, data: Any) -> Any:
    """The data, whose labels say nothing where their classes are not the system's, and styles nothing where there are none."""
    if STYLE in system.readers and not says(data.train, STYLE):
        parts = {name: Untold(getattr(data, name), (STYLE,)) for name in ("train", "val")}
        data = SimpleNamespace(**parts, classes=data.classes)
    if system.model is None or not system.classes or tuple(data.classes) == system.classes:
        return data
    warnings.warn(
        f"the classes of the data are not the system's: expected {len(system.classes)} ({', '.join(system.classes[:3])}, ...), "
        f"got {len(data.classes)} ({', '.join(data.classes[:3])}, ...). The images are told nothing, so the likelihood is that "
        "of the null class, and samples show the system's own classes",
        stacklevel=5,
    )
    said_nothing = {name: Untold(getattr(data, name), ("label",)) for name in ("train", "val")}
    return SimpleNamespace(**said_nothing, classes=system.classes)


def _about(system: System, data: Any, samples: int, seed: int) -> dict[str, Any]:
    return {
        "recipe": system.recipe,
        "changes": [change.recipe for change in system.changes],
        "scales": str(system.schedule),
        "image_size": list(system.image_size),
        "parameters": {
            name: sum(p.numel() for p in as_module(part).parameters())
            for name, part in (("tokenizer", system.tokenizer), ("model", system.model))
            if part is not None
        },
        "images": {"train": len(data.train), "val": len(data.val)},
        "samples": samples if system.model is not None else 0,
        "seed": seed,
        "nextscale": nextscale.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(system.device),
        "dtype": str(min((p.dtype for p in system.parameters()), key=lambda t: t.itemsize)).removeprefix("torch."),
    }


# ---- the tokenizer --------------------------------------------------------------------------------------------------


class _Sets:
    """Features of the images that others are compared with, computed once."""

    def __init__(self, data: Any, network: FeatureNetwork, progress: bool) -> None:
        self.network, self.data = network, data
        self.val = SetFeatures(DataSet(data.val, "held-out images"), network, progress=progress)

    @cached_property
    def training(self) -> SetFeatures:
        return SetFeatures(DataSet(self.data.train, "training images"), self.network)


def _usual() -> Sequence[Distance]:
    """The perceptual distance that needs no download."""
    from nextscale.tokenizer.perceptual import Perceptual

    return [Perceptual()]


def _tokenizer(system: System, data: Any, overall: dict[str, float]) -> list[dict[str, Any]]:
    """One entry a scale, over the validation images; a loop of many steps shows some. How codes are used by all scales
    together goes into `overall`."""
    schedule = system.schedule
    shown = _shown(schedule)
    found = evaluate_tokenizer(system.tokenizer, data.val, schedule, system.device, BATCH, decoded=shown)
    rows: list[dict[str, Any]] = []
    for i, k in enumerate(shown):
        row: dict[str, Any] = {"scale": k, "size": list(schedule.sizes[k]), "psnr": found.psnr[i]}
        row |= {"psnr_of_mean": found.psnr_of_mean[i], "mse": found.mse[i]}
        if found.perplexity:  # tokens that can be counted
            row |= {"perplexity": found.perplexity[k], "attainable": found.attainable[k], "used": found.used[k]}
            row["ratio"] = found.perplexity[k] / found.attainable[k]
        rows.append(row)
    if found.overall is not None:
        overall |= {"used_overall": found.overall.used_overall, "perplexity_overall": found.overall.perplexity_overall}
    return rows


def _by_style(system: System, val: Any) -> dict[str, list[float]]:
    """The mean PSNR after each scale of images in each style, where there are several."""
    styles = [said_by(getattr(val, "said", val.__getitem__)(i), STYLE, None)[0] for i in range(len(val))]
    rows = {style: [i for i, other in enumerate(styles) if other == style] for style in dict.fromkeys(styles)}
    if len(rows) < 2:
        return {}
    shown = _shown(system.schedule)
    parts = {str(style): Subset(val, some) for style, some in rows.items()}
    return {
        style: evaluate_tokenizer(system.tokenizer, part, system.schedule, system.device, BATCH, decoded=shown).psnr
        for style, part in parts.items()
    }


def _shown(schedule: Schedule) -> list[int]:
    """Scales that are shown: all, or of a loop of many steps some, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, len(schedule) - 1, min(len(schedule), MOST_ROWS)).tolist()})


def _save_reconstructions(system: System, val: Dataset, path: Path, count: int = 16) -> None:
    """A row of originals, then a row for each scale."""
    total = len(val)  # type: ignore[arg-type]
    count = min(count, total)
    images = torch.stack([val[i * total // count]["image"] for i in range(count)]).to(system.device)
    rows, labels = [images], ["original"] * count
    f_hats = system.tokenizer.encode(images, system.schedule).f_hats
    for k in _shown(system.schedule):
        rows.append(at_size(system.tokenizer.decode(f_hats[k]), images.shape[-2:]).clamp(-1, 1))
        name = _side(system.schedule.sizes[k])
        labels += [f"{name}: {value:.1f} dB" for value in psnr(rows[-1], images).tolist()]
    title = "Validation images, then the reconstruction after each scale, with its PSNR"
    save_images(torch.cat(rows), path, columns=count, labels=labels, title=title)


def reconstructions(system: System, val: Dataset) -> Tensor:
    """All validation images after the tokenizer, [N, 3, H, W]."""
    parts = []
    for first in range(0, len(val), BATCH):  # type: ignore[arg-type]
        last = min(first + BATCH, len(val))  # type: ignore[arg-type]
        images = torch.stack([val[i]["image"] for i in range(first, last)]).to(system.device)
        f_hat = system.tokenizer.encode(images, system.schedule).f_hats[-1]
        parts.append(system.tokenizer.decode(f_hat).clamp(-1, 1).cpu())
    return torch.cat(parts)


# ---- the generator's knowledge --------------------------------------------------------------------------------------


def _likelihood(
    system: System, data: Any, training: EncodedImages, held_out: EncodedImages, groups: Tensor
) -> dict[str, Any]:
    """Nats a token on the validation tokens: two tables of frequencies, then the model under each kind of label."""
    schedule = system.schedule
    result: dict[str, Any] = {}
    if system.tokenizer.pyramid.codes:  # tokens that can be counted
        known, judged = scale_counts(system, training.content), scale_counts(system, held_out.content)
        result["unigram_entropy"] = _with_mean(unigram_entropy(judged), schedule)
        result["training_frequencies"] = _with_mean(frequency_cross_entropy(known, judged), schedule)
        result["frequency_accuracy"] = _with_mean(frequency_accuracy(known, judged), schedule)
    result["model"] = {}
    for i, name in enumerate(_kinds(system, data, held_out)):
        told = held_out.said(i)
        found = evaluate_likelihood(system, held_out.content, told, BATCH)
        gain = condition_gain(system, held_out.content, told, groups) if len(groups.unique()) > 1 else None
        measures = {measure: _with_mean(values, schedule) for measure, values in found.measures.items()}
        if "cross_entropy" in measures:
            measures["bits_per_dimension"] = _bits(found["cross_entropy"], system)
        result["model"][name] = {"gain": gain and asdict(gain), **measures}
    return result


def _bits(nats: Sequence[float], system: System) -> dict[str, Any]:
    """What the tokens of each scale cost, and of all together (`mean`), in bits for each number of the image (pixels x
    channels)."""
    numbers = math.prod(system.output.shape(system.schedule, system.tokenizer.stride))
    tokens = _tokens_each(system)
    bits = [
        n * length * tokens / math.log(2) / numbers for n, length in zip(nats, system.schedule.lengths, strict=True)
    ]
    return {"scales": bits, "mean": sum(bits)}


def _tokens_each(system: System) -> int:
    """Numbers that the loss of a token is the mean of: the bits of a token of bits."""
    return system.tokenizer.pyramid.code_dim if system.tokenizer.pyramid.kind == "bits" else 1


def _kinds(system: System, data: Any, held_out: EncodedImages) -> list[str]:
    """What the several labels or texts that fit an image are called: as the data say (`kinds`, by field), or numbered."""
    primary, reader = next(iter(system.readers.items()))
    column = held_out.told[primary]
    count = column.numbers.shape[1] if isinstance(column, Choices) else 1
    named = getattr(data, "kinds", {}).get(reader.field, ())
    if len(named) == count:
        return list(named)
    return [primary] if count == 1 else [f"{primary} {i}" for i in range(count)]


def _with_mean(values: Sequence[float], schedule: Schedule) -> dict[str, Any]:
    """Values of the scales, and their mean over all tokens."""
    total = sum(value * length for value, length in zip(values, schedule.lengths, strict=True))
    return {"scales": list(values), "mean": total / schedule.length}


# ---- samples --------------------------------------------------------------------------------------------------------


def draw_as_often(
    system: System, known: EncodedImages, classes: Sequence[str], count: int, seed: int, progress: bool = False
) -> tuple[Tensor, list[str], list[int]]:
    """Samples under what is said of images drawn at random; what they are called, and the order in which they are shown."""
    generator = torch.Generator().manual_seed(seed)
    primary, reader = next(iter(system.readers.items()))
    column = known.told[primary]
    if (
        isinstance(column, Choices) and reader.choices and bool((column.numbers < 0).all())
    ):  # nothing is said of the images
        column = Choices(torch.arange(len(reader.choices), dtype=torch.int32)[:, None])
        known = EncodedImages(torch.empty(len(column), 0), known.told | {primary: column})
    rows = torch.randint(len(known), (count,), generator=generator).tolist()
    told = {name: [values[row] for row in rows] for name, values in known.said().items()}
    images = torch.cat(
        [
            sample(system, {name: values[i : i + BATCH] for name, values in told.items()}, seed=seed + i).cpu()
            for i in Bar(range(0, count, BATCH), desc="sampling", unit="batch", silent=not progress)
        ]
    )
    return images, *_names(system, known, classes, rows)


def _samples(
    system: System,
    data: Any,
    known: EncodedImages,
    count: int,
    seed: int,
    out: Path,
    progress: bool,
    sets: _Sets,
    made: dict[str, Any],
    report: dict[str, Any],
) -> dict[str, Any]:
    """Generate, draw the pictures, and compare with the training images."""
    images, names, places = draw_as_often(system, known, data.classes, count, seed, progress)
    shown = sorted(range(min(count, SHOWN_SAMPLES)), key=lambda i: places[i])
    save_images(images[shown], out / "samples.png", columns=12, labels=[names[i] for i in shown], title="Samples")

    training, val = pictures(data.train), pictures(data.val)
    groups, group_names = base_groups(data.train)
    near = nearest(images, training, progress=progress)
    near_val = nearest(val, training, progress=progress).distances
    near_recon = nearest(reconstructions(system, data.val), training, progress=progress).distances
    distance = {"samples": summary(near.distances), "validation": summary(near_val)}
    distance["validation_after_tokenizer"] = summary(near_recon)
    if len(group_names) > 1:
        queries = _spaced(len(training), TRAINING_QUERIES)
        others = nearest(training[queries], training, groups=groups, own=groups[queries], progress=progress)
        distance["training"] = summary(others.distances)
    limit = float(torch.quantile(near_val, 0.05))
    sampling = {"sampling_words": system.sampling.words(), "sampling": recorded_sampling(system.sampling)}
    drawn = ArraySet(images, "samples", {"made": made | {"seed": seed} | sampling, "order": "at random"})
    ours, network = SetFeatures(drawn, sets.network), sets.network
    compared = {
        "samples, training": set_scores(ours, sets.training, network),
        "samples, validation": set_scores(ours, sets.val, network),
        "validation, training": set_scores(sets.val, sets.training, network),
    }
    report["scores"] |= {
        name: value
        for name, value in compared["samples, training"].items()
        if count >= SMALL or not name.startswith("fd")
    }
    report["protocol"] = _protocol(drawn, DataSet(data.train, "training images"), network)
    named = "kid" + network.suffix  # of one image there is none
    kid = {name: found[named] for name, found in compared.items() if named in found}
    return {
        "kid" + network.suffix: kid,
        "compared": compared,
        "sampling": system.sampling.words(),
        "distance": distance,
        "validation_q5": limit,
        "below_validation_q5": float((near.distances < limit).float().mean()),
        "nearest_groups": len(groups[near.indices].unique()),
        "diversity": {
            "threshold": NEAR_COPY,
            "samples": _diversity(images),
            "validation": _diversity(val[_spaced(len(val), count)]),
        },
        "closest": _save_pairs(images, names, data.train, near, group_names, groups, out / "neighbours.png"),
    }


def recorded_sampling(sampling: Any) -> dict[str, Any]:
    """How a system samples, as numbers, where it has settings."""
    return dict(sampling.model_dump(mode="json")) if isinstance(sampling, Settings) else {}


def _protocol(samples: ImageSet, reference: ImageSet, network: FeatureNetwork, paired: bool = False) -> dict[str, Any]:
    """The sheet of the scores of samples, or of reconstructions (`paired`); nothing is refused, for the report is no claim
    about a published row."""
    facts = described(samples), described(reference)
    named = {"name": network.name, "digest": network.digest, "suffix": network.suffix}
    split: Split = "unknown" if paired else "training"
    found = refuse(findings(*facts, named, paired=paired, labels="training", split=split), sorted(KEYS))
    told: dict[str, Any] = {} if paired else {"labels": "training", "reference_split": "training"}
    return sheet(*facts, named, found, paired=paired, **told)


def _names(
    system: System, known: EncodedImages, classes: Sequence[str], rows: Sequence[int]
) -> tuple[list[str], list[int]]:
    """What samples are called, and the order in which they are shown, of the images whose labels they have."""
    primary = next(iter(system.readers))
    column = known.told[primary]
    if not isinstance(column, Choices):
        return [f"{primary} of image {row}" for row in rows], list(rows)
    places = column.numbers[torch.tensor(rows), 0].tolist()
    numbered = dict(enumerate(column.texts or classes))
    return [numbered.get(place, str(place)) for place in places], places


def _spaced(length: int, most: int) -> Tensor:
    """At most `most` indices below `length`, evenly spaced, since data stand in order of their classes."""
    return torch.linspace(0, length - 1, min(length, most), dtype=torch.double).round().long()


def _diversity(images: Tensor) -> dict[str, Any] | None:
    """None for a single image, which has no pair."""
    if len(images) < 2:
        return None
    return {"images": len(images), "pairs": len(images) * (len(images) - 1) // 2, **diversity(images)._asdict()}


def _save_pairs(
    images: Tensor, names: list[str], train: Any, near: Nearest, group_names: list[str], groups: Tensor, path: Path
) -> list[dict[str, Any]]:
    """Draw samples beside their nearest training images; returns what is shown."""
    order = near.distances.argsort().tolist()
    shown = min(len(order), SHOWN_PAIRS)
    closest, rest = order[: shown - shown // 2], order[shown - shown // 2 :]
    step = len(rest) / 2 / max(1, shown // 2)
    typical = [rest[int(len(rest) / 4 + i * step)] for i in range(shown // 2)]  # from the middle half
    pairs, captions, listed = [], [], []
    for i in closest + typical:
        index, distance = int(near.indices[i]), float(near.distances[i])
        item = train[index]
        caption, group = str(item.get("caption", "")), group_names[int(groups[index])]
        pairs += [images[i], item["image"]]
        captions += [names[i], f"{distance:.3f} {caption}"]
        listed.append({"sample": i, "label": names[i], "distance": distance, "training": index})
        listed[-1] |= {"caption": caption, "group": group}
    title = "Sample, nearest training image and the distance: the closest pairs, then typical ones"
    save_images(torch.stack(pairs), path, columns=8, labels=captions, title=title)
    return listed


# ---- the text -------------------------------------------------------------------------------------------------------


def _markdown(report: dict[str, Any]) -> str:
    about = report["about"]
    sizes = {row["scale"]: _side(row["size"]) for row in report["tokenizer"]}
    counted = "perplexity" in report["tokenizer"][0]
    lines = [
        f"# Evaluation of a `{about['recipe']}` system" + "".join(f" with {name}" for name in about["changes"]),
        "",
        f"{about['image_size'][0]}x{about['image_size'][1]} px, scales {about['scales']}, "
        + ", ".join(f"{name} {count:,} parameters" for name, count in about["parameters"].items())
        + f"; {about['images']['train']} training and {about['images']['val']} validation images.",
        "",
        f"Made by `nextscale.evaluation.report.evaluate(system, data, out, samples={about['samples'] or 256}, "
        f"seed={about['seed']})` in {about['seconds']} s; nextscale {about['nextscale']}, torch {about['torch']}, "
        f"{about['cpus']} CPUs, {about['threads']} threads, {about['device']}, {about['dtype']}; {about['date']}.",
        "",
        "## Tokenizer",
        "",
        "Validation images. PSNR: mean over images; in brackets the PSNR of the mean square error.",
        "",
        *table(
            ["scale", "size", "PSNR, dB", *(["perplexity", "attainable", "ratio", "codes used"] if counted else [])],
            [
                [row["scale"], _side(row["size"]), f"{row['psnr']:.2f} ({row['psnr_of_mean']:.2f})", *_code_cells(row)]
                for row in report["tokenizer"]
            ],
        ),
        "",
        *_style_lines(report),
        "![reconstructions](reconstructions.png)",
        "",
        "## Scores",
        "",
        *table(["score", "value"], [[name, f"{value:.4g}"] for name, value in report["scores"].items()]),
        "",
        *_score_words(report),
    ]
    if "likelihood" in report:
        lines += _likelihood_lines(report["likelihood"], sizes)
        lines += _sample_lines(report["samples"])
    if "recognition" in report:
        lines += recognition_lines(report["recognition"])
    return "\n".join(lines) + "\n"


def _score_words(report: dict[str, Any]) -> list[str]:
    """What the scores are."""
    lines = [
        "Of reconstructions: psnr, psnr_y (of the luma alone), ssim, perceptual distances, rfd and rkid (distance "
        "to the originals),",
        "residual_bits (bits for each number of an image that its reconstruction leaves to be told, under one "
        "Laplace distribution).",
    ]
    if "samples" in report:
        lines += [
            "bits_per_dimension: what the tokens cost; pixel_bits: both together, a bound on the likelihood of the "
            "pixels. Of samples:",
            "kid, precision, recall and, from 2,000 samples on, fd against the training images.",
        ]
    for name in ("reconstruction_protocol", "protocol"):
        if name in report:
            lines += ["", *sheet_lines(report[name])]
    return lines


def _style_lines(report: dict[str, Any]) -> list[str]:
    """PSNR by style, if there are several."""
    if not (styles := report.get("styles")):
        return []
    rows = [
        [_side(row["size"]), *(f"{values[i]:.2f}" for values in styles.values())]
        for i, row in enumerate(report["tokenizer"])
    ]
    return ["PSNR in dB of the validation images in each style:", "", *table(["size", *styles], rows), ""]


def _code_cells(row: dict[str, Any]) -> list[Any]:
    """How a scale uses its codes, if its tokens can be counted."""
    if "perplexity" not in row:
        return []
    return [f"{row['perplexity']:.1f}", row["attainable"], f"{row['ratio']:.2f}", f"{row['used']:.1%}"]


def _likelihood_lines(likelihood: dict[str, Any], sizes: dict[int, str]) -> list[str]:
    columns, formats = {}, []
    if "unigram_entropy" in likelihood:
        columns = {
            "unigram entropy": likelihood["unigram_entropy"],
            "training frequencies": likelihood["training_frequencies"],
            "their accuracy": likelihood["frequency_accuracy"],
        }
        formats = ["{:.3f}", "{:.3f}", "{:.1%}"]
    for name, values in likelihood["model"].items():
        for measure, found in values.items():
            if measure != "gain":
                columns[f"{'model' if measure == 'cross_entropy' else measure.replace('_', ' ')}, {name}"] = found
                formats.append({"accuracy": "{:.1%}", "bits_per_dimension": "{:.4f}"}.get(measure, "{:.3f}"))
    rows: list[list[Any]] = [
        [size, *(f.format(column["scales"][k]) for f, column in zip(formats, columns.values(), strict=True))]
        for k, size in sizes.items()
    ]
    means = [column["mean"] for column in columns.values()]
    rows.append(["all tokens", *(f.format(mean) for f, mean in zip(formats, means, strict=True))])
    gains = {name: values["gain"] for name, values in likelihood["model"].items() if values["gain"]}
    listed = [
        [
            name,
            *(f"{gain['scales'][k]:.3f}" for k in sizes),
            f"{gain['mean']:.4f} +- {gain['standard_error']:.4f}",
            gain["groups"],
        ]
        for name, gain in gains.items()
    ]
    return [
        "",
        "## Likelihood",
        "",
        "Cross-entropy of the validation tokens in nats a token, teacher-forced; lower is better. Unigram entropy: the",
        "best table of frequencies at each scale, taken from these very tokens. Training frequencies: the table of the",
        "training tokens, one added to each count; accuracy: of the most likely code, or bit.",
        "",
        *table(["scale", *columns], rows),
        "",
        "What the right condition is worth: nats a token that the condition of an image of another base costs more. Over",
        "all tokens with the standard error over bases.",
        "",
        *table(["condition", *sizes.values(), "all tokens", "bases"], listed),
    ]


def _sample_lines(samples: dict[str, Any]) -> list[str]:
    names = {
        "samples": "samples",
        "validation": "validation images",
        "validation_after_tokenizer": "validation images after the tokenizer",
        "training": "training images, to another base drawing",
    }
    quantiles = [*(f"q{q}" for q in QUANTILES), "mean"]
    rows = [
        [names[name], *(f"{found[q]:.3f}" for q in quantiles), found["count"]]
        for name, found in samples["distance"].items()
    ]
    sampling, spread = samples["sampling"], samples["diversity"]
    lines = [
        "",
        "## Samples",
        "",
        f"Labels as frequent as in the training data; {sampling}.",
        "",
        "![samples](samples.png)",
        "",
        "Distance to the nearest training image: root mean square difference of values in [-1, 1]; q0 is the smallest.",
        "",
        *table(["images", *(f"{q}" for q in quantiles), "count"], rows),
        "",
        f"{samples['below_validation_q5']:.1%} of the samples are closer than {samples['validation_q5']:.3f}, the 5 % "
        f"quantile of the validation images. Their neighbours are {samples['nearest_groups']} different base drawings.",
        "",
    ]
    for name in ("samples", "validation"):
        if found := spread[name]:
            lines.append(
                f"* {found['images']} {name}: mean distance of two {found['mean']:.3f}; "
                f"{found['close_pairs']} of {found['pairs']} pairs closer than {spread['threshold']}"
            )
    columns = list(dict.fromkeys(score for found in samples["compared"].values() for score in found))
    rows = [
        [name, *(f"{found[score]:.4g}" if score in found else "" for score in columns)]
        for name, found in samples["compared"].items()
    ]
    lines += ["", "Sets of images compared by features:", "", *table(["sets", *columns], rows)]
    return [*lines, "", "![neighbours](neighbours.png)"]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _side(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
