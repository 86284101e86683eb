"""The bookkeeping between scales, written once: how token maps add up to a feature map, and what the next scale sees."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.tokenizer.codebook import Codebook, indecision


class PyramidSettings(Settings):
    """Shape of the residual pyramid. The defaults are VAR's."""

    codebook_size: int = Field(4096, ge=2, description="V, the number of codes")
    code_dim: int = Field(32, ge=1, description="C, channels of a code and of the feature map")
    cosine: bool = Field(False, description="search codes by cosine instead of Euclidean distance")
    phi: int | Literal["each"] = Field(4, description="convolutions shared by the scales; 'each': one for every scale")
    phi_ratio: float = Field(0.5, ge=-1, le=1, description="share of the convolution in phi; 0: phi is the identity")
    limits: tuple[int, ...] | None = Field(
        None, description="how many of the first codes each scale may use; default: all of them"
    )
    standardize: bool = Field(
        False, description="standardize the residuals of each scale, so that every scale can use all codes"
    )


class Encoded(NamedTuple):
    """What `encode` returns, one tensor a scale: tokens [B, l_k]; inputs [B, l_k, C] of every scale but the first;
    f_hats [B, C, H, W] after each scale."""

    tokens: list[Tensor]
    inputs: list[Tensor]
    f_hats: list[Tensor]


class Lesson(NamedTuple):
    """What training the tokenizer needs of a feature map: the tokens of each scale; `residuals`, what they stand for
    [B, l_k, C]; f_hat [B, C, h, w], whose gradient goes straight to the features; the quantizer's loss, a number."""

    tokens: list[Tensor]
    residuals: list[Tensor]
    f_hat: Tensor
    loss: Tensor


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

    def __init__(self, settings: PyramidSettings, num_scales: int) -> None:
        super().__init__()
        self.code_dim, self.codes = settings.code_dim, settings.codebook_size
        self.codebook = Codebook(settings.codebook_size, settings.code_dim, settings.cosine)
        self.limits = settings.limits or ()
        if self.limits and (
            len(self.limits) != num_scales or min(self.limits) < 1 or max(self.limits) > settings.codebook_size
        ):
            raise ValueError(
                f"limits must name 1 to {settings.codebook_size} codes for each of {num_scales} scales, got {self.limits}"
            )
        count = num_scales if settings.phi == "each" else settings.phi
        ratio = abs(settings.phi_ratio)  # the reference takes the absolute value
        self.each = settings.phi == "each"
        self.mean: Tensor | None
        self.std: Tensor | None
        shape = num_scales, settings.code_dim
        self.register_buffer("mean", torch.zeros(shape) if settings.standardize else None)
        self.register_buffer("std", torch.ones(shape) if settings.standardize else None)
        self.phi = nn.ModuleList(Phi(settings.code_dim, ratio) for _ in range(count if ratio else 0))

    # ---- the contract: start, add, next_input, encode -------------------------------------------------------------

    def start(self, batch: int, schedule: Schedule) -> Tensor:
        """The empty sum, zeros float32 [B, C, H, W] at the size of the last scale."""
        weight = self.codebook.weight
        return torch.zeros(batch, weight.shape[1], *schedule[-1], device=weight.device)

    def add(self, f_hat: Tensor, tokens: Tensor, k: int, schedule: Schedule) -> Tensor:
        """The sum after scale k: `f_hat` [B, C, H, W] plus the token map `tokens` (ids [B, l_k] or weights [B, l_k, V])."""
        return f_hat + self.contribution(tokens, k, schedule)

    def next_input(self, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the transformer reads at scale k >= 1: the sum so far, reduced to that scale. [B, l_k, C]."""
        return _area(f_hat, schedule[k]).flatten(2).mT

    def encode(self, f: Tensor, schedule: Schedule, corrupt: Callable[[Tensor, int], Tensor] | None = None) -> Encoded:
        """Tokens, teacher-forcing inputs and running sums of a feature map [B, C, H, W].

        `corrupt(tokens, k)` may replace the tokens that enter the sum; the tokens returned stay the true ones.
        """
        encoded = Encoded([], [], [])
        with torch.no_grad():
            for k, (tokens, f_hat, _) in enumerate(self.walk(f, schedule, corrupt=corrupt)):
                encoded.tokens.append(tokens)
                encoded.f_hats.append(f_hat)
                if k + 1 < len(schedule):
                    encoded.inputs.append(self.next_input(f_hat, k + 1, schedule))
        return encoded

    def learn(
        self,
        f: Tensor,
        schedule: Schedule,
        keep: Tensor,
        *,
        beta: float = 0.25,
        entropy: float = 0.0,
        counts: Tensor | None = None,
    ) -> Lesson:
        """Quantize `f` for training the tokenizer; `keep` bool [B, K] drops scales from the sum.

        The loss is VAR's, on the running sum at every scale: codes follow features and, `beta` times, features follow
        codes; images that drop scale k are left out of its term. The gradient goes straight through the whole sum. `entropy`
        (not in VAR) weighs a term that wants every residual sure of its code and all codes used alike, on the images at hand.
        `counts` [K]: where `f` is a part of a batch, how many images of the whole keep each scale, times the part's share.
        """
        keep = keep.to(f)
        counts = keep.sum(dim=0) if counts is None else counts
        loss, tokens, residuals, f_hat = f.new_zeros(()), [], [], f
        taken = self.start(len(f), schedule)  # what the scales before have taken away
        for k, (token_map, f_hat, small) in enumerate(self.walk(f, schedule, keep=keep)):
            if entropy:
                rows = self.standardized(self.residual(f, taken, k, schedule), k).flatten(0, 1)
                loss = loss + entropy * indecision(rows, self.codebook.weight[: self.limit(k)])
                taken = taken + self.contribution(token_map, k, schedule).detach()
            weight = keep[:, k] / counts[k].clamp(min=1e-6)  # of a scale that none keeps: 0
            commit = ((f_hat.detach() - f).square().mean(dim=(1, 2, 3)) * weight).sum()
            follow = ((f_hat - f.detach()).square().mean(dim=(1, 2, 3)) * weight).sum()
            loss = loss + beta * commit + follow
            tokens.append(token_map)
            residuals.append(small)
        return Lesson(tokens, residuals, f + (f_hat - f).detach(), loss / len(schedule))

    def residual(self, f: Tensor, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the tokens of scale k are to stand for after the sum `f_hat`, [B, l_k, C]: the residual."""
        return _area(f - f_hat, schedule[k]).flatten(2).mT

    # ---- the pieces -----------------------------------------------------------------------------------------------

    def walk(
        self,
        f: Tensor,
        schedule: Schedule,
        corrupt: Callable[[Tensor, int], Tensor] | None = None,
        keep: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Quantize `f` scale by scale; yields (tokens [B, l_k], sum so far [B, C, H, W],
        residual that the tokens stand for [B, l_k, C]).

        The sum carries gradients to codes and phi; the residual is detached, as in VAR. `keep` [B, K] drops scales
        from the sum, but not from the residual (scale dropout of training).
        """
        if tuple(f.shape[-2:]) != schedule[-1]:
            raise ValueError(
                f"the last scale of the schedule must be as large as the feature map: scale {schedule[-1]}, "
                f"feature map {tuple(f.shape[-2:])}; use images of the size that fits the schedule"
            )
        residual = f.detach()
        f_hat = self.start(len(f), schedule)
        for k in range(len(schedule)):
            small = _area(residual, schedule[k]).flatten(2).mT  # [B, l_k, C]
            tokens = self.codebook.nearest(self.standardized(small, k), self.limit(k))
            h = self.contribution(tokens if corrupt is None else corrupt(tokens, k), k, schedule)
            residual = residual - h.detach()
            f_hat = f_hat + (h if keep is None else h * keep[:, k].view(-1, 1, 1, 1))
            yield tokens, f_hat, small

    def limit(self, k: int) -> int:
        """How many of the first codes scale k may use; a scale beyond those that were set may use all."""
        return self.limits[k] if k < len(self.limits) else self.codes

    def standardized(self, residual: Tensor, k: int) -> Tensor:
        """What is looked up in the codebook for the residuals of scale k, [..., C]."""
        if self.mean is None or self.std is None:
            return residual
        return (residual - self.mean[k]) / self.std[k]

    def contribution(self, tokens: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the token map of scale k adds to the sum: phi_k(upsample(codes)), [B, C, H, W]."""
        codes = self.codebook.embed(tokens)  # [B, l_k, C]
        if self.mean is not None and self.std is not None:
            codes = codes * self.std[k] + self.mean[k]
        h = codes.mT.unflatten(-1, schedule[k])  # [B, C, h_k, w_k]
        if schedule[k] != schedule[-1]:
            h = F.interpolate(h, size=schedule[-1], mode="bicubic")  # a = -0.75, half-pixel centres, no antialias
        return self.phi[self.phi_index(k, schedule)](h) if self.phi else h

    def phi_index(self, k: int, schedule: Schedule) -> int:
        """Which convolution serves scale k: its own, or the one whose tick is nearest to k / (K - 1)."""
        if self.each:
            if len(schedule) > len(self.phi):
                raise ValueError(
                    f"this pyramid has one phi for each of {len(self.phi)} scales, got a schedule of {len(schedule)}"
                )
            return k
        # Exactly the reference's float64 expressions, linspace included: at K = 10 two scales lie half-way between
        # two ticks, and rounding decides.
        count = len(self.phi)
        end = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(end, 1 - end, count)
        return int(np.argmin(np.abs(ticks - schedule.progress(k))))


@torch.no_grad()
def teacher_inputs(pyramid: Any, tokens: list[Tensor], schedule: Schedule) -> Tensor | None:
    """What the transformer reads when all scales are known: inputs of every scale but the first, [B, L - l_0, C].

    `tokens` may be a prefix of the scales; None if it holds the first scale alone.
    """
    f_hat = pyramid.start(len(tokens[0]), schedule)
    inputs = []
    for k, token_map in enumerate(tokens[:-1]):
        f_hat = pyramid.add(f_hat, token_map, k, schedule)
        inputs.append(pyramid.next_input(f_hat, k + 1, schedule))
    return torch.cat(inputs, dim=1) if inputs else None


def _area(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="area")
