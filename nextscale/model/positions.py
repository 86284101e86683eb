"""Where a token is: added to the residual stream before the first block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.model.init import var_normal_
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.schedule import Schedule, Span


class LearnedPositions(nn.Module):
    """VAR's positions: one learned vector a token, one a scale, and one for each start token.

    The table belongs to the sizes that it was made for; another schedule is refused.
    """

    def __init__(self, schedule: Schedule, dim: int) -> None:
        super().__init__()
        self.sizes = schedule.sizes
        self.start = nn.Parameter(torch.zeros(schedule.lengths[0], dim))
        self.table = nn.Parameter(torch.zeros(schedule.length, dim))
        self.scale = nn.Embedding(len(schedule), dim)

    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """VAR's initial weights; those of the scales are an embedding's."""
        for weight in (self.start, self.table):
            var_normal_(weight, settings.dim, generator)

    def forward(self, span: Span) -> Tensor:
        """Positions of the tokens of a span, [l, D] (of kept tokens [B, kept, D])."""
        if span.schedule.sizes[: span.stop] != self.sizes[: span.stop]:
            raise ValueError(
                f"this model has learned positions for the scales {Schedule(self.sizes)}, got {span.schedule}; "
                "sample with the model's own schedule"
            )
        return span.gather(self.table[span.tokens] + self.scale(span.scale_index(self.table.device)))


class ResizedPositions(nn.Module):
    """One learned map of positions, averaged down (or repeated up) to the size of each scale, and a vector for start tokens.

    It begins as sines of y in the even channels and cosines of x in the odd ones: not the usual 2-D table, which has both
    of each coordinate.
    """

    def __init__(self, dim: int, side: int, starts: int = 1) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(starts, dim))
        place = torch.arange(side, dtype=torch.float32)
        rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10_000) / dim))
        angles = rates[:, None] * place  # [D / 2, side]
        table = torch.empty(dim, side, side)
        table[0::2] = angles.sin()[:, :, None]
        table[1::2] = angles.cos()[:, None, :]
        self.table = nn.Parameter(table)

    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """VAR's initial weights for the start; the table keeps its own."""
        var_normal_(self.start, settings.dim, generator)

    def forward(self, span: Span) -> Tensor:
        """Positions of the tokens of a span, [l, D]."""
        maps = [F.interpolate(self.table[None], size=size, mode="area")[0] for size in span.sizes]
        return span.gather(torch.cat([positions.flatten(1).T for positions in maps]))
