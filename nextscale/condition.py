"""What the model is told: `Condition`, its named parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Condition:
    """Named parts, tensors [B, ...] with one row an image. A model reads those that it knows by their names.

    Well known: start [B, n, D] opens the first scale (n is 1 or l_0); vec [B, D] modulates blocks and head; context
    [B, T, E] is read by cross-attention; spatial [B, L, E] is aligned with the tokens of all scales; prefix [B, P, D] are
    tokens before the image. Any other name will do. A part of different lengths has a mask, bool [B, T], True = real.

    Every part can be replaced by its null on its own: that is what training drops and what guidance compares. A part and its
    mask are one. Parts that belong together have names with a dot, `style.vec`: then `style` means them all.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None, **parts: Tensor | None) -> None:
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self.masks = dict(masks or {})
        if not self._parts:
            raise ValueError("a condition needs at least one part, got none")
        if unknown := sorted(self.masks.keys() - self._parts.keys()):
            raise ValueError(f"a mask belongs to a part: got masks of {', '.join(unknown)}, parts {self._names()}")
        rows = {name: len(part) for name, part in self._parts.items()}
        if len({*rows.values(), *map(len, self.masks.values())}) > 1:
            raise ValueError(f"all parts of a condition have one row an image, got {rows}")

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._parts or any(full.startswith(f"{name}.") for full in self._parts)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            raise ValueError(
                f"this condition has no part {name!r}; it has {self._names()}. A conditioner gives all parts that the model "
                "reads, or the transformer's `compose` makes them"
            )
        return self._parts[name]

    def __repr__(self) -> str:
        return f"Condition({', '.join(f'{name}={list(part.shape)}' for name, part in self._parts.items())})"

    def parts(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        return dict(self._parts)

    @property
    def start(self) -> Tensor:
        return self["start"]

    @property
    def vec(self) -> Tensor:
        return self["vec"]

    @property
    def context(self) -> Tensor | None:
        return self._parts.get("context")

    @property
    def context_mask(self) -> Tensor | None:
        return self.masks.get("context")

    @property
    def spatial(self) -> Tensor | None:
        return self._parts.get("spatial")

    @property
    def prefix(self) -> Tensor | None:
        return self._parts.get("prefix")

    @property
    def device(self) -> torch.device:
        return next(iter(self._parts.values())).device

    def replace(self, masks: Mapping[str, Tensor] | None = None, **parts: Tensor | None) -> Condition:
        """The same with other or further parts and masks; a part that is None is left out, with its mask."""
        named = {**self._parts, **parts}
        kept = {name: mask for name, mask in {**self.masks, **(masks or {})}.items() if named.get(name) is not None}
        return Condition(kept, **named)

    def select(self, rows: Tensor) -> Condition:
        """Keep, re-order or copy rows (int64 [rows'])."""
        masks = {name: mask[rows] for name, mask in self.masks.items()}
        return Condition(masks, **{name: part[rows] for name, part in self._parts.items()})

    def within(self, name: str) -> Condition:
        """The parts that a name means, without it: of `style` the part `style.vec`, as `vec`."""
        short = {full: full.removeprefix(f"{name}.") for full in self._meant(name)}
        masks = {short[full]: mask for full, mask in self.masks.items() if full in short}
        return Condition(masks, **{short[full]: self[full] for full in short})

    def mix(self, other: Condition, take: Mapping[str, Tensor]) -> Condition:
        """Take the rows of `other` where `take[part]` (bool [B]) is True; parts that are not named stay.

        Raises ValueError for a name that is no part, and for parts that do not fit each other.
        """
        parts, masks = {}, {}
        for name, rows in ((full, rows) for meant, rows in take.items() for full in self._meant(meant)):
            mine, theirs = self[name], other[name]
            if mine.shape != theirs.shape or (name in self.masks) != (name in other.masks):
                raise ValueError(
                    f"the part {name!r} and what replaces it must have one shape, and both a mask or none, got "
                    f"{list(mine.shape)} and {list(theirs.shape)}; pad the shorter one"
                )
            parts[name] = torch.where(rows.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)
            if name in self.masks:
                masks[name] = torch.where(rows.view(-1, 1), other.masks[name], self.masks[name])
        return self.replace(masks, **parts)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Stack rows; all must have the same parts."""
        first = conditions[0]
        masks = {name: torch.cat([c.masks[name] for c in conditions]) for name in first.masks}
        return Condition(masks, **{name: torch.cat([c[name] for c in conditions]) for name in first._parts})

    def _meant(self, name: str) -> list[str]:
        """The parts that a name means: the one of that name, or those that begin with it and a dot."""
        if name in self._parts:
            return [name]
        if found := [full for full in self._parts if full.startswith(f"{name}.")]:
            return found
        raise ValueError(f"this condition has no part {name!r}; it has {self._names()}")

    def _names(self) -> str:
        return ", ".join(self._parts)
