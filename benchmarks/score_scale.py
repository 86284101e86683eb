"""The scale to read offline scores by: real drawings against real, blurred, noisy, blank and badly kept ones, and what
mistakes cost.

python benchmarks/score_scale.py

Features of EfficientNet-lite0 on OpenMoji at 64 px; the reference is one half of the drawings, split by base drawing, so
that variants of a drawing are on one side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from scipy import ndimage

import nextscale as ns
from nextscale.data.dataset import pictures
from nextscale.evaluation.image_sets import ArraySet
from nextscale.evaluation.neighbours import base_groups
from nextscale.evaluation.networks import Lite0Network
from nextscale.evaluation.score import SetFeatures, set_scores

Array = Any


def blurred(sigma: float) -> Callable[[Array], Array]:
    return lambda x: np.stack([ndimage.gaussian_filter(image, (sigma, sigma, 0)) for image in x])


def noisy(deviation: float) -> Callable[[Array], Array]:
    draws = np.random.default_rng(0)
    return lambda x: (x + draws.normal(0, deviation, x.shape)).round().clip(0, 255).astype(np.uint8)


def jpeg(quality: int) -> Callable[[Array], Array]:
    def kept(image: Array) -> Array:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="jpeg", quality=quality)
        return np.asarray(Image.open(file))

    return lambda x: np.stack([kept(image) for image in x])


def truncated(x: Array) -> Array:
    """Floats cut to bytes instead of rounded: half a step darker on average; here every byte loses one half of the time."""
    return (x.astype(np.int16) - np.random.default_rng(0).integers(0, 2, x.shape)).clip(0, 255).astype(np.uint8)


def mean_and_noise(x: Array) -> Array:
    mean = x.mean(axis=0)
    return (mean + np.random.default_rng(0).normal(0, 64, x.shape)).round().clip(0, 255).astype(np.uint8)


def sets(other: Array, labels: Array) -> Iterator[tuple[str, Array]]:
    yield "the other half", other
    for sigma in (1, 2, 4):
        yield f"blurred, sigma {sigma} px", blurred(sigma)(other)
    for deviation in (8, 32):
        yield f"noise, deviation {deviation} of 255", noisy(deviation)(other)
    yield "mean image and noise", mean_and_noise(other)
    yield "blank (white)", np.full_like(other, 255)
    for quality in (95, 75):
        yield f"JPEG, quality {quality}", jpeg(quality)(other)
    yield "truncated instead of rounded", truncated(other)
    yield "shifted by 4 px", np.roll(other, 4, axis=2)
    yield "cropped to the middle 90 %", cropped(other)
    most = np.bincount(labels).argmax()
    few = np.concatenate([np.flatnonzero(labels == most), np.flatnonzero(labels != most)[::4]])
    yield "unbalanced: a quarter of all groups but the largest", other[few]
    for count in (1000, 500, 250):
        yield f"{count} of the other half", other[np.random.default_rng(1).permutation(len(other))[:count]]


def cropped(x: Array) -> Array:
    side = x.shape[1]
    edge = round(side * 0.05)
    return np.stack(
        [
            np.asarray(Image.fromarray(i[edge:-edge, edge:-edge]).resize((side, side), Image.Resampling.BICUBIC))
            for i in x
        ]
    )


def main(size: int = 64, seed: int = 0) -> None:
    """Print a line for each set: its scores against the reference half.

    Args:
        size: side of the drawings
        seed: of the split
    """
    data = ns.openmoji(size, validation=0.0).train
    groups, names = base_groups(data)
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[: len(names) // 2]
    first = torch.isin(groups, chosen).numpy()
    images = ArraySet(pictures(data)).images  # bytes [N, H, W, 3]
    labels = np.array([item[0] for item in data.labels])
    network = Lite0Network()
    reference = SetFeatures(ArraySet(images[first]), network)
    columns = ["fd_lite0", "kid_lite0", "precision_lite0", "recall_lite0"]
    print(f"| set ({(~first).sum():,} drawings against {first.sum():,}) | images | {' | '.join(columns)} |")
    print("| --- " * (2 + len(columns)) + "|")
    for name, some in sets(images[~first], labels[~first]):
        found = set_scores(SetFeatures(ArraySet(some), network), reference, network)
        print(f"| {name} | {len(some)} | {' | '.join(f'{found[column]:.4g}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
