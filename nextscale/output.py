"""What a decoder makes: images, unless a recipe says otherwise. Clamping, pictures and measures belong here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.pixels import as_images, warn_of_range
from nextscale.schedule import Schedule


@dataclass(frozen=True)
class Images:
    """Images float [B, channels, H, W] in [-1, 1]."""

    channels: int = 3
    field: str = "image"

    def shape(self, schedule: Schedule, stride: int) -> tuple[int, ...]:
        """(channels, H, W) of the images of a schedule."""
        height, width = schedule[-1]
        return self.channels, height * stride, width * stride

    def fit(self, content: Tensor, like: Tensor) -> Tensor:
        """Images at the size of others: reduced by averaging, enlarged bicubically."""
        if content.shape[-2:].numel() > like.shape[-2:].numel():
            return F.interpolate(content, size=like.shape[-2:], mode="area")
        return at_size(content, like.shape[-2:])

    def finish(self, decoded: Tensor) -> Tensor:
        """Clamped to [-1, 1]."""
        return decoded.float().clamp(-1, 1)

    def pictures(self, content: Tensor) -> Tensor:
        """Themselves."""
        return content

    def measure(self, content: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """PSNR in dB and mean square error of each image, [B]."""
        mse = _mse(content, reference)
        return {"psnr": decibel(mse), "mse": mse}


def psnr(images: Any, references: Any) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image; both [B, C, H, W] or [C, H, W] in [-1, 1] (peak 2), or of bytes (uint8),
    or what else `as_images` takes.

    Returns [B]. Raises ValueError for two of other shapes, and for numbers that are not finite.
    """
    images, references = as_images(images), as_images(references)
    if images.shape != references.shape:
        raise ValueError(
            f"psnr compares two batches of images [B, C, H, W] of one shape, got {list(images.shape)} and "
            f"{list(references.shape)}"
        )
    warn_of_range(torch.cat([images.flatten(), references.flatten().to(images.device)]))
    return decibel(_mse(images, references))


def decibel(mse: Tensor) -> Tensor:
    """PSNR of a mean square error of values in [-1, 1]."""
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


def _mse(images: Tensor, references: Tensor) -> Tensor:
    return (images.clamp(-1, 1) - references).square().flatten(1).mean(dim=1)


def at_size(decoded: Tensor, size: Sequence[int]) -> Tensor:
    """Decoded images at the size (h, w): pyramids without a running sum decode a coarse scale to a small image."""
    if tuple(decoded.shape[-2:]) == tuple(size):
        return decoded
    return F.interpolate(decoded.clamp(-1, 1), size=tuple(size), mode="bicubic", antialias=True)
