"""What users call images, as tensors: Pillow images, arrays, bytes and floats of any sure meaning."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nextscale.settings import brief

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
MOST_NUMBERS = 2**33  # of all images together
LARGEST = 8  # of floats that are still taken for images: random ones of a test are, bytes are not


def as_images(images: Any, channels: int | None = None) -> Tensor:
    """What users call images, as float32 [B, channels, H, W] in [-1, 1]; what is that already passes as it is.

    Taken are tensors [C, H, W] or [B, C, H, W] of any float type in [-1, 1] or of uint8 in 0 to 255; arrays of the same, also
    [H, W, C] or [B, H, W, C]; Pillow images; and lists of such images of one size. `channels`: None: as many as they have, 1, 3
    or 4. Raises ValueError for everything else: other channels, numbers that are not finite or far from [-1, 1], none at all.
    """
    return to_float(_taken(images, channels))


def as_bytes(images: Any) -> Tensor:
    """The same as uint8 [B, C, H, W], rounded, with as many channels as they have."""
    return to_uint8(_taken(images, None))


def _taken(images: Any, channels: int | None) -> Tensor:
    """Images [B, C, H, W] as bytes or floats."""
    wanted = f"images [B, {channels or 'C'}, H, W], float in [-1, 1] or uint8"
    if isinstance(images, Image.Image):
        images = pillow_pixels(images, channels)
    elif isinstance(images, list | tuple):
        if any(isinstance(image, list | tuple) for image in images):
            raise ValueError(f"expected {wanted}, got a list of lists; make it a tensor")
        return _joined([_taken(image, channels) for image in images], wanted)
    elif isinstance(images, np.ndarray):
        images = _of_array(images, channels, wanted)
    if not isinstance(images, Tensor):
        raise ValueError(
            f"expected {wanted}, got {type(images).__name__}; read files with `ns.read_images(paths, size)`"
        )
    if images.ndim == 2 and channels == 1:
        images = images[None]
    if images.ndim == 3:
        images = images[None]
    known = MODES if channels is None else (channels,)
    if images.ndim != 4 or images.shape[1] not in known or 0 in images.shape or images.layout != torch.strided:
        last = images.ndim == 4 and images.shape[-1] in known
        hint = "; put the channels first: x.permute(0, 3, 1, 2)" if last else ""
        hint = "; make it dense: x.to_dense()" if images.layout != torch.strided else hint
        more = " of 1, 3 or 4 channels" if channels is None else ""
        raise ValueError(f"expected {wanted}{more}, got {list(images.shape)}{hint}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"expected {wanted}, got {images.dtype}; convert bytes with .to(torch.uint8)")
    if images.is_meta:
        raise ValueError(f"expected {wanted}, got images on the device meta, which have no numbers")
    if images.numel() > MOST_NUMBERS:
        raise ValueError(f"expected {wanted}, got {list(images.shape)}, more than {MOST_NUMBERS:,} numbers; take fewer")
    if images.is_floating_point() and images.dtype.itemsize == 1:  # in which torch cannot compute
        images = images.float()
    if images.is_floating_point():
        _check_range(images, wanted)
    return images


def _of_array(array: Any, channels: int | None, wanted: str) -> Tensor:
    """An array of bytes or floats with the channels before rows and columns."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"expected {wanted}, got an array of {array.dtype}; convert it with .astype(np.uint8)")
    known = MODES if channels is None else (channels,)
    if array.ndim in (3, 4) and array.shape[-1] in known and array.shape[-3] not in known:  # channels last
        array = np.moveaxis(array, -1, -3)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8 if array.dtype == np.uint8 else np.float32))


def _joined(singles: list[Tensor], wanted: str) -> Tensor:
    if not singles:
        raise ValueError(f"expected {wanted}, got an empty list")
    if any(single.shape[1:] != singles[0].shape[1:] for single in singles):
        sizes = ", ".join(str(list(single.shape[1:])) for single in singles[:5])
        raise ValueError(f"expected images of one size, got {sizes}; read them with `ns.read_images(paths, size)`")
    return torch.cat(singles if len({single.dtype for single in singles}) == 1 else list(map(to_float, singles)))


def _check_range(images: Tensor, wanted: str) -> None:
    largest = float(images.detach().abs().amax())
    if not math.isfinite(largest):
        raise ValueError(f"expected {wanted}, got numbers that are not finite (NaN or inf); look at what made them")
    if largest > LARGEST:
        raise ValueError(f"expected {wanted}, got floats up to {largest:g}; floats of 0 to 255 become x / 127.5 - 1")


def warn_of_range(images: Tensor, *, stacklevel: int = 3) -> None:
    """Warn of floats that look like images of another range than [-1, 1]."""
    if images.is_meta:
        return
    least, most = (float(n) for n in images.detach().aminmax())
    if 0 <= least < 0.1 and least < most <= 1:  # pictures of light colours alone have no black, in either range
        said = "all in [0, 1]; if black is 0 in them, make them 2 * x - 1"
    elif max(-least, most) > 1.5:
        said = f"from {least:.3g} to {most:.3g}; undo what normalised them"
    else:
        return
    warnings.warn(f"images are numbers in [-1, 1], and these are {said}", stacklevel=stacklevel)


def as_mask(mask: Any) -> Tensor:
    """What users call a mask, as a bool tensor, True = marked: of True and False, of 1 and 0, of the bytes 255 and 0; or a
    Pillow image that is white, and not transparent, where it marks, or has strokes of any colour on nothing, [H, W]. Raises
    ValueError for everything else."""
    if isinstance(mask, Image.Image):
        return white(pillow_pixels(mask, 4))
    try:
        values = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"a mask is a tensor, an array or a Pillow image, got {brief(mask)}; read a file with PIL.Image.open"
        ) from None
    if values.dtype == torch.uint8 and bool(((values == 0) | (values == 255)).all()):
        return values == 255
    if values.dtype != torch.bool and not bool(((values == 0) | (values == 1)).all()):
        least, most = values.min().item(), values.max().item()
        raise ValueError(
            f"a mask is True (1) where to generate and False (0) elsewhere, got values from {least:g} to {most:g}; compare "
            "it with a threshold"
        )
    return values != 0


def white(pixels: Tensor) -> Tensor:
    """Where bytes [4, H, W] are white and not transparent, bool [H, W]. Strokes of another colour on nothing count as well:
    where something is transparent and nothing white, what is not transparent is marked."""
    opaque = pixels[3] > 127
    marked = (pixels[:3].float().mean(dim=0) > 127.5) & opaque
    return marked if marked.any() or opaque.all() else opaque


def pillow_pixels(image: Image.Image, channels: int | None = None) -> Tensor:
    """A Pillow image as it is, turned upright, uint8 [C, H, W]; `channels`: None: as many as it has, 1, 3 or 4."""
    try:
        image = image.copy()
    except (ValueError, OSError) as error:
        raise ValueError(f"the Pillow image cannot be read ({error}); open its file again") from error
    if channels is None:
        grey = image.mode in ("1", "L", "I", "I;16", "I;16B", "I;16L")
        channels = 4 if image.has_transparency_data else 1 if grey else 3
    with opened(image, "the Pillow image") as copy:
        upright = ImageOps.exif_transpose(in_mode(copy, channels))
        pixels = np.array(upright.convert(MODES[channels]))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """RGBA for four channels, else RGB on white; keeps the EXIF data, which tell the orientation."""
    return _with_opacity(image) if channels == 4 else rgb_on_white(image)


def to_float(images: Tensor) -> Tensor:
    """Bytes to float32 in [-1, 1]; floats stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def on_white(images: Tensor) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] with 1, 3 or 4 channels in colour, [B, 3, H, W]: greys repeated, opacity over white."""
    if images.shape[1] == 4:
        opacity = (images[:, 3:] + 1) / 2
        return (images[:, :3] - 1) * opacity + 1
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 of the same shape, clamped and rounded; uint8 passes. Raises ValueError for NaN."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"expected float images in [-1, 1] or uint8, got {images.dtype}")
    images = images.detach().float()
    if images.isnan().any():
        raise ValueError("images hold NaN; expected numbers in [-1, 1]: look at the model that made them")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@contextmanager
def opened(source: Any, name: str) -> Iterator[Image.Image]:
    """A path, an open file or a Pillow image as the last; what goes wrong in the block is one kind of error."""
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            yield image
    except PermissionError:
        raise
    # Pillow's readers answer damaged data with whatever their parsing meets (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        said = re.sub(r" ?<_io\.\S+ object at \S+>", "", str(error))
        raise ValueError(
            f"{name} cannot be read as an image ({type(error).__name__}: {said}); expected a whole file in a format "
            "that Pillow knows, so convert it or replace it"
        ) from error


def _with_opacity(image: Image.Image) -> Image.Image:
    """RGBA; what says nothing of its opacity is opaque. Keeps the EXIF data."""
    result = image.convert("RGBA") if image.has_transparency_data else rgb_on_white(image).convert("RGBA")
    result.getexif().update(image.getexif())
    return result


def rgb_on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts over white; keeps the EXIF data, which tell the orientation."""
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion cuts at 255 instead of scaling.
        values = np.asarray(image).astype(np.int64)
        least, most = int(values.min()), int(values.max())
        if least < 0 or most > 65_535 or (image.mode == "I" and 0 < most < 4096):
            raise ValueError(
                f"pixels are whole numbers from {least} to {most} of unknown range; save it with 8 or 16 bits"
            )
        if 0 < most < 4096:
            warnings.warn(
                f"greys of 16 bits that go up to {most} only are nearly black; if they have 12 bits, scale them by 16",
                stacklevel=2,
            )
        grey = (values >> 8).astype(np.uint8)
        result = Image.fromarray(grey).convert("RGB")
    elif image.mode == "F":
        raise ValueError("pixels are floats of unknown range")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        result = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        result = image.convert("RGB")
    result.getexif().update(image.getexif())
    return result
