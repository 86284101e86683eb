"""Image files to tensors and back: reading at a size, uint8, labelled grids."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from nextscale.files import atomic_write

Size = int | tuple[int, int]
PathLike = str | os.PathLike[str]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


def height_width(size: Size) -> tuple[int, int]:
    """`size` as (height, width); an int means a square. Raises ValueError unless both are positive integers."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in pair):
        raise ValueError(f"size: expected a positive integer or (height, width), got {size!r}")
    return pair


def read_image_file(path: PathLike, size: Size, channels: int = 3, *, whole: bool = False) -> Tensor:
    """One image file as uint8 [C, h, w]: turned upright (EXIF), short side resized (Lanczos), centre-cropped.

    `channels`: 3, colours on white; 1, greys on white; 4, colours and opacity. `whole`: not cropped, so as large as it must
    be to cover `size`. Any format that Pillow reads; of an animation the first frame. Raises FileNotFoundError,
    PermissionError, and ValueError for a file that is no image, is damaged, or is larger than Pillow's decompression-bomb
    limit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such image file: {path} (relative paths start from {Path.cwd()})")
    if not path.is_file():
        raise ValueError(f"expected an image file, got {path}, which is a folder or a device; name the files in it")
    try:
        return decode_image(path, size, str(path), channels, whole=whole)
    except PermissionError as error:
        raise PermissionError(error.errno, f"cannot read {path}: no permission; check its mode", str(path)) from error


def decode_image(source: Any, size: Size, name: str, channels: int = 3, *, whole: bool = False) -> Tensor:
    """As `read_image_file`, of a path, an open file or a Pillow image; `name` says in errors what it is."""
    height, width = height_width(size)
    if channels not in MODES:
        raise ValueError(f"channels: expected 1 (grey), 3 (colour) or 4 (with opacity), got {channels!r}")
    with _opened(source, name) as image:
        upright = ImageOps.exif_transpose(_with_opacity(image) if channels == 4 else _on_white(image))
        if whole:  # the side that is too long keeps its ends, rounded down as torchvision's Resize does
            factor = max(Fraction(width, upright.width), Fraction(height, upright.height))
            covering = int(upright.width * factor), int(upright.height * factor)
            fitted = upright.resize(covering, Image.Resampling.LANCZOS)
        else:
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        pixels = np.array(fitted.convert(MODES[channels]))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()  # [C, h, w]


def examine_image(source: Any, name: str) -> int:
    """Decode all of an image, as cheaply as its format allows; returns its shorter side. Errors as in `decode_image`."""
    with _opened(source, name) as image:
        side = min(image.size)
        image.draft("RGB", (8, 8))  # a JPEG is read whole, but only an eighth of its pixels are made
        _on_white(image)
        return side


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    """A path, an open file or a Pillow image as the last; what goes wrong in the block is one kind of error."""
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            yield image
    except PermissionError:
        raise
    # Pillow's readers answer damaged data with whatever their parsing meets (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read as an image ({type(error).__name__}: {error}); expected a whole file in a format "
            "that Pillow knows, so convert it or replace it"
        ) from error


def read_images(paths: PathLike | Iterable[PathLike], size: Size) -> Tensor:
    """Image files as float [B, 3, h, w] in [-1, 1], each resized by its short side and centre-cropped to `size`.

    `paths`: one path or several; `size`: side of a square, or (height, width). Errors as in `read_image_file`.
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        raise ValueError("read_images: expected at least one path, got none")
    return to_float(torch.stack([read_image_file(path, size) for path in files]))


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


def image_grid(
    images: Tensor,
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Images in rows, as a Pillow image on white.

    `images`: [B, C, H, W] or [C, H, W] with 1, 3 or 4 channels, float in [-1, 1] or uint8. `labels`: one string for each
    image, written under it. `scale`: whole number by which pixels are repeated; by default images are shown at 128 px at
    least.
    """
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[1] not in MODES or 0 in batch.shape:
        raise ValueError(f"expected images [B, C, H, W] or [C, H, W] of 1, 3 or 4 channels, got {list(images.shape)}")
    if labels is not None and (isinstance(labels, str) or len(labels) != len(batch)):
        raise ValueError(f"expected one label for each of {len(batch)} images, got {labels!r}")
    for name, number in (("columns", columns), ("scale", scale)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    colours = batch if batch.shape[1] == 3 else on_white(to_float(batch))
    pixels = to_uint8(colours).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    count, height, width, _ = pixels.shape
    scale = scale or max(1, math.ceil(128 / min(height, width)))
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    height, width, gap = height * scale, width * scale, 4

    font_size = min(18, max(12, width // 10))
    font, title_font = ImageFont.load_default(font_size), ImageFont.load_default(font_size + 4)
    line = font_size + 4
    texts = [_wrap(str(label), font, width) for label in labels] if labels is not None else [[] for _ in range(count)]
    text_height = max(map(len, texts)) * line
    grid_width = columns * (width + gap) + gap
    heading = _wrap(title, title_font, grid_width - 2 * gap) if title else []
    top = len(heading) * (line + 6) + gap
    grid = Image.new("RGB", (grid_width, top + rows * (height + text_height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for i, words in enumerate(heading):
        draw.text((gap, gap + i * (line + 6)), words, fill="black", font=title_font)
    for i in range(count):
        x = gap + i % columns * (width + gap)
        y = top + i // columns * (height + text_height + gap)
        tile = Image.fromarray(pixels[i]).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, (x, y))
        for j, words in enumerate(texts[i]):
            left = x + max(0, (width - int(font.getlength(words))) // 2)
            draw.text((left, y + height + j * line), words, fill="black", font=font)
    return grid


def save_images(
    images: Tensor,
    path: PathLike,
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int | None = None,
) -> Path:
    """Write images as one grid (see `image_grid`) in the format of the extension of `path`, whole or not at all.

    Returns the path. Raises ValueError for an extension that Pillow cannot write, PermissionError for a folder that
    cannot be written.
    """
    path = Path(path)
    known = writable_extensions()
    if path.suffix.lower() not in known:
        raise ValueError(
            f"cannot write {path}: unknown image extension {path.suffix!r}; expected one of .png, .jpg, .webp and "
            f"{len(known)} more that Pillow writes"
        )
    grid = image_grid(images, columns=columns, labels=labels, title=title, scale=scale)
    with atomic_write(path) as temporary:
        grid.save(temporary, format=known[path.suffix.lower()], quality=95)  # formats without a quality ignore it
    return path


def readable_extensions() -> frozenset[str]:
    """Extensions (".png") of the formats that Pillow opens here."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN)


def writable_extensions() -> dict[str, str]:
    """Extension (".png") to the name of its format, for those that Pillow writes here."""
    return {ending: name for ending, name in Image.registered_extensions().items() if name in Image.SAVE}


def _with_opacity(image: Image.Image) -> Image.Image:
    """RGBA; what says nothing of its opacity is opaque. Keeps the EXIF data."""
    result = image.convert("RGBA") if image.has_transparency_data else _on_white(image).convert("RGBA")
    result.getexif().update(image.getexif())
    return result


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts over white; keeps the EXIF data, which tell the orientation."""
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion cuts at 255 instead of scaling.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
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


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 2) -> list[str]:
    """Break a text into at most `most` lines that fit `width` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = lines[:most]
    if len(lines) > most:
        kept[-1] += "…"
    for i, words in enumerate(kept):
        if font.getlength(words) > width:
            words = words.rstrip("…")
            while words and font.getlength(words + "…") > width:
                words = words[:-1]
            kept[i] = words + "…"
    return kept
