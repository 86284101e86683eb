"""The plain pyramid: every token map is the whole image at its size, as in FlexVAR."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextscale.contracts import Corrupt, Encoded, Kept, Kind, Lesson, TokenType
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.tokenizer.codebook import Codebook, embed, indecision
from nextscale.tokenizer.maps import Step, as_map, as_rows, device_of, encoded, pooled, straight_through
from nextscale.tokenizer.upkeep import CodeUpkeep
from nextscale.tokens import Tokens, whole_numbers


class PlainSettings(Settings):
    """Shape of the plain pyramid. The defaults are FlexVAR's."""

    # A slip for 8192, says the official code's own comment; it became the shape of the published weights.
    codebook_size: int = Field(8912, ge=2, le=2**24, description="V, the number of codes")
    code_dim: int = Field(32, ge=1, le=16_384, description="C, channels of a code and of the feature map")
    unit: bool = Field(True, description="codes and features are scaled to unit length")


class PlainPyramid(nn.Module):
    """No sums: the token map of scale k is the image at size k, and the next scale sees it enlarged.

    `f_hat` is the code map of the last scale, at its own size, so a decoder taught to do so draws every step.
    """

    kind: Kind = "ids"
    token_type: TokenType = None

    def __init__(self, settings: PlainSettings) -> None:
        super().__init__()
        self.code_dim, self.codes = settings.code_dim, settings.codebook_size
        self.unit = settings.unit
        self.codebook = Codebook(settings.codebook_size, settings.code_dim, cosine=settings.unit)
        with torch.no_grad():
            self.codebook.weight.copy_(self._scaled(self.codebook.weight))

    # ---- sampling, and encoding ----------------------------------------------------------------------------------

    def start(self, batch: int, schedule: Schedule, device: torch.device | str | None = None) -> Tensor:
        """Nothing is known yet: zeros [B, C, h_0, w_0]."""
        return torch.zeros(batch, self.code_dim, *schedule[0], device=device or device_of(self))

    def add(self, f_hat: Tensor, tokens: Tokens, k: int, schedule: Schedule) -> Tensor:
        """The code map of scale k, [B, C, h_k, w_k]; it replaces the one before."""
        return as_map(self._codes(tokens), schedule[k])

    def next_input(self, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the transformer reads at scale k >= 1: the last code map, resized. [B, l_k, C]."""
        return as_rows(F.interpolate(f_hat, size=schedule[k], mode="bicubic"))  # a = -0.75, no antialias

    def encode(self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None) -> Encoded:
        """Tokens, teacher-forcing inputs and code maps of features [B, C, H, W], which may have any size.

        `corrupt(tokens, k)` may replace the tokens that the next scale sees; the tokens returned stay the true ones.
        """
        return encoded(self, self.walk(f, schedule, corrupt), schedule)

    def choices(self, tokens: Tokens) -> Tensor:
        """The tokens, which are ids."""
        return whole_numbers(tokens, "ids")

    def limit(self, k: int) -> int:
        """How many codes scale k may use: all of them."""
        return self.codes

    def check_scales(self, schedule: Schedule, trained: Schedule) -> None:
        """It works with any scales."""

    # ---- training ------------------------------------------------------------------------------------------------

    def learn(self, f: Tensor, schedule: Schedule, keep: Kept, *, beta: float = 0.25, entropy: float = 0.0) -> Lesson:
        """Quantize `f` at one size for training the tokenizer: that of the last scale that the first image of the whole batch
        keeps, the first scale if it keeps none, so that scale dropout teaches the decoder all sizes.

        The loss pulls codes to features and, `beta` times, features to codes; `entropy` weighs a term that wants every
        feature sure of its code and all codes used alike, on the images at hand (both as in LlamaGen). Tokens and residuals
        of the other scales are counted, but carry no gradient.
        """
        taught = max(keep.whole[0].nonzero().flatten().tolist(), default=0)
        tokens: list[Tokens] = []
        residuals: list[Tensor] = []
        f_hat, loss = f, f.new_zeros(())
        for k in range(len(schedule)):
            rows = self.residual(f if k == taught else f.detach(), f, k, schedule)
            ids = self.codebook.nearest(rows)
            tokens.append(ids)
            residuals.append(rows.detach())
            if k == taught:
                codes = self._codes(ids)
                loss = F.mse_loss(codes, rows.detach()) + beta * F.mse_loss(codes.detach(), rows)
                if entropy:
                    loss = loss + entropy * indecision(rows.flatten(0, 1), self._scaled(self.codebook.weight))
                f_hat = as_map(straight_through(rows, codes), schedule[k])
        return Lesson(tokens, residuals, f_hat, loss)

    def upkeep(self) -> CodeUpkeep:
        """First codes from data, and restarts of dead ones."""
        return CodeUpkeep(self, self.codebook.weight)

    def residual(self, f: Tensor, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the tokens of scale k are to stand for, [B, l_k, C]: the features at that size, of a code's length."""
        return self._scaled(as_rows(pooled(f, schedule[k])))

    # ---- the pieces -----------------------------------------------------------------------------------------------

    def walk(self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None) -> Iterator[Step]:
        """Quantize `f` at each size."""
        f_hat = self.start(len(f), schedule, f.device)
        for k, size in enumerate(schedule.sizes):
            rows = as_rows(pooled(f, size))
            tokens = self.codebook.nearest(rows)
            f_hat = self.add(f_hat, tokens if corrupt is None else corrupt(tokens, k), k, schedule)
            yield Step(tokens, f_hat, rows)

    def _codes(self, tokens: Tokens) -> Tensor:
        """Codes [B, l, C] of ids [B, l] or of soft weights over the codebook."""
        return embed(tokens, self._scaled(self.codebook.weight))

    def _scaled(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.unit else rows
