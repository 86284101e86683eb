"""Augmentation of a batch of drawings on white; every random number is passed in."""

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from nextscale.data.images import Size, height_width
from nextscale.settings import Settings

# NTSC luma and chroma: the first row weighs a grey by 1, the others by 0, so a rotation of I and Q keeps greys.
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


class AugmentSettings(Settings):
    """Strengths; zero turns a part off."""

    mirror: float = Field(0.5, ge=0, le=1, description="probability of a mirror image, where mirroring is allowed")
    shift: float = Field(0.06, ge=0, le=0.5, description="largest shift, as a fraction of height and width")
    scale: float = Field(0.1, ge=0, le=0.9, description="the drawing is scaled by 1 - scale to 1 + scale")
    hue: float = Field(0.5, ge=0, le=0.5, description="largest turn of the colour circle, in turns: 0.5 is any hue")
    hue_probability: float = Field(0.5, ge=0, le=1, description="share of the images whose hue is turned")
    crop: float = Field(
        1.0, ge=1, le=2, description="images are read this many times larger, and a random window is cut out of each"
    )

    @property
    def numbers(self) -> int:
        """Random numbers that each image needs; the same for all strengths, so that one does not change another's draws."""
        return 8 if self.crop > 1 else 6

    def read_size(self, size: Size) -> tuple[int, int]:
        """Height and width at which images are read, or a whole multiple of them, to come out in `size`."""
        height, width = height_width(size)
        return round(height * self.crop), round(width * self.crop)


# VAR's for photographs: short side read 1.125 times larger, a random window cut out; mirroring is optional there, and off.
PHOTOS = AugmentSettings(mirror=0.0, shift=0.0, scale=0.0, hue=0.0, crop=1.125)


def augment(
    images: Tensor | Sequence[Tensor], size: Size, mirror_ok: Tensor, numbers: Tensor, settings: AugmentSettings
) -> Tensor:
    """Crop, mirror, scale, shift and recolour each image on its own, then average down to `size`.

    `images`: float [B, C, H, W] in [-1, 1] on white, H and W the same whole multiple of `settings.read_size(size)`: pictures
    at twice the size keep their edges crisp. Where a window is cut out (`settings.crop`), one side may be longer, and images
    may be a list of [C, H, W]. `mirror_ok`: bool [B]. `numbers`: uniform in [0, 1), [B, settings.numbers].
    Returns [B, C, h, w]. All strengths zero: the average alone.
    """
    factor = _check(images, settings, size, mirror_ok)
    if settings.crop > 1:
        height, width = (factor * side for side in height_width(size))
        images = _cut(images, (height, width), numbers[:, 6:])
    assert isinstance(images, Tensor)
    flip, zoom, *shift, turned, turn = numbers[:, :6].to(images.device).unbind(1)  # [B] each
    mirrored = (flip < settings.mirror) & mirror_ok.to(images.device)
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if settings.scale or settings.shift:
        zoom = 1 + settings.scale * (2 * zoom - 1)
        offset = settings.shift * (2 * torch.stack(shift, 1) - 1)  # [B, 2] fractions of width and height
        images = _move(images, zoom, offset)
    if settings.hue and images.shape[1] == 3:
        angle = 2 * math.pi * settings.hue * (2 * turn - 1)
        images = _turn_hue(images, torch.where(turned < settings.hue_probability, angle, torch.zeros_like(angle)))
    return avg_pool2d(images, factor) if factor > 1 else images


def _cut(images: Tensor | Sequence[Tensor], size: tuple[int, int], numbers: Tensor) -> Tensor:
    """A window of `size` out of each image, at a place that two numbers in [0, 1) choose (y, x)."""
    windows = []
    for image, (y, x) in zip(images, numbers.tolist(), strict=True):
        top, left = int(y * (image.shape[1] - size[0] + 1)), int(x * (image.shape[2] - size[1] + 1))
        windows.append(image[:, top : top + size[0], left : left + size[1]])
    return torch.stack(windows)


def _move(images: Tensor, zoom: Tensor, offset: Tensor) -> Tensor:
    """Scale about the centre by `zoom` [B], then shift by `offset` [B, 2] (x, y); white comes in from outside."""
    # The grid goes from output to input, in coordinates from -1 to 1: an image is 2 wide.
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
    theta[:, :, 2] = -2 * offset / zoom[:, None]
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    # Outside is zero for grid_sample, so white has to be.
    return grid_sample(images - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1


def _turn_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate the chroma of each image by `angle` [B] in radians; greys stay, what leaves [-1, 1] is clamped."""
    to_yiq = torch.tensor(RGB_TO_YIQ, dtype=torch.float64)
    turn = torch.zeros(len(images), 3, 3, dtype=torch.float64)
    cos, sin = angle.double().cpu().cos(), angle.double().cpu().sin()
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = cos
    turn[:, 1, 2], turn[:, 2, 1] = -sin, sin
    matrix = (to_yiq.inverse() @ turn @ to_yiq).to(images)  # [B, 3, 3]
    # Rows sum to 1, so the matrix means the same for values in [-1, 1] as in [0, 1].
    colours = (matrix @ images.flatten(2)).clamp(-1, 1).view_as(images)
    # Images that are not turned stay exact, and so do pixels without colour.
    grey = (images == images[:, :1]).all(1, keepdim=True)
    return torch.where(grey | (angle == 0)[:, None, None, None], images, colours)


def _check(images: Tensor | Sequence[Tensor], settings: AugmentSettings, size: Size, mirror_ok: Tensor) -> int:
    """How many times larger the images are than they are wanted."""
    height, width = settings.read_size(size)
    many = isinstance(images, Tensor) and images.ndim == 4
    if not many and (isinstance(images, Tensor) or not len(images) or any(image.ndim != 3 for image in images)):
        raise ValueError(f"expected images [B, C, H, W] or a list of [C, H, W], got {_kind(images)}")
    if not all(image.is_floating_point() for image in images):
        raise ValueError(f"expected float images in [-1, 1], got {_kind(images)}")
    sides = [images.shape[2:]] if isinstance(images, Tensor) else sorted({tuple(image.shape[1:]) for image in images})
    longer = settings.crop > 1  # one side may be, where a window is cut out
    factor = min(sides[0][0] // height, sides[0][1] // width)
    height_wanted, width_wanted = factor * height, factor * width
    exact = any if longer else all
    if factor < 1 or not all(
        h >= height_wanted and w >= width_wanted and exact((h == height_wanted, w == width_wanted)) for h, w in sides
    ):
        got = ", ".join(f"{h} x {w}" for h, w in sides[:3])
        raise ValueError(
            f"expected images at a whole multiple of {height} x {width}"
            f"{' (one side may be longer)' if longer else ''}, got {got}; render or resize them to one"
        )
    if mirror_ok.shape != (len(images),) or mirror_ok.dtype != torch.bool:
        raise ValueError(f"mirror_ok: expected bool [{len(images)}], got {mirror_ok.dtype} {list(mirror_ok.shape)}")
    return factor


def _kind(images: Tensor | Sequence[Tensor]) -> str:
    if isinstance(images, Tensor):
        return f"{images.dtype} {list(images.shape)}"
    return f"a list of {', '.join(_kind(image) for image in images[:3])}"
