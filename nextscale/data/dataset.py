"""What data sets share: how their images are read, how their items become a batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextscale.data.images import Size, height_width
from nextscale.settings import brief

D = TypeVar("D", bound="ImageDataset")


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of one size and number of channels; `whole`: not cropped, so as large as they must be to cover the size.

    `said(index)` is an item without its image, which is not decoded.
    """

    def __init__(self, size: Size, channels: int, whole: bool) -> None:
        self.size, self.channels, self.whole = height_width(size), channels, whole

    def resized(self: D, size: Size) -> D:
        """The same images at another size, cropped."""
        other = copy.copy(self)
        vars(other).pop("images", None)  # what was kept has the old size
        ImageDataset.__init__(other, size, self.channels, whole=False)
        return other


class Relabelled(Dataset[dict[str, Any]]):
    """Items of a data set whose class number i is `numbers[i]` here."""

    def __init__(self, data: Any, numbers: Sequence[int]) -> None:
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._relabelled(self.data[index])

    def said(self, index: int) -> dict[str, Any]:
        """An item without its image, where the data set can say it."""
        return self._relabelled(getattr(self.data, "said", self.data.__getitem__)(index))

    def _relabelled(self, item: dict[str, Any]) -> dict[str, Any]:
        labels = tuple(self.numbers[label] for label in item["labels"])
        return item | {"label": self.numbers[item["label"]], "labels": labels}

    @property
    def stamps(self) -> list[str] | None:
        """Those of the data set; what labels are called is not part of them."""
        return getattr(self.data, "stamps", None)


class Untold(Dataset[dict[str, Any]]):
    """Items of a data set that say nothing in some fields: labels of other classes than a system's, for example."""

    def __init__(self, data: Any, fields: Sequence[str]) -> None:
        self.data = data
        self.nothing: dict[str, Any] = dict.fromkeys(fields) | {name + "s": (None,) for name in fields}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index] | self.nothing

    def said(self, index: int) -> dict[str, Any]:
        """An item without its image, where the data set can say it."""
        return getattr(self.data, "said", self.data.__getitem__)(index) | self.nothing

    @property
    def stamps(self) -> list[str] | None:
        """Those of the data set."""
        return getattr(self.data, "stamps", None)


def says(data: Any, name: str) -> bool:
    """Whether the items of a data set say something under a name (they all have the keys of the first)."""
    return len(data) > 0 and bool({name, name + "s"} & getattr(data, "said", data.__getitem__)(0).keys())


class Pictures:
    """The images of a data set as if they were one tensor [N, C, H, W]; they are read when they are asked for."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.shape = (len(data), *data[0]["image"].shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Float [rows, C, H, W] in [-1, 1]; `rows`: a slice, or int64 [rows]."""
        chosen = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows.tolist()
        return torch.stack([self.data[i]["image"] for i in chosen])


def pictures(data: Any) -> Tensor | Pictures:
    """All images of a data set: those that it keeps as one tensor, or `Pictures`."""
    kept = getattr(data, "images", None)
    return Pictures(data) if kept is None else kept


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of one shape and flags become tensors, everything else a list with one entry an item."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    for name, values in batch.items():
        if all(isinstance(value, Tensor) for value in values) and len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
    batch["mirror_ok"] = torch.tensor(batch.get("mirror_ok", [False] * len(items)))
    return batch


def first_item(data: Any, field: str) -> Mapping[str, Any]:
    """The first item of a data set, whose items are dicts with floats under the name `field`. Raises ValueError for others."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, str) or not len(data):
        raise ValueError(f"expected a data set with one item or more, got {brief(data)}")
    try:
        item = data[0]
    except KeyError:
        raise ValueError(f"expected a data set whose items have numbers, got {brief(data)}") from None
    if not isinstance(item, Mapping):
        raise ValueError(f"items must be dicts such as {{'{field}': ..., 'label': 3}}, got {brief(item)}")
    if field not in item:
        raise ValueError(f"this system makes {field}s, but the data have none: items have {', '.join(item)}")
    if not isinstance(item[field], Tensor) or not item[field].is_floating_point():
        got = item[field].dtype if isinstance(item[field], Tensor) else type(item[field]).__name__
        hint = "; bytes become x / 127.5 - 1" if field == "image" else ""
        raise ValueError(f"items need the {field} as a tensor of floats, got {got}{hint}")
    return item


def one_size(content: Any, field: str) -> Tensor:
    """The content of a batch, if all items have it in one size; else ValueError."""
    if isinstance(content, Tensor):
        return content
    shapes = sorted({tuple(one.shape) for one in content})
    raise ValueError(f"items must have the {field} in one size, got {brief(shapes)}")


def data_digest(data: Any, field: str = "image") -> str:
    """A hash that tells other data from the same, before any work: of all stamps (a hash of each content) and all that is said;
    of data without stamps, of all items if they are a list, else of sixteen and the count.

    field: the content of an item.
    """
    found = hashlib.blake2b(str(len(data)).encode(), digest_size=16)
    stamps = getattr(data, "stamps", None)
    if stamps is not None:
        found.update("\n".join(stamps).encode("utf-8", "surrogatepass"))
        said = (data.said(i) for i in range(len(data)))
    else:
        chosen = range(len(data))
        if not isinstance(data, list | tuple):
            chosen = sorted({round(j * (len(data) - 1) / 15) for j in range(16)})  # type: ignore[assignment]
        said = (data[i] for i in chosen)
    for item in said:
        for name, value in sorted(item.items()):
            if name == field or name in ("label", "labels", "caption", "captions"):
                found.update(name.encode() + _as_bytes(value))
    return found.hexdigest()


def _as_bytes(value: Any) -> bytes:
    """A value of an item to hash, the same for the same value on every machine."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return repr(value).encode("utf-8", "backslashreplace")
