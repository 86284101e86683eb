"""Image files to tensors and back: reading at a size, exact files, labelled grids."""

import functools
import io
import math
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from nextscale.files import as_path, atomic_write, brief_path
from nextscale.pixels import MODES, as_bytes, in_mode, on_white, opened, rgb_on_white, to_float, to_uint8
from nextscale.settings import as_int, brief, whole_number

Size = int | tuple[int, int]
PathLike = str | os.PathLike[str]
MOST_SIDE = 16_384  # of an image that is read
MOST_ASPECT = 16  # of an image that is used whole: of longer ones the middle is used
# The longest side that a format can hold, and those that hold opacity, by Pillow's names.
LONGEST = {"JPEG": 65_535, "WEBP": 16_383, "GIF": 65_535, "ICO": 256, "AVIF": 65_535}
WITH_OPACITY = ("PNG", "WEBP", "TIFF", "JPEG2000", "TGA", "ICO", "AVIF")
MOST_PIXELS = 250_000_000  # of a grid
MOST_BYTES = 2**31  # of images that are written one by one
TILE, GAP = 128, 4  # in a grid images are shown at least so large, with so much between them


def height_width(size: Size) -> tuple[int, int]:
    """`size` as (height, width); a number means a square. Raises ValueError unless both are positive whole numbers."""
    try:
        sides = (
            size
            if isinstance(size, Iterable) and not isinstance(size, set | dict) and getattr(size, "ndim", 1) != 0
            else (size, size)
        )
        pair = tuple(as_int(side) for side in sides)
    except TypeError:
        pair = ()
    if len(pair) != 2 or not all(1 <= side <= MOST_SIDE for side in pair):
        raise ValueError(f"size: expected a side or (height, width) of 1 to {MOST_SIDE} pixels, got {brief(size)}")
    return pair[0], pair[1]


def check_share(validation: Any) -> None:
    """Raise ValueError for what is no share of images to hold out."""
    if not isinstance(validation, float | int) or isinstance(validation, bool) or not 0 <= validation < 1:
        raise ValueError(f"validation: expected a share in [0, 1), got {brief(validation)}; 0.1 holds out a tenth")


def read_image_file(path: PathLike, size: Size | None, channels: int = 3, *, whole: bool = False) -> Tensor:
    """One image file as uint8 [C, h, w]: turned upright (EXIF), short side resized (Lanczos), centre-cropped.

    `size`: None: as large as it is. `channels`: 3, colours on white; 1, greys on white; 4, colours and opacity. `whole`: not
    cropped, so as large as it must be to cover `size`. Any format that Pillow reads; of an animation the first frame. Raises
    FileNotFoundError, PermissionError, and ValueError for a file that is no image, is damaged, or is larger than Pillow's
    decompression-bomb limit.
    """
    if size is not None:
        height_width(size)
    path = as_path(path, "an image file")
    shown = brief_path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such image file: {shown} (relative paths start from {Path.cwd()})")
    if not path.is_file():
        raise ValueError(f"expected an image file, got {shown}, which is a folder or a device; name the files in it")
    try:
        return decode_image(path, size, str(path), channels, whole=whole)
    except PermissionError as error:
        raise PermissionError(error.errno, f"cannot read {path}: no permission; check its mode", str(path)) from error


def decode_image(source: Any, size: Size | None, name: str, channels: int = 3, *, whole: bool = False) -> Tensor:
    """As `read_image_file`, of a path, an open file or a Pillow image; `name` says in errors what it is."""
    if isinstance(channels, bool) or not isinstance(channels, int) or channels not in MODES:
        raise ValueError(f"channels: expected 1 (grey), 3 (colour) or 4 (with opacity), got {brief(channels)}")
    with opened(source, name) as image:
        if size is None and max(image.size) > MOST_SIDE:
            raise ValueError(f"{image.width}x{image.height} pixels; at most {MOST_SIDE} a side can be read whole")
        upright = ImageOps.exif_transpose(in_mode(image, channels))
        width, height = upright.size if size is None else height_width(size)[::-1]
        if size is None:
            fitted = upright
        elif whole:  # the side that is too long keeps its ends, rounded down as torchvision's Resize does
            upright = _middle(upright, width / height)
            factor = max(Fraction(width, upright.width), Fraction(height, upright.height))
            covering = int(upright.width * factor), int(upright.height * factor)
            fitted = upright.resize(covering, Image.Resampling.LANCZOS)
        else:
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        pixels = np.array(fitted.convert(MODES[channels]))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()  # [C, h, w]


class Seen(NamedTuple):
    """What a look at an image found: its shorter and its longer side, and whether it has further frames."""

    short: int
    long: int
    frames: bool = False

    @property
    def narrow(self) -> bool:
        """Whether only its middle is read."""
        return self.long > MOST_ASPECT * self.short


def _look(image: Image.Image) -> Seen:
    return Seen(min(image.size), max(image.size), bool(getattr(image, "is_animated", False)))


def examine_image(source: Any, name: str) -> Seen:
    """Decode all of an image, as cheaply as its format allows. Errors as in `decode_image`."""
    with opened(source, name) as image:
        seen = _look(image)
        image.draft("RGB", (8, 8))  # a JPEG is read whole, but only an eighth of its pixels are made
        rgb_on_white(image)
        return seen


def read_images(paths: PathLike | Iterable[PathLike], size: Size, channels: int = 3) -> Tensor:
    """Image files as float [B, channels, h, w] in [-1, 1], each resized by its short side and centre-cropped to `size`.

    `paths`: one path or several; `size`: side of a square, or (height, width); `channels`: 3, 1 (greys) or 4 (with opacity).
    Warns of images of which only the middle or the first frame is used. Errors as in `read_image_file`.
    """
    files = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike) else [paths]
    if not files:
        raise ValueError("read_images: expected at least one path, got none")
    height_width(size)
    images = torch.stack([read_image_file(path, size, channels) for path in files])
    for path in files:
        with Image.open(path) as image:  # its head
            seen = _look(image)
        if seen.narrow:
            warnings.warn(f"{path} is more than {MOST_ASPECT} times as long as wide; its middle is used", stacklevel=2)
        if seen.frames:
            warnings.warn(f"{path} has several frames; the first is used", stacklevel=2)
    return to_float(images)


def image_grid(
    images: Any,
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int | None = None,
    border: int | None = None,
) -> Image.Image:
    """Images in rows, as a Pillow image on white.

    `images`: [B, C, H, W] or [C, H, W] with 1, 3 or 4 channels, float in [-1, 1] or uint8, or what else `as_images` takes.
    `labels`: one string for each image, written under it. `scale`: whole number by which pixels are repeated; by default images
    are shown at 128 px at least. `border`: pixels around each image, by default 4.
    """
    batch = as_bytes(images)
    if labels is not None and (
        isinstance(labels, str) or not isinstance(labels, Sequence) or len(labels) != len(batch)
    ):
        raise ValueError(f"expected one label for each of {len(batch)} images, got {brief(labels)}")
    if wrong := [text for text in (*(labels or ()), title) if not (text is None or isinstance(text, str))]:
        raise ValueError(f"labels and title are texts, got {brief(wrong[0])}")
    columns = None if columns is None else whole_number("columns", columns, 1, 10**6)
    scale = None if scale is None else whole_number("scale", scale, 1, 1024)
    border = None if border is None else whole_number("border", border, 0, 1024)
    colours = batch if batch.shape[1] == 3 else to_uint8(on_white(to_float(batch)))
    pixels = colours.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
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
    written = [_drawable(str(label)) for label in labels] if labels is not None else []
    title = _drawable(str(title)) if title else ""
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
    images: Any,
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

    `images`: [B, C, H, W] or [C, H, W] with 1, 3 or 4 channels, float in [-1, 1] or uint8, or what else `as_images` takes.
    Returns the path. Raises ValueError for an extension that Pillow cannot write, for what its format cannot hold, for a folder
    with other files in it, and for texts and looks where images are written as they are; PermissionError for a folder that
    cannot be written.
    """
    path, batch = as_path(path, "a file to write"), as_bytes(images)
    looks = {"columns": columns, "labels": labels, "title": title or None, "scale": scale, "border": border}
    if writes_singles(path):
        if given := [name for name, value in looks.items() if value is not None]:
            raise ValueError(f"{path} takes images as they are, got {given[0]}=; leave it out, or write a .png")
        return _save_singles(batch, path)
    format = image_format(path)
    if len(batch) == 1 and labels is None and not title and scale in (None, 1) and not border:
        tile = batch if batch.shape[1] != 4 or format in WITH_OPACITY else to_uint8(on_white(to_float(batch)))
        (picture,) = _pictures(tile)
    else:
        picture = image_grid(batch, columns=columns, labels=labels, title=title, scale=scale, border=border)
    if max(picture.size) > LONGEST.get(format, 2**31):
        raise ValueError(
            f"cannot write {path}: {picture.width}x{picture.height} pixels, and {format} holds at most {LONGEST[format]} a "
            "side; give a name that ends in .png, or other columns"
        )
    with atomic_write(path) as temporary:
        picture.save(temporary, format=format, quality=95)  # formats without a quality ignore it
    return path


def save_animation(
    frames: Sequence[Any], path: PathLike, *, seconds: float = 0.5, last: float = 2.0, **looks: Any
) -> Path:
    """Write grids of images (see `image_grid`, which `looks` are for) as an endless animation (GIF, WebP), whole or not at all.

    `frames`: images [B, C, H, W] each, of one size. `seconds`: of each frame; `last`: of the last one. Returns the path.
    """
    path, format = as_path(path, "a file to write"), image_format(path)
    if format not in ("GIF", "WEBP"):
        raise ValueError(f"an animation is written as .gif or .webp, got {path}")
    first, *others = [image_grid(images, **looks) for images in frames]
    times = [round(1000 * seconds)] * len(others) + [round(1000 * last)]
    with atomic_write(path) as temporary:
        first.save(temporary, format=format, save_all=True, append_images=others, duration=times, loop=0, quality=95)
    return path


def _save_singles(batch: Tensor, path: Path) -> Path:
    """Write bytes [B, C, H, W] as an array or into a folder."""
    if path.suffix:
        with atomic_write(path) as temporary, temporary.open("wb") as file:  # to a name numpy may add an ending
            np.savez(file, arr_0=batch.permute(0, 2, 3, 1).cpu().numpy())
        return path
    check_folder(path, len(batch))
    for name, picture in zip(_names(len(batch)), _pictures(batch), strict=True):
        with atomic_write(path / name) as temporary:
            picture.save(temporary, format="PNG")
    return path


def _pictures(batch: Tensor) -> Iterator[Image.Image]:
    """Pillow images of bytes [B, C, H, W], as they are."""
    for pixels in batch.permute(0, 2, 3, 1).cpu().numpy():
        yield Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _names(count: int) -> list[str]:
    """Names of the files in a folder of so many images."""
    return [f"{i:05}.png" for i in range(count)]


def check_folder(path: PathLike, count: int) -> None:
    """Raise ValueError if a folder holds other files than the images that will be written into it: they would be scored."""
    path = Path(path)
    if path.is_dir() and (others := sorted({file.name for file in path.iterdir()} - set(_names(count)))):
        raise ValueError(
            f"{path} holds other files than the {count} images to write ({brief(others[0])} ...); give a new folder, or a name "
            "with an extension"
        )


def writes_singles(path: PathLike) -> bool:
    """Whether images are written one by one, as they are: into a folder, whose name has no extension, or an array (.npz)."""
    return _ending(path) in ("", ".npz")


def _ending(path: PathLike) -> str:
    """The extension of a file, in small letters; of ".png", too."""
    name = Path(path).name
    return (Path(path).suffix or (name if name.startswith(".") else "")).lower()


def image_format(path: PathLike) -> str:
    """Pillow's name of the format that an extension stands for. Raises ValueError if it writes none of that kind."""
    known, suffix = writable_extensions(), _ending(path)
    if suffix not in known or not _writes(known[suffix]):
        raise ValueError(
            f"cannot write {path}: unknown image extension {brief(suffix)}; expected .png, .jpg, .webp or another that Pillow "
            "writes colours in, .npz, or a folder's name, without an extension"
        )
    return known[suffix]


@functools.lru_cache(maxsize=64)
def _writes(format: str) -> bool:
    """Whether Pillow writes colours in a format here: some want a library, or black and white."""
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), format=format)
    except (OSError, ValueError, KeyError):
        return False
    return True


def check_grid(path: PathLike, count: int, size: tuple[int, int], columns: int) -> None:
    """Raise ValueError if a file cannot hold a grid of so many images: before they are made."""
    path = Path(path)
    if writes_singles(path):
        check_folder(path, count)
        if count * math.prod(size) * 4 > MOST_BYTES:
            raise ValueError(
                f"{count} images of {size[0]}x{size[1]} pixels are too many at once; lower --count, and give each command a "
                "folder and a --seed of its own"
            )
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
    return max(1, min(math.ceil(TILE / min(height, width)), 8 * TILE // max(height, width)))


@functools.lru_cache(maxsize=32)
def _own_font(size: int) -> Any:
    """DejaVu Sans with the letters of Latin, Greek and Cyrillic scripts."""
    return ImageFont.truetype(str(Path(__file__).parent / "fonts" / "DejaVuSans-subset.ttf"), size)


def _font(size: int, text: str) -> Any:
    """Pillow's own font, or for a text that it lacks letters of, one that has those of more languages."""
    return ImageFont.load_default(size) if text.isascii() else _own_font(size)


def _drawable(text: str) -> str:
    """A text with letters that a font has: others as near ones of ASCII, or as question marks."""
    return text if text.isascii() else "".join(map(_letter, unicodedata.normalize("NFC", text)))


@functools.lru_cache(maxsize=4096)
def _letter(letter: str) -> str:
    font = _own_font(TILE)
    if letter.isascii() or letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff")):
        return letter
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


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
