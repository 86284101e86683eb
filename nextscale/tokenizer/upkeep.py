"""What keeps a codebook in use while a tokenizer is trained: first codes from data, restarts of dead ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nextscale.schedule import Schedule

MIN_STD = 1e-3  # of standardized residuals: a channel that is always the same must not divide by zero


class Moments(NamedTuple):
    """Mean and standard deviation of each scale's residuals, [K, C]."""

    mean: Tensor
    std: Tensor

    def standardized(self, rows: Tensor, k: int) -> Tensor:
        """Residuals [..., C] of scale k with mean 0 and deviation 1."""
        return (rows - self.mean[k]) / self.std[k]

    def restored(self, rows: Tensor, k: int) -> Tensor:
        """The other way."""
        return rows * self.std[k] + self.mean[k]


class CodebookPyramid(Protocol):
    """What the upkeep asks of its pyramid, beside `start` and `add`."""

    def start(self, batch: int, schedule: Schedule, device: torch.device | str | None = None) -> Tensor: ...

    def add(self, f_hat: Tensor, tokens: Tensor, k: int, schedule: Schedule) -> Tensor: ...

    def limit(self, k: int) -> int:
        """How many of the first codes scale k may use."""

    def residual(self, f: Tensor, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the tokens of scale k are to stand for after the sum `f_hat`, [B, l_k, C]."""


class CodeUpkeep:
    """Upkeep of a pyramid whose scales share the codes [V, C]; `moments`: those of its residuals, if it standardizes them.

    The first codes are centres of residuals, as by k-means; a code that hardly any token has moves to a residual of the scale
    that uses its codes least.
    """

    def __init__(self, pyramid: CodebookPyramid, codes: nn.Parameter, moments: Moments | None = None) -> None:
        self.pyramid, self.codes, self.moments = pyramid, codes, moments

    @torch.no_grad()
    def first_codes(self, f: Tensor, schedule: Schedule, generator: torch.Generator) -> None:
        """Set the codes from feature maps [B, C, H, W]: each scale gets a share of the codebook, filled with its residuals,
        then moved by a few rounds of k-means. Moments become those of the residuals."""
        pyramid, codes = self.pyramid, self.codes
        f_hat, filled = pyramid.start(len(f), schedule, f.device), 0
        for k, count in enumerate(self.shares(schedule)):
            rows = pyramid.residual(f, f_hat, k, schedule).flatten(0, 1)
            if self.moments is not None:
                self.moments.mean[k] = rows.mean(dim=0)
                self.moments.std[k] = rows.std(dim=0).clamp(min=MIN_STD)
            rows = self._looked_up(rows, k)
            codes[filled : filled + count] = kmeans(rows, count, generator)
            # Quantize with the codes of this scale alone, the others are not set yet; where it is limited, with all so far.
            first = 0 if pyramid.limit(k) < len(codes) else filled
            ids = torch.cdist(rows, codes[first : filled + count]).argmin(dim=1).view(len(f), -1) + first
            f_hat = pyramid.add(f_hat, ids, k, schedule)
            filled += count

    def shares(self, schedule: Schedule) -> list[int]:
        """How many codes each scale sets: up to its limit, or a share of the others that grows with log(l_k + 1)."""
        total = len(self.codes)
        limits = [self.pyramid.limit(k) for k in range(len(schedule))]
        filled = max([0, *(limit for limit in limits if limit < total)])
        free = torch.tensor([limit == total for limit in limits])
        shares = torch.tensor(schedule.lengths).log1p() * free
        counts = (shares / shares.sum().clamp(min=1) * (total - filled)).floor().long()
        if free.any():
            counts[free.nonzero().max()] += total - filled - counts.sum()  # what rounding left
        filled = 0
        for k, limit in enumerate(limits):
            if limit < total:
                counts[k] = max(0, limit - filled)
                filled = max(filled, limit)
        return counts.tolist()

    @torch.no_grad()
    def follow(self, residuals: Sequence[Tensor], average: Callable[[Tensor], Tensor]) -> None:
        """Move the moments towards those of a step's residuals [B, l_k, C]."""
        if self.moments is None:
            return
        for mean, std, small in zip(*self.moments, residuals, strict=True):
            rows = small.flatten(0, 1)  # [B * l_k, C]
            mean.lerp_(average(rows.mean(dim=0)), 0.01)
            spread = average((rows - mean).square().mean(dim=0))
            std.lerp_(spread.sqrt(), 0.01).clamp_(min=MIN_STD)

    @torch.no_grad()
    def restart(
        self,
        usage: Tensor,
        residuals: Sequence[Tensor],
        schedule: Schedule,
        generator: torch.Generator,
        gather: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Move dead codes onto residuals [B, l_k, C] of the scale that uses its codes least; returns their ids."""
        codes = self.codes
        lengths = torch.tensor(schedule.lengths, device=usage.device, dtype=usage.dtype)
        overall = (usage * lengths[:, None]).sum(0) / lengths.sum()
        dead = (overall < 0.03 / len(codes)).nonzero().squeeze(1)
        if len(dead) == 0:
            return dead
        images = len(gather(residuals[0]))
        entropy = torch.special.entr(usage).sum(1)
        attainable = torch.log(torch.clamp(lengths * images, max=len(codes)))
        # Not the first scale, whose few tokens cannot use many codes, and none that may not use all of them.
        allowed = [k for k in range(1, len(schedule)) if self.pyramid.limit(k) == len(codes)]
        k = min(allowed or [len(schedule) - 1], key=lambda k: float(entropy[k] / attainable[k]))
        rows = self._looked_up(gather(residuals[k]), k).flatten(0, 1)
        dead = dead[torch.randperm(len(dead), generator=generator)[: len(rows)]]
        codes[dead] = rows[torch.randperm(len(rows), generator=generator)[: len(dead)]]
        usage[:, dead] = 0
        usage[k, dead] = 1 / len(codes)  # a grace period before they can count as dead again
        return dead

    def _looked_up(self, rows: Tensor, k: int) -> Tensor:
        return rows if self.moments is None else self.moments.standardized(rows, k)


def kmeans(rows: Tensor, count: int, generator: torch.Generator, rounds: int = 5) -> Tensor:
    """`count` centres of `rows` [N, C]; drawn with a little noise when there are fewer rows than centres."""
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    centres = rows[order.repeat(-(-count // len(rows)))[:count]]
    if count >= len(rows):
        return centres + 0.05 * rows.std() * torch.randn(centres.shape, generator=generator).to(rows)
    for _ in range(rounds):
        nearest = torch.cdist(rows, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        sizes = torch.bincount(nearest, minlength=count).unsqueeze(1)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres
