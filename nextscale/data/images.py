"""Image files to tensors and back: reading at a size, what users call images, uint8, exact files, labelled grids."""

import functools
import math
import os
import unicodedata
import warnings
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
from nextscale.settings import brief

Size = int | tuple[int, int]
PathLike = str | os.PathLike[str]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
MOST_SIDE = 16_384  # of an image that is read
MOST_ASPECT = 16  # of an image that is used whole: of longer ones the middle is used
# The longest side that a format can hold, and those that hold opacity, by Pillow's names.
LONGEST = {"JPEG": 65_535, "WEBP": 16_383, "GIF": 65_535, "ICO": 256, "AVIF": 65_535}
WITH_OPACITY = ("PNG", "WEBP", "TIFF", "JPEG2000", "TGA", "ICO", "AVIF")
MOST_PIXELS = 250_000_000  # of a grid
TILE, GAP = 128, 4  # in a grid images are shown at least so large, with so much between them


def height_width(size: Size) -> tuple[int, int]:
    """`size` as (height, width); an int means a square. Raises ValueError unless both are positive integers."""
    pair = (size, size) if isinstance(size, int) or not isinstance(size, Iterable) else tuple(size)
    if len(pair) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MOST_SIDE for n in pair):
        raise ValueError(f"size: expected a side or (height, width) of 1 to {MOST_SIDE} pixels, got {brief(size)}")
    return pair


def read_image_file(path: PathLike, size: Size, channels: int = 3, *, whole: bool = False) -> Tensor:
    """One image file as uint8 [C, h, w]: turned upright (EXIF), short side resized (Lanczos), centre-cropped.

    `channels`: 3, colours on white; 1, greys on white; 4, colours and opacity. `whole`: not cropped, so as large as it must
    be to cover `size`. Any format that Pillow reads; of an animation the first frame. Raises FileNotFoundError,
    PermissionError, and ValueError for a file that is no image, is damaged, or is larger than Pillow's decompression-bomb
    limit.
    """
    height_width(size)
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
            upright = _middle(upright, width / height)
            factor = max(Fraction(width, upright.width), Fraction(height, upright.height))
            covering = int(upright.width * factor), int(upright.height * factor)
            fitted = upright.resize(covering, Image.Resampling.LANCZOS)
        else:
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        pixels = np.array(fitted.convert(MODES[channels]))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()  # [C, h, w]


def picture_size(path: PathLike) -> tuple[int, int]:
    """Height and width in pixels of an image file, turned upright. Errors as in `decode_image`."""
    with _opened(path, str(path)) as image:
        width, height = image.size
        sideways = image.getexif().get(0x0112) in (5, 6, 7, 8)  # the tag of the orientation
    return (width, height) if sideways else (height, width)


def examine_image(source: Any, name: str) -> tuple[int, int]:
    """Decode all of an image, as cheaply as its format allows; returns its shorter and its longer side. Errors as in
    `decode_image`."""
    with _opened(source, name) as image:
        sides = min(image.size), max(image.size)
        image.draft("RGB", (8, 8))  # a JPEG is read whole, but only an eighth of its pixels are made
        _on_white(image)
        return sides


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


def read_images(paths: PathLike | Iterable[PathLike], size: Size, channels: int = 3) -> Tensor:
    """Image files as float [B, channels, h, w] in [-1, 1], each resized by its short side and centre-cropped to `size`.

    `paths`: one path or several; `size`: side of a square, or (height, width); `channels`: 3, 1 (greys) or 4 (with opacity).
    Errors as in `read_image_file`.
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        raise ValueError("read_images: expected at least one path, got none")
    return to_float(torch.stack([read_image_file(path, size, channels) for path in files]))


def as_images(images: Any, channels: int) -> Tensor:
    """What users call images, as float32 [B, channels, H, W] in [-1, 1]; what is that already passes as it is.

    Taken are tensors [C, H, W] or [B, C, H, W] of any float type in [-1, 1] or of uint8 in 0 to 255; arrays of the same, also
    [H, W, C] or [B, H, W, C]; Pillow images; and lists of such images of one size. Raises ValueError for everything else: other
    channels, numbers that are not finite or far from [-1, 1], none at all.
    """
    wanted = f"images [B, {channels}, H, W], float in [-1, 1] or uint8"
    if isinstance(images, Image.Image):
        images = _pixels(images, channels)
    elif isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"expected {wanted}, got an empty list")
        singles = [as_images(image, channels) for image in images]
        if any(single.shape != singles[0].shape for single in singles):
            sizes = ", ".join(str(list(single.shape[-2:])) for single in singles[:5])
            raise ValueError(f"expected images of one size, got {sizes}; read them with `ns.read_images(paths, size)`")
        return torch.cat(singles)
    elif isinstance(images, np.ndarray):
        if images.dtype.kind not in "uf" or (images.dtype.kind == "u" and images.dtype != np.uint8):
            raise ValueError(f"expected {wanted}, got an array of {images.dtype}; convert it with .astype(np.uint8)")
        if images.ndim in (3, 4) and images.shape[-1] == channels != images.shape[-3]:  # channels last
            images = np.moveaxis(images, -1, -3)
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise ValueError(
            f"expected {wanted}, got {type(images).__name__}; read files with `ns.read_images(paths, size)`"
        )
    if images.ndim == 2 and channels == 1:
        images = images[None]
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
        last = images.ndim == 4 and images.shape[-1] == channels
        hint = "; put the channels first: x.permute(0, 3, 1, 2)" if last else ""
        raise ValueError(f"expected {wanted}, got {list(images.shape)}{hint}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"expected {wanted}, got {images.dtype}; convert bytes with .to(torch.uint8)")
    images = to_float(images)
    largest = float(images.detach().abs().amax())
    if not math.isfinite(largest):
        raise ValueError(f"expected {wanted}, got numbers that are not finite (NaN or inf); look at what made them")
    if largest > 8:
        raise ValueError(f"expected {wanted}, got floats up to {largest:g}; floats of 0 to 255 become x / 127.5 - 1")
    return images


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """A Pillow image as it is, uint8 [C, H, W]."""
    with _opened(image.copy(), "the Pillow image") as copy:
        upright = ImageOps.exif_transpose(_with_opacity(copy) if channels == 4 else _on_white(copy))
        pixels = np.array(upright.convert(MODES[channels]))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()


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
    border: int | None = None,
) -> Image.Image:
    """Images in rows, as a Pillow image on white.

    `images`: [B, C, H, W] or [C, H, W] with 1, 3 or 4 channels, float in [-1, 1] or uint8. `labels`: one string for each
    image, written under it. `scale`: whole number by which pixels are repeated; by default images are shown at 128 px at
    least. `border`: pixels around each image, by default 4.
    """
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[1] not in MODES or 0 in batch.shape:
        raise ValueError(f"expected images [B, C, H, W] or [C, H, W] of 1, 3 or 4 channels, got {list(images.shape)}")
    if labels is not None and (isinstance(labels, str) or len(labels) != len(batch)):
        raise ValueError(f"expected one label for each of {len(batch)} images, got {labels!r}")
    for name, number, least, most in (
        ("columns", columns, 1, 10**6),
        ("scale", scale, 1, 1024),
        ("border", border, 0, 1024),
    ):
        if number is not None and not (isinstance(number, int) and least <= number <= most):
            raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {brief(number)}")
    colours = batch if batch.shape[1] == 3 else on_white(to_float(batch))
    pixels = to_uint8(colours).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    count, height, width, _ = pixels.shape
    scale = scale or _usual_scale(height, width)
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    height, width, gap = height * scale, width * scale, GAP if border is None else border
    if (columns * (width + gap) + gap) * (rows * (height + gap) + gap) > MOST_PIXELS:
        raise ValueError(
            f"a grid of {count} images of {height}x{width} pixels is too large; give a smaller scale, or fewer images"
        )

    font_size = min(18, max(12, width // 10))
    written = [unicodedata.normalize("NFC", str(label)) for label in labels] if labels is not None else []
    title = unicodedata.normalize("NFC", title) if title else ""
    font, title_font = _font(font_size, "".join(written)), _font(font_size + 4, title)
    line = font_size + 4
    texts = [_wrap(label, font, width) for label in written] if labels is not None else [[] for _ in range(count)]
    text_height = max(map(len, texts)) * line
    grid_width = columns * (width + gap) + gap
    heading = _wrap(title, title_font, grid_width - 2 * gap) if title else []
    top = (len(heading) * (line + 6) if heading else 0) + gap
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
    border: int | None = None,
) -> Path:
    """Write images, whole or not at all: for scores, every pixel as it is, or as a picture to look at.

    * One image, without texts, is written as it is: its own size and channels.
    * `path` without an extension is a folder: each image becomes a PNG in it as it is, 00000.png, 00001.png, ...
    * `path` that ends in .npz: uint8 [B, H, W, C] as `arr_0`, which scorers of samples read (ADM's).
    * Everything else is a grid (see `image_grid`) in the format of the extension.

    `images`: [B, C, H, W] or [C, H, W] with 1, 3 or 4 channels, float in [-1, 1] or uint8. Returns the path. Raises ValueError
    for an extension that Pillow cannot write and for what its format cannot hold, PermissionError for a folder that cannot be
    written.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz" or is_folder(path):
        batch = as_images(images, (images if isinstance(images, Tensor) else as_images(images, 3)).shape[-3])
        pixels = to_uint8(batch).permute(0, 2, 3, 1).cpu().numpy()
        if path.suffix.lower() == ".npz":
            with atomic_write(path) as temporary:
                np.savez(temporary, arr_0=pixels)
            return path
        for i, each in enumerate(pixels):
            with atomic_write(path / f"{i:05}.png") as temporary:
                Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each).save(temporary, format="PNG")
        return path
    format = image_format(path)
    single = isinstance(images, Tensor) and (images.ndim == 3 or (images.ndim == 4 and len(images) == 1))
    if single and labels is None and not title and scale in (None, 1) and not border:
        tile = images if images.ndim == 3 else images[0]
        if tile.ndim != 3 or tile.shape[0] not in MODES or 0 in tile.shape:
            raise ValueError(f"expected an image [C, H, W] of 1, 3 or 4 channels, got {list(images.shape)}")
        tile = tile if tile.shape[0] != 4 or format in WITH_OPACITY else on_white(to_float(tile[None]))[0]
        pixels = to_uint8(tile).permute(1, 2, 0).cpu().numpy()
        grid = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    else:
        grid = image_grid(images, columns=columns, labels=labels, title=title, scale=scale, border=border)
    if max(grid.size) > LONGEST.get(format, 2**31):
        raise ValueError(
            f"cannot write {path}: {grid.width}x{grid.height} pixels, and {format} holds at most {LONGEST[format]} a side; "
            "give a name that ends in .png, or other columns"
        )
    with atomic_write(path) as temporary:
        grid.save(temporary, format=format, quality=95)  # formats without a quality ignore it
    return path


def is_folder(path: PathLike) -> bool:
    """Whether images are to be written into a folder of that name: one without an extension."""
    return not Path(path).suffix


def image_format(path: PathLike) -> str:
    """Pillow's name of the format that an extension stands for. Raises ValueError if it writes none of that kind."""
    known, suffix = writable_extensions(), Path(path).suffix.lower()
    if suffix not in known:
        raise ValueError(
            f"cannot write {path}: unknown image extension {suffix!r}; expected one of .png, .jpg, .webp and "
            f"{len(known)} more that Pillow writes, .npz, or a folder's name, without an extension"
        )
    return known[suffix]


def check_grid(path: PathLike, count: int, size: tuple[int, int], columns: int) -> None:
    """Raise ValueError if a file cannot hold a grid of so many images: before they are made."""
    path = Path(path)
    if path.suffix.lower() == ".npz" or is_folder(path):
        return
    format, scale = image_format(path), _usual_scale(*size)
    columns = min(count, columns)
    width = columns * (size[1] * scale + GAP) + GAP
    height = math.ceil(count / columns) * (size[0] * scale + GAP + 44) + 60  # with texts
    if max(width, height) > LONGEST.get(format, 2**31) or width * height > MOST_PIXELS:
        raise ValueError(
            f"cannot write {path}: {count} images in {columns} columns make about {width}x{height} pixels, and {format} holds "
            f"at most {LONGEST.get(format, 2**31)} a side and {MOST_PIXELS:,} in all; lower --count, change --columns, or "
            "write single files: --out FOLDER, or a name that ends in .npz"
        )


def _usual_scale(height: int, width: int) -> int:
    return max(1, math.ceil(TILE / min(height, width)))


@functools.lru_cache(maxsize=32)
def _own_font(size: int) -> Any:
    """DejaVu Sans with the letters of Latin, Greek and Cyrillic scripts."""
    return ImageFont.truetype(str(Path(__file__).parent / "fonts" / "DejaVuSans-subset.ttf"), size)


def _font(size: int, text: str) -> Any:
    """Pillow's own font, or for a text that it lacks letters of, one that has those of more languages."""
    return ImageFont.load_default(size) if text.isascii() else _own_font(size)


def readable_extensions() -> frozenset[str]:
    """Extensions (".png") of the formats that Pillow opens here."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN)


def writable_extensions() -> dict[str, str]:
    """Extension (".png") to the name of its format, for those that Pillow writes here."""
    return {ending: name for ending, name in Image.registered_extensions().items() if name in Image.SAVE}


def _middle(image: Image.Image, aspect: float) -> Image.Image:
    """An image that is not much longer than a shape needs: of one that is the middle, or scaling it would take memory without
    end for what is never seen."""
    width = min(image.width, math.ceil(image.height * aspect * MOST_ASPECT))
    height = min(image.height, math.ceil(image.width / aspect * MOST_ASPECT))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _with_opacity(image: Image.Image) -> Image.Image:
    """RGBA; what says nothing of its opacity is opaque. Keeps the EXIF data."""
    result = image.convert("RGBA") if image.has_transparency_data else _on_white(image).convert("RGBA")
    result.getexif().update(image.getexif())
    return result


def _on_white(image: Image.Image) -> Image.Image:
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


def _wrap(text: str, font: Any, width: int, most: int = 2) -> list[str]:
    """Break a text into at most `most` lines that fit `width` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in text[:2000].split():
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
            words = words[: 4 * width]
            while words and font.getlength(words + "…") > width:
                words = words[:-1]
            kept[i] = words + "…"
    return kept
