"""How well a generator predicts held-out tokens, scale by scale, beside what a table of frequencies would reach."""

from __future__ import annotations

from collections.abc import Sequence
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
    schedule, model = system.schedule, system.need_model()
    loss_sums = torch.zeros(len(schedule))
    hits = torch.zeros(len(schedule))
    for first in range(0, len(tokens), batch_size):
        rows = slice(first, first + batch_size)
        targets = tokens[rows].to(system.device)
        targets = targets.long() if targets.dtype == torch.int32 else targets
        logits = teacher_logits(system, schedule.split(targets), system.condition(labels[rows]), schedule)
        losses = schedule.split(model.head.loss_of(logits, targets).cpu())
        right = (logits.argmax(dim=-1) == targets).float().cpu()
        hit = schedule.split(right.flatten(2).mean(dim=2) if right.ndim > 2 else right)  # of bits: their share
        loss_sums += torch.stack([loss.sum() for loss in losses])
        hits += torch.stack([part.sum() for part in hit])
    counts = torch.tensor(schedule.lengths) * len(tokens)
    return LikelihoodReport((loss_sums / counts).tolist(), (hits / counts).tolist(), schedule.lengths)


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
