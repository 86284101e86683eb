"""What data sets share: how their images are read, how their items become a batch."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from nextscale.data.images import Size, height_width

D = TypeVar("D", bound="ImageDataset")


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of one size and number of channels; `whole`: not cropped, so as large as they must be to cover the size."""

    def __init__(self, size: Size, channels: int, whole: bool) -> None:
        self.size, self.channels, self.whole = height_width(size), channels, whole

    def resized(self: D, size: Size) -> D:
        """The same images at another size, cropped."""
        other = copy.copy(self)
        vars(other).pop("images", None)  # what was kept has the old size
        ImageDataset.__init__(other, size, self.channels, whole=False)
        return other


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Images of one size and flags become tensors, everything else a list with one entry an image."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    if len({image.shape for image in batch["image"]}) == 1:
        batch["image"] = torch.stack(batch["image"])
    batch["mirror_ok"] = torch.tensor(batch.get("mirror_ok", [False] * len(items)))
    return batch
