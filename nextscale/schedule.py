"""The sizes of the scales, as data that is passed to calls: `Schedule`, and `Span`, a run of its scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The K scales of an image, coarse to fine: `sizes[k] = (h, w)` in tokens.

    Args:
        sizes: pairs of positive integers; rectangles and repeated sizes are allowed.

    Raises:
        ValueError: no scale, or a size that is not a pair of positive integers.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        sizes = tuple(tuple(size) for size in self.sizes)
        if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(
                f"a schedule needs at least one (height, width) pair of positive numbers, got {self.sizes}"
            )
        object.__setattr__(self, "sizes", tuple((int(h), int(w)) for h, w in sizes))

    @classmethod
    def squares(cls, *sides: int) -> Schedule:
        """A schedule of square scales: `Schedule.squares(1, 2, 3, 4)`."""
        return cls(tuple((side, side) for side in sides))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, k: int) -> tuple[int, int]:
        return self.sizes[k]

    def __str__(self) -> str:
        return " ".join(str(h) if h == w else f"{h}x{w}" for h, w in self.sizes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale: `l_k = h_k * w_k`."""
        return tuple(h * w for h, w in self.sizes)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens up to and including each scale; the last one is L."""
        return tuple(accumulate(self.lengths))

    @property
    def length(self) -> int:
        """L, the tokens of all scales together."""
        return self.ends[-1]

    def progress(self, k: int) -> float:
        """Position of scale k from 0 (first) to 1 (last); the only scale of a schedule is its last, so 1."""
        return k / (len(self) - 1) if len(self) > 1 else 1.0

    def span(self, first: int = 0, stop: int | None = None) -> Span:
        """The scales `first` to `stop - 1` (to the last one by default)."""
        return Span(self, first, len(self) if stop is None else stop)

    def steps(self) -> Iterator[Span]:
        """One span a scale, in the order in which an image is generated."""
        return (self.span(k, k + 1) for k in range(len(self)))

    def split(self, x: Tensor) -> list[Tensor]:
        """Cut `[B, L, ...]` into one `[B, l_k, ...]` a scale."""
        return list(x.split(self.lengths, dim=1))


@dataclass(frozen=True)
class Span:
    """A run of consecutive scales of a schedule, and where its tokens lie in the sequence of all scales."""

    schedule: Schedule
    first: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop <= len(self.schedule):
            raise ValueError(
                f"a span needs 0 <= first < stop <= {len(self.schedule)} scales, got first={self.first}, stop={self.stop}"
            )

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self.schedule.sizes[self.first : self.stop]

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.schedule.lengths[self.first : self.stop]

    @property
    def begin(self) -> int:
        """Index of the span's first token among the L tokens."""
        return self.schedule.ends[self.first - 1] if self.first else 0

    @property
    def end(self) -> int:
        """One past the index of the span's last token."""
        return self.schedule.ends[self.stop - 1]

    @property
    def tokens(self) -> slice:
        """The span's tokens as a slice of the sequence of all scales."""
        return slice(self.begin, self.end)

    def gather(self, table: Tensor) -> Tensor:
        """The rows of a per-token table [l, ...] that belong to the tokens at hand: all of them. (Where tokens are left
        out, a span of the kept ones returns [B, kept, ...].)"""
        return table

    def bounds(self) -> list[tuple[int, int]]:
        """`(begin, end)` of each scale of the span among the L tokens."""
        ends = self.schedule.ends
        return [(ends[k - 1] if k else 0, ends[k]) for k in range(self.first, self.stop)]

    def scale_index(self, device: torch.device | str | None = None) -> Tensor:
        """Scale of each token, int64 [l]."""
        return _scale_index(self.lengths, self.first).to(device)

    def coords(self, device: torch.device | str | None = None) -> Tensor:
        """Centre of each token in the image, (y, x) in (0, 1), float32 [l, 2]."""
        return _coords(self.sizes).to(device)

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """Block-causal mask, bool [l, end]: True where a token of the span may attend to a token of its own or a
        coarser scale."""
        keys = _scale_index(self.schedule.lengths[: self.stop], 0)
        return (_scale_index(self.lengths, self.first)[:, None] >= keys[None, :]).to(device)


@lru_cache(maxsize=256)
def _scale_index(lengths: tuple[int, ...], first: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(first, first + len(lengths)), torch.tensor(lengths))


@lru_cache(maxsize=256)
def _coords(sizes: tuple[tuple[int, int], ...]) -> Tensor:
    grids = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).view(-1, 2) for h, w in sizes
    ]
    return torch.cat(grids)
