"""Images from images, scale by scale: variations of one (`vary`), and what lies between two (`interpolate`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.contracts import Pick
from nextscale.modules import usual_defaults
from nextscale.pixels import as_images
from nextscale.sampling.edit import keep_tokens
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.loop import OnScale, sample
from nextscale.sampling.pick import ScalePick
from nextscale.schedule import Schedule
from nextscale.settings import brief, finite_number, whole_number
from nextscale.system import Labels, System, check_system, decode, encode
from nextscale.tokens import Soft, first_tensor

ORDERS = ("coarse", "fine", "together")
GOLDEN = (5**0.5 - 1) / 2


def vary(
    system: System,
    x: Any,
    strength: float = 0.5,
    labels: Labels = None,
    *,
    keep: int | None = None,
    guidance: Guidance | None = None,
    pick: Pick | ScalePick | None = None,
    seed: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Draw images like given ones, [B, 3, H, W] in [-1, 1]: the coarse scales stay, the finer ones are drawn anew.

    Args:
        x: images [B, 3, H, W] in [-1, 1] of the system's size, or what else `as_images` takes. For several variations of one,
            repeat it: `x.repeat(n, 1, 1, 1)`.
        strength: how much changes, from 0 (what the tokens of the image give) to 1 (plain sampling). Of K scales the first
            (1 - strength) * K stay; where that is no whole number, so does a part of the tokens of the next one, evenly spread.
        labels: one for all images, or one an image; None (the default) is the null class.
        keep: instead of the strength, how many scales stay.
        guidance, pick, seed, generator, on_scale: as in `sample`.

    Raises ValueError for images, numbers and labels that do not fit.
    """
    check_system(system)
    system.need_model()
    kept = kept_scales(system.schedule, strength, keep)
    x = as_images(x, system.tokenizer.channels)
    rows = system.told(labels, len(x))
    system.check_told(rows)
    masks = [mask.to(system.device) for mask in first_scales(system.schedule, kept)]
    edit = keep_tokens(encode(system, x), masks)
    return sample(
        system, rows, guidance=guidance, pick=pick, edit=edit, seed=seed, generator=generator, on_scale=on_scale
    )


def kept_scales(schedule: Schedule, strength: float = 0.5, keep: int | None = None) -> float:
    """How many of the scales stay, see `vary`; of the last of them perhaps a part."""
    if keep is not None:
        return whole_number("keep", keep, 0, len(schedule), " scales")
    return (1 - finite_number("strength", strength, 0, 1)) * len(schedule)


def first_scales(schedule: Schedule, kept: float) -> list[Tensor]:
    """Masks bool [1, l_k] that are True at the first `kept` scales; of a scale that is kept in part, at as many tokens, which
    the golden ratio spreads evenly."""
    masks = []
    for k, length in enumerate(schedule.lengths):
        share = min(1.0, max(0.0, kept - k))
        order = (torch.arange(length, dtype=torch.float64) * GOLDEN % 1).argsort()
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[0, order[: round(share * length)]] = True
        masks.append(mask)
    return masks


@torch.no_grad()
@usual_defaults()
def interpolate(system: System, a: Any, b: Any, weight: Any, *, order: str = "coarse") -> Tensor:
    """What lies between images a and b, [B, 3, H, W] in [-1, 1]: one scale after the other goes over to b.

    Nothing is drawn at random: token maps are mixed softly, and the tokenizer decodes them.

    Args:
        a, b: images of the system's size, [B, 3, H, W] in [-1, 1] or what else `as_images` takes; one serves for all.
        weight: of b, from 0 (what the tokens of a give) to 1 (those of b): a number, or one an image, as
            `torch.linspace(0, 1, 9)`.
        order: the scales that go first: "coarse" (the layout, then the details), "fine" (the other way), or "together".

    Raises ValueError for images that do not fit, and for a system whose tokens are no choices.
    """
    check_system(system)
    if order not in ORDERS:
        raise ValueError(f"order: expected {', '.join(ORDERS)}, got {brief(order)}")
    choices = system.tokenizer.pyramid.codes
    if not choices:
        raise ValueError("interpolate mixes codes or bits, and the tokens of this system are vectors")
    first, second = (encode(system, as_images(x, system.tokenizer.channels)) for x in (a, b))
    weights = _weights(weight)
    counts = {len(first_tensor(first[0])), len(first_tensor(second[0])), len(weights)}
    if len(counts - {1}) > 1:
        raise ValueError(f"expected as many images a, images b and weights, or one for all, got {sorted(counts)}")
    scales, mixed = len(first), []
    for k, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        place = {"coarse": k, "fine": scales - 1 - k}.get(order)
        share = weights if place is None else (weights * scales - place).clamp(0, 1)
        one, other = (F.one_hot(first_tensor(tokens).long(), choices).float() for tokens in (ours, theirs))
        share = share.to(one).view(-1, *[1] * (one.ndim - 1))
        mixed.append(Soft(one * (1 - share) + other * share))
    return decode(system, mixed)


def _weights(weight: Any) -> Tensor:
    """Weights as float64 [B]."""
    try:
        weights = torch.as_tensor(weight, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        weights = torch.full((), float("nan"))
    weights = weights.reshape(1) if weights.ndim == 0 else weights
    if weights.ndim != 1 or not len(weights) or not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError(
            f"weight: expected a number from 0 to 1, or one for each image, got {brief(weight)}; try torch.linspace(0, 1, 9)"
        )
    return weights
