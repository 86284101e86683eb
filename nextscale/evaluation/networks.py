"""Networks whose features sets of images are compared by; any other with the same three names and call will do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nextscale.data.dataset import Pictures
from nextscale.evaluation.inception import FILE, fetch_inception, load_inception
from nextscale.features import Lite0, lite0_file
from nextscale.files import digest
from nextscale.pixels import on_white, to_float

Array = Any  # of numpy


class Features(NamedTuple):
    """Of a batch: pooled [b, D]; spatial [b, S], or None where the network has no such score."""

    pooled: Array
    spatial: Array | None = None


class FeatureNetwork(Protocol):
    """What turns images into features.

    name, digest: which network it is, and a hash of its weights. suffix: of the names of its scores; empty for the network
    that FID means, and for no other. classifier: weights [D, C] of the Inception Score, or None.
    """

    name: str
    digest: str
    suffix: str
    classifier: Array | None

    def __call__(self, images: Tensor) -> Features:
        """Of bytes [b, 3, H, W]."""


class InceptionNetwork:
    """The features of FID, sFID, Inception Score, precision and recall; `path`: the user's file of weights."""

    name, suffix = "inception-2015-12-05", ""

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu") -> None:
        network = load_inception(path)
        self.digest = network.digest
        self.classifier: Array | None = network.softmax_weight.numpy().copy()
        self.network, self.device = network.to(device), device

    def __call__(self, images: Tensor) -> Features:
        pooled, spatial = self.network(images.to(self.device))
        return Features(pooled.cpu().numpy(), spatial.cpu().numpy())


class Lite0Network:
    """EfficientNet-lite0's features, which need no download. Its scores are called `..._lite0`, never FID: they must not be
    compared with published ones."""

    name, suffix = "efficientnet-lite0", "_lite0"
    classifier: Array | None = None

    def __init__(self, device: str = "cpu") -> None:
        self.network, self.device = Lite0().to(device), device
        self.digest = digest(lite0_file())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        return Features(self.network.pooled(to_float(images.to(self.device))).cpu().numpy())


def network_of(
    name: str, weights: str | os.PathLike[str] = "", device: str = "cpu", *, fetch: bool = False
) -> FeatureNetwork:
    """The network of a name, `lite0` or `inception`, which needs the file of its weights; `fetch`: it may be downloaded."""
    if name == "inception" and not str(weights) and fetch:
        weights = fetch_inception()
    makers: dict[str, Callable[[], FeatureNetwork]] = {
        "lite0": lambda: Lite0Network(device),
        "inception": lambda: InceptionNetwork(weights, device),
    }
    if name not in makers:
        raise ValueError(f"unknown features {name!r}; there are {', '.join(makers)}")
    if name == "inception" and not str(weights):
        raise ValueError(
            f"the features of FID need their weights: give the file {FILE} (--weights), or allow its download from "
            f"pytorch-fid (--fetch)"
        )
    if name == "lite0" and str(weights):
        raise ValueError(
            f"lite0 brings its own weights; leave out {Path(weights).name}, or take the features inception"
        )
    return makers[name]()


def features_of(network: FeatureNetwork, batch: Array) -> Features:
    """Of bytes [b, H, W, 3]."""
    return network(torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).contiguous())


@torch.no_grad()
def lite0_features(images: Tensor | Pictures, network: Lite0 | None = None, batch_size: int = 256) -> Tensor:
    """Pooled features [N, 1280] of images [N, C, H, W] (1, 3 or 4 channels), float in [-1, 1] or uint8."""
    network = network or Lite0()
    parts = (images[first : first + batch_size] for first in range(0, len(images), batch_size))
    return torch.cat([network.pooled(on_white(to_float(part))) for part in parts])
