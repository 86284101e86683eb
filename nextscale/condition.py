"""What the model is told: `Condition`, its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Named parts, one row an image; parts that a model does not use are None.

    Every part can be replaced by its null on its own: that is what training drops and what guidance compares.
    """

    start: Tensor  # [B, n, D]: opens the first scale; n is 1 or l_0
    vec: Tensor  # [B, D]: modulates blocks and head
    context: Tensor | None = None  # [B, T, E]: read by cross-attention
    context_mask: Tensor | None = None  # bool [B, T], True = a real token
    spatial: Tensor | None = None  # [B, L, E]: aligned with the tokens of all scales
    prefix: Tensor | None = None  # [B, P, D]: tokens before the image
    prefix_mask: Tensor | None = None  # bool [B, P], True = a real token

    def __len__(self) -> int:
        return len(self.vec)

    def parts(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in named.items() if part is not None}

    def select(self, rows: Tensor) -> Condition:
        """Keep, re-order or copy rows (int64 [rows'])."""
        return replace(self, **{name: part[rows] for name, part in self.parts().items()})

    def mix(self, other: Condition, take: Mapping[str, Tensor]) -> Condition:
        """Take the rows of `other` where `take[part]` (bool [B]) is True; parts that are not named stay."""
        theirs = other.parts()
        mixed = {
            name: torch.where(take[name].view(-1, *[1] * (part.ndim - 1)), theirs[name], part)
            for name, part in self.parts().items()
            if name in take
        }
        return replace(self, **mixed)

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        """Stack rows; all must have the same parts."""
        names = conditions[0].parts()
        return replace(conditions[0], **{n: torch.cat([getattr(c, n) for c in conditions]) for n in names})
