"""The sizes of the scales, as data that is passed to calls: `Schedule`, and `Span`, a run of its scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.settings import as_int, brief
from nextscale.tokens import T, split

MOST_TOKENS = 2**22  # of all scales together


@dataclass(frozen=True)
class Schedule:
    """The K scales of an image, coarse to fine: `sizes[k] = (h, w)` in tokens.

    Scales of other things are rows, too: n values of a sequence are `(1, n)`, three planes of n x n are `(3 n, n)`. What rows
    and columns mean is the business of the system's output and tokenizer.

    Args:
        sizes: pairs of positive integers; rectangles and repeated sizes are allowed.

    Raises:
        ValueError: no scale, or a size that is not a pair of positive integers.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        try:  # whole numbers of any kind, and nothing that would have to be rounded
            sizes = tuple(tuple(as_int(side) for side in size) for size in self.sizes)
        except TypeError:
            sizes = ()
        if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(
                f"a schedule needs at least one (height, width) pair of positive whole numbers, got {brief(self.sizes)}"
            )
        if (length := sum(h * w for h, w in sizes)) > MOST_TOKENS:
            raise ValueError(
                f"a schedule may have {MOST_TOKENS:,} tokens, got one of {brief(length)}; take smaller scales"
            )
        object.__setattr__(self, "sizes", sizes)

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

    @cached_property
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

    def span(self, first: int = 0, stop: int | None = None, sight: Sight | None = None) -> Span:
        """The scales `first` to `stop - 1`, by default to the last one; `sight`: what their tokens see, by default all coarser
        scales."""
        return Span(self, first, len(self) if stop is None else stop, sight or Sight())

    def steps(self) -> Iterator[Span]:
        """One span a scale, in the order in which an image is generated."""
        return (self.span(k, k + 1) for k in range(len(self)))

    def split(self, x: T) -> list[T]:
        """Cut tokens `[B, L, ...]` into one `[B, l_k, ...]` a scale."""
        return split(x, self.lengths)


@dataclass(frozen=True)
class Sight:
    """What a token may see beside its own scale.

    coarser: how many of the coarser scales, the nearest ones; None: all of them.
    prefix: the tokens before the image.
    context: what cross-attention reads.
    """

    coarser: int | None = None
    prefix: bool = True
    context: bool = True

    def __post_init__(self) -> None:
        if self.coarser is not None and self.coarser < 0:
            raise ValueError(f"coarser: expected None (all scales) or a number of at least 0, got {self.coarser}")

    def first(self, k: int) -> int:
        """The coarsest scale that scale k sees."""
        return 0 if self.coarser is None else max(0, k - self.coarser)


@dataclass(frozen=True)
class Span:
    """The tokens at hand: a run of consecutive scales of a schedule, where they lie in the sequence of all scales, and what
    they see.

    prefix: tokens before the image. They stand before the first scale, in the same sequence, and see each other.
    real: bool [B, prefix], False = padding that nobody sees; None: all are real.
    index: int64 [B, kept], of a single scale: the tokens that are there, where others are left out; None: all.
    """

    schedule: Schedule
    first: int
    stop: int
    sight: Sight = Sight()
    prefix: int = 0
    real: Tensor | None = field(default=None, compare=False)
    index: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop <= len(self.schedule):
            raise ValueError(
                f"a span needs 0 <= first < stop <= {len(self.schedule)} scales, got first={self.first}, stop={self.stop}"
            )
        if self.index is not None and len(self) > 1:
            raise ValueError(f"tokens are left out of one scale at a time, got a span of {len(self)}")

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self.schedule.sizes[self.first : self.stop]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale that are at hand."""
        if self.index is not None:
            return (self.index.shape[1],)
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
        """The span's tokens, if none is left out, as a slice of the sequence of all scales."""
        return slice(self.begin, self.end)

    @property
    def leading(self) -> int:
        """Tokens of the prefix that are at hand: all with the first scale, later none."""
        return 0 if self.first else self.prefix

    def keeping(self, index: Tensor) -> Span:
        """The same scale, of which each row keeps the tokens `index`, int64 [B, kept]."""
        return replace(self, index=index)

    def gather(self, table: Tensor) -> Tensor:
        """The rows of a table [l, ...] of the span's scales for the tokens at hand: [l, ...], or [B, kept, ...]."""
        return table if self.index is None else table[self.index]

    def bounds(self) -> list[tuple[int, int]]:
        """`(begin, end)` of each scale of the span among the L tokens."""
        ends = self.schedule.ends
        return [(ends[k - 1] if k else 0, ends[k]) for k in range(self.first, self.stop)]

    def scale_index(self, device: torch.device | str | None = None) -> Tensor:
        """Scale of each token of the span's scales, int64 [l]."""
        return _scale_index(self.schedule.lengths[self.first : self.stop], self.first).to(device)

    def coords(self, device: torch.device | str | None = None) -> Tensor:
        """Centre of each token in the image, (y, x) in (0, 1), float32 [l, 2], or [B, kept, 2]."""
        return self.gather(_coords(self.sizes).to(device))

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """Who may see whom, bool [l, end], True = may: every token of the span (rows; the prefix at hand first) and all
        tokens up to the span's end (columns; the prefix first). Of kept tokens [B, kept, kept + begin], of a padded prefix
        [B, l, end]."""
        keys = torch.cat([torch.full((self.prefix,), -1), _scale_index(self.schedule.lengths[: self.stop], 0)])
        queries = torch.cat([torch.full((self.leading,), -1), self.scale_index()])
        first = torch.tensor([self.sight.first(k) for k in range(self.stop)])
        own, other = queries[:, None], keys[None, :]
        mask = (other <= own) & ((other >= first[own.clamp(min=0)]) | (other == -1))
        if not self.sight.prefix:
            mask &= (other >= 0) | (own < 0)
        mask = mask.to(device)
        if self.index is not None:  # all kept tokens of a scale see the same of what is before it
            before = mask[:1, : self.prefix + self.begin]
            shape = *self.index.shape, before.shape[1]
            own_scale = torch.ones(*self.index.shape, self.index.shape[1], dtype=torch.bool, device=mask.device)
            mask = torch.cat([before.expand(shape), own_scale], dim=-1)
        if self.real is not None:
            seen = F.pad(self.real.to(mask.device), (0, mask.shape[-1] - self.prefix), value=True)
            mask = mask & seen[:, None]
        return mask


# Tables are kept, and may be used in training next: ordinary tensors, whatever the mode in which they are first asked for.


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _scale_index(lengths: tuple[int, ...], first: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(first, first + len(lengths)), torch.tensor(lengths))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _coords(sizes: tuple[tuple[int, int], ...]) -> Tensor:
    grids = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).view(-1, 2) for h, w in sizes
    ]
    return torch.cat(grids)
