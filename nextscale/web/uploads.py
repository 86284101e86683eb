"""What visitors send: images, read with care. Whatever it is, it ends in an image or in a sentence."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.data.images import decode_image
from nextscale.pixels import opened

MOST_BYTES = 20_000_000  # of a file
MOST_PIXELS = 50_000_000  # that a file may unfold to
MOST_SIDE = 2048  # of an image as it is worked on; a larger one is reduced


def read_upload(source: Any, channels: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    """An upload as uint8 [C, h, w]: turned upright, its first frame.

    source: a path, or the bytes. size: resized by its short side and cropped to it; None: as it is, reduced to 2048
    pixels a side. Raises ValueError for what is no image, is damaged, or unfolds to more than 50 million pixels.
    """
    content = io.BytesIO(source) if isinstance(source, bytes) else source
    name = "what was sent" if isinstance(source, bytes) else "the file"
    with opened(content, name) as image:  # its head alone
        width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"an image of {width}x{height} pixels is too large; at most {MOST_PIXELS // 1_000_000} million are read"
        )
    if isinstance(content, io.BytesIO):
        content.seek(0)
    pixels = decode_image(content, size, name, channels)
    height, width = pixels.shape[1:]
    longest = max(height, width)
    return _reduced(pixels, MOST_SIDE / longest) if size is None and longest > MOST_SIDE else pixels


def _reduced(pixels: Tensor, factor: float) -> Tensor:
    """Bytes [C, H, W] reduced by Lanczos, each channel on its own: Pillow would weigh colours by the opacity."""
    height, width = (max(1, round(side * factor)) for side in pixels.shape[1:])
    images = (Image.fromarray(plane.numpy()) for plane in pixels)
    return torch.from_numpy(
        np.stack([np.array(one.resize((width, height), Image.Resampling.LANCZOS)) for one in images])
    )
