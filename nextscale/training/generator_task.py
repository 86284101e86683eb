"""Generator training: a model, its optimizer, and an objective that owns the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextscale.contracts import LayerCache, Model, Objective, Opaque
from nextscale.draws import BatchPart
from nextscale.encoded import Choices, EncodedImages, not_said, said_by, told_of
from nextscale.model.block import BlockWrapper
from nextscale.modules import as_module
from nextscale.processes import Team
from nextscale.sampling.loop import sample
from nextscale.schedule import Span
from nextscale.system import System
from nextscale.training.average import Average
from nextscale.training.config import GeneratorLoss, TrainConfig
from nextscale.training.fit import adamw, autocast, descend, scaler
from nextscale.training.log import Shown

# As in the reference: tables and scales are added or multiplied, so decay would only pull them to zero.
NO_DECAY = ("positions", "offset", "log_scale")


@dataclass
class Run:
    """A training, as its objective sees it."""

    system: System  # `system.model` is what is trained
    model: Model  # the same weights, called as the settings want it (its activations computed again, for example)
    config: TrainConfig
    loss: GeneratorLoss
    data: Any  # `EncodedImages`, items, or None, as the objective wants
    frozen: dict[str, nn.Module] = field(default_factory=dict)  # what the objective made of the weights at the start

    def autocast(self) -> torch.autocast:
        """The context in which a model runs forward, in the precision of the run."""
        return autocast(self.config)

    def told(self, part: BatchPart) -> dict[str, list[Any]]:
        """What is told of the images of a part of a batch, by name; where several fit, one of them at random."""
        if "told" in part.batch:
            return self.data.pick(part.batch["told"], part.draws)
        told: dict[str, list[Any]] = {}
        for name, reader in self.system.readers.items():
            fields = [field for field in (reader.field, reader.field + "s") if field in part.batch]
            if not fields:
                raise ValueError(not_said(reader.field, part.batch))
            items = [{field: part.batch[field][i] for field in fields} for i in range(len(part.draws))]
            values = [said_by(item, reader.field, reader.shape) for item in items]
            if reader.shape is None:
                places = part.draws.rand().tolist()
                values = [several[int(place * len(several))] for several, place in zip(values, places, strict=True)]
            told[name] = values
        return told


class Together(nn.Module):
    """A model and the parts of its system that are trained with it."""

    def __init__(self, model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model, self.parts = model, nn.ModuleDict(parts)


def trained_parts(system: System) -> dict[str, nn.Module]:
    """The parts beside the model that train with it, by name."""
    return {name: module for name, module in system.parts.items() if system.roles[name] == "trained"}


class GeneratorTask:
    """A transformer, the parts that train with it, their optimizer, and an objective (`Task` of the loop)."""

    def __init__(
        self,
        system: System,
        config: TrainConfig,
        loss: GeneratorLoss,
        data: Any,
        val: Any,
        pictures: int = 48,
        team: Team = Team(),
        objective: Objective | None = None,
    ) -> None:
        self.system = system.to(config.device)
        model = system.need_model()
        parts = trained_parts(system)
        self.module = Together(as_module(model), parts) if parts else as_module(model)
        self.config, self.data, self.val, self.count = config, data, val, pictures
        self.objective: Objective = objective or system.objective
        if config.compile:
            for block in model.blocks:
                as_module(block).compile()
        self.run = Run(system, recomputed(model) if config.recompute else model, config, loss, data)
        self.run.frozen = self.objective.frozen(self.run)
        for network in self.run.frozen.values():
            network.to(config.device).requires_grad_(False).eval()
        sharded = config.device if config.shard else ""
        # An objective may use no more than the model; whether it does is its own business.
        self.forward: Any = team.wrap(self.module, self.losses, unused=bool(parts), sharded=sharded)
        self.optimizers = {"model": adamw(self.module, config, NO_DECAY)}
        self.scalers = {"model": scaler(config)}
        self.team = team
        self.tokens_per_image = system.schedule.length
        self.flop_per_image = 3 * model.flop(system.schedule)  # with the backward pass

    def step(self, parts: Sequence[BatchPart], step: int) -> dict[str, Tensor | float]:
        optimizer, scaler = self.optimizers["model"], self.scalers["model"]
        return descend(self.module, optimizer, scaler, self.forward, parts, step, self.config.clip, self.team)

    def losses(self, part: BatchPart, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a part of a batch, and what to log."""
        return self.objective.loss(self.run, part, step)

    def validate(self, module: nn.Module) -> dict[str, float]:
        return self.objective.judge(self.run, self.val)

    def alarms(self, metrics: Mapping[str, Tensor | float]) -> list[str]:
        """Nothing of a generator is watched for."""
        return []

    def score(self, metrics: Mapping[str, float]) -> float | None:
        return self.objective.score(metrics)

    def pictures(self, module: nn.Module) -> dict[str, Shown]:
        """Samples of the first labels in turn, a column each, with the same seeds each time."""
        told = shown(self.system, self.data, self.count)
        samples = self.system.output.pictures(sample(self.system, told, seed=0))
        said = told[next(iter(told))]
        labels = [self._words(value) for value in said]
        columns = len(dict.fromkeys(labels)) if len(set(labels)) > 1 else 8
        return {} if samples is None else {"samples": Shown(samples, columns, labels)}

    def _words(self, value: Any) -> str:
        """What a picture is called that was told a value."""
        if isinstance(value, int) and value < len(self.system.classes):
            return self.system.classes[value]
        return "" if value is None or isinstance(value, Tensor) else str(value)

    def averaged(self, average: Average | None, step: int) -> None:
        """Nothing is left to copy."""

    def together(self, function: Callable[..., Any]) -> Any:
        """Call `function` where the weights are whole."""
        return self.forward(function=function) if self.config.shard else function()


def shown(system: System, data: Any, count: int, most: int = 12) -> dict[str, list[Any]]:
    """What `count` pictures are told: of images with the first `most` labels in turn; without images, all labels in turn."""
    primary = next(iter(system.readers))
    if isinstance(data, EncodedImages):
        column, said = data.told[primary], data.said()
        rows = list(range(min(most, len(data))))
        if isinstance(column, Choices):
            first = column.numbers[:, 0]
            rows = [int((first == number).nonzero()[0]) for number in first.unique()[:most]]
        kinds = [{name: values[row] for name, values in said.items()} for row in rows]
    elif data is not None:
        rows = list(range(min(most, len(data))))
        first_said = told_of(system, data, rows)
        kinds = [{name: values[i] for name, values in first_said.items()} for i in rows]
    else:
        kinds = [{primary: value} for value in system.readers[primary].choices[:most]] or [{}]
    return {name: [kinds[i % len(kinds)].get(name) for i in range(count)] for name in system.readers}


def recomputed(model: Model) -> Model:
    """A transformer of the same weights whose blocks keep no activations: the backward pass computes them again."""
    return model.with_blocks([Recomputed(block) for block in model.blocks])


class Recomputed(BlockWrapper):
    """A block under `torch.utils.checkpoint`; dropout draws the same numbers again."""

    def forward(self, h: Tensor, prepared: Opaque, span: Span, cache: LayerCache | None = None) -> Tensor:
        return checkpoint(self.block, h, prepared, span, cache, use_reentrant=False)
