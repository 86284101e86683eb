"""A perceptual distance between images that needs no download: `perceptual_lite0`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.features import STAGES, Lite0
from nextscale.tokenizer.frozen import Frozen


def _unit(x: Tensor) -> Tensor:
    """Unit length over the channels; the small number inside the root keeps the gradient finite at a zero vector."""
    return x * (x.square().sum(dim=1, keepdim=True) + 1e-6).rsqrt()  # [B, C, h, w]


class Perceptual(nn.Module):
    """Distance of two images in the features of EfficientNet-lite0, in the manner of LPIPS.

    At each layer the features are scaled to unit length over the channels; the squared difference is summed over them,
    averaged over the positions, and then over the layers: 0 for equal images, about 1 for unrelated ones, 4 at most.
    This is not LPIPS: the network is another one and there are no learned weights, so the two numbers cannot be
    compared; call this one `perceptual_lite0`.

    layers: the first 3 strides (2, 4, 8) by default. At 64 px all five cost almost twice as much, and strides 16 and
        32 are maps of 4x4 and 2x2 that hardly change the order of distortions (at equal MSE, blur counts 1.9 times
        a loss of contrast with three layers and 2.3 times with five).
    resize: shorter side to which images are resized first, None for none. Enlarging 64 px to 128 ranks distortions
        nearly the same and costs five times as much, so small images go in as they are; for big ones it saves time.

    An optimiser, an average or a checkpoint of the owner never sees the network's weights (`Frozen`). Gradients flow to
    the first image only.
    """

    name = "perceptual_lite0"

    def __init__(self, layers: int = 3, resize: int | None = None) -> None:
        super().__init__()
        if not 1 <= layers <= len(STAGES):
            raise ValueError(f"layers: expected 1 to {len(STAGES)}, got {layers}")
        if resize is not None and resize < 1:
            raise ValueError(f"resize: expected a side of at least 1 pixel or None, got {resize}")
        self.layers, self.resize = layers, resize
        self.network = Frozen(Lite0())

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distance of each pair: two [B, 3, H, W] in [-1, 1] -> float32 [B]."""
        if images.shape != targets.shape:
            raise ValueError(
                f"Perceptual: expected two equal shapes, got {tuple(images.shape)}, {tuple(targets.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):  # small differences drown in half precision
            with torch.no_grad():
                wanted = self._features(targets)
            layers = zip(self._features(images), wanted, strict=True)
            return torch.stack([(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in layers]).mean(dim=0)  # [B]

    def _features(self, images: Tensor) -> list[Tensor]:
        images = images.float()
        if self.resize is not None and min(images.shape[2:]) != self.resize:
            scale = self.resize / min(images.shape[2:])
            size = [round(side * scale) for side in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return [_unit(x) for x in self.network(images, self.layers)]
