"""FastVAR: cached token pruning (Guo et al., ICCV 2025, arXiv 2503.23367).

Most time goes to the last scales, where most tokens are settled. There only the pivotal tokens, those far from the mean of
their map, pass through a branch; the others get what the same branch gave at an earlier scale, resized. The very last
scales may be left out. No training; the kept tokens are an ordinary shorter sequence, so fused attention applies.

Changes by room. model: branches of the blocks are wrapped from outside; what a branch gave at the last dense scale is kept
in the layer's cache. sampling: the loop may end early. Weights stay as they are, and a teacher-forced pass stays dense.

Differs from the original code: any batch size (there the rotary tables are gathered for two rows only), the cached scale is
the last dense one (there it is found by its number of tokens; for both published settings that is the same scale), and a
ratio belongs to a place in the schedule counted from its end, not to a side in tokens, so every schedule is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.contracts import Block, Branch, LayerCache, Opaque
from nextscale.modules import as_module
from nextscale.sampling.loop import Options, StepperWrapper, stepper_of
from nextscale.sampling.state import State
from nextscale.schedule import Schedule, Span
from nextscale.settings import Settings
from nextscale.system import Labels, System

APPLIES_TO = "any system that samples scale by scale"


class Config(Settings):
    """How much is pruned where. The defaults are those published for HART: all layers, the last two of 14 scales."""

    ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.5, 0.75),
        max_length=1024,
        description="share of tokens left out at the last scales, in their order; 1 leaves a scale out",
    )
    dense_first: int = Field(0, ge=0, le=1024, description="first blocks that are not pruned")
    dense_last: int = Field(0, ge=0, le=1024, description="last blocks that are not pruned")
    select: Literal["pivotal", "random"] = Field("pivotal", description="kept tokens; random: to compare with")
    fill: Literal["cache", "zeros"] = Field("cache", description="of tokens left out; zeros: to compare with")

    @field_validator("ratios")
    @classmethod
    def _rising(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if 1 in ratios and any(ratio != 1 for ratio in ratios[ratios.index(1) :]):
            raise ValueError(f"only the last scales can be left out (ratio 1), got {ratios}")
        return ratios

    def at(self, schedule: Schedule, k: int) -> float:
        """The share of tokens left out at scale k."""
        place = k - (len(schedule) - len(self.ratios))
        return self.ratios[place] if place >= 0 else 0.0

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError for a schedule of which no scale would be dense."""
        scales = len(schedule)
        if len(self.ratios) >= scales and any(self.ratios):
            raise ValueError(
                f"{len(self.ratios)} ratios leave none of {scales} scales dense; give fewer ratios, or a longer schedule"
            )


def tiny() -> Config:
    """Half of the tokens of the last scale."""
    return Config(ratios=(0.5,))


PUBLISHED: dict[str, Config] = {
    # 13 scales up to 64x64: of the last four two are pruned and two left out, in blocks 3 to 27 of 32. Figures of the paper:
    # 2.61 s to 0.95 s an image, GenEval 0.73 to 0.72.
    "infinity-2b": Config(ratios=(0.4, 0.5, 1.0, 1.0), dense_first=3, dense_last=4),
    # 14 scales up to 64x64. 0.95 s to 0.63 s an image, GenEval 0.51 to 0.51.
    "hart": Config(),
}


def apply(system: System, config: Config = Config()) -> System:
    """A system that samples with pruned tokens; it shares all weights with `system`, which stays as it is.

    Raises ValueError if the settings leave no scale or no block to prune from, or if the system is pruned already.
    """
    if any(change.recipe == "fastvar" for change in system.changes):
        raise ValueError("this system is pruned already; give all ratios at once, to the system before (`system.base`)")
    model = system.need_model()
    depth = len(model.blocks)
    config.check(system.schedule)
    if config.dense_first + config.dense_last >= depth:
        raise ValueError(
            f"dense_first={config.dense_first} and dense_last={config.dense_last} leave none of {depth} blocks to prune"
        )
    blocks: list[Block] = [
        _pruned(block, config) if config.dense_first <= i < depth - config.dense_last else block
        for i, block in enumerate(model.blocks)
    ]
    stepper = stepper_of(system).skipping(sum(ratio == 1 for ratio in config.ratios))
    return system.changed("fastvar", config, model=model.with_blocks(blocks), stepper=Pruned(stepper, config))


def _pruned(block: Block, config: Config) -> Block:
    return block.with_branches(PrunedBranch(branch, i, config) for i, branch in enumerate(block.branches))


@dataclass(frozen=True)
class Pruned(StepperWrapper):
    """The steps of another stepper, over schedules that can be pruned: the caller may bring another one than the system's."""

    config: Config

    def start(self, system: System, told: Labels, options: Options) -> State:
        self.config.check(options.schedule or system.schedule)
        return self.inner.start(system, told, options)


class PrunedBranch(nn.Module):
    """A residual branch that computes some tokens and fills in the others."""

    def __init__(self, branch: Branch, place: int, config: Config) -> None:
        super().__init__()
        self.branch: Branch
        self.register_module("branch", as_module(branch))
        self.place, self.config = place, config

    def prepare(self, condition: Condition) -> Opaque:
        """Cross-attention prepares its own part."""
        return as_module(self.branch).prepare(condition)  # type: ignore[operator]

    def forward(self, h: Tensor, prepared: Opaque, span: Span, cache: LayerCache | None = None) -> Tensor:
        """As the branch itself: h [B, l, D] to what is added to it, [B, l, D]."""
        if cache is None:  # teacher forcing: all scales at once
            return self.branch(h, prepared, span, cache)
        schedule = span.schedule
        ratios = [self.config.at(schedule, k) for k in range(span.first, span.stop)]
        if not any(ratios):
            update = self.branch(h, prepared, span, cache)
            if span.stop < len(schedule) and self.config.at(schedule, span.stop) > 0:
                last = update[:, -span.lengths[-1] :]  # before it come coarser scales at hand, and a prefix
                cache.outputs[self.place] = last.mT.unflatten(-1, span.sizes[-1])  # [B, D, h, w]
            return update
        if len(span) > 1 or self.place not in cache.outputs:
            raise ValueError(
                f"fastvar prunes a scale with the help of the dense one before it, got a step over scales {span.first} to "
                f"{span.stop - 1}, before which none was kept; use it with a system that samples scale by scale"
            )
        kept = h.shape[1] - int(h.shape[1] * ratios[0])
        index = pivotal(h, kept) if self.config.select == "pivotal" else _random(h, kept, span.first)  # [B, kept]
        rows = index.unsqueeze(-1).expand(-1, -1, h.shape[-1])
        update = self.branch(h.gather(1, rows), prepared, span.keeping(index), cache)
        filled = F.interpolate(cache.outputs[self.place], size=span.sizes[0], mode="area").flatten(2).mT
        if self.config.fill == "zeros":
            filled = torch.zeros_like(filled)
        return filled.scatter(1, rows, update)


def pivotal(h: Tensor, kept: int) -> Tensor:
    """The tokens farthest from the mean of their map, farthest first: [B, l, D] -> int64 [B, kept]."""
    distance = (h - h.mean(dim=1, keepdim=True)).square().sum(dim=-1)  # [B, l]
    return distance.argsort(dim=1, descending=True)[:, :kept]


def _random(h: Tensor, kept: int, k: int) -> Tensor:
    """The same tokens in every row, so that an image does not depend on its batch."""
    noise = torch.rand(h.shape[1], generator=torch.Generator().manual_seed(k))
    return noise.argsort()[:kept].expand(len(h), -1).to(h.device)
