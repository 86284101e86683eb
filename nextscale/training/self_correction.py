"""Bitwise self-correction, the objective of Infinity and of methods built on its tokens (arXiv 2412.04431)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nextscale.contracts import Pyramid
from nextscale.draws import Draws
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.tokens import joined
from nextscale.training.objective import Batch, NextScale, Wants


class SelfCorrection(Settings, NextScale):
    """The objective: bits that enter the sum are flipped at random, and later targets are what is left to do after that,
    so the model learns to repair its own mistakes.

    One share of flips is drawn for each scale and batch, a whole percentage from 0 to 100 x `strength`, as published.
    """

    wants: ClassVar[Wants] = "features"

    strength: float = Field(0.3, ge=0, le=1, description="largest share of bits that are flipped")
    scales: int | None = Field(
        None, ge=0, le=1024, description="scales whose bits are flipped, the coarsest first; default: all"
    )
    reweight: bool = Field(
        False, description="weigh a token by 1 / sqrt(tokens of its scale), so that coarse scales count more"
    )

    def batch(self, pyramid: Pyramid, content: Tensor, schedule: Schedule, draws: Draws) -> Batch:
        """Inputs and targets of features [B, C, h, w]."""
        flips = self.draw(pyramid.code_dim, schedule, draws)
        return self.flipped(pyramid, content, schedule, [flip.to(content.device) for flip in flips])

    def draw(self, bits: int, schedule: Schedule, draws: Draws) -> list[Tensor]:
        """Which bits to flip, bool [B, l_k, C] of each scale that has any."""
        flips = []
        for length in schedule.lengths[: self.scales]:
            share = int(torch.randint(round(100 * self.strength) + 1, (1,), generator=draws.generator)) / 100
            flips.append(draws.rand(length, bits) < share)
        return flips

    def flipped(self, pyramid: Pyramid, content: Tensor, schedule: Schedule, flips: Sequence[Tensor]) -> Batch:
        """Inputs and targets with given flips; scales without any come last."""

        def corrupt(tokens: Tensor, k: int) -> Tensor:
            return tokens ^ flips[k].to(tokens.dtype) if k < len(flips) else tokens

        encoded = pyramid.encode(content, schedule, corrupt)
        inputs = torch.cat(encoded.inputs, dim=1) if encoded.inputs else None
        weights = self.weights(schedule).to(content.device) if self.reweight else None
        return Batch(schedule, inputs, joined(encoded.tokens), weights)

    @staticmethod
    def weights(schedule: Schedule) -> Tensor:
        """Weight of each token [L], in proportion to 1 / sqrt(tokens of its scale); they sum to 1."""
        lengths = torch.tensor(schedule.lengths)
        weights = lengths.float().rsqrt().repeat_interleave(lengths)
        return weights / weights.sum()
