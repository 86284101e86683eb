"""Picking: one token for each position of the logits.

A pick is any `(logits [B, l, V], generators) -> tokens`: ids [B, l], or soft weights over the codebook (`Soft`, [B, l, V]).
`generators` is a list with one generator an image, so that the noise belongs to the image and not to its place in a batch;
or one generator for all, which draws in the reference's order. A pick that changes from scale to scale has
`at(schedule, k)`, which returns the pick of that scale.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nextscale.contracts import Generators, Pick
from nextscale.sampling.guidance import at_scale, checked
from nextscale.schedule import Schedule
from nextscale.settings import brief, finite_number, whole_number
from nextscale.tokens import Soft

LEAST_TEMPERATURE = 1e-6  # logits over less are no numbers any more


class ScalePick(Protocol):
    """A pick that changes from scale to scale."""

    def at(self, schedule: Schedule, k: int) -> Pick:
        """The pick of scale k."""


def greedy(logits: Tensor, generators: Generators) -> Tensor:
    """The most likely token."""
    return logits.argmax(dim=-1)


def multinomial(logits: Tensor, generators: Generators) -> Tensor:
    """A token drawn by its probability."""
    probabilities = logits.softmax(dim=-1)
    if isinstance(generators, torch.Generator):
        return _draw(probabilities.flatten(0, 1), generators).view(logits.shape[:-1])
    return torch.stack([_draw(p, g) for p, g in zip(probabilities, generators, strict=True)])


def top_k_top_p(k: int = 0, p: float = 0.0) -> Pick:
    """Draw among the `k` most likely tokens, and of these among the fewest that hold the share `p`; 0 = no limit.

    As in the reference, tokens that tie with the k-th stay too, and the most likely one always stays.
    """
    k, p = _check(k, p)

    def pick(logits: Tensor, generators: Generators) -> Tensor:
        return multinomial(filter_logits(logits, k, p), generators)

    return pick


@dataclass(frozen=True)
class gumbel_soft:  # noqa: N801 - reads as the function that it is to its users
    """The reference's `more_smooth`: soft weights over the codebook, sharper from scale to scale, instead of ids.

    At progress r: softmax(((1 + r) logits + Gumbel noise) / max(0.27 (1 - 0.95 r), 0.005)) of the filtered logits. A token is
    drawn as well, and not used, so that the stream of random numbers is the reference's.
    """

    k: int = 0
    p: float = 0.0

    def __post_init__(self) -> None:
        for name, number in zip("kp", _check(self.k, self.p), strict=True):
            object.__setattr__(self, name, number)

    def at(self, schedule: Schedule, k: int) -> Pick:
        progress = schedule.progress(k)
        temperature = max(0.27 * (1 - progress * 0.95), 0.005)

        def pick(logits: Tensor, generators: Generators) -> Soft:
            logits = filter_logits(logits, self.k, self.p)
            multinomial(logits, generators)
            if isinstance(generators, torch.Generator):
                noise = _gumbel(logits, generators)
            else:
                noise = torch.stack([_gumbel(row, g) for row, g in zip(logits, generators, strict=True)])
            return Soft(((logits * (1 + progress) + noise) / temperature).softmax(dim=-1))

        return pick


@dataclass(frozen=True)
class tempered:  # noqa: N801 - reads as the function that it is to its users
    """`pick` on logits that are divided by a temperature: one number, or one a scale. Below 1 is sharper."""

    pick: Pick | ScalePick
    temperature: float | Sequence[float]

    def __post_init__(self) -> None:
        check_pick(self.pick)
        object.__setattr__(self, "temperature", checked(self.temperature, _temperature))

    def at(self, schedule: Schedule, k: int) -> Pick:
        temperature = at_scale(self.temperature, schedule, k)
        pick = pick_at(self.pick, schedule, k)
        return lambda logits, generators: pick(logits / temperature, generators)


def _temperature(number: Any) -> float:
    hint = "; a temperature must be above 0, use ns.greedy for 0"
    return finite_number("temperature", number, LEAST_TEMPERATURE, 1000, hint)


def check_pick(pick: Any) -> None:
    """Raise ValueError for what is no pick: a name, a number, or the function that makes one."""
    if isinstance(pick, type) or pick is top_k_top_p or not (callable(pick) or hasattr(pick, "at")):
        raise ValueError(
            f"pick: expected ns.greedy, ns.multinomial, ns.top_k_top_p(900, 0.96) or the like, got {brief(pick)}"
        )


def pick_at(pick: Pick | ScalePick, schedule: Schedule, k: int) -> Pick:
    """The pick of scale k."""
    return pick.at(schedule, k) if hasattr(pick, "at") else pick


def filter_logits(logits: Tensor, k: int = 0, p: float = 0.0) -> Tensor:
    """Logits with all but the chosen tokens at -inf; first top-k, then top-p on what is left. Never in place."""
    survivors = logits.shape[-1]
    if 0 < k < survivors:
        threshold = logits.topk(k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
        survivors = int((logits > -torch.inf).sum(dim=-1).max())  # more than k where values tie
    if p > 0:
        # Only what top-k left can have mass, so only that is sorted; ascending, as the cumulative sum must round.
        values, ids = logits.topk(survivors, dim=-1)
        values, ids = values.flip(-1), ids.flip(-1)
        remove = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
        remove[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, remove), -torch.inf)
    return logits


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    try:
        return torch.multinomial(probabilities, 1, replacement=True, generator=generator).squeeze(1)
    except RuntimeError as error:
        if probabilities.isfinite().all():
            raise
        raise FloatingPointError(
            "the model gives logits that are not finite, so no token can be drawn; its weights are broken, or too large for "
            "the numbers it computes in"
        ) from error


def _gumbel(logits: Tensor, generator: torch.Generator) -> Tensor:
    return -torch.empty_like(logits).exponential_(generator=generator).log()


def _check(k: Any, p: Any) -> tuple[int, float]:
    try:
        return whole_number("k", k, 0, sys.maxsize), finite_number("p", p, 0, 1)
    except ValueError:
        raise ValueError(
            f"top_k needs a whole k >= 0 and top_p 0 <= p <= 1 (0: no limit), got k={brief(k)}, p={brief(p)}"
        ) from None
