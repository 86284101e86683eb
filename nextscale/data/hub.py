"""Hugging Face `datasets` as a dataset of ours: an object of that library, or a folder that its `save_to_disk` wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nextscale.data.check import Broken, sound
from nextscale.data.dataset import ImageDataset
from nextscale.data.images import Size, decode_image, examine_image, to_float


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
    ) -> None:
        self.rows, self.image, self.label, self.caption = rows, image, label, caption
        super().__init__(size, channels, whole)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        image = decode_image(row[self.image], self.size, f"row {index}", self.channels, whole=self.whole)
        return {"image": to_float(image), **self._said(row)}

    def said(self, index: int) -> dict[str, Any]:
        return self._said(self._words[int(index)])

    @cached_property
    def _words(self) -> Any:
        """The rows without their images."""
        return self.rows.remove_columns([self.image])

    def _said(self, row: Any) -> dict[str, Any]:
        label = 0 if self.label is None else int(row[self.label])
        return {
            "label": label,
            "labels": (label,),
            "caption": "" if self.caption is None else str(row[self.caption]),
            "mirror_ok": True,
        }


@dataclass(frozen=True, eq=False)
class HubImages:
    """A data set of the library at one size. `classes`: the names of its label, if it has any."""

    train: HubDataset
    val: HubDataset
    classes: tuple[str, ...]
    size: Size


def hub_images(
    source: Any,
    size: Size = 64,
    *,
    image: str = "image",
    label: str | None = "label",
    caption: str | None = None,
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
        image, label, caption: names of the columns; `label=None`: one class.
        validation: share held out at random where the source has no split of its own.

    Raises ValueError for missing columns, ModuleNotFoundError where a path needs the package `datasets`.
    """
    if isinstance(source, str | os.PathLike):
        try:
            from datasets import load_from_disk
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "reading this needs the package datasets: pip install 'nextscale[hub]'"
            ) from error
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
    names = getattr(source.features[label], "names", None) if label is not None else None
    if names is None:
        count = 1 if label is None else 1 + max(source[label])
        names = [str(i) for i in range(count)]
    train, val = (
        HubDataset(_sound(rows, image, size, broken, progress), size, image, label, caption, channels, whole)
        for rows in (source, held_out)
    )
    return HubImages(train, val, tuple(names), size)


def _sound(rows: Any, image: str, size: Size, broken: Broken, progress: bool) -> Any:
    """The rows whose images can be read."""

    def examine(index: int) -> int:
        try:
            picture = rows[index][image]  # the library decodes it
        except OSError as error:
            raise ValueError(f"row {index} cannot be read as an image ({error})") from error
        return examine_image(picture, f"row {index}")

    kept = sound(range(len(rows)), examine, "the data", size, broken, progress) if len(rows) else []
    return rows if len(kept) == len(rows) else rows.select(kept)
