"""The bookkeeping between scales, written once: how token maps add up to a feature map, and what the next scale sees."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextscale.contracts import Corrupt, Encoded, Kept, Kind, Lesson, Pyramid, TokenType
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.tokenizer.codebook import Codebook, indecision
from nextscale.tokenizer.maps import Step, as_map, as_rows, device_of, encoded, pooled, straight_through
from nextscale.tokenizer.upkeep import CodeUpkeep, Moments
from nextscale.tokens import Tokens, first_tensor, whole_numbers


class PyramidSettings(Settings):
    """Shape of the residual pyramid. The defaults are VAR's."""

    codebook_size: int = Field(4096, ge=2, le=2**24, description="V, the number of codes")
    code_dim: int = Field(32, ge=1, le=16_384, description="C, channels of a code and of the feature map")
    cosine: bool = Field(False, description="search codes by cosine instead of Euclidean distance")
    phi: Annotated[int, Field(ge=1, le=1024)] | Literal["each"] = Field(
        4, description="convolutions shared by the scales; 'each': one for every scale"
    )
    phi_ratio: float = Field(0.5, ge=-1, le=1, description="share of the convolution in phi; 0: phi is the identity")
    limits: tuple[Annotated[int, Field(ge=1, le=2**24)], ...] | None = Field(
        None,
        max_length=1024,
        description="how many of the first codes each scale may use; further scales, and by default all, use all codes",
    )
    standardize: bool = Field(
        False, description="standardize the residuals of each scale, so that every scale can use all codes"
    )


class Phi(nn.Conv2d):
    """The convolution after upsampling, mixed with the identity: `(1 - r) h + r conv(h)`."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class ResidualPyramid(nn.Module):
    """VAR's pyramid: a feature map is the sum of K upsampled token maps that share one codebook (Alg. 1, 2 of VAR).

    Residuals of coarse scales are averages, hence short, and near zero there are few codes. With `standardize` (not in
    VAR) the codes of scale k are the shared ones times `std[k]` plus `mean[k]`, which training keeps at the residuals'
    own, channel by channel: every scale then finds all codes at its own size and place.

    With `limits` (not in VAR) scale k uses the first `limits[k]` codes alone. A few images show a coarse scale only a
    few hundred tokens, from which the frequencies of thousands of codes cannot be learned; finer scales make up for it.
    """

    kind: Kind = "ids"
    token_type: TokenType = None

    def __init__(self, settings: PyramidSettings, num_scales: int) -> None:
        super().__init__()
        self.code_dim, self.codes = settings.code_dim, settings.codebook_size
        self.codebook = Codebook(settings.codebook_size, settings.code_dim, settings.cosine)
        self.limits = settings.limits or ()
        if self.limits and (min(self.limits) < 1 or max(self.limits) > settings.codebook_size):
            raise ValueError(f"limits must name 1 to {settings.codebook_size} codes a scale, got {self.limits}")
        count = num_scales if settings.phi == "each" else settings.phi
        ratio = abs(settings.phi_ratio)  # the reference takes the absolute value
        self.each = settings.phi == "each"
        self.mean: Tensor | None
        self.std: Tensor | None
        shape = num_scales, settings.code_dim
        self.register_buffer("mean", torch.zeros(shape) if settings.standardize else None)
        self.register_buffer("std", torch.ones(shape) if settings.standardize else None)
        self.phi = nn.ModuleList(Phi(settings.code_dim, ratio) for _ in range(count if ratio else 0))

    # ---- sampling, and encoding ----------------------------------------------------------------------------------

    def start(self, batch: int, schedule: Schedule, device: torch.device | str | None = None) -> Tensor:
        """The empty sum, zeros float32 [B, C, H, W] at the size of the last scale."""
        return torch.zeros(batch, self.code_dim, *schedule[-1], device=device or device_of(self))

    def add(self, f_hat: Tensor, tokens: Tokens, k: int, schedule: Schedule) -> Tensor:
        """The sum after scale k: `f_hat` [B, C, H, W] plus the token map `tokens` (ids [B, l_k], or soft weights). Alg. 2 of
        VAR, its body."""
        return f_hat + self.contribution(tokens, k, schedule)

    def next_input(self, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the transformer reads at scale k >= 1: the sum so far, reduced to that scale. [B, l_k, C]."""
        return as_rows(pooled(f_hat, schedule[k]))

    def encode(self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None) -> Encoded:
        """Tokens, teacher-forcing inputs and running sums of a feature map [B, C, H, W].

        `corrupt(tokens, k)` may replace the tokens that enter the sum; the tokens returned stay the true ones.
        """
        return encoded(self, self.walk(f, schedule, corrupt=corrupt), schedule)

    def choices(self, tokens: Tokens) -> Tensor:
        """The tokens, which are ids."""
        return whole_numbers(tokens, "ids")

    def limit(self, k: int) -> int:
        """How many of the first codes scale k may use; a scale beyond those that were set may use all."""
        return self.limits[k] if k < len(self.limits) else self.codes

    def check_scales(self, schedule: Schedule, trained: Schedule) -> None:
        """Residuals that are standardized know the scales of their training alone; a phi of its own, their number."""
        if self.moments is not None and schedule.sizes != trained.sizes:
            raise ValueError(
                "this tokenizer standardizes the residuals of each of its own scales, so it has no others; train it with "
                "--system.pyramid.no-standardize"
            )
        if self.each and len(schedule) > len(self.phi):
            raise ValueError(f"this pyramid has one phi for each of {len(self.phi)} scales, got {len(schedule)}")

    # ---- training ------------------------------------------------------------------------------------------------

    def learn(self, f: Tensor, schedule: Schedule, keep: Kept, *, beta: float = 0.25, entropy: float = 0.0) -> Lesson:
        """Quantize `f` for training the tokenizer; `keep` drops scales from the sum.

        The loss is VAR's, on the running sum at every scale: codes follow features and, `beta` times, features follow
        codes; images that drop scale k are left out of its term. The gradient goes straight through the whole sum. `entropy`
        (not in VAR) weighs a term that wants every residual sure of its code and all codes used alike, on the images at hand.
        """
        weights = keep.weights
        tokens: list[Tokens] = []
        residuals: list[Tensor] = []
        f_hat, loss = f, f.new_zeros(())
        taken = self.start(len(f), schedule, f.device)  # what the scales before have taken away
        for k, step in enumerate(self.walk(f, schedule, keep=keep)):
            f_hat = step.f_hat
            if entropy:
                rows = self.standardized(self.residual(f, taken, k, schedule), k).flatten(0, 1)
                loss = loss + entropy * indecision(rows, self.codebook.weight[: self.limit(k)])
                taken = taken + self.contribution(step.tokens, k, schedule).detach()
            commit = ((f_hat.detach() - f).square().mean(dim=(1, 2, 3)) * weights[:, k]).sum()
            follow = ((f_hat - f.detach()).square().mean(dim=(1, 2, 3)) * weights[:, k]).sum()
            loss = loss + beta * commit + follow
            tokens.append(step.tokens)
            residuals.append(step.residual)
        return Lesson(tokens, residuals, straight_through(f, f_hat), loss / len(schedule))

    def upkeep(self) -> CodeUpkeep:
        """First codes from data, restarts of dead ones, and the means and deviations of residuals."""
        return CodeUpkeep(self, self.codebook.weight, self.moments)

    def residual(self, f: Tensor, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the tokens of scale k are to stand for after the sum `f_hat`, [B, l_k, C]: the residual."""
        return as_rows(pooled(f - f_hat, schedule[k]))

    # ---- the pieces -----------------------------------------------------------------------------------------------

    def walk(
        self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None, keep: Kept | None = None
    ) -> Iterator[Step]:
        """Quantize `f` scale by scale (Alg. 1 of VAR).

        The sum carries gradients to codes and phi; the residual is detached, as in VAR. `keep` drops scales from the sum,
        but not from the residual (scale dropout of training).
        """
        if tuple(f.shape[-2:]) != schedule[-1]:
            raise ValueError(
                f"the last scale of the schedule must be as large as the feature map: scale {schedule[-1]}, "
                f"feature map {tuple(f.shape[-2:])}; use images of the size that fits the schedule"
            )
        kept = None if keep is None else keep.own.to(f)
        residual = f.detach()
        f_hat = self.start(len(f), schedule, f.device)
        for k in range(len(schedule)):
            small = as_rows(pooled(residual, schedule[k]))  # [B, l_k, C]
            tokens = self.codebook.nearest(self.standardized(small, k), self.limit(k))
            h = self.contribution(tokens if corrupt is None else corrupt(tokens, k), k, schedule)
            residual = residual - h.detach()
            f_hat = f_hat + (h if kept is None else h * kept[:, k].view(-1, 1, 1, 1))
            yield Step(tokens, f_hat, small)

    @property
    def moments(self) -> Moments | None:
        """Mean and deviation of each scale's residuals, if they are standardized."""
        return None if self.mean is None or self.std is None else Moments(self.mean, self.std)

    def standardized(self, residual: Tensor, k: int) -> Tensor:
        """What is looked up in the codebook for the residuals of scale k, [..., C]."""
        return residual if self.moments is None else self.moments.standardized(residual, k)

    def contribution(self, tokens: Tokens, k: int, schedule: Schedule) -> Tensor:
        """What the token map of scale k adds to the sum: phi_k(upsample(codes)), [B, C, H, W]."""
        codes = self.codebook.embed(tokens)  # [B, l_k, C]
        if self.moments is not None:
            codes = self.moments.restored(codes, k)
        h = as_map(codes, schedule[k])  # [B, C, h_k, w_k]
        if schedule[k] != schedule[-1]:
            h = F.interpolate(h, size=schedule[-1], mode="bicubic")  # a = -0.75, half-pixel centres, no antialias
        return self.phi[self.phi_index(k, schedule)](h) if self.phi else h

    def phi_index(self, k: int, schedule: Schedule) -> int:
        """Which convolution serves scale k: its own, or the one whose tick is nearest to k / (K - 1)."""
        if self.each:
            self.check_scales(schedule, schedule)
            return k
        # Exactly the reference's float64 expressions, linspace included: at K = 10 two scales lie half-way between
        # two ticks, and rounding decides.
        count = len(self.phi)
        end = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(end, 1 - end, count)
        return int(np.argmin(np.abs(ticks - schedule.progress(k))))


@torch.no_grad()
def teacher_inputs(pyramid: Pyramid, tokens: Sequence[Tokens], schedule: Schedule) -> Tensor | None:
    """What the transformer reads when all scales are known: inputs of every scale but the first, [B, L - l_0, C].

    `tokens` may be a prefix of the scales; None if it holds the first scale alone.
    """
    first = first_tensor(tokens[0])
    f_hat = pyramid.start(len(first), schedule, first.device)
    inputs = []
    for k, token_map in enumerate(tokens[:-1]):
        f_hat = pyramid.add(f_hat, token_map, k, schedule)
        inputs.append(pyramid.next_input(f_hat, k + 1, schedule))
    return torch.cat(inputs, dim=1) if inputs else None
