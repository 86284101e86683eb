"""Is it new? The distance of images to their nearest training image, and of generated images to each other.

The distance of two images is the root mean square difference over all pixels and channels, with values in [-1, 1]:
0 for equal images, 2 for black against white, 0.0078 for one step of 8-bit colour in every pixel. It has no eye for
shifts and mirrors: a moved copy counts as new.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.data.dataset import Pictures
from nextscale.pixels import to_float
from nextscale.progress import Bar

CHUNK_VALUES = 2**23  # floats of a chunk of images: 32 MiB
CANDIDATES = 4  # kept from the matrix product for each image, then measured exactly
QUANTILES = (0, 10, 25, 50, 75, 90)
# Two different OpenMoji drawings at 64 px are never closer than 0.098 (flags of nearly the same two colours).
NEAR_COPY = 0.1


class Nearest(NamedTuple):
    """Of each image: the distance to its nearest training image, float32 [B], and the index of that one, int64 [B]."""

    distances: Tensor
    indices: Tensor


class Diversity(NamedTuple):
    """Mean distance over all pairs of images, and how many pairs are closer than a threshold."""

    mean: float
    close_pairs: int


@torch.no_grad()
def nearest(
    images: Tensor | Pictures,
    training: Tensor | Pictures,
    *,
    groups: Tensor | None = None,
    own: Tensor | None = None,
    progress: bool = False,
) -> Nearest:
    """The nearest training image of each image.

    Training images that are variants of one drawing (skin tones) count as one: report the group of the nearest one,
    which `base_groups` gives. A training image is compared with the others by passing `groups` and `own`.

    Args:
        images: [B, 3, H, W], float in [-1, 1] or uint8.
        training: [N, 3, H, W] of the same size, float in [-1, 1] or uint8. Of `Pictures`, which are read again for each
            chunk of images, both may have more than fit into memory.
        groups: int64 [N], the group of each training image.
        own: int64 [B], the group of each image; training images of that group are passed over.

    Raises ValueError for images of another size, or an image whose own group holds all training images.
    """
    if not len(training) or images.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"expected training images [N, C, H, W] and images of the same size, got {list(training.shape)} and "
            f"{list(images.shape)}; render or resize one of them"
        )
    if own is not None and (groups is None or bool((groups == groups[0]).all() & (own == groups[0]).any())):
        raise ValueError("own needs groups, and at least one training image of another group than the image's own")
    chunk = max(1, CHUNK_VALUES // math.prod(images.shape[1:]))
    found = [
        _nearest(images[i : i + chunk].cpu(), training, groups, None if own is None else own[i : i + chunk], chunk)
        for i in Bar(range(0, len(images), chunk), desc="neighbours", unit="chunk", silent=not progress, leave=False)
    ]
    return Nearest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _nearest(
    images: Tensor, training: Tensor | Pictures, groups: Tensor | None, own: Tensor | None, chunk: int
) -> Nearest:
    rows = _rows(images)  # [b, D]
    # Moving all images by the same amount keeps the distances; near the origin the product loses fewer digits.
    centre = rows.mean(dim=0)
    moved = rows - centre
    best, kept = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long)
    for start in range(0, len(training), chunk):
        others = _rows(training[start : start + chunk]) - centre  # [n, D]
        squares = torch.addmm(others.square().sum(dim=1), moved, others.T, alpha=-2)  # |x - y|^2 - |x|^2, [b, n]
        if own is not None and groups is not None:
            squares.masked_fill_(own[:, None] == groups[None, start : start + chunk], torch.inf)
        index = torch.arange(start, start + len(others)).expand(len(rows), -1)
        best, kept = torch.cat([best, squares], dim=1), torch.cat([kept, index], dim=1)
        best, order = best.topk(min(CANDIDATES, best.shape[1]), dim=1, largest=False)
        kept = kept.gather(1, order)  # [b, CANDIDATES]
    # The product rounds, so that a copy would not come out as 0: measure the few candidates themselves.
    exact = torch.stack([(rows - _rows(training[column])).square().mean(dim=1).sqrt() for column in kept.T], dim=1)
    exact.masked_fill_(best.isinf(), torch.inf)
    distances = exact.amin(dim=1)
    return Nearest(distances, kept.masked_fill(exact > distances[:, None], len(training)).amin(dim=1))


@torch.no_grad()
def diversity(images: Tensor, threshold: float = NEAR_COPY) -> Diversity:
    """Mean distance over all pairs of images [B, 3, H, W], and the number of pairs below `threshold`: near copies."""
    if len(images) < 2:
        raise ValueError(f"diversity compares pairs of images, got {len(images)} image")
    rows = _rows(images.cpu())
    distances = F.pdist(rows) / rows.shape[1] ** 0.5  # [B * (B - 1) / 2], measured directly: equal images give 0
    return Diversity(float(distances.mean()), int((distances < threshold).sum()))


def base_groups(data: Any) -> tuple[Tensor, list[str]]:
    """The group of each image of a data set, int64 [N], and the names of the groups.

    Items with a `base` (`EmojiDataset`) belong to the group of that name: a drawing with its skin tones and other
    variants. Images of any other data set are groups of their own.
    """
    said = getattr(data, "said", data.__getitem__)
    known = "base" in data[0] if len(data) else False
    keys = [str(said(i)["base"] if known else i) for i in range(len(data))]
    number = {name: i for i, name in enumerate(dict.fromkeys(keys))}
    return torch.tensor([number[key] for key in keys], dtype=torch.long), list(number)


def summary(distances: Tensor) -> dict[str, float]:
    """Quantiles (`q0` the smallest ... `q90`), `mean` and `count` of distances."""
    quantiles = torch.quantile(distances.double(), torch.tensor(QUANTILES, dtype=torch.double) / 100)
    named = {f"q{q}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return named | {"mean": float(distances.mean()), "count": len(distances)}


def _rows(images: Tensor) -> Tensor:
    """Images as float rows [B, D] in [-1, 1]."""
    floats = to_float(images)
    return floats.flatten(1)
