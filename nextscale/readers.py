"""Readers: what users and data items say, under one name, to what a conditioner takes. (Texts: `model/text_encoders.py`.)"""

from __future__ import annotations

import difflib
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextscale.settings import as_int, brief


class ClassReader:
    """Names of classes, their numbers, or None (no class, whose number is `num_classes`), to class numbers int64 [B].

    A name may be written in capitals or not and in any form of Unicode. Of a name that lists several, "tench, Tinca tinca", one
    is enough if no other class has it. Raises ValueError for names and numbers that there are not.
    """

    shape: tuple[int, ...] | None = None
    aligned = False

    def __init__(self, classes: Sequence[str], num_classes: int, field: str = "label") -> None:
        self.classes, self.num_classes, self.field = tuple(classes), num_classes, field

    @property
    def choices(self) -> Sequence[str | int]:
        """The names of all classes, or their numbers where they have no names."""
        return self.classes or range(self.num_classes)

    def __call__(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor([self._number(value) for value in values], dtype=torch.long)

    def check(self, values: Sequence[Any]) -> None:
        """Raise ValueError if it cannot read one of them."""
        for value in values:
            self._number(value)

    def _number(self, value: Any) -> int:
        if value is None:
            return self.num_classes
        if isinstance(value, str):
            return self._place(value)
        try:
            number = as_int(value)
        except TypeError:
            said = f"a class is told by its name, its number or None (no class), got {brief(value)}"
            raise ValueError(said) from None
        if not 0 <= number <= self.num_classes:
            raise ValueError(
                f"class numbers go from 0 to {self.num_classes - 1} ({self.num_classes} or None: no class), got {brief(number)}"
            )
        return number

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, set[int]], dict[str, set[int]]]:
        """Class numbers by the names as they are, as they are compared, and by the single names of those that list several."""
        whole: dict[str, set[int]] = defaultdict(set)
        single: dict[str, set[int]] = defaultdict(set)
        for number, name in enumerate(self.classes):
            whole[_compared(name)].add(number)
            for one in name.split(","):
                single[_compared(one)].add(number)
        return {name: number for number, name in enumerate(self.classes)}, dict(whole), dict(single)

    def _place(self, name: str) -> int:
        exact, whole, single = self._numbers
        if name in exact:
            return exact[name]
        if not self.classes:
            raise ValueError(
                f"this system has no class names, got {brief(name)}; use a number below {self.num_classes}"
            )
        found = whole.get(_compared(name)) or single.get(_compared(name)) or set()
        if len(found) == 1:
            return next(iter(found))
        if found:
            several = " or ".join(f"{number} ({self.classes[number]})" for number in sorted(found)[:4])
            raise ValueError(
                f"the label {brief(name)} could be several classes: {several}; give the number or the whole name"
            )
        near = difflib.get_close_matches(_compared(name[:200]), single, n=3, cutoff=0.4)
        close = dict.fromkeys(self.classes[min(single[one])] for one in near) or self.classes[:3]
        raise ValueError(
            f"unknown {self.field} {brief(name)}; did you mean {' or '.join(map(brief, close))}? "
            f"`nextscale info SYSTEM` lists all {len(self.classes)}"
        )


def _compared(name: str) -> str:
    """A name as it is compared with others."""
    return unicodedata.normalize("NFC", name).casefold().strip()


class Given(NamedTuple):
    """Tensors of several images, and which of them are missing."""

    values: Tensor  # float32 [B, ...]; zeros where nothing was said
    null: Tensor  # bool [B], True = says nothing

    def to(self, device: torch.device | str) -> Given:
        return Given(self.values.to(device), self.null.to(device))

    def listed(self) -> list[Tensor | None]:
        """What a reader is told: one entry an image."""
        return [None if null else value for value, null in zip(self.values, self.null.tolist(), strict=True)]


class TensorReader:
    """Tensors (or arrays) of one shape: maps, views, observations. None says nothing: zeros, marked as null.

    Args:
        field: the key of a data item that holds one.
        shape: of each.
        aligned: whether its places are those of the image, as of a depth map, so that augmentation must not move one without
            the other. Default: of two or more dimensions they are.
    """

    choices: Sequence[str | int] = ()

    def __init__(self, field: str, shape: Sequence[int], *, aligned: bool | None = None) -> None:
        self.field = field
        self.shape: tuple[int, ...] | None = tuple(shape)
        self.aligned = len(shape) > 1 if aligned is None else aligned

    def __call__(self, values: Sequence[Any]) -> Given:
        rows = [torch.zeros(self.shape or ()) if value is None else self._row(value) for value in values]
        return Given(torch.stack(rows), torch.tensor([value is None for value in values]))

    def check(self, values: Sequence[Any]) -> None:
        """Raise ValueError if one of them has another shape."""
        for value in values:
            if value is not None:
                self._row(value)

    def _row(self, value: Any) -> Tensor:
        try:
            row = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.field}: expected a tensor {list(self.shape or ())}, got {value!r}") from error
        if tuple(row.shape) != self.shape:
            raise ValueError(
                f"{self.field}: expected tensors {list(self.shape or ())}, one an image, got one of {list(row.shape)}"
            )
        return row.detach().cpu()
