"""Where a token is: added to the residual stream before the first block."""

from __future__ import annotations

import torch
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
