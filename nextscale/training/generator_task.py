"""Generator training: teacher forcing over all scales at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextscale.draws import Draws, Part
from nextscale.encoded import EncodedImages
from nextscale.evaluation.likelihood import evaluate_likelihood
from nextscale.processes import Team
from nextscale.sampling.loop import sample
from nextscale.schedule import Schedule
from nextscale.system import System
from nextscale.training.average import Average
from nextscale.training.config import GeneratorLoss, TrainConfig
from nextscale.training.loop import adamw, autocast, descend, scaler
from nextscale.training.objective import drop_condition

# As in the reference: tables and scales are added or multiplied, so decay would only pull them to zero.
NO_DECAY = ("positions", "offset", "log_scale")


def stage(loss: GeneratorLoss, config: TrainConfig, scales: int, step: int) -> tuple[int, float]:
    """Newest scale of a progressive stage and the weight of its tokens; the last scale and 1 in ordinary training."""
    last = scales - 1
    if not loss.progressive:
        return last, 1.0
    newest = _newest(loss, config, last, step)
    if newest in (last, _newest(loss, config, last, 0)):
        return newest, 1.0
    begun = next(s for s in range(step, -1, -1) if _newest(loss, config, last, s) != newest)
    return newest, min(1.0, max(0.01, (step - begun) / loss.progressive_warmup))


def _newest(loss: GeneratorLoss, config: TrainConfig, last: int, step: int) -> int:
    first, end = min(loss.progressive_from, last), loss.progressive * config.steps
    if step <= config.warmup or step >= end:
        return first if step <= config.warmup else last
    return first + round((last - first) * min(1.0, (step - config.warmup) / (end - config.warmup)))


class GeneratorTask:
    """A transformer, its optimizer and its objective (`Task` of the loop)."""

    def __init__(
        self,
        system: System,
        config: TrainConfig,
        loss: GeneratorLoss,
        data: EncodedImages,
        val: EncodedImages | None,
        pictures: int = 48,
        team: Team = Team(),
    ) -> None:
        self.system = system.to(config.device)
        self.module = system.need_model()
        self.config, self.loss, self.data, self.val, self.count = config, loss, data, val, pictures
        if config.compile:
            for block in self.module.blocks:
                block.compile()
        self.model = recomputed(self.module) if config.recompute else self.module
        self.forward: Any = team.wrap(self.module, self.losses, sharded=config.device if config.shard else "")
        self.optimizers = {"model": adamw(self.module, config, NO_DECAY)}
        self.scalers = {"model": scaler(config)}
        self.team = team
        self.tokens_per_image = system.schedule.length
        self.flop_per_image = flop_per_image(self.module, system.schedule)

    def step(self, parts: Sequence[Part], step: int) -> dict[str, Tensor | float]:
        optimizer, scaler = self.optimizers["model"], self.scalers["model"]
        return descend(self.module, optimizer, scaler, self.forward, parts, step, self.config.clip, self.team)

    def losses(self, part: Part, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a part of a batch, and what to log."""
        system, model, draws = self.system, self.model, part.draws
        content = part.batch["content"].to(self.config.device)
        schedule, inputs, targets, weights = system.objective.batch(
            system.tokenizer.pyramid, content, system.schedule, draws
        )
        newest, weight = stage(self.loss, self.config, len(schedule), step)
        span = schedule.span(0, newest + 1)  # all scales but in progressive stages
        targets = targets[:, : span.end]
        inputs = None if inputs is None or not newest else inputs[:, : span.end - span.lengths[0]]
        labels = self.data.values(self.pick_labels(part.batch["labels"], draws))
        with autocast(self.config):
            condition = system.condition(labels)
            condition = drop_condition(condition, model.conditioner.null(condition), self.loss.drop_condition, draws)
            h = model.hidden(inputs, model.prepare(condition), span)
            losses = model.head.loss(h, targets, label_smoothing=self.loss.label_smoothing)  # [B, l]
        pieces = losses.split(span.lengths, dim=1)
        per_scale: dict[str, Tensor | float] = {f"loss/{k}": piece.detach().mean() for k, piece in enumerate(pieces)}
        if weights is not None:
            pieces = (losses * (weights[: span.end] * schedule.length)).split(span.lengths, dim=1)
        if self.loss.scale_weights:
            factors = self.loss.scale_weights
            if len(factors) != len(schedule):
                raise ValueError(
                    f"scale_weights: expected one factor for each of {len(schedule)} scales, got {factors}"
                )
            pieces = tuple(piece * factor for piece, factor in zip(pieces, factors, strict=False))
        # A token weighs 1 / L of the whole schedule; the newest scale of a progressive stage warms up.
        warm = [1.0] * newest + [weight]
        loss = torch.stack([piece.sum(dim=1) * w for piece, w in zip(pieces, warm, strict=True)]).sum(0).mean()
        loss = loss / schedule.length
        return loss, {"loss": loss.detach(), **per_scale}

    def pick_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        """One of the labels that fit each image: [B, n] -> [B]."""
        return labels.gather(1, draws.randint(0, labels.shape[1], 1)).squeeze(1)

    def validate(self, module: nn.Module) -> dict[str, float]:
        if self.val is None:
            return {}
        labels = self.val.values(self.val.labels[:, 0])
        return evaluate_likelihood(self.system.with_model(module), self.val.content, labels).metrics()

    def alarms(self, metrics: Mapping[str, Tensor | float]) -> list[str]:
        """Nothing of a generator is watched for."""
        return []

    @staticmethod
    def score(metrics: Mapping[str, float]) -> float:
        """Less loss is better."""
        return -metrics["loss"]

    def pictures(self, module: nn.Module) -> dict[str, Tensor]:
        """Samples of the first labels in turn, with the same seeds each time."""
        first = self.data.labels[:, 0].unique()[:12]
        labels = self.data.values(first.repeat(-(-self.count // len(first)))[: self.count])
        return {"samples": sample(self.system.with_model(module), labels, seed=0)}

    def averaged(self, average: Average | None, step: int) -> None:
        """Nothing is left to copy."""

    def together(self, function: Callable[..., Any]) -> Any:
        """Call `function` where the weights are whole."""
        return self.forward(function=function) if self.config.shard else function()


def flop_per_image(model: Any, schedule: Schedule) -> float:
    """Floating-point operations of a training step for each image, estimated: three times those of the forward pass's
    matrix products in branches, input embedding, head and attention."""
    parts = [model.embed_input, model.head, *(branch for block in model.blocks for branch in block.branches)]
    weights = sum(m.weight.numel() for part in parts for m in part.modules() if isinstance(m, nn.Linear))
    pairs = sum(n * end for n, end in zip(schedule.lengths, schedule.ends, strict=True))  # of queries and keys
    return 3.0 * (2 * weights * schedule.length + 4 * pairs * model.settings.dim * len(model.blocks))


def recomputed(model: Any) -> Any:
    """A transformer of the same weights whose blocks keep no activations: the backward pass computes them again."""
    return model.with_blocks([Recomputed(block) for block in model.blocks])


class Recomputed(nn.Module):
    """A block under `torch.utils.checkpoint`; dropout draws the same numbers again."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def prepare(self, condition: Any) -> Any:
        """The block's own."""
        return self.block.prepare(condition)

    def forward(self, *values: Any) -> Tensor:
        return checkpoint(self.block, *values, use_reentrant=False)
