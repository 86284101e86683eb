"""WebDataset shards as a dataset: tar files in which the files of one image share a name (`0001.jpg`, `0001.cls`, `0001.txt`).

The shards are indexed once, by their headers; images are then read where they lie, in any order, so that training resumes
exactly as from files.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nextscale.data.check import Broken, sound
from nextscale.data.dataset import ImageDataset
from nextscale.data.images import Size, decode_image, examine_image, readable_extensions, to_float
from nextscale.data.openmoji import split_position


class Place(NamedTuple):
    """Where an image lies: number of the shard, first byte, bytes; its name and what is known of it."""

    shard: int
    start: int
    length: int
    name: str
    label: int
    caption: str


class ShardDataset(ImageDataset):
    """Images in tar files, decoded when asked for.

    An item is a dict: `image` float [C, H, W] in [-1, 1], `label` (class number), `labels` ((label,)), `caption`, `name`,
    `mirror_ok` True.
    """

    def __init__(
        self,
        paths: list[Path],
        places: list[Place],
        classes: tuple[str, ...],
        size: Size,
        channels: int = 3,
        whole: bool = False,
    ) -> None:
        self.paths, self.places, self.classes = paths, places, classes
        super().__init__(size, channels, whole)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        place = self.places[index]
        file, source = _file(self.paths, place)
        image = to_float(decode_image(file, self.size, source, self.channels, whole=self.whole))
        return {"image": image, **self.said(index)}

    def said(self, index: int) -> dict[str, Any]:
        place = self.places[index]
        return {
            "label": place.label,
            "labels": (place.label,),
            "caption": place.caption,
            "name": place.name,
            "mirror_ok": True,
        }


@dataclass(frozen=True, eq=False)
class Shards:
    """Shards at one size, split by name. `classes`: names in labels, sorted, or numbers as text."""

    train: ShardDataset
    val: ShardDataset
    classes: tuple[str, ...]
    size: Size


@dataclass
class _Sample:
    name: str
    image: tuple[int, int, int] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def web_shards(
    pattern: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    size: Size = 64,
    *,
    channels: int = 3,
    whole: bool = False,
    broken: Broken = "skip",
    validation: float = 0.0,
    progress: bool = True,
) -> Shards:
    """Index WebDataset shards.

    Args:
        pattern: paths of tar files, or one with `{000..012}` or `*`; an uncompressed .tar each.
        size: side of a square, or (height, width); short sides are resized, centres cropped.
        channels: 3, colours on white; 1, greys on white; 4, colours and opacity.
        whole: images are not cropped, so as large as they must be to cover `size`.
        broken: "skip" leaves damaged images out with a warning, "refuse" raises ValueError with their names.
        validation: share held out, in [0, 1), by name.

    The label of an image is its `.cls` (a whole number) or `label` in its `.json` (a number or a name), its caption its `.txt`
    or `caption` in its `.json`. Raises FileNotFoundError for a missing shard, ValueError for one that is damaged or has no
    image, and for labels of two kinds.
    """
    paths = expand(pattern)
    if not 0 <= validation < 1:
        raise ValueError(f"validation: expected a share in [0, 1), got {validation!r}; 0.1 holds out a tenth")
    samples = [
        sample
        for number, path in enumerate(tqdm(paths, desc="indexing shards", unit="shard", delay=2, disable=not progress))
        for sample in _index(path, number)
    ]
    labels = [sample.fields.get("label", 0) for sample in samples]
    if len({type(label) for label in labels}) > 1:
        raise ValueError("labels are numbers in some places and names in others; use one kind in all shards")
    if isinstance(labels[0], str):
        classes = tuple(sorted(set(labels)))
        number_of = {name: i for i, name in enumerate(classes)}
        labels = [number_of[label] for label in labels]
    else:
        if min(labels) < 0:
            raise ValueError(f"class numbers start at 0, got {min(labels)}")
        classes = tuple(str(i) for i in range(max(labels) + 1))
    places = [
        Place(*where, sample.name, label, str(sample.fields.get("caption", "")))
        for sample, label in zip(samples, labels, strict=True)
        if (where := sample.image) is not None
    ]
    places = sound(places, lambda place: examine_image(*_file(paths, place)), "the shards", size, broken, progress)
    held_out = [validation > 0 and split_position(place.name) < validation for place in places]
    parts = [[p for p, held in zip(places, held_out, strict=True) if held == side] for side in (False, True)]
    if not parts[0]:
        raise ValueError(f"validation={validation} holds out all {len(places)} images; add images or lower the share")
    train, val = (ShardDataset(paths, part, classes, size, channels, whole) for part in parts)
    return Shards(train, val, classes, size)


def _file(paths: list[Path], place: Place) -> tuple[io.BytesIO, str]:
    """The file of an image, and what it is called in errors. A shard is opened each time: one that stayed open would share its
    position with other threads and processes, and there may be more shards than files may be open."""
    with paths[place.shard].open("rb") as shard:
        shard.seek(place.start)
        return io.BytesIO(shard.read(place.length)), f"{place.name} in {paths[place.shard]}"


def expand(pattern: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Paths of shards: braces with a range of numbers, then wildcards. All must exist."""
    given = [pattern] if isinstance(pattern, str | os.PathLike) else list(pattern)
    paths: list[Path] = []
    for text in itertools.chain.from_iterable(_braces(os.fspath(one)) for one in given):
        if "*" in text or "?" in text:
            found = sorted(Path(text).parent.glob(Path(text).name))
            if not found:
                raise FileNotFoundError(f"no shard matches {text} (relative paths start from {Path.cwd()})")
            paths += found
        else:
            paths.append(Path(text))
    if not paths:
        raise ValueError("expected at least one shard, got none")
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}; copy them or shorten the range"
        )
    return paths


def _braces(text: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if match is None:
        yield text
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _braces(text[: match.start()] + str(number).zfill(len(first)) + text[match.end() :])


def _index(path: Path, number: int) -> list[_Sample]:
    """What a shard holds, in its order."""
    endings = readable_extensions()
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                if not stem or not ending:
                    continue
                name = f"{folder}/{stem}" if folder else stem
                sample = samples.setdefault(name, _Sample(name))
                if f".{ending.lower()}" in endings:
                    sample.image = number, member.offset_data, member.size
                elif ending in ("cls", "txt", "json"):
                    sample.fields |= _field(ending, tar.extractfile(member).read().decode("utf-8"))  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"the shard {path} cannot be read ({error}); expected a whole, uncompressed .tar") from error
    length = path.stat().st_size
    whole = [sample for sample in samples.values() if sample.image is not None]
    if any(sample.image is not None and sum(sample.image[1:]) > length for sample in whole):
        raise ValueError(f"the shard {path} ends in the middle of an image; copy it again")
    if not whole:
        raise ValueError(f"the shard {path} holds no image (.jpg, .png, .webp, ...); got {len(samples)} other entries")
    return whole


def _field(ending: str, text: str) -> dict[str, Any]:
    if ending == "cls":
        return {"label": int(text)}
    if ending == "txt":
        return {"caption": text.strip()}
    found = json.loads(text)
    return {name: found[name] for name in ("label", "caption") if isinstance(found, dict) and name in found}
