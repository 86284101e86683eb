"""Objectives: what the generator is told while it trains, what it must predict, and how that is judged."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.contracts import Conditioner, Pyramid
from nextscale.draws import BatchPart, Draws
from nextscale.evaluation.likelihood import evaluate_likelihood
from nextscale.schedule import Schedule
from nextscale.tokenizer.pyramid import teacher_inputs
from nextscale.tokens import Tokens, each, split
from nextscale.training.config import GeneratorLoss, TrainConfig

if TYPE_CHECKING:
    from nextscale.training.generator_task import Run

Wants = Literal["tokens", "features", "items", "nothing"]


class Batch(NamedTuple):
    """What one step of training compares: inputs [B, L - l_0, C] of every scale but the first (None if it is the only
    one), targets [B, L] (of bits [B, L, d]), and the weight of each token [L], summing to 1 (None: 1 / L each)."""

    schedule: Schedule
    inputs: Tensor | None
    targets: Tokens
    weights: Tensor | None = None


class NextScale:
    """All scales are predicted at once, each from what the coarser ones have summed up to: the likelihood of Eq. 6 of VAR
    (`contracts.Objective`).

    An objective of this kind says what it wants and how that becomes inputs and targets, its `batch`.
    """

    wants: ClassVar[Wants] = "tokens"

    def batch(self, pyramid: Pyramid, content: Any, schedule: Schedule, draws: Draws) -> Batch:
        """Inputs and targets of `content` (tokens or features [B, ...]), with the images' random numbers. The schedule of the
        batch may be another one."""
        raise NotImplementedError

    def frozen(self, run: Run) -> dict[str, nn.Module]:
        """No other networks."""
        return {}

    def loss(self, run: Run, part: BatchPart, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The mean loss of a part of a batch's tokens under the model's head, and the same for each scale."""
        system, model, draws, settings = run.system, run.model, part.draws, run.loss
        content = each(lambda t: t.to(run.config.device), part.batch["content"])
        schedule, inputs, targets, weights = self.batch(system.tokenizer.pyramid, content, system.schedule, draws)
        newest, weight = stage(settings, run.config, len(schedule), step)
        span = schedule.span(0, newest + 1)  # all scales but in progressive stages
        targets = each(lambda t: t[:, : span.end], targets)
        inputs = None if inputs is None or not newest else inputs[:, : span.end - span.lengths[0]]
        told = run.told(part)
        with run.autocast():
            condition = dropped(system.condition(told), model.conditioner, settings, draws)
            h = model.hidden(inputs, model.prepare(condition), span)
            losses = model.head.loss(h, targets, draws, settings.label_smoothing)  # [B, l]
        pieces = losses.split(span.lengths, dim=1)
        per_scale: dict[str, Tensor | float] = {f"loss/{k}": piece.detach().mean() for k, piece in enumerate(pieces)}
        if weights is not None:
            pieces = (losses * (weights[: span.end] * schedule.length)).split(span.lengths, dim=1)
        if settings.scale_weights:
            settings.check(len(schedule))  # the batch's own
            pieces = tuple(piece * factor for piece, factor in zip(pieces, settings.scale_weights, strict=False))
        # A token weighs 1 / L of the whole schedule; the newest scale of a progressive stage warms up.
        warm = [1.0] * newest + [weight]
        loss = torch.stack([piece.sum(dim=1) * w for piece, w in zip(pieces, warm, strict=True)]).sum(0).mean()
        loss = loss / schedule.length
        return loss, {"loss": loss.detach(), **per_scale}

    def judge(self, run: Run, data: Any) -> dict[str, float]:
        """The head's measures of held-out tokens, all scales known but the one that is predicted."""
        if data is None:
            return {}
        return evaluate_likelihood(run.system, data.content, data.said()).metrics()

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Less loss is better."""
        return -metrics["loss"] if "loss" in metrics else None


@dataclass(frozen=True)
class TeacherForcing(NextScale):
    """VAR's objective: every scale is predicted from the true coarser ones."""

    def batch(self, pyramid: Pyramid, content: Any, schedule: Schedule, draws: Draws) -> Batch:
        return Batch(schedule, teacher_inputs(pyramid, split(content, schedule.lengths), schedule), content)


def dropped(condition: Condition, conditioner: Conditioner, settings: GeneratorLoss, draws: Draws) -> Condition:
    """Replace parts of some images' conditions by their nulls, for guidance without a classifier: all parts together with
    probability `drop_condition`, and each part on its own as `drop_parts` says."""
    null, device = conditioner.null(condition), condition.device
    together = (draws.rand() < settings.drop_condition).to(device)
    condition = condition.mix(null, dict.fromkeys(condition.parts(), together))
    alone = {name: (draws.rand() < share).to(device) for name, share in sorted(settings.drop_parts.items())}
    return condition.mix(null, alone) if alone else condition


def stage(loss: GeneratorLoss, config: TrainConfig, scales: int, step: int) -> tuple[int, float]:
    """Newest scale of a progressive stage and the weight of its tokens; the last scale and 1 in ordinary training."""
    last = scales - 1
    if not loss.progressive:
        return last, 1.0
    newest = _newest(loss, config, last, step)
    if newest in (last, _newest(loss, config, last, 0)):
        return newest, 1.0
    # The newest scale never goes back, so the step before its first one is found by halving.
    begun = bisect_left(range(step + 1), newest, key=lambda s: _newest(loss, config, last, s)) - 1
    return newest, min(1.0, max(0.01, (step - begun) / loss.progressive_warmup))


def _newest(loss: GeneratorLoss, config: TrainConfig, last: int, step: int) -> int:
    first, end = min(loss.progressive_from, last), loss.progressive * config.steps
    if step <= config.warmup or step >= end:
        return first if step <= config.warmup else last
    return first + round((last - first) * min(1.0, (step - config.warmup) / (end - config.warmup)))
