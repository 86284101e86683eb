"""Arrays in an `.npz` without loading them: where they lie, what they are, and images of one as a data set."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from nextscale.data.dataset import ImageDataset
from nextscale.data.images import Size, check_share, decode_image, height_width
from nextscale.data.left_out import LeftOut
from nextscale.files import as_path, brief_path, check_readable
from nextscale.pixels import to_float

Header = tuple[tuple[int, ...], Any, bool]  # shape, dtype, whether columns come first


def header_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header:
    with archive.open(info) as file:
        shape, columns, dtype = read_header(file)
        begin = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{archive.filename}: {info.filename} holds Python objects, which are not read; save numbers")
    if begin + int(np.prod(shape, dtype=object)) * dtype.itemsize != info.file_size:
        raise ValueError(f"{archive.filename}: {info.filename} is not as long as it says; make or download it again")
    return shape, dtype, columns


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except ValueError as error:
        raise ValueError(f"{getattr(file, 'name', 'a member')} is no array of numpy ({error})") from error


def exactly(file: IO[bytes], count: int, path: Path) -> bytes:
    try:
        content = file.read(count)
    except (zipfile.BadZipFile, OSError, EOFError) as error:  # the checksum, at the end
        raise ValueError(f"{brief_path(path)} is damaged ({error}); make or download it again") from error
    if len(content) < count:
        raise ValueError(f"{brief_path(path)} ends too early; make or download it again")
    return content


# ---- images of an .npz as a data set -------------------------------------------------------------------------------------


class NpzDataset(ImageDataset):
    """Images of an `.npz` (`arr_0`, bytes [N, H, W, 3]), read from the file when they are asked for.

    An item is a dict: `image` float [C, H, W] in [-1, 1], `label` (of `arr_1`, where there is one, else 0), `labels`
    ((label,)), `caption` "", `mirror_ok` True.
    """

    def __init__(
        self,
        pixels: Any,
        rows: Sequence[int],
        numbers: Sequence[int],
        stamps: list[str],
        size: Size,
        channels: int = 3,
        whole: bool = False,
    ) -> None:
        self.pixels, self.rows, self.numbers, self.stamps = pixels, rows, numbers, stamps
        super().__init__(size, channels, whole)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        row = Image.fromarray(np.array(self.pixels[self.rows[index]]))
        image = decode_image(row, self.size, f"image {self.rows[index]}", self.channels, whole=self.whole)
        return {"image": to_float(image), **self.said(index)}

    def said(self, index: int) -> dict[str, Any]:
        label = self.numbers[index]
        return {"label": label, "labels": (label,), "caption": "", "mirror_ok": True}


@dataclass(frozen=True, eq=False)
class NpzImages:
    """The images of an `.npz` at one size, split by content. `classes`: the numbers in `arr_1`, as names."""

    train: NpzDataset
    val: NpzDataset
    classes: tuple[str, ...]
    size: Size
    left_out: LeftOut = field(default_factory=LeftOut)
    captions_from: str = "nothing"


def npz_images(
    path: str | os.PathLike[str], size: Size = 64, *, channels: int = 3, whole: bool = False, validation: float = 0.0
) -> NpzImages:
    """Images of an `.npz` as scorers of samples keep them: `arr_0`, bytes [N, H, W, 3], and perhaps class numbers `arr_1` [N].

    `size`, `channels`, `whole` as for `image_folder`. `validation`: share held out, in [0, 1), by content. Raises
    FileNotFoundError, and ValueError for what is no such file, or is compressed, so that images cannot be read one by one.
    """
    path = as_path(path, "an .npz of images")
    height_width(size)
    check_share(validation)
    check_readable(path, "an .npz of images (arr_0)")
    pixels = _mapped(path, "arr_0")
    if pixels is None or pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or not len(pixels):
        got = "none" if pixels is None else f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"{brief_path(path)}: expected arr_0, bytes [N, H, W, 3], got {got}")
    said = _mapped(path, "arr_1")
    if said is not None and (said.shape != pixels.shape[:1] or said.dtype.kind not in "iu" or int(said.min()) < 0):
        raise ValueError(
            f"{brief_path(path)}: expected class numbers arr_1 [{len(pixels)}], got {said.dtype} {list(said.shape)}"
        )
    labels = [0] * len(pixels) if said is None else said.tolist()
    stamps = [hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).hexdigest() for row in pixels]
    held_out = set(sorted(set(stamps))[: round(len(set(stamps)) * validation)])
    sides = [[i for i, stamp in enumerate(stamps) if (stamp in held_out) == held] for held in (False, True)]
    train, val = (
        NpzDataset(pixels, rows, [labels[i] for i in rows], [stamps[i] for i in rows], size, channels, whole)
        for rows in sides
    )
    left_out = LeftOut()
    left_out.total = len(pixels)
    return NpzImages(train, val, tuple(str(number) for number in range(max(labels) + 1)), size, left_out)


def _mapped(path: Path, name: str) -> Any:
    """An array of an `.npz` as it lies in the file, mapped into memory; None without it."""
    try:
        with zipfile.ZipFile(path) as archive:
            if name + ".npy" not in archive.namelist():
                return None
            info = archive.getinfo(name + ".npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{brief_path(path)} is compressed; save it with np.savez instead of savez_compressed")
            shape, dtype, columns = header_of(archive, info)
            with path.open("rb") as raw:  # names in the local header may be longer than in the directory
                raw.seek(info.header_offset + 26)
                begin = info.header_offset + 30 + sum(int.from_bytes(raw.read(2), "little") for _ in range(2))
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{brief_path(path)} is no whole .npz ({error}); make or download it again") from error
    total = int(np.prod(shape, dtype=object)) * dtype.itemsize
    return np.memmap(path, dtype, "r", begin + info.file_size - total, shape, order="F" if columns else "C")
