"""WebDataset shards as a dataset: tar files in which the files of one image share a name (`0001.jpg`, `0001.cls`, `0001.txt`).

The shards are indexed once, by their headers; images are then read where they lie, in any order, so that training resumes
exactly as from files.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nextscale.data.check import Broken, sound
from nextscale.data.dataset import ImageDataset
from nextscale.data.emoji import split_position
from nextscale.data.folder import hidden
from nextscale.data.images import Seen, Size, check_share, decode_image, examine_image, readable_extensions
from nextscale.data.left_out import LeftOut
from nextscale.files import as_path, brief_path, check_readable, parse_json
from nextscale.pixels import to_float
from nextscale.progress import Bar
from nextscale.settings import brief

MOST_CLASSES = 100_000
MOST_SHARDS = 100_000
MOST_SAID_BYTES = 1_000_000
SAID = ("cls", "txt", "json")  # endings of what says something of an image


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
        stamps: list[str] | None = None,
    ) -> None:
        self.paths, self.places, self.classes, self.stamps = paths, places, classes, stamps
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
    """Shards at one size, split by name. `classes`: names in labels, sorted, or numbers as text. `left_out`: samples that are
    not used, and why."""

    train: ShardDataset
    val: ShardDataset
    classes: tuple[str, ...]
    size: Size
    left_out: LeftOut = field(default_factory=LeftOut)
    captions_from: str = "the samples' .txt or .json"


class _Sample(NamedTuple):
    name: str
    image: tuple[int, int, int]  # number of the shard, first byte, bytes
    fields: dict[str, Any]


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

    The label of an image is its `.cls` or `label` in its `.json` (a number or a name), its caption its `.txt` or `caption` in
    its `.json`. Where some samples have labels, those without one are left out. Raises FileNotFoundError for a missing shard,
    ValueError for one that is damaged or has no image, and for labels of two kinds.
    """
    paths = expand(pattern)
    check_share(validation)
    left_out = LeftOut()
    samples = [
        sample
        for number, path in enumerate(Bar(paths, desc="indexing shards", unit="shard", delay=2, silent=not progress))
        for sample in _index(path, number, left_out)
    ]
    if any("label" in sample.fields for sample in samples):
        for sample in samples:
            if "label" not in sample.fields:
                left_out.add("without a label", sample.name)
        samples = [sample for sample in samples if "label" in sample.fields]
    elif whole_names := [sample.name for sample in samples]:
        warnings.warn(f"no sample of the shards has a label ({whole_names[0]} ...), so all are one class", stacklevel=2)
    labels, classes = numbered([sample.fields.get("label", 0) for sample in samples], lambda i: samples[i].name)
    places = [
        Place(*sample.image, sample.name, label, str(sample.fields.get("caption", "")))
        for sample, label in zip(samples, labels, strict=True)
    ]
    stamps: dict[Place, str] = {}

    def examine(place: Place) -> Seen:
        file, name = _file(paths, place)
        stamps[place] = hashlib.blake2b(file.getvalue(), digest_size=16).hexdigest()
        return examine_image(file, name)

    places = sound(places, examine, "the shards", size, broken, progress, left_out)
    left_out.warn("the shards")
    held_out = [validation > 0 and split_position(place.name) < validation for place in places]
    parts = [[p for p, held in zip(places, held_out, strict=True) if held == side] for side in (False, True)]
    if not parts[0]:
        raise ValueError(f"validation={validation} holds out all {len(places)} images; add images or lower the share")
    train, val = (
        ShardDataset(paths, part, classes, size, channels, whole, [stamps[place] for place in part]) for part in parts
    )
    return Shards(train, val, classes, size, left_out)


def numbered(labels: Sequence[Any], name_of: Callable[[int], str]) -> tuple[list[int], tuple[str, ...]]:
    """Labels as class numbers, and the names of the classes: names sorted, or numbers from 0 to the largest, as text.

    `name_of(i)`: what the i-th sample is called. Raises ValueError for labels of two kinds, and for what is neither a name nor
    a class number.
    """
    for i, label in enumerate(labels):
        if (
            isinstance(label, bool)
            or not isinstance(label, (int, str))
            or (isinstance(label, int) and not 0 <= label < MOST_CLASSES)
        ):
            raise ValueError(
                f"the label of {brief_path(name_of(i))} is {brief(label)}; expected a name, or a number from 0 to "
                f"{MOST_CLASSES - 1}"
            )
    kinds = {isinstance(label, str): i for i, label in enumerate(labels)}
    if len(kinds) > 1:
        some, others = name_of(kinds[False]), name_of(kinds[True])
        raise ValueError(
            f"labels are numbers in some places ({some}) and names in others ({others}); use one kind everywhere"
        )
    if True not in kinds:
        return [int(label) for label in labels], tuple(str(i) for i in range(1 + max(labels, default=0)))
    classes = tuple(sorted(set(labels)))
    number_of = {name: i for i, name in enumerate(classes)}
    return [number_of[label] for label in labels], classes


def _file(paths: list[Path], place: Place) -> tuple[io.BytesIO, str]:
    """The file of an image, and what it is called in errors. A shard is opened each time: one that stayed open would share its
    position with other threads and processes, and there may be more shards than files may be open."""
    with paths[place.shard].open("rb") as shard:
        shard.seek(place.start)
        return io.BytesIO(shard.read(place.length)), f"{place.name} in {paths[place.shard]}"


def expand(pattern: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Paths of shards: braces with a range of numbers, then wildcards. All must exist."""
    listed = isinstance(pattern, Iterable) and not isinstance(pattern, str | bytes | os.PathLike)
    given = [as_path(one, "a shard") for one in (pattern if listed else [pattern])]  # type: ignore[union-attr]
    paths: list[Path] = []
    texts = list(
        itertools.islice(itertools.chain.from_iterable(_braces(os.fspath(one)) for one in given), MOST_SHARDS + 1)
    )
    if len(texts) > MOST_SHARDS:
        raise ValueError(f"the ranges in {brief(given[0])} name more than {MOST_SHARDS:,} shards; shorten them")
    for text in texts:
        if "*" in text or "?" in text:
            found = sorted(Path(text).parent.glob(Path(text).name))
            if not found:
                raise FileNotFoundError(f"no shard matches {brief_path(text)} (relative paths start from {Path.cwd()})")
            paths += found
        else:
            paths.append(Path(text))
    if not paths:
        raise ValueError("expected at least one shard, got none")
    missing = []
    for path in paths:
        try:
            check_readable(path, "a shard, an uncompressed .tar")
        except FileNotFoundError:  # also for a name that no file can have
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards are missing, the first is {brief_path(missing[0])}; copy them or shorten "
            "the range"
        )
    return paths


def _braces(text: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if match is None:
        yield text
        return
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise ValueError(
            f"{match[0]} in {brief(text)} names {int(last) - int(first) + 1:,} shards; expected the smaller number first, and "
            f"at most {MOST_SHARDS:,}"
        )
    for number in range(int(first), int(last) + 1):
        yield from _braces(text[: match.start()] + str(number).zfill(len(first)) + text[match.end() :])


def _index(path: Path, number: int, left_out: LeftOut) -> list[_Sample]:
    """What a shard holds, in its order.

    The files of a sample share their name up to the last point, or up to the first: `b.15.png` goes with `b.15.txt` or `b.txt`.
    """
    endings = readable_extensions()
    images: dict[str, tuple[int, int, int]] = {}
    said: dict[str, dict[str, Any]] = defaultdict(dict)
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                file = member.name.rpartition("/")[2]
                if member.isdir():
                    continue
                if member.offset_data + member.size > length:
                    raise ValueError("it ends in the middle of a file; copy it again")
                stem, _, ending = member.name.rpartition(".")
                ending = ending.lower()
                if hidden(file) or "__MACOSX" in member.name.split("/"):
                    if f".{ending}" in endings:
                        left_out.add_hidden(member.name)
                    continue
                left_out.total += f".{ending}" in endings or ending not in SAID
                if not member.isfile():
                    left_out.add("that are links or devices", member.name)
                elif f".{ending}" in endings and stem in images:
                    left_out.add("second images of a name", member.name)
                elif f".{ending}" in endings:
                    images[stem] = number, member.offset_data, member.size
                elif ending in SAID:
                    if member.size > MOST_SAID_BYTES:
                        raise ValueError(
                            f"{brief_path(member.name)} has {member.size:,} bytes; that is no label or caption"
                        )
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    for name, value in _field(ending, content, member.name).items():
                        if said[stem].setdefault(name, value) != value:
                            raise ValueError(
                                f"{brief_path(stem)} has two {name}s, {brief(said[stem][name])} and {brief(value)}; keep one"
                            )
                else:
                    left_out.add(f"in a format that is not read, .{ending[:20]}", member.name)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the shard {path} cannot be read ({error}); expected a whole, uncompressed .tar") from error
    except ValueError as error:
        raise ValueError(f"the shard {path}: {error}") from error
    if not images:
        raise ValueError(f"the shard {path} holds no image (.jpg, .png, .webp, ...); got {len(said)} other entries")

    def short(stem: str) -> str:
        folder, slash, file = stem.rpartition("/")
        return folder + slash + file.partition(".")[0]

    return [_Sample(stem, image, said.get(short(stem), {}) | said.get(stem, {})) for stem, image in images.items()]


def _field(ending: str, content: bytes, name: str) -> dict[str, Any]:
    """What a file beside an image says of it."""
    if ending == "json":
        found = parse_json(content, brief_path(name))
        named = found if isinstance(found, dict) else {}
        return {key: named[key] for key in ("label", "caption") if named.get(key) is not None}
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{brief_path(name)} is not UTF-8 (at byte {error.start})") from None
    if ending == "txt":
        return {"caption": text}
    if re.fullmatch(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)", text):
        raise ValueError(f"a label is {brief(text)}; expected a whole number or a name")
    return {"label": int(text) if re.fullmatch(r"-?[0-9]{1,30}", text) else text} if text else {}
