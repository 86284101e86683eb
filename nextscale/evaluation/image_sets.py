"""Sets of images to be scored: the reference evaluator's `.npz`, a folder of files, or a data set; read a few at a time.

The container (openai/guided-diffusion): `arr_0`, bytes [N, H, W, 3]; and, of a reference, the moments of a whole data set,
`mu`, `sigma` (pooled features) and `mu_s`, `sigma_s` (spatial ones), which then count instead of the images.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nextscale.data.images import Size, height_width
from nextscale.data.npz import exactly, header_of, read_header
from nextscale.evaluation.scores import FeatureMoments
from nextscale.files import as_path, atomic_write, brief_path, check_readable, digest, read_json
from nextscale.pixels import on_white, opened, rgb_on_white, to_float, to_uint8
from nextscale.settings import brief

Array = Any  # of numpy
IMAGES = "arr_0"
MOMENTS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MOST_MOMENTS = 2**28  # bytes of one array of moments
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DATE = (1980, 1, 1, 0, 0, 0)  # of all members, so that equal content is equal files


class ImageSet(Protocol):
    """Images of one size, and what is known of them."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a protocol sheet says of the set: `kind`, `digest`, and where known `formats`, `per_class`, `order`, `made`."""

    def __len__(self) -> int: ...

    def batches(self, count: int) -> Iterator[Array]:
        """Bytes [b, H, W, 3] in their order, `count` at a time."""

    def moments(self, which: str) -> FeatureMoments | None:
        """Those stored for `pooled` or `spatial` features; None: there are none."""


# ---- the container -------------------------------------------------------------------------------------------------------


class NpzSet:
    """The images and moments of an `.npz`. Nothing is loaded but what is asked for; no pickle is executed.

    Raises FileNotFoundError, and ValueError for what is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = as_path(path, "an .npz of images")
        check_readable(self.path, "an .npz of images (arr_0)")
        self.name = self.path.name
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = {name.removesuffix(".npy"): archive.getinfo(name) for name in archive.namelist()}
                self._headers = {name: header_of(archive, info) for name, info in members.items() if name in _KNOWN}
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            raise ValueError(
                f"{brief_path(self.path)} is no whole .npz ({error}); make or download it again"
            ) from error
        if not self._headers:
            raise ValueError(
                f"{brief_path(self.path)} has neither images ({IMAGES}) nor moments (mu, sigma); it has "
                f"{brief(sorted(members))}"
            )
        shape = self._headers[IMAGES][0] if IMAGES in self._headers else (0, 1, 1, 3)
        if len(shape) != 4 or shape[3] != 3 or (IMAGES in self._headers and self._headers[IMAGES][1] != np.uint8):
            kind = self._headers[IMAGES][1]
            raise ValueError(
                f"{brief_path(self.path)}: expected {IMAGES} of bytes [N, H, W, 3], got {kind} {list(shape)}"
            )
        self.count, self.size = shape[0], (shape[1], shape[2])
        self._facts: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def facts(self) -> Mapping[str, Any]:
        """With the digest of the file, which is read for it once."""
        if self._facts is None:
            stored = [name for name in MOMENTS if self._has(name)]
            facts: dict[str, Any] = {"kind": "npz", "digest": digest(self.path), "stored_moments": stored}
            self._facts = facts | _made_facts(self.path)
        return self._facts

    def batches(self, count: int) -> Iterator[Array]:
        """Rows are read from the file as they lie there."""
        if IMAGES not in self._headers:
            return
        height, width = self.size
        with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES + ".npy") as file:
            read_header(file)
            if self._headers[IMAGES][2]:  # columns first: no row lies in one piece
                raise ValueError(
                    f"{brief_path(self.path)} keeps {IMAGES} in Fortran order; save it again with np.savez"
                )
            for first in range(0, self.count, count):
                rows = min(count, self.count - first)
                content = exactly(file, rows * height * width * 3, self.path)
                yield np.frombuffer(content, np.uint8).reshape(rows, height, width, 3)

    def moments(self, which: str) -> FeatureMoments | None:
        """See `ImageSet`."""
        if not self._has(which):
            return None
        mean, covariance = (self._array(name) for name in MOMENTS[which])
        try:
            return FeatureMoments(mean, covariance)
        except ValueError as error:
            raise ValueError(f"{brief_path(self.path)}, {' and '.join(MOMENTS[which])}: {error}") from error

    def _has(self, which: str) -> bool:
        return all(name in self._headers for name in MOMENTS[which])

    def _array(self, name: str) -> Array:
        shape, dtype, columns = self._headers[name]
        if dtype.kind != "f" or int(np.prod(shape, dtype=object)) * dtype.itemsize > MOST_MOMENTS:
            raise ValueError(f"{brief_path(self.path)}: expected {name} of floats, got {dtype} {list(shape)}")
        with zipfile.ZipFile(self.path) as archive, archive.open(name + ".npy") as file:
            read_header(file)
            content = exactly(file, int(np.prod(shape)) * dtype.itemsize, self.path)
        return np.frombuffer(content, dtype).reshape(shape, order="F" if columns else "C").astype(np.float64)


_KNOWN = {IMAGES, *(name for names in MOMENTS.values() for name in names)}


def write_npz(
    path: str | os.PathLike[str],
    blocks: Iterable[Array],
    shape: tuple[int, int, int, int],
    moments: Mapping[str, FeatureMoments] | None = None,
) -> Path:
    """Write images that come in blocks [b, H, W, 3] of bytes as one `.npz`, which `numpy.load` reads; whole or not at all,
    and the same bytes for the same content. `moments`: of `pooled` and `spatial` features, to be stored beside them."""
    path = as_path(path, "an .npz to write")
    arrays: dict[str, Array] = {}
    for which, found in (moments or {}).items():
        arrays |= dict(zip(MOMENTS[which], (found.mean, found.covariance), strict=True))
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(IMAGES + ".npy", DATE), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for block in blocks:
                if block.dtype != np.uint8 or block.shape[1:] != shape[1:]:
                    raise ValueError(f"expected bytes [b, {', '.join(map(str, shape[1:]))}], got {list(block.shape)}")
                file.write(np.ascontiguousarray(block).data)
                written += len(block)
            if written != shape[0]:
                raise ValueError(f"expected {shape[0]} images, got {written}")
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(name + ".npy", DATE), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return path


# ---- folders and data sets -----------------------------------------------------------------------------------------------


class FolderSet:
    """The image files of a folder and those below it, in the order of their names; below it the first folder's name is the
    class.

    size: crop and resize to that (short side, then the centre; boxes of two, then bicubic, as ADM and LlamaGen do it).
    Without, all must have one size.
    """

    def __init__(self, path: str | os.PathLike[str], size: Size | None = None) -> None:
        self.path = as_path(path, "a folder of images")
        self.name = self.path.name
        if not self.path.is_dir():
            raise FileNotFoundError(f"{brief_path(self.path)} is no folder; expected a folder of images")
        found = (Path(folder) / name for folder, _, names in os.walk(self.path) for name in names)
        self.files = sorted(
            (file for file in found if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")),
            key=lambda file: str(file.relative_to(self.path)),
        )
        if not self.files:
            raise ValueError(f"{brief_path(self.path)} has no images ({', '.join(SUFFIXES)})")
        self.crop = None if size is None else height_width(size)
        self.size = self.crop or self._pixels(self.files[0]).shape[:2]
        self._facts: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def facts(self) -> Mapping[str, Any]:
        """With a digest of all names and contents, which are read for it once."""
        if self._facts is None:
            hashed = hashlib.blake2b(digest_size=32)
            for file in self.files:
                hashed.update(str(file.relative_to(self.path)).encode(errors="surrogateescape"))
                hashed.update(digest(file).encode())
            classes = Counter(file.relative_to(self.path).parts[0] for file in self.files if file.parent != self.path)
            facts: dict[str, Any] = {"kind": "folder", "digest": hashed.hexdigest()}
            facts["formats"] = dict(
                sorted(Counter(file.suffix.lower().removeprefix(".") for file in self.files).items())
            )
            if self.crop:
                facts["crop"] = f"short side and centre, {self.crop[0]}x{self.crop[1]}, boxes of two, then bicubic"
            if classes:
                facts |= {"per_class": _spread(classes), "order": "by class"}
            self._facts = facts | _made_facts(self.path)
        return self._facts

    def batches(self, count: int) -> Iterator[Array]:
        """Files are opened when their turn comes."""
        for first in range(0, len(self.files), count):
            images = []
            for file in self.files[first : first + count]:
                pixels = self._pixels(file)
                if pixels.shape[:2] != self.size:
                    got, wanted = ("x".join(map(str, size)) for size in (pixels.shape[:2], self.size))
                    raise ValueError(
                        f"{brief_path(file)} has {got} pixels, others {wanted}; give a --size to crop all to"
                    )
                images.append(pixels)
            yield np.stack(images)

    def moments(self, which: str) -> FeatureMoments | None:
        """None."""
        return None

    def _pixels(self, file: Path) -> Array:
        from PIL import ImageOps

        with opened(file, brief_path(file)) as image:
            upright = ImageOps.exif_transpose(rgb_on_white(image))
            if self.crop:
                upright = centre_crop(upright, self.crop)
            return np.asarray(upright.convert("RGB"))


def centre_crop(image: Any, size: tuple[int, int]) -> Any:
    """A Pillow image cut to (height, width) as ADM and LlamaGen do it: halved by 2x2 boxes while its short side is at least
    twice as long, then bicubic to the short side, then the centre."""
    from PIL import Image

    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - width) // 2, (high - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclass
class DataSet:
    """The images of a data set whose items have `image` [C, H, W]; `known`: further facts."""

    data: Any
    name: str
    known: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def size(self) -> tuple[int, int]:
        """Of the first image."""
        height, width = self.data[0]["image"].shape[-2:]
        return height, width

    @property
    def facts(self) -> Mapping[str, Any]:
        """With the digest of the data."""
        from nextscale.data.dataset import data_digest

        said = getattr(self.data, "said", self.data.__getitem__)
        labels = [said(i).get("label") for i in range(len(self.data))]
        counted: dict[str, Any] = {}
        if all(isinstance(label, int) for label in labels):
            counted = {"per_class": _spread(Counter(map(str, labels)))}
        return {"kind": "data set", "digest": data_digest(self.data), **counted, **self.known}

    def batches(self, count: int) -> Iterator[Array]:
        """Images are made when their turn comes."""
        for first in range(0, len(self.data), count):
            images = [self.data[i]["image"] for i in range(first, min(first + count, len(self.data)))]
            yield _bytes(torch.stack(images))

    def moments(self, which: str) -> FeatureMoments | None:
        """None."""
        return None


@dataclass
class ArraySet:
    """Images that are in memory: bytes [N, H, W, 3], or what `ns.sample` gives, float [N, C, H, W] in [-1, 1]."""

    images: Any
    name: str = "images"
    known: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.images, torch.Tensor):
            self.images = _bytes(self.images)
        if not isinstance(self.images, np.ndarray) or self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"expected bytes [N, H, W, 3], or a tensor [N, C, H, W] in [-1, 1], got {brief(self.images)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def facts(self) -> Mapping[str, Any]:
        """With the digest of the bytes."""
        content = hashlib.blake2b(np.ascontiguousarray(self.images).data, digest_size=32).hexdigest()
        return {"kind": "array", "digest": content, **self.known}

    def batches(self, count: int) -> Iterator[Array]:
        """Rows of the array."""
        return (self.images[first : first + count] for first in range(0, len(self.images), count))

    def moments(self, which: str) -> FeatureMoments | None:
        """None."""
        return None


def open_set(path: str | os.PathLike[str], size: Size | None = None) -> ImageSet:
    """The set of images at a path: an `.npz`, or a folder (cropped to `size`, if one is given)."""
    path = as_path(path, "an .npz or a folder of images")
    if path.is_dir():
        return FolderSet(path, size)
    if path.suffix.lower() in (".npz", ""):
        if size is not None and path.exists():
            warnings.warn(f"{path} has its own size; --size crops folders alone", stacklevel=2)
        return NpzSet(path)
    raise ValueError(f"{brief_path(path)}: expected an .npz or a folder of images, got a {path.suffix} file")


# ---- what is known of a set ----------------------------------------------------------------------------------------------


def note_of(path: Path) -> Path:
    """Where `nextscale sample-set` says how a set was made: beside an `.npz`, or in the folder."""
    return path / "set.json" if path.suffix.lower() != ".npz" else path.with_suffix(".json")


def _made_facts(path: Path) -> dict[str, Any]:
    """What `nextscale sample-set` wrote down of a set, if it made it."""
    note = note_of(path)
    if not note.is_file():
        return {}
    made = read_json(note, expected="how a set was made")
    if not isinstance(made, dict) or made.get("made_by") != "nextscale sample-set":
        return {}
    facts: dict[str, Any] = {"made": made}
    facts |= {name: made[name] for name in ("per_class", "order") if name in made}
    return facts


def _spread(counts: Mapping[str, int]) -> dict[str, int]:
    return {"classes": len(counts), "least": min(counts.values()), "most": max(counts.values())}


def _bytes(images: torch.Tensor) -> Array:
    """[B, C, H, W] as bytes [B, H, W, 3], over white."""
    return to_uint8(on_white(to_float(images))).permute(0, 2, 3, 1).contiguous().cpu().numpy()
