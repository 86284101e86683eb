"""Where images are from, in one word of the user's: the drawings that come along, a folder, shards, a folder of `datasets`, an
`.npz`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nextscale.data.attribution import SETS
from nextscale.data.dataset import Relabelled
from nextscale.data.emoji import emoji
from nextscale.data.images import Size
from nextscale.data.left_out import LeftOut
from nextscale.files import as_path, atomic_write, brief_path, read_json
from nextscale.settings import brief

DRAWINGS = "openmoji"
EMOJI = "emoji"  # as five sets draw them
HELD_OUT = 0.1  # share of the images, where the data have no validation set of their own
REMEMBERED = "data.json"  # in the folder of a run


@dataclass(frozen=True)
class DataSource:
    """What to train on, or to judge on.

    data: `emoji`, as five sets draw them, or some of these, `openmoji+noto`, for training as often as they are named; a
        folder of images (`image_folder`); shards, "photos-{000..012}.tar" (`web_shards`); a folder of Hugging Face datasets
        (`hub_images`); an .npz (`npz_images`). val: a validation set of one's own, of the same kinds. image, label, caption:
        names of the columns of Hugging Face datasets; empty: the usual ones; "none": no label, no caption.
    """

    data: str = DRAWINGS
    val: str = ""
    image: str = ""
    label: str = ""
    caption: str = ""

    def absolute(self) -> DataSource:
        """The same for a program that runs in another folder."""
        data, val = (
            place if not place or drawn_sets(place) else os.path.abspath(place) for place in (self.data, self.val)
        )
        return replace(self, data=data, val=val)


@dataclass(frozen=True, eq=False)
class SourceImages:
    """Images of a source: those for training, and those held out. `left_out`: what is not used of it, and why; `styles`: the
    names of their styles, if they have several."""

    train: Any
    val: Any
    classes: tuple[str, ...]
    left_out: LeftOut = field(default_factory=LeftOut)
    captions_from: str = ""
    styles: tuple[str, ...] = ()


def drawn_sets(data: str) -> tuple[str, ...]:
    """The sets of emoji that a source names, as often as it names them; none for other data."""
    sets = tuple(SETS) if data == EMOJI else tuple(data.split("+"))
    return sets if all(name in SETS for name in sets) else ()


def open_images(
    source: DataSource, size: Size, *, larger: Size | None = None, channels: int = 3, whole: bool = False
) -> SourceImages:
    """Read a source: images to be judged at `size`, those for training at `larger` (default: alike).

    `channels`, `whole` as for `image_folder`. Where the source has no validation set of its own, a tenth is held out.
    Raises ValueError, FileNotFoundError and ModuleNotFoundError as the readers do.
    """
    if not isinstance(source, DataSource):
        raise ValueError(f"expected a source of images, ns.DataSource('my-images') for example, got {brief(source)}")
    if wrong := [name for name, value in vars(source).items() if not isinstance(value, str)]:
        raise ValueError(f"DataSource.{wrong[0]}: expected a text, got {brief(getattr(source, wrong[0]))}")
    images = _open(source, source.data, larger or size, channels, whole, 0.0 if source.val else HELD_OUT)
    val = images.val
    if drawn_sets(source.val):
        val = _open(source, source.val, size, channels, False, HELD_OUT).val
    elif source.val:
        own = _open(source, source.val, size, channels, False, 0.0)
        val = _renumbered(own, images.classes, source)
        for reason, count in own.left_out.counts.items():
            images.left_out.add(reason, own.left_out.names[reason][0], count)
    elif drawn_sets(source.data):
        val = _open(source, source.data, size, channels, False, HELD_OUT).val
    else:
        val = val.resized(size)
    if not len(val):
        warnings.warn(
            f"a tenth of the {len(images.train)} images of {brief(source.data)} is none, so none is held out, and nothing says "
            "when to stop; give a validation set (--val)",
            stacklevel=2,
        )
    return replace(images, val=val)


def _open(source: DataSource, data: str, size: Size, channels: int, whole: bool, held_out: float) -> SourceImages:
    columns = {name: getattr(source, name) for name in ("image", "label", "caption")}
    as_path(data, "images")
    if sets := drawn_sets(data):
        found = _drawings(data, sets, size, channels, held_out)
    elif (Path(data) / "dataset_info.json").is_file() or (Path(data) / "dataset_dict.json").is_file():
        from nextscale.data.hub import hub_images

        wanted: dict[str, Any] = {name: None if column == "none" else column for name, column in columns.items()}
        return _as_source(hub_images(data, size, channels=channels, whole=whole, validation=held_out, **wanted))
    elif data.lower().endswith(".npz"):
        from nextscale.data.npz import npz_images

        found = _as_source(npz_images(data, size, channels=channels, whole=whole, validation=held_out))
    elif data.endswith(".tar"):
        from nextscale.data.shards import web_shards

        found = _as_source(web_shards(data, size, channels=channels, whole=whole, validation=held_out))
    else:
        from nextscale.data.folder import image_folder

        found = _as_source(image_folder(data, size, channels=channels, whole=whole, validation=held_out))
    if any(columns.values()):
        raise ValueError(
            f"columns belong to a folder of Hugging Face datasets, which {brief(data)} is not; leave out "
            + ", ".join(f"--{name}-column" for name, column in columns.items() if column)
        )
    return found


def _as_source(found: Any) -> SourceImages:
    return SourceImages(found.train, found.val, found.classes, found.left_out, found.captions_from)


def _drawings(name: str, sets: Sequence[str], size: Size, channels: int, held_out: float) -> SourceImages:
    if Path(name).is_dir():
        warnings.warn(
            f"{name} means the drawings that come along, not the folder of that name here; write ./{name} for it",
            stacklevel=5,
        )
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or channels != 3:
        raise ValueError(
            f"{name} is square and in colour, got a system of {height}x{width} pixels and {channels} channels; give --data"
        )
    found = emoji(sets, height, validation=held_out)
    styles = found.styles if len(found.styles) > 1 else ()
    return SourceImages(found.train, found.val, found.classes, found.left_out, "the drawings' names", styles)


def _renumbered(own: SourceImages, classes: tuple[str, ...], source: DataSource) -> Any:
    """A validation set under the class numbers of the training data. Raises ValueError for a class that these have not."""
    if own.classes == classes or len(own.classes) <= 1 or len(classes) <= 1:
        return own.train
    if unknown := [name for name in own.classes if name not in classes]:
        raise ValueError(
            f"the validation set {brief(source.val)} has the class {brief(unknown[0])}, which {brief(source.data)} has not; "
            "name classes alike in both"
        )
    return Relabelled(own.train, [classes.index(name) for name in own.classes])


def remember(source: DataSource, run: Path) -> None:
    """Write into the folder of a run what it is trained on, once: it goes on with the same data alone."""
    if (run / REMEMBERED).exists():
        return
    with atomic_write(run / REMEMBERED) as path:
        path.write_text(json.dumps(vars(source.absolute()), indent=2) + "\n", encoding="utf-8")


def remembered(folder: Path) -> DataSource | None:
    """What a system was trained on, as it stands in its folder, or in that of its run around it; None if nowhere.

    Raises ValueError for a file that says something else.
    """
    path = next((place / REMEMBERED for place in (folder, folder.parent) if (place / REMEMBERED).is_file()), None)
    if path is None:
        return None
    found = read_json(path, most=100_000, expected="what a run was trained on")
    texts = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    if not texts or set(found) != set(vars(DataSource())):
        raise ValueError(f"{brief_path(path)} does not say what a run was trained on; give --data, or remove that file")
    return DataSource(**found)
