"""What a decoder makes: images, unless a recipe says otherwise. Clamping, pictures and measures belong here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
        return {"psnr": psnr(content, reference), "mse": _mse(content, reference)}


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image; both [B, C, H, W] or [C, H, W] in [-1, 1] (peak 2), or of bytes (uint8).

    Returns [B]. Raises ValueError for two of other shapes.
    """
    if images.shape != references.shape or images.ndim not in (3, 4):
        raise ValueError(
            f"psnr compares two batches of images [B, C, H, W] of one shape, got {list(images.shape)} and "
            f"{list(references.shape)}"
        )
    if images.ndim == 3:
        images, references = images[None], references[None]
    return decibel(_mse(_floats(images), _floats(references)))


def _floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


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
