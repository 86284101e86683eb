"""Rotary positions in two dimensions: queries and keys turn by angles that grow with a token's row and column."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextscale.model.attention import SelfAttention
from nextscale.model.init import var_normal_
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.schedule import Schedule, Span
from nextscale.settings import Settings


class RotarySettings(Settings):
    """Where tokens of different scales lie on one grid. The defaults are Infinity's."""

    base: float = Field(10_000.0, gt=1, le=1e12, description="of the geometric series of frequencies")
    mode: Literal["raw", "resized", "rounded"] = Field(
        "rounded",
        description="'rounded': row and column on the finest grid, rounded to whole numbers; 'resized': cosines and sines of "
        "a grid of the image's shape with `side` rows or columns, resized; 'raw': row and column of the scale itself",
    )
    side: int = Field(128, ge=2, le=4096, description="longer side of the grid of 'resized'")


class Rotary:
    """Tables of cosines and sines for the tokens of a span.

    The first half of the pairs of channels turns with the row, the second with the column; a pair is two neighbours. The
    frequencies of each half fall from 1 to almost 1 / base.

    tables: the longest schedule of each shape of images. The finest grid of a schedule is the last scale of the table that
        begins with it (of several, or if none does: of nearest shape), so a model that is trained on small images knows
        where their tokens would be in large ones.
    """

    def __init__(self, settings: RotarySettings, head_dim: int, tables: Sequence[Schedule]) -> None:
        if head_dim % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4 channels, got {head_dim}")
        self.settings, self.head_dim, self.tables = settings, head_dim, tuple(tables)

    def __call__(self, span: Span, device: torch.device | str | None = None) -> Tensor:
        """Cosines and sines of the span's tokens, [l, 2, head_dim / 2]; of a span of kept tokens [B, l, 2, head_dim / 2].

        Tokens of a prefix are not turned: they bring their own positions.
        """
        finest = self.finest(span.schedule)
        table = span.gather(_table(span.sizes, finest, self.settings, self.head_dim, torch.device(device or "cpu")))
        if span.leading:
            still = table.new_tensor([1.0, 0.0]).view(1, 2, 1).expand(span.leading, 2, table.shape[-1])
            table = torch.cat([still, table])
        return table

    def finest(self, schedule: Schedule) -> tuple[int, int]:
        """The grid in which tokens of a schedule have their places."""
        begun = [table for table in self.tables if table.sizes[: len(schedule)] == schedule.sizes]
        height, width = schedule[-1]
        nearest = min(begun or self.tables, key=lambda table: abs(height / width - table[-1][0] / table[-1][1]))
        return nearest[-1]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of channels of x [B, N, l, head_dim] by the angles of a table [l or B, l, 2, head_dim / 2]."""
    cos, sin = (part.unsqueeze(1) if table.ndim == 4 else part for part in table.unbind(-2))
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # each [B, N, l, head_dim / 2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RotaryAttention(SelfAttention):
    """Self-attention whose queries and keys are turned after they are scaled; a cache holds turned keys."""

    def __init__(self, dim: int, num_heads: int, rotary: Rotary, qk_norm: bool = True) -> None:
        super().__init__(dim, num_heads, qk_norm)
        self.rotary = rotary

    def place(self, q: Tensor, k: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        table = self.rotary(span, q.device)
        return rotate(q, table), rotate(k, table)


class ScalePositions(nn.Module):
    """What rotations do not tell: a learned vector for each scale, and one for the start tokens."""

    def __init__(self, most_scales: int, dim: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, dim))
        self.scale = nn.Embedding(most_scales, dim)

    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """VAR's initial weights; those of the scales are an embedding's."""
        var_normal_(self.start, settings.dim, generator)

    def forward(self, span: Span) -> Tensor:
        """Vectors of the scales of a span's tokens, [l, D]."""
        if len(span.schedule) > len(self.scale.weight):
            raise ValueError(
                f"this model knows up to {len(self.scale.weight)} scales, got {span.schedule}; leave some out, or build it "
                "with more"
            )
        return span.gather(self.scale(span.scale_index(self.start.device)))


@lru_cache(maxsize=256)
def _table(
    sizes: tuple[tuple[int, int], ...],
    finest: tuple[int, int],
    settings: RotarySettings,
    head_dim: int,
    device: torch.device,
) -> Tensor:
    """Cosines and sines of all tokens of some scales, float32 [l, 2, head_dim / 2]."""
    # Made where rounding is always the same, and as an ordinary tensor: it is kept, and may be used in training next.
    with torch.inference_mode(False), torch.device("cpu"):
        tables = [_scale_table(size, finest, settings, head_dim).flatten(0, 1) for size in sizes]
        return torch.cat(tables).to(device)


def _scale_table(size: tuple[int, int], finest: tuple[int, int], settings: RotarySettings, head_dim: int) -> Tensor:
    """[h, w, 2, head_dim / 2]."""
    if settings.mode == "raw":
        return _grid([torch.arange(side) for side in size], settings.base, head_dim)
    if settings.mode == "rounded":  # halves to even
        places = [(torch.arange(side) * (full / side)).round() for side, full in zip(size, finest, strict=True)]
        return _grid(places, settings.base, head_dim)
    longest, side = max(finest), settings.side
    full = [side if edge == longest else int(side / longest * edge) for edge in finest]
    grid = _grid([torch.arange(edge) for edge in full], settings.base, head_dim)  # [full h, full w, 2, head_dim / 2]
    channels = grid.flatten(2).permute(2, 0, 1).unsqueeze(0)
    small = F.interpolate(channels, size=size, mode="bilinear", align_corners=True)
    return small[0].permute(1, 2, 0).unflatten(-1, (2, -1))


def _grid(places: list[Tensor], base: float, head_dim: int) -> Tensor:
    """Cosines and sines of a grid of rows and columns, [h, w, 2, head_dim / 2]."""
    half = head_dim // 2
    frequencies = 1 / base ** (torch.arange(0, half, 2) / half)  # [head_dim / 4]
    rows, columns = (place.float()[:, None] * frequencies for place in places)
    shape = len(rows), len(columns), -1
    angles = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=2)
