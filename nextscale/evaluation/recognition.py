"""Do samples show what they were told? Judged by regressions on features of EfficientNet-lite0, fitted to real images.

Of labels: how often a linear probe names the label under which a sample was drawn, beside how often it names that of a held-out
image. Of texts: how often the right one of 32 captions is closest, in the space of the text encoder, to what a linear map makes
of the image's features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.data.dataset import pictures
from nextscale.encoded import said_by, told_of
from nextscale.evaluation.classifier import fit_probe
from nextscale.evaluation.neighbours import base_groups
from nextscale.evaluation.networks import lite0_features
from nextscale.features import Lite0
from nextscale.progress import Bar
from nextscale.sampling.loop import sample
from nextscale.system import System

BATCH = 64
CANDIDATES = 32  # captions, one of them right
RIDGES = (10.0, 100.0, 1e3, 1e4)  # weights of the penalty, of which training images choose
Said = Mapping[str, Sequence[Any]]


def recognition(system: System, data: Any, count: int, seed: int = 0, progress: bool = False) -> dict[str, Any] | None:
    """How well some `count` samples can be told apart; None where nothing is said that could be recognised.

    `data`: `train`, `val` and `classes`, as for `evaluate`. Samples are told what is said of training images with the label, or
    of the images with the caption.
    """
    name, reader = next(iter(system.readers.items()), ("", None))
    if reader is None or not len(data.train) or not len(data.val):
        return None
    draw = _Drawing(system, seed, progress)
    if reader.choices and reader.field == "label":
        return _of_labels(draw, name, data, count)
    return _of_texts(draw, name, data, count) if name in system.texts else None


class _Drawing:
    """Samples told what is said of images."""

    def __init__(self, system: System, seed: int, progress: bool) -> None:
        self.system, self.seed, self.progress = system, seed, progress
        self.generator = torch.Generator().manual_seed(seed)
        self.network = Lite0()

    def features(self, told: Said) -> Tensor:
        """Of one sample for each row of what is told, [N, 1280]; image i is drawn from seed + i."""
        total = len(next(iter(told.values())))
        starts = Bar(range(0, total, BATCH), desc="recognising", unit="batch", silent=not self.progress)
        parts = []
        for i in starts:
            some = {name: values[i : i + BATCH] for name, values in told.items()}
            images = sample(self.system, some, seed=self.seed + i).cpu()
            parts.append(lite0_features(images, self.network))
        return torch.cat(parts)

    def shuffled(self, values: Sequence[int]) -> list[int]:
        """In another order, at random."""
        return [values[i] for i in torch.randperm(len(values), generator=self.generator).tolist()]


# ---- labels -----------------------------------------------------------------------------------------------------------


def _of_labels(draw: _Drawing, name: str, data: Any, count: int) -> dict[str, Any] | None:
    """The finest label of each image: the last of those that fit."""
    shown, held_out = ([_finest(part, i) for i in range(len(part))] for part in (data.train, data.val))
    rows = defaultdict(list)
    for i, label in enumerate(shown):
        rows[label].append(i)
    classes = sorted({label for label in held_out if label in rows})
    if -1 in rows or len(rows) < 2 or not classes:
        return None
    classes = sorted(draw.shuffled(classes)[:count])
    each = max(1, count // len(classes))
    probe, known = fit_probe(data.train, data.classes), sorted(rows)

    def share(features: Tensor, labels: Sequence[int]) -> float:
        """How often the probe is right, averaged over classes."""
        named = torch.tensor(known)[probe.of_features(features)[:, known].argmax(dim=1)]
        right = named == torch.tensor(labels)
        of_class = [right[torch.tensor(labels) == label].float().mean() for label in classes]
        return float(torch.stack(of_class).mean())

    judged = [i for i, label in enumerate(held_out) if label in classes]
    real = lite0_features(pictures(data.val)[torch.tensor(judged)], draw.network)
    told_rows = [(draw.shuffled(rows[label]) * each)[:each] for label in classes]
    told = told_of(draw.system, data.train, [row for some in told_rows for row in some], -1)
    told[name] = [label for label in classes for _ in range(each)]
    samples, images = share(draw.features(told), told[name]), share(real, [held_out[i] for i in judged])
    kinds = getattr(data.train, "kinds", {}).get("label", ("label",))
    return {
        "by": kinds[-1],
        "classes": len(classes),
        "each": each,
        "chance": 1 / len(known),
        "samples": samples,
        "held_out": images,
        "ratio": samples / images if images else None,
    }


def _finest(data: Any, row: int) -> int:
    """The last label of an image, -1 where nothing is said."""
    last = said_by(getattr(data, "said", data.__getitem__)(row), "label", None)[-1]
    return -1 if last is None else int(last)


# ---- texts ------------------------------------------------------------------------------------------------------------


def _of_texts(draw: _Drawing, name: str, data: Any, count: int) -> dict[str, Any] | None:
    """The first caption of each image; the 32 of a list are of images of different bases."""
    parts = {"unseen": data.val, "seen": data.train}
    firsts = {}
    for kind, part in parts.items():
        groups = base_groups(part)[0].tolist()
        row_of = {group: row for row, group in reversed(list(enumerate(groups)))}
        rows = [row for row in row_of.values() if told_of(draw.system, part, [row], 0)[name][0]]
        rows = draw.shuffled(rows)[: count // CANDIDATES * CANDIDATES]
        firsts[kind] = rows[: len(rows) // CANDIDATES * CANDIDATES]
    size = min(map(len, firsts.values()))
    if not size:
        return None
    each = max(1, count // size)
    captions = told_of(draw.system, data.train, range(len(data.train)), 0)[name]
    training = lite0_features(pictures(data.train), draw.network)
    fit = _TextMap(training, _vectors(draw.system, name, captions), base_groups(data.train)[0])
    found: dict[str, Any] = {
        "by": name,
        "candidates": CANDIDATES,
        "chance": 1 / CANDIDATES,
        "captions": size,
        "each": each,
    }
    for kind, part in parts.items():
        rows = firsts[kind][:size]
        told = told_of(draw.system, part, rows, 0)
        vectors = _vectors(draw.system, name, told[name])
        real = lite0_features(pictures(part)[torch.tensor(rows)], draw.network)
        drawn = draw.features({key: [value for value in values for _ in range(each)] for key, values in told.items()})
        right = [fit.right(drawn[i::each], vectors) for i in range(each)]
        found[kind] = {"samples": sum(right) / each, "images": fit.right(real, vectors)}
    return found


@torch.no_grad()
def _vectors(system: System, name: str, texts: Sequence[Any]) -> Tensor:
    """Texts as the mean of their encoder's hidden states, of length 1: [N, E]."""
    parts = []
    for first in range(0, len(texts), 256):
        text: Any = system.readers[name](texts[first : first + 256])
        mask = text.mask[..., None].float()
        parts.append((text.features.float() * mask).sum(dim=1) / mask.sum(dim=1))
    return F.normalize(torch.cat(parts), dim=1)


class _TextMap:
    """A linear map from features of images to vectors of their captions: ridge regression, whose weight is chosen on a tenth of
    the training images' groups."""

    def __init__(self, features: Tensor, vectors: Tensor, groups: Tensor) -> None:
        self.mean, self.deviation, self.centre = features.mean(dim=0), features.std(dim=0) + 1e-3, vectors.mean(dim=0)
        x, y = self._standard(features), vectors - self.centre
        apart = groups % 10 == 0
        best, self.weight = -1.0, torch.zeros(x.shape[1], y.shape[1])
        chosen = RIDGES[-1]
        # One image of each group, in whole lists.
        rows = torch.tensor(list({int(g): i for i, g in enumerate(groups.tolist()) if apart[i]}.values()))
        rows = rows[: len(rows) // CANDIDATES * CANDIDATES]
        for ridge in RIDGES if len(rows) else ():
            self.weight = _ridge(x[~apart], y[~apart], ridge)
            if (right := self.right(features[rows], vectors[rows])) > best:
                best, chosen = right, ridge
        self.weight = _ridge(x, y, chosen)

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation

    def right(self, features: Tensor, vectors: Tensor) -> float:
        """How often the right one of 32 captions is closest; rows stand in lists of 32."""
        ours = F.normalize(self._standard(features) @ self.weight, dim=1).unflatten(0, (-1, CANDIDATES))
        theirs = F.normalize(vectors - self.centre, dim=1).unflatten(0, (-1, CANDIDATES))
        nearest = (ours @ theirs.transpose(1, 2)).argmax(dim=2)  # [lists, 32]
        return float((nearest == torch.arange(CANDIDATES)).float().mean())


def _ridge(x: Tensor, y: Tensor, weight: float) -> Tensor:
    return torch.linalg.solve(x.mT @ x + weight * torch.eye(x.shape[1]), x.mT @ y)


# ---- the text ---------------------------------------------------------------------------------------------------------


def recognition_lines(found: Mapping[str, Any]) -> list[str]:
    """What the report says of it."""
    lines = ["", "### Recognition", ""]
    if "classes" in found:
        ratio = "" if found["ratio"] is None else f", {found['ratio']:.2f} times as often"
        return [
            *lines,
            f"A linear probe on features of EfficientNet-lite0, fitted to the training images, names the {found['by']} of "
            f"{found['held_out']:.1%} of the held-out images, and that under which a sample was drawn of "
            f"{found['samples']:.1%} of the samples{ratio}; both averaged over {found['classes']} labels, {found['each']} "
            f"samples each. Chance: {found['chance']:.1%}.",
        ]
    times = {kind: found[kind]["samples"] / found["chance"] for kind in ("unseen", "seen")}
    words = [
        f"of captions that training {'never ' * (kind == 'unseen')}saw {found[kind]['samples']:.1%}, {times[kind]:.1f} "
        f"times chance (of real images {found[kind]['images']:.1%})"
        for kind in ("unseen", "seen")
    ]
    return [
        *lines,
        f"The right one of {found['candidates']} captions is the closest to a linear map of a sample's features: {words[0]}; "
        f"{words[1]}. {found['captions']} captions of different bases, {found['each']} samples each; the map is fitted to the "
        f"training images.",
    ]
