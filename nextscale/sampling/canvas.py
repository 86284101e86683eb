"""Images of any size on a system's canvas, and back: what is edited there is put into the image where a mask marks it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.data.images import MOST_ASPECT
from nextscale.settings import brief

FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class Canvas:
    """The part of images of one size that a system sees, at the system's own size.

    image: height and width of the images. size: those of the system's. window: top, left, bottom, right of what is seen, in
    pixels of the image; with "pad" it reaches beyond.
    """

    image: tuple[int, int]
    size: tuple[int, int]
    window: tuple[int, int, int, int]

    @classmethod
    def of(cls, image: tuple[int, int], size: tuple[int, int], fit: str) -> Canvas:
        """How images lie on the canvas: their middle in its shape ("crop"), all of them with their edges drawn out to its shape
        ("pad"), or all of them in another shape ("stretch"). Raises ValueError for other words."""
        if fit not in FITS:
            raise ValueError(f"fit: expected {', '.join(FITS)} or None, got {brief(fit)}")
        (height, width), (h, w) = image, size
        if fit == "stretch":
            return cls(image, size, (0, 0, height, width))
        longest = max(width * h / w / height, height * w / h / width)
        if fit == "pad" and longest > MOST_ASPECT:
            raise ValueError(f"an image of {height}x{width} pixels is too long to be padded; fit it by crop or stretch")
        choose = min if fit == "crop" else max
        tall, wide = choose(height, round(width * h / w)), choose(width, round(height * w / h))
        top, left = (height - tall) // 2, (width - wide) // 2
        return cls(image, size, (top, left, top + tall, left + wide))

    @property
    def seen(self) -> tuple[slice, slice]:
        """The rows and columns of an image that lie in the window."""
        top, left, bottom, right = self.window
        height, width = self.image
        return slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))

    def fit(self, images: Tensor) -> Tensor:
        """What the system sees of images [B, C, H, W] in [-1, 1], [B, C, h, w]: reduced with antialiasing."""
        part = F.pad(images[..., self.seen[0], self.seen[1]], self._margins(), mode="replicate")
        return _resized(part, self.size)

    def marked(self, mask: Tensor, stride: int) -> Tensor:
        """The cells of `stride` pixels of the canvas that a mask bool [B, 1, H, W] of the image touches, bool [B, h', w']."""
        part = F.pad(mask[..., self.seen[0], self.seen[1]].float(), self._margins())
        rows, columns = self.size[0] // stride, self.size[1] // stride
        return (
            F.adaptive_max_pool2d(part, (rows, columns))[:, 0] > 0
        )  # cells overlap by a pixel where they do not divide

    def put_back(self, edited: Tensor, images: Tensor, opacity: Tensor) -> Tensor:
        """Images with what was edited on the canvas over them, [B, C, H, W]; where opacity [B, 1, H, W] is 0 they stay as they
        are to the bit."""
        top, left, bottom, right = self.window
        rows, columns = self.seen
        part = _resized(edited, (bottom - top, right - left))
        part = part[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        count = max(len(part), len(images))
        result = images.expand(count, -1, -1, -1).clone()
        old, share = result[..., rows, columns], opacity[..., rows, columns]
        result[..., rows, columns] = torch.where(share > 0, torch.lerp(old, part.to(old), share), old)
        return result

    def _margins(self) -> tuple[int, int, int, int]:
        """What the window has beyond the image: left, right, top, bottom."""
        top, left, bottom, right = self.window
        height, width = self.image
        return max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height)


def feathered(mask: Tensor, width: int) -> Tensor:
    """Opacity of what lies over an image, float [B, 1, H, W]: 0 outside of a mask (bool), 1 deep inside, rising linearly over
    `width` pixels from its border inwards; over fewer where the mask is not that deep. The borders of the image are none."""
    opacity, inside, steps = mask.float(), mask.float(), 1
    for _ in range(width - 1):
        # erosion by a pixel: of what lies outside of the image max_pool2d knows nothing, so nothing erodes there
        inside = 1 - F.max_pool2d(1 - inside, 3, stride=1, padding=1)
        if not inside.any():
            break
        opacity, steps = opacity + inside, steps + 1
    return opacity / opacity.flatten(1).amax(dim=1).clamp_min(1).view(-1, 1, 1, 1) if steps > 1 else opacity


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
