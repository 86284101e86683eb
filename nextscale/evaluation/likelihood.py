"""How well a generator predicts held-out tokens, scale by scale, beside what a table of frequencies would reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.evaluation.reconstruction import code_counts
from nextscale.schedule import Schedule
from nextscale.system import System, teacher_logits


@dataclass(frozen=True)
class LikelihoodReport:
    """One entry a scale; cross-entropies in nats a token."""

    cross_entropy: list[float]
    accuracy: list[float]  # of the most likely token, or bit, 0 to 1
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Cross-entropy over all tokens."""
        return sum(ce * n for ce, n in zip(self.cross_entropy, self.lengths, strict=True)) / sum(self.lengths)

    def metrics(self) -> dict[str, float]:
        """Flat names for the log."""
        named = {"cross_entropy": self.cross_entropy, "accuracy": self.accuracy}
        return {"loss": self.mean} | {f"{n}/{k}": v for n, values in named.items() for k, v in enumerate(values)}


@torch.no_grad()
def evaluate_likelihood(
    system: System, tokens: Tensor, labels: Tensor | Sequence[str], batch_size: int = 64
) -> LikelihoodReport:
    """Teacher-forced cross-entropy and accuracy of tokens [N, L] (of bits [N, L, d]) under labels or prompts [N]."""
    scored = [_score(system, *batch) for batch in _batches(tokens, labels, batch_size)]
    losses, hits = (torch.cat(parts).double().mean(dim=0) for parts in zip(*scored, strict=True))
    return LikelihoodReport(losses.tolist(), hits.tolist(), system.schedule.lengths)


@dataclass(frozen=True)
class ConditionGain:
    """What the right label or caption is worth: nats a token that another image's costs more, at each scale and over all.

    The mean of all tokens comes with its standard error over groups of images (variants of one drawing count as one).
    """

    scales: list[float]
    mean: float
    standard_error: float
    groups: int


@torch.no_grad()
def condition_gain(
    system: System,
    tokens: Tensor,
    labels: Tensor | Sequence[str],
    groups: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> ConditionGain:
    """Compare held-out tokens [N, L] under their own labels or captions with those of another image, drawn at random from
    another of the `groups` int64 [N]. A model that does not listen gains 0.

    Raises ValueError if all images are of one group.
    """
    other = _derangement(groups, torch.Generator().manual_seed(seed))
    wrong = labels[other] if isinstance(labels, Tensor) else [labels[i] for i in other.tolist()]
    right_losses, wrong_losses = (
        torch.cat([_score(system, *batch)[0] for batch in _batches(tokens, told, batch_size)]).double()
        for told in (labels, wrong)
    )
    gain = wrong_losses - right_losses  # [N, K]
    share = torch.tensor(system.schedule.lengths, dtype=torch.double) / system.schedule.length
    _, place = groups.unique(return_inverse=True)
    sizes = torch.bincount(place).double()
    each = torch.zeros_like(sizes).index_add_(0, place, gain @ share) / sizes  # one number a group
    return ConditionGain(
        scales=gain.mean(dim=0).tolist(),
        mean=float(each.mean()),
        standard_error=float(each.std() / len(each) ** 0.5),
        groups=len(each),
    )


def _derangement(groups: Tensor, generator: torch.Generator) -> Tensor:
    """For each image another one, of another group; each is taken about once."""
    if len(groups.unique()) < 2:
        raise ValueError(
            "the images are all of one group, so none can be told what another one shows; give more images"
        )
    other = torch.randperm(len(groups), generator=generator)
    while len(same := (groups[other] == groups).nonzero().squeeze(1)):
        other[same] = torch.randint(len(groups), (len(same),), generator=generator)
    return other


def _batches(
    tokens: Tensor, labels: Tensor | Sequence[str], batch_size: int
) -> Iterator[tuple[Tensor, Tensor | Sequence[str]]]:
    for first in range(0, len(tokens), batch_size):
        rows = slice(first, first + batch_size)
        yield tokens[rows], labels[rows]


def _score(system: System, tokens: Tensor, labels: Tensor | Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy of each image at each scale, [B, K] each."""
    schedule, model = system.schedule, system.need_model()
    targets = tokens.to(system.device)
    targets = targets.long() if targets.dtype == torch.int32 else targets
    logits = teacher_logits(system, schedule.split(targets), system.condition(labels), schedule)
    losses = model.head.loss_of(logits, targets).cpu()  # [B, L]
    right = (logits.argmax(dim=-1) == targets).float().cpu()
    right = right.flatten(2).mean(dim=2) if right.ndim > 2 else right  # of bits: their share
    by_scale = [torch.stack([part.mean(dim=1) for part in schedule.split(values)], dim=1) for values in (losses, right)]
    return by_scale[0], by_scale[1]


def unigram_entropy(tokens: Tensor, codes: int, schedule: Schedule) -> list[float]:
    """Entropy in nats of the codes' frequencies at each scale, of tokens [N, L]; of bits [N, L, d] the mean over the d.

    The frequencies are those of the very tokens that are judged, so no table can do better on them: this is the lowest
    cross-entropy of any predictor that knows the scale alone.
    """
    shares = [counts / counts.sum(dim=1, keepdim=True) for counts in code_counts(schedule.split(tokens), codes)]
    return [float(torch.special.entr(share).sum(dim=1).mean()) for share in shares]


def frequency_cross_entropy(known: Tensor, tokens: Tensor, codes: int, schedule: Schedule) -> list[float]:
    """Cross-entropy in nats of tokens [N, L] under the codes' frequencies at each scale in `known` tokens [M, L].

    What a table learned from the training tokens reaches on held-out ones; one is added to every count, since a code
    may not have occurred.
    """
    entropies = []
    learned, judged = (code_counts(schedule.split(part), codes) for part in (known, tokens))
    for counts, seen in zip(learned, judged, strict=True):
        logs = ((counts + 1) / (counts + 1).sum(dim=1, keepdim=True)).log()
        entropies.append(float(-(logs * seen).sum() / seen.sum()))
    return entropies


def frequency_accuracy(known: Tensor, tokens: Tensor, codes: int, schedule: Schedule) -> list[float]:
    """How often the most frequent code of each scale in `known` tokens [M, L] is right for tokens [N, L], 0 to 1; of bits
    the mean over them."""
    learned, judged = (code_counts(schedule.split(part), codes) for part in (known, tokens))
    hits = [
        seen.gather(1, counts.argmax(dim=1, keepdim=True)).sum() for counts, seen in zip(learned, judged, strict=True)
    ]
    return [float(hit / seen.sum()) for hit, seen in zip(hits, judged, strict=True)]
