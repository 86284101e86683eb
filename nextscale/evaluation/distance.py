"""How far one set of images is from another, by features of EfficientNet-lite0, which needs no download.

These are not FID and KID, whose features are Inception's: they are named after their own network and must not be compared
with published numbers. For sets of a few hundred images use the kernel distance, whose estimate is unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.data.dataset import Pictures
from nextscale.features import Lite0
from nextscale.pixels import on_white, to_float


@torch.no_grad()
def lite0_features(images: Tensor | Pictures, network: Lite0 | None = None, batch_size: int = 256) -> Tensor:
    """Pooled features [N, 1280] of images [N, C, H, W] (1, 3 or 4 channels), float in [-1, 1] or uint8."""
    network = network or Lite0()
    parts = (images[first : first + batch_size] for first in range(0, len(images), batch_size))
    return torch.cat([network.pooled(on_white(to_float(part))) for part in parts])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features a [N, D] and b [M, D], with unbiased covariances, in float64.

    Biased upwards for small sets. `fd_lite0` where the features are Lite0's.
    """
    _check(a, b)
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(dim=0), x.double().T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of features a [N, D] and b [M, D] with the kernel (x y / D + 1)^3, unbiased: around
    0, even below, for sets of one kind (Binkowski et al. 2018). `kid_lite0` where the features are Lite0's."""
    _check(a, b)
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected two sets of at least two features [N, D], got {list(a.shape)} and {list(b.shape)}")
