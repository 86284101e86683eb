"""Hugging Face `datasets` as a dataset of ours: an object of that library, or a folder that its `save_to_disk` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nextscale.data.check import Broken, sound
from nextscale.data.dataset import ImageDataset
from nextscale.data.images import Seen, Size, check_share, decode_image, examine_image
from nextscale.data.left_out import LeftOut
from nextscale.data.shards import numbered
from nextscale.extras import need
from nextscale.pixels import to_float
from nextscale.settings import brief


class HubDataset(ImageDataset):
    """Rows of a `datasets.Dataset`, decoded when asked for.

    An item is a dict: `image` float [C, H, W] in [-1, 1], `label` (class number), `labels` ((label,)), `caption`,
    `mirror_ok` True.
    """

    def __init__(
        self,
        rows: Any,
        size: Size,
        image: str,
        label: str | None,
        caption: str | None,
        channels: int = 3,
        whole: bool = False,
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        self.rows, self.image, self.label, self.caption, self.numbers = rows, image, label, caption, numbers
        super().__init__(size, channels, whole)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        image = decode_image(row[self.image], self.size, f"row {index}", self.channels, whole=self.whole)
        return {"image": to_float(image), **self._said(row)}

    def said(self, index: int) -> dict[str, Any]:
        return self._said(self._words[int(index)])

    @property
    def stamps(self) -> list[str] | None:
        """What tells each row from those of other data: the library's name of this table, and the number of the row in it."""
        table = getattr(self.rows, "_fingerprint", None)
        return None if table is None else [f"{table} {i}" for i in range(len(self))]

    @cached_property
    def _words(self) -> Any:
        """The rows without their images."""
        return self.rows.remove_columns([self.image])

    def _said(self, row: Any) -> dict[str, Any]:
        said = 0 if self.label is None else row[self.label]
        label = int(said) if self.numbers is None else self.numbers[str(said)]
        return {
            "label": label,
            "labels": (label,),
            "caption": "" if self.caption is None or row[self.caption] is None else str(row[self.caption]),
            "mirror_ok": True,
        }


@dataclass(frozen=True, eq=False)
class HubImages:
    """A data set of the library at one size. `classes`: the names of its label, if it has any. `left_out`: rows that are not
    used, and why."""

    train: HubDataset
    val: HubDataset
    classes: tuple[str, ...]
    size: Size
    left_out: LeftOut = field(default_factory=LeftOut)
    captions_from: str = ""


def hub_images(
    source: Any,
    size: Size = 64,
    *,
    image: str = "",
    label: str | None = "",
    caption: str | None = "",
    channels: int = 3,
    whole: bool = False,
    broken: Broken = "skip",
    validation: float = 0.0,
    progress: bool = True,
    seed: int = 0,
) -> HubImages:
    """Take images from `datasets.load_dataset(...)`, or from a folder that `save_to_disk` wrote.

    Args:
        source: a `datasets.Dataset`, a `DatasetDict` with `train` (and `validation` or `test`), or the path of a folder.
        size: side of a square, or (height, width); short sides are resized, centres cropped.
        channels: 3, colours on white; 1, greys on white; 4, colours and opacity.
        whole: images are not cropped, so as large as they must be to cover `size`.
        broken: "skip" leaves damaged images out with a warning, "refuse" raises ValueError with their names.
        image, label, caption: names of the columns. By default the column image (or the only one of images), label and caption
            (or text), if there are such; None: none, so all rows are one class, or say nothing.
        validation: share held out at random where the source has no split of its own.

    A label is a class number, or a word. Raises ValueError for missing columns and for rows without a label (-1, as test
    splits of the hub have it), ModuleNotFoundError where a path needs the package `datasets`.
    """
    check_share(validation)
    if not isinstance(source, str | os.PathLike | dict) and not hasattr(source, "features"):
        raise ValueError(f"expected a dataset of the package datasets, or the path of a folder, got {brief(source)}")
    if isinstance(source, str | os.PathLike):
        need("hub", f"the folder {source}")
        from datasets import load_from_disk

        if not Path(source).is_dir():
            raise FileNotFoundError(f"no such folder: {source} (relative paths start from {Path.cwd()})")
        source = load_from_disk(str(source))
    held_out = None
    if isinstance(source, dict):
        if "train" not in source:
            raise ValueError(f"expected a split named train, got {', '.join(source)}; pass one split")
        held_out = source.get("validation", source.get("test"))
        source = source["train"]
    columns = list(source.features)
    if image == "":
        pictures = [name for name, kind in source.features.items() if type(kind).__name__ == "Image"]
        image = "image" if "image" in columns or len(pictures) != 1 else pictures[0]
    label = next((name for name in ("label",) if name in columns), None) if label == "" else label
    caption = next((name for name in ("caption", "text") if name in columns), None) if caption == "" else caption
    if missing := [name for name in (image, label, caption) if name is not None and name not in columns]:
        raise ValueError(f"the data has no column {', '.join(missing)}; it has {', '.join(columns)}")
    if held_out is None:
        if validation:
            parts = source.train_test_split(test_size=validation, seed=seed)
            source, held_out = parts["train"], parts["test"]
        else:
            held_out = source.select([])
    if not len(source):
        raise ValueError("the data has no rows")
    names: Sequence[str] = ("0",)
    numbers = None
    if label is not None:
        said = [list(rows[label]) for rows in (source, held_out)]
        if missing_labels := [i for i, one in enumerate(said[0] + said[1]) if one is None or one == -1]:
            raise ValueError(
                f"{len(missing_labels)} of {sum(map(len, said))} rows have no label ({label} is -1 or empty, first in row "
                f"{missing_labels[0]}), as in test splits of the hub; take another split, or no label (--label-column none)"
            )
        _, found = numbered(said[0] + said[1], lambda i: f"row {i}")
        names = getattr(source.features[label], "names", None) or found
        if said[0] and isinstance(said[0][0], str):
            numbers = {name: i for i, name in enumerate(found)}
    left_out = LeftOut()
    left_out.total = len(source) + len(held_out)
    train, val = (
        HubDataset(
            _sound(rows, image, size, broken, progress, left_out), size, image, label, caption, channels, whole, numbers
        )
        for rows in (source, held_out)
    )
    return HubImages(train, val, tuple(names), size, left_out, f"the column {caption}" if caption else "nothing")


def _sound(rows: Any, image: str, size: Size, broken: Broken, progress: bool, left_out: LeftOut) -> Any:
    """The rows whose images can be read."""

    def examine(index: int) -> Seen:
        try:
            picture = rows[index][image]  # the library decodes it
        except OSError as error:
            raise ValueError(f"row {index} cannot be read as an image ({error})") from error
        return examine_image(picture, f"row {index}")

    kept = sound(range(len(rows)), examine, "the data", size, broken, progress, left_out) if len(rows) else []
    return rows if len(kept) == len(rows) else rows.select(kept)
