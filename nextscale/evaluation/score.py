"""Score a set of images against another one, with the protocol of the score: `score.json`, `score.md`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from nextscale.evaluation import scores
from nextscale.evaluation.image_sets import Array, ImageSet
from nextscale.evaluation.networks import FeatureNetwork, features_of
from nextscale.evaluation.protocol import Preset, Split, findings, refuse, sheet, sheet_lines
from nextscale.evaluation.scores import FeatureMoments, RunningMoments
from nextscale.files import as_path, atomic_write
from nextscale.progress import Bar
from nextscale.settings import whole_number

BATCH = 64  # the reference evaluator's
LabelsFrom = Literal["balanced", "training", "validation", "unknown"]


class Distance(Protocol):
    """A perceptual distance of pairs: two [B, 3, H, W] in [-1, 1] to [B]; `name` is that of its score."""

    name: str

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor: ...


class SetFeatures:
    """The features of a set: pooled ones of all images [N, D], the moments of pooled and spatial ones."""

    def __init__(
        self, images: ImageSet, network: FeatureNetwork, *, batch: int = BATCH, progress: bool = False
    ) -> None:
        pooled, spatial = [], RunningMoments()
        bar = Bar(total=len(images), desc=f"features of {images.name}", unit="image", silent=not progress, leave=False)
        with bar:
            for rows in images.batches(batch):
                found = features_of(network, rows)
                pooled.append(found.pooled.astype(np.float32))
                if found.spatial is not None:
                    spatial.add(found.spatial)
                bar.update(len(rows))
        self.pooled: Array | None = np.concatenate(pooled) if pooled else None
        many = self.pooled is not None and len(self.pooled) > 1
        # Moments that come with a file are of a whole data set, and count instead of its images.
        own = {
            "pooled": FeatureMoments.of(self.pooled) if many and images.moments("pooled") is None else None,
            "spatial": spatial.moments() if spatial.count > 1 and images.moments("spatial") is None else None,
        }
        self.moments = {which: images.moments(which) or own[which] for which in own}


def set_scores(
    samples: SetFeatures, reference: SetFeatures, network: FeatureNetwork, *, paired: bool = False
) -> dict[str, float]:
    """The scores of two sets by name. With features of Inception: fid, sfid, kid, precision, recall, inception_score; with
    others fd, kid, precision and recall with the network's suffix. `paired`: of reconstructions, whose distances are called
    rfid, rfd."""
    suffix, found = network.suffix, {}
    name = "fd" + suffix if suffix else "fid"
    prefix = "r" if paired else ""
    for which, label in (("pooled", name), ("spatial", "sfid")):
        own, other = samples.moments[which], reference.moments[which]
        if own is not None and other is not None:
            found[prefix + label] = scores.frechet_distance(own, other)
    if network.classifier is not None and samples.pooled is not None:
        found["inception_score"] = scores.inception_score(samples.pooled, network.classifier)
    a, b = samples.pooled, reference.pooled
    if (
        paired or a is None or b is None or min(len(a), len(b)) < 2
    ):  # estimates that are unbiased want sets that were drawn apart
        return found
    if max(len(a), len(b)) <= 10_000:
        found["kid" + suffix] = scores.kernel_distance(a, b)
    else:  # as it is published
        found["kid" + suffix] = scores.kernel_distance_of_subsets(a, b).mean
    if min(len(a), len(b)) > scores.NEIGHBOUR:
        shares = scores.precision_recall(a, b)
        found |= {"precision" + suffix: shares.precision, "recall" + suffix: shares.recall}
    return found


def paired_scores(
    images: ImageSet,
    references: ImageSet,
    distances: Sequence[Distance] = (),
    *,
    batch: int = BATCH,
    device: str = "cpu",
) -> dict[str, float]:
    """Means over pairs of images in the same order: PSNR in dB, SSIM, and perceptual distances by their names."""
    if len(images) != len(references):
        raise ValueError(
            f"pairs need as many images in both sets, in the same order, got {len(images)} and {len(references)}"
        )
    totals: dict[str, float] = {}
    for rows, wanted in zip(images.batches(batch), references.batches(batch), strict=True):
        found: dict[str, Any] = {"psnr": scores.psnr_bytes(rows, wanted), "psnr_y": _of_luma(rows, wanted)}
        if min(rows.shape[1:3]) >= 11:
            found["ssim"] = scores.ssim(rows, wanted)
        pair = [
            torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1 for x in (rows, wanted)
        ]
        with torch.no_grad():
            for distance in distances:
                kind = getattr(distance, "backbone", "")  # of LPIPS, whose numbers differ
                found[f"{distance.name}_{kind}" if kind else distance.name] = distance(*pair).cpu().numpy()
        for name, values in found.items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
    return {name: total / len(images) for name, total in totals.items()}


def _of_luma(images: Array, references: Array) -> Array:
    return scores.psnr_bytes(scores.luma(images), scores.luma(references))


def described(images: ImageSet) -> dict[str, Any]:
    """What a protocol says of a set."""
    return {"name": images.name, "count": len(images), "size": list(images.size), **images.facts}


def score(
    samples: ImageSet,
    reference: ImageSet,
    network: FeatureNetwork,
    *,
    out: str | os.PathLike[str] | None = None,
    paired: bool = False,
    labels: LabelsFrom = "unknown",
    split: Split = "unknown",
    preset: Preset | None = None,
    allow: Sequence[str] = (),
    distances: Sequence[Distance] = (),
    batch: int = BATCH,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Score samples against a reference; returns what `score.json` in the folder `out` holds: `scores` and `protocol`.

    Args:
        paired: samples are reconstructions of the reference's images, in the same order.
        labels: what classes the samples are of; split: of what images the reference is.
        preset: a row of a paper that is to be reproduced, to which everything is held.
        allow: keys of mistakes that are to be scored all the same (`protocol.KEYS`).
        distances: perceptual ones, for pairs.
        batch: images that the network sees at once.

    Raises ValueError for sets that cannot be compared, and for known mistakes, with what they cost.
    """
    whole_number("batch", batch, 1, 2**20)
    if len(samples) and len(reference) and samples.size != reference.size:
        sizes = ["x".join(map(str, one.size)) for one in (samples, reference)]
        raise ValueError(
            f"the samples have {sizes[0]} pixels, the reference {sizes[1]}; give --size, to crop folders, or make "
            f"one of them again"
        )
    if not len(samples):
        raise ValueError(f"{samples.name} has no images; moments alone can be a reference, not samples")
    ours, theirs = described(samples), described(reference)
    named = {"name": network.name, "digest": network.digest, "suffix": network.suffix}
    made = ours.get("made") or {}
    if labels == "unknown" and made:
        labels = made.get("labels", "unknown")
    found = refuse(findings(ours, theirs, named, paired=paired, labels=labels, split=split, preset=preset), allow)
    values: dict[str, float] = {}
    if paired:
        values |= paired_scores(samples, reference, distances, batch=batch, device=device)
    features = [SetFeatures(one, network, batch=batch, progress=progress) for one in (samples, reference)]
    values |= set_scores(features[0], features[1], network, paired=paired)
    protocol = sheet(
        ours,
        theirs,
        named,
        found,
        preset=preset.name if preset else "",
        labels=labels,
        reference_split=split,
        paired=paired,
        allowed=list(allow),
    )
    report: dict[str, Any] = {"kind": "score", "scores": values, "protocol": protocol}
    if preset is not None:
        report["published"] = {"scores": dict(preset.scores), "readme": dict(preset.readme), "note": preset.note}
    if out is not None:
        folder = as_path(out, "a folder to write")
        with atomic_write(folder / "score.json") as path:
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with atomic_write(folder / "score.md") as path:
            path.write_text(markdown(report), encoding="utf-8")
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    published = report.get("published", {})
    columns = [name for name in ("scores", "readme") if published.get(name)]
    header = ["score", "measured", *({"scores": "paper", "readme": "released weights"}[name] for name in columns)]
    lines = [f"# Scores of {report['protocol']['samples']['name']}", "", f"| {' | '.join(header)} |"]
    lines.append("| --- " * len(header) + "|")
    for name, value in report["scores"].items():
        cells = [name, f"{value:.4g}", *(f"{published[column].get(name, '')}" for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    if published.get("note"):
        lines += ["", published["note"] + "."]
    return "\n".join([*lines, "", "## Protocol", "", *sheet_lines(report["protocol"])]) + "\n"


def moments_of(
    images: ImageSet, network: FeatureNetwork, *, batch: int = BATCH, progress: bool = False
) -> dict[str, FeatureMoments]:
    """Moments to be stored beside images in a reference file, of pooled features and, where there are, spatial ones."""
    found = SetFeatures(images, network, batch=batch, progress=progress)
    return {which: value for which, value in found.moments.items() if value is not None}


def read_score(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A report that `score` or `evaluate` wrote: the JSON file, or the folder that holds it. Raises ValueError for others."""
    from nextscale.files import read_json

    place = Path(path)
    if place.is_dir():
        names = [name for name in ("score.json", "report.json") if (place / name).is_file()]
        if not names:
            raise FileNotFoundError(
                f"{place} has no score.json and no report.json; give a folder of `nextscale score` or `evaluate`"
            )
        place = place / names[0]
    found = read_json(place, expected="a report of `nextscale score` or `nextscale evaluate`")
    kinds = {"scores": dict, "tokenizer": list, "likelihood": dict, "protocol": dict}
    if (
        not isinstance(found, dict)
        or not ({"scores", "tokenizer"} & set(found))
        or any(not isinstance(found[name], kind) for name, kind in kinds.items() if name in found)
        or any(not isinstance(row, dict) for row in found.get("tokenizer", [{}]) or [None])
        or any(not isinstance(part, dict | list | str | int | bool) for part in found.get("protocol", {}).values())
    ):
        raise ValueError(f"{place} is no report of `nextscale score` or `nextscale evaluate`")
    return found
